//! Which memory is registered, what peers may do with it, and the fence.
//!
//! Invariant: whoever moves bytes for a peer does so inside [`Grant::touch`], and `touch` runs nothing once
//! [`Grant::close`] has begun; `close` returns when the last `touch` has. Because a `touch` is one system call
//! that does not wait, or one copy, closing takes microseconds and depends on no peer. What hardware moves by itself
//! takes a [`Hold`] there, and the fence waits for that to end, by force if it must.
//!
//! Elsewhere: the moving itself (`cursor.rs`, `mem.rs`), checksums of what lands (`region/landing.rs`).

mod landing;

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::Notify;
use tokio::time::timeout;
use types::{Checksum, Memory, MemoryKind};

use crate::copy::Stores;
use crate::{RegionId, TransferError};
pub(crate) use landing::Landing;

/// A node has one pool, and perhaps a few staging areas.
const REGIONS_MAX: usize = 1024;
/// One grant per handoff or fetch in progress; far beyond what a pool has blocks for.
const GRANTS_MAX: usize = 1 << 16;
/// Ranges of one grant: more than the blocks times layers of the longest context.
const RANGES_PER_GRANT_MAX: usize = 1 << 18;

/// How long a fence waits for hardware to end by itself before it makes it end.
const HOLD_PATIENCE: Duration = Duration::from_millis(500);

/// What a peer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// The peer writes to our memory.
    Write,
    /// The peer reads our memory.
    Read,
}

/// Why a peer's request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The grant does not allow this direction.
    Denied,
    /// The slice at this position leaves the granted ranges.
    OutOfRange { slice: usize },
}

/// One right on one region.
pub(crate) struct Grant {
    memory: Arc<dyn Memory>,
    region: RegionId,
    access: Access,
    /// Of the ranges whose bytes are to be hashed as they land, by where they begin.
    landings: Vec<Landing>,
    /// Held for reading while memory is touched, for writing to close.
    closed: RwLock<bool>,
    /// What hardware moves into the memory by itself.
    holds: Mutex<Holds>,
    /// Rung when one of them ends.
    released: Notify,
}

#[derive(Default)]
struct Holds {
    taken: u64,
    /// What ends each by force.
    open: BTreeMap<u64, Cut>,
}

/// Makes hardware stop, soon.
pub(crate) type Cut = Arc<dyn Fn() + Send + Sync>;

/// Memory of a grant is being written by hardware. Dropped when it is not any more.
pub(crate) struct Hold {
    grant: Arc<Grant>,
    number: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.grant.holds().open.remove(&self.number);
        self.grant.released.notify_waiters();
    }
}

enum Access {
    ReadAll,
    /// Sorted, disjoint, not adjacent, none empty.
    Write(Vec<Range<u64>>),
}

impl Grant {
    pub(crate) fn memory(&self) -> &Arc<dyn Memory> {
        &self.memory
    }

    /// Whether all of `slices`, given as offset and length, are covered.
    pub(crate) fn admit(
        &self,
        direction: Direction,
        slices: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<(), Refused> {
        let covered: &dyn Fn(u64, u64) -> bool = match (&self.access, direction) {
            (Access::ReadAll, Direction::Read) => {
                let bytes = self.memory.len() as u64;
                &move |_, end| end <= bytes
            }
            (Access::Write(ranges), Direction::Write) => &|start, end| {
                let after = ranges.partition_point(|range| range.start <= start);
                after > 0 && end <= ranges[after - 1].end
            },
            (Access::ReadAll, Direction::Write) | (Access::Write(_), Direction::Read) => {
                return Err(Refused::Denied);
            }
        };
        for (position, (offset, len)) in slices.into_iter().enumerate() {
            if offset.checked_add(len).is_none_or(|end| !covered(offset, end)) {
                return Err(Refused::OutOfRange { slice: position });
            }
        }
        Ok(())
    }

    /// Runs `move_bytes` if the grant is open, and keeps it open until that returns. `move_bytes` must not wait.
    pub(crate) fn touch<R>(&self, move_bytes: impl FnOnce() -> R) -> Option<R> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        (!*closed).then(move_bytes)
    }

    /// What is to see the bytes that land at `offset`, if anything is.
    pub(crate) fn landing(&self, offset: u64) -> Option<&Landing> {
        landing::at(&self.landings, offset)
    }

    /// Shows bytes that have landed, given by offset and length, to whoever is to see them. Inside of [`Grant::touch`].
    pub(crate) fn landed(&self, mut offset: u64, bytes: u64) {
        let end = offset + bytes;
        while offset < end
            && let Some(landing) = self.landing(offset)
        {
            let seen = landing.left(offset).min((end - offset) as usize);
            let at = self.memory.base().as_ptr().wrapping_add(offset as usize);
            // SAFETY: the bytes are inside of the memory, since they were admitted, and nothing is stored.
            unsafe { landing.take(offset, at, at, seen, Stores::None) };
            offset += seen as u64;
        }
    }

