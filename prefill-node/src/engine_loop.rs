//! The thread that owns the engine: takes prompts, computes them in steps, and tells each one's session what is
//! in its blocks.
//!
//! Invariant: a prompt's blocks are touched only between its arrival here and the end of its progress channel. The
//! job holds them by reference count, so they outlive the thread's use of them whatever becomes of the session.
//!
//! A session that is slow to listen holds the engine up (its channel is bounded) rather than letting memory grow;
//! sessions only take notes of progress and never wait for a peer before they listen again.
//!
//! Elsewhere: what is computed next ([`crate::schedule`]), what becomes of it (`session`).

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use engine::Engine;
use engine::sampler::{self, Sampled};
use engine::step::{LogitsWanted, SequenceStep, StepError, StepObserver};
use kv_store::SequenceBlocks;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use types::{BlockId, Error, SamplingParams, Token};

use crate::metrics::Metrics;
use crate::rates::StepRate;
use crate::schedule::{Chunk, Schedule, Ticket};

/// Progress that a session has not looked at yet. A step reports once per layer: this is some steps.
pub(crate) const PROGRESS_MAX: usize = 256;

/// A prompt that can be computed: its blocks are there, and the cached ones are filled.
pub(crate) struct Job {
    pub(crate) ticket: Ticket,
    pub(crate) tokens: Arc<[Token]>,
    /// How many of the tokens are the client's prompt.
    pub(crate) prompt_tokens: usize,
    pub(crate) sampling: SamplingParams,
    /// First position to compute.
    pub(crate) start: usize,
    /// Positions below are in the blocks already, and are never written.
    pub(crate) cached_tokens: usize,
    pub(crate) blocks: Arc<[BlockId]>,
    /// Keeps the blocks ours for as long as the engine may touch them.
    pub(crate) owner: Arc<Mutex<SequenceBlocks>>,
    pub(crate) cancelled: CancellationToken,
    pub(crate) progress: mpsc::Sender<Progress>,
}

/// What a session hears. The channel's end means that the engine has let go of the blocks.
#[derive(Debug)]
pub(crate) enum Progress {
    /// The first step begins.
    Started,
    /// This layer of all blocks before `blocks_end` is complete.
    Written {
        /// Which layer.
        layer: usize,
        /// Blocks before this one.
        blocks_end: usize,
    },
    /// Everything is computed, and this is the first token.
    Computed(Sampled),
    /// The engine failed.
    Failed(Error),
}

/// What the engine thread shares with the sessions.
pub(crate) struct EngineLoop {
    pub(crate) engine: Engine,
    pub(crate) block_tokens: usize,
    pub(crate) schedule: Arc<Mutex<Schedule>>,
    pub(crate) rate: Arc<Mutex<StepRate>>,
    pub(crate) metrics: Metrics,
}

/// Starts the thread. It ends when every sender of `jobs` is gone and what runs has ended or was cancelled; the
/// receiver of the result then sees its sender dropped.
pub(crate) fn spawn(
    state: EngineLoop,
    jobs: mpsc::Receiver<Job>,
) -> Result<oneshot::Receiver<()>, std::io::Error> {
    let (alive_tx, alive_rx) = oneshot::channel();
    std::thread::Builder::new()
        .name("prefill-engine".to_owned())
        .spawn(move || {
            let _alive = alive_tx;
            Runner {
                state,
                jobs,
                running: BTreeMap::new(),
            }
            .run();
        })?;
    Ok(alive_rx)
}

struct Runner {
    state: EngineLoop,
    jobs: mpsc::Receiver<Job>,
    running: BTreeMap<Ticket, Job>,
}

impl Runner {
    fn run(mut self) {
        while self.take_jobs() {
            self.running.retain(|_, job| !job.cancelled.is_cancelled());
            let chunks = lock(&self.state.schedule).next_step();
            // A session cancels its job before it leaves the schedule, so a chunk without a job is one that was
            // cancelled just now.
            let chunks: Vec<Chunk> = chunks
                .into_iter()
                .filter(|chunk| self.running.contains_key(&chunk.ticket))
                .collect();
            if !chunks.is_empty() {
                self.step(&chunks);
            }
        }
    }

    /// Waits for a job if there is none, and takes what has arrived. False when there will be none any more.
    fn take_jobs(&mut self) -> bool {
        if self.running.is_empty() {
            match self.jobs.blocking_recv() {
                None => return false,
                Some(job) => self.take(job),
            }
        }
        while let Ok(job) = self.jobs.try_recv() {
            self.take(job);
        }
        true
    }

    fn take(&mut self, job: Job) {
        lock(&self.state.schedule).ready(job.ticket, job.start);
        self.running.insert(job.ticket, job);
    }

