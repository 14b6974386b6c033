//! The thread that owns the engine: takes requests, computes steps, draws tokens.
//!
//! Invariants:
//! - The thread never waits for a client. A sequence's event channel has room for every event that it can still cause,
//!   so a slow client costs memory for the tokens it was promised (some dozen bytes each, bounded by `max_tokens` and the
//!   context), and never a step of anybody else.
//! - A closed event channel is the cancellation: before the next step the sequence is gone and its blocks are free.
//! - A sequence's blocks are given back before its last event is sent.
//!
//! Elsewhere: what is computed next (`batch.rs`), where tokens end (`output.rs`), the client (`request.rs`).

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use engine::sampler::{Sampled, sample};
use engine::{Engine, LogitsWanted, SequenceStep, StepObserver};
use kv_store::{SequenceBlocks, Store};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;
use types::{BlockHash, Error, FinishReason, Millis, SamplingParams, Token, TokenLogprob};

use crate::batch::{Advanced, Batch, Begun, Blocks, Finish, Limits, Row, SequenceId, Step};
use crate::output::Output;
use crate::pace::Work;
use crate::shared::Shared;

/// Events of a sequence beside its tokens: that it started, and how it ended.
pub(crate) const EVENTS_BESIDE_TOKENS: usize = 2;

/// How long a preempted sequence waits for its blocks on disk. Thousands of tokens are computed in the meantime, and others go on.
const READ_BACK_TIMEOUT: Duration = Duration::from_secs(5);

/// What the thread is told.
pub(crate) enum Command {
    /// Take this request in.
    Run(Box<Job>),
    /// Give up what runs and end.
    Stop,
}

/// A request that is ready for the engine.
pub(crate) struct Job {
    pub(crate) sequence: SequenceId,
    /// Prompt and output so far.
    pub(crate) tokens: Vec<Token>,
    pub(crate) prompt_tokens: usize,
    pub(crate) params: Arc<SamplingParams>,
    pub(crate) tenant: String,
    /// Longest gap between its tokens.
    pub(crate) gap: Option<Millis>,
    pub(crate) output: Output,
    pub(crate) start: Start,
    /// With room for what [`Output::remaining`] says and [`EVENTS_BESIDE_TOKENS`].
    pub(crate) events: mpsc::Sender<Event>,
    /// Held until the blocks are given back.
    pub(crate) permit: OwnedSemaphorePermit,
}

/// Where a request's KV comes from.
pub(crate) enum Start {
    /// From here: the prompt is prefilled.
    Prefill,
    /// It is in these blocks, but for the last token's.
    Received(SequenceBlocks),
}

/// What a sequence's client is told.
#[derive(Debug)]
pub(crate) enum Event {
    /// Prefill starts; so many leading tokens were cached.
    Started {
        /// Tokens whose KV is not computed.
        cached_tokens: usize,
        /// When.
        at: Instant,
    },
    /// The next token.
    Token(Generated),
    /// There is no further token.
    Finished(FinishReason),
    /// The request failed.
    Failed(Error),
}

/// One token and what it adds to the output.
#[derive(Debug)]
pub(crate) struct Generated {
    pub(crate) token: Token,
    pub(crate) text: String,
    pub(crate) logprob: Option<TokenLogprob>,
}

/// A sequence's data; its place in the batch is [`Batch`]'s. Blocks are dropped before the permit.
struct Sequence {
    tokens: Vec<Token>,
    prompt_tokens: usize,
    params: Arc<SamplingParams>,
    tenant: String,
    output: Output,
    blocks: Option<SequenceBlocks>,
    events: mpsc::Sender<Event>,
    preempted: Preempted,
    /// Whether the client knows that prefill started.
    started: bool,
    last_token_at: Option<Instant>,
    _permit: OwnedSemaphorePermit,
}

/// What became of a sequence's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Preempted {
    /// They were not taken, or what is left of them is in memory.
    No,
    /// An older sequence took them. They may have gone to disk.
    Lost,
    /// So many are coming back from disk, or are in memory.
    Reading { blocks: usize, until: Instant },
}

/// Gives up a step when the node stops.
struct StopObserver<'a>(&'a CancellationToken);

