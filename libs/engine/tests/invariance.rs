//! A row's logits and KV are the same bits whoever shares its batch, however its sequence was cut into steps, whatever came from
//! the cache, and on any number of threads and any instruction set. In every weight format, both precisions and every KV format.

#![allow(unsafe_code)] // Tests compare the bytes of blocks.

use std::num::NonZeroUsize;
use std::sync::Arc;

use engine::fixture::{TinyModel, write_tiny_gguf, write_tiny_hf};
use engine::monolith::OwnMemory;
use engine::tensor::TensorFormat;
use engine::{Engine, Isa, LogitsWanted, Model, Numerics, Precision, SequenceStep};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use types::{BlockId, KvDtype, KvLayout, Memory, Token};

fn load(format: TensorFormat, numerics: impl Into<Numerics>) -> Arc<Model> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tiny.gguf");
    // Head sizes that are no multiple of a vector, and outputs that are no multiple of a tile.
    let shape = TinyModel {
        heads: 4,
        kv_heads: 2,
        head_dim: if format.block_elements() == 256 { 64 } else { 40 },
        hidden: 256,
        intermediate: 256,
        vocabulary: 333,
        format,
        ..Default::default()
    };
    let shape = if format.block_elements() == 32 {
        TinyModel {
            head_dim: 24,
            heads: 4,
            ..shape
        }
    } else {
        shape
    };
    write_tiny_gguf(&path, &shape).expect("a model file");
    Model::load(&path, numerics).expect("the model loads")
}

/// A pool full of bytes that are NaN as floats, and not 0 as bytes.
fn pool(layout: &KvLayout, blocks: usize) -> Arc<OwnMemory> {
    let memory = OwnMemory::allocate(blocks * layout.block_bytes()).expect("memory");
    // SAFETY: the memory is new, and nobody else has it.
    unsafe { memory.base().as_ptr().write_bytes(0xff, memory.len()) };
    Arc::new(memory)
}

fn bytes(memory: &OwnMemory, layout: &KvLayout, block: BlockId) -> Vec<u8> {
    let size = layout.block_bytes();
    // SAFETY: the block is in the memory, and no step runs.
    unsafe { std::slice::from_raw_parts(memory.base().as_ptr().add(block.0 as usize * size), size) }.to_vec()
}

fn put(memory: &OwnMemory, layout: &KvLayout, block: BlockId, bytes: &[u8]) {
    let size = layout.block_bytes();
    assert_eq!(bytes.len(), size, "a whole block");
    // SAFETY: as above.
    unsafe {
        memory
            .base()
            .as_ptr()
            .add(block.0 as usize * size)
            .copy_from_nonoverlapping(bytes.as_ptr(), size)
    };
}

