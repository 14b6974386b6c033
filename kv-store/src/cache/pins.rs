//! Prefixes that people keep, and how many nodes shall hold each.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use proto::v1;
use types::{BlockHash, Error};

use crate::store::{BlockPin, Store};

/// Pins hold at most one of so many blocks of the pool: the rest must do for requests.
const POOL_SHARE: usize = 2;
/// Stands for no end.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// Nodes that one prefix may be wanted on.
const REPLICAS_MAX: u64 = 64;

/// The pins of a node.
#[derive(Debug)]
pub(crate) struct Pins {
    open: Mutex<Open>,
    pins_max: usize,
    blocks_max: usize,
}

#[derive(Debug)]
struct Open {
    pins: HashMap<u64, Pinned>,
    next_id: u64,
}

#[derive(Debug)]
struct Pinned {
    root: BlockHash,
    blocks: Vec<BlockPin>,
    until: Option<Instant>,
    replicas_min: u64,
}

/// A prefix that other nodes shall hold, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Root of its space.
    pub(crate) root: BlockHash,
    /// Its blocks.
    pub(crate) chain: Vec<BlockHash>,
    /// Other nodes that shall hold all of it.
    pub(crate) peers_min: usize,
}

impl Pins {
    pub(super) fn new(store: &Store) -> Self {
        let open = Open {
            pins: HashMap::new(),
            // Ids of an earlier incarnation must not meet pins of this one.
            next_id: store.epoch().0.max(1),
        };
        Self {
            open: Mutex::new(open),
            pins_max: store.config().pins_max,
            blocks_max: store.capacity() / POOL_SHARE,
        }
    }

    /// Pins what is held of the chain, if there is room for it.
    pub(super) fn pin(
        &self,
        store: &Store,
        root: BlockHash,
        chain: &[BlockHash],
        request: &v1::PinRequest,
    ) -> Result<v1::PinResponse, Error> {
        let replicas_min = request.replicas_min.max(1);
        if replicas_min > REPLICAS_MAX {
            let message = format!("replicas_min is {replicas_min}, but at most {REPLICAS_MAX} are allowed");
            return Err(Error::invalid("replicas_min", message));
        }
        let blocks = store.pin_held(chain);
        if blocks.is_empty() {
            return Ok(v1::PinResponse::default());
        }
        let now = crate::store::now();
        self.expire(now);
        let mut open = self.lock();
        let pinned: usize = open.pins.values().map(|pin| pin.blocks.len()).sum();
        if open.pins.len() >= self.pins_max || pinned + blocks.len() > self.blocks_max {
            // Dropped outside of the lock: the table has its own.
            let pins = open.pins.len();
            drop(open);
            let message = format!(
                "{pins} pins hold {pinned} blocks, and {} more would pass the {} pins or {} blocks allowed: unpin some first",
                blocks.len(),
                self.pins_max,
                self.blocks_max
            );
            return Err(Error::invalid("chain", message));
        }
        let pin_id = open.next_id;
        open.next_id += 1;
        let pinned_blocks = blocks.len() as u64;
        store.note_wanted(&chain[..blocks.len()]);
        let ttl = Duration::from_millis(request.ttl_ms).min(FOREVER);
        let pinned = Pinned {
            root,
            blocks,
            until: (request.ttl_ms > 0).then(|| now + ttl),
            replicas_min,
        };
        open.pins.insert(pin_id, pinned);
        Ok(v1::PinResponse {
            pin_id,
            pinned_blocks,
        })
    }

    /// Ends a pin. False if it had ended before.
    pub(super) fn unpin(&self, id: u64) -> bool {
        let pinned = self.lock().pins.remove(&id);
        pinned.is_some()
    }

    pub(super) fn list(&self, now: Instant) -> Vec<v1::PinnedChain> {
        self.expire(now);
        let open = self.lock();
        let mut pins: Vec<v1::PinnedChain> = open
            .pins
            .iter()
            .map(|(id, pin)| {
                let left = pin.until.map(|until| until.saturating_duration_since(now));
                v1::PinnedChain {
                    pin_id: *id,
                    hash: pin
                        .blocks
                        .last()
                        .map(|last| last.hash().0.to_vec())
                        .unwrap_or_default(),
                    blocks: pin.blocks.len() as u64,
                    ttl_ms: left.map_or(0, |left| {
                        u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1)
                    }),
                    replicas_min: pin.replicas_min,
                }
            })
            .collect();
        pins.sort_unstable_by_key(|pin| pin.pin_id);
        pins
    }

    /// The pinned prefixes that peers shall hold, too.
    pub(crate) fn wanted(&self) -> Vec<Wanted> {
        let open = self.lock();
        let wanted = open
            .pins
            .values()
            .filter(|pin| pin.replicas_min > 1)
            .map(|pin| Wanted {
                root: pin.root,
                chain: pin.blocks.iter().map(BlockPin::hash).collect(),
                peers_min: usize::try_from(pin.replicas_min - 1).unwrap_or(usize::MAX),
            });
        wanted.collect()
    }

    /// Ends the pins whose time has come.
    pub(crate) fn expire(&self, now: Instant) {
        let due = |_: &u64, pin: &mut Pinned| pin.until.is_some_and(|until| until <= now);
        // The guards are dropped after the lock.
        let ended: Vec<(u64, Pinned)> = self.lock().pins.extract_if(due).collect();
        drop(ended);
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().expect("nothing panics while it looks up a pin")
    }
}
