//! Draining and cordoning because an operator asks for it (`perigee node drain`, `cordon`), and taking requests again.
//!
//! A node that drains refuses what is new, lets what runs go on, and offers its blocks to its peers once nothing runs: only then
//! it has all that its requests leave behind. It gives its blocks to whoever reads them until the process ends. A router only
//! stops being ready: clients that have a connection are served until it ends, and what they ask meanwhile holds no drain up.
//!
//! Invariant: a process that ends stays drained, whoever asks for what.
//!
//! Elsewhere: refusing (the roles, by [`Store::is_draining`]), the hand-over itself ([`Exchange`]), the end of a process
//! (`roles.rs`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kv_store::{Exchange, Store};
use node::{Drainable, LoadSource, Readiness};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use types::{DrainProgress, Error, ErrorCode, LoadReport};

/// How often it is looked at whether requests still run. An operator does not notice the difference.
const REQUESTS_POLL: Duration = Duration::from_millis(20);
/// A router's condition of readiness.
const DRAINED: &str = "drained";
/// Another one.
const CORDONED: &str = "cordoned";

/// What a node does.
pub(super) struct Work {
    /// How much of it there is.
    pub(super) load: Arc<dyn LoadSource>,
    /// Requests that were accepted and have not ended.
    pub(super) requests: Box<dyn Fn() -> usize + Send + Sync>,
}

/// Drains a node that has a pool. Clones are one and the same.
#[derive(Clone)]
pub(super) struct Drain {
    shared: Arc<Shared>,
}

struct Shared {
    work: Work,
    exchange: Exchange,
    store: Store,
    shutdown: CancellationToken,
    stage: watch::Sender<Stage>,
    cordoned: AtomicBool,
}

/// Where a node is between `Drain` and `Resume`, or within a `Flip`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Takes requests.
    Serving,
    /// Takes none, since it is about to take another role.
    Flipping,
    /// Lets what runs end.
    Finishing,
    /// Nothing runs; offers blocks to peers.
    Offering,
    /// Nothing is left to do.
    Done,
}

impl Drain {
    pub(super) fn new(work: Work, exchange: Exchange, store: Store, shutdown: CancellationToken) -> Self {
        Self {
            shared: Arc::new(Shared {
                work,
                exchange,
                store,
                shutdown,
                stage: watch::Sender::new(Stage::Serving),
                cordoned: AtomicBool::new(false),
            }),
        }
    }

    pub(super) fn exchange(&self) -> &Exchange {
        &self.shared.exchange
    }

    /// Takes nothing new until [`Drain::end_flip`].
    ///
    /// # Errors
    ///
    /// `conflict` where it takes nothing new already.
    pub(super) fn begin_flip(&self) -> Result<(), Error> {
        match self.shift(&[Stage::Serving], Stage::Flipping) {
            true => Ok(()),
            false => Err(Error::new(
                ErrorCode::Conflict,
                "the node drains: perigee node resume ends that",
            )),
        }
    }

    /// Takes requests again, unless it was drained meanwhile.
    pub(super) fn end_flip(&self) {
        self.shift(&[Stage::Flipping], Stage::Serving);
    }

    /// Waits until no request runs here any more.
    pub(super) async fn idle(&self) {
        while (self.shared.work.requests)() > 0 {
            tokio::time::sleep(REQUESTS_POLL).await;
        }
    }

    /// Does what `Drain` starts, as often as it is asked for. Does not end.
    pub(super) async fn run(self) {
        let shared = &self.shared;
        let mut stage = shared.stage.subscribe();
        loop {
            let now = *stage.borrow_and_update();
            let step = async {
                match now {
                    Stage::Serving | Stage::Flipping | Stage::Done => std::future::pending().await,
                    Stage::Finishing => {
                        self.idle().await;
                        self.shift(&[now], Stage::Offering);
                    }
                    Stage::Offering => {
                        let blocks = shared.exchange.hand_over().await;
                        tracing::info!(blocks, "drained: gave blocks to the peers");
                        self.shift(&[now], Stage::Done);
                    }
                }
            };
            tokio::select! {
                // What was asked for meanwhile comes first. The sender is held here, so this does not fail.
                biased;
                _ = stage.changed() => {}
                () = step => {}
            }
        }
    }

    /// Goes from one of these stages to another one, unless it is in none of them. The store refuses new blocks in all but one.
    fn shift(&self, from: &[Stage], to: Stage) -> bool {
        self.shared.stage.send_if_modified(|stage| {
            let shifts = from.contains(stage);
            if shifts {
                *stage = to;
                self.shared.store.set_draining(to != Stage::Serving);
            }
            shifts
        })
    }
}

