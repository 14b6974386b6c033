//! The order of operations of a step.
//!
//! Work is handed to the threads in jobs whose items write disjoint elements: rows, blocks, heads, or tiles of outputs. How a
//! job is cut depends on the batch and the threads; what an element gets does not.

use std::ops::ControlFlow;

use super::attend::Item;
use super::experts::{Mixture, Routed};
use super::plan::{Plan, Run};
use super::product::{Operand, Product, ROWS_INLINE, for_rows, grow};
use super::{Engine, Logits, SequenceStep, StepError, StepObserver};
use crate::compute::Isa;
use crate::compute::attention;
use crate::compute::kv::{Pool, Rounded, TokenSlot};
use crate::compute::math::{add_assign, rms_norm, soft_cap_row};
use crate::compute::matrix::{Epilogue, Matrix};
use crate::compute::rope::{RopeTable, rotate};
use crate::compute::shared::Shared;
use crate::config::ModelConfig;
use crate::family::Activation;
use crate::model::{FeedForward, Gated, Layer, Linear};
use crate::threads::{JobPanicked, Threads};

/// Working memory, grown to the largest step so far.
pub(super) struct Buffers {
    /// Residual stream, `[row][hidden]`.
    stream: Vec<f32>,
    /// What a branch gives, where it is not added to the stream at once.
    branch: Vec<f32>,
    /// The normalised stream, or the attention's output.
    pub(super) input: Operand,
    /// Queries, keys and values of each row.
    pub(super) qkv: Vec<f32>,
    /// Gated feed-forward activations.
    gated: Operand,
    routed: Routed,
    /// Partial results of split attention.
    pub(super) partials: Vec<f32>,
    pub(super) attention: Vec<Item>,
    logits: Vec<f32>,
    pub(super) workers: Vec<Worker>,
}

/// What one thread needs for itself.
#[derive(Default)]
pub(super) struct Worker {
    pub(super) attention: attention::Scratch,
    rounded: Rounded,
    normalised: Vec<f32>,
}

impl Buffers {
    pub(super) fn new(threads: usize) -> Self {
        Self {
            stream: Vec::new(),
            branch: Vec::new(),
            input: Operand::new(),
            qkv: Vec::new(),
            gated: Operand::new(),
            routed: Routed::new(),
            partials: Vec::new(),
            attention: Vec::new(),
            logits: Vec::new(),
            workers: (0..threads).map(|_| Worker::default()).collect(),
        }
    }

    pub(super) fn logits(&mut self, rows: usize, vocabulary: usize) -> Logits<'_> {
        Logits {
            values: &mut self.logits[..rows * vocabulary],
            vocabulary,
        }
    }

    fn prepare(&mut self, plan: &Plan, config: &ModelConfig) {
        let rows = plan.rows();
        grow(&mut self.stream, rows * config.hidden);
        self.input
            .grow(rows, config.hidden.max(config.heads * config.head_dim));
        grow(&mut self.qkv, rows * qkv_width(config));
        match config.experts {
            Some(experts) => self
                .routed
                .prepare(rows, experts, config.hidden, config.intermediate),
            None => self.gated.grow(rows, config.intermediate),
        }
        if config.experts.is_some() || config.family.norms.after() {
            grow(&mut self.branch, rows * config.hidden);
        }
        grow(&mut self.logits, plan.logit_rows().len() * config.vocabulary);
    }

    /// Moves the rows at `kept`, which ascend, to the front.
    fn keep_rows(&mut self, kept: &[usize], config: &ModelConfig) {
        for (buffer, width) in [
            (&mut self.stream, config.hidden),
            (&mut self.qkv, qkv_width(config)),
        ] {
            for (to, from) in kept.iter().enumerate() {
                buffer.copy_within(from * width..(from + 1) * width, to * width);
            }
        }
    }
}

/// Floats of queries, keys and values of one row.
pub(super) fn qkv_width(config: &ModelConfig) -> usize {
    (config.heads + 2 * config.kv_heads) * config.head_dim
}

