use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    running_max: 3,
    running_prompt_tokens_max: 100,
    waiting_max: 4,
    waiting_prompt_tokens_max: 150,
};

/// Nothing runs but one request at a time, so that the order is seen.
const ONE_BY_ONE: Limits = Limits {
    running_max: 1,
    running_prompt_tokens_max: 1_000_000,
    waiting_max: 100,
    waiting_prompt_tokens_max: 1_000_000,
};

fn arrival(ticket: u64, prompt_tokens: u64) -> Arrival<'static> {
    Arrival {
        ticket: Ticket(ticket),
        tenant: "",
        weight: NonZeroU32::MIN,
        priority: Priority::Normal,
        prompt_tokens,
    }
}

#[derive(Debug, Clone)]
enum Op {
    Arrive {
        prompt_tokens: u64,
        tenant: u8,
        weight: u32,
        priority: usize,
    },
    End {
        nth: usize,
    },
    MakeRoom {
        prompt_tokens: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let arrive = (1u64..160, 0u8..4, 1u32..5, 0usize..3);
    prop_oneof![
        3 => arrive.prop_map(|(prompt_tokens, tenant, weight, priority)| Op::Arrive {
            prompt_tokens,
            tenant,
            weight,
            priority,
        }),
        2 => any::<usize>().prop_map(|nth| Op::End { nth }),
        1 => (0u64..200).prop_map(|prompt_tokens| Op::MakeRoom { prompt_tokens }),
    ]
}

proptest! {
    #[test]
    fn a_request_is_in_one_place_until_it_ends(ops in prop::collection::vec(op(), 0..100)) {
        let mut now = Instant::now();
        let mut admission = Admission::new(LIMITS);
        let (mut next, mut running, mut waiting) = (0u64, BTreeSet::new(), BTreeSet::new());
        for op in ops {
            now += Duration::from_millis(1);
            let promoted = match op {
                Op::Arrive { prompt_tokens, tenant, weight, priority } => {
                    let ticket = Ticket(next);
                    next += 1;
                    let tenant = tenant.to_string();
                    let arrival = Arrival {
                        ticket,
                        tenant: &tenant,
                        weight: NonZeroU32::new(weight).expect("from 1"),
                        priority: Priority::ALL[priority],
                        prompt_tokens,
                    };
                    match admission.arrive(&arrival, now) {
                        Outcome::Run => { running.insert(ticket); }
                        Outcome::Wait(displaced) => {
                            waiting.insert(ticket);
                            for (ticket, rejection) in displaced {
                                prop_assert!(waiting.remove(&ticket));
                                prop_assert!(rejection.retry_after_ms() >= 100);
                            }
                        }
                        Outcome::Reject(rejection) => prop_assert!(rejection.retry_after_ms() >= 100),
                    }
                    Vec::new()
                }
                Op::End { nth } => {
                    let live: Vec<Ticket> = running.union(&waiting).copied().collect();
                    let Some(ticket) = nth.checked_rem(live.len()).map(|nth| live[nth]) else { continue };
                    running.remove(&ticket);
                    waiting.remove(&ticket);
                    admission.end(ticket, now)
                }
                Op::MakeRoom { prompt_tokens } => admission.make_room(Room { prompt_tokens }, now),
            };
            for ticket in promoted {
                prop_assert!(waiting.remove(&ticket));
                running.insert(ticket);
            }
            admission.check_integrity();
            prop_assert_eq!((admission.running(), admission.waiting()), (running.len(), waiting.len()));
        }
        // With room, nobody waits while a place is free.
        admission.make_room(Room::UNBOUNDED, now);
        admission.check_integrity();
        for ticket in (0..next).map(Ticket) {
            admission.end(ticket, now);
            admission.check_integrity();
        }
        prop_assert_eq!((admission.running(), admission.waiting()), (0, 0));
    }
}

/// The order in which requests are served that come while another one runs.
fn served(arrivals: &[Arrival<'_>]) -> Vec<u64> {
    let now = Instant::now();
    let mut admission = Admission::new(ONE_BY_ONE);
    let first = Ticket(u64::MAX);
    let runs = Arrival {
        ticket: first,
        ..arrival(0, 1)
    };
    assert_eq!(admission.arrive(&runs, now), Outcome::Run);
    for arrival in arrivals {
        assert_eq!(admission.arrive(arrival, now), Outcome::Wait(Vec::new()));
    }
    let mut order = Vec::new();
    let mut next = admission.end(first, now);
    while let Some(ticket) = next.pop() {
        order.push(ticket.0);
        next = admission.end(ticket, now);
    }
    order
}

#[test]
fn what_matters_more_is_served_first() {
    let with = |ticket, priority| Arrival {
        priority,
        ..arrival(ticket, 10)
    };
    let order = served(&[
        with(0, Priority::Low),
        with(1, Priority::Normal),
        with(2, Priority::High),
        with(3, Priority::Normal),
        with(4, Priority::High),
    ]);
    assert_eq!(order, [2, 4, 1, 3, 0]);
}

#[test]
fn tenants_are_served_by_their_weights() {
    let of = |ticket, tenant, weight| Arrival {
        tenant,
        weight: NonZeroU32::new(weight).expect("not 0"),
        ..arrival(ticket, 10)
    };
    // A tenant that came first with many is passed by one that comes later with few.
    let order = served(&[
        of(0, "greedy", 1),
        of(1, "greedy", 1),
        of(2, "greedy", 1),
        of(3, "greedy", 1),
        of(10, "modest", 1),
        of(11, "modest", 1),
    ]);
    assert_eq!(order, [0, 10, 1, 11, 2, 3]);
    // Three of the heavy one for each of the light one.
    let heavy = (0..9).map(|ticket| of(ticket, "heavy", 3));
    let light = (10..13).map(|ticket| of(ticket, "light", 1));
    let order = served(&heavy.chain(light).collect::<Vec<_>>());
    let early = order[..8].iter().filter(|ticket| **ticket < 10).count();
    assert_eq!(early, 6, "{order:?}");
}

#[test]
fn a_long_prompt_counts_for_more_than_a_short_one() {
    let of = |ticket, tenant, prompt_tokens| Arrival {
        tenant,
        ..arrival(ticket, prompt_tokens)
    };
    let order = served(&[
        of(0, "long", 1_000),
        of(1, "long", 1_000),
        of(10, "short", 10),
        of(11, "short", 10),
        of(12, "short", 10),
    ]);
    assert_eq!(order, [0, 10, 11, 12, 1]);
}

#[test]
fn a_full_queue_gives_a_place_to_whoever_is_served_before_another() {
    let now = Instant::now();
    let mut admission = Admission::new(Limits {
        waiting_max: 2,
        ..ONE_BY_ONE
    });
    let with = |ticket, priority| Arrival {
        priority,
        ..arrival(ticket, 10)
    };
    admission.arrive(&with(0, Priority::Low), now);
    assert_eq!(
        admission.arrive(&with(1, Priority::Low), now),
        Outcome::Wait(vec![])
    );
    assert_eq!(
        admission.arrive(&with(2, Priority::Normal), now),
        Outcome::Wait(vec![])
    );
    let Outcome::Wait(displaced) = admission.arrive(&with(3, Priority::High), now) else {
        panic!("there is somebody to give way");
    };
    assert_eq!(displaced[0].0, Ticket(1));
    assert_eq!(displaced[0].1.overload().constraint, types::Constraint::Queue);
    assert!(matches!(
        admission.arrive(&with(4, Priority::Low), now),
        Outcome::Reject(Rejection::QueueFull { waiting: 2, .. })
    ));
    // One that only fits at the cost of somebody before it costs nobody anything.
    let large = Arrival {
        priority: Priority::High,
        ..arrival(5, ONE_BY_ONE.waiting_prompt_tokens_max)
    };
    assert!(matches!(admission.arrive(&large, now), Outcome::Reject(_)));
    assert_eq!(admission.waiting(), 2);
    assert_eq!(admission.end(Ticket(0), now), [Ticket(3)]);
}

#[test]
fn requests_wait_while_nodes_have_no_room() {
    let now = Instant::now();
    let mut admission = Admission::new(ONE_BY_ONE);
    assert_eq!(admission.make_room(Room { prompt_tokens: 0 }, now), []);
    assert!(admission.lacks_room());
    assert_eq!(admission.arrive(&arrival(0, 10), now), Outcome::Wait(vec![]));
    assert!(admission.foresee(&arrival(1, 10)).expect("a place") > Millis(0.0));
    assert_eq!(
        admission.make_room(Room { prompt_tokens: 5 }, now),
        [Ticket(0)],
        "what exceeds the room runs, or it never would"
    );
    assert!(admission.lacks_room());
}

#[test]
fn room_is_used_up_by_those_who_run() {
    let now = Instant::now();
    let mut admission = Admission::new(Limits::default());
    admission.make_room(Room { prompt_tokens: 25 }, now);
    for ticket in 0..3 {
        assert_eq!(admission.arrive(&arrival(ticket, 10), now), Outcome::Run);
    }
    assert_eq!(admission.arrive(&arrival(3, 10), now), Outcome::Wait(vec![]));
}

#[test]
fn a_prompt_above_the_bound_runs_alone() {
    let now = Instant::now();
    let mut admission = Admission::new(LIMITS);
    assert_eq!(admission.arrive(&arrival(1, 120), now), Outcome::Run);
    assert!(admission.foresee(&arrival(2, 1)).expect("a place") > Millis(0.0));
    assert_eq!(admission.arrive(&arrival(2, 1), now), Outcome::Wait(vec![]));
    assert_eq!(admission.end(Ticket(1), now), [Ticket(2)]);
}

#[test]
fn a_late_comer_does_not_overtake() {
    let now = Instant::now();
    let mut admission = Admission::new(LIMITS);
    assert_eq!(admission.arrive(&arrival(1, 60), now), Outcome::Run);
    assert_eq!(admission.arrive(&arrival(2, 60), now), Outcome::Wait(vec![]));
    assert_eq!(admission.arrive(&arrival(3, 1), now), Outcome::Wait(vec![]));
    assert_eq!(admission.end(Ticket(2), now), [Ticket(3)]);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let now = Instant::now();
    let mut admission = Admission::new(LIMITS);
    for ticket in 0..7 {
        assert!(!matches!(
            admission.arrive(&arrival(ticket, 1), now),
            Outcome::Reject(_)
        ));
    }
    let Outcome::Reject(rejection) = admission.arrive(&arrival(7, 1), now) else {
        panic!("a queue of 4 took a fifth");
    };
    assert!(matches!(rejection, Rejection::QueueFull { waiting: 4, .. }));
    // Five turns of three places, a second each as long as nothing was measured.
    assert_eq!(rejection.retry_after_ms(), 1667);
}

#[test]
fn a_prediction_is_held_against_both_limits() {
    let judge = |waited_ms, ttft: Option<f64>, tbt: Option<f64>| {
        let forecast = Forecast {
            ttft: Millis(50.0),
            tbt: Some(Millis(20.0)),
        };
        let slo = Slo {
            ttft: ttft.map(Millis),
            tbt: tbt.map(Millis),
        };
        Admission::judge(forecast, Duration::from_millis(waited_ms), slo)
    };
    assert_eq!(judge(1_000, None, None), Ok(()));
    assert_eq!(judge(50, Some(100.0), Some(20.0)), Ok(()));
    let late = Rejection::FirstTokenTooLate {
        predicted: Millis(110.0),
        allowed: Millis(100.0),
    };
    assert_eq!(judge(60, Some(100.0), None), Err(late));
    assert_eq!(late.overload().constraint, types::Constraint::Ttft);
    let slow = Rejection::TokensTooSlow {
        gap: Millis(20.0),
        allowed: Millis(10.0),
        first_token: Millis(50.0),
    };
    assert_eq!(judge(0, Some(100.0), Some(10.0)), Err(slow));
    assert_eq!(slow.overload().ttft_predicted, Millis(50.0));
}
