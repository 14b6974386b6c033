use types::NodeId;

use super::super::tests::{candidate, explanation, subject};
use super::*;
use crate::cost::Prediction;
use crate::placement::{Explanation, Source};

fn of(policy: &'static str, candidates: Vec<Candidate>) -> String {
    let explanation = Explanation {
        policy,
        ..explanation(0, candidates)
    };
    reason(&Decision::whole(subject(), explanation))
}

#[test]
fn one_candidate_needs_no_other_reason() {
    let text = of("perigee", vec![candidate(None, "d0", 12.0)]);
    assert_eq!(text, "the only candidate: 12.0 ms");
}

#[test]
fn the_term_that_is_furthest_ahead_is_named() {
    let mut queued = candidate(Some("p1"), "d0", 50.0);
    queued.prediction = Prediction::of(Millis(40.0), Millis(0.0), Millis(0.0), Millis(50.0), Millis(0.0));
    queued.score = queued.prediction.total;
    let text = of("perigee", vec![candidate(Some("p0"), "d0", 50.0), queued]);
    assert_eq!(
        text,
        "least score: 50.0 ms, 40.0 ms less than p1 → d0 (queue 0.0 ms instead of 40.0 ms)"
    );
}

#[test]
fn a_prefix_that_is_fetched_is_told_from_one_that_is_held() {
    let mut computes = candidate(Some("p1"), "d0", 300.0);
    computes.new_tokens = 1_124;
    let holds = candidate(Some("p0"), "d0", 50.0);
    assert_eq!(
        of("perigee", vec![holds.clone(), computes.clone()]),
        "least score: 50.0 ms, 250.0 ms less than p1 → d0 (holds 1,024 more tokens of the prompt)"
    );
    let mut fetches = holds;
    fetches.sources = [Source {
        node: NodeId::from("s0"),
        blocks: 32,
    }]
    .into();
    fetches.prediction = Prediction::of(Millis(0.0), Millis(0.0), Millis(3.1), Millis(50.0), Millis(0.0));
    fetches.score = fetches.prediction.total;
    let text = of("perigee", vec![fetches, computes]);
    assert!(
        text.ends_with("(fetch 3.1 ms instead of computing 1,024 tokens)"),
        "{text}"
    );
}

#[test]
fn equals_are_called_equals() {
    let text = of(
        "perigee",
        vec![candidate(Some("p0"), "d0", 50.0), candidate(None, "d1", 50.4)],
    );
    assert!(text.contains("as good as d1 alone"), "{text}");
    assert!(
        text.ends_with("the hash of the prompt's first block decides"),
        "{text}"
    );
}

#[test]
fn what_speaks_against_the_choice_is_said() {
    let late = |prefill| Candidate {
        objection: Some(Objection::MissesTtft),
        ..candidate(Some(prefill), "d0", 50.0)
    };
    let text = of("perigee", vec![late("p0"), late("p1")]);
    assert!(
        text.ends_with("although it misses the limit on the time to first token, as nothing better is left"),
        "{text}"
    );
    let text = of("perigee", vec![candidate(Some("p0"), "d0", 90.0), late("p1")]);
    assert_eq!(
        text,
        "the only candidate with nothing against it: 90.0 ms; p1 → d0 misses the limit on the time to first token"
    );
}

#[test]
fn the_lesser_objection_is_the_reason_where_everything_has_one() {
    let bad = |prefill, objection| Candidate {
        objection: Some(objection),
        ..candidate(Some(prefill), "d0", 50.0)
    };
    let text = of(
        "perigee",
        vec![
            bad("p0", Objection::MissesTtft),
            bad("p1", Objection::ShortOfBlocks),
        ],
    );
    assert_eq!(
        text,
        "the candidate with the least against it: 50.0 ms; p1 → d0 is short of free blocks; \
         although it misses the limit on the time to first token, as nothing better is left"
    );
}

#[test]
fn every_policy_has_its_reason() {
    for name in crate::policy::PolicyName::ALL {
        let policy = name.build().name();
        let text = of(policy, vec![candidate(None, "d0", 12.0)]);
        assert!(!text.contains("the choice of the policy"), "{policy}: {text}");
    }
}
