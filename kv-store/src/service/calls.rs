//! What peers ask over the transfer connection: `StoreCall`, answered in one round trip.
//!
//! Invariant: bytes that come with a call land in slots that nobody else knows, and are published only once every one
//! of them has matched its checksum. They are received by this process alone, so that nothing has to be fenced: a call
//! that breaks off drops its slots, and they are free.

use std::iter;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use prost::Message;
use proto::v1::{store_call, store_reply};
use proto::{convert, status, v1};
use tokio::time::timeout;
use transfer::{Calls, Keep, Place, Reply};
use types::{BlockHash, Checksum, Error, ErrorCode};

use super::put::{publish, verify};
use super::{Service, check_root};
use crate::store::{BlockPin, Landed, OwnedBlock, Store};

/// Longest wait for a parent that another call brings, whatever is asked for.
const PARENT_WAIT_MAX: Duration = Duration::from_secs(2);

impl Calls for Service {
    fn call(&self, message: &[u8], payload_bytes: u64) -> BoxFuture<'static, Reply> {
        let read = self.read_call(message);
        let service = self.clone();
        async move {
            let replied = match read {
                Ok(call) => service.answer_call(call, payload_bytes).await,
                Err(error) => Err(error),
            };
            replied.unwrap_or_else(|error| Reply::Answer(failed(&error)))
        }
        .boxed()
    }
}

impl Service {
    fn read_call(&self, message: &[u8]) -> Result<store_call::Call, Error> {
        let unreadable = |error: prost::DecodeError| Error::new(ErrorCode::Invalid, error.to_string());
        let v1::StoreCall { kv_root, call } = v1::StoreCall::decode(message).map_err(unreadable)?;
        check_root(&self.store, &kv_root)?;
        call.ok_or_else(|| Error::new(ErrorCode::Invalid, "a call that asks for nothing"))
    }

    async fn answer_call(&self, call: store_call::Call, payload_bytes: u64) -> Result<Reply, Error> {
        match call {
            store_call::Call::Exists(call) => {
                let hashes = self.read_hashes(&call.hashes)?;
                let held = self.store.exists(&hashes);
                let reply = store_reply::Reply::Exists(v1::ExistsReply { held });
                Ok(Reply::Answer(encode(reply)))
            }
            store_call::Call::Get(call) => self.get(&call).await,
            store_call::Call::Put(call) => self.put(call, payload_bytes),
        }
    }

    async fn get(&self, call: &v1::GetCall) -> Result<Reply, Error> {
        let hashes = self.read_hashes(&call.hashes)?;
        let given = if self.store.is_quarantined() {
            &[][..]
        } else {
            &hashes
        };
        // Held until they are pinned.
        let _promoted = self.promote(given).await;
        let pins = self.store.match_prefix(given);
        let got = |pin: &BlockPin| v1::GotBlock {
            generation: pin.generation().0,
            checksum: pin.checksum().0,
        };
        let blocks = pins.iter().map(got).collect();
        let runs = join(pins.iter().map(|pin| self.store.byte_range(pin.block())));
        let keep = Keep::new(Arc::new(pins));
        Ok(Reply::Give {
            message: encode(store_reply::Reply::Get(v1::GetReply { blocks })),
            from: Place {
                memory: self.store.memory(),
                runs,
                keep,
                unit_bytes: None,
            },
        })
    }

    fn put(&self, call: v1::PutCall, payload_bytes: u64) -> Result<Reply, Error> {
        self.store.check_takes()?;
        let hashes = self.read_hashes(&call.hashes)?;
        let block_bytes = self.store.layout().block_bytes() as u64;
        if call.checksums.len() != hashes.len() {
            let (given, blocks) = (call.checksums.len(), hashes.len());
            let message = format!("{given} checksums were given for {blocks} blocks");
            return Err(Error::invalid("checksums", message));
        }
        if payload_bytes != block_bytes * hashes.len() as u64 {
            let blocks = hashes.len();
            let message = format!("{payload_bytes} bytes came for {blocks} blocks of {block_bytes} bytes");
            return Err(Error::invalid("hashes", message));
        }
        let parent = convert::hash("parent", &call.parent)?;
        self.store.remember_tenant(&call.tenant);
        let parent_wait = Duration::from_millis(call.parent_wait_ms).min(PARENT_WAIT_MAX);
        if parent_wait.is_zero() && !self.store.is_root(parent) {
            // Looked at again when the bytes are here; refused now, they need not come.
            self.store.pin_parent(parent)?;
        }
        let held = self.store.lookup_len(&hashes);
        if held == hashes.len() {
            return Ok(Reply::Answer(encode(put_reply(held))));
        }
        // Also for those that are held: where a prefix is known, callers put what comes after it.
        let blocks = Arc::new(self.store.allocate_up_to(hashes.len()));
        let into = Place {
            memory: self.store.memory(),
            runs: join(blocks.iter().map(|block| self.store.byte_range(block.block()))),
            keep: Keep::new(blocks.clone()),
            unit_bytes: self.store.unit_bytes(),
        };
        let landing = Landing {
            store: self.store.clone(),
            blocks,
            parent,
            parent_wait,
            hashes,
            checksums: call.checksums,
        };
        let landed = Box::new(move |seen| {
            let landed = landing.landed(seen);
            async move { landed.await.unwrap_or_else(|error| failed(&error)) }.boxed()
        });
        Ok(Reply::Take { into, landed })
    }
}

