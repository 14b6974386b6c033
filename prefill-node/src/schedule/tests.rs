use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const BLOCK: usize = 8;

fn limits() -> Limits {
    Limits {
        requests_max: 5,
        tokens_max: 200,
        step_tokens: 24,
        step_sequences_max: 3,
        block_tokens: BLOCK,
    }
}

#[derive(Debug, Clone)]
enum Op {
    Admit {
        length: usize,
    },
    /// Share of the prompt that is cached, in blocks modulo what it has.
    Ready {
        pick: usize,
        cached_blocks: usize,
    },
    Remove {
        pick: usize,
    },
    Step,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (1usize..120).prop_map(|length| Op::Admit { length }),
        3 => (any::<usize>(), any::<usize>()).prop_map(|(pick, cached_blocks)| Op::Ready { pick, cached_blocks }),
        1 => any::<usize>().prop_map(|pick| Op::Remove { pick }),
        4 => Just(Op::Step),
    ]
}

/// What the test knows of one prompt.
struct Prompt {
    length: usize,
    /// Next position that must be dealt out; `None` before it is ready.
    next: Option<usize>,
}

/// Checks a step against the model and advances the model.
fn check_step(schedule: &mut Schedule, model: &mut BTreeMap<Ticket, Prompt>, limits: &Limits) -> usize {
    let oldest = model
        .iter()
        .find(|(_, prompt)| prompt.next.is_some_and(|next| next < prompt.length))
        .map(|(ticket, _)| *ticket);
    let step = schedule.next_step();
    assert_eq!(
        step.first().map(|chunk| chunk.ticket),
        oldest,
        "the oldest ready prompt goes first"
    );
    assert!(step.iter().map(|chunk| chunk.tokens.len()).sum::<usize>() <= limits.step_tokens);
    assert!(step.len() <= limits.step_sequences_max);
    assert!(
        step.is_sorted_by(|a, b| a.ticket < b.ticket),
        "once each, in order of arrival"
    );
    for chunk in &step {
        let prompt = model
            .get_mut(&chunk.ticket)
            .expect("only prompts that are in the queue");
        assert_eq!(
            Some(chunk.tokens.start),
            prompt.next,
            "positions come once and in order"
        );
        assert!(!chunk.tokens.is_empty());
        assert_eq!(chunk.last, chunk.tokens.end == prompt.length);
        assert!(
            chunk.last || chunk.tokens.end % BLOCK == 0,
            "chunks end with a block or the prompt"
        );
        prompt.next = Some(chunk.tokens.end);
    }
    step.len()
}

proptest! {
    #[test]
    fn every_position_is_dealt_once_in_order_within_the_bounds(ops in prop::collection::vec(op(), 1..120)) {
        let limits = limits();
        let mut schedule = Schedule::new(limits);
        let mut model: BTreeMap<Ticket, Prompt> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Admit { length } => {
                    let ahead = model.len();
                    match schedule.admit(length) {
                        Ok(place) => {
                            prop_assert_eq!(place.requests_ahead, ahead);
                            model.insert(place.ticket, Prompt { length, next: None });
                        }
                        Err(Full::Requests { .. }) => prop_assert_eq!(ahead, limits.requests_max),
                        Err(Full::Tokens { queued, wanted, limit }) => {
                            prop_assert!(ahead > 0 && queued + wanted > limit);
                        }
                    }
                }
                Op::Ready { pick, cached_blocks } => {
                    let mut waiting: Vec<_> = model.iter_mut().filter(|(_, prompt)| prompt.next.is_none()).collect();
                    if waiting.is_empty() {
                        continue;
                    }
                    let index = pick % waiting.len();
                    let (ticket, prompt) = &mut waiting[index];
                    let cached = cached_blocks % (prompt.length / BLOCK + 1) * BLOCK;
                    let start = cached.min(prompt.length - 1);
                    prompt.next = Some(start);
                    schedule.ready(**ticket, start);
                }
                Op::Remove { pick } => {
                    if let Some(ticket) = model.keys().nth(pick % model.len().max(1)).copied() {
                        model.remove(&ticket);
                        schedule.remove(ticket);
                    }
                }
                Op::Step => {
                    check_step(&mut schedule, &mut model, &limits);
                }
            }
            schedule.check_integrity();
        }
        // What is ready ends within a bounded number of steps: each one advances the oldest by a block.
        let steps_max = 1 + model.values().map(|prompt| prompt.length.div_ceil(BLOCK)).sum::<usize>();
        for _ in 0..steps_max {
            if check_step(&mut schedule, &mut model, &limits) == 0 {
                break;
            }
        }
        for prompt in model.values() {
            prop_assert!(prompt.next.is_none_or(|next| next == prompt.length), "all of it was dealt out");
        }
    }

    #[test]
    fn any_budget_makes_progress(step_tokens in 0usize..40, length in 1usize..100) {
        let mut schedule = Schedule::new(Limits { step_tokens, ..limits() });
        let ticket = schedule.admit(length).expect("an empty queue takes it").ticket;
        schedule.ready(ticket, 0);
        let mut dealt = 0;
        for _ in 0..length.div_ceil(BLOCK) {
            dealt += schedule.next_step().iter().map(|chunk| chunk.tokens.len()).sum::<usize>();
        }
        prop_assert_eq!(dealt, length);
    }
}

