//! Attention of a chunk of 512 rows behind a long context, beside a naive one that keeps all scores.
//!
//! `cargo run --release -p engine --example attention`
//!
//! Ours is the difference between a step of 512 rows behind so many positions and one at the beginning, in a model with the
//! heads of SmolLM2 (9 queries, 3 of K and V, 64 elements): so it is one layer's attention alone, out of blocks of 32 tokens, `f16`. The naive one
//! has K and V in `f32` and in order, computes all scores of a head, their softmax, and the weighted sums, with the processor's vectors
//! as the compiler uses them. One thread each, best of three runs.

#![allow(unsafe_code)]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::fixture::{TinyModel, write_tiny_gguf};
use engine::monolith::OwnMemory;
use engine::{Engine, LogitsWanted, Model, Precision, SequenceStep};
use types::{BlockId, Token};

const ROWS: usize = 512;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const CONTEXTS: [usize; 4] = [1024, 2048, 4096, 8192];
const BLOCK_TOKENS: usize = 32;
const RUNS: usize = 3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::temp_dir().join(format!("attention-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("tiny.gguf");
    let shape = TinyModel {
        // Of the last one only K and V are computed, since no logits are wanted.
        layers: 2,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        ..TinyModel::default()
    };
    write_tiny_gguf(&path, &shape)?;
    let model = Model::load(&path, Precision::Fast)?;
    std::fs::remove_dir_all(&folder)?;
    let layout = model.layout(BLOCK_TOKENS);
    let count = layout.blocks_for(CONTEXTS[3]);
    let memory = Arc::new(OwnMemory::allocate(count * layout.block_bytes())?);
    let blocks: Vec<BlockId> = (0..count as u32).map(BlockId).collect();
    let tokens: Vec<Token> = (0..ROWS as u32).map(|i| i * 31 % 300).collect();
    let mut engine = Engine::new(Arc::clone(&model), memory, layout, NonZeroUsize::MIN)?;
    let mut step = |start: usize| {
        let step = SequenceStep {
            tokens: &tokens,
            start,
            blocks: &blocks,
            cached_tokens: 0,
            logits: LogitsWanted::None,
        };
        let began = Instant::now();
        engine.step(&[step], &mut ()).map(|_| began.elapsed())
    };
    for start in (0..CONTEXTS[3]).step_by(ROWS) {
        step(start)?;
    }
    println!(
        "| positions | Perigee, ms | naive, ms | ratio | naive scores, MiB |\n| --- | --- | --- | --- | --- |"
    );
    for context in CONTEXTS {
        let (mut ours, mut alone, mut naive) = (Duration::MAX, Duration::MAX, Duration::MAX);
        for _ in 0..RUNS {
            ours = ours.min(step(context - ROWS)?);
            alone = alone.min(step(0)?);
            naive = naive.min(run_naive(context));
        }
        let ours = ours.saturating_sub(alone).as_secs_f64() * 1e3;
        let naive = naive.as_secs_f64() * 1e3;
        let scores = (ROWS * context * size_of::<f32>()) >> 20;
        println!(
            "| {context} | {ours:.1} | {naive:.1} | {:.1} | {scores} |",
            naive / ours
        );
    }
    Ok(())
}

/// What the naive one takes beyond the rows' own 512 positions, as ours is measured.
fn run_naive(context: usize) -> Duration {
    let noise = |count: usize| -> Vec<f32> {
        (0..count)
            .map(|i| (i * 7919 % 4099) as f32 / 4099.0 - 0.5)
            .collect()
    };
    let (queries, keys, values) = (
        noise(ROWS * HEAD_DIM),
        noise(context * HEAD_DIM),
        noise(context * HEAD_DIM),
    );
    let mut scores = vec![0.0; ROWS * context];
    let mut out = vec![0.0; ROWS * HEAD_DIM];
    let mut once = |context: usize| {
        let began = Instant::now();
        for _ in 0..HEADS {
            naive(
                &queries,
                &keys[..context * HEAD_DIM],
                &values[..context * HEAD_DIM],
                &mut scores,
                &mut out,
            );
            black_box(&mut out);
        }
        began.elapsed()
    };
    let whole = once(context);
    whole.saturating_sub(once(ROWS))
}

fn naive(queries: &[f32], keys: &[f32], values: &[f32], scores: &mut [f32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        #[target_feature(enable = "avx2,fma")]
        fn vectors(queries: &[f32], keys: &[f32], values: &[f32], scores: &mut [f32], out: &mut [f32]) {
            naive_lanes(queries, keys, values, scores, out);
        }
        // SAFETY: the processor has the features, as just found.
        unsafe { vectors(queries, keys, values, scores, out) };
        return;
    }
    naive_lanes(queries, keys, values, scores, out);
}

#[inline(always)]
fn naive_lanes(queries: &[f32], keys: &[f32], values: &[f32], scores: &mut [f32], out: &mut [f32]) {
    let context = keys.len() / HEAD_DIM;
    let rows = queries.len() / HEAD_DIM;
    for (row, query) in queries.chunks_exact(HEAD_DIM).enumerate() {
        let seen = context - rows + row + 1;
        let scores = &mut scores[row * context..][..seen];
        for (score, key) in scores.iter_mut().zip(keys.chunks_exact(HEAD_DIM)) {
            let mut sums = [0.0_f32; 8];
            for (query, key) in query.chunks_exact(8).zip(key.chunks_exact(8)) {
                for lane in 0..8 {
                    sums[lane] += query[lane] * key[lane];
                }
            }
            *score = sums.iter().sum();
        }
        let greatest = scores
            .iter()
            .fold(f32::MIN, |greatest, score| greatest.max(*score));
        let mut total = 0.0;
        for score in scores.iter_mut() {
            *score = (*score - greatest).exp();
            total += *score;
        }
        let out = &mut out[row * HEAD_DIM..][..HEAD_DIM];
        out.fill(0.0);
        for (score, value) in scores.iter().zip(values.chunks_exact(HEAD_DIM)) {
            let weight = score / total;
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight * value;
            }
        }
    }
}
