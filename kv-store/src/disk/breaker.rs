//! When a disk is worth asking: a circuit breaker over its errors and its speed.
//!
//! States: `Closed`, the disk is used; `Open`, nothing is asked of it for a time; `Probing`, one try decides. Writes have a
//! hold of their own, since a full disk still reads well.
//!
//! Invariant: whatever the disk does, at most [`Limits::errors_max`] errors in a row, or one measuring span of slowness, reach
//! those who use it, and then one probe per [`Limits::bypass_max`] at the latest finds it well again.
//!
//! Pure: callers pass `now`. Elsewhere: the operations (`disk.rs`), the log line and gauge for each [`Change`] (`metrics.rs`).

use std::time::{Duration, Instant};

/// What a disk is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Errors in a row that open the breaker.
    pub errors_max: u32,
    /// Longest time without any operation coming to its end while some are under way.
    pub stall_max: Duration,
    /// Bytes per second while the disk is busy, below which it is too slow to be of use; 0 allows any.
    pub rate_min: u64,
    /// First time of a bypass. It doubles with every probe that fails.
    pub bypass_min: Duration,
    /// Longest time of a bypass.
    pub bypass_max: Duration,
}

/// Busy time over which a rate is measured: long against the pauses of a healthy disk that flushes or collects garbage.
const MEASURED_SPAN: Duration = Duration::from_millis(500);

/// The breaker of one disk.
#[derive(Debug)]
pub struct Breaker {
    limits: Limits,
    state: State,
    /// Time of the next bypass.
    bypass: Duration,
    errors: u32,
    in_flight: usize,
    span: Span,
    /// When anything last ended, or the first of those in flight began.
    progress_at: Option<Instant>,
    /// Writes are held until then: the disk was full.
    full_until: Option<Instant>,
    /// Bytes per second of the last span measured.
    rate: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    Open { until: Instant },
    Probing,
}

/// What was moved while the disk was busy.
#[derive(Debug, Default)]
struct Span {
    bytes: u64,
    busy: Duration,
    /// Since when operations are under way without a break.
    busy_since: Option<Instant>,
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// So many bytes were moved.
    Moved(u64),
    /// There is no room left.
    Full,
    /// Anything else went wrong.
    Failed,
}

/// What changed, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The disk is passed over, for this time and this reason.
    Bypassed(Reason, Duration),
    /// It is used again.
    Restored,
    /// Nothing is written, for this time.
    WritesHeld(Duration),
}

/// Why a disk is passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Operations failed.
    Errors,
    /// It moves fewer bytes per second than it must.
    Slow {
        /// What it moved.
        bytes_per_second: u64,
    },
    /// Operations do not come to an end.
    Stalled,
}

impl Breaker {
    /// A breaker that lets everything through.
    pub fn new(limits: Limits) -> Self {
        Self {
            bypass: limits.bypass_min,
            limits,
            state: State::Closed,
            errors: 0,
            in_flight: 0,
            span: Span::default(),
            progress_at: None,
            full_until: None,
            rate: None,
        }
    }

    /// Whether to read now.
    pub fn allows_reads(&self) -> bool {
        self.state == State::Closed
    }

    /// Whether to write now.
    pub fn allows_writes(&self, now: Instant) -> bool {
        self.allows_reads() && self.full_until.is_none_or(|until| until <= now)
    }

    /// Whether a probe is due. The caller that is told so makes one, and says with [`Breaker::probed`] how it ended.
    pub fn begin_probe(&mut self, now: Instant) -> bool {
        match self.state {
            State::Open { until } if until <= now && self.in_flight == 0 => {
                self.state = State::Probing;
                true
            }
            State::Open { .. } | State::Closed | State::Probing => false,
        }
    }

    /// The probe moved `bytes` in `elapsed`, or failed.
    pub fn probed(&mut self, bytes: Option<u64>, elapsed: Duration, now: Instant) -> Change {
        let rate_min = self.limits.rate_min as f64;
        let reason = match bytes {
            None => Reason::Errors,
            Some(bytes) => {
                let rate = bytes as f64 / elapsed.as_secs_f64().max(1e-9);
                if rate >= rate_min {
                    self.state = State::Closed;
                    self.bypass = self.limits.bypass_min;
                    self.errors = 0;
                    self.span = Span::default();
                    return Change::Restored;
                }
                Reason::Slow {
                    bytes_per_second: rate as u64,
                }
            }
        };
        self.open(reason, now)
    }

    /// An operation goes to the disk.
    pub fn begin(&mut self, now: Instant) {
        self.in_flight += 1;
        if self.in_flight == 1 {
            self.span.busy_since = Some(now);
            self.progress_at = Some(now);
        }
    }

    /// It ended.
    pub fn end(&mut self, outcome: Outcome, now: Instant) -> Option<Change> {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.progress_at = (self.in_flight > 0).then_some(now);
        if let Some(since) = self.span.busy_since {
            self.span.busy += now.saturating_duration_since(since);
        }
        self.span.busy_since = (self.in_flight > 0).then_some(now);
        match outcome {
            Outcome::Moved(bytes) => {
                self.errors = 0;
                self.span.bytes += bytes;
                self.judge_rate(now)
            }
            Outcome::Full => {
                let hold = self.limits.bypass_max;
                let news = self.full_until.is_none_or(|until| until <= now);
                self.full_until = Some(now + hold);
                news.then_some(Change::WritesHeld(hold))
            }
            Outcome::Failed => {
                self.errors += 1;
                let trips = self.errors >= self.limits.errors_max.max(1);
                (trips && self.state == State::Closed).then(|| self.open(Reason::Errors, now))
            }
        }
    }

    /// Notices operations that do not end. Call it now and then.
    pub fn check(&mut self, now: Instant) -> Option<Change> {
        let since = self.progress_at?;
        let stalled = now.saturating_duration_since(since) > self.limits.stall_max;
        (stalled && self.state == State::Closed).then(|| self.open(Reason::Stalled, now))
    }

    /// Bytes per second that the disk moved when last measured.
    pub fn rate(&self) -> Option<f64> {
        self.rate
    }

    fn judge_rate(&mut self, now: Instant) -> Option<Change> {
        if self.span.busy < MEASURED_SPAN {
            return None;
        }
        let rate = self.span.bytes as f64 / self.span.busy.as_secs_f64();
        self.rate = Some(rate);
        self.span.bytes = 0;
        self.span.busy = Duration::ZERO;
        let slow = rate < self.limits.rate_min as f64 && self.state == State::Closed;
        let reason = Reason::Slow {
            bytes_per_second: rate as u64,
        };
        slow.then(|| self.open(reason, now))
    }

    fn open(&mut self, reason: Reason, now: Instant) -> Change {
        let bypass = self.bypass;
        self.state = State::Open { until: now + bypass };
        self.bypass = (bypass * 2).min(self.limits.bypass_max);
        Change::Bypassed(reason, bypass)
    }
}

#[cfg(test)]
mod tests;