impl Drainable for Drain {
    fn drain(&self) {
        if self.shift(&[Stage::Serving, Stage::Flipping], Stage::Finishing) {
            tracing::info!("draining: takes no new requests");
        }
    }

    fn cordon(&self) {
        if !self.shared.cordoned.swap(true, Ordering::Relaxed) {
            tracing::info!("cordoned: asks routers for nothing new");
        }
    }

    fn resume(&self) -> Result<(), Error> {
        check_lives(&self.shared.shutdown)?;
        if self.shared.store.is_quarantined() {
            return Err(Error::new(
                ErrorCode::Conflict,
                "the node's memory corrupts blocks, so that it is quarantined: replace the memory, and start the node again",
            ));
        }
        let drained = [Stage::Finishing, Stage::Offering, Stage::Done];
        let uncordoned = self.shared.cordoned.swap(false, Ordering::Relaxed);
        if self.shift(&drained, Stage::Serving) || uncordoned {
            tracing::info!("resumed: takes requests again");
        }
        Ok(())
    }
}

impl LoadSource for Drain {
    fn load(&self) -> LoadReport {
        let shared = &self.shared;
        let load = LoadReport {
            cordoned: shared.cordoned.load(Ordering::Relaxed),
            ..shared.work.load.load()
        };
        let stage = *shared.stage.borrow();
        let requests = (shared.work.requests)() as u64;
        let blocks = match stage {
            Stage::Serving => return load,
            Stage::Flipping => 0,
            Stage::Finishing => load.evictable_blocks,
            Stage::Offering => shared.exchange.handover_left() as u64,
            Stage::Done => 0,
        };
        let drain = DrainProgress {
            requests,
            blocks,
            done: stage == Stage::Done && requests == 0,
        };
        LoadReport {
            drain: Some(drain),
            ..load
        }
    }
}

/// Drains a router.
pub(super) struct RouterDrain {
    handle: router::Handle,
    readiness: Readiness,
    shutdown: CancellationToken,
    /// Since when it is drained. What came before is waited for; what clients send over connections that they keep comes as long
    /// as the process lives.
    drained: Mutex<Option<Instant>>,
    cordoned: AtomicBool,
}

impl RouterDrain {
    pub(super) fn new(handle: router::Handle, readiness: Readiness, shutdown: CancellationToken) -> Self {
        Self {
            handle,
            readiness,
            shutdown,
            drained: Mutex::default(),
            cordoned: AtomicBool::new(false),
        }
    }

    fn drained(&self) -> MutexGuard<'_, Option<Instant>> {
        // A time is written whole, so a panic leaves nothing half done.
        self.drained.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drainable for RouterDrain {
    fn drain(&self) {
        self.drained().get_or_insert_with(Instant::now);
        self.readiness
            .miss(DRAINED, "drained by an operator: perigee node resume ends that");
        tracing::info!("draining: not ready any more, but serves who comes");
    }

    /// For a router that is the same: nobody places requests on it but who finds it ready.
    fn cordon(&self) {
        self.cordoned.store(true, Ordering::Relaxed);
        self.readiness
            .miss(CORDONED, "cordoned by an operator: perigee node resume ends that");
    }

    fn resume(&self) -> Result<(), Error> {
        check_lives(&self.shutdown)?;
        *self.drained() = None;
        self.cordoned.store(false, Ordering::Relaxed);
        self.readiness.meet(DRAINED);
        self.readiness.meet(CORDONED);
        Ok(())
    }
}

impl LoadSource for RouterDrain {
    /// A router's load: its requests.
    fn load(&self) -> LoadReport {
        let (running, waiting) = self.handle.dispatcher.counts();
        let drained = *self.drained();
        let drain = drained.map(|since| {
            let requests = self.handle.dispatcher.left_from_before(since) as u64;
            DrainProgress {
                requests,
                blocks: 0,
                done: requests == 0,
            }
        });
        LoadReport {
            running_sequences: running as u64,
            queued_requests: waiting as u64,
            draining: drained.is_some(),
            cordoned: self.cordoned.load(Ordering::Relaxed),
            drain,
            ..LoadReport::default()
        }
    }
}

fn check_lives(shutdown: &CancellationToken) -> Result<(), Error> {
    if shutdown.is_cancelled() {
        return Err(Error::unavailable(
            "the process ends, so that it takes requests no more",
        ));
    }
    Ok(())
}