/// What one sequence gives when it is computed alone, in one step, on one thread.
struct Reference {
    /// Bits of `[row][vocabulary]`.
    logits: Vec<Vec<u32>>,
    blocks: Vec<Vec<u8>>,
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

fn reference(model: &Arc<Model>, layout: KvLayout, tokens: &[Token]) -> Reference {
    let blocks: Vec<BlockId> = (0..layout.blocks_for(tokens.len()) as u32).map(BlockId).collect();
    let memory = pool(&layout, blocks.len());
    let mut engine = Engine::new(
        Arc::clone(model),
        Arc::clone(&memory) as _,
        layout,
        NonZeroUsize::MIN,
    )
    .expect("engine");
    let step = SequenceStep {
        tokens,
        start: 0,
        blocks: &blocks,
        cached_tokens: 0,
        logits: LogitsWanted::All,
    };
    let logits = engine.step(&[step], &mut ()).expect("a step");
    let logits = (0..logits.rows()).map(|row| bits(logits.row(row))).collect();
    Reference {
        logits,
        blocks: blocks
            .iter()
            .map(|block| bytes(&memory, &layout, *block))
            .collect(),
    }
}

/// One sequence of a case.
#[derive(Debug, Clone)]
struct Sequence {
    tokens: Vec<Token>,
    /// Tokens whose KV comes from elsewhere.
    cached: usize,
    /// Cached tokens that are computed again, for their logits.
    recomputed: usize,
    /// Rows of its steps, in turn; 0 leaves a step out.
    chunks: Vec<usize>,
}

#[derive(Debug, Clone)]
struct Case {
    sequences: Vec<Sequence>,
    block_tokens: usize,
    threads: usize,
    isa: usize,
    /// Turns the order of blocks in the pool.
    rotation: usize,
}

fn sequence() -> impl Strategy<Value = Sequence> {
    let length = prop_oneof![6 => 1usize..70, 1 => 250usize..300, 1 => 500usize..530];
    let chunk = prop_oneof![4 => 0usize..6, 2 => 6usize..40, 1 => 40usize..300];
    (
        length,
        any::<u32>(),
        0.0f64..1.0,
        0.0f64..1.0,
        prop::collection::vec(chunk, 1..6),
    )
        .prop_map(|(length, seed, cached, recomputed, mut chunks)| {
            let cached = ((length + 1) as f64 * cached) as usize;
            let recomputed = ((cached + 1) as f64 * recomputed) as usize;
            if chunks.iter().all(|chunk| *chunk == 0) {
                chunks.push(1);
            }
            let token = |i: u32| (seed.wrapping_mul(2_654_435_761).wrapping_add(i * i * 977) >> 7) % 333;
            Sequence {
                tokens: (0..length as u32).map(token).collect(),
                cached,
                recomputed,
                chunks,
            }
        })
}

fn case() -> impl Strategy<Value = Case> {
    (
        prop::collection::vec(sequence(), 1..5),
        0usize..3,
        1usize..4,
        any::<usize>(),
        any::<usize>(),
    )
        .prop_map(|(sequences, size, threads, isa, rotation)| Case {
            sequences,
            block_tokens: [8, 16, 64][size],
            threads,
            isa,
            rotation,
        })
}

fn check(model: &Arc<Model>, case: &Case) {
    let layout = model.layout(case.block_tokens);
    let references: Vec<Reference> = case
        .sequences
        .iter()
        .map(|sequence| reference(model, layout, &sequence.tokens))
        .collect();
    let counts: Vec<usize> = references
        .iter()
        .map(|reference| reference.blocks.len())
        .collect();
    let total: usize = counts.iter().sum();
    let memory = pool(&layout, total);
    let mut ids = (0..total).map(|i| BlockId(((i + case.rotation % total) % total) as u32));
    let tables: Vec<Vec<BlockId>> = counts
        .iter()
        .map(|count| ids.by_ref().take(*count).collect())
        .collect();
    for ((sequence, table), reference) in case.sequences.iter().zip(&tables).zip(&references) {
        for (block, bytes) in table
            .iter()
            .zip(&reference.blocks)
            .take(layout.blocks_for(sequence.cached))
        {
            put(&memory, &layout, *block, bytes);
        }
    }
    let available = Isa::available();
    let isa = available[case.isa % available.len()];
    let threads = NonZeroUsize::new(case.threads).expect("not zero");
    let mut engine =
        Engine::with_isa(Arc::clone(model), Arc::clone(&memory) as _, layout, threads, isa).expect("engine");
    let mut positions: Vec<usize> = case
        .sequences
        .iter()
        .map(|sequence| sequence.cached - sequence.recomputed)
        .collect();
    for turn in 0.. {
        let mut batch = Vec::new();
        let mut rows = Vec::new();
        for (index, sequence) in case.sequences.iter().enumerate() {
            let start = positions[index];
            let chunk = sequence.chunks[turn % sequence.chunks.len()].min(sequence.tokens.len() - start);
            if chunk > 0 {
                let tokens = &sequence.tokens[start..start + chunk];
                let (blocks, cached_tokens) = (&tables[index], sequence.cached);
                let wanted = [
                    LogitsWanted::All,
                    LogitsWanted::Last,
                    LogitsWanted::None,
                    LogitsWanted::All,
                ];
                let logits = wanted[(turn + index + case.rotation) % 4];
                batch.push(SequenceStep {
                    tokens,
                    start,
                    blocks,
                    cached_tokens,
                    logits,
                });
                positions[index] += chunk;
                rows.extend(match logits {
                    LogitsWanted::All => (start..start + chunk).map(|position| (index, position)).collect(),
                    LogitsWanted::Last => vec![(index, start + chunk - 1)],
                    LogitsWanted::None => Vec::new(),
                });
            }
        }
        if positions
            .iter()
            .zip(&case.sequences)
            .all(|(position, sequence)| *position == sequence.tokens.len())
            && batch.is_empty()
        {
            break;
        }
        let logits = engine.step(&batch, &mut ()).expect("a step");
        assert_eq!(logits.rows(), rows.len());
        for (row, (index, position)) in rows.into_iter().enumerate() {
            let expected = &references[index].logits[position];
            assert!(
                bits(logits.row(row)) == *expected,
                "logits of sequence {index}, position {position}, {isa:?}"
            );
        }
    }
    for (index, (table, reference)) in tables.iter().zip(&references).enumerate() {
        for (at, (block, expected)) in table.iter().zip(&reference.blocks).enumerate() {
            assert!(
                bytes(&memory, &layout, *block) == *expected,
                "KV of sequence {index}, block {at}, {isa:?}"
            );
        }
    }
}

fn run(format: TensorFormat, numerics: impl Into<Numerics>, cases: u32) {
    let numerics = numerics.into();
    run_model(
        &load(format, numerics),
        &format!("{format:?}, {numerics:?}"),
        cases,
    );
}

fn run_model(model: &Arc<Model>, what: &str, cases: u32) {
    let mut runner = TestRunner::new(Config {
        cases,
        ..Config::default()
    });
    let result = runner.run(&case(), |case| {
        check(model, &case);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{what}: {error}");
    }
}

#[rstest::rstest]
fn bits_do_not_depend_on_how_the_work_was_cut(
    #[values(
        TensorFormat::F32,
        TensorFormat::F16,
        TensorFormat::Bf16,
        TensorFormat::Q8_0,
        TensorFormat::Q4_0,
        TensorFormat::Q4_1,
        TensorFormat::Q5_0,
        TensorFormat::Q5_1,
        TensorFormat::Q4K,
        TensorFormat::Q5K,
        TensorFormat::Q6K
    )]
    format: TensorFormat,
) {
    run(format, Precision::Fast, 12);
}

