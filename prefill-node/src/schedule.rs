//! Which prompts are computed next, and how much of them: chunked prefill, in which neither a long prompt waits for ever nor a short
//! one for a long one.
//!
//! Invariants: every position that a prompt needs is dealt out exactly once, in order; a chunk ends on a block
//! boundary unless it ends its prompt, so that a block's slice of a layer is complete in one step and is pushed
//! once; a step never exceeds its token budget; the oldest ready prompt has half of every step, so none starves.
//!
//! A pure state machine: nothing here waits, logs or reads a clock. Elsewhere: the computation (`engine_loop`),
//! the memory that a prompt must own before it is ready (`session`).

use std::collections::BTreeMap;
use std::ops::Range;

use types::{Error, ErrorCode};

/// How much may wait, and how much is computed at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Prompts that wait or are being computed.
    pub requests_max: usize,
    /// Tokens of those prompts that are still to be computed.
    pub tokens_max: usize,
    /// Tokens of one step. At least [`Limits::block_tokens`].
    pub step_tokens: usize,
    /// Prompts of one step.
    pub step_sequences_max: usize,
    /// Tokens per KV block.
    pub block_tokens: usize,
}

/// A place in the queue. Grows with arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// Where a new prompt stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Names the prompt from here on.
    pub ticket: Ticket,
    /// Prompts that came before and are not finished.
    pub requests_ahead: usize,
    /// Their tokens that are still to be computed.
    pub tokens_ahead: usize,
}

/// Why a prompt is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// Too many prompts.
    #[error("{limit} prompts wait or are being computed, which is the limit")]
    Requests {
        /// The bound.
        limit: usize,
    },
    /// Too many tokens.
    #[error("{queued} tokens wait, {wanted} more would exceed the limit of {limit}")]
    Tokens {
        /// Tokens in the queue.
        queued: usize,
        /// Tokens of the prompt.
        wanted: usize,
        /// The bound.
        limit: usize,
    },
}

impl Full {
    /// What the caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Requests { .. } | Self::Tokens { .. } => ErrorCode::Overloaded,
        }
    }

    /// The error for a caller that may come back after `retry_after_ms`.
    pub fn into_error(self, retry_after_ms: u64) -> Error {
        Error {
            retry_after_ms: Some(retry_after_ms),
            ..Error::new(self.code(), self.to_string())
        }
    }
}

/// A run of one prompt's positions, to be computed in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Whose.
    pub ticket: Ticket,
    /// Positions in the prompt.
    pub tokens: Range<usize>,
    /// Whether it ends the prompt.
    pub last: bool,
}

/// The queue and its progress.
#[derive(Debug)]
pub struct Schedule {
    limits: Limits,
    next_ticket: u64,
    entries: BTreeMap<Ticket, Entry>,
    /// Sum of what the entries still need.
    queued_tokens: usize,
}

#[derive(Debug)]
struct Entry {
    remaining: Range<usize>,
    /// Whether its memory and its cached prefix are in place.
    ready: bool,
}

impl Schedule {
    /// An empty queue. A budget that holds no block is raised to one block, without which no prompt would advance.
    pub fn new(limits: Limits) -> Self {
        let limits = Limits {
            step_tokens: limits.step_tokens.max(limits.block_tokens),
            step_sequences_max: limits.step_sequences_max.max(1),
            ..limits
        };
        Self {
            limits,
            next_ticket: 0,
            entries: BTreeMap::new(),
            queued_tokens: 0,
        }
    }

    /// Takes a prompt of `length` tokens into the queue. An empty queue takes any length.
    pub fn admit(&mut self, length: usize) -> Result<Place, Full> {
        let Limits {
            requests_max,
            tokens_max,
            ..
        } = self.limits;
        if self.entries.len() >= requests_max {
            return Err(Full::Requests { limit: requests_max });
        }
        if !self.entries.is_empty() && self.queued_tokens + length > tokens_max {
            return Err(Full::Tokens {
                queued: self.queued_tokens,
                wanted: length,
                limit: tokens_max,
            });
        }
        let place = Place {
            ticket: Ticket(self.next_ticket),
            requests_ahead: self.entries.len(),
            tokens_ahead: self.queued_tokens,
        };
        self.next_ticket += 1;
        self.queued_tokens += length;
        let entry = Entry {
            remaining: 0..length,
            ready: false,
        };
        self.entries.insert(place.ticket, entry);
        Ok(place)
    }