impl StepObserver for StopObserver<'_> {
    fn before_layer(&mut self, _layer: usize) -> ControlFlow<()> {
        if self.0.is_cancelled() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

/// The batch's view of the sequences' blocks.
struct Memory<'a> {
    store: &'a Store,
    runtime: &'a Handle,
    sequences: &'a mut HashMap<SequenceId, Sequence>,
}

impl Blocks for Memory<'_> {
    fn begin(&mut self, id: SequenceId, tokens: usize) -> Begun {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return Begun::NoRoom;
        };
        let known = &sequence.tokens[..tokens];
        // Looked up first without touching anything: who waits asks again and again.
        let (_, chain) = self.store.chain(&sequence.tenant, known);
        let held = self.store.lookup_len(&chain);
        if self.store.layout().blocks_for(tokens) - held > self.store.available() {
            return Begun::NoRoom;
        }
        if sequence
            .preempted
            .is_reading(self.store, self.runtime, chain, held)
        {
            return Begun::Later;
        }
        let mut blocks = SequenceBlocks::begin(self.store, &sequence.tenant, known);
        if blocks.grow_to(tokens).is_err() {
            return Begun::NoRoom;
        }
        let cached = blocks.cached_tokens();
        sequence.blocks = Some(blocks);
        if !sequence.started {
            sequence.started = true;
            sequence.tell(Event::Started {
                cached_tokens: cached,
                at: Instant::now(),
            });
        }
        Begun::Held(cached)
    }

    fn grow(&mut self, id: SequenceId, tokens: usize) -> bool {
        let blocks = self
            .sequences
            .get_mut(&id)
            .and_then(|sequence| sequence.blocks.as_mut());
        blocks.is_some_and(|blocks| blocks.grow_to(tokens).is_ok())
    }

    fn release(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.blocks = None;
            sequence.preempted = Preempted::Lost;
        }
    }
}

impl Preempted {
    /// Whether what a preempted sequence has on disk is still coming back. Begins to read it where there is something to read; a
    /// read that takes too long is given up, and computed.
    fn is_reading(&mut self, store: &Store, runtime: &Handle, chain: Vec<BlockHash>, held: usize) -> bool {
        if *self == Self::Lost {
            let _within = runtime.enter();
            let (in_memory, reading) = store.read_ahead(chain);
            *self = match reading {
                0 => Self::No,
                reading => Self::Reading {
                    blocks: in_memory + reading,
                    until: Instant::now() + READ_BACK_TIMEOUT,
                },
            };
        }
        match *self {
            Self::Reading { blocks, until } if held < blocks && Instant::now() < until => true,
            Self::No | Self::Lost | Self::Reading { .. } => {
                *self = Self::No;
                false
            }
        }
    }
}

impl Sequence {
    fn tell(&self, event: Event) {
        // The channel has room; a closed one is noticed before the next step.
        let sent = self.events.try_send(event);
        debug_assert!(
            !matches!(sent, Err(mpsc::error::TrySendError::Full(_))),
            "the channel has room for every event"
        );
    }

    fn end(mut self, event: Event) {
        self.blocks = None;
        self.tell(event);
    }

    fn step(&self, row: &Row) -> SequenceStep<'_> {
        let blocks = self
            .blocks
            .as_ref()
            .expect("a sequence that computes holds blocks");
        SequenceStep {
            tokens: &self.tokens[row.start..row.end],
            start: row.start,
            blocks: blocks.block_ids(),
            cached_tokens: row.cached_tokens,
            logits: if row.sample {
                LogitsWanted::Last
            } else {
                LogitsWanted::None
            },
        }
    }
}

/// The thread's state.
pub(crate) struct EngineLoop {
    shared: Arc<Shared>,
    /// What is read back from disk is read there.
    runtime: Handle,
    engine: Engine,
    commands: Receiver<Command>,
    batch: Batch,
    sequences: HashMap<SequenceId, Sequence>,
    /// All sequences wait for blocks.
    stalled: bool,
}

