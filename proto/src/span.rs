//! Parts of a request's way, as nodes report them.

use std::time::Duration;

use crate::v1;

/// Waiting for the engine.
pub const QUEUE: &str = "queue";
/// Pulling the cached prefix from peers and lower tiers.
pub const FETCH: &str = "fetch";
/// Computing the prompt.
pub const PREFILL: &str = "prefill";
/// KV on its way to the decode node.
pub const HANDOFF: &str = "handoff";
/// Closing the fence and comparing checksums.
pub const VERIFY: &str = "verify";
/// From the first token to the last one.
pub const DECODE: &str = "decode";

/// Most spans of one report that a reader keeps: a request has some ten of them.
pub const SPANS_MAX: usize = 32;

/// A span that moves nothing.
pub fn span(name: &str, node: &str, start: Duration, duration: Duration) -> v1::Span {
    v1::Span {
        name: name.to_owned(),
        node: node.to_owned(),
        start_ms: start.as_secs_f64() * 1e3,
        duration_ms: duration.as_secs_f64() * 1e3,
        ..v1::Span::default()
    }
}

/// Spans of another node as they are from here, where it began `by` after the reader did. No more than [`SPANS_MAX`].
pub fn shifted(spans: &[v1::Span], by: Duration) -> impl Iterator<Item = v1::Span> {
    let by_ms = by.as_secs_f64() * 1e3;
    let spans = spans.iter().take(SPANS_MAX).cloned();
    spans.map(move |span| v1::Span {
        start_ms: span.start_ms + by_ms,
        ..span
    })
}
