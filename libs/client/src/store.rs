//! A node's blocks: who wants to read or put some asks here, and moves the bytes with `transfer`.

use std::time::Duration;

use node::Channel;
use proto::v1;
use proto::v1::kv_store_client::KvStoreClient;
use tonic::Streaming;
use types::{BlockEvent, BlockHash, Checksum, Epoch, Error, Generation, LeaseId};

use crate::call::{self, UNARY_DEADLINE};

/// Client of `perigee.v1.KvStore`. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Store {
    client: KvStoreClient<Channel>,
    deadline: Duration,
}

/// Memory of a peer that one-sided operations may touch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteRegion {
    /// Where its transport is, such as `tcp://10.0.0.1:9000`.
    pub endpoint: String,
    /// The incarnation of the transport.
    pub epoch: Epoch,
    /// The region.
    pub key: u64,
}

/// A block that may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteBlock {
    /// Identity of the content.
    pub hash: BlockHash,
    /// First byte within the region.
    pub offset: u64,
    /// The slot's use that the promise is about.
    pub generation: Generation,
    /// What the read bytes must hash to.
    pub checksum: Checksum,
}

/// The leading blocks that the node holds, pinned under a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acquired {
    /// To be released after reading.
    pub lease: LeaseId,
    /// Where the blocks are.
    pub region: RemoteRegion,
    /// In the order they were asked for.
    pub blocks: Vec<RemoteBlock>,
}

/// Slots that may be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reserved {
    /// To be committed or aborted.
    pub reservation_id: u64,
    /// Where the slots are. `None` if no slot is offered.
    pub region: Option<RemoteRegion>,
    /// Leading blocks that the node holds already.
    pub held_blocks: u64,
    /// First byte of each block after those; fewer than asked for if memory is short.
    pub block_offsets: Vec<u64>,
}

/// A part of a node's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogBatch {
    /// The node's incarnation.
    pub epoch: Epoch,
    /// The events replace everything known of the node.
    pub snapshot: bool,
    /// The last batch of a snapshot.
    pub snapshot_end: bool,
    /// Sequence number of the last event; of a snapshot, the number it stands for.
    pub sequence: u64,
    /// What happened.
    pub events: Vec<BlockEvent>,
}

/// A store in numbers, as `perigee.v1.StatsResponse` documents them.
pub type StoreStats = v1::StatsResponse;

impl Store {
    /// Calls over `channel`.
    pub fn new(channel: Channel) -> Self {
        let client = KvStoreClient::new(channel);
        Self {
            client: client
                .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(proto::MESSAGE_BYTES_MAX),
            deadline: UNARY_DEADLINE,
        }
    }

    /// Gives unary calls, and the opening of streams, another deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Pins the longest leading run of `hashes` that the node holds. A miss is `None`.
    ///
    /// # Errors
    ///
    /// `conflict` if the node is of another KV space than `kv_root`'s; the node cannot be reached; or it answers with
    /// other blocks than were asked for.
    pub async fn acquire(
        &self,
        kv_root: BlockHash,
        hashes: &[BlockHash],
        lease_ttl: Duration,
    ) -> Result<Option<Acquired>, Error> {
        let mut client = self.client.clone();
        let request = v1::AcquireRequest {
            kv_root: kv_root.0.to_vec(),
            hashes: proto::convert::hashes_to_wire(hashes),
            lease_ttl_ms: millis(lease_ttl),
            moved: false,
        };
        let request = call::request(request, self.deadline);
        let response = call::unary("KvStore/Acquire", self.deadline, client.acquire(request)).await?;
        if response.blocks.is_empty() {
            return Ok(None);
        }
        let blocks: Vec<_> = response.blocks.iter().map(block).collect::<Result<_, _>>()?;
        let asked_for = blocks.len() <= hashes.len()
            && blocks.iter().zip(hashes).all(|(block, hash)| block.hash == *hash);
        if !asked_for {
            return Err(Error::internal(
                "KvStore/Acquire: the peer answers with blocks that were not asked for",
            ));
        }
        Ok(Some(Acquired {
            lease: LeaseId(response.lease_id),
            region: region("KvStore/Acquire", response.region)?,
            blocks,
        }))
    }

