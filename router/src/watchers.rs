//! Who is told what becomes of requests: the history that the live page draws, and the export of traces.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use types::Millis;

use crate::history::{History, Step};
use crate::requests::Watch;
use crate::timeline::{PlacementTimes, Timeline};
use crate::traces::Exporter;

/// See the module documentation. Clones are one and the same.
#[derive(Debug, Clone)]
pub(crate) struct Watchers {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    history: Mutex<History>,
    exporter: Option<Exporter>,
    sample_ratio: f64,
}

impl Watchers {
    pub(crate) fn new(exporter: Option<Exporter>, sample_ratio: f64) -> Self {
        Self {
            shared: Arc::new(Shared {
                history: Mutex::new(History::new(Instant::now())),
                exporter,
                sample_ratio,
            }),
        }
    }

    /// Whether the trace of a request that brings none is recorded. `draw` is a random number.
    pub(crate) fn samples(&self, draw: u64) -> bool {
        let share = draw as f64 / u64::MAX as f64;
        self.shared.exporter.is_some() && self.shared.sample_ratio > 0.0 && share <= self.shared.sample_ratio
    }

    /// `tokens` went out ever.
    pub(crate) fn tokens(&self, tokens: u64) {
        self.history().tokens(tokens, Instant::now());
    }

    /// The last minutes.
    pub(crate) fn steps(&self) -> Vec<Step> {
        self.history().steps(Instant::now()).iter().cloned().collect()
    }

    fn history(&self) -> MutexGuard<'_, History> {
        // Every change of it is complete before anything can panic.
        self.shared.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch for Watchers {
    fn first_token(&self, placement: &PlacementTimes, ttft: Millis) {
        self.history().first_token(placement, ttft, Instant::now());
    }

    fn ended(&self, timeline: &Arc<Timeline>) {
        self.history().ended(timeline, Instant::now());
        if let Some(exporter) = &self.shared.exporter {
            exporter.export(timeline);
        }
    }
}