/// Blocks on their way here.
struct Landing {
    store: Store,
    /// Slots for the first of the hashes.
    blocks: Arc<Vec<OwnedBlock>>,
    parent: BlockHash,
    parent_wait: Duration,
    hashes: Vec<BlockHash>,
    checksums: Vec<u64>,
}

impl Landing {
    /// `seen` are checksums of the first blocks, as far as they were seen.
    async fn landed(self, seen: Vec<Checksum>) -> Result<Vec<u8>, Error> {
        let blocks = Arc::into_inner(self.blocks);
        let blocks =
            blocks.ok_or_else(|| Error::new(ErrorCode::Internal, "the blocks are still being written"))?;
        let checksums: Vec<_> = self.checksums.into_iter().map(Checksum).collect();
        let promised = self.hashes.iter().copied().zip(checksums);
        let seen = seen.into_iter().map(Some).chain(iter::repeat(None));
        let landed = blocks.into_iter().zip(seen);
        let landed = landed.map(|(block, seen)| Landed::new(block, seen));
        let written: Vec<_> = landed.zip(promised).collect();
        verify(&self.store, &written).await?;
        let _before = self.store.await_parent(self.parent, self.parent_wait).await?;
        let held_blocks = publish(&self.store, written, self.parent);
        Ok(encode(put_reply(held_blocks)))
    }
}

impl Store {
    /// Pins a block that others hang under.
    pub(super) fn pin_parent(&self, parent: BlockHash) -> Result<Vec<BlockPin>, Error> {
        let pins = self.pin_held(&[parent]);
        if pins.is_empty() {
            let message =
                format!("parent {parent} is neither held by this node nor the root of a space it serves");
            return Err(Error::new(ErrorCode::NotFound, message));
        }
        Ok(pins)
    }

    /// As [`Store::pin_parent`], but waits for a block that is on its way. A root needs no pin.
    async fn await_parent(&self, parent: BlockHash, wait: Duration) -> Result<Vec<BlockPin>, Error> {
        let mut changes = self.changes();
        let arrives = async {
            loop {
                changes.mark_unchanged();
                if self.is_root(parent) {
                    return Vec::new();
                }
                let pins = self.pin_held(&[parent]);
                // The sender lives as long as the store.
                if !pins.is_empty() || changes.changed().await.is_err() {
                    return pins;
                }
            }
        };
        match timeout(wait, arrives).await {
            Ok(pins) => Ok(pins),
            Err(_) => self.pin_parent(parent),
        }
    }
}

/// Ranges as offsets and lengths, with those that touch made one.
fn join(ranges: impl Iterator<Item = Range<u64>>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for range in ranges {
        let bytes = range.end - range.start;
        match runs.last_mut() {
            Some((offset, len)) if *offset + *len == range.start => *len += bytes,
            _ => runs.push((range.start, bytes)),
        }
    }
    runs
}

fn put_reply(held_blocks: usize) -> store_reply::Reply {
    store_reply::Reply::Put(v1::PutReply {
        held_blocks: held_blocks as u64,
    })
}

fn failed(error: &Error) -> Vec<u8> {
    encode(store_reply::Reply::Failed(status::to_failure(error)))
}

fn encode(reply: store_reply::Reply) -> Vec<u8> {
    v1::StoreReply { reply: Some(reply) }.encode_to_vec()
}

#[cfg(test)]
mod tests;
