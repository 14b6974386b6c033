//! How a prefix comes back from disk.

use futures::{StreamExt, stream};
use tokio::time::{Instant, timeout_at};
use types::BlockHash;

use super::{DiskPin, Promoting, ReadError, pin_on_disk};
use crate::disk::{Disk, DiskError, Kind};
use crate::store::{BlockPin, Store};
use crate::table::Parent;

/// Reads the leading blocks of the chain that are on disk into the pool, as many as are read before `deadline`. They come back
/// pinned, in the order of the chain. Ancestors of its first block that are on disk alone come first, since the pool keeps no
/// block without them.
///
/// Dropping the future stops it; what is complete by then stays cached.
pub(crate) async fn promote(store: &Store, chain: &[BlockHash], deadline: Instant) -> Vec<BlockPin> {
    let mut promoted = Vec::new();
    let Some(disk) = store.disk() else {
        return promoted;
    };
    if !disk.is_readable() {
        return promoted;
    }
    let deadline = deadline.min(Instant::now() + disk.bounds().promote_timeout);
    let Some(above) = Above::of(store, chain) else {
        return promoted;
    };
    let _anchor = above.anchor;
    let mut run = above.missing;
    let missing = run.len();
    run.extend(chain);
    run.truncate(readable_blocks(store, disk, run.len(), deadline));
    let pins = pin_on_disk(store, &run);
    let found = pins.len();
    promoted.extend(read_in_order(store, disk, pins, deadline).await);
    if promoted.len() < found {
        store.inner().metrics.disk.promotions_cut.inc();
    }
    promoted.split_off(missing.min(promoted.len()))
}

/// What has to be in the pool before a chain's first block.
struct Above {
    /// Keeps the nearest ancestor that is there.
    anchor: Vec<BlockPin>,
    /// Those that are on disk alone, first block first.
    missing: Vec<BlockHash>,
}

impl Above {
    /// `None`: the first block is not on disk.
    fn of(store: &Store, chain: &[BlockHash]) -> Option<Self> {
        let first = chain.first()?;
        let (missing, anchor) = {
            let table = store.table();
            let disk = table.disk();
            let missing = disk.ancestors_after(first, |hash| table.holds(*hash));
            let top = disk.record(missing.first().unwrap_or(first))?;
            (missing, (!top.follows_root).then_some(top.parent))
        };
        let anchor = anchor.map(|anchor| store.pin_held(&[anchor])).unwrap_or_default();
        Some(Self { anchor, missing })
    }
}

/// Reads, verifies and commits, each block after the one before it. Ends early with the first that does not come.
async fn read_in_order(store: &Store, disk: &Disk, pins: Vec<DiskPin>, deadline: Instant) -> Vec<BlockPin> {
    let mut promoted = Vec::with_capacity(pins.len());
    let mut reads = stream::iter(pins)
        .map(|pin| read(store, disk, pin))
        // In order, since a block is of use only after those before it.
        .buffered(disk.reads_max());
    let metrics = &store.inner().metrics.disk;
    while let Ok(Some(read)) = timeout_at(deadline, reads.next()).await {
        match read {
            Ok(Some(promoting)) => {
                metrics.read_blocks.inc();
                metrics.read_bytes.inc_by(store.layout().block_bytes() as u64);
                promoted.push(commit(store, promoting));
            }
            // No memory is left.
            Ok(None) => return promoted,
            Err(ReadError::Disk(DiskError::Bypassed)) => return promoted,
            Err(ReadError::Disk(error @ DiskError::Io(_))) => {
                metrics.errors.inc();
                tracing::debug!(%error, "block not read from disk");
                return promoted;
            }
            Err(ReadError::Corrupt(error)) => {
                metrics.corruptions.inc();
                let dropped = store.with_table(|table| table.remove_from_disk(&error.hash));
                tracing::warn!(%error, dropped, "block on disk is corrupt: dropped with all that continues it");
                return promoted;
            }
        }
    }
    promoted
}

/// Whether the disk has the block and is in a state to give it.
pub(crate) fn is_promotable(store: &Store, hash: &BlockHash) -> bool {
    let is_readable = store.disk().is_some_and(Disk::is_readable);
    is_readable && store.table().disk().contains(hash)
}

/// How many blocks the disk is likely to deliver in time. At least one, so that it is measured.
fn readable_blocks(store: &Store, disk: &Disk, wanted: usize, deadline: Instant) -> usize {
    let Some(rate) = disk.rate() else {
        return wanted;
    };
    let time = deadline.saturating_duration_since(Instant::now());
    let blocks = rate * time.as_secs_f64() / store.layout().block_bytes() as f64;
    wanted.min((blocks as usize).max(1))
}

/// Reads and verifies one block. `None`: the pool has no room.
async fn read(store: &Store, disk: &Disk, from: DiskPin) -> Result<Option<Promoting>, ReadError> {
    let Some(into) = store.allocate_up_to(1).pop() else {
        return Ok(None);
    };
    let promoting = Promoting {
        into,
        from,
        corrupt: None,
    };
    let bytes = store.layout().block_bytes();
    let (promoting, result) = disk
        .run(Kind::Read, bytes, promoting, |file, promoting| {
            promoting.run(file)
        })
        .await;
    result?;
    match promoting.as_ref().and_then(|promoting| promoting.corrupt) {
        Some(corrupt) => Err(ReadError::Corrupt(corrupt)),
        None => Ok(promoting),
    }
}

/// Makes a verified block one of the pool.
fn commit(store: &Store, promoting: Promoting) -> BlockPin {
    let Promoting { into, from, .. } = promoting;
    let record = from.located.record;
    let parent = if record.follows_root {
        Parent::Root(record.parent)
    } else {
        Parent::Block(record.parent)
    };
    store.publish(into, parent, record.hash, record.checksum).0
}
