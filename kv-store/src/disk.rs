//! The disk tier: blocks in a file on a local disk, found again after a restart.
//!
//! Invariants:
//! - A block is read only into memory that the caller owns, and believed only if it matches its checksum.
//! - Serving never depends on the disk: what is asked of it goes through a breaker, and ends in a miss where the disk is slow,
//!   full, failing or silent.
//!
//! Where things are, the pure modules first:
//! - [`table`]: which slot holds what, ancestors first; [`mod@format`]: the index, byte by byte; [`breaker`]: when a disk is passed
//!   over; [`throttle`]: how fast it is written;
//! - [`mod@file`]: the files; `workers.rs`: the threads that wait for them.
//!
//! Elsewhere: what goes to disk and what comes back (`tiers.rs`), what the node's log says of it (`table/tiers.rs`).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use transfer::HostMemory;
use types::{BlockHash, ErrorCode};

pub mod breaker;
pub mod file;
pub mod format;
pub mod table;
pub mod throttle;
mod workers;

use breaker::{Breaker, Change, Limits, Outcome, Reason};
use file::{BlockFile, BlockFiles, Recovered};
use table::SlotId;
use throttle::Throttle;
use workers::Workers;

/// What can be set of a disk tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Folder of the files. Nobody else may use it.
    pub folder: PathBuf,
    /// Bytes that blocks may take.
    pub capacity_bytes: u64,
    /// Bounds of use.
    pub bounds: Bounds,
}

/// How a disk is used, and when it is passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes per second that are written at most; 0 is no bound.
    pub write_rate_max: u64,
    /// Threads that wait for the disk; at least 2. Half of them write at most.
    pub threads: usize,
    /// Longest time that a request waits for blocks from its node's disk.
    pub promote_timeout: Duration,
    /// When it is passed over.
    pub limits: Limits,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            // A day and night of it are 5 TB: within what a data-centre SSD bears for years (1 drive write per day).
            write_rate_max: 64 << 20,
            // Deep enough a queue for an SSD to reach its throughput with blocks of some hundred KiB.
            threads: 8,
            // About what computing takes of what a healthy disk delivers meanwhile.
            promote_timeout: Duration::from_secs(1),
            limits: Limits {
                // One may be a bad sector; three in a row are a bad disk.
                errors_max: 3,
                // No healthy disk is silent for as long.
                stall_max: Duration::from_secs(2),
                // Below it, computing is faster for small models, and a disk this slow is either broken or somebody else's.
                rate_min: 16 << 20,
                // Long against a hiccup.
                bypass_min: Duration::from_secs(5),
                // A disk that was exchanged or made free is found within it.
                bypass_max: Duration::from_secs(60),
            },
        }
    }
}

/// Why there is no disk tier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A file or folder cannot be used.
    #[error("disk tier: {}: {reason}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// Another process has it.
    #[error("disk tier: {} is in use by another process: give each node a folder of its own", path.display())]
    InUse {
        /// The index.
        path: PathBuf,
    },
    /// There is something else.
    #[error("disk tier: {} is no index of a disk tier: name another folder", path.display())]
    Foreign {
        /// What should be the index.
        path: PathBuf,
    },
    /// Not one block fits, or more than can be numbered.
    #[error("disk tier: {capacity_bytes} bytes hold {slots} blocks of {block_bytes} bytes, but 1 to {} are possible", u32::MAX - 1)]
    Capacity {
        /// What was given.
        capacity_bytes: u64,
        /// Bytes of a block.
        block_bytes: usize,
        /// Blocks that would fit.
        slots: u64,
    },
}

impl OpenError {
    /// What the caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::File { .. } | Self::Foreign { .. } | Self::Capacity { .. } => ErrorCode::Invalid,
            Self::InUse { .. } => ErrorCode::Conflict,
        }
    }
}