impl EngineLoop {
    /// Call it within the runtime.
    pub(crate) fn new(shared: Arc<Shared>, engine: Engine, commands: Receiver<Command>) -> Self {
        let limits = Limits {
            sequences_max: shared.config.sequences_max,
            waiting_max: shared.config.requests_max,
            step_tokens: shared.config.step_tokens,
            block_tokens: shared.store.layout().block_tokens,
        };
        Self {
            shared,
            runtime: Handle::current(),
            engine,
            commands,
            batch: Batch::new(limits),
            sequences: HashMap::new(),
            stalled: false,
        }
    }

    /// Runs until it is told to stop.
    pub(crate) fn run(mut self) {
        while self.receive().is_continue() {
            self.drop_cancelled();
            let mut memory = Memory {
                store: &self.shared.store,
                runtime: &self.runtime,
                sequences: &mut self.sequences,
            };
            let pace = self.shared.progress().pace;
            let step = self.batch.plan(&mut memory, &pace);
            self.shared.short_of_blocks.send_if_modified(|short| {
                std::mem::replace(short, step.short_of_blocks) != step.short_of_blocks
            });
            self.shared
                .metrics
                .preemptions
                .inc_by(step.preempted.len() as u64);
            self.stalled = step.rows.is_empty();
            if !self.stalled {
                self.compute(&step);
            }
            self.report();
        }
        for (_, sequence) in self.sequences.drain() {
            sequence.end(Event::Failed(Error::unavailable("the node is shutting down")));
        }
    }

