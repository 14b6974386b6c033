//! What moves between the pool and the tiers below it: offload goes down, promote comes up.
//!
//! Invariants:
//! - A block of the pool stays pinned while it is written to disk, and a slot of the disk while it is read. Both pins belong to the
//!   system call ([`crate::disk::Disk`]), so they end when it does, whoever has stopped waiting.
//! - What comes from disk is verified before it is committed. What fails is dropped with all that continues it.
//! - All of it is optional work: a disk or bucket that is slow, full or failing makes hits into misses, and nothing else.
//!
//! Elsewhere: what is where (`table/tiers.rs`), files and breaker (`disk.rs`), which blocks are written when (`offload.rs`),
//! how prefixes come back (`promote.rs`), the bucket (`objects.rs`).

use std::io;
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use types::{BlockDescriptor, BlockHash};

use crate::disk::file::{BlockFile, Recovered};
use crate::disk::format::RECORD_BYTES;
use crate::disk::table::{Located, Reserved, SlotId};
use crate::disk::{self, Disk, DiskError, Kind, OpenError};
use crate::fetch::promote_prefix;
use crate::object::Objects;
use crate::store::{Corrupt, OwnedBlock, Store};

pub(crate) mod objects;
mod offload;
mod promote;

pub(crate) use promote::{is_promotable, promote};

/// How often the disk is looked after: records that are to be cleared, a breaker that is to be probed, blocks to be written.
const UPKEEP_INTERVAL: Duration = Duration::from_millis(100);
/// Records that are cleared in one go.
const CLEARED_MAX: usize = 256;

impl Store {
    /// Opens the disk tier of this store and takes over what an earlier process left in it, which the log tells from its
    /// first entry on. Call it before the store is used, and [`Store::run_tiers`] after.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    ///
    /// # Panics
    ///
    /// If the store has a disk already, or holds blocks.
    pub fn open_disk(&self, config: &disk::Config) -> Result<(), OpenError> {
        let (disk, recovered) = Disk::open(config, self.layout().block_bytes(), self.common_root())?;
        let found = recovered.records.len();
        let dropped = self.mount_disk(disk, recovered);
        if dropped > 0 {
            tracing::info!(
                found,
                dropped,
                "records on disk that continue nothing are dropped"
            );
        }
        Ok(())
    }

    /// Puts an open disk below the pool. Returns how many records were dropped.
    ///
    /// # Panics
    ///
    /// As [`Store::open_disk`].
    pub fn mount_disk(&self, disk: Disk, recovered: Recovered) -> usize {
        let capacity = disk.capacity();
        let dropped = self.with_table(|table| table.mount_disk(capacity, recovered.records));
        let mounted = self.inner().disk.set(disk);
        assert!(mounted.is_ok(), "a disk is mounted once");
        dropped
    }

    /// Bytes per millisecond that the disk moved when last measured; 0 without one, and until it was.
    pub fn disk_bytes_per_ms(&self) -> f64 {
        self.disk().and_then(Disk::rate).unwrap_or_default() / 1000.0
    }

    /// Blocks that the disk holds, and those that it can hold; 0 without one.
    pub fn disk_blocks(&self) -> (u64, u64) {
        let counts = self.table().disk().counts();
        (counts.stored as u64, counts.capacity as u64)
    }

    /// The disk below the pool, if there is one.
    pub fn disk(&self) -> Option<&Disk> {
        self.inner().disk.get()
    }

    /// Begins to read what is on disk of the chain, for a request that will come, if not too many others are being read. Gives the
    /// leading blocks that are in memory, and how many after those are being read. Call it within the runtime.
    pub fn read_ahead(&self, chain: Vec<BlockHash>) -> (usize, usize) {
        let (in_memory, on_disk) = {
            let table = self.table();
            (table.match_len(&chain), table.disk().match_len(&chain))
        };
        let missing = on_disk.saturating_sub(in_memory);
        let permit = self.inner().read_ahead_permits.clone().try_acquire_owned();
        let (Some(disk), Ok(permit), true) = (self.disk(), permit, missing > 0) else {
            return (in_memory, 0);
        };
        let deadline = Instant::now() + disk.bounds().promote_timeout;
        let store = self.clone();
        // Bounded by its permit and its deadline.
        tokio::spawn(async move {
            drop(promote_prefix(&store, &chain, deadline).await);
            drop(permit);
        });
        (in_memory, missing)
    }

    /// Looks after the tiers below the pool until shutdown. Ends at once where there is none. One of these must run per store.
    pub async fn run_tiers(&self, shutdown: CancellationToken) {
        let running = async {
            tokio::join!(
                async {
                    if let Some(disk) = self.disk() {
                        self.run_disk(disk).await;
                    }
                },
                async {
                    if let Some(objects) = self.objects() {
                        self.run_objects(objects).await;
                    }
                },
            )
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            ((), ()) = running => {}
        }
    }

