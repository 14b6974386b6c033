//! Who may run, who waits and who is turned away at once.
//!
//! Requests run up to a number and a sum of prompt tokens, and as long as nodes have room: what queues at a node can neither be
//! overtaken nor go to another node that is free before, so nodes are given no more than keeps them busy, and the rest waits
//! here, in the order of `queue.rs`. A request that asks for latencies which the prediction does not give is rejected before it
//! costs anybody anything.
//!
//! Invariant: a ticket is in at most one place, and [`Admission::end`] frees that place at once, whether the request ended
//! well, was cancelled or ran out of time. Pure: callers pass `now`. Elsewhere: waking who waits, and deadlines (`gate.rs`); how much
//! room nodes have (`cluster.rs`).

mod queue;
mod rejection;

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use types::{Millis, Priority, Slo};

use crate::placement::{Candidate, DecodeLoad};
use queue::{Bounds, Pushed, Queue};
pub use rejection::Rejection;

/// Bounds of what a router holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Requests on nodes. Nodes have bounds of their own; this one bounds the router's streams.
    pub running_max: usize,
    /// Prompt tokens of those requests. One request may exceed it alone.
    pub running_prompt_tokens_max: u64,
    /// Requests that wait for a place.
    pub waiting_max: usize,
    /// Prompt tokens of those: they lie in the router's memory.
    pub waiting_prompt_tokens_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Several nodes' batches; a stream costs the router some tens of KiB.
            running_max: 512,
            running_prompt_tokens_max: 4_000_000,
            // A second or so of work at most: longer queues only turn overload into timeouts.
            waiting_max: 512,
            waiting_prompt_tokens_max: 4_000_000,
        }
    }
}

/// Names a request within the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// A request that wants to run.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'a> {
    /// Its name.
    pub ticket: Ticket,
    /// Who asks.
    pub tenant: &'a str,
    /// The tenant's part, beside those of the other tenants that wait.
    pub weight: NonZeroU32,
    /// How much it matters.
    pub priority: Priority,
    /// Its size.
    pub prompt_tokens: u64,
}

/// What the nodes can take without its queueing there for longer than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Prompt tokens. A request may exceed what is left: one that is larger than all that nodes may queue must run, too.
    pub prompt_tokens: u64,
}

impl Room {
    /// As much as anybody asks for.
    pub const UNBOUNDED: Self = Self {
        prompt_tokens: u64::MAX,
    };

    fn is_left(self) -> bool {
        self.prompt_tokens > 0
    }

    fn take(&mut self, prompt_tokens: u64) {
        self.prompt_tokens = self.prompt_tokens.saturating_sub(prompt_tokens);
    }
}

/// What becomes of a request that arrives.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It runs.
    Run,
    /// It waits until [`Admission::end`] or [`Admission::make_room`] name it. Those who would have been served after it and had to
    /// leave for it are rejected.
    Wait(Vec<(Ticket, Rejection)>),
    /// It is turned away.
    Reject(Rejection),
}

/// What is predicted of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// Until its first token.
    pub ttft: Millis,
    /// Between its tokens, if that is to be judged.
    pub tbt: Option<Millis>,
}

impl Forecast {
    /// Of a request that would be served so.
    pub fn of(choice: &Candidate, decode_load: DecodeLoad) -> Self {
        Self {
            ttft: choice.prediction.total,
            tbt: (decode_load != DecodeLoad::Unjudged).then_some(choice.tbt),
        }
    }
}

/// Service time assumed before any request ended, in milliseconds.
const SERVICE_MS_PRIOR: f64 = 1_000.0;

/// Weight of the latest request in the smoothed service time.
const SERVICE_SMOOTHING: f64 = 0.1;

#[derive(Debug)]
struct Running {
    prompt_tokens: u64,
    since: Instant,
}

/// Who runs and who waits.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    running: HashMap<Ticket, Running>,
    running_prompt_tokens: u64,
    waiting: Queue,
    /// What is left of the room that nodes had when that was last looked at.
    room: Room,
    service_ms: f64,
}

