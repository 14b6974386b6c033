//! What came of the requests of the last minutes, in steps of a few seconds: what the live page draws.
//!
//! Invariant: [`STEPS`] steps are kept, each with at most `SAMPLES_MAX` latencies and `LINKS_MAX` links, however many requests come.
//!
//! Pure: callers pass times. Elsewhere: the requests (`requests.rs`), the page (`ui.rs`).

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use types::{ErrorCode, Millis, NodeId};

use crate::decisions::Ending;
use crate::timeline::{PlacementTimes, Timeline};

/// Length of a step: short enough to see a burst.
pub const STEP: Duration = Duration::from_secs(2);
/// Steps that are kept: five minutes.
pub const STEPS: usize = 150;
/// Latencies of a step from which its percentiles come; further ones replace some of them.
const SAMPLES_MAX: usize = 128;
/// Pairs of nodes of a step. Those beside them are not drawn.
const LINKS_MAX: usize = 256;

/// The last minutes.
#[derive(Debug)]
pub struct History {
    began: Instant,
    /// Oldest first, without a gap up to the newest one.
    steps: VecDeque<Step>,
    /// Number of the newest step since `began`.
    newest: u64,
    tokens_seen: u64,
}

/// What happened in one step.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Step {
    /// Requests that were answered.
    pub finished: u64,
    /// Those of all that ended and asked something of latency that got it, and that did not.
    pub slo_met: u64,
    /// See there.
    pub slo_missed: u64,
    /// Requests that were turned away for lack of room.
    pub rejected: u64,
    /// Requests that failed otherwise.
    pub failed: u64,
    /// Requests whose client left.
    pub cancelled: u64,
    /// Tokens that went out.
    pub tokens: u64,
    /// Prompt tokens of requests that were answered, and those of them that came from a cache.
    pub prompt_tokens: u64,
    /// See there.
    pub cached_tokens: u64,
    /// What moved between which nodes.
    pub links: BTreeMap<(String, String), Link>,
    ttfts: Vec<f64>,
    first_tokens: u64,
}

/// What moved from one node to another one.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Placements that used it.
    pub requests: u64,
    /// Bytes of KV.
    pub bytes: u64,
}

impl Step {
    /// The percentiles of the time to first token; `None` where there was none.
    pub fn ttft(&self, percent: f64) -> Option<Millis> {
        let mut sorted = self.ttfts.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().map(Millis)
    }

    fn link(&mut self, from: &str, to: &str, bytes: u64) {
        let key = (from.to_owned(), to.to_owned());
        if self.links.len() >= LINKS_MAX && !self.links.contains_key(&key) {
            return;
        }
        let link = self.links.entry(key).or_default();
        link.requests += 1;
        link.bytes += bytes;
    }
}

impl History {
    /// Nothing happened yet.
    pub fn new(now: Instant) -> Self {
        Self {
            began: now,
            steps: VecDeque::from([Step::default()]),
            newest: 0,
            tokens_seen: 0,
        }
    }

    /// A placement's first token came, with what its nodes told of the way there.
    pub fn first_token(&mut self, placement: &PlacementTimes, ttft: Millis, now: Instant) {
        let step = self.step(now);
        let seen = step.first_tokens as usize;
        step.first_tokens += 1;
        match step.ttfts.get_mut(seen % SAMPLES_MAX) {
            Some(sample) => *sample = ttft.0,
            None => step.ttfts.push(ttft.0),
        }
        let decode = placement.decode.as_str();
        if let Some(prefill) = placement.prefill.as_ref().map(NodeId::as_str) {
            step.link("", prefill, 0);
            step.link(prefill, decode, placement.told.handoff_bytes);
        } else {
            step.link("", decode, 0);
        }
    }

