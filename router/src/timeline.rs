//! The way of one request through the cluster, as its router saw it and its nodes told it.
//!
//! Invariants:
//! - every time counts from the request's arrival, on the router's clock alone: what a node tells counts from when the node began
//!   with the request, which is taken to be when the router called it;
//! - of at most [`PLACEMENTS_KEPT`] placements, the last ones, and of at most `SPANS_MAX` parts of each, so that its memory is bounded.
//!
//! Pure: callers pass times. Elsewhere: who keeps and ends them (`requests.rs`), the parts in order (`timeline/parts.rs`).

mod parts;

use types::{Millis, NodeId, Priority, RequestId, Slo, TraceParent};

use crate::decisions::Ending;

pub use parts::{Part, parts, server_timing};

/// Placements of a request that are kept. One that nodes fail more often is one whose first failures tell nothing new.
pub const PLACEMENTS_KEPT: usize = 8;

/// Most characters of an error's message that are kept.
const ERROR_CHARS_MAX: usize = 512;

/// Who a request is, before anything happened to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrival {
    /// Names it. Its client may have named others alike.
    pub request: RequestId,
    /// When, in milliseconds since 1970.
    pub arrived_unix_ms: u64,
    /// Whose cache it uses.
    pub tenant: String,
    /// How much it matters.
    pub priority: Priority,
    /// The trace of its client, if it has one.
    pub parent: Option<TraceParent>,
    /// Its own trace and outermost span.
    pub root: TraceParent,
}

/// A request's way. Times count from its arrival.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// Who it is.
    pub arrival: Arrival,
    /// What it asks of latency.
    pub slo: Slo,
    /// Tokens of its prompt; 0 until they are known.
    pub prompt_tokens: u64,
    /// Those of them whose KV came from a cache.
    pub cached_tokens: u64,
    /// Most tokens of its answer.
    pub output_tokens_max: u64,
    /// Tokens that went out.
    pub output_tokens: u64,
    /// When it was read and tokenised.
    pub tokenised: Option<Millis>,
    /// When it was let in.
    pub admitted: Option<Millis>,
    /// Oldest first.
    pub placements: Vec<PlacementTimes>,
    /// When the first token came.
    pub first_token: Option<Millis>,
    /// When the last one so far came.
    pub last_token: Option<Millis>,
    /// When and how it ended; `None` while it runs.
    pub ended: Option<(Millis, Ending)>,
    /// What the error said that ended it.
    pub error: String,
}

/// One placement's way.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacementTimes {
    /// Counts the request's placements from 1.
    pub number: u32,
    /// Who prefills, if not the decode node.
    pub prefill: Option<NodeId>,
    /// Who decodes.
    pub decode: NodeId,
    /// When the search for nodes began, and when they were chosen.
    pub sought: Millis,
    /// When the decode node was called.
    pub called: Millis,
    /// When it accepted.
    pub accepted: Option<Millis>,
    /// When its first token came.
    pub first_token: Option<Millis>,
    /// When and how it ended.
    pub ended: Option<(Millis, Ending)>,
    /// What was predicted for the first token, from the call on.
    pub ttft_predicted: Millis,
    /// What its nodes told.
    pub told: Told,
}

/// What nodes tell of a placement.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Told {
    /// Parts of the way, from the call on.
    pub spans: Vec<Span>,
    /// Bytes of KV that came from peers' caches.
    pub fetched_bytes: u64,
    /// Bytes of KV that moved from prefill to decode.
    pub handoff_bytes: u64,
    /// Time in which they moved while the engine computed.
    pub handoff_hidden: Millis,
    /// Time that only waited for them.
    pub handoff_exposed: Millis,
    /// What moved them.
    pub transport: String,
}

/// A part of the way on a node.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Such as `prefill`: those of `proto::span`, and whatever newer nodes tell.
    pub name: String,
    /// Where.
    pub node: String,
    /// When it began, from the call on.
    pub start: Millis,
    /// How long it took.
    pub duration: Millis,
    /// Bytes that moved in it.
    pub bytes: u64,
    /// Where they came from, or what moved them.
    pub detail: String,
}

/// Where a request is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is read and tokenised.
    Arriving,
    /// It waits for admission.
    Waiting,
    /// Nodes are sought for it, or asked.
    Placing,
    /// It has no token yet.
    Prefilling,
    /// Tokens come.
    Decoding,
    /// It has ended.
    Ended(Ending),
}

impl Arrival {
    /// The trace as it is below the request's placement of that number.
    pub fn placement(&self, number: u32) -> TraceParent {
        TraceParent {
            span: span_below(self.root.span, u64::from(number)),
            ..self.root
        }
    }
}