#[rstest::rstest]
fn bits_do_not_depend_on_how_the_work_was_cut_in_any_precision_and_kv_format(
    #[values(Precision::Exact, Precision::Fast)] precision: Precision,
    #[values(KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Int8)] kv: KvDtype,
) {
    run(TensorFormat::Q4_1, Numerics { precision, kv }, 66);
}

/// Windows, soft caps, norms of queries and keys, layers that do not rotate, experts: nothing of it may see how the work was cut.
#[rstest::rstest]
fn bits_of_no_family_depend_on_how_the_work_was_cut(
    #[values(
        "mistral", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "smollm3", "olmo2"
    )]
    family: &'static str,
) {
    let directory = tempfile::tempdir().expect("a directory");
    let tiny = TinyModel {
        vocabulary: 333,
        ..TinyModel::of(family)
    };
    write_tiny_hf(directory.path(), &tiny, 1).expect("a model");
    let model = Model::load(directory.path(), Precision::Fast).expect("the model loads");
    run_model(&model, &format!("{family} from a directory"), 6);
    // llama.cpp has no windows of Mistral and Qwen, so quantised weights are tested with the others'.
    let path = directory.path().join("tiny.gguf");
    let quantised = TinyModel {
        format: TensorFormat::Q8_0,
        ..tiny
    };
    if family != "mistral" {
        write_tiny_gguf(&path, &quantised).expect("a model");
        let model = Model::load(&path, Precision::Fast).expect("the model loads");
        run_model(&model, &format!("{family} in Q8_0"), 6);
    }
}

#[test]
fn bits_of_fp8_weights_do_not_depend_on_how_the_work_was_cut() {
    let directory = tempfile::tempdir().expect("a directory");
    let tiny = TinyModel {
        vocabulary: 333,
        format: TensorFormat::F8E4M3,
        ..TinyModel::of("qwen3moe")
    };
    write_tiny_hf(directory.path(), &tiny, 1).expect("a model");
    let model = Model::load(directory.path(), Precision::Fast).expect("the model loads");
    run_model(&model, "FP8", 6);
}

/// With few rows, attention over a long context is split among threads.
#[test]
fn decoding_after_a_long_prompt_gives_the_bits_of_prefill() {
    let model = load(TensorFormat::Q4_1, Precision::Fast);
    let tokens = (0..600u32).map(|i| (i * i * 31 + 7) % 333).collect();
    // The long chunk comes once; the rest is decoded token by token.
    let chunks = [vec![590], vec![1; 10]].concat();
    let sequence = Sequence {
        tokens,
        cached: 0,
        recomputed: 0,
        chunks,
    };
    for isa in 0..Isa::available().len() {
        // Logits of every step are asked for in one of the four rotations.
        for rotation in 0..4 {
            let case = Case {
                sequences: vec![sequence.clone()],
                block_tokens: 32,
                threads: 3,
                isa,
                rotation,
            };
            check(&model, &case);
        }
    }
}