    /// Ends a lease. False if it had expired: only checksums vouch for what was read then.
    ///
    /// # Errors
    ///
    /// The node cannot be reached; the lease runs out by itself.
    pub async fn release(&self, lease: LeaseId) -> Result<bool, Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::ReleaseRequest { lease_id: lease.0 }, self.deadline);
        let response = call::unary("KvStore/Release", self.deadline, client.release(request)).await?;
        Ok(response.held)
    }

    /// Grants write access to slots for those of `hashes` that the node lacks. `parent` is the root, or a block that the
    /// node holds.
    ///
    /// # Errors
    ///
    /// `conflict` if the node is of another KV space; `not_found` if it lacks the parent; the node cannot be reached.
    pub async fn reserve(
        &self,
        kv_root: BlockHash,
        parent: BlockHash,
        hashes: &[BlockHash],
        lease_ttl: Duration,
    ) -> Result<Reserved, Error> {
        const METHOD: &str = "KvStore/Reserve";
        let mut client = self.client.clone();
        let request = v1::ReserveRequest {
            kv_root: kv_root.0.to_vec(),
            parent: parent.0.to_vec(),
            hashes: proto::convert::hashes_to_wire(hashes),
            lease_ttl_ms: millis(lease_ttl),
        };
        let request = call::request(request, self.deadline);
        let response = call::unary(METHOD, self.deadline, client.reserve(request)).await?;
        let offered = response
            .held_blocks
            .saturating_add(response.block_offsets.len() as u64);
        if offered > hashes.len() as u64 {
            return Err(Error::internal(format!(
                "{METHOD}: the peer answers for {offered} blocks, but {} were asked for",
                hashes.len()
            )));
        }
        let region = match response.block_offsets.is_empty() {
            true => None,
            false => Some(region(METHOD, response.region)?),
        };
        Ok(Reserved {
            reservation_id: response.reservation_id,
            region,
            held_blocks: response.held_blocks,
            block_offsets: response.block_offsets,
        })
    }

    /// Publishes what was written to a reservation's slots. `checksums` are of all slots, in order.
    ///
    /// # Errors
    ///
    /// `corrupt` if a checksum does not fit; `not_found` if the reservation has expired; the node cannot be reached.
    pub async fn commit(&self, reservation_id: u64, checksums: &[Checksum]) -> Result<(), Error> {
        let mut client = self.client.clone();
        let request = v1::CommitRequest {
            reservation_id,
            checksums: checksums.iter().map(|checksum| checksum.0).collect(),
        };
        let request = call::request(request, self.deadline);
        call::unary("KvStore/Commit", self.deadline, client.commit(request)).await?;
        Ok(())
    }

    /// Gives a reservation back.
    ///
    /// # Errors
    ///
    /// The node cannot be reached; the reservation runs out by itself.
    pub async fn abort(&self, reservation_id: u64) -> Result<(), Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::AbortRequest { reservation_id }, self.deadline);
        call::unary("KvStore/Abort", self.deadline, client.abort(request)).await?;
        Ok(())
    }

    /// Follows the node's log from `from_sequence` on, if `epoch` is its own; from a snapshot otherwise.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time.
    pub async fn watch(&self, epoch: Epoch, from_sequence: u64) -> Result<LogStream, Error> {
        let mut client = self.client.clone();
        let request = v1::WatchRequest {
            epoch: epoch.0,
            from_sequence,
        };
        let stream = call::unary(LogStream::METHOD, self.deadline, client.watch(request)).await?;
        Ok(LogStream { stream })
    }

    /// Hints that these blocks, from their chain's first one on, will be asked for: the node reads into memory what it has on
    /// disk. Gives the leading blocks that are in memory, and how many follow them from disk.
    ///
    /// # Errors
    ///
    /// `conflict` if the node is of another KV space; the node cannot be reached in time.
    pub async fn prefetch(&self, kv_root: BlockHash, hashes: &[BlockHash]) -> Result<(u64, u64), Error> {
        let mut client = self.client.clone();
        let request = v1::PrefetchRequest {
            kv_root: kv_root.0.to_vec(),
            hashes: proto::convert::hashes_to_wire(hashes),
        };
        let request = call::request(request, self.deadline);
        let response = call::unary("KvStore/Prefetch", self.deadline, client.prefetch(request)).await?;
        Ok((response.held_blocks, response.promoting_blocks))
    }

    /// The store in numbers.
    ///
    /// # Errors
    ///
    /// The node cannot be reached in time.
    pub async fn stats(&self) -> Result<StoreStats, Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::StatsRequest {}, self.deadline);
        call::unary("KvStore/Stats", self.deadline, client.stats(request)).await
    }
}

/// One node's log.
#[derive(Debug)]
pub struct LogStream {
    stream: Streaming<v1::LogBatch>,
}

impl LogStream {
    const METHOD: &str = "KvStore/Watch";

    /// The next part; `None` when the node ends the stream because it shuts down. Cancel safe.
    ///
    /// # Errors
    ///
    /// The connection broke, or an event cannot be read: watch again.
    pub async fn next(&mut self) -> Result<Option<LogBatch>, Error> {
        let Some(batch) = call::next(Self::METHOD, &mut self.stream, None).await? else {
            return Ok(None);
        };
        let events = batch.events.iter().map(proto::convert::event);
        Ok(Some(LogBatch {
            epoch: Epoch(batch.epoch),
            snapshot: batch.snapshot,
            snapshot_end: batch.snapshot_end,
            sequence: batch.sequence,
            events: events.collect::<Result<_, _>>()?,
        }))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn block(wire: &v1::BlockDescriptor) -> Result<RemoteBlock, Error> {
    Ok(RemoteBlock {
        hash: proto::convert::hash("hash", &wire.hash)?,
        offset: wire.offset,
        generation: Generation(wire.generation),
        checksum: Checksum(wire.checksum),
    })
}

fn region(method: &str, wire: Option<v1::RemoteRegion>) -> Result<RemoteRegion, Error> {
    let v1::RemoteRegion { endpoint, epoch, key } =
        wire.ok_or_else(|| Error::internal(format!("{method}: the peer names no region")))?;
    Ok(RemoteRegion {
        endpoint,
        epoch: Epoch(epoch),
        key,
    })
}
