//! A request's way as the spans of its trace. Callers pass times, and nothing here does I/O.

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, Status};
use types::Millis;

use crate::decisions::Ending;
use crate::timeline::{Arrival, Part, Timeline, parts, span_below};

/// Far more than a request has parts of: numbers of parts below and of placements never meet.
const PART_NUMBERS: u64 = 1_000;

/// Who a span's process is.
pub(super) fn resource(node: &str) -> Resource {
    Resource {
        attributes: vec![
            text("service.name", "perigee"),
            text("service.instance.id", node),
            text("service.version", env!("CARGO_PKG_VERSION")),
        ],
        ..Resource::default()
    }
}

/// The spans of a request that ended, each with where it was; empty is the router.
pub(super) fn of(timeline: &Timeline) -> Vec<(String, Span)> {
    let arrival = &timeline.arrival;
    let parts = parts(timeline, Millis(0.0));
    // The names of the spans that a part may be below, by depth.
    let mut above = vec![arrival.root.span];
    let mut placements = timeline.placements.iter();
    let mut spans = Vec::with_capacity(parts.len());
    for (number, part) in (PART_NUMBERS..).zip(parts) {
        let depth = part.depth as usize;
        above.truncate(depth.max(1));
        let parent = above[above.len() - 1];
        let (span_id, parent) = match (&*part.name, depth) {
            (_, 0) => (arrival.root.span, arrival.parent.map(|parent| parent.span)),
            // Nodes were told that they are below this one.
            ("placement", _) => {
                let number = placements.next().map_or(0, |placement| placement.number);
                (arrival.placement(number).span, Some(parent))
            }
            _ => (span_below(parent, number), Some(parent)),
        };
        if depth > 0 {
            above.push(span_id);
        }
        let outermost = (depth == 0).then_some(timeline);
        let span = span(&part, span_id, parent, arrival, outermost);
        // The placement is the router's, although it is about a node.
        let node = if part.name == "placement" {
            String::new()
        } else {
            part.node
        };
        spans.push((node, span));
    }
    spans
}

fn span(
    part: &Part,
    span_id: u64,
    parent: Option<u64>,
    arrival: &Arrival,
    outermost: Option<&Timeline>,
) -> Span {
    let nanos = |at: f64| arrival.arrived_unix_ms * 1_000_000 + (at * 1e6) as u64;
    let kind = match (&*part.name, outermost) {
        (_, Some(_)) => SpanKind::Server,
        ("call", None) => SpanKind::Client,
        _ => SpanKind::Internal,
    };
    let mut attributes = Vec::new();
    if part.bytes > 0 {
        attributes.push(int("perigee.bytes", part.bytes));
    }
    if !part.detail.is_empty() {
        attributes.push(text("perigee.detail", &part.detail));
    }
    if let Some(timeline) = outermost {
        attributes.extend(of_request(timeline));
    }
    Span {
        trace_id: arrival.root.trace.to_be_bytes().to_vec(),
        span_id: span_id.to_be_bytes().to_vec(),
        parent_span_id: parent.map_or_else(Vec::new, |parent| parent.to_be_bytes().to_vec()),
        name: part.name.to_string(),
        kind: kind.into(),
        start_time_unix_nano: nanos(part.start.0),
        end_time_unix_nano: nanos(part.start.0 + part.duration.0),
        attributes,
        status: outermost.and_then(status),
        ..Span::default()
    }
}

fn of_request(timeline: &Timeline) -> Vec<KeyValue> {
    let arrival = &timeline.arrival;
    let mut attributes = vec![
        text("perigee.request_id", &arrival.request.to_string()),
        text("perigee.tenant", &arrival.tenant),
        text("perigee.state", timeline.state().as_str()),
        int("perigee.placements", timeline.placements.len() as u64),
        // What the conventions for generative models name.
        int("gen_ai.usage.input_tokens", timeline.prompt_tokens),
        int("gen_ai.usage.output_tokens", timeline.output_tokens),
        int("perigee.cached_tokens", timeline.cached_tokens),
    ];
    if let Some(first) = timeline.first_token {
        attributes.push(double("perigee.ttft_ms", first.0));
    }
    attributes
}

/// What a client that leaves does is no error of the request.
fn status(timeline: &Timeline) -> Option<Status> {
    match timeline.ended? {
        (_, Ending::Failed(code)) => Some(Status {
            message: format!("{}: {}", code.as_str(), timeline.error),
            code: StatusCode::Error.into(),
        }),
        (_, Ending::Finished) => Some(Status {
            message: String::new(),
            code: StatusCode::Ok.into(),
        }),
        (_, Ending::Cancelled) => None,
    }
}

fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, Value::StringValue(value.to_owned()))
}

fn int(key: &str, value: u64) -> KeyValue {
    attribute(key, Value::IntValue(i64::try_from(value).unwrap_or(i64::MAX)))
}

fn double(key: &str, value: f64) -> KeyValue {
    attribute(key, Value::DoubleValue(value))
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use types::TraceParent;

    use super::*;
    use crate::timeline::tests::answered;

    #[test]
    fn a_request_is_one_tree_below_its_clients_span() {
        let mut timeline = answered();
        let parent = TraceParent {
            trace: 0xabc,
            span: 0xdef,
            sampled: true,
        };
        timeline.arrival.parent = Some(parent);
        timeline.arrival.root.trace = parent.trace;
        let spans = of(&timeline);
        let by_id: BTreeMap<&[u8], &str> = spans
            .iter()
            .map(|(_, span)| (span.span_id.as_slice(), span.name.as_str()))
            .collect();
        assert_eq!(by_id.len(), spans.len(), "every span has a name of its own");
        let tree: Vec<(&str, &str, &str)> = spans
            .iter()
            .map(|(node, span)| {
                let parent = by_id.get(span.parent_span_id.as_slice());
                (
                    span.name.as_str(),
                    node.as_str(),
                    parent.copied().unwrap_or("client"),
                )
            })
            .collect();
        assert_eq!(
            tree,
            [
                ("request", "", "client"),
                ("tokenise", "", "request"),
                ("admission", "", "request"),
                ("placement", "", "request"),
                ("place", "", "placement"),
                ("call", "decode-0", "placement"),
                ("queue", "prefill-0", "placement"),
                ("prefill", "prefill-0", "placement"),
                ("decode", "decode-0", "placement"),
            ]
        );
        assert_eq!(spans[0].1.parent_span_id, 0xdef_u64.to_be_bytes());
        let placement = timeline.arrival.placement(1).span;
        assert_eq!(spans[3].1.span_id, placement.to_be_bytes());
        let prefill = &spans[7].1;
        assert_eq!(
            prefill.end_time_unix_nano - prefill.start_time_unix_nano,
            20_000_000
        );
    }
}
