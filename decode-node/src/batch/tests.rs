use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::pace::Work;

const BLOCK_TOKENS: usize = 8;

/// A pool that only counts.
struct Pool {
    capacity: usize,
    held: HashMap<SequenceId, usize>,
    /// Taken by somebody outside of the batch.
    outside: usize,
    /// Leading tokens that `begin` finds cached, per sequence.
    cached: HashMap<SequenceId, usize>,
    /// How often `begin` says `Later` before it holds.
    reads: HashMap<SequenceId, usize>,
}

impl Pool {
    fn new(capacity: usize) -> Self {
        Self {
            capacity,
            held: HashMap::new(),
            outside: 0,
            cached: HashMap::new(),
            reads: HashMap::new(),
        }
    }

    fn free(&self) -> usize {
        self.capacity - self.outside - self.held.values().sum::<usize>()
    }
}

impl Blocks for Pool {
    fn begin(&mut self, sequence: SequenceId, tokens: usize) -> Begun {
        assert!(!self.held.contains_key(&sequence), "{sequence:?} began twice");
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        if blocks > self.free() {
            return Begun::NoRoom;
        }
        if let Some(left) = self.reads.get_mut(&sequence).filter(|left| **left > 0) {
            *left -= 1;
            return Begun::Later;
        }
        self.held.insert(sequence, blocks);
        Begun::Held(self.cached.get(&sequence).copied().unwrap_or(0).min(tokens))
    }

    fn grow(&mut self, sequence: SequenceId, tokens: usize) -> bool {
        let held = self.held[&sequence];
        let more = tokens.div_ceil(BLOCK_TOKENS).saturating_sub(held);
        if more > self.free() {
            return false;
        }
        self.held.insert(sequence, held + more);
        true
    }

    fn release(&mut self, sequence: SequenceId) {
        self.held
            .remove(&sequence)
            .expect("only held blocks are released");
    }
}

/// A sequence as the engine and the output would treat it.
#[derive(Debug, Clone)]
struct Job {
    prompt: usize,
    output: usize,
    cached_blocks: usize,
    /// Steps for which its cached blocks are being read back.
    reads: usize,
    /// Joins with blocks from a handoff if there is room for them.
    handoff: bool,
    arrives_at: usize,
}

fn job(tokens_max: usize) -> impl Strategy<Value = Job> {
    (
        1..tokens_max,
        1..24_usize,
        (0..3_usize, 0..3_usize),
        any::<bool>(),
        0..40_usize,
    )
        .prop_map(
            move |(prompt, output, (cached_blocks, reads), handoff, arrives_at)| Job {
                prompt,
                output: output.min(tokens_max - prompt),
                cached_blocks,
                reads,
                handoff,
                arrives_at,
            },
        )
}

fn limits(sequences_max: usize, step_tokens: usize) -> Limits {
    Limits {
        sequences_max,
        waiting_max: 1000,
        step_tokens,
        block_tokens: BLOCK_TOKENS,
    }
}

/// What the simulation knows of a sequence beside the batch.
struct Model {
    known: usize,
    computed: usize,
    generated: usize,
    target: usize,
    closing: bool,
}

