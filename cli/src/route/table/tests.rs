use client::PlacementSource;
use proto::v1;

use super::*;
use crate::output::golden;
use crate::route::{explain_view, list_view};

fn candidate(prefill: &str, decode: &str, compute_ms: f64) -> PlacementCandidate {
    PlacementCandidate {
        prefill_node: prefill.into(),
        decode_node: decode.into(),
        new_tokens: 100,
        compute_ms,
        ttft_ms: compute_ms + 2.0,
        handoff_ms: 2.0,
        tbt_ms: 9.5,
        gap_charge_ms: 38.0,
        score_ms: compute_ms + 40.0,
        ..PlacementCandidate::default()
    }
}

fn decision() -> Decision {
    let chosen = PlacementCandidate {
        sources: vec![PlacementSource {
            node: "store-0".into(),
            blocks: 12,
        }],
        fetch_ms: 3.25,
        ..candidate("prefill-0", "decode-0", 51.0)
    };
    let local = PlacementCandidate {
        objection: "local_prefill_too_long".into(),
        interference_charge_ms: 7.5,
        ..candidate("", "decode-1", 151.0)
    };
    Decision {
        number: 7,
        request_id: "00000000000000000000000000000abc".into(),
        tenant: "acme".into(),
        prompt_tokens: 484,
        policy: "perigee".into(),
        candidates: vec![chosen, local],
        candidates_left_out: 3,
        excluded: vec![v1::ExcludedNode {
            node: "decode-2".into(),
            reason: "failed_before".into(),
        }],
        reason: "least score: 91.0 ms".into(),
        decision_ms: 0.25,
        outcome: Some(v1::PlacementOutcome {
            state: "finished".into(),
            ttft_ms: 60.0,
        }),
        ..Decision::default()
    }
}

#[test]
fn a_decision_reads_like_this() {
    golden::check("route-explain", &explain_view(&decision(), false));
}

#[test]
fn what_admission_would_say_is_told() {
    let line = |foreseen| {
        let decision = Decision {
            admission: Some(foreseen),
            ..decision()
        };
        let text = explanation(&decision, false);
        let found = text.lines().find_map(|line| line.strip_prefix("admission: "));
        found.expect("a line").to_owned()
    };
    let at_once = v1::ForeseenAdmission {
        ttft_ms: 55.25,
        ..v1::ForeseenAdmission::default()
    };
    assert_eq!(line(at_once.clone()), "at once, first token after 55.2 ms");
    let waits = v1::ForeseenAdmission {
        wait_ms: 12.0,
        ..at_once.clone()
    };
    assert_eq!(
        line(waits),
        "waits 12.0 ms for its place, first token after 55.2 ms"
    );
    let turned_away = v1::ForeseenAdmission {
        rejection: Some(v1::Failure {
            message: "512 requests wait already".into(),
            retry_after_ms: Some(1500),
            ..v1::Failure::default()
        }),
        ..at_once
    };
    assert_eq!(
        line(turned_away),
        "turned away, 512 requests wait already; retry after 1500 ms"
    );
}

#[test]
fn what_does_not_fit_a_screen_is_asked_for() {
    let mut decision = decision();
    let other = candidate("prefill-1", "decode-0", 60.0);
    decision.candidates.resize(30, other);
    let short = explanation(&decision, false);
    assert!(short.contains("18 more candidates: --all shows them"), "{short}");
    assert!(explanation(&decision, true).lines().count() > 30);
}

#[test]
fn a_list_has_a_line_per_decision() {
    let mut explained = decision();
    explained.request_id = String::new();
    explained.tenant = String::new();
    explained.outcome = None;
    golden::check("route-list", &list_view(&[decision(), explained]));
}
