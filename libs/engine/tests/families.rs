//! Every family's tiny model against `transformers` (`scripts/reference_families.py` wrote what it makes of it), and its two containers
//! against each other.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use engine::family::FAMILIES;
use engine::fixture::{TinyModel, write_tiny_gguf, write_tiny_hf};
use engine::monolith::Monolith;
use engine::tensor::TensorFormat;
use engine::{LogitsWanted, Model, Precision};
use serde_json::Value;
use types::Token;

const BLOCK_TOKENS: usize = 32;
const CONTEXT: usize = 512;
const THREADS: NonZeroUsize = NonZeroUsize::new(2).expect("not zero");

/// Logits of the tiny models deviate by about 1 from 0, those of SmolLM3, whose head is its embedding, by 16. `exact` computes what the
/// reference does in another order: 1e-5 was measured, and 4e-5 for SmolLM3.
const EXACT: f32 = 1e-3;

/// `fast` rounds K and V to 11 bits: by up to 5e-4 of each, which attention averages out and two to six layers add up again. 1.2e-3
/// was measured at a deviation of 1, and 1.3e-2 at 16.
const FAST: f32 = 3e-3;

/// Of the logits' deviation: 8 bits round a column by up to 1/254 of its block's greatest.
const QUANTISED: f64 = 0.05;

/// A prompt, some of its rows, and the reference's logits of each.
struct Prompt {
    tokens: Vec<Token>,
    rows: Vec<usize>,
    logits: Vec<Vec<f32>>,
}

fn reference(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/reference/{case}.json"))
}

fn prompts(case: &str) -> (usize, Vec<Prompt>) {
    let text = std::fs::read_to_string(reference(case)).expect("reference");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let integers = |value: &Value| -> Vec<u64> {
        let array = value.as_array().expect("array");
        array.iter().map(|x| x.as_u64().expect("integer")).collect()
    };
    let floats = |value: &Value| -> Vec<f32> {
        let array = value.as_array().expect("array");
        array.iter().map(|x| x.as_f64().expect("number") as f32).collect()
    };
    let prompts = json["prompts"].as_array().expect("prompts").iter();
    let prompts = prompts
        .map(|prompt| Prompt {
            tokens: integers(&prompt["tokens"])
                .iter()
                .map(|token| *token as Token)
                .collect(),
            rows: integers(&prompt["rows"])
                .iter()
                .map(|row| *row as usize)
                .collect(),
            logits: prompt["logits"]
                .as_array()
                .expect("rows")
                .iter()
                .map(floats)
                .collect(),
        })
        .collect();
    (
        json["vocabulary_step"].as_u64().expect("a step") as usize,
        prompts,
    )
}

fn load_directory(model: &TinyModel, precision: Precision) -> Arc<Model> {
    let directory = tempfile::tempdir().expect("a directory");
    write_tiny_hf(directory.path(), model, 2).expect("a model");
    Model::load(directory.path(), precision).expect("the model loads")
}

fn load_gguf(model: &TinyModel, precision: Precision) -> Arc<Model> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("tiny.gguf");
    write_tiny_gguf(&path, model).expect("a model");
    Model::load(&path, precision).expect("the model loads")
}

/// Logits of all rows, `[row][vocabulary]`.
fn logits(model: &Arc<Model>, tokens: &[Token]) -> Vec<Vec<f32>> {
    let mut monolith = Monolith::new(Arc::clone(model), BLOCK_TOKENS, CONTEXT, THREADS).expect("a monolith");
    let logits = monolith.logits(tokens, 0, LogitsWanted::All).expect("logits");
    let vocabulary = model.config().vocabulary;
    logits.chunks_exact(vocabulary).map(<[f32]>::to_vec).collect()
}

/// The greatest difference from the reference.
fn deviation(model: &Arc<Model>, case: &str) -> f32 {
    let (step, prompts) = prompts(case);
    let mut greatest = 0.0f32;
    for prompt in prompts {
        let found = logits(model, &prompt.tokens);
        for (row, expected) in prompt.rows.iter().zip(&prompt.logits) {
            for (found, expected) in found[*row].iter().step_by(step).zip(expected) {
                let difference = (found - expected).abs();
                assert!(difference.is_finite(), "{case}, row {row}: {found}");
                greatest = greatest.max(difference);
            }
        }
    }
    greatest
}