    /// Says that the prompt can be computed from position `start` on: a block boundary, or the last position.
    /// Does nothing for a prompt that was removed.
    pub fn ready(&mut self, ticket: Ticket, start: usize) {
        let Some(entry) = self.entries.get_mut(&ticket) else {
            return;
        };
        debug_assert!(!entry.ready && start < entry.remaining.end);
        debug_assert!(start.is_multiple_of(self.limits.block_tokens) || start + 1 == entry.remaining.end);
        self.queued_tokens -= start - entry.remaining.start;
        entry.remaining.start = start;
        entry.ready = true;
    }

    /// Forgets a prompt, finished or not.
    pub fn remove(&mut self, ticket: Ticket) {
        if let Some(entry) = self.entries.remove(&ticket) {
            self.queued_tokens -= entry.remaining.len();
        }
    }

    /// Deals out the next step, in order of arrival; empty if nothing is ready. What it returns counts as computed.
    ///
    /// The oldest prompt has half of the budget, and what others leave of the rest. Those that need least come first in that: a short
    /// prompt does not wait for a long one, and a long one takes at most twice as long as alone, however many short ones come.
    pub fn next_step(&mut self) -> Vec<Chunk> {
        let block_tokens = self.limits.block_tokens;
        let ready = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.ready && !entry.remaining.is_empty());
        let mut ready: Vec<(Ticket, Range<usize>)> = ready
            .map(|(ticket, entry)| (*ticket, entry.remaining.clone()))
            .collect();
        if ready.is_empty() {
            return Vec::new();
        }
        let (oldest, needed) = ready.remove(0);
        let budget = self.limits.step_tokens;
        let mut room = budget - chunk(&needed, budget.div_ceil(2).max(block_tokens), block_tokens).len();
        // Stable, so that of two that need as much the older one comes first.
        ready.sort_by_key(|(_, remaining)| remaining.len());
        let mut dealt = BTreeMap::new();
        for (ticket, remaining) in ready {
            if room == 0 || dealt.len() + 1 == self.limits.step_sequences_max {
                break;
            }
            let tokens = chunk(&remaining, room, block_tokens);
            if !tokens.is_empty() {
                room -= tokens.len();
                dealt.insert(ticket, tokens);
            }
        }
        let others: usize = dealt.values().map(Range::len).sum();
        dealt.insert(oldest, chunk(&needed, budget - others, block_tokens));
        let deal = dealt
            .into_iter()
            .map(|(ticket, tokens)| self.deal(ticket, tokens));
        deal.collect()
    }

    fn deal(&mut self, ticket: Ticket, tokens: Range<usize>) -> Chunk {
        let entry = self
            .entries
            .get_mut(&ticket)
            .expect("it was found among the entries");
        entry.remaining.start = tokens.end;
        self.queued_tokens -= tokens.len();
        Chunk {
            ticket,
            last: entry.remaining.is_empty(),
            tokens,
        }
    }

    /// Prompts that wait or are being computed.
    pub fn queued_requests(&self) -> usize {
        self.entries.len()
    }

    /// Tokens that are still to be dealt out.
    pub fn queued_tokens(&self) -> usize {
        self.queued_tokens
    }

    /// Property tests call this after every step.
    pub fn check_integrity(&self) {
        let sum: usize = self.entries.values().map(|entry| entry.remaining.len()).sum();
        assert_eq!(sum, self.queued_tokens, "the sum is kept");
        assert!(
            self.entries.len() <= self.limits.requests_max,
            "requests are bounded"
        );
        assert!(
            self.queued_tokens <= self.limits.tokens_max || self.entries.len() <= 1,
            "tokens are bounded"
        );
    }
}

/// The longest chunk from the start of `remaining` that fits `room` and ends on a block boundary or at the end.
fn chunk(remaining: &Range<usize>, room: usize, block_tokens: usize) -> Range<usize> {
    let start = remaining.start;
    if remaining.len() <= room {
        return remaining.clone();
    }
    let boundary = (start + room) / block_tokens * block_tokens;
    start..boundary.max(start)
}

#[cfg(test)]
mod tests;
