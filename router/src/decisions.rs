//! The last placements of a router, with everything that was weighed, to be asked about.
//!
//! Invariants:
//! - at most so many decisions are kept, each with at most [`CANDIDATES_KEPT`] candidates and as many excluded nodes, so that
//!   their memory is bounded whatever the cluster's size;
//! - the choice is the first candidate, and the others follow, best first.
//!
//! Pure: callers pass times. Elsewhere: the choice (`placement.rs`), who records and asks (`recorder.rs`, `routing.rs`).

mod reason;

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::sync::Arc;

use types::{ErrorCode, Millis, NodeId, RequestId};

use crate::admission::Rejection;
use crate::placement::{Candidate, Exclusion, Explanation};

pub use reason::reason;

/// Candidates, and excluded nodes, of a kept decision. A cluster of 60 prefill and 40 decode nodes has 2,440, of which the best
/// ones tell why the choice was one.
pub const CANDIDATES_KEPT: usize = 64;

/// Most decisions that can be kept: some 80 MiB.
pub const DECISIONS_KEPT_MAX: usize = 4_096;

/// A placement that was made, or would be.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// For whom; `None` if it was only explained.
    pub request: Option<RequestId>,
    /// When, in milliseconds since 1970.
    pub made_unix_ms: u64,
    /// Whose cache the request uses.
    pub tenant: String,
    /// Tokens of the sequence so far.
    pub prompt_tokens: u64,
    /// The policy that chose.
    pub policy: &'static str,
    /// The choice, and then the others, best first.
    pub candidates: Vec<Candidate>,
    /// Candidates that were weighed beside these.
    pub candidates_left_out: usize,
    /// Nodes that were not weighed.
    pub excluded: Vec<(NodeId, Exclusion)>,
    /// Nodes that were not weighed beside these.
    pub excluded_left_out: usize,
    /// Scores closer than this were equal.
    pub tie: Millis,
    /// What the decision took.
    pub took: Millis,
    /// How admission would take a request that is only explained.
    pub admission: Option<Foreseen>,
}

/// How admission would take a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Foreseen {
    /// Until it would get its place; 0 if it would run at once.
    pub wait: Millis,
    /// Until its first token, that wait included.
    pub ttft: Millis,
    /// Why it would be turned away instead, if it would be.
    pub rejection: Option<Rejection>,
}

/// What a decision is about, beside its reasons.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// For whom; `None` if it is only explained.
    pub request: Option<RequestId>,
    /// When, in milliseconds since 1970.
    pub made_unix_ms: u64,
    /// Whose cache the request uses.
    pub tenant: String,
    /// Tokens of the sequence so far.
    pub prompt_tokens: u64,
    /// Scores closer than this were equal.
    pub tie: Millis,
    /// What the decision took.
    pub took: Millis,
}

/// How a placement ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The answer is complete.
    Finished,
    /// The client left.
    Cancelled,
    /// A node failed it, or it was turned away.
    Failed(ErrorCode),
}

impl Ending {
    /// `finished`, `cancelled`, or the error's code.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Cancelled => "cancelled",
            Self::Failed(code) => code.as_str(),
        }
    }
}

/// What came of a placement.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// From placement to the first token.
    pub ttft: Option<Millis>,
    /// How it ended; `None` while it runs.
    pub ending: Option<Ending>,
}

/// A decision that is kept. Clones share it.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// Counts the router's decisions from 1.
    pub number: u64,
    /// The decision.
    pub decision: Arc<Decision>,
    /// What came of it.
    pub outcome: Outcome,
}

impl Decision {
    /// The decision with every candidate.
    pub fn whole(subject: Subject, explanation: Explanation) -> Self {
        Self::new(subject, explanation, usize::MAX)
    }

    /// The decision with the best of its candidates, as many as are kept.
    pub fn trimmed(subject: Subject, explanation: Explanation) -> Self {
        Self::new(subject, explanation, CANDIDATES_KEPT)
    }

