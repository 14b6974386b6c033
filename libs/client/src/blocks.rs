//! A node's blocks by value: whether it has them, and moving them to and from memory of this process.
//!
//! Invariant: what [`Blocks::get_into`] counts as got has matched its checksum in this process's memory; what
//! [`Blocks::put_from`] counts as held has matched its checksum in the node's.
//!
//! One call over the transfer connection asks and moves at once; large batches are split, and some parts are under way
//! at a time. Nothing is copied on the way: bytes go between the buffer and the node's pool.
//!
//! Elsewhere: leases and reservations for whoever moves blocks by itself (`store.rs`), the calls (`transfer::calls`).

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt, TryStreamExt};
use prost::Message;
use proto::v1::{store_call, store_reply};
use proto::{convert, status, v1};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use transfer::{Call, Keep, Payload, RegionId, Transport};
use types::{BlockHash, Checksum, Epoch, Error, ErrorCode, Memory, NodeRecord};

/// Bytes of one call, unless a block is larger: large against the cost of a call, and small enough that hashing finds
/// them in the processor's caches.
const PART_BYTES: u64 = 1 << 20;
/// Calls under way for one batch; as many as the transport has connections to a peer.
const PARTS_IN_FLIGHT: usize = 4;
/// Hashes of one question about existence. 20 bytes each on the wire.
const EXISTS_MAX: usize = 2048;
/// Blocks of one call that moves: each costs a hash, a checksum and a place in a message of 56 KiB.
const BLOCKS_MAX: usize = 1024;
/// How long a part waits at the node for the part before it, which left earlier.
const PARENT_WAIT: Duration = Duration::from_secs(2);
/// Every batch ends within this, unless the client was made with another deadline.
const DEADLINE: Duration = Duration::from_secs(30);

/// Client of one node's blocks. Clones are one and the same.
#[derive(Clone)]
pub struct Blocks {
    node: Arc<Node>,
    deadline: Duration,
}

struct Node {
    transport: Arc<dyn Transport>,
    endpoint: String,
    epoch: Epoch,
    kv_root: BlockHash,
    block_bytes: u64,
    /// Of the parts of all batches: no more than the transport has connections.
    lanes: Semaphore,
}

/// Memory for some blocks, one after the other, which the transport moves best. Clones are handles of the same memory.
///
/// Calls that use the same blocks of it at the same time get mixed up bytes, which their checksums show.
#[derive(Clone)]
pub struct Buffer {
    inner: Arc<BufferInner>,
}

struct BufferInner {
    memory: Arc<dyn Memory>,
    region: RegionId,
    transport: Arc<dyn Transport>,
    block_bytes: u64,
}

impl Drop for BufferInner {
    fn drop(&mut self) {
        // Without a runtime the process is ending.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(self.transport.unregister(self.region));
        }
    }
}

/// Where blocks belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// The block before the first one, or the root of a space.
    pub parent: BlockHash,
    /// Whose space it is; empty for the space that all share.
    pub tenant: &'a str,
}

impl Blocks {
    /// Reaches the node of this entry of the registry by `transport`.
    ///
    /// # Errors
    ///
    /// `invalid` if the node holds no blocks.
    pub fn new(transport: Arc<dyn Transport>, record: &NodeRecord) -> Result<Self, Error> {
        let Some(space) = &record.kv_space else {
            let message = format!("node {} is a {} and holds no blocks", record.id, record.role);
            return Err(Error::invalid("node", message));
        };
        Ok(Self {
            node: Arc::new(Node {
                transport,
                endpoint: record.transfer_endpoint.clone(),
                epoch: record.epoch,
                kv_root: space.root(),
                block_bytes: space.layout.block_bytes() as u64,
                lanes: Semaphore::new(PARTS_IN_FLIGHT),
            }),
            deadline: DEADLINE,
        })
    }

