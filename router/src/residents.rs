//! The batches of the decode nodes at a later time.
//!
//! A prompt that is placed now decodes when it is computed, which may be many seconds later: the batch that it joins is what is
//! left of today's, and what lands before it. Going by today's batch makes load oscillate (Mooncake's technical report, section 7):
//! all that is let in while a batch is small lands at the same time. So every answer that this router placed is followed:
//! when it began or will begin, and how likely it is to go on by then (`lengths.rs`). What others placed on a node is
//! taken to stay as it is.
//!
//! Pure: callers pass `now`.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use types::{Millis, NodeId};

use crate::cost::PlacementId;
use crate::lengths::{Alike, Lengths};

/// An answer that is to be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Whose it is.
    pub tenant: String,
    /// Tokens that it has already, from another node.
    pub tokens: u64,
    /// Tokens that it may have at most, those included.
    pub tokens_max: u64,
}

#[derive(Debug)]
struct Resident {
    answer: Answer,
    /// When its first token is predicted.
    lands: Instant,
    /// When it came.
    landed: Option<Instant>,
}

/// Who decodes where. At most as many as run.
#[derive(Debug, Default)]
pub struct Residents {
    /// In order, so that sums are the same in every run.
    of_node: HashMap<NodeId, BTreeMap<PlacementId, Resident>>,
    node_of: HashMap<PlacementId, NodeId>,
}

/// All that tells how busy a decode node will be.
#[derive(Debug, Clone, Copy)]
pub struct Outlook<'a> {
    /// Who decodes where.
    pub residents: &'a Residents,
    /// How long answers are.
    pub lengths: &'a Lengths,
    /// The present.
    pub now: Instant,
}

impl Residents {
    /// An answer will be given on `node`, predicted to begin at `lands`.
    pub fn place(&mut self, id: PlacementId, node: &NodeId, answer: Answer, lands: Instant) {
        self.node_of.insert(id, node.clone());
        let residents = self.of_node.entry(node.clone()).or_default();
        let landed = None;
        residents.insert(
            id,
            Resident {
                answer,
                lands,
                landed,
            },
        );
    }

    /// Its first token came.
    pub fn landed(&mut self, id: PlacementId, now: Instant) {
        let resident = self.node_of.get(&id).and_then(|node| self.of_node.get_mut(node));
        if let Some(resident) = resident.and_then(|residents| residents.get_mut(&id)) {
            resident.landed = Some(now);
        }
    }

    /// It ended, in whichever way. Gives what it was, if it was there.
    pub fn ended(&mut self, id: PlacementId) -> Option<Answer> {
        let node = self.node_of.remove(&id)?;
        let residents = self.of_node.get_mut(&node)?;
        let resident = residents.remove(&id);
        if residents.is_empty() {
            self.of_node.remove(&node);
        }
        resident.map(|resident| resident.answer)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.node_of.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.node_of.is_empty()
    }
}

impl Outlook<'_> {
    /// The sequences that are expected to decode on `node` when `ahead` has passed, if it has `running` now and a step takes so long.
    pub fn batch(&self, node: &NodeId, running: u64, step: Millis, ahead: Millis) -> f64 {
        let Some(residents) = self.residents.of_node.get(node) else {
            return running as f64;
        };
        let then = self.now + Duration::from_secs_f64(ahead.0.max(0.0) / 1e3);
        let (mut landed, mut expected) = (0u64, 0.0);
        // Most neighbours are of one tenant.
        let mut alike: Option<(&str, Alike<'_>)> = None;
        for resident in residents.values() {
            landed += u64::from(resident.landed.is_some());
            let tenant = resident.answer.tenant.as_str();
            let of_tenant = match alike {
                Some((known, of_tenant)) if known == tenant => of_tenant,
                _ => alike.insert((tenant, self.lengths.of(tenant))).1,
            };
            expected += resident.is_there(self.now, then, step, of_tenant);
        }
        running.saturating_sub(landed) as f64 + expected
    }
}