/// What every part of a step needs.
pub(super) struct Context<'a> {
    pub(super) isa: Isa,
    pub(super) config: &'a ModelConfig,
    pub(super) pool: &'a Pool,
    pub(super) batch: &'a [SequenceStep<'a>],
    rope: &'a RopeTable,
    local_rope: Option<&'a RopeTable>,
}

impl Engine {
    pub(super) fn forward(
        &mut self,
        batch: &[SequenceStep<'_>],
        plan: &Plan,
        observer: &mut dyn StepObserver,
    ) -> Result<(), StepError> {
        let Self {
            model,
            pool,
            isa,
            threads,
            rope,
            local_rope,
            buffers,
        } = self;
        let config = model.config();
        let context = Context {
            isa: *isa,
            config,
            pool,
            batch,
            rope,
            local_rope: local_rope.as_ref(),
        };
        buffers.prepare(plan, config);
        let tokens = batch.iter().flat_map(|step| step.tokens);
        for (row, token) in buffers.stream.chunks_exact_mut(config.hidden).zip(tokens) {
            model.weights.embedding.row(*token as usize, row);
            if let Some(scale) = config.embedding_scale {
                row.iter_mut().for_each(|value| *value *= scale);
            }
        }
        let told = |flow: ControlFlow<()>, layer: usize| match flow {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(StepError::Aborted { layer }),
        };
        let (mut rows, mut tiles) = (plan.rows(), plan.tiles());
        for (index, layer) in model.weights.layers.iter().enumerate() {
            told(observer.before_layer(index), index)?;
            context.project(rows, layer, threads, buffers)?;
            context.rotate_and_store(index, layer, plan.block_runs(), threads, buffers)?;
            told(observer.kv_written(index), index)?;
            if index + 1 == config.layers {
                // After the last layer's KV, only rows whose logits are wanted matter.
                (rows, tiles) = (plan.logit_rows().len(), plan.logit_tiles());
                buffers.keep_rows(plan.logit_rows(), config);
            }
            context.attend(index, tiles, threads, buffers)?;
            context.mix(rows, layer, threads, buffers)?;
            context.feed_forward(rows, layer, threads, buffers)?;
        }
        context.head(
            rows,
            &model.weights.output_norm,
            &model.weights.head,
            threads,
            buffers,
        )?;
        Ok(())
    }
}

impl Context<'_> {
    /// Queries, keys and values of the normalised stream.
    fn project(
        &self,
        rows: usize,
        layer: &Layer,
        threads: &mut Threads,
        buffers: &mut Buffers,
    ) -> Result<(), JobPanicked> {
        let Buffers {
            stream, input, qkv, ..
        } = buffers;
        let linears = [&layer.query, &layer.key, &layer.value];
        let quantised = linears.iter().any(|linear| linear.matrix.quantised());
        let norm = layer.attention_norm.as_deref();
        self.normalise(rows, stream, norm, quantised, input, threads)?;
        let single = linears.map(|linear| [(&linear.matrix, Epilogue::Store)]);
        let mut first_column = 0;
        let products = single.each_ref().map(|matrices| {
            let product = Product {
                matrices,
                first_column,
            };
            first_column += matrices[0].0.rows();
            product
        });
        self.multiply(rows, input, &products, qkv, qkv_width(self.config), threads)
    }

    /// Adds biases, normalises and rotates queries and keys, and writes keys and values to the blocks.
    fn rotate_and_store(
        &self,
        index: usize,
        layer: &Layer,
        runs: &[Run],
        threads: &mut Threads,
        buffers: &mut Buffers,
    ) -> Result<(), JobPanicked> {
        let rows: usize = runs.iter().map(|run| run.rows).sum();
        let (qkv, workers) = (Shared::new(&mut buffers.qkv), Shared::new(&mut buffers.workers));
        let width = qkv_width(self.config);
        let table = self.rope_of(index);
        let angles = |position| table.map_or(&[][..], |table| table.at(position));
        let job = |worker: usize, item: usize| {
            let run = runs[item];
            // SAFETY: a worker runs one item at a time.
            let worker = &mut unsafe { workers.range(worker, 1) }[0];
            for row in 0..run.rows {
                // SAFETY: a row belongs to one run.
                let qkv = unsafe { qkv.range((run.row + row) * width, width) };
                let slot = self.slot(index, run, row);
                // SAFETY: `Plan` gives a block that is written to one run, and others may not use it during a step.
                unsafe { self.rotate_and_store_row(layer, angles(run.position + row), slot, qkv, worker) };
            }
        };
        if rows <= ROWS_INLINE {
            (0..runs.len()).for_each(|item| job(0, item));
            return Ok(());
        }
        threads.run(runs.len(), &job)
    }