    /// Gives every batch another deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.node.block_bytes as usize
    }

    /// Root of the space that all tenants share.
    pub fn kv_root(&self) -> BlockHash {
        self.node.kv_root
    }

    /// Memory for `blocks` blocks. All bytes are zero.
    ///
    /// # Errors
    ///
    /// `overloaded` if there is no such memory.
    pub fn allocate(&self, blocks: usize) -> Result<Buffer, Error> {
        let transport = self.node.transport.clone();
        let memory = transport.allocate(blocks.max(1) * self.block_bytes())?;
        let region = transport.register(memory.clone())?;
        Ok(Buffer {
            inner: Arc::new(BufferInner {
                memory,
                region,
                transport,
                block_bytes: self.node.block_bytes,
            }),
        })
    }

    /// Which of these blocks the node holds, wherever they are in their chains. They may be gone a moment later.
    ///
    /// # Errors
    ///
    /// `conflict` if the node is of another KV space; `fenced` if it is another incarnation; it cannot be reached in time.
    pub async fn exists(&self, hashes: &[BlockHash]) -> Result<Vec<bool>, Error> {
        let deadline = Instant::now() + self.deadline;
        let mut held = Vec::with_capacity(hashes.len());
        for hashes in hashes.chunks(EXISTS_MAX) {
            let asked = hashes.len();
            let hashes = convert::hashes_to_wire(hashes);
            let call = store_call::Call::Exists(v1::ExistsCall { hashes });
            match self.node.call(call, Payload::None, deadline).await? {
                (store_reply::Reply::Exists(reply), _) if reply.held.len() == asked => {
                    held.extend(reply.held)
                }
                _ => return Err(self.node.nonsense("exists")),
            }
        }
        Ok(held)
    }

    /// Reads the longest leading run of these consecutive blocks that the node holds into `buffer`, from its block `first`
    /// on, and says how many they are. Every one of them was verified. A miss is 0.
    ///
    /// # Errors
    ///
    /// As of [`Blocks::exists`]; `invalid` if the buffer is too small.
    pub async fn get_into(
        &self,
        hashes: &[BlockHash],
        buffer: &Buffer,
        first: usize,
    ) -> Result<usize, Error> {
        buffer.check(first, hashes.len(), self.node.block_bytes)?;
        let deadline = Instant::now() + self.deadline;
        let parts = self.parts(hashes.len());
        let parts: Vec<_> = parts
            .map(|part| {
                let (hashes, at) = (hashes[part.clone()].to_vec(), first + part.start);
                let (node, buffer) = (self.node.clone(), buffer.clone());
                async move { node.get(&hashes, &buffer, at, deadline).await }
            })
            .collect();
        let got = in_flight(&self.node.lanes, parts).await?;
        Ok(self.leading(hashes.len(), &got))
    }

    /// Puts these consecutive blocks, which lie in `buffer` from its block `first` on, into the node's pool, and says how
    /// many leading ones it holds now: fewer than all where it has no memory for more.
    ///
    /// # Errors
    ///
    /// As of [`Blocks::get_into`]; `not_found` if the parent is not held; `corrupt` if bytes changed on their way.
    pub async fn put_from(
        &self,
        place: Place<'_>,
        hashes: &[BlockHash],
        buffer: &Buffer,
        first: usize,
    ) -> Result<usize, Error> {
        buffer.check(first, hashes.len(), self.node.block_bytes)?;
        let deadline = Instant::now() + self.deadline;
        let parts = self.parts(hashes.len()).map(|part| {
            let before = part.start.checked_sub(1).map(|before| hashes[before]);
            let put = v1::PutCall {
                parent: before.unwrap_or(place.parent).0.to_vec(),
                hashes: convert::hashes_to_wire(&hashes[part.clone()]),
                checksums: Vec::new(),
                tenant: place.tenant.to_owned(),
                parent_wait_ms: before.map_or(0, |_| PARENT_WAIT.as_millis() as u64),
            };
            let (node, buffer, at) = (self.node.clone(), buffer.clone(), first + part.start);
            async move { node.put(put, &buffer, at, deadline).await }
        });
        let held = in_flight(&self.node.lanes, parts.collect()).await?;
        Ok(self.leading(hashes.len(), &held))
    }

    /// Leading ones of `blocks` blocks, where each part did so many of its own.
    fn leading(&self, blocks: usize, done: &[usize]) -> usize {
        let parts = self.parts(blocks).zip(done);
        let whole = parts.take_while(|(part, done)| part.len() == **done).count();
        done.iter().take(whole + 1).sum()
    }

    /// The parts into which so many blocks are split.
    fn parts(&self, blocks: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let of_one = usize::try_from(PART_BYTES / self.node.block_bytes).unwrap_or(BLOCKS_MAX);
        let of_one = of_one.clamp(1, BLOCKS_MAX);
        (0..blocks)
            .step_by(of_one)
            .map(move |start| start..blocks.min(start + of_one))
    }
}

