//! 32,768 tokens in bounded memory, with the scalings of RoPE that take models there.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use engine::fixture::{TinyModel, write_tiny_hf};
use engine::monolith::OwnMemory;
use engine::tensor::TensorFormat;
use engine::{Engine, LogitsWanted, Model, Precision, SequenceStep, StepError};
use rstest::rstest;
use serde_json::{Value, json};
use types::{BlockId, KvLayout, Token};

const CONTEXT: usize = 32_768;
const BLOCK_TOKENS: usize = 32;
/// What the process may take beside the KV: working memory, model, binary.
const MEMORY_BESIDE_KV: usize = 256 << 20;

fn model(folder: &Path, scaling: &Value, precision: Precision) -> Arc<Model> {
    let tiny = TinyModel {
        layers: 1,
        heads: 2,
        kv_heads: 1,
        hidden: 64,
        intermediate: 64,
        format: TensorFormat::F32,
        ..TinyModel::default()
    };
    write_tiny_hf(folder, &tiny, 1).expect("a model");
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).expect("the configuration");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    config["max_position_embeddings"] = CONTEXT.into();
    config["rope_scaling"] = scaling.clone();
    std::fs::write(&path, config.to_string()).expect("written");
    Model::load(folder, precision).expect("the model loads")
}

fn engine(model: &Arc<Model>, layout: KvLayout) -> Engine {
    let bytes = layout.blocks_for(CONTEXT) * layout.block_bytes();
    let memory = Arc::new(OwnMemory::allocate(bytes).expect("memory"));
    let two = NonZeroUsize::MIN.saturating_add(1);
    Engine::new(Arc::clone(model), memory, layout, two).expect("an engine")
}

/// Bits of the last logits, after chunks of so many tokens.
fn last_logits(model: &Arc<Model>, tokens: &[Token], chunk: usize) -> Vec<u32> {
    let layout = model.layout(BLOCK_TOKENS);
    let blocks: Vec<BlockId> = (0..layout.blocks_for(CONTEXT) as u32).map(BlockId).collect();
    let mut engine = engine(model, layout);
    let mut last = Vec::new();
    for (index, tokens) in tokens.chunks(chunk).enumerate() {
        let step = SequenceStep {
            tokens,
            start: index * chunk,
            blocks: &blocks,
            cached_tokens: 0,
            logits: LogitsWanted::Last,
        };
        let logits = engine.step(&[step], &mut ()).expect("a step");
        last = logits.row(0).iter().map(|logit| logit.to_bits()).collect();
    }
    last
}

/// The most memory that this process has had.
#[cfg(target_os = "linux")]
fn memory_peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: usize = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kibibytes << 10)
}

#[rstest]
#[case(json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192 }), Precision::Exact)]
#[case(json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192 }), Precision::Fast)]
#[case(json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 4096 }), Precision::Fast)]
fn a_long_prompt_has_the_same_bits_in_chunks_of_any_size_and_bounded_memory(
    #[case] scaling: Value,
    #[case] precision: Precision,
) {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model(folder.path(), &scaling, precision);
    let vocabulary = model.config().vocabulary as u32;
    let tokens: Vec<Token> = (0..CONTEXT as u32)
        .map(|i| i.wrapping_mul(2_654_435_761) % vocabulary)
        .collect();
    let expected = last_logits(&model, &tokens, 2048);
    assert!(expected.iter().all(|bits| f32::from_bits(*bits).is_finite()));
    assert_eq!(last_logits(&model, &tokens, 509), expected);
    // Its beginning matters to the last token.
    let mut other = tokens.clone();
    other[1] = (other[1] + 1) % vocabulary;
    assert_ne!(last_logits(&model, &other, 2048), expected);
    #[cfg(target_os = "linux")]
    {
        let layout = model.layout(BLOCK_TOKENS);
        let kv = layout.blocks_for(CONTEXT) * layout.block_bytes();
        let peak = memory_peak().expect("the system tells");
        assert!(peak < kv + MEMORY_BESIDE_KV, "{} MiB", peak >> 20);
    }
}

#[test]
fn what_is_beyond_the_context_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = model(folder.path(), &Value::Null, Precision::Fast);
    let layout = model.layout(BLOCK_TOKENS);
    let blocks: Vec<BlockId> = (0..layout.blocks_for(CONTEXT) as u32 + 1).map(BlockId).collect();
    let step = SequenceStep {
        tokens: &[1, 2],
        start: CONTEXT - 1,
        blocks: &blocks,
        cached_tokens: CONTEXT - 1,
        logits: LogitsWanted::Last,
    };
    let refused = engine(&model, layout).step(&[step], &mut ()).map(|_| ());
    assert!(matches!(
        refused,
        Err(StepError::Context {
            tokens: 32_769,
            context_tokens_max: CONTEXT,
            ..
        })
    ));
}
