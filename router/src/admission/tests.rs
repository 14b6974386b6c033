use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    running_max: 3,
    running_prompt_tokens_max: 100,
    waiting_max: 4,
    waiting_prompt_tokens_max: 150,
};

#[derive(Debug, Clone)]
enum Op {
    Arrive { prompt_tokens: u64 },
    End { nth: usize },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (1u64..160).prop_map(|prompt_tokens| Op::Arrive { prompt_tokens }),
        2 => any::<usize>().prop_map(|nth| Op::End { nth }),
    ]
}

proptest! {
    #[test]
    fn places_are_given_in_order_and_never_lost(ops in prop::collection::vec(op(), 0..100)) {
        let mut now = Instant::now();
        let mut admission = Admission::new(LIMITS);
        let (mut next, mut live, mut waiting) = (0u64, Vec::new(), VecDeque::new());
        for op in ops {
            now += Duration::from_millis(1);
            match op {
                Op::Arrive { prompt_tokens } => {
                    let ticket = Ticket(next);
                    next += 1;
                    match admission.arrive(ticket, prompt_tokens, now) {
                        Outcome::Run => live.push(ticket),
                        Outcome::Wait => {
                            live.push(ticket);
                            waiting.push_back(ticket);
                        }
                        Outcome::Reject(rejection) => prop_assert!(rejection.retry_after_ms() >= 100),
                    }
                }
                Op::End { nth } if !live.is_empty() => {
                    let ticket = live.swap_remove(nth % live.len());
                    waiting.retain(|other| *other != ticket);
                    for promoted in admission.end(ticket, now) {
                        prop_assert_eq!(waiting.pop_front(), Some(promoted));
                    }
                }
                Op::End { .. } => {}
            }
            admission.check_integrity();
            prop_assert_eq!(admission.running() + admission.waiting(), live.len());
        }
        for ticket in live {
            admission.end(ticket, now);
            admission.check_integrity();
        }
        prop_assert_eq!((admission.running(), admission.waiting()), (0, 0));
    }
}

#[test]
fn a_prompt_above_the_bound_runs_alone() {
    let now = Instant::now();
    let mut admission = Admission::new(LIMITS);
    assert_eq!(admission.arrive(Ticket(1), 120, now), Outcome::Run);
    assert_eq!(admission.arrive(Ticket(2), 1, now), Outcome::Wait);
    assert_eq!(admission.end(Ticket(1), now), vec![Ticket(2)]);
}

#[test]
fn a_late_comer_does_not_overtake() {
    let now = Instant::now();
    let mut admission = Admission::new(LIMITS);
    assert_eq!(admission.arrive(Ticket(1), 60, now), Outcome::Run);
    assert_eq!(admission.arrive(Ticket(2), 60, now), Outcome::Wait);
    assert_eq!(admission.arrive(Ticket(3), 1, now), Outcome::Wait);
    assert_eq!(admission.end(Ticket(2), now), vec![Ticket(3)]);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let now = Instant::now();
    let mut admission = Admission::new(LIMITS);
    for ticket in 0..7 {
        assert!(!matches!(
            admission.arrive(Ticket(ticket), 1, now),
            Outcome::Reject(_)
        ));
    }
    let Outcome::Reject(rejection) = admission.arrive(Ticket(7), 1, now) else {
        panic!("a queue of 4 took a fifth");
    };
    assert!(matches!(rejection, Rejection::QueueFull { waiting: 4, .. }));
    // Five turns of three places, a second each as long as nothing was measured.
    assert_eq!(rejection.retry_after_ms(), 1667);
}

#[test]
fn time_already_waited_counts_against_the_limit() {
    let admission = Admission::new(LIMITS);
    let judge = |waited_ms, slo| admission.judge(Millis(50.0), Duration::from_millis(waited_ms), slo);
    assert_eq!(judge(1_000, None), Ok(()));
    assert_eq!(judge(50, Some(Millis(100.0))), Ok(()));
    assert_eq!(
        judge(60, Some(Millis(100.0))),
        Err(Rejection::TooSlow {
            predicted_ms: 110,
            allowed_ms: 100,
            retry_after_ms: 100
        })
    );
}
