//! Where requests wait for the place that `admission.rs` gives them.
//!
//! A [`Permit`] is the place: dropping it, from whichever state, frees it at once and wakes who is next. So a
//! client that goes away frees its place by nothing more than its future being dropped.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;
use types::Millis;

use crate::admission::{Admission, Arrival, Limits, Outcome, Rejection, Room, Ticket};
use crate::tenants::Terms;

/// Admission shared by all requests. Clones are one and the same.
#[derive(Debug, Clone)]
pub struct Gate {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    admission: Admission,
    /// How to wake those who wait. At most [`Limits::waiting_max`].
    wakers: HashMap<Ticket, oneshot::Sender<Result<(), Rejection>>>,
    next_ticket: u64,
}

/// A place among the running requests.
#[derive(Debug)]
pub struct Permit {
    gate: Gate,
    ticket: Ticket,
}

/// How a request is woken: it runs, or its place went to another one.
type Woken = oneshot::Receiver<Result<(), Rejection>>;

/// A request that asks for a place.
#[derive(Debug, Clone, Copy)]
pub struct Asks<'a> {
    /// Whose it is.
    pub tenant: &'a str,
    /// What holds for it.
    pub terms: Terms,
    /// Its size.
    pub prompt_tokens: u64,
}

/// Why there is no permit.
#[derive(Debug, Clone, Copy, PartialEq)]
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
    pub async fn enter(&self, asks: &Asks<'_>, deadline: Instant) -> Result<Permit, Refused> {
        let (permit, wake_rx) = self.arrive(asks)?;
        let Some(wake_rx) = wake_rx else {
            return Ok(permit);
        };
        match tokio::time::timeout_at(deadline.into(), wake_rx).await {
            Ok(Ok(Ok(()))) => Ok(permit),
            Ok(Ok(Err(displaced))) => Err(Refused::Rejected(displaced)),
            // A sender goes away unused only with the permit that this function holds.
            Ok(Err(_)) | Err(_) => Err(Refused::Deadline),
        }
    }

    fn arrive(&self, asks: &Asks<'_>) -> Result<(Permit, Option<Woken>), Refused> {
        let mut shared = self.lock();
        let ticket = Ticket(shared.next_ticket);
        shared.next_ticket += 1;
        let arrival = asks.arrival(ticket);
        let wake_rx = match shared.admission.arrive(&arrival, Instant::now()) {
            Outcome::Run => None,
            Outcome::Wait(displaced) => {
                let (wake_tx, wake_rx) = oneshot::channel();
                shared.wakers.insert(ticket, wake_tx);
                for (ticket, rejection) in displaced {
                    shared.wake(ticket, Err(rejection));
                }
                Some(wake_rx)
            }
            Outcome::Reject(rejection) => return Err(Refused::Rejected(rejection)),
        };
        let gate = self.clone();
        Ok((Permit { gate, ticket }, wake_rx))
    }

    /// Nodes have as much room as this.
    pub fn make_room(&self, room: Room) {
        let mut shared = self.lock();
        for promoted in shared.admission.make_room(room, Instant::now()) {
            shared.wake(promoted, Ok(()));
        }
    }

    /// Whether a request that arrives now may have to wait only because nodes had no room when that was last looked at.
    pub fn lacks_room(&self) -> bool {
        self.lock().admission.lacks_room()
    }

    /// How long a request that arrives now would wait for its place.
    ///
    /// # Errors
    ///
    /// It would find none, not even among those who wait.
    pub fn foresee(&self, asks: &Asks<'_>) -> Result<Millis, Rejection> {
        let shared = self.lock();
        shared
            .admission
            .foresee(&asks.arrival(Ticket(shared.next_ticket)))
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

impl Asks<'_> {
    fn arrival(&self, ticket: Ticket) -> Arrival<'_> {
        Arrival {
            ticket,
            tenant: self.tenant,
            weight: self.terms.weight,
            priority: self.terms.priority,
            prompt_tokens: self.prompt_tokens,
        }
    }
}

impl Shared {
    fn wake(&mut self, ticket: Ticket, with: Result<(), Rejection>) {
        if let Some(wake_tx) = self.wakers.remove(&ticket) {
            // If nobody listens any more, the permit there is being dropped and passes the place on.
            let _ = wake_tx.send(with);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut shared = self.gate.lock();
        shared.wakers.remove(&self.ticket);
        for promoted in shared.admission.end(self.ticket, Instant::now()) {
            shared.wake(promoted, Ok(()));
        }
    }
}

#[cfg(test)]
mod tests;
