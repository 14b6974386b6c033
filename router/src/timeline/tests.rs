use types::ErrorCode;

use super::*;

pub(crate) fn arrival(id: u128) -> Arrival {
    Arrival {
        request: RequestId(id),
        arrived_unix_ms: 1_700_000_000_000,
        tenant: String::new(),
        priority: Priority::Normal,
        parent: None,
        root: TraceParent {
            trace: id,
            span: 1,
            sampled: false,
        },
    }
}

fn placement(number: u32, sought: f64, called: f64) -> PlacementTimes {
    PlacementTimes {
        number,
        prefill: Some("prefill-0".into()),
        decode: "decode-0".into(),
        sought: Millis(sought),
        called: Millis(called),
        accepted: None,
        first_token: None,
        ended: None,
        ttft_predicted: Millis(30.0),
        told: Told::default(),
    }
}

fn span(name: &str, node: &str, start: f64, duration: f64) -> Span {
    Span {
        name: name.into(),
        node: node.into(),
        start: Millis(start),
        duration: Millis(duration),
        bytes: 0,
        detail: String::new(),
    }
}

/// As a request goes its way without failures.
pub(crate) fn answered() -> Timeline {
    let mut timeline = Timeline::new(arrival(7));
    timeline.tokenised = Some(Millis(1.0));
    timeline.admitted = Some(Millis(3.0));
    timeline.placed(placement(1, 3.0, 4.0));
    let placement = timeline.placement().expect("placed");
    placement.accepted = Some(Millis(5.0));
    placement.told.spans = vec![
        span("queue", "prefill-0", 0.5, 2.0),
        span("prefill", "prefill-0", 2.5, 20.0),
        span("decode", "decode-0", 25.0, 40.0),
    ];
    timeline.tokens(1, Millis(29.0));
    timeline.tokens(2, Millis(49.0));
    timeline.tokens(1, Millis(69.0));
    timeline.end(Millis(70.0), Ending::Finished, "");
    timeline
}

#[test]
fn a_request_goes_through_its_states() {
    let mut timeline = Timeline::new(arrival(1));
    assert_eq!(timeline.state(), State::Arriving);
    timeline.tokenised = Some(Millis(1.0));
    assert_eq!(timeline.state(), State::Waiting);
    timeline.admitted = Some(Millis(1.0));
    assert_eq!(timeline.state(), State::Placing);
    timeline.placed(placement(1, 1.0, 2.0));
    assert_eq!(timeline.state(), State::Placing);
    timeline.placement().expect("placed").accepted = Some(Millis(3.0));
    assert_eq!(timeline.state(), State::Prefilling);
    timeline.tokens(1, Millis(9.0));
    assert_eq!(timeline.state(), State::Decoding);
    timeline.placement_ended(Millis(10.0), Ending::Failed(ErrorCode::Unavailable));
    assert_eq!(timeline.state(), State::Placing);
    timeline.placed(placement(2, 10.0, 11.0));
    timeline.end(Millis(12.0), Ending::Cancelled, "");
    timeline.end(Millis(13.0), Ending::Finished, "");
    assert_eq!(timeline.state(), State::Ended(Ending::Cancelled));
    assert_eq!(timeline.placements[0].state().as_str(), "unavailable");
    assert_eq!(timeline.placements[1].state().as_str(), "cancelled");
}

#[test]
fn gaps_are_the_mean_between_tokens_and_held_against_the_limits() {
    let mut timeline = answered();
    assert!((timeline.tbt_mean().0 - 40.0 / 3.0).abs() < 1e-9);
    assert_eq!(timeline.met_slo(), None);
    timeline.slo.tbt = Some(Millis(14.0));
    assert_eq!(timeline.met_slo(), Some(true));
    timeline.slo.ttft = Some(Millis(28.0));
    assert_eq!(timeline.met_slo(), Some(false));
}

#[test]
fn parts_follow_each_other_and_those_of_nodes_count_from_the_call() {
    let timeline = answered();
    let parts = parts(&timeline, Millis(1e6));
    let shown: Vec<(&str, &str, u32, f64, f64)> = parts
        .iter()
        .map(|part| {
            (
                &*part.name,
                part.node.as_str(),
                part.depth,
                part.start.0,
                part.duration.0,
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("request", "", 0, 0.0, 70.0),
            ("tokenise", "", 1, 0.0, 1.0),
            ("admission", "", 1, 1.0, 2.0),
            ("placement", "decode-0", 1, 3.0, 67.0),
            ("place", "", 2, 3.0, 1.0),
            ("call", "decode-0", 2, 4.0, 1.0),
            ("queue", "prefill-0", 2, 4.5, 2.0),
            ("prefill", "prefill-0", 2, 6.5, 20.0),
            ("decode", "decode-0", 2, 29.0, 40.0),
        ]
    );
    assert!(parts.iter().all(|part| !part.running));
    assert_eq!(
        server_timing(&parts),
        "tokenise;dur=1.00, admission;dur=2.00, place;dur=1.00, call;dur=1.00;desc=decode-0, \
         queue;dur=2.00;desc=prefill-0, prefill;dur=20.00;desc=prefill-0, decode;dur=40.00;desc=decode-0"
    );
}

#[test]
fn what_runs_lasts_until_now() {
    let mut timeline = Timeline::new(arrival(1));
    assert_eq!(parts(&timeline, Millis(4.0))[1].duration, Millis(4.0));
    timeline.tokenised = Some(Millis(1.0));
    timeline.admitted = Some(Millis(1.0));
    timeline.placed(placement(1, 1.0, 2.0));
    timeline.placement().expect("placed").accepted = Some(Millis(3.0));
    let last = parts(&timeline, Millis(10.0)).pop().expect("parts");
    assert_eq!(
        (&*last.name, last.duration, last.running),
        ("prefill", Millis(7.0), true)
    );
    timeline.tokens(1, Millis(20.0));
    let last = parts(&timeline, Millis(50.0)).pop().expect("parts");
    assert_eq!(
        (&*last.name, last.duration, last.running),
        ("decode", Millis(30.0), true)
    );
}

#[test]
fn a_request_that_many_nodes_fail_keeps_its_last_placements() {
    let mut timeline = Timeline::new(arrival(1));
    for number in 1..=20 {
        timeline.placed(placement(number, 1.0, 2.0));
    }
    assert_eq!(timeline.placements.len(), PLACEMENTS_KEPT);
    assert_eq!(timeline.placements[PLACEMENTS_KEPT - 1].number, 20);
}