/// Runs all jobs to their end and checks every step. Returns the number of steps.
fn run(limits: Limits, capacity: usize, jobs: &[Job], outside: &[usize], cancels: &[(usize, u64)]) -> usize {
    let mut pool = Pool::new(capacity);
    let mut batch = Batch::new(limits);
    let mut models: BTreeMap<SequenceId, Model> = BTreeMap::new();
    let mut arrivals: Vec<usize> = (0..jobs.len()).collect();
    arrivals.sort_by_key(|index| jobs[*index].arrives_at);
    let mut arrived = 0;
    let work: usize = jobs.iter().map(|job| job.prompt + job.output + 2).sum();
    // Every step at least advances the oldest sequence, but preemption may compute tokens again.
    let bound = 60 + (work + jobs.iter().map(|job| job.reads).sum::<usize>()) * (1 + jobs.len());
    let mut steps = 0;
    while arrived < jobs.len() || !models.is_empty() {
        steps += 1;
        assert!(
            steps < bound,
            "no progress: {} sequences left after {steps} steps",
            models.len()
        );
        // As the gate for handoffs: none is given blocks while a sequence waits for some.
        let short_before = batch.waiting() > 0;
        while arrived < jobs.len() && jobs[arrivals[arrived]].arrives_at < steps {
            let job = &jobs[arrivals[arrived]];
            let id = SequenceId(arrived as u64);
            arrived += 1;
            let blocks = job.prompt.div_ceil(BLOCK_TOKENS);
            let known = job.prompt + 1;
            let joins = job.handoff && job.output > 1 && !short_before && blocks <= pool.free();
            if joins {
                pool.held.insert(id, blocks);
                batch.join(id, known, None).expect("bounded");
            } else {
                batch.submit(id, job.prompt, None).expect("bounded");
            }
            pool.reads.insert(id, job.reads);
            pool.cached.insert(
                id,
                (job.cached_blocks * BLOCK_TOKENS).min(job.prompt / BLOCK_TOKENS * BLOCK_TOKENS),
            );
            models.insert(
                id,
                Model {
                    known: job.prompt + usize::from(joins),
                    computed: if joins { job.prompt } else { 0 },
                    generated: usize::from(joins),
                    target: job.output,
                    closing: false,
                },
            );
        }
        for (_, id) in cancels.iter().filter(|(step, _)| *step == steps) {
            let id = SequenceId(*id);
            if models.remove(&id).is_some() {
                batch.remove(id);
                pool.held.remove(&id);
            }
        }
        let free = pool.outside + pool.free();
        pool.outside = outside.get(steps).copied().unwrap_or(0).min(free);
        let step = batch.plan(&mut pool, &Pace::default());
        batch.check_integrity();
        check_step(&step, &limits, &models, &pool);
        for id in &step.preempted {
            models.get_mut(id).expect("known").computed = 0;
        }
        for row in &step.rows {
            let model = models.get_mut(&row.sequence).expect("known");
            if model.computed == 0 && row.cached_tokens > 0 {
                model.computed = row.cached_tokens;
            }
            assert_eq!(row.cached_tokens, model.computed, "the batch lost count");
            assert_eq!(row.start, model.computed.min(model.known - 1));
            assert!(
                pool.held[&row.sequence] * BLOCK_TOKENS >= row.end,
                "no room for {row:?}"
            );
            model.computed = row.end;
            match batch.advance(row) {
                Advanced::Partial => assert!(model.computed < model.known),
                Advanced::Sample => {
                    assert!(model.computed == model.known && !model.closing);
                    model.known += 1;
                    model.generated += 1;
                    if model.generated < model.target {
                        batch.extend(row.sequence);
                    } else if batch.finish(row.sequence) == Finish::Left {
                        assert_ne!(model.known % BLOCK_TOKENS, 0, "a complete block was not computed");
                        pool.release(row.sequence);
                        models.remove(&row.sequence);
                    } else {
                        assert_eq!(model.known % BLOCK_TOKENS, 0);
                        model.closing = true;
                    }
                }
                Advanced::Closed => {
                    assert!(model.closing && model.computed == model.known);
                    pool.release(row.sequence);
                    models.remove(&row.sequence);
                }
            }
        }
        batch.check_integrity();
    }
    assert!(
        batch.is_empty() && pool.held.is_empty(),
        "everything is given back"
    );
    assert_eq!((batch.prefill_tokens(), batch.resident_tokens()), (0, 0));
    steps
}