impl Resident {
    /// How likely it decodes at `then`.
    fn is_there(&self, now: Instant, then: Instant, step: Millis, alike: Alike<'_>) -> f64 {
        let steps = |from: Instant, to: Instant| {
            let passed = to.saturating_duration_since(from);
            (passed.as_secs_f64() * 1e3 / step.0.max(f64::MIN_POSITIVE)) as u64
        };
        // What should have landed lands any moment.
        let lands = self.lands.max(now);
        let (tokens, more) = match self.landed {
            Some(landed) => (self.answer.tokens + steps(landed, now), steps(now, then)),
            None if lands <= then => (self.answer.tokens, steps(lands, then)),
            None => return 0.0,
        };
        if tokens.saturating_add(more) >= self.answer.tokens_max {
            return 0.0;
        }
        alike.go_on(tokens, more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Millis = Millis(10.0);

    struct Node {
        residents: Residents,
        lengths: Lengths,
        now: Instant,
        placed: u64,
    }

    impl Node {
        fn new() -> Self {
            Self {
                residents: Residents::default(),
                lengths: Lengths::default(),
                now: Instant::now(),
                placed: 0,
            }
        }

        fn place(&mut self, lands_ms: u64, tokens_max: u64) -> PlacementId {
            let id = PlacementId(self.placed);
            self.placed += 1;
            let answer = Answer {
                tenant: "a".into(),
                tokens: 0,
                tokens_max,
            };
            let lands = self.now + Duration::from_millis(lands_ms);
            self.residents.place(id, &"d".into(), answer, lands);
            id
        }

        fn batch(&self, running: u64, ahead_ms: f64) -> f64 {
            let outlook = Outlook {
                residents: &self.residents,
                lengths: &self.lengths,
                now: self.now,
            };
            outlook.batch(&"d".into(), running, STEP, Millis(ahead_ms))
        }
    }

    fn is(value: f64, expected: f64) -> bool {
        (value - expected).abs() < 1e-9
    }

    #[test]
    fn what_others_placed_stays() {
        let node = Node::new();
        assert!(is(node.batch(7, 1e6), 7.0));
    }

    #[test]
    fn a_prompt_counts_from_when_it_lands() {
        let mut node = Node::new();
        node.place(1_000, 1_000_000);
        assert!(is(node.batch(0, 900.0), 0.0));
        assert!(is(node.batch(0, 1_100.0), 1.0));
    }

    #[test]
    fn an_answer_leaves_at_its_limit() {
        let mut node = Node::new();
        let id = node.place(0, 100);
        node.residents.landed(id, node.now);
        assert!(is(node.batch(1, 900.0), 1.0));
        assert!(is(node.batch(1, 1_000.0), 0.0));
        node.now += Duration::from_millis(500);
        assert!(is(node.batch(1, 400.0), 1.0));
        assert!(is(node.batch(1, 600.0), 0.0));
    }

    #[test]
    fn answers_leave_as_earlier_ones_did() {
        let mut node = Node::new();
        for _ in 0..50 {
            node.lengths.learn("a", 16);
            node.lengths.learn("a", 256);
        }
        let id = node.place(0, 1_000_000);
        node.residents.landed(id, node.now);
        let half = node.batch(1, 640.0);
        assert!((half - 0.5).abs() < 0.01, "{half}");
        // Another one, of another router, is not ours to foretell.
        let more = node.batch(2, 640.0);
        assert!((more - 1.5).abs() < 0.01, "{more}");
    }

    #[test]
    fn who_ended_is_gone() {
        let mut node = Node::new();
        let id = node.place(0, 100);
        node.residents.landed(id, node.now);
        assert!(node.residents.ended(id).is_some());
        assert!(node.residents.ended(id).is_none());
        assert!(node.residents.is_empty());
        assert_eq!(node.residents.len(), 0);
        assert!(is(node.batch(0, 100.0), 0.0));
    }
}