/// The name of the `number`th span below another one. Made and not drawn, so that whoever knows a request's outermost span
/// knows all of them.
pub fn span_below(span: u64, number: u64) -> u64 {
    // The finaliser of SplitMix64: different numbers give different names, and names look random.
    let mut name = span.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    name = (name ^ (name >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    name = (name ^ (name >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    // 0 is no span.
    (name ^ (name >> 31)).max(1)
}

impl State {
    /// The name under which it is shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Arriving => "arriving",
            Self::Waiting => "waiting",
            Self::Placing => "placing",
            Self::Prefilling => "prefilling",
            Self::Decoding => "decoding",
            Self::Ended(ending) => ending.as_str(),
        }
    }
}

impl Timeline {
    /// The way of a request that arrived just now.
    pub fn new(arrival: Arrival) -> Self {
        Self {
            arrival,
            slo: Slo::default(),
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens_max: 0,
            output_tokens: 0,
            tokenised: None,
            admitted: None,
            placements: Vec::new(),
            first_token: None,
            last_token: None,
            ended: None,
            error: String::new(),
        }
    }

    /// Where it is.
    pub fn state(&self) -> State {
        if let Some((_, ending)) = self.ended {
            return State::Ended(ending);
        }
        match self.placements.last() {
            _ if self.tokenised.is_none() => State::Arriving,
            _ if self.admitted.is_none() => State::Waiting,
            Some(last) if last.ended.is_none() => last.state(),
            Some(_) | None => State::Placing,
        }
    }

    /// The last placement.
    pub fn placement(&mut self) -> Option<&mut PlacementTimes> {
        self.placements.last_mut()
    }

    /// The request was placed. The oldest placement goes once there are too many.
    pub fn placed(&mut self, placement: PlacementTimes) {
        if self.placements.len() == PLACEMENTS_KEPT {
            self.placements.remove(0);
        }
        self.placements.push(placement);
    }

    /// `count` tokens came.
    pub fn tokens(&mut self, count: u64, at: Millis) {
        if count == 0 {
            return;
        }
        self.output_tokens += count;
        self.first_token.get_or_insert(at);
        self.last_token = Some(at);
        if let Some(placement) = self.placement() {
            placement.first_token.get_or_insert(at);
        }
    }

    /// The last placement ended. What is said first holds.
    pub fn placement_ended(&mut self, at: Millis, ending: Ending) {
        if let Some(placement) = self.placement() {
            placement.ended.get_or_insert((at, ending));
        }
    }

    /// The request ended, with what the error said. What is said first holds.
    pub fn end(&mut self, at: Millis, ending: Ending, error: &str) {
        if self.ended.is_some() {
            return;
        }
        self.placement_ended(at, ending);
        self.ended = Some((at, ending));
        self.error = error.chars().take(ERROR_CHARS_MAX).collect();
    }

    /// From its arrival to its end, or to `now`.
    pub fn age(&self, now: Millis) -> Millis {
        self.ended.map_or(now, |(at, _)| at)
    }

    /// Mean gap between tokens; 0 with fewer than two.
    pub fn tbt_mean(&self) -> Millis {
        match (self.first_token, self.last_token) {
            (Some(first), Some(last)) if self.output_tokens > 1 => {
                Millis((last.0 - first.0) / (self.output_tokens - 1) as f64)
            }
            _ => Millis(0.0),
        }
    }

    /// Whether it met what it asks of latency; `None` where it asks nothing, or was turned away or left before there was an answer.
    pub fn met_slo(&self) -> Option<bool> {
        if self.slo.ttft.is_none() && self.slo.tbt.is_none() {
            return None;
        }
        let first = self.first_token?;
        let within = |limit: Option<Millis>, value: Millis| limit.is_none_or(|limit| value.0 <= limit.0);
        Some(within(self.slo.ttft, first) && within(self.slo.tbt, self.tbt_mean()))
    }
}

impl PlacementTimes {
    /// Where the placement is.
    pub fn state(&self) -> State {
        match (self.ended, self.accepted, self.first_token) {
            (Some((_, ending)), _, _) => State::Ended(ending),
            (None, None, _) => State::Placing,
            (None, Some(_), None) => State::Prefilling,
            (None, Some(_), Some(_)) => State::Decoding,
        }
    }

    /// From the call to the first token.
    pub fn ttft(&self) -> Option<Millis> {
        self.first_token.map(|first| Millis(first.0 - self.called.0))
    }
}

#[cfg(test)]
pub(crate) mod tests;
