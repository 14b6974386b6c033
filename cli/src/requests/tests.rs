use client::{PlacementTimeline, RequestTimeline, TimelineSpan};

use super::*;
use crate::output::golden;

fn span(name: &str, node: &str, depth: u32, start_ms: f64, duration_ms: f64) -> TimelineSpan {
    TimelineSpan {
        name: name.into(),
        node: node.into(),
        depth,
        start_ms,
        duration_ms,
        ..TimelineSpan::default()
    }
}

fn request() -> RequestTimeline {
    RequestTimeline {
        request_id: format!("{:032x}", 7),
        state: "finished".into(),
        age_ms: 80.0,
        prompt_tokens: 300,
        cached_tokens: 64,
        output_tokens: 4,
        output_tokens_max: 16,
        ttft_ms: 40.0,
        tbt_mean_ms: 12.5,
        ttft_slo_ms: 500.0,
        priority: "normal".into(),
        arrived_unix_ms: 1_700_000_000_000,
        trace_id: format!("{:032x}", 9),
        placements: vec![PlacementTimeline {
            prefill_node: "prefill-0".into(),
            decode_node: "decode-1".into(),
            state: "finished".into(),
            ttft_predicted_ms: 35.0,
            ttft_ms: 38.0,
            handoff_bytes: 3 << 20,
            handoff_hidden_ms: 4.0,
            handoff_exposed_ms: 0.5,
            transport: "tcp".into(),
            ..PlacementTimeline::default()
        }],
        spans: vec![
            span("request", "", 0, 0.0, 80.0),
            span("tokenise", "", 1, 0.0, 0.5),
            span("placement", "decode-1", 1, 2.0, 78.0),
            span("prefill", "prefill-0", 2, 10.0, 30.0),
            TimelineSpan {
                bytes: 3 << 20,
                detail: "tcp".into(),
                ..span("handoff", "prefill-0", 2, 20.0, 20.0)
            },
            TimelineSpan {
                running: true,
                ..span("decode", "decode-1", 2, 40.0, 40.0)
            },
        ],
        ..RequestTimeline::default()
    }
}

#[test]
fn requests_are_listed_with_their_state_and_nodes() {
    let waiting = RequestTimeline {
        request_id: format!("{:032x}", 8),
        state: "waiting".into(),
        age_ms: 3100.0,
        tenant: "acme".into(),
        output_tokens_max: 8,
        ..RequestTimeline::default()
    };
    golden::check("request-list", &list_view(&[waiting, request()]));
}

#[test]
fn a_request_is_shown_with_its_placements() {
    let text = |request: &RequestTimeline| output::table_text(&of_request(request));
    golden::check("request-show", &show_view(&[request()], text));
    let mut renamed = request();
    renamed.state = "unavailable".into();
    renamed.error = "the decode node was lost".into();
    let both = show_view(&[request(), renamed], text);
    assert_eq!(both.documents().len(), 2, "clients may name requests alike");
}

#[test]
fn a_waterfall_shows_where_each_part_lies() {
    let expected = "
request 00000000000000000000000000000007 finished after 80 ms: 300 + 4 tokens (64 cached), first token 40 ms of at most 500 ms, then 12 ms
request                    80 ms   ████████████████████
  tokenise               0.50 ms   ▏
  placement  decode-1      78 ms   ████████████████████
    prefill  prefill-0     30 ms     ████████
    handoff  prefill-0     20 ms        █████           3.0 MiB, tcp
    decode   decode-1      40 ms …           ██████████
";
    assert_eq!(format!("\n{}", waterfall::text(&request(), 20)), expected);
    golden::check(
        "request-trace",
        &show_view(&[request()], |request| waterfall::text(request, 20)),
    );
}

#[test]
fn the_json_of_a_request_has_its_parts_and_that_of_a_list_has_none() {
    let whole = to_json(&request(), true);
    assert_eq!(whole["spans"][3]["name"], "prefill");
    assert_eq!(whole["spans"][3]["start_ms"], 10.0);
    assert_eq!(whole["placements"][0]["prefill_node"], "prefill-0");
    assert_eq!(whole["tbt_slo_ms"], Value::Null);
    assert!(to_json(&request(), false).get("spans").is_none());
}

#[test]
fn a_request_that_was_cancelled_is_told() {
    let id = read_id(&request().request_id).expect("an id");
    golden::check("request-cancel", &cancelled(id, 1));
}

#[test]
fn a_request_that_failed_looks_other_than_one_that_goes_on() {
    for (state, tone) in [
        ("finished", Tone::Good),
        ("cancelled", Tone::Warning),
        ("overloaded", Tone::Warning),
        ("unavailable", Tone::Bad),
    ] {
        assert_eq!(painted(state), paint(tone, state));
    }
    assert_eq!(painted("decoding"), "decoding");
}
