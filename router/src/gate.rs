//! Where requests wait for the place that `admission.rs` gives them.
//!
//! A [`Permit`] is the place: dropping it, from whichever state, frees it at once and wakes who is next. So a
//! client that goes away frees its place by nothing more than its future being dropped.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use types::Millis;

use crate::admission::{Admission, Limits, Outcome, Rejection, Ticket};

/// Admission shared by all requests. Clones are one and the same.
#[derive(Debug, Clone)]
pub struct Gate {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    admission: Admission,
    /// How to wake those who wait. At most [`Limits::waiting_max`].
    wakers: HashMap<Ticket, oneshot::Sender<()>>,
    next_ticket: u64,
}

/// A place among the running requests.
#[derive(Debug)]
pub struct Permit {
    gate: Gate,
    ticket: Ticket,
}

/// Why there is no permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Turned away.
    Rejected(Rejection),
    /// Waited until its deadline.
    Deadline,
}

impl Gate {
    /// A gate with these bounds.
    pub fn new(limits: Limits) -> Self {
        Self {
            shared: Arc::new(Mutex::new(Shared {
                admission: Admission::new(limits),
                wakers: HashMap::new(),
                next_ticket: 0,
            })),
        }
    }

    /// Waits for a place, at most until `deadline`. Cancel-safe: dropping the future gives up the place in the queue.
    pub async fn enter(&self, prompt_tokens: u64, deadline: Instant) -> Result<Permit, Refused> {
        let (permit, wake_rx) = self.arrive(prompt_tokens)?;
        let Some(wake_rx) = wake_rx else {
            return Ok(permit);
        };
        match tokio::time::timeout_at(deadline.into(), wake_rx).await {
            Ok(Ok(())) => Ok(permit),
            // A sender goes away unused only with the permit that this function holds.
            Ok(Err(_)) | Err(_) => Err(Refused::Deadline),
        }
    }

    fn arrive(&self, prompt_tokens: u64) -> Result<(Permit, Option<oneshot::Receiver<()>>), Refused> {
        let mut shared = self.lock();
        let ticket = Ticket(shared.next_ticket);
        shared.next_ticket += 1;
        let wake_rx = match shared.admission.arrive(ticket, prompt_tokens, Instant::now()) {
            Outcome::Run => None,
            Outcome::Wait => {
                let (wake_tx, wake_rx) = oneshot::channel();
                shared.wakers.insert(ticket, wake_tx);
                Some(wake_rx)
            }
            Outcome::Reject(rejection) => return Err(Refused::Rejected(rejection)),
        };
        let gate = self.clone();
        Ok((Permit { gate, ticket }, wake_rx))
    }

    /// Holds a prediction against what the request allows for its first token.
    pub fn judge(&self, predicted: Millis, waited: Duration, slo: Option<Millis>) -> Result<(), Rejection> {
        self.lock().admission.judge(predicted, waited, slo)
    }

    /// How long a request that arrives now would wait for its place.
    pub fn wait_ms(&self) -> Millis {
        self.lock().admission.wait_ms()
    }

    /// How many requests run and wait.
    pub fn counts(&self) -> (usize, usize) {
        let shared = self.lock();
        (shared.admission.running(), shared.admission.waiting())
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut shared = self.gate.lock();
        shared.wakers.remove(&self.ticket);
        for promoted in shared.admission.end(self.ticket, Instant::now()) {
            if let Some(wake_tx) = shared.wakers.remove(&promoted) {
                // If nobody listens any more, the permit there is being dropped and passes the place on.
                let _ = wake_tx.send(());
            }
        }
    }
}

#[cfg(test)]
mod tests;
