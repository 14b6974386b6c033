use proptest::prelude::*;

use super::*;
use crate::cost::Prediction;
use crate::placement::Objection;

/// A candidate with a score, computed in that time.
pub(super) fn candidate(prefill: Option<&str>, decode: &str, compute_ms: f64) -> Candidate {
    let none = Millis(0.0);
    Candidate {
        prefill: prefill.map(NodeId::from),
        decode: decode.into(),
        sources: Arc::default(),
        new_tokens: 100,
        decode_blocks: 4,
        prediction: Prediction::of(none, none, none, Millis(compute_ms), none),
        tbt: Millis(10.0),
        interference_charge: none,
        gap_charge: none,
        score: Millis(compute_ms),
        objection: None,
    }
}

pub(super) fn subject() -> Subject {
    Subject {
        request: None,
        made_unix_ms: 1_000,
        tenant: String::new(),
        prompt_tokens: 100,
        tie: Millis(1.0),
        took: Millis(0.1),
    }
}

pub(super) fn explanation(chosen: usize, candidates: Vec<Candidate>) -> Explanation {
    Explanation {
        policy: "perigee",
        chosen,
        candidates,
        excluded: Vec::new(),
    }
}

#[test]
fn the_choice_comes_first_and_the_others_by_what_speaks_against_them() {
    let barred = Candidate {
        objection: Some(Objection::LocalPrefillTooLong),
        ..candidate(None, "d0", 1.0)
    };
    let late = Candidate {
        objection: Some(Objection::MissesTtft),
        ..candidate(Some("p0"), "d0", 2.0)
    };
    let slow = candidate(Some("p1"), "d0", 9.0);
    let chosen = candidate(Some("p2"), "d0", 9.5);
    let quick = candidate(Some("p3"), "d0", 3.0);
    let all = vec![barred, late, slow, chosen, quick];
    let decision = Decision::whole(subject(), explanation(3, all));
    let names: Vec<&str> = decision
        .candidates
        .iter()
        .map(|candidate| candidate.prefill.as_ref().map_or("local", NodeId::as_str))
        .collect();
    assert_eq!(names, ["p2", "p3", "p1", "p0", "local"]);
    assert_eq!(decision.candidates_left_out, 0);
}

#[test]
fn what_is_kept_are_the_choice_and_the_best_of_the_others() {
    let of = |number: usize| candidate(Some("p"), &format!("d{number:03}"), number as f64);
    let all: Vec<_> = (0..200).rev().map(of).collect();
    // Of the scores from 199 to 0, the choice is one that nobody would keep for itself.
    let decision = Decision::trimmed(subject(), explanation(10, all));
    assert_eq!(decision.candidates.len(), CANDIDATES_KEPT);
    assert_eq!(decision.candidates_left_out, 200 - CANDIDATES_KEPT);
    let scores: Vec<f64> = decision.candidates.iter().map(|one| one.score.0).collect();
    assert!((scores[0] - 189.0).abs() < 1e-9);
    let best: Vec<f64> = (0..CANDIDATES_KEPT - 1).map(|score| score as f64).collect();
    assert_eq!(scores[1..], best);
}

proptest! {
    #[test]
    fn a_ring_keeps_the_newest_and_knows_them_by_number(
        kept_max in 0usize..6,
        events in prop::collection::vec((0u64..12, 0u8..3), 0..60),
    ) {
        let decision = Arc::new(Decision::whole(subject(), explanation(0, vec![candidate(None, "d0", 1.0)])));
        let mut ring = Ring::new(kept_max);
        let mut model: Vec<(u64, Outcome)> = Vec::new();
        let mut pushed = 0;
        for (number, event) in events {
            let known = model.iter_mut().find(|(known, _)| *known == number);
            match event {
                0 => {
                    pushed += 1;
                    prop_assert_eq!(ring.push(Arc::clone(&decision)).number, pushed);
                    model.push((pushed, Outcome::default()));
                    let excess = model.len().saturating_sub(kept_max);
                    model.drain(..excess);
                }
                1 => {
                    ring.first_token(number, Millis(number as f64));
                    if let Some((_, outcome)) = known {
                        outcome.ttft = Some(Millis(number as f64));
                    }
                }
                _ => {
                    ring.ended(number, Ending::Finished);
                    ring.ended(number, Ending::Cancelled);
                    if let Some((_, outcome)) = known {
                        outcome.ending = Some(Ending::Finished);
                    }
                }
            }
            let newest: Vec<_> = ring.newest(None, usize::MAX).into_iter().map(|kept| (kept.number, kept.outcome)).collect();
            let expected: Vec<_> = model.iter().rev().copied().collect();
            prop_assert_eq!(newest, expected);
        }
        prop_assert_eq!(ring.newest(None, 2).len(), model.len().min(2));
        prop_assert!(ring.newest(Some(RequestId(7)), 9).is_empty());
    }
}