#[rstest::rstest]
fn both_precisions_give_the_logits_of_transformers(
    #[values(
        "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "smollm3",
        "olmo2"
    )]
    family: &'static str,
) {
    let model = load_directory(&TinyModel::of(family), Precision::Exact);
    let found = deviation(&model, family);
    println!("{family}: exact within {found:.6}");
    assert!(found <= EXACT, "{family}: off by {found}");
    let model = load_directory(&TinyModel::of(family), Precision::Fast);
    let found = deviation(&model, family);
    println!("{family}: fast within {found:.6}");
    let scale = if family == "smollm3" { 16.0 } else { 1.0 };
    assert!(found <= FAST * scale, "{family}: off by {found}");
}

#[test]
fn every_family_has_a_reference() {
    for family in &FAMILIES {
        assert!(reference(family.name).exists(), "{}", family.name);
    }
}

/// Activations are rounded to 8 bits, twice where it matters: a wrong scale or a row of another's would show as whole logits.
#[rstest::rstest]
fn fast_stays_near_exact_where_weights_are_quantised(
    #[values(
        "llama", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "smollm3", "olmo2"
    )]
    family: &'static str,
) {
    let tokens: Vec<Token> = (0..100).map(|i| (i * i * 31 + 7) % 320).collect();
    let model = TinyModel {
        format: TensorFormat::Q8_0,
        ..TinyModel::of(family)
    };
    let exact = logits(&load_gguf(&model, Precision::Exact), &tokens);
    let fast = logits(&load_gguf(&model, Precision::Fast), &tokens);
    let (mut squares, mut errors) = (0.0f64, 0.0f64);
    for (exact, fast) in exact.iter().flatten().zip(fast.iter().flatten()) {
        squares += f64::from(*exact).powi(2);
        errors += f64::from(exact - fast).powi(2);
    }
    let relative = (errors / squares).sqrt();
    println!("{family}: Q8_0 fast within {relative:.4} of exact");
    assert!(relative < QUANTISED, "{family}: {relative}");
}

#[test]
fn the_documentation_lists_every_family() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/models.md");
    let text = std::fs::read_to_string(path).expect("docs/models.md");
    for family in &FAMILIES {
        let begins = format!("| {} | `{}`", family.title, family.hugging_face);
        let row = text.lines().find(|line| line.starts_with(&begins));
        let row = row.unwrap_or_else(|| panic!("docs/models.md has no row {begins}"));
        let architecture = format!("| `{}`", family.gguf.unwrap_or("llama"));
        assert!(row.contains(&architecture), "{row} has no {architecture}");
        if let Some(wrapper) = &family.wrapper {
            assert!(row.contains(wrapper.hugging_face), "{row}");
        }
    }
}

#[test]
fn fp8_weights_are_what_torch_makes_of_them() {
    let model = TinyModel {
        format: TensorFormat::F8E4M3,
        ..TinyModel::of("qwen3")
    };
    let found = deviation(&load_directory(&model, Precision::Exact), "qwen3_fp8");
    println!("qwen3_fp8: exact within {found:.6}");
    assert!(found <= EXACT, "off by {found}");
    let found = deviation(&load_directory(&model, Precision::Fast), "qwen3_fp8");
    println!("qwen3_fp8: fast within {found:.6}");
    assert!(found <= FAST, "off by {found}");
}

#[rstest::rstest]
fn both_containers_give_the_same_logits(
    #[values(
        "llama", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "smollm3", "olmo2"
    )]
    family: &'static str,
) {
    let tokens: Vec<Token> = (0..100).map(|i| (i * i * 31 + 7) % 320).collect();
    let model = TinyModel {
        windows: !family.starts_with("qwen"),
        ..TinyModel::of(family)
    };
    let directory = logits(&load_directory(&model, Precision::Exact), &tokens);
    let gguf = logits(&load_gguf(&model, Precision::Exact), &tokens);
    for (row, (a, b)) in directory.iter().zip(&gguf).enumerate() {
        let greatest = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(greatest <= 1e-4, "{family}, row {row}: {greatest}");
    }
}