    /// What the layer's queries and keys are rotated by, if they are.
    fn rope_of(&self, layer: usize) -> Option<&RopeTable> {
        if self.config.unrotated.contains(layer) {
            return None;
        }
        let local = self.local_rope.filter(|_| self.config.window_of(layer).is_some());
        Some(local.unwrap_or(self.rope))
    }

    /// Where the KV of a run's row goes, unless it is there.
    fn slot(&self, layer: usize, run: Run, row: usize) -> Option<TokenSlot> {
        let (step, position) = (&self.batch[run.sequence], run.position + row);
        let tokens = self.pool.layout().block_tokens;
        let slot = TokenSlot {
            layer,
            block: step.blocks[position / tokens],
            slot: position % tokens,
        };
        (position >= step.cached_tokens).then_some(slot)
    }

    /// # Safety
    ///
    /// No one else may access the slot's block.
    unsafe fn rotate_and_store_row(
        &self,
        layer: &Layer,
        angles: &[[f32; 2]],
        slot: Option<TokenSlot>,
        qkv: &mut [f32],
        worker: &mut Worker,
    ) {
        let head_dim = self.config.head_dim;
        let (q, kv) = qkv.split_at_mut(self.config.heads * head_dim);
        let (k, v) = kv.split_at_mut(self.config.kv_heads * head_dim);
        for (linear, row) in [
            (&layer.query, &mut *q),
            (&layer.key, &mut *k),
            (&layer.value, &mut *v),
        ] {
            if let Some(bias) = &linear.bias {
                add_assign(self.isa, row, bias);
            }
        }
        for (norm, row) in [(&layer.query_norm, &mut *q), (&layer.key_norm, &mut *k)] {
            if let Some(norm) = norm {
                self.normalise_heads(norm, row, &mut worker.normalised);
            }
        }
        let style = self.config.rope.style;
        rotate(self.isa, q, head_dim, style, angles, self.config.attention_scale);
        rotate(self.isa, k, head_dim, style, angles, 1.0);
        if let Some(slot) = slot {
            // SAFETY: the caller's promise is ours.
            unsafe { self.pool.write(self.isa, slot, k, v, &mut worker.rounded) };
        }
    }

    /// Normalises as many elements at a time as the norm has weights: a head, or all heads.
    fn normalise_heads(&self, norm: &[f32], row: &mut [f32], spare: &mut Vec<f32>) {
        spare.resize(norm.len(), 0.0);
        for part in row.chunks_exact_mut(norm.len()) {
            rms_norm(self.isa, part, norm, self.config.norm_epsilon, spare);
            part.copy_from_slice(spare);
        }
    }

    /// The epilogue of the feed-forward gate.
    pub(super) fn gate(&self) -> Epilogue {
        match self.config.family.activation {
            Activation::Silu => Epilogue::SiluGate,
            Activation::GeluTanh => Epilogue::GeluGate,
        }
    }

