//! Keeps decisions while requests run, and tells them to whoever watches.
//!
//! Recording takes a lock of its own for as long as it takes to move one pointer; candidates are sorted before, and turned into
//! answers after, outside of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast;
use types::{Millis, RequestId};

use crate::decisions::{Decision, Ending, Kept, Ring, Subject};
use crate::placement::Explanation;

/// Decisions that a watcher may be behind before it misses some.
const WATCHED_MAX: usize = 256;

/// The last decisions, and news of them.
#[derive(Debug)]
pub(crate) struct Recorder {
    ring: Mutex<Ring>,
    news: broadcast::Sender<Kept>,
}

impl Recorder {
    /// Keeps the last `kept_max`.
    pub(crate) fn new(kept_max: usize) -> Self {
        Self {
            ring: Mutex::new(Ring::new(kept_max)),
            news: broadcast::Sender::new(WATCHED_MAX),
        }
    }

    /// Records a decision. Its number names it from now on.
    pub(crate) fn record(&self, subject: Subject, explanation: Explanation) -> u64 {
        let decision = Arc::new(Decision::trimmed(subject, explanation));
        let kept = self.lock().push(decision);
        let number = kept.number;
        // Nobody watching is the usual case.
        let _ = self.news.send(kept);
        number
    }

    /// The first token of a placement came.
    pub(crate) fn first_token(&self, number: u64, ttft: Millis) {
        self.lock().first_token(number, ttft);
    }

    /// A placement ended. What is said first holds.
    pub(crate) fn ended(&self, number: u64, ending: Ending) {
        self.lock().ended(number, ending);
    }

    /// The last `count` decisions, newest first; of `request` only, if it is named.
    pub(crate) fn newest(&self, request: Option<RequestId>, count: usize) -> Vec<Kept> {
        self.lock().newest(request, count)
    }

    /// Decisions from now on.
    pub(crate) fn watch(&self) -> broadcast::Receiver<Kept> {
        self.news.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        // Every change of the ring is complete before anything can panic.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