    fn step(&mut self, chunks: &[Chunk]) {
        let begun = Instant::now();
        for chunk in chunks {
            let job = &self.running[&chunk.ticket];
            if chunk.tokens.start == job.start {
                job.tell(Progress::Started);
            }
        }
        let jobs: Vec<(&Chunk, &Job)> = chunks
            .iter()
            .map(|chunk| (chunk, &self.running[&chunk.ticket]))
            .collect();
        let batch: Vec<SequenceStep<'_>> = jobs.iter().map(|(chunk, job)| job.part(chunk)).collect();
        let mut observer = Observer {
            jobs: &jobs,
            block_tokens: self.state.block_tokens,
        };
        let outcome = self.state.engine.step(&batch, &mut observer);
        let ended: Vec<(Ticket, Result<Sampled, Error>)> = match outcome {
            Ok(mut logits) => {
                let last = jobs.iter().filter(|(chunk, _)| chunk.last);
                last.enumerate()
                    .map(|(row, (chunk, job))| (chunk.ticket, job.sample(logits.row_mut(row))))
                    .collect()
            }
            // All sequences of the step were cancelled: nobody listens.
            Err(StepError::Aborted { .. }) => Vec::new(),
            Err(error) => {
                let error = Error::internal(format!("the engine failed: {error}"));
                jobs.iter()
                    .map(|(chunk, _)| (chunk.ticket, Err(error.clone())))
                    .collect()
            }
        };
        self.learn(chunks, begun);
        for (ticket, result) in ended {
            if let Some(job) = self.running.remove(&ticket) {
                job.finish(result);
            }
        }
    }

    fn learn(&self, chunks: &[Chunk], begun: Instant) {
        let elapsed = begun.elapsed();
        self.state.metrics.step_seconds.observe(elapsed.as_secs_f64());
        let tokens: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        self.state.metrics.computed_tokens.inc_by(tokens as u64);
        self.state.metrics.set_queue(&lock(&self.state.schedule));
        let chunks = chunks.iter().map(|chunk| &chunk.tokens);
        lock(&self.state.rate).observe(chunks, elapsed.as_secs_f64() * 1e3);
    }
}

impl Job {
    fn part(&self, chunk: &Chunk) -> SequenceStep<'_> {
        SequenceStep {
            tokens: &self.tokens[chunk.tokens.clone()],
            start: chunk.tokens.start,
            blocks: &self.blocks,
            cached_tokens: self.cached_tokens,
            logits: if chunk.last {
                LogitsWanted::Last
            } else {
                LogitsWanted::None
            },
        }
    }

    fn sample(&self, logits: &mut [f32]) -> Result<Sampled, Error> {
        let (prompt, generated) = self.tokens.split_at(self.prompt_tokens);
        Ok(sampler::sample(logits, &self.sampling, prompt, generated)?)
    }

    /// Blocks whose slices are complete after this chunk.
    fn blocks_end(&self, chunk: &Chunk, block_tokens: usize) -> usize {
        if chunk.last {
            self.blocks.len()
        } else {
            chunk.tokens.end / block_tokens
        }
    }

    /// Whether the session still wants to know.
    fn tell(&self, progress: Progress) -> bool {
        !self.cancelled.is_cancelled() && self.progress.blocking_send(progress).is_ok()
    }

    /// Lets go of the blocks, then says so.
    fn finish(self, result: Result<Sampled, Error>) {
        let Self { owner, progress, .. } = self;
        drop(owner);
        let last = match result {
            Ok(sampled) => Progress::Computed(sampled),
            Err(error) => Progress::Failed(error),
        };
        // A session that is gone needs no result.
        let _ = progress.blocking_send(last);
    }
}

/// Passes the engine's progress on, and stops a step that nobody wants any more.
struct Observer<'a> {
    jobs: &'a [(&'a Chunk, &'a Job)],
    block_tokens: usize,
}

impl Observer<'_> {
    fn wanted(&self) -> ControlFlow<()> {
        if self.jobs.iter().all(|(_, job)| job.cancelled.is_cancelled()) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

impl StepObserver for Observer<'_> {
    fn before_layer(&mut self, _layer: usize) -> ControlFlow<()> {
        self.wanted()
    }

    fn kv_written(&mut self, layer: usize) -> ControlFlow<()> {
        for (chunk, job) in self.jobs {
            let blocks_end = job.blocks_end(chunk, self.block_tokens);
            job.tell(Progress::Written { layer, blocks_end });
        }
        self.wanted()
    }
}

/// Locks what is only ever held for some field accesses.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds this lock")
}