    /// Writes segments that are worth it to the bucket, and probes one that is passed over. Never ends.
    async fn run_objects(&self, objects: &Objects) {
        // Apart from the work, as for the disk.
        let watching = async {
            let mut ticks = ticks();
            loop {
                ticks.tick().await;
                objects.check();
                let usable = &self.inner().metrics.object.usable;
                usable.set(i64::from(objects.is_usable()));
            }
        };
        let working = async {
            let mut ticks = ticks();
            loop {
                ticks.tick().await;
                objects::write_waiting(self, objects).await;
            }
        };
        tokio::select! {
            () = watching => {}
            () = working => {}
        }
    }

    /// Writes blocks behind their commits, clears records, probes a disk that is passed over. Never ends.
    async fn run_disk(&self, disk: &Disk) {
        // Apart from the work: a disk that is silent keeps the work waiting.
        let watching = async {
            let mut ticks = ticks();
            loop {
                ticks.tick().await;
                disk.check();
                self.inner().metrics.disk.set_health(disk);
            }
        };
        let working = async {
            let mut plan = offload::Plan::default();
            let mut ticks = ticks();
            loop {
                // Not on every change: a burst of commits is one batch.
                ticks.tick().await;
                self.clear_records(disk).await;
                offload::run(self, disk, &mut plan).await;
            }
        };
        tokio::select! {
            () = watching => {}
            () = working => {}
        }
    }

    /// Clears the records of blocks that were dropped, so that no restart brings them back.
    async fn clear_records(&self, disk: &Disk) {
        if !disk.is_writable() {
            return;
        }
        let slots = self.with_table(|table| table.take_unclear(CLEARED_MAX));
        if slots.is_empty() {
            return;
        }
        let bytes = slots.len() * RECORD_BYTES;
        let clearing = Clearing {
            store: self.clone(),
            slots,
        };
        let clear = |file: &dyn BlockFile, clearing: &mut Clearing| clearing.run(file);
        let (_clearing, result) = disk.run(Kind::Write, bytes, clearing, clear).await;
        if let Err(error) = result {
            tracing::debug!(%error, "records on disk not cleared yet");
        }
    }
}

fn ticks() -> Interval {
    let mut ticks = interval(UPKEEP_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Slots whose records are being cleared. Those that are left when it is dropped are tried again.
struct Clearing {
    store: Store,
    slots: Vec<SlotId>,
}

impl Clearing {
    fn run(&mut self, file: &dyn BlockFile) -> io::Result<()> {
        while let Some(slot) = self.slots.last().copied() {
            file.write_record(slot, None)?;
            self.slots.pop();
            self.store.with_table(|table| table.end_clearing(slot, true));
        }
        Ok(())
    }
}

impl Drop for Clearing {
    fn drop(&mut self) {
        for slot in self.slots.drain(..) {
            self.store.with_table(|table| table.end_clearing(slot, false));
        }
    }
}

/// A block on its way to disk. Dropping it gives it up.
struct Offloading {
    store: Store,
    block: BlockDescriptor,
    reserved: Reserved,
    /// The block and its record are on disk.
    is_written: bool,
}

impl Offloading {
    fn run(&mut self, file: &dyn BlockFile) -> io::Result<()> {
        let Reserved {
            slot,
            record,
            evicted: _,
        } = self.reserved;
        // What a process that dies in between leaves is an empty slot.
        file.write_record(slot, None)?;
        file.write(
            slot,
            self.store.memory().as_ref(),
            self.store.offset(self.block.block),
        )?;
        file.write_record(slot, Some(&record))?;
        self.is_written = true;
        Ok(())
    }
}

impl Drop for Offloading {
    fn drop(&mut self) {
        let (slot, block) = (self.reserved.slot, self.block.block);
        self.store.with_table(|table| {
            if self.is_written {
                table.commit_offload(slot);
            } else {
                table.abort_offload(slot);
            }
            table.unpin_unused(block, crate::store::now());
        });
    }
}

/// A block on its way from disk. Dropping it frees the memory and lets the slot be used again.
struct Promoting {
    into: OwnedBlock,
    from: DiskPin,
    /// What was read is not what was written.
    corrupt: Option<Corrupt>,
}

impl Promoting {
    /// Reads and verifies.
    fn run(&mut self, file: &dyn BlockFile) -> io::Result<()> {
        let (store, Located { slot, record }) = (&self.from.store, self.from.located);
        file.read(slot, store.memory().as_ref(), store.offset(self.into.block()))?;
        self.corrupt = store.verify(&self.into, record.hash, record.checksum).err();
        Ok(())
    }
}

/// Why a block did not come from disk.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("{0}")]
    Disk(#[from] DiskError),
    #[error("{0}")]
    Corrupt(Corrupt),
}

/// A block on disk that stays there. Dropping it ends that.
struct DiskPin {
    store: Store,
    located: Located,
}

impl Drop for DiskPin {
    fn drop(&mut self) {
        let slot = self.located.slot;
        self.store.with_table(|table| table.unpin_on_disk(slot));
    }
}

/// Pins the leading blocks of the chain that are on disk.
fn pin_on_disk(store: &Store, chain: &[BlockHash]) -> Vec<DiskPin> {
    let located = store.with_table(|table| table.pin_on_disk(chain));
    let pin = |located| DiskPin {
        store: store.clone(),
        located,
    };
    located.into_iter().map(pin).collect()
}

#[cfg(test)]
mod tests;