    /// Lets hardware write these bytes, given by offset and length, until the result is dropped, if the grant is open. `cut`
    /// must end that.
    pub(crate) fn hold(
        self: &Arc<Self>,
        bytes: impl IntoIterator<Item = (u64, u64)>,
        cut: Cut,
    ) -> Option<Hold> {
        self.touch(|| {
            for (offset, bytes) in bytes {
                self.overwritten(offset, bytes);
            }
            let mut holds = self.holds();
            holds.taken += 1;
            let number = holds.taken;
            holds.open.insert(number, cut);
            Hold {
                grant: self.clone(),
                number,
            }
        })
    }

    /// Nobody sees these bytes.
    fn overwritten(&self, mut offset: u64, bytes: u64) {
        let end = offset + bytes;
        while offset < end
            && let Some(landing) = self.landing(offset)
        {
            landing.overwrite();
            offset += landing.left(offset) as u64;
        }
    }

    /// The checksum of each range of a closed grant, in the order they were given, if the range was seen; or none at all.
    fn checksums(&self) -> Vec<Option<Checksum>> {
        let mut checksums: Vec<_> = self.landings.iter().map(Landing::checksum).collect();
        checksums.sort_unstable_by_key(|(place, _)| *place);
        checksums.into_iter().map(|(_, checksum)| checksum).collect()
    }

