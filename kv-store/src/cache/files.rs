//! Blocks that leave as a stream and come back as one: `Export` and `Import`.
//!
//! Invariant: a block that comes back is cached only if its bytes match the checksum that it left with, in the space it left.

use std::collections::VecDeque;

use futures::{Stream, stream};
use proto::{convert, v1};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tonic::{Status, Streaming};
use types::{BlockHash, Checksum, Error, ErrorCode};

use super::Cache;
use crate::service::check_root;
use crate::store::{BlockPin, OwnedBlock, Store};

/// Bytes of one message: small beside the largest that is accepted, large beside what a message costs.
const PIECE_BYTES: usize = 1 << 20;
/// How long the sender of an import may say nothing.
const PIECE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// The held part of a chain: the header, then the bytes of its blocks. Blocks are pinned until they are sent.
pub(super) fn export(
    store: &Store,
    chain: &[BlockHash],
    permit: OwnedSemaphorePermit,
) -> Result<impl Stream<Item = Result<v1::ExportResponse, Status>> + Send + use<>, Error> {
    let pins = store.pin_held(chain);
    let Some(first) = pins.first() else {
        let message = "nothing of this chain is held here";
        return Err(Error::new(ErrorCode::NotFound, message));
    };
    let root = store.table().path(first.hash()).map(|path| path.root);
    let hashes: Vec<BlockHash> = pins.iter().map(BlockPin::hash).collect();
    let header = v1::ExportHeader {
        root: root.unwrap_or_default().0.to_vec(),
        block_bytes: store.layout().block_bytes() as u64,
        chain: Some(convert::chain_to_wire(&hashes)),
        checksums: pins.iter().map(|pin| pin.checksum().0).collect(),
    };
    let sending = Sending {
        store: store.clone(),
        header: Some(header),
        pins: pins.into(),
        sent: 0,
        _permit: permit,
    };
    Ok(stream::unfold(sending, async |mut sending| {
        let part = sending.next()?;
        Some((Ok(v1::ExportResponse { part: Some(part) }), sending))
    }))
}

struct Sending {
    store: Store,
    header: Option<v1::ExportHeader>,
    /// Blocks that are not sent yet.
    pins: VecDeque<BlockPin>,
    /// Bytes of the first of them that are.
    sent: usize,
    _permit: OwnedSemaphorePermit,
}

impl Sending {
    fn next(&mut self) -> Option<v1::export_response::Part> {
        use v1::export_response::Part;
        if let Some(header) = self.header.take() {
            return Some(Part::Header(header));
        }
        let pin = self.pins.front()?;
        let block_bytes = self.store.layout().block_bytes();
        let len = PIECE_BYTES.min(block_bytes - self.sent);
        let start = self.store.offset(pin.block()) + self.sent;
        let bytes = transfer::memory::copy_out(self.store.memory().as_ref(), start, len);
        let bytes = bytes.expect("blocks are inside the pool, and the pool is host memory");
        self.sent += len;
        if self.sent == block_bytes {
            self.sent = 0;
            self.pins.pop_front();
        }
        Some(Part::Data(bytes))
    }
}

/// Takes a stream of blocks in. What is held already is skipped.
pub(super) async fn import(
    cache: &Cache,
    mut parts: Streaming<v1::ImportRequest>,
) -> Result<v1::ImportResponse, Error> {
    use v1::import_request::Part;
    let Some(Part::Header(header)) = next(&mut parts).await? else {
        return Err(Error::invalid("part", "an import begins with its header"));
    };
    check_root(cache.store(), &header.kv_root)?;
    let file = header.file.unwrap_or_default();
    let root = convert::hash("root", &file.root)?;
    let chain = cache.chain("chain", file.chain.as_ref())?;
    let store = cache.store();
    let block_bytes = store.layout().block_bytes();
    if file.checksums.len() != chain.len() || file.block_bytes != block_bytes as u64 {
        let message = format!(
            "the file has {} checksums for {} blocks of {} bytes, but this node's blocks have {block_bytes}",
            file.checksums.len(),
            chain.len(),
            file.block_bytes
        );
        return Err(Error::invalid("file", message));
    }
    store.learn_root(root);
    let mut receiving = Receiving {
        store,
        block: None,
        filled: 0,
        parent: root,
        pins: Vec::new(),
        imported: 0,
    };
    while let Some(part) = next(&mut parts).await? {
        let Part::Data(bytes) = part else {
            return Err(Error::invalid("part", "an import has one header"));
        };
        let mut bytes = &bytes[..];
        while !bytes.is_empty() {
            let Some((hash, checksum)) = chain
                .get(receiving.pins.len())
                .zip(file.checksums.get(receiving.pins.len()))
            else {
                return Err(Error::invalid(
                    "part",
                    "the import has more bytes than its header says",
                ));
            };
            bytes = receiving.take(bytes, *hash, Checksum(*checksum))?;
        }
        tokio::task::yield_now().await;
    }
    let taken = receiving.pins.len();
    if taken < chain.len() {
        let message = format!("the import ended after {taken} of {} blocks", chain.len());
        return Err(Error::invalid("part", message));
    }
    Ok(v1::ImportResponse {
        imported_blocks: receiving.imported,
        held_blocks: taken as u64 - receiving.imported,
    })
}

async fn next(parts: &mut Streaming<v1::ImportRequest>) -> Result<Option<v1::import_request::Part>, Error> {
    let message = timeout(PIECE_TIMEOUT, parts.message()).await;
    let message = message.map_err(|_| {
        Error::new(
            ErrorCode::Timeout,
            format!("no part of the import came within {PIECE_TIMEOUT:?}"),
        )
    })?;
    let message = message.map_err(|status| proto::status::from_status(&status))?;
    Ok(message.and_then(|message| message.part))
}

struct Receiving<'a> {
    store: &'a Store,
    /// The block that is being filled.
    block: Option<OwnedBlock>,
    filled: usize,
    parent: BlockHash,
    /// What was taken so far, pinned until the end so that no block loses its parent.
    pins: Vec<BlockPin>,
    imported: u64,
}

impl Receiving<'_> {
    /// Puts leading bytes into the block that comes next; returns the rest.
    fn take<'b>(&mut self, bytes: &'b [u8], hash: BlockHash, checksum: Checksum) -> Result<&'b [u8], Error> {
        let block_bytes = self.store.layout().block_bytes();
        let block = match self.block.take() {
            Some(block) => block,
            None => {
                let mut blocks = self.store.allocate(1)?;
                blocks.pop().expect("one block was allocated")
            }
        };
        let (now, rest) = bytes.split_at(bytes.len().min(block_bytes - self.filled));
        let start = self.store.offset(block.block()) + self.filled;
        let copied = transfer::memory::copy_in(self.store.memory().as_ref(), start, now);
        copied.expect("blocks are inside the pool, and the pool is host memory");
        self.filled += now.len();
        if self.filled < block_bytes {
            self.block = Some(block);
            return Ok(rest);
        }
        self.filled = 0;
        let was_held = self.store.table().holds(hash);
        let pin = self.store.adopt(block, self.parent, hash, checksum)?;
        if pin.is_private() {
            return Err(Error::unavailable(
                "this node caches nothing now: it is quarantined",
            ));
        }
        self.imported += u64::from(!was_held);
        self.parent = hash;
        self.pins.push(pin);
        Ok(rest)
    }
}
