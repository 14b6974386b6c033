//! The order of operations of a step.
//!
//! Work is handed to the threads in jobs whose items write disjoint elements: rows, blocks, heads, or tiles of outputs. How a
//! job is cut depends on the batch and the threads; what an element gets does not.

use std::ops::ControlFlow;

use super::attend::Item;
use super::plan::{Plan, Run};
use super::product::{Operand, Product, ROWS_INLINE, grow};
use super::{Engine, Logits, SequenceStep, StepError, StepObserver};
use crate::compute::Isa;
use crate::compute::attention;
use crate::compute::kv::{Pool, Rounded, TokenSlot};
use crate::compute::math::add_assign;
use crate::compute::matrix::{Epilogue, Matrix};
use crate::compute::rope::{RopeTable, rotate};
use crate::compute::shared::Shared;
use crate::config::ModelConfig;
use crate::model::{Layer, Linear};
use crate::threads::{JobPanicked, Threads};

/// Working memory, grown to the largest step so far.
pub(super) struct Buffers {
    /// Residual stream, `[row][hidden]`.
    stream: Vec<f32>,
    /// The normalised stream, or the attention's output.
    pub(super) input: Operand,
    /// Queries, keys and values of each row.
    pub(super) qkv: Vec<f32>,
    /// Gated feed-forward activations.
    gated: Operand,
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
}

impl Buffers {
    pub(super) fn new(threads: usize) -> Self {
        Self {
            stream: Vec::new(),
            input: Operand::new(),
            qkv: Vec::new(),
            gated: Operand::new(),
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
        self.gated.grow(rows, config.intermediate);
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
            buffers,
        } = self;
        let config = model.config();
        let context = Context {
            isa: *isa,
            config,
            pool,
            batch,
            rope,
        };
        buffers.prepare(plan, config);
        let tokens = batch.iter().flat_map(|step| step.tokens);
        for (row, token) in buffers.stream.chunks_exact_mut(config.hidden).zip(tokens) {
            model.weights.embedding.row(*token as usize, row);
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
        self.normalise(rows, stream, &layer.attention_norm, quantised, input, threads)?;
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

    /// Adds biases, rotates queries and keys, and writes keys and values to the blocks.
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
        let job = |worker: usize, item: usize| {
            let run = runs[item];
            // SAFETY: a worker runs one item at a time.
            let worker = &mut unsafe { workers.range(worker, 1) }[0];
            for row in 0..run.rows {
                // SAFETY: a row belongs to one run.
                let qkv = unsafe { qkv.range((run.row + row) * width, width) };
                let slot = self.slot(index, run, row);
                // SAFETY: `Plan` gives a block that is written to one run, and others may not use it during a step.
                unsafe { self.rotate_and_store_row(layer, run.position + row, slot, qkv, worker) };
            }
        };
        if rows <= ROWS_INLINE {
            (0..runs.len()).for_each(|item| job(0, item));
            return Ok(());
        }
        threads.run(runs.len(), &job)
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
        position: usize,
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
        let (style, angles) = (self.config.rope.style, self.rope.at(position));
        rotate(
            self.isa,
            q,
            head_dim,
            style,
            angles,
            1.0 / (head_dim as f32).sqrt(),
        );
        rotate(self.isa, k, head_dim, style, angles, 1.0);
        if let Some(slot) = slot {
            // SAFETY: the caller's promise is ours.
            unsafe { self.pool.write(self.isa, slot, k, v, &mut worker.rounded) };
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
        let Buffers { stream, input, .. } = buffers;
        let Linear { matrix, bias } = &layer.attention_output;
        if matrix.quantised() {
            self.quantise(rows, matrix.cols(), input, threads)?;
        }
        let product = Product {
            matrices: &[(matrix, Epilogue::Add)],
            first_column: 0,
        };
        self.multiply(rows, input, &[product], stream, self.config.hidden, threads)?;
        if let Some(bias) = bias {
            for row in stream.chunks_exact_mut(self.config.hidden).take(rows) {
                add_assign(self.isa, row, bias);
            }
        }
        Ok(())
    }

    /// Adds the gated feed-forward layer to the stream.
    fn feed_forward(
        &self,
        rows: usize,
        layer: &Layer,
        threads: &mut Threads,
        buffers: &mut Buffers,
    ) -> Result<(), JobPanicked> {
        let Buffers {
            stream, input, gated, ..
        } = buffers;
        let quantised = layer.gate.quantised() || layer.up.quantised();
        self.normalise(rows, stream, &layer.feed_forward_norm, quantised, input, threads)?;
        let matrices = [(&layer.gate, Epilogue::Store), (&layer.up, Epilogue::SiluGate)];
        let product = Product {
            matrices: &matrices,
            first_column: 0,
        };
        let width = self.config.intermediate;
        self.multiply(rows, input, &[product], &mut gated.dense, width, threads)?;
        if layer.down.quantised() {
            self.quantise(rows, width, gated, threads)?;
        }
        let product = Product {
            matrices: &[(&layer.down, Epilogue::Add)],
            first_column: 0,
        };
        self.multiply(rows, gated, &[product], stream, self.config.hidden, threads)
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
        self.normalise(rows, stream, norm, head.quantised(), input, threads)?;
        let product = Product {
            matrices: &[(head, Epilogue::Store)],
            first_column: 0,
        };
        self.multiply(rows, input, &[product], logits, self.config.vocabulary, threads)
    }
}
