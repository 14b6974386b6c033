//! What moves between the pool and a bucket: segments that requests come back for go down, and come up where a prompt ends.
//!
//! Invariants:
//! - A block is pinned only while it is copied, never while a bucket is waited for.
//! - What goes down is verified on its way, so that rot does not spread; what comes up is verified before it is committed.
//!
//! Elsewhere: requests and bounds (`object.rs`), which segments are worth it (`object/history.rs`).

use std::ops::Range;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use proto::v1;
use tokio::time::{Instant, timeout_at};
use transfer::memory;
use types::{BlockHash, Checksum};

use crate::object::history::Candidate;
use crate::object::segment::SegmentError;
use crate::object::{ObjectError, Objects};
use crate::store::{BlockPin, Store};

/// What a chain's blocks are, and which of them are wanted.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// Parent of the first block.
    pub(crate) root: BlockHash,
    /// The prompt's full blocks.
    pub(crate) chain: &'a [BlockHash],
    /// The first one that is wanted. Those before it are pinned by the caller.
    pub(crate) from: usize,
    /// The first one that is not.
    pub(crate) end: usize,
}

impl Store {
    /// The bucket below, if there is one.
    pub fn objects(&self) -> Option<&Objects> {
        self.inner().objects.get()
    }

    /// Puts a bucket below the pool and the disk.
    ///
    /// # Panics
    ///
    /// If there is one already.
    pub fn mount_objects(&self, objects: Objects) {
        let mounted = self.inner().objects.set(objects);
        assert!(mounted.is_ok(), "a bucket is mounted once");
    }

    /// Whether blocks may be below the pool, so that a prompt that memory does not hold is worth a look there.
    pub fn has_lower_tiers(&self) -> bool {
        self.disk().is_some() || self.objects().is_some()
    }

    /// What came of the bucket since the start.
    pub(crate) fn object_stats(&self) -> Option<v1::ObjectTierStats> {
        let objects = self.objects()?;
        let metrics = &self.inner().metrics.object;
        Some(v1::ObjectTierStats {
            usable: objects.is_usable(),
            read_bytes: metrics.read_bytes.get(),
            written_bytes: metrics.written_bytes.get(),
            missed_segments: metrics.missed_segments.get(),
            errors: metrics.errors.get(),
            corruptions: metrics.corruptions.get(),
        })
    }

    /// A request found these leading blocks of its chain in a cache.
    pub(crate) fn note_reused(&self, run: &[BlockHash]) {
        if let Some(objects) = self.objects() {
            objects.history().reused(run);
        }
    }

    /// Somebody wants these leading blocks of a chain to be kept.
    pub(crate) fn note_wanted(&self, run: &[BlockHash]) {
        if let Some(objects) = self.objects() {
            objects.history().wanted(run);
        }
    }
}

/// Whether asking the bucket for the block at `from` of the chain is worth a request.
pub(crate) fn may_hold(store: &Store, chain: &[BlockHash], from: usize) -> bool {
    let Some(objects) = store.objects().filter(|objects| objects.is_usable()) else {
        return false;
    };
    let segment = objects.grid().segments(from, chain.len()).next();
    let name = segment.map(|segment| chain[segment.end - 1]);
    name.is_some_and(|name| objects.history().may_be_stored(&name, crate::store::now()))
}