impl Admission {
    /// Nobody runs, nobody waits.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            running: HashMap::new(),
            running_prompt_tokens: 0,
            waiting: Queue::default(),
            room: Room::UNBOUNDED,
            service_ms: SERVICE_MS_PRIOR,
        }
    }

    /// A request arrives. It must be ended by [`Admission::end`] unless it is rejected.
    pub fn arrive(&mut self, arrival: &Arrival<'_>, now: Instant) -> Outcome {
        if self.runs_at_once(arrival) {
            self.start(arrival.ticket, arrival.prompt_tokens, now);
            return Outcome::Run;
        }
        match self.waiting.push(arrival, self.bounds()) {
            Pushed::Waits(displaced) => {
                let (waiting, wait) = (self.waiting.len(), self.turn(self.waiting.len()));
                let rejection = Rejection::Displaced { waiting, wait };
                Outcome::Wait(displaced.into_iter().map(|ticket| (ticket, rejection)).collect())
            }
            Pushed::Full => Outcome::Reject(self.full(self.turn(self.waiting.ahead_of(arrival)))),
        }
    }

    /// A request ended, was cancelled or gave up waiting. Gives those who run now in its place.
    pub fn end(&mut self, ticket: Ticket, now: Instant) -> Vec<Ticket> {
        if let Some(running) = self.running.remove(&ticket) {
            self.running_prompt_tokens -= running.prompt_tokens;
            let took_ms = now.duration_since(running.since).as_secs_f64() * 1e3;
            self.service_ms += SERVICE_SMOOTHING * (took_ms - self.service_ms);
        } else {
            self.waiting.remove(ticket);
        }
        self.promote(now)
    }

    /// Nodes have as much room as this. Gives those who run now.
    pub fn make_room(&mut self, room: Room, now: Instant) -> Vec<Ticket> {
        self.room = room;
        self.promote(now)
    }

    /// Whether a request that comes now may wait only because the nodes had no room when that was last looked at.
    pub fn lacks_room(&self) -> bool {
        !self.room.is_left()
    }

    /// Holds a prediction against what the request allows. `waited` is what has passed since arrival.
    pub fn judge(forecast: Forecast, waited: Duration, slo: Slo) -> Result<(), Rejection> {
        let predicted = Millis(waited.as_secs_f64() * 1e3) + forecast.ttft;
        if let Some(allowed) = slo.ttft
            && predicted > allowed
        {
            return Err(Rejection::FirstTokenTooLate { predicted, allowed });
        }
        if let Some(allowed) = slo.tbt
            && let Some(gap) = forecast.tbt
            && gap > allowed
        {
            return Err(Rejection::TokensTooSlow {
                gap,
                allowed,
                first_token: predicted,
            });
        }
        Ok(())
    }

    /// How long a request that arrives now would wait for its place.
    ///
    /// # Errors
    ///
    /// It would find none, not even among those who wait.
    pub fn foresee(&self, arrival: &Arrival<'_>) -> Result<Millis, Rejection> {
        if self.runs_at_once(arrival) {
            return Ok(Millis(0.0));
        }
        let wait = self.turn(self.waiting.ahead_of(arrival));
        match self.waiting.takes(arrival, self.bounds()) {
            true => Ok(wait),
            false => Err(self.full(wait)),
        }
    }

    /// Requests that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Property tests call this after every step.
    pub fn check_integrity(&self) {
        let running: u64 = self.running.values().map(|running| running.prompt_tokens).sum();
        assert_eq!(running, self.running_prompt_tokens);
        assert!(self.running.len() <= self.limits.running_max);
        assert!(running <= self.limits.running_prompt_tokens_max || self.running.len() == 1);
        assert!(!self.running.keys().any(|ticket| self.waiting.contains(*ticket)));
        self.waiting.check_integrity(self.bounds());
    }

    fn bounds(&self) -> Bounds {
        Bounds {
            requests: self.limits.waiting_max,
            prompt_tokens: self.limits.waiting_prompt_tokens_max,
        }
    }

    fn full(&self, wait: Millis) -> Rejection {
        Rejection::QueueFull {
            waiting: self.waiting.len(),
            wait,
        }
    }

    fn runs_at_once(&self, arrival: &Arrival<'_>) -> bool {
        self.waiting.is_empty() && self.room.is_left() && self.fits(arrival.prompt_tokens)
    }

    /// When the turn comes of a request that so many are ahead of. Whatever it is that those who run are bounded by: as many as
    /// run leave in the time that one of them takes (Little's law).
    fn turn(&self, ahead: usize) -> Millis {
        Millis((ahead + 1) as f64 * self.service_ms / self.running.len().max(1) as f64)
    }

    fn fits(&self, prompt_tokens: u64) -> bool {
        // A request that exceeds the bound by itself must still get its turn.
        self.running.len() < self.limits.running_max
            && (self.running.is_empty()
                || self.running_prompt_tokens + prompt_tokens <= self.limits.running_prompt_tokens_max)
    }

    fn promote(&mut self, now: Instant) -> Vec<Ticket> {
        let mut promoted = Vec::new();
        while self.room.is_left()
            && let Some(first) = self.waiting.first()
            && self.fits(first.prompt_tokens)
            && let Some(first) = self.waiting.pop()
        {
            self.start(first.ticket, first.prompt_tokens, now);
            promoted.push(first.ticket);
        }
        promoted
    }

    fn start(&mut self, ticket: Ticket, prompt_tokens: u64, now: Instant) {
        self.room.take(prompt_tokens);
        self.running_prompt_tokens += prompt_tokens;
        self.running.insert(
            ticket,
            Running {
                prompt_tokens,
                since: now,
            },
        );
    }
}

#[cfg(test)]
mod tests;