impl From<OpenError> for types::Error {
    fn from(error: OpenError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// Why the disk did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// It is passed over at the moment.
    #[error("the disk is passed over")]
    Bypassed,
    /// The system's words.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// An open disk: its files, threads, and health. Clones are handles of the same one.
#[derive(Clone)]
pub struct Disk {
    inner: Arc<Inner>,
}

struct Inner {
    file: Arc<dyn BlockFile>,
    workers: Workers,
    permits: Arc<Semaphore>,
    write_permits: Arc<Semaphore>,
    breaker: Arc<Mutex<Breaker>>,
    throttle: Mutex<Throttle>,
    bounds: Bounds,
    block_bytes: usize,
    capacity: u32,
    /// For probes: a block's worth of memory, and the slot after the last one.
    scratch: Arc<HostMemory>,
}

/// How an operation of the disk is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
}

impl Disk {
    /// Opens a node's files. What an earlier process left of the same space is in the result.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(
        config: &Config,
        block_bytes: usize,
        root: BlockHash,
    ) -> Result<(Self, Recovered), OpenError> {
        let slots = config.capacity_bytes / file::slot_bytes(block_bytes.max(1));
        let capacity = u32::try_from(slots)
            .ok()
            .filter(|slots| (1..u32::MAX).contains(slots));
        let capacity = capacity.ok_or(OpenError::Capacity {
            capacity_bytes: config.capacity_bytes,
            block_bytes,
            slots,
        })?;
        let (files, recovered) = BlockFiles::open(&config.folder, block_bytes, root, capacity)?;
        tracing::info!(
            folder = %config.folder.display(),
            slots = capacity,
            blocks = recovered.records.len(),
            direct = files.is_direct(),
            "disk tier opened"
        );
        if let Some(reason) = &recovered.dropped {
            tracing::warn!(folder = %config.folder.display(), %reason, "the blocks on disk are dropped");
        }
        let disk = Self::on(Arc::new(files), config.bounds.clone(), block_bytes, capacity);
        let disk = disk.map_err(|error| failure(&config.folder, &error))?;
        Ok((disk, recovered))
    }

    /// A disk of `capacity` slots over any file.
    ///
    /// # Errors
    ///
    /// If its threads cannot start, or there is no memory for one block.
    pub fn on(
        file: Arc<dyn BlockFile>,
        bounds: Bounds,
        block_bytes: usize,
        capacity: u32,
    ) -> io::Result<Self> {
        let threads = bounds.threads.max(2);
        Ok(Self {
            inner: Arc::new(Inner {
                file,
                workers: Workers::start(threads, threads)?,
                permits: Arc::new(Semaphore::new(threads)),
                write_permits: Arc::new(Semaphore::new(threads / 2)),
                breaker: Arc::new(Mutex::new(Breaker::new(bounds.limits))),
                throttle: Mutex::new(Throttle::new(bounds.write_rate_max)),
                scratch: HostMemory::allocate(block_bytes).map_err(io::Error::other)?,
                bounds,
                block_bytes,
                capacity,
            }),
        })
    }

    /// Slots of the disk.
    pub fn capacity(&self) -> u32 {
        self.inner.capacity
    }

    /// How it is used.
    pub fn bounds(&self) -> &Bounds {
        &self.inner.bounds
    }

    /// Whether blocks are read from it at the moment.
    pub fn is_readable(&self) -> bool {
        self.breaker().allows_reads()
    }

    /// Whether blocks are written to it at the moment.
    pub fn is_writable(&self) -> bool {
        self.breaker().allows_writes(Instant::now())
    }

    /// Bytes per second that it moved when last measured.
    pub fn rate(&self) -> Option<f64> {
        self.breaker().rate()
    }

    /// Writes that may be under way at a time.
    pub(crate) fn writes_max(&self) -> usize {
        (self.inner.bounds.threads.max(2)) / 2
    }

    /// Reads that may be under way at a time.
    pub(crate) fn reads_max(&self) -> usize {
        self.inner.bounds.threads.max(2)
    }