    fn new(subject: Subject, explanation: Explanation, most: usize) -> Self {
        let Subject {
            request,
            made_unix_ms,
            tenant,
            prompt_tokens,
            tie,
            took,
        } = subject;
        let Explanation {
            policy,
            chosen,
            mut candidates,
            mut excluded,
        } = explanation;
        let choice = candidates.swap_remove(chosen);
        let candidates_left_out = (candidates.len() + 1).saturating_sub(most);
        let others = most - 1;
        if candidates.len() > others {
            // Sorting all of thousands would take as long as weighing them did.
            candidates.select_nth_unstable_by(others, best_first);
            candidates.truncate(others);
        }
        candidates.sort_unstable_by(best_first);
        candidates.insert(0, choice);
        // What is kept long must not hold on to the memory of what is not.
        candidates.shrink_to_fit();
        let excluded_left_out = excluded.len().saturating_sub(most);
        excluded.truncate(most);
        Self {
            request,
            made_unix_ms,
            tenant,
            prompt_tokens,
            policy,
            candidates,
            candidates_left_out,
            excluded,
            excluded_left_out,
            tie,
            took,
            admission: None,
        }
    }

    /// The same, with what admission would say.
    #[must_use]
    pub fn admitted(self, admission: Foreseen) -> Self {
        let admission = Some(admission);
        Self { admission, ..self }
    }

    /// The choice.
    pub fn choice(&self) -> &Candidate {
        &self.candidates[0]
    }
}

/// By what policies may pick, what speaks against it, and score; nodes' names make it one order.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    let rank = |candidate: &Candidate| (!candidate.eligible(), candidate.objection);
    rank(a)
        .cmp(&rank(b))
        .then_with(|| a.score.0.total_cmp(&b.score.0))
        .then_with(|| (&a.prefill, &a.decode).cmp(&(&b.prefill, &b.decode)))
}

/// The last decisions.
#[derive(Debug)]
pub struct Ring {
    /// Oldest first, with consecutive numbers.
    kept: VecDeque<Kept>,
    kept_max: usize,
    /// Number of the next decision.
    next: u64,
}

impl Ring {
    /// Keeps the last `kept_max` decisions, of which there may be none.
    pub fn new(kept_max: usize) -> Self {
        Self {
            kept: VecDeque::new(),
            kept_max: kept_max.min(DECISIONS_KEPT_MAX),
            next: 1,
        }
    }

    /// Keeps a decision, in the place of the oldest one once there are as many as may be.
    pub fn push(&mut self, decision: Arc<Decision>) -> Kept {
        let kept = Kept {
            number: self.next,
            decision,
            outcome: Outcome::default(),
        };
        self.next += 1;
        if self.kept_max > 0 {
            if self.kept.len() == self.kept_max {
                self.kept.pop_front();
            }
            self.kept.push_back(kept.clone());
        }
        kept
    }

    /// The first token of a placement came.
    pub fn first_token(&mut self, number: u64, ttft: Millis) {
        if let Some(kept) = self.of_number(number) {
            kept.outcome.ttft.get_or_insert(ttft);
        }
    }

    /// A placement ended. What is said first holds.
    pub fn ended(&mut self, number: u64, ending: Ending) {
        if let Some(kept) = self.of_number(number) {
            kept.outcome.ending.get_or_insert(ending);
        }
    }

    /// The last `count` decisions, newest first; of `request` only, if it is named.
    pub fn newest(&self, request: Option<RequestId>, count: usize) -> Vec<Kept> {
        let newest = self.kept.iter().rev();
        newest
            .filter(|kept| request.is_none() || kept.decision.request == request)
            .take(count)
            .cloned()
            .collect()
    }

    fn of_number(&mut self, number: u64) -> Option<&mut Kept> {
        let first = self.kept.front()?.number;
        let index = usize::try_from(number.checked_sub(first)?).ok()?;
        self.kept.get_mut(index)
    }
}

#[cfg(test)]
mod tests;