    /// A request ended.
    pub fn ended(&mut self, timeline: &Timeline, now: Instant) {
        let step = self.step(now);
        match timeline.ended.map(|(_, ending)| ending) {
            Some(Ending::Finished) => {
                step.finished += 1;
                step.prompt_tokens += timeline.prompt_tokens;
                step.cached_tokens += timeline.cached_tokens.min(timeline.prompt_tokens);
            }
            Some(Ending::Failed(ErrorCode::Overloaded)) => step.rejected += 1,
            Some(Ending::Failed(_)) => step.failed += 1,
            Some(Ending::Cancelled) | None => step.cancelled += 1,
        }
        match timeline.met_slo() {
            Some(true) => step.slo_met += 1,
            Some(false) => step.slo_missed += 1,
            None => {}
        }
    }

    /// `tokens` went out ever. To be called as often as there are steps.
    pub fn tokens(&mut self, tokens: u64, now: Instant) {
        let more = tokens.saturating_sub(self.tokens_seen);
        self.tokens_seen = tokens;
        self.step(now).tokens += more;
    }

    /// The steps up to `now`, oldest first; the last one goes on.
    pub fn steps(&mut self, now: Instant) -> &VecDeque<Step> {
        self.step(now);
        &self.steps
    }

    fn step(&mut self, now: Instant) -> &mut Step {
        let passed = now.saturating_duration_since(self.began);
        let number = passed.as_millis() as u64 / STEP.as_millis() as u64;
        // However long nobody looked, no more steps are made than are kept.
        let missing = number.saturating_sub(self.newest).min(STEPS as u64);
        for _ in 0..missing {
            if self.steps.len() == STEPS {
                self.steps.pop_front();
            }
            self.steps.push_back(Step::default());
        }
        self.newest = self.newest.max(number);
        self.steps.back_mut().expect("there is always a step")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::tests::answered;

    #[test]
    fn a_request_counts_in_the_step_in_which_it_ends() {
        let start = Instant::now();
        let mut history = History::new(start);
        let mut timeline = answered();
        timeline.slo.ttft = Some(Millis(30.0));
        timeline.placements[0].told.handoff_bytes = 100;
        let later = start + STEP * 3;
        history.first_token(&timeline.placements[0], Millis(29.0), later);
        history.ended(&timeline, later);
        timeline.ended = Some((Millis(5.0), Ending::Failed(ErrorCode::Overloaded)));
        timeline.first_token = None;
        history.ended(&timeline, later + STEP);
        history.tokens(7, later + STEP);
        history.tokens(9, later + STEP * 2);
        let steps = history.steps(later + STEP * 2);
        assert_eq!(steps.len(), 6);
        assert_eq!(
            (steps[3].finished, steps[3].slo_met, steps[3].slo_missed),
            (1, 1, 0)
        );
        assert_eq!(steps[3].ttft(95.0), Some(Millis(29.0)));
        let link = steps[3].links[&("prefill-0".to_owned(), "decode-0".to_owned())];
        assert_eq!((link.requests, link.bytes), (1, 100));
        assert_eq!(
            (steps[4].rejected, steps[4].slo_missed, steps[4].tokens),
            (1, 0, 7)
        );
        assert_eq!((steps[5].tokens, steps[5].ttft(50.0)), (2, None));
    }

    #[test]
    fn only_the_last_minutes_are_kept() {
        let start = Instant::now();
        let mut history = History::new(start);
        history.tokens(5, start);
        let steps = history.steps(start + STEP * 100_000);
        assert_eq!(steps.len(), STEPS);
        assert!(steps.iter().all(|step| *step == Step::default()));
    }

    #[test]
    fn latencies_and_links_of_a_step_are_bounded() {
        let start = Instant::now();
        let mut history = History::new(start);
        let mut placement = answered().placements.remove(0);
        for number in 0..1000 {
            placement.decode = format!("decode-{number}").as_str().into();
            history.first_token(&placement, Millis(f64::from(number)), start);
        }
        let step = &history.steps(start)[0];
        assert_eq!((step.ttfts.len(), step.links.len()), (SAMPLES_MAX, LINKS_MAX));
        assert!(step.ttft(100.0) == Some(Millis(999.0)));
    }
}