    /// Adds the attention's output to the stream.
    fn mix(
        &self,
        rows: usize,
        layer: &Layer,
        threads: &mut Threads,
        buffers: &mut Buffers,
    ) -> Result<(), JobPanicked> {
        let Buffers {
            stream,
            branch,
            input,
            ..
        } = buffers;
        let hidden = self.config.hidden;
        let Linear { matrix, bias } = &layer.attention_output;
        if matrix.quantised() {
            self.quantise(rows, matrix.cols(), input, threads)?;
        }
        let norm = layer.post_attention_norm.as_deref();
        let (out, epilogue) = match norm {
            Some(_) => (&mut *branch, Epilogue::Store),
            None => (&mut *stream, Epilogue::Add),
        };
        let product = Product {
            matrices: &[(matrix, epilogue)],
            first_column: 0,
        };
        self.multiply(rows, input, &[product], out, hidden, threads)?;
        if let Some(bias) = bias {
            for row in out.chunks_exact_mut(hidden).take(rows) {
                add_assign(self.isa, row, bias);
            }
        }
        match norm {
            Some(_) => self.add_branch(rows, branch, norm, &mut input.dense, stream, threads),
            None => Ok(()),
        }
    }

    /// Adds the feed-forward layer to the stream.
    fn feed_forward(
        &self,
        rows: usize,
        layer: &Layer,
        threads: &mut Threads,
        buffers: &mut Buffers,
    ) -> Result<(), JobPanicked> {
        let before = layer.feed_forward_norm.as_deref();
        let after = layer.post_feed_forward_norm.as_deref();
        let Buffers {
            stream,
            branch,
            input,
            gated,
            routed,
            ..
        } = buffers;
        match &layer.feed_forward {
            FeedForward::Dense(weights) => {
                let quantised = weights.gate.quantised() || weights.up.quantised();
                self.normalise(rows, stream, before, quantised, input, threads)?;
                let (out, epilogue) = match after {
                    Some(_) => (&mut *branch, Epilogue::Store),
                    None => (&mut *stream, Epilogue::Add),
                };
                self.gated(rows, weights, (input, gated), (out, epilogue), threads)?;
                if after.is_none() {
                    return Ok(());
                }
            }
            FeedForward::Experts { router, experts } => {
                let mixture = Mixture {
                    experts: self
                        .config
                        .experts
                        .expect("the weights are those of the configuration"),
                    router,
                    weights: experts,
                };
                self.normalise(rows, stream, before, mixture.quantised(), input, threads)?;
                self.through_experts(rows, &mixture, input, routed, branch, threads)?;
            }
        }
        self.add_branch(rows, branch, after, &mut input.dense, stream, threads)
    }

    /// The gated layer that all rows go through.
    fn gated(
        &self,
        rows: usize,
        weights: &Gated,
        (input, gated): (&Operand, &mut Operand),
        (out, epilogue): (&mut [f32], Epilogue),
        threads: &mut Threads,
    ) -> Result<(), JobPanicked> {
        let matrices = [(&weights.gate, Epilogue::Store), (&weights.up, self.gate())];
        let product = Product {
            matrices: &matrices,
            first_column: 0,
        };
        let width = self.config.intermediate;
        self.multiply(rows, input, &[product], &mut gated.dense, width, threads)?;
        if weights.down.quantised() {
            self.quantise(rows, width, gated, threads)?;
        }
        let product = Product {
            matrices: &[(&weights.down, epilogue)],
            first_column: 0,
        };
        self.multiply(rows, gated, &[product], out, self.config.hidden, threads)
    }

    /// Logits of the rows that are left.
    fn head(
        &self,
        rows: usize,
        norm: &[f32],
        head: &Matrix,
        threads: &mut Threads,
        buffers: &mut Buffers,
    ) -> Result<(), JobPanicked> {
        let Buffers {
            stream,
            input,
            logits,
            ..
        } = buffers;
        self.normalise(rows, stream, Some(norm), head.quantised(), input, threads)?;
        let product = Product {
            matrices: &[(head, Epilogue::Store)],
            first_column: 0,
        };
        let width = self.config.vocabulary;
        self.multiply(rows, input, &[product], logits, width, threads)?;
        let Some(cap) = self.config.logit_soft_cap else {
            return Ok(());
        };
        let logits = Shared::new(logits);
        for_rows(threads, rows, &|row| {
            // SAFETY: rows are disjoint.
            soft_cap_row(self.isa, unsafe { logits.range(row * width, width) }, cap);
        })
    }
}