fn check_step(step: &Step, limits: &Limits, models: &BTreeMap<SequenceId, Model>, pool: &Pool) {
    assert!(step.tokens() <= limits.step_tokens, "{} tokens", step.tokens());
    assert!(
        step.rows
            .windows(2)
            .all(|pair| pair[0].sequence < pair[1].sequence)
    );
    assert!(step.rows.iter().all(|row| row.start < row.end));
    // A preempted sequence is younger than all that go on, so none of them can have taken from an older one.
    for victim in &step.preempted {
        assert!(step.rows.iter().all(|row| row.sequence != *victim));
        assert!(step.rows.iter().any(|row| row.sequence < *victim));
    }
    // The oldest that holds blocks advances, unless some are held outside or are given back after this step anyway.
    if pool.outside == 0
        && models.values().all(|model| !model.closing)
        && let Some(oldest) = models.keys().find(|id| pool.held.contains_key(id))
    {
        assert_eq!(step.rows.first().map(|row| row.sequence), Some(*oldest));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_sequence_ends_within_budget_and_bounds(
        jobs in prop::collection::vec(job(60), 1..14),
        spare in 0..20_usize,
        sequences_max in 1..6_usize,
        more_tokens in 1..20_usize,
    ) {
        let capacity = 60_usize.div_ceil(BLOCK_TOKENS) + spare;
        run(limits(sequences_max, sequences_max + more_tokens), capacity, &jobs, &[], &[]);
    }

    #[test]
    fn memory_taken_outside_for_a_while_and_cancels_stop_nobody_for_good(
        jobs in prop::collection::vec(job(60), 1..10),
        outside in prop::collection::vec(0..9_usize, 0..60),
        cancels in prop::collection::vec((1..80_usize, 0..10_u64), 0..6),
    ) {
        run(limits(4, 16), 8, &jobs, &outside, &cancels);
    }
}

#[test]
fn decode_rows_come_before_prefill_and_prefill_gets_the_rest() {
    let mut pool = Pool::new(100);
    let mut batch = Batch::new(limits(4, 10));
    batch.submit(SequenceId(0), 40, None).expect("room");
    pool.held.insert(SequenceId(1), 1);
    batch.join(SequenceId(1), 6, None).expect("room");
    let step = batch.plan(&mut pool, &Pace::default());
    let spans: Vec<_> = step
        .rows
        .iter()
        .map(|row| (row.sequence.0, row.start, row.end, row.sample))
        .collect();
    assert_eq!(spans, [(0, 0, 9, false), (1, 5, 6, true)]);
}

#[test]
fn a_wholly_cached_prompt_computes_its_last_token_again_without_writing() {
    let mut pool = Pool::new(100);
    pool.cached.insert(SequenceId(0), 16);
    let mut batch = Batch::new(limits(4, 10));
    batch.submit(SequenceId(0), 16, None).expect("room");
    let rows = batch.plan(&mut pool, &Pace::default()).rows;
    let row = Row {
        sequence: SequenceId(0),
        start: 15,
        end: 16,
        cached_tokens: 16,
        sample: true,
    };
    assert_eq!(rows, [row]);
}

#[test]
fn an_older_sequence_takes_the_blocks_of_the_youngest() {
    let mut pool = Pool::new(3);
    let mut batch = Batch::new(limits(4, 64));
    for id in 0..3 {
        batch.submit(SequenceId(id), BLOCK_TOKENS, None).expect("room");
    }
    let step = batch.plan(&mut pool, &Pace::default());
    for row in &step.rows {
        assert_eq!(batch.advance(row), Advanced::Sample);
        batch.extend(row.sequence);
    }
    let step = batch.plan(&mut pool, &Pace::default());
    assert_eq!(step.preempted, [SequenceId(2)]);
    assert!(step.short_of_blocks);
    // The middle one finds nothing either, and keeps what it has: there is nobody younger left.
    assert_eq!(
        step.rows.iter().map(|row| row.sequence.0).collect::<Vec<_>>(),
        [0]
    );
}

#[test]
fn nobody_overtakes_a_sequence_that_waits_for_blocks() {
    let mut pool = Pool::new(4);
    let mut batch = Batch::new(limits(4, 64));
    batch.submit(SequenceId(0), 3 * BLOCK_TOKENS, None).expect("room");
    assert_eq!(batch.plan(&mut pool, &Pace::default()).rows.len(), 1);
    batch.submit(SequenceId(1), 2 * BLOCK_TOKENS, None).expect("room");
    batch.submit(SequenceId(2), 1, None).expect("room");
    let step = batch.plan(&mut pool, &Pace::default());
    assert!(step.short_of_blocks);
    assert!(step.rows.iter().all(|row| row.sequence == SequenceId(0)));
}

#[test]
fn a_full_queue_refuses() {
    let mut batch = Batch::new(Limits {
        waiting_max: 2,
        ..limits(1, 8)
    });
    batch.submit(SequenceId(0), 1, None).expect("room");
    batch.join(SequenceId(1), 2, None).expect("room");
    assert_eq!(
        batch.submit(SequenceId(2), 1, None),
        Err(QueueFull { waiting: 2 })
    );
}

fn pace() -> Pace {
    let mut pace = Pace::default();
    let work = |prompt_tokens, decodes| Work {
        prompt_tokens,
        token_kilocontext: 0.0,
        decodes,
    };
    for _ in 0..50 {
        pace.observe(&work(0.0, true), Millis(10.0));
        pace.observe(&work(100.0, false), Millis(50.0));
    }
    pace
}

#[test]
fn the_strictest_limit_of_those_that_decode_bounds_what_prompts_get() {
    let mut pool = Pool::new(1000);
    let mut batch = Batch::new(limits(8, 256));
    for (id, gap) in [(0, None), (1, Some(Millis(60.0))), (2, Some(Millis(30.0)))] {
        let sequence = SequenceId(id);
        pool.held.insert(sequence, 1);
        batch.join(sequence, 6, gap).expect("room");
    }
    // Its own limit does not count before it has drawn a token.
    batch
        .submit(SequenceId(3), 4000, Some(Millis(1.0)))
        .expect("room");
    let mut given = || {
        let step = batch.plan(&mut pool, &pace());
        let prompt = step
            .rows
            .iter()
            .find(|row| row.sequence == SequenceId(3))
            .expect("it advances");
        let tokens = prompt.end - prompt.start;
        for row in &step.rows {
            if batch.advance(row) == Advanced::Sample {
                batch.extend(row.sequence);
            }
        }
        batch.remove(SequenceId(if tokens == 40 { 2 } else { 1 }));
        tokens
    };
    assert_eq!([given(), given(), given()], [40, 100, 255]);
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one_and_the_long_one_goes_on() {
    let mut pool = Pool::new(1000);
    let mut batch = Batch::new(limits(8, 64));
    batch.submit(SequenceId(0), 4000, None).expect("room");
    batch.submit(SequenceId(1), 2000, None).expect("room");
    batch.submit(SequenceId(2), 20, None).expect("room");
    batch.submit(SequenceId(3), 20, None).expect("room");
    let step = batch.plan(&mut pool, &Pace::default());
    let spans: Vec<_> = step
        .rows
        .iter()
        .map(|row| (row.sequence.0, row.end, row.sample))
        .collect();
    assert_eq!(spans, [(0, 32, false), (2, 20, true), (3, 12, false)]);
}

#[test]
fn a_sequence_whose_blocks_are_read_back_keeps_nobody_waiting() {
    let mut pool = Pool::new(100);
    pool.reads.insert(SequenceId(0), 2);
    let mut batch = Batch::new(limits(4, 64));
    batch.submit(SequenceId(0), 8, None).expect("room");
    batch.submit(SequenceId(1), 8, None).expect("room");
    let mut steps = || {
        let step = batch.plan(&mut pool, &Pace::default());
        assert!(!step.short_of_blocks);
        step.rows.iter().map(|row| row.sequence.0).collect::<Vec<_>>()
    };
    assert_eq!(steps(), [1]);
    assert_eq!(steps(), [1]);
    assert_eq!(steps(), [0, 1]);
}