    /// Waits until another block may be written without exceeding the rate.
    pub(crate) async fn pace_write(&self) {
        let bytes = self.inner.block_bytes as u64;
        let throttle = self.inner.throttle.lock();
        let wait = throttle
            .unwrap_or_else(PoisonError::into_inner)
            .take(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Runs `work`, which moves `bytes` bytes, on a thread of the disk with what it uses, and gives that back with the outcome. Where the caller
    /// stops waiting, `work` still goes on to its end, and `used` is dropped after it.
    ///
    /// Wait with a deadline: a disk may be silent for ever.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        kind: Kind,
        bytes: usize,
        used: T,
        work: impl FnOnce(&dyn BlockFile, &mut T) -> io::Result<()> + Send + 'static,
    ) -> (Option<T>, Result<(), DiskError>) {
        let Some(permits) = self.admit(kind).await else {
            return (Some(used), Err(DiskError::Bypassed));
        };
        let (done_tx, done_rx) = oneshot::channel();
        let (file, breaker) = (self.inner.file.clone(), self.inner.breaker.clone());
        lock(&self.inner.breaker).begin(Instant::now());
        let submitted = self.inner.workers.submit(move || {
            let mut used = used;
            let result = work(file.as_ref(), &mut used);
            let outcome = match &result {
                Ok(()) => Outcome::Moved(bytes as u64),
                Err(error) if error.kind() == io::ErrorKind::StorageFull => Outcome::Full,
                Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => Outcome::Full,
                Err(_) => Outcome::Failed,
            };
            if let Some(change) = lock(&breaker).end(outcome, Instant::now()) {
                report(change, result.as_ref().err());
            }
            drop(permits);
            // Whoever has stopped waiting has left `used` to this thread.
            let _ = done_tx.send((used, result));
        });
        if !submitted {
            // Permits are as many as places in the queue.
            lock(&self.inner.breaker).end(Outcome::Failed, Instant::now());
        }
        match done_rx.await {
            Ok((used, result)) => (Some(used), result.map_err(DiskError::Io)),
            Err(_) => (
                None,
                Err(DiskError::Io(io::Error::other("the disk's thread is gone"))),
            ),
        }
    }

    /// Notices a disk that is silent, and tries one that is passed over. Call it every now and then.
    pub(crate) fn check(&self) {
        let now = Instant::now();
        let change = self.breaker().check(now);
        if let Some(change) = change {
            report(change, None);
        }
        if !self.breaker().begin_probe(now) {
            return;
        }
        let (file, breaker) = (self.inner.file.clone(), self.inner.breaker.clone());
        let (memory, slot) = (self.inner.scratch.clone(), SlotId(self.inner.capacity));
        let bytes = 2 * self.inner.block_bytes as u64;
        let permit = self.inner.permits.clone().try_acquire_owned();
        let submitted = permit.is_ok_and(|permit| {
            self.inner.workers.submit(move || {
                let started = Instant::now();
                let probe = || {
                    file.write(slot, memory.as_ref(), 0)?;
                    file.read(slot, memory.as_ref(), 0)
                };
                let result: io::Result<()> = probe();
                let ended = Instant::now();
                let elapsed = ended.duration_since(started);
                // A full disk still reads, which is what the probe is about.
                let moved = match &result {
                    Ok(()) => Some(bytes),
                    Err(error) if error.kind() == io::ErrorKind::StorageFull => Some(bytes),
                    Err(_) => None,
                };
                report(
                    lock(&breaker).probed(moved, elapsed, ended),
                    result.as_ref().err(),
                );
                drop(permit);
            })
        });
        if !submitted {
            report(self.breaker().probed(None, Duration::ZERO, now), None);
        }
    }

    /// Waits for a thread, if the disk is used at all.
    async fn admit(&self, kind: Kind) -> Option<Vec<OwnedSemaphorePermit>> {
        let allowed = || match kind {
            Kind::Read => self.is_readable(),
            Kind::Write => self.is_writable(),
        };
        let mut permits = Vec::with_capacity(2);
        if !allowed() {
            return None;
        }
        if kind == Kind::Write {
            permits.push(self.inner.write_permits.clone().acquire_owned().await.ok()?);
        }
        permits.push(self.inner.permits.clone().acquire_owned().await.ok()?);
        // Those who waited behind the failure are not to repeat it.
        allowed().then_some(permits)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        lock(&self.inner.breaker)
    }
}

fn lock(breaker: &Mutex<Breaker>) -> MutexGuard<'_, Breaker> {
    // Its state is valid after every statement.
    breaker.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure(path: &Path, error: &io::Error) -> OpenError {
    OpenError::File {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

/// One line per change.
fn report(change: Change, cause: Option<&io::Error>) {
    let cause = cause.map(io::Error::to_string).unwrap_or_default();
    match change {
        Change::Bypassed(reason, time) => {
            let seconds = time.as_secs_f32();
            match reason {
                Reason::Errors => tracing::warn!(seconds, cause, "disk tier bypassed: the disk fails"),
                Reason::Slow { bytes_per_second } => {
                    tracing::warn!(seconds, bytes_per_second, "disk tier bypassed: the disk is slow");
                }
                Reason::Stalled => tracing::warn!(seconds, "disk tier bypassed: the disk does not answer"),
            }
        }
        Change::Restored => tracing::info!("disk tier in use again"),
        Change::WritesHeld(time) => {
            tracing::warn!(
                seconds = time.as_secs_f32(),
                cause,
                "disk tier keeps what it has: the disk is full"
            );
        }
    }
}
