//! A request's way as a list of its parts, each below the one that it is a part of: what the terminal, the page, `Server-Timing` and
//! traces show.

use std::borrow::Cow;
use std::fmt::Write;

use types::Millis;

use super::{PlacementTimes, Span, Timeline};

/// Entries of `Server-Timing`: some two placements.
const SERVER_TIMING_MAX: usize = 24;

/// A part of the way.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// `request`, `tokenise`, `admission`, `placement`, `place`, `call`, or the name of a node's span.
    pub name: Cow<'static, str>,
    /// Where; empty is the router.
    pub node: String,
    /// How deep below the request.
    pub depth: u32,
    /// From the request's arrival.
    pub start: Millis,
    /// Until now, if it has not ended.
    pub duration: Millis,
    /// Whether it goes on.
    pub running: bool,
    /// Bytes that moved in it.
    pub bytes: u64,
    /// What else is to be said of it.
    pub detail: String,
}

/// The parts of a request's way until `now`: the request itself, then what it consists of, in order.
pub fn parts(timeline: &Timeline, now: Millis) -> Vec<Part> {
    let end = timeline.age(now);
    let running = timeline.ended.is_none();
    let until = |done: Option<Millis>| (done.unwrap_or(end), running && done.is_none());
    let mut parts = vec![Part::new("request", 0, Millis(0.0), (end, running))];
    parts.push(Part::new("tokenise", 1, Millis(0.0), until(timeline.tokenised)));
    let Some(tokenised) = timeline.tokenised else {
        return parts;
    };
    parts.push(Part::new("admission", 1, tokenised, until(timeline.admitted)));
    for placement in &timeline.placements {
        of_placement(placement, timeline, end, &mut parts);
    }
    parts
}

fn of_placement(placement: &PlacementTimes, timeline: &Timeline, end: Millis, parts: &mut Vec<Part>) {
    let until = |done: Option<Millis>| {
        let ended = placement.ended.map(|(at, _)| at);
        let done = done.or(ended);
        (done.unwrap_or(end), done.is_none())
    };
    let decode = placement.decode.as_str();
    parts.push(Part {
        node: decode.to_owned(),
        detail: match &placement.prefill {
            Some(prefill) => format!("{prefill} → {decode}"),
            None => format!("{decode} alone"),
        },
        ..Part::new("placement", 1, placement.sought, until(None))
    });
    let called = placement.called;
    parts.push(Part::new("place", 2, placement.sought, (called, false)));
    let at_decode = |part: Part| Part {
        node: decode.to_owned(),
        ..part
    };
    parts.push(at_decode(Part::new("call", 2, called, until(placement.accepted))));
    let mut spans: Vec<Part> = placement
        .told
        .spans
        .iter()
        .map(|span| told(span, called))
        .collect();
    spans.sort_by(|a, b| a.start.0.total_cmp(&b.start.0));
    parts.append(&mut spans);
    // What nodes have not told yet.
    match (placement.accepted, placement.first_token) {
        (Some(accepted), None) if placement.told.spans.is_empty() => {
            parts.push(at_decode(Part::new("prefill", 2, accepted, until(None))));
        }
        (Some(_), Some(first)) if !is_told(placement, proto::span::DECODE) => {
            let last = timeline.last_token.filter(|_| placement.ended.is_some());
            parts.push(at_decode(Part::new(proto::span::DECODE, 2, first, until(last))));
        }
        _ => {}
    }
}

fn is_told(placement: &PlacementTimes, name: &str) -> bool {
    placement.told.spans.iter().any(|span| span.name == name)
}

fn told(span: &Span, called: Millis) -> Part {
    Part {
        name: Cow::Owned(span.name.clone()),
        node: span.node.clone(),
        depth: 2,
        start: Millis(called.0 + span.start.0),
        duration: span.duration,
        running: false,
        bytes: span.bytes,
        detail: span.detail.clone(),
    }
}

impl Part {
    fn new(name: &'static str, depth: u32, start: Millis, (end, running): (Millis, bool)) -> Self {
        Self {
            name: Cow::Borrowed(name),
            node: String::new(),
            depth,
            start,
            duration: Millis((end.0 - start.0).max(0.0)),
            running,
            bytes: 0,
            detail: String::new(),
        }
    }
}

/// The value of the header `Server-Timing`: every part but those that have others, in milliseconds.
pub fn server_timing(parts: &[Part]) -> String {
    let mut text = String::new();
    let shown = parts
        .iter()
        .filter(|part| part.name != "request" && part.name != "placement");
    for part in shown.take(SERVER_TIMING_MAX) {
        if !is_token(&part.name) {
            continue;
        }
        let comma = if text.is_empty() { "" } else { ", " };
        write!(text, "{comma}{};dur={:.2}", part.name, part.duration.0).expect("a string takes everything");
        if is_token(&part.node) {
            write!(text, ";desc={}", part.node).expect("a string takes everything");
        }
    }
    text
}

/// What HTTP allows in a header without quotes.
fn is_token(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !text.is_empty() && text.bytes().all(allowed)
}