#[test]
fn a_step_is_filled_by_several_prompts() {
    let mut schedule = Schedule::new(limits());
    let tickets: Vec<_> = [20, 10, 3]
        .map(|length| schedule.admit(length).expect("room").ticket)
        .to_vec();
    for ticket in &tickets {
        schedule.ready(*ticket, 0);
    }
    let chunk = |ticket: usize, tokens: Range<usize>, last| Chunk {
        ticket: tickets[ticket],
        tokens,
        last,
    };
    // The first has half of 24 tokens, and those that need less end beside it. The 3 that are left hold no block of it.
    assert_eq!(
        schedule.next_step(),
        [chunk(0, 0..8, false), chunk(1, 0..10, true), chunk(2, 0..3, true)]
    );
    assert_eq!(schedule.next_step(), [chunk(0, 8..20, true)]);
    assert_eq!(schedule.next_step(), []);
}

#[test]
fn a_wholly_cached_prompt_recomputes_its_last_token() {
    let mut schedule = Schedule::new(limits());
    let ticket = schedule.admit(16).expect("room").ticket;
    schedule.ready(ticket, 15);
    assert_eq!(schedule.queued_tokens(), 1);
    assert_eq!(schedule.next_step()[0].tokens, 15..16);
}

#[test]
fn a_prompt_that_is_not_ready_is_overtaken_and_not_forgotten() {
    let mut schedule = Schedule::new(limits());
    let first = schedule.admit(8).expect("room").ticket;
    let second = schedule.admit(8).expect("room").ticket;
    schedule.ready(second, 0);
    assert_eq!(schedule.next_step()[0].ticket, second);
    schedule.ready(first, 0);
    assert_eq!(schedule.next_step()[0].ticket, first);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let mut schedule = Schedule::new(Limits {
        requests_max: 1,
        ..limits()
    });
    schedule.admit(1).expect("room");
    let error = schedule.admit(1).expect_err("full").into_error(70);
    assert_eq!(
        (error.code, error.retry_after_ms),
        (ErrorCode::Overloaded, Some(70))
    );
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one_which_takes_at_most_twice_as_long() {
    let limits = Limits {
        requests_max: 1000,
        tokens_max: 100_000,
        step_tokens: 64,
        step_sequences_max: 8,
        block_tokens: BLOCK,
    };
    let mut schedule = Schedule::new(limits);
    let admit = |schedule: &mut Schedule, length| {
        let ticket = schedule.admit(length).expect("room").ticket;
        schedule.ready(ticket, 0);
        ticket
    };
    let long = admit(&mut schedule, 1600);
    let mut steps = 0;
    loop {
        let short = admit(&mut schedule, 30);
        let step = schedule.next_step();
        steps += 1;
        let of = |ticket| step.iter().find(|chunk: &&Chunk| chunk.ticket == ticket);
        assert!(of(short).is_some_and(|chunk| chunk.last), "{step:?}");
        let done = of(long).expect("it is in every step").last;
        schedule.remove(short);
        schedule.check_integrity();
        if done {
            break;
        }
    }
    assert!(steps <= 2 * 1600 / 64, "{steps}");
    // Alone it has all of a step.
    let other = admit(&mut schedule, 100);
    assert_eq!(
        schedule.next_step(),
        [Chunk {
            ticket: other,
            tokens: 0..64,
            last: false
        }]
    );
}