    fn close(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Returns when no hardware writes the memory any more. What does not end by itself soon is cut, again and again.
    async fn settled(&self) {
        loop {
            let released = self.released.notified();
            if self.holds().open.is_empty() {
                return;
            }
            if timeout(HOLD_PATIENCE, released).await.is_err() {
                let cuts: Vec<Cut> = self.holds().open.values().cloned().collect();
                cuts.iter().for_each(|cut| cut());
            }
        }
    }

    fn holds(&self) -> MutexGuard<'_, Holds> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How keys of grants are made: all different in any case.
pub(crate) enum Keys {
    /// Not guessable: knowing one key says nothing about another one.
    Secret(RandomState),
    /// 1, 2, 3, … for reproducible runs.
    Counted,
}

impl Keys {
    /// The key of the `count`th grant. A Feistel network is a permutation, whatever its round function is,
    /// so keys never repeat.
    fn key(&self, count: u64) -> u64 {
        match self {
            Self::Counted => count,
            Self::Secret(secret) => {
                let (mut left, mut right) = ((count >> 32) as u32, count as u32);
                for round in 0..4_u32 {
                    let mixed = secret.hash_one((round, right)) as u32;
                    (left, right) = (right, left ^ mixed);
                }
                u64::from(left) << 32 | u64::from(right)
            }
        }
    }
}

/// All regions and grants of a transport.
pub(crate) struct RegionTable {
    keys: Keys,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    regions: HashMap<RegionId, Region>,
    grants: HashMap<u64, Arc<Grant>>,
    regions_made: u64,
    grants_made: u64,
    closed: bool,
}

struct Region {
    memory: Arc<dyn Memory>,
    /// The key under which all of it may be read, while that is open.
    read_key: Option<u64>,
}

impl RegionTable {
    pub(crate) fn new(keys: Keys) -> Self {
        Self {
            keys,
            inner: Mutex::default(),
        }
    }

    pub(crate) fn register(&self, memory: Arc<dyn Memory>) -> Result<RegionId, TransferError> {
        match memory.kind() {
            MemoryKind::Host => {}
            kind @ MemoryKind::Device(_) => return Err(TransferError::UnsupportedMemory { kind }),
        }
        let mut inner = self.open_inner()?;
        if inner.regions.len() >= REGIONS_MAX {
            return Err(TransferError::Full {
                what: "regions",
                limit: REGIONS_MAX,
            });
        }
        inner.regions_made += 1;
        let region = RegionId(inner.regions_made);
        let read_key = None;
        inner.regions.insert(region, Region { memory, read_key });
        Ok(region)
    }

    /// Forgets a region. When the future is ready, nobody touches its memory any more; system calls do not from the
    /// call on.
    pub(crate) fn unregister(&self, region: RegionId) -> (Option<Arc<dyn Memory>>, BoxFuture<'static, ()>) {
        let mut inner = self.inner();
        let memory = inner.regions.remove(&region).map(|region| region.memory);
        let gone: Vec<_> = inner
            .grants
            .extract_if(|_, grant| grant.region == region)
            .collect();
        drop(inner);
        gone.iter().for_each(|(_, grant)| grant.close());
        let settled = async move {
            for (_, grant) in &gone {
                grant.settled().await;
            }
        };
        (memory, settled.boxed())
    }

    /// The memory behind a region, for local use.
    pub(crate) fn memory(&self, region: RegionId) -> Result<Arc<dyn Memory>, TransferError> {
        let inner = self.open_inner()?;
        let entry = inner.regions.get(&region);
        let memory = entry.map(|entry| entry.memory.clone());
        memory.ok_or(TransferError::UnknownRegion { region })
    }

    pub(crate) fn expose_read(&self, region: RegionId) -> Result<u64, TransferError> {
        let mut inner = self.open_inner()?;
        let entry = inner.regions.get(&region);
        let entry = entry.ok_or(TransferError::UnknownRegion { region })?;
        if let Some(key) = entry.read_key {
            return Ok(key);
        }
        let memory = entry.memory.clone();
        let key = self.grant(&mut inner, region, memory, (Access::ReadAll, Vec::new()))?;
        if let Some(entry) = inner.regions.get_mut(&region) {
            entry.read_key = Some(key);
        }
        Ok(key)
    }

    pub(crate) fn grant_write(
        &self,
        region: RegionId,
        ranges: Vec<Range<u64>>,
        hashed: bool,
    ) -> Result<u64, TransferError> {
        if ranges.len() > RANGES_PER_GRANT_MAX {
            return Err(TransferError::Full {
                what: "ranges of one grant",
                limit: RANGES_PER_GRANT_MAX,
            });
        }
        let mut inner = self.open_inner()?;
        let entry = inner.regions.get(&region);
        let entry = entry.ok_or(TransferError::UnknownRegion { region })?;
        let memory = entry.memory.clone();
        let region_bytes = memory.len() as u64;
        if let Some(range) = ranges
            .iter()
            .find(|range| range.start > range.end || range.end > region_bytes)
        {
            return Err(TransferError::OutOfBounds {
                offset: range.start,
                len: range.end.saturating_sub(range.start),
                region_bytes,
            });
        }
        let landings = if hashed {
            landing::landings(&ranges)
        } else {
            Vec::new()
        };
        self.grant(
            &mut inner,
            region,
            memory,
            (Access::Write(merged(ranges)), landings),
        )
    }

    /// Closes a grant. When the future is ready, nobody touches its memory any more; system calls do not from the
    /// call on. Gives the checksum of each range that was granted, if the range is not empty and was seen to its end.
    pub(crate) fn revoke(&self, key: u64) -> BoxFuture<'static, Vec<Option<Checksum>>> {
        let mut inner = self.inner();
        let grant = inner.grants.remove(&key);
        if let Some(grant) = &grant
            && let Some(entry) = inner.regions.get_mut(&grant.region)
            && entry.read_key == Some(key)
        {
            entry.read_key = None;
        }
        drop(inner);
        let Some(grant) = grant else {
            return std::future::ready(Vec::new()).boxed();
        };
        grant.close();
        async move {
            grant.settled().await;
            grant.checksums()
        }
        .boxed()
    }

    /// The open grant with this key.
    pub(crate) fn lookup(&self, key: u64) -> Option<Arc<Grant>> {
        self.inner().grants.get(&key).cloned()
    }

    /// Revokes everything and takes nothing new.
    pub(crate) fn close(&self) {
        let mut inner = self.inner();
        inner.closed = true;
        inner.regions.clear();
        let grants: Vec<_> = inner.grants.drain().collect();
        drop(inner);
        grants.iter().for_each(|(_, grant)| grant.close());
    }

    fn grant(
        &self,
        inner: &mut Inner,
        region: RegionId,
        memory: Arc<dyn Memory>,
        (access, landings): (Access, Vec<Landing>),
    ) -> Result<u64, TransferError> {
        if inner.grants.len() >= GRANTS_MAX {
            return Err(TransferError::Full {
                what: "grants",
                limit: GRANTS_MAX,
            });
        }
        inner.grants_made += 1;
        let key = self.keys.key(inner.grants_made);
        let grant = Grant {
            memory,
            region,
            access,
            landings,
            closed: RwLock::new(false),
            holds: Mutex::default(),
            released: Notify::new(),
        };
        inner.grants.insert(key, Arc::new(grant));
        Ok(key)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_inner(&self) -> Result<MutexGuard<'_, Inner>, TransferError> {
        let inner = self.inner();
        if inner.closed {
            return Err(TransferError::Closed);
        }
        Ok(inner)
    }
}

/// Sorts the ranges, drops empty ones and joins those that touch or overlap, so that a slice may span blocks
/// that lie side by side and the lookup is one binary search.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, kept| {
        let joins = next.start <= kept.end;
        if joins {
            kept.end = kept.end.max(next.end);
        }
        joins
    });
    ranges
}

#[cfg(test)]
mod tests;