    /// Takes in what is there, and waits if there is nothing else to do.
    fn receive(&mut self) -> ControlFlow<()> {
        if self.batch.is_empty() {
            match self.commands.recv() {
                Ok(command) => self.obey(command)?,
                Err(_) => return ControlFlow::Break(()),
            }
        } else if self.stalled {
            // Blocks that are held outside of the batch come back without a message to this thread.
            match self.commands.recv_timeout(self.shared.config.blocks_poll) {
                Ok(command) => self.obey(command)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return ControlFlow::Break(()),
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command)?,
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
                Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
            }
        }
    }

    fn obey(&mut self, command: Command) -> ControlFlow<()> {
        match command {
            Command::Stop => ControlFlow::Break(()),
            Command::Run(job) => {
                self.accept(*job);
                ControlFlow::Continue(())
            }
        }
    }

    fn accept(&mut self, job: Job) {
        let Job {
            sequence: id,
            tokens,
            prompt_tokens,
            params,
            tenant,
            gap,
            output,
            start,
            events,
            permit,
        } = job;
        let known = tokens.len();
        let (blocks, joined) = match start {
            Start::Prefill => (None, self.batch.submit(id, known, gap)),
            Start::Received(blocks) if output.finish().is_some() => {
                (Some(blocks), self.batch.join_finished(id, known))
            }
            Start::Received(blocks) => (Some(blocks), self.batch.join(id, known, gap)),
        };
        let sequence = Sequence {
            tokens,
            prompt_tokens,
            params,
            tenant,
            output,
            preempted: Preempted::No,
            started: blocks.is_some(),
            last_token_at: blocks.is_some().then(Instant::now),
            blocks,
            events,
            _permit: permit,
        };
        match joined {
            Ok(()) => {
                self.sequences.insert(id, sequence);
            }
            Err(full) => {
                let retry_after_ms = self.shared.retry_after_ms();
                sequence.end(Event::Failed(Error::overloaded(full.to_string(), retry_after_ms)));
            }
        }
    }

    fn drop_cancelled(&mut self) {
        let batch = &mut self.batch;
        self.sequences.retain(|id, sequence| {
            let wanted = !sequence.events.is_closed();
            if !wanted {
                batch.remove(*id);
            }
            wanted
        });
    }

    fn compute(&mut self, step: &Step) {
        let begun = Instant::now();
        let drawn = match self.run_engine(&step.rows) {
            Ok(drawn) => drawn,
            Err(error) => {
                tracing::error!(%error, rows = step.rows.len(), "engine step failed");
                for row in &step.rows {
                    self.fail(row.sequence, error.clone());
                }
                return;
            }
        };
        self.measure(step, begun);
        for (row, drawn) in step.rows.iter().zip(drawn) {
            self.settle(row, drawn);
        }
    }

    /// Computes rows and draws the tokens of those that want one.
    fn run_engine(&mut self, rows: &[Row]) -> Result<Vec<Option<Result<Sampled, Error>>>, Error> {
        let of = |row: &Row| &self.sequences[&row.sequence];
        let steps: Vec<SequenceStep<'_>> = rows.iter().map(|row| of(row).step(row)).collect();
        let mut logits = self
            .engine
            .step(&steps, &mut StopObserver(&self.shared.stopping))?;
        let mut next_row = 0;
        let draw = rows.iter().map(|row| {
            row.sample.then(|| {
                let sequence = of(row);
                let (prompt, generated) = sequence.tokens.split_at(sequence.prompt_tokens);
                let logits = logits.row_mut(next_row);
                next_row += 1;
                sample(logits, &sequence.params, prompt, generated).map_err(Error::from)
            })
        });
        Ok(draw.collect())
    }

    /// Records what a computed row means for its sequence.
    fn settle(&mut self, row: &Row, drawn: Option<Result<Sampled, Error>>) {
        let advanced = self.batch.advance(row);
        let sequence = self
            .sequences
            .get_mut(&row.sequence)
            .expect("a row's sequence is known");
        let blocks = sequence
            .blocks
            .as_mut()
            .expect("a sequence that computes holds blocks");
        blocks.commit_full(&sequence.tokens, row.end);
        // No step is under way, and nothing here is read by transfers.
        blocks.free_displaced();
        match (advanced, drawn) {
            (Advanced::Sample, Some(Ok(sampled))) => self.extend(row.sequence, sampled),
            (Advanced::Sample, Some(Err(error))) => self.fail(row.sequence, error),
            (Advanced::Closed, _) => self.finish(row.sequence),
            (Advanced::Partial | Advanced::Sample, _) => {}
        }
    }

    fn extend(&mut self, id: SequenceId, sampled: Sampled) {
        let sequence = self.sequences.get_mut(&id).expect("a row's sequence is known");
        let Sampled { token, logprob } = sampled;
        sequence.tokens.push(token);
        let piece = sequence.output.push(token);
        sequence.tell(Event::Token(Generated {
            token,
            text: piece.text,
            logprob,
        }));
        let now = Instant::now();
        if let Some(before) = sequence.last_token_at.replace(now) {
            let gap = now.duration_since(before);
            self.shared
                .metrics
                .inter_token_latency_seconds
                .observe(gap.as_secs_f64());
        }
        self.shared.metrics.tokens.inc();
        if piece.finish.is_none() {
            self.batch.extend(id);
        } else if self.batch.finish(id) == Finish::Left {
            self.finish(id);
        }
    }

    fn finish(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.remove(&id) {
            let reason = sequence
                .output
                .finish()
                .expect("a finished sequence has a reason");
            sequence.end(Event::Finished(reason));
        }
    }

    fn fail(&mut self, id: SequenceId, error: Error) {
        self.batch.remove(id);
        if let Some(sequence) = self.sequences.remove(&id) {
            sequence.end(Event::Failed(error));
        }
    }

    fn measure(&self, step: &Step, begun: Instant) {
        let elapsed = begun.elapsed();
        let metrics = &self.shared.metrics;
        metrics.step_seconds.observe(elapsed.as_secs_f64());
        let mut work = Work::default();
        for row in &step.rows {
            match row.end - row.start {
                1 => work.decodes = true,
                _ => work.add_prompt(&(row.start..row.end)),
            }
        }
        metrics.prefill_tokens.inc_by(work.prompt_tokens as u64);
        self.shared
            .progress()
            .pace
            .observe(&work, Millis(elapsed.as_secs_f64() * 1000.0));
    }

    fn report(&self) {
        let shared = &self.shared;
        let running = self.batch.running();
        {
            let mut progress = shared.progress();
            progress.running = running;
            progress.prefill_tokens = self.batch.prefill_tokens();
            progress.resident_tokens = self.batch.resident_tokens();
        }
        shared
            .metrics
            .running
            .set(i64::try_from(running).unwrap_or(i64::MAX));
        let waiting = shared.accepted().saturating_sub(running);
        shared
            .metrics
            .waiting
            .set(i64::try_from(waiting).unwrap_or(i64::MAX));
    }
}
