//! Who may run, who waits and who is turned away at once.
//!
//! Requests run up to a number and a sum of prompt tokens; more wait, first come first served, up to a second number and sum;
//! whoever comes then is rejected with a time to come back. A request that asks for a time to first token which the
//! prediction does not give is rejected before it costs anybody anything.
//!
//! Invariant: a ticket is in at most one place, and [`Admission::end`] frees that place at once, whether the request ended
//! well, was cancelled or ran out of time. Pure: callers pass `now`. Elsewhere: waking who waits, and deadlines (`gate.rs`).

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use types::Millis;

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

/// What becomes of a request that arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It runs.
    Run,
    /// It waits until [`Admission::end`] of another one names it.
    Wait,
    /// It is turned away.
    Reject(Rejection),
}

/// Why a request is turned away, and when a new try has a chance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The waiting requests are as many as may wait.
    #[error("{waiting} requests wait already")]
    QueueFull {
        /// How many.
        waiting: usize,
        /// Milliseconds.
        retry_after_ms: u64,
    },
    /// The first token would come too late.
    #[error("the first token is predicted after {predicted_ms} ms, but the request allows {allowed_ms} ms")]
    TooSlow {
        /// Milliseconds from arrival.
        predicted_ms: u64,
        /// Milliseconds that the request allows.
        allowed_ms: u64,
        /// Milliseconds.
        retry_after_ms: u64,
    },
}

impl Rejection {
    /// When a new try has a chance, in milliseconds.
    pub fn retry_after_ms(&self) -> u64 {
        match self {
            Self::QueueFull { retry_after_ms, .. } | Self::TooSlow { retry_after_ms, .. } => *retry_after_ms,
        }
    }
}

/// Shortest and longest retry times that are given out: sooner is a storm, later is a guess.
const RETRY_AFTER_MS: std::ops::RangeInclusive<f64> = 100.0..=30_000.0;

/// Service time assumed before any request ended, in milliseconds.
const SERVICE_MS_PRIOR: f64 = 1_000.0;

/// Weight of the latest request in the smoothed service time.
const SERVICE_SMOOTHING: f64 = 0.1;

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    prompt_tokens: u64,
}

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
    waiting: VecDeque<Waiting>,
    waiting_prompt_tokens: u64,
    service_ms: f64,
}

impl Admission {
    /// Nobody runs, nobody waits.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            running: HashMap::new(),
            running_prompt_tokens: 0,
            waiting: VecDeque::new(),
            waiting_prompt_tokens: 0,
            service_ms: SERVICE_MS_PRIOR,
        }
    }

    /// A request arrives. It must be ended by [`Admission::end`] unless it is rejected.
    pub fn arrive(&mut self, ticket: Ticket, prompt_tokens: u64, now: Instant) -> Outcome {
        if self.waiting.is_empty() && self.fits(prompt_tokens) {
            self.start(ticket, prompt_tokens, now);
            return Outcome::Run;
        }
        let tokens = self.waiting_prompt_tokens + prompt_tokens;
        if self.waiting.len() >= self.limits.waiting_max || tokens > self.limits.waiting_prompt_tokens_max {
            return Outcome::Reject(Rejection::QueueFull {
                waiting: self.waiting.len(),
                retry_after_ms: retry_after(self.wait_ms().0),
            });
        }
        self.waiting_prompt_tokens = tokens;
        self.waiting.push_back(Waiting {
            ticket,
            prompt_tokens,
        });
        Outcome::Wait
    }

    /// A request ended, was cancelled or gave up waiting. Gives those who run now in its place.
    pub fn end(&mut self, ticket: Ticket, now: Instant) -> Vec<Ticket> {
        if let Some(running) = self.running.remove(&ticket) {
            self.running_prompt_tokens -= running.prompt_tokens;
            let took_ms = now.duration_since(running.since).as_secs_f64() * 1e3;
            self.service_ms += SERVICE_SMOOTHING * (took_ms - self.service_ms);
        } else if let Some(position) = self.waiting.iter().position(|waiting| waiting.ticket == ticket)
            && let Some(waiting) = self.waiting.remove(position)
        {
            self.waiting_prompt_tokens -= waiting.prompt_tokens;
        }
        self.promote(now)
    }

    /// Holds a prediction against what the request allows for its first token. `waited` is what has passed since arrival.
    pub fn judge(
        &self,
        predicted: Millis,
        waited: Duration,
        ttft_slo: Option<Millis>,
    ) -> Result<(), Rejection> {
        let Some(allowed) = ttft_slo else {
            return Ok(());
        };
        let predicted = waited.as_secs_f64() * 1e3 + predicted.0;
        if predicted <= allowed.0 {
            return Ok(());
        }
        Err(Rejection::TooSlow {
            predicted_ms: predicted.ceil() as u64,
            allowed_ms: allowed.0.floor() as u64,
            retry_after_ms: retry_after(predicted - allowed.0),
        })
    }

    /// How long a request that arrives now would wait for its place.
    pub fn wait_ms(&self) -> Millis {
        if self.waiting.is_empty() && self.running.len() < self.limits.running_max {
            return Millis(0.0);
        }
        let turns = (self.waiting.len() + 1) as f64 / self.limits.running_max.max(1) as f64;
        Millis(turns * self.service_ms)
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
        let waiting: u64 = self.waiting.iter().map(|waiting| waiting.prompt_tokens).sum();
        assert_eq!(running, self.running_prompt_tokens);
        assert_eq!(waiting, self.waiting_prompt_tokens);
        assert!(self.running.len() <= self.limits.running_max);
        assert!(self.waiting.len() <= self.limits.waiting_max);
        assert!(waiting <= self.limits.waiting_prompt_tokens_max);
        assert!(running <= self.limits.running_prompt_tokens_max || self.running.len() == 1);
        assert!(
            self.waiting
                .iter()
                .all(|waiting| !self.running.contains_key(&waiting.ticket))
        );
        if let Some(first) = self.waiting.front() {
            assert!(
                !self.fits(first.prompt_tokens),
                "a place is free and the first one waits"
            );
        }
    }

    fn fits(&self, prompt_tokens: u64) -> bool {
        // A request that exceeds the bound by itself must still get its turn.
        self.running.len() < self.limits.running_max
            && (self.running.is_empty()
                || self.running_prompt_tokens + prompt_tokens <= self.limits.running_prompt_tokens_max)
    }

    fn start(&mut self, ticket: Ticket, prompt_tokens: u64, now: Instant) {
        self.running_prompt_tokens += prompt_tokens;
        self.running.insert(
            ticket,
            Running {
                prompt_tokens,
                since: now,
            },
        );
    }

    fn promote(&mut self, now: Instant) -> Vec<Ticket> {
        let mut promoted = Vec::new();
        while let Some(first) = self.waiting.front()
            && self.fits(first.prompt_tokens)
        {
            let (ticket, prompt_tokens) = (first.ticket, first.prompt_tokens);
            self.waiting.pop_front();
            self.waiting_prompt_tokens -= prompt_tokens;
            self.start(ticket, prompt_tokens, now);
            promoted.push(ticket);
        }
        promoted
    }
}

fn retry_after(ms: f64) -> u64 {
    ms.clamp(*RETRY_AFTER_MS.start(), *RETRY_AFTER_MS.end()).ceil() as u64
}

#[cfg(test)]
mod tests;