/// Runs parts of a batch, a few at a time and on as many threads as there are; one alone runs right here. The first
/// error ends all.
async fn in_flight<T: Send + 'static>(
    lanes: &Semaphore,
    mut parts: Vec<impl Future<Output = Result<T, Error>> + Send + 'static>,
) -> Result<Vec<T>, Error> {
    if parts.len() <= 1 {
        return match parts.pop() {
            Some(part) => Ok(vec![part.await?]),
            None => Ok(Vec::new()),
        };
    }
    // Begun in order, and none before it has a connection: a part may have to wait at the node for the one before, and must
    // not keep that one from getting there.
    let begun = stream::iter(parts).map(|part| async {
        let _lane = lanes.acquire().await;
        AbortOnDrop(tokio::spawn(part)).ended().await
    });
    begun.buffered(PARTS_IN_FLIGHT).try_collect().await
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> AbortOnDrop<Result<T, Error>> {
    async fn ended(mut self) -> Result<T, Error> {
        (&mut self.0)
            .await
            .unwrap_or_else(|error| Err(Error::internal(format!("a part of a batch ended early: {error}"))))
    }
}

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Node {
    async fn get(
        &self,
        hashes: &[BlockHash],
        buffer: &Buffer,
        first: usize,
        deadline: Instant,
    ) -> Result<usize, Error> {
        let payload = Payload::Receive {
            region: buffer.inner.region,
            runs: vec![buffer.run(first, hashes.len())],
            keep: Keep::new(buffer.inner.clone()),
            unit_bytes: NonZeroU64::new(buffer.inner.block_bytes),
        };
        let call = store_call::Call::Get(v1::GetCall {
            hashes: convert::hashes_to_wire(hashes),
        });
        let (reply, seen) = match self.call(call, payload, deadline).await? {
            (store_reply::Reply::Get(reply), seen) if reply.blocks.len() <= hashes.len() => (reply, seen),
            _ => return Err(self.nonsense("get")),
        };
        let mut verified = 0;
        for block in &reply.blocks {
            // A block that was replaced while it was read is not held any more.
            let found = match seen.get(verified) {
                Some(seen) => *seen,
                None => buffer.checksum(first + verified)?,
            };
            if found != Checksum(block.checksum) {
                break;
            }
            verified += 1;
        }
        Ok(verified)
    }

    async fn put(
        &self,
        mut put: v1::PutCall,
        buffer: &Buffer,
        first: usize,
        deadline: Instant,
    ) -> Result<usize, Error> {
        let blocks = put.hashes.len();
        for block in first..first + blocks {
            put.checksums.push(buffer.checksum(block)?.0);
        }
        let payload = Payload::Send {
            region: buffer.inner.region,
            runs: vec![buffer.run(first, blocks)],
        };
        let call = store_call::Call::Put(put);
        match self.call(call, payload, deadline).await? {
            (store_reply::Reply::Put(reply), _) if reply.held_blocks as usize <= blocks => {
                Ok(reply.held_blocks as usize)
            }
            _ => Err(self.nonsense("put")),
        }
    }

    /// The answer, and the checksums of the first blocks that came with it, as far as they were seen.
    async fn call(
        &self,
        call: store_call::Call,
        payload: Payload,
        deadline: Instant,
    ) -> Result<(store_reply::Reply, Vec<Checksum>), Error> {
        let message = v1::StoreCall {
            kv_root: self.kv_root.0.to_vec(),
            call: Some(call),
        };
        let call = Call {
            endpoint: self.endpoint.clone(),
            epoch: self.epoch,
            message: message.encode_to_vec(),
            payload,
        };
        let answered = self.transport.call(call, deadline).await?;
        let reply = v1::StoreReply::decode(answered.message.as_slice());
        match reply.ok().and_then(|reply| reply.reply) {
            None => Err(self.nonsense("a call")),
            Some(store_reply::Reply::Failed(failure)) => Err(status::from_failure(&failure)),
            Some(reply) => Ok((reply, answered.checksums)),
        }
    }

    fn nonsense(&self, what: &str) -> Error {
        let message = format!("{} answered {what} with what is no answer to it", self.endpoint);
        Error::new(ErrorCode::Internal, message)
    }
}

impl Buffer {
    /// Blocks that fit.
    pub fn blocks(&self) -> usize {
        self.inner.memory.len() / self.inner.block_bytes as usize
    }

    /// Writes the bytes of a block; those that are not given stay what they were.
    ///
    /// # Errors
    ///
    /// `invalid` if there is no such block, or more bytes are given than it has.
    pub fn fill(&self, block: usize, bytes: &[u8]) -> Result<(), Error> {
        self.check(block, 1, (bytes.len() as u64).max(self.inner.block_bytes))?;
        let offset = block * self.inner.block_bytes as usize;
        Ok(
            transfer::memory::copy_in(self.inner.memory.as_ref(), offset, bytes)
                .map_err(transfer::TransferError::from)?,
        )
    }

    /// The bytes of a block.
    ///
    /// # Errors
    ///
    /// `invalid` if there is no such block.
    pub fn bytes(&self, block: usize) -> Result<Vec<u8>, Error> {
        self.look(block, <[u8]>::to_vec)
    }

    /// The checksum of a block.
    ///
    /// # Errors
    ///
    /// `invalid` if there is no such block.
    pub fn checksum(&self, block: usize) -> Result<Checksum, Error> {
        self.look(block, Checksum::of)
    }

    fn look<R>(&self, block: usize, look: impl FnOnce(&[u8]) -> R) -> Result<R, Error> {
        self.check(block, 1, self.inner.block_bytes)?;
        let len = self.inner.block_bytes as usize;
        let looked = transfer::memory::with_bytes(self.inner.memory.as_ref(), block * len, len, look);
        Ok(looked.map_err(transfer::TransferError::from)?)
    }

    /// Offset and length of some blocks.
    fn run(&self, first: usize, blocks: usize) -> (u64, u64) {
        let bytes = self.inner.block_bytes;
        (first as u64 * bytes, blocks as u64 * bytes)
    }

    fn check(&self, first: usize, blocks: usize, block_bytes: u64) -> Result<(), Error> {
        if block_bytes != self.inner.block_bytes {
            let ours = self.inner.block_bytes;
            let message = format!("a buffer for blocks of {ours} bytes is no place for {block_bytes} bytes");
            return Err(Error::invalid("buffer", message));
        }
        if first.checked_add(blocks).is_none_or(|end| end > self.blocks()) {
            let has = self.blocks();
            let message = format!("{blocks} blocks from block {first} on do not fit into a buffer of {has}");
            return Err(Error::invalid("buffer", message));
        }
        Ok(())
    }
}