/// Brings what the bucket has of the wanted blocks into the pool, as many as come before `deadline`. They come back pinned, in the
/// order of the chain.
///
/// Dropping the future stops it; what is complete by then stays cached.
pub(crate) async fn promote(store: &Store, wanted: Wanted<'_>, deadline: Instant) -> Vec<BlockPin> {
    let mut promoted = Vec::new();
    let Some(objects) = store.objects().filter(|objects| objects.is_usable()) else {
        return promoted;
    };
    let metrics = &store.inner().metrics.object;
    let deadline = deadline.min(Instant::now() + objects.bounds().timeout);
    let segments = objects.grid().segments(wanted.from, wanted.chain.len());
    let mut segments = segments
        .take_while(|segment| segment.start < wanted.end)
        // Nothing behind a segment that is missing is of use.
        .take_while(|segment| {
            let name = wanted.chain[segment.end - 1];
            objects.history().may_be_stored(&name, crate::store::now())
        });
    let mut under_way = FuturesOrdered::new();
    // Doubles with each segment that comes: a prompt that is not there costs one request, and a long one soon fills the link.
    let mut window = 1;
    loop {
        while under_way.len() < window
            && let Some(segment) = segments.next()
        {
            let name = wanted.chain[segment.end - 1];
            under_way.push_back(async move { (segment, objects.get(name).await) });
        }
        let (segment, answer) = match timeout_at(deadline, under_way.next()).await {
            Ok(Some(came)) => came,
            Ok(None) => return promoted,
            Err(_) => {
                metrics.promotions_cut.inc();
                return promoted;
            }
        };
        let name = wanted.chain[segment.end - 1];
        let result = match answer {
            Ok(Some(object)) => commit(store, objects, wanted, segment, &object, &mut promoted).await,
            Ok(None) => {
                metrics.missed_segments.inc();
                objects.history().is_absent(name, crate::store::now());
                return promoted;
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(true) => metrics.read_segments.inc(),
            // The pool has no room.
            Ok(false) => return promoted,
            Err(error) => {
                failed(store, objects, name, &error);
                return promoted;
            }
        };
        window = (2 * window).min(objects.bounds().requests_max.max(1));
    }
}

/// Verifies a segment's wanted blocks and makes them blocks of the pool. False: there is no room for all of them.
async fn commit(
    store: &Store,
    objects: &Objects,
    wanted: Wanted<'_>,
    segment: Range<usize>,
    object: &Bytes,
    promoted: &mut Vec<BlockPin>,
) -> Result<bool, ObjectError> {
    let grid = objects.grid();
    let checksums = grid.decode(object, &wanted.chain[segment.clone()])?;
    let metrics = &store.inner().metrics.object;
    for index in segment.start.max(wanted.from)..segment.end.min(wanted.end) {
        let in_segment = index - segment.start;
        let Some(block) = store.allocate_up_to(1).pop() else {
            return Ok(false);
        };
        let bytes = &object[grid.block_range(in_segment)];
        memory::copy_in(store.memory().as_ref(), store.offset(block.block()), bytes)
            .expect("blocks are inside the pool, and the pool is host memory");
        let parent = index
            .checked_sub(1)
            .map_or(wanted.root, |before| wanted.chain[before]);
        let hash = wanted.chain[index];
        let adopted = store.adopt(block, parent, hash, checksums[in_segment]);
        promoted.push(adopted.map_err(|_| SegmentError::Bytes { hash })?);
        metrics.read_blocks.inc();
        metrics.read_bytes.inc_by(grid.block_bytes() as u64);
        // Copying and hashing one block is short, all of them is not.
        tokio::task::yield_now().await;
    }
    Ok(true)
}

/// Remembers and counts what went wrong with an object.
fn failed(store: &Store, objects: &Objects, name: BlockHash, error: &ObjectError) {
    let metrics = &store.inner().metrics.object;
    match error {
        ObjectError::Bypassed => {}
        ObjectError::Timeout | ObjectError::Store(_) => {
            metrics.errors.inc();
            tracing::debug!(%error, segment = %name, "segment not moved");
        }
        ObjectError::Segment(_) => {
            metrics.corruptions.inc();
            objects.history().is_damaged(name, crate::store::now());
            tracing::warn!(%error, segment = %name, "object is no good: its next use here replaces it");
        }
    }
}

/// Writes the segments that wait for it, one at a time: a segment is of use only after the one before it.
pub(super) async fn write_waiting(store: &Store, objects: &Objects) {
    while objects.is_usable() {
        let candidate = objects.history().take_next();
        let Some(candidate) = candidate else {
            return;
        };
        let name = candidate.name();
        match write(store, objects, &candidate).await {
            Ok(true) => objects.history().wrote(name),
            Ok(false) => objects.history().gave_up(&candidate),
            Err(error) => {
                failed(store, objects, name, &error);
                objects.history().gave_up(&candidate);
            }
        }
    }
}

/// False: its blocks are no longer in memory, or the segment before it is not in the bucket.
async fn write(store: &Store, objects: &Objects, candidate: &Candidate) -> Result<bool, ObjectError> {
    if let Some(before) = &candidate.before
        && !objects.history().is_stored(before)
    {
        return Ok(false);
    }
    let name = candidate.name();
    if !candidate.replaces && objects.contains(name).await? {
        return Ok(true);
    }
    let Some(parts) = copy_out(store, objects, &candidate.blocks).await else {
        return Ok(false);
    };
    objects.pace_write().await;
    objects.put(name, parts).await?;
    let metrics = &store.inner().metrics.object;
    metrics.written_segments.inc();
    metrics.written_bytes.inc_by(objects.grid().object_bytes());
    Ok(true)
}

/// The bytes of an object, if all of its blocks are in memory and sound.
async fn copy_out(store: &Store, objects: &Objects, blocks: &[BlockHash]) -> Option<Vec<Bytes>> {
    let grid = objects.grid();
    let mut entries = Vec::with_capacity(blocks.len());
    let mut parts = vec![Bytes::new()];
    for hash in blocks {
        let copied = store.inspect(*hash, |held| {
            let bytes = memory::copy_out(
                store.memory().as_ref(),
                store.offset(held.block),
                grid.block_bytes(),
            );
            let bytes = bytes.expect("blocks are inside the pool, and the pool is host memory");
            (Checksum::of(&bytes) == held.checksum).then_some((held.checksum, bytes))
        });
        // What does not match is the scrubber's to find and to drop.
        let (checksum, bytes) = copied.flatten()?;
        entries.push((*hash, checksum));
        parts.push(bytes.into());
        // Copying and hashing one block is short, all of them is not.
        tokio::task::yield_now().await;
    }
    parts[0] = grid.encode_header(&entries).into();
    Some(parts)
}

#[cfg(test)]
mod tests;
