use std::{fs, path::PathBuf};

use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};
use types::ErrorCode;

use super::*;
use crate::{
    config::{RopeScaling, RopeStyle},
    fixture::{GgufWriter, TinyModel, write_tiny_gguf, write_tiny_hf},
    tensor::TensorFormat,
};

fn real_model() -> PathBuf {
    match std::env::var_os("PERIGEE_MODEL") {
        Some(path) => path.into(),
        None => {
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/SmolLM2-135M-Instruct.Q4_1.gguf")
        }
    }
}

fn small() -> TinyModel {
    TinyModel {
        layers: 1,
        hidden: 32,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        intermediate: 32,
        vocabulary: 260,
        format: TensorFormat::F32,
        ..TinyModel::default()
    }
}

/// Opens these bytes as a file, with tokenizer and template, and reads every byte of the weights.
fn open_bytes(bytes: &[u8]) -> Result<ModelFile, LoadError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    let file = ModelFile::open(&path)?;
    let tokenizer = file.tokenizer()?;
    file.chat_template(&tokenizer)?;
    for name in file.tensors.keys() {
        file.tensor(name)?.to_f32();
    }
    Ok(file)
}

fn small_bytes() -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    write_tiny_gguf(&path, &small()).unwrap();
    fs::read(&path).unwrap()
}

fn refused(result: Result<ModelFile, LoadError>, expected: &str) -> LoadError {
    let error = result.expect_err(expected);
    let text = error.to_string();
    assert!(text.contains(expected), "{text:?} does not say {expected:?}");
    assert!(!matches!(error.code(), ErrorCode::Internal), "{text}");
    error
}

#[test]
fn the_real_model_is_understood() {
    let file = ModelFile::open(real_model()).unwrap();
    let config = file.config();
    assert_eq!(
        (config.layers, config.hidden, config.intermediate),
        (30, 576, 1536)
    );
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (9, 3, 64));
    assert_eq!((config.vocabulary, config.context_tokens_max), (49_152, 8192));
    assert_eq!((config.rope.theta, config.rope.dims), (100_000.0, 64));
    assert_eq!(
        (config.rope.style, &config.rope.scaling),
        (RopeStyle::Interleaved, &RopeScaling::None)
    );
    assert_eq!(config.norm_epsilon, 1e-5);
    assert_eq!(config.eos_tokens, [2]);
    assert!(config.tied_head);
    assert_eq!(config.architecture, "llama");

    let embedding = file.tensor("token_embd").unwrap();
    assert_eq!(
        (embedding.format, embedding.rows, embedding.cols),
        (TensorFormat::Q8_0, 49_152, 576)
    );
    assert_eq!(
        file.tensor("output").unwrap().bytes.as_ptr(),
        embedding.bytes.as_ptr()
    );
    let down = file.tensor("blk.29.ffn_down").unwrap();
    assert_eq!(
        (down.format, down.rows, down.cols),
        (TensorFormat::Q4_1, 576, 1536)
    );
    let norm = file.tensor("output_norm.weight").unwrap();
    assert_eq!((norm.format, norm.rows, norm.cols), (TensorFormat::F32, 1, 576));
    assert!(file.optional_tensor("blk.0.attn_q.bias").is_none());
    assert!(matches!(
        file.tensor("blk.30.attn_q"),
        Err(LoadError::MissingTensor { .. })
    ));
}

#[test]
fn the_digest_of_a_gguf_file_is_that_of_its_bytes() {
    let bytes = small_bytes();
    let file = open_bytes(&bytes).unwrap();
    assert_eq!(file.digest(), blake3::hash(&bytes).to_hex().as_str());
}

#[rstest]
#[case("config.json")]
#[case("tokenizer.json")]
#[case("tokenizer_config.json")]
#[case("generation_config.json")]
fn the_digest_of_a_directory_covers_every_file(#[case] name: &str) {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_hf(directory.path(), &small(), 2).unwrap();
    let before = ModelFile::open(directory.path()).unwrap().digest().to_owned();
    let path = directory.path().join(name);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text + "\n").unwrap();
    assert_ne!(ModelFile::open(directory.path()).unwrap().digest(), before);
}

// --- GGUF that is not what it should be.

/// A header with these counts and nothing after it.
fn header(magic: &[u8; 4], version: u32, tensors: u64, pairs: u64) -> Vec<u8> {
    [
        magic.as_slice(),
        &version.to_le_bytes(),
        &tensors.to_le_bytes(),
        &pairs.to_le_bytes(),
    ]
    .concat()
}

/// A header with one pair that begins `key: x, type` and goes on with these bytes.
fn with_value(value_type: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = header(b"GGUF", 3, 0, 1);
    bytes.extend(1u64.to_le_bytes());
    bytes.push(b'x');
    bytes.extend(value_type.to_le_bytes());
    bytes.extend(value);
    bytes
}

fn nested_arrays(depth: usize) -> Vec<u8> {
    let mut value = Vec::new();
    for _ in 0..depth {
        value.extend(9u32.to_le_bytes());
        value.extend(1u64.to_le_bytes());
    }
    with_value(9, &value)
}

const HUGE: u64 = 1 << 60;

#[rstest]
#[case::empty(vec![], "empty")]
#[case::short(b"GG".to_vec(), "beyond the end")]
#[case::other_magic(header(b"GGML", 3, 0, 0), "begins with \"GGML\"")]
#[case::version_1(header(b"GGUF", 1, 0, 0), "version 1 is not supported")]
#[case::version_4(header(b"GGUF", 4, 0, 0), "version 4 is not supported")]
#[case::big_endian(header(b"GGUF", 3u32.swap_bytes(), 0, 0), "big-endian")]
#[case::tensor_count(header(b"GGUF", 3, HUGE, 0), "1152921504606846976 tensors")]
#[case::pair_count(header(b"GGUF", 3, 0, HUGE), "1152921504606846976 metadata pairs")]
#[case::claimed_pairs(header(b"GGUF", 3, 0, 60_000), "beyond the end")]
#[case::claimed_tensors(header(b"GGUF", 3, 60_000, 0), "beyond the end")]
#[case::no_architecture(header(b"GGUF", 3, 0, 0), "general.architecture is missing")]
#[case::long_key([header(b"GGUF", 3, 0, 1), HUGE.to_le_bytes().to_vec()].concat(), "bytes, more than 65535")]
#[case::value_type(with_value(99, &[]), "unknown value type 99")]
#[case::truth_value(with_value(7, &[2]), "truth value 2")]
#[case::long_string(with_value(8, &HUGE.to_le_bytes()), "beyond the end")]
#[case::not_utf8(with_value(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), "not UTF-8")]
#[case::array_count(with_value(9, &[4u32.to_le_bytes().as_slice(), &HUGE.to_le_bytes()].concat()), "more than the file has bytes")]
#[case::deep_arrays(nested_arrays(10_000), "nests arrays deeper than 4")]
fn a_broken_header_is_refused(#[case] bytes: Vec<u8>, #[case] expected: &str) {
    refused(open_bytes(&bytes), expected);
}

/// What to change in the metadata of an otherwise whole model.
enum Change {
    String(&'static str, &'static str),
    U32(&'static str, u32),
    F32(&'static str, f32),
    Bool(&'static str, bool),
    Strings(&'static str, &'static [&'static str]),
}

use Change::{Bool, F32, String as Text, Strings, U32};

/// A whole small model, with keys replaced or added, tensors changed or left out by `shape`, and one more tensor.
fn changed(
    changes: &[Change],
    shape: impl Fn(&str, Vec<usize>) -> Option<Vec<usize>>,
    extra: Option<(&str, &[usize])>,
) -> Vec<u8> {
    let mut writer = GgufWriter::default();
    let key = |change: &Change| match change {
        Text(key, _) | U32(key, _) | F32(key, _) | Bool(key, _) | Strings(key, _) => *key,
    };
    let write = |writer: &mut GgufWriter, change: &Change| match change {
        Text(key, value) => writer.string(key, value),
        U32(key, value) => writer.u32(key, *value),
        F32(key, value) => writer.f32(key, *value),
        Bool(key, value) => writer.bool(key, *value),
        Strings(key, value) => writer.strings(key, value),
    };
    let defaults = [
        Text("general.architecture", "llama"),
        U32("llama.block_count", 1),
        U32("llama.context_length", 128),
        U32("llama.embedding_length", 32),
        U32("llama.feed_forward_length", 64),
        U32("llama.attention.head_count", 4),
        U32("llama.attention.head_count_kv", 2),
        F32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        Strings("tokenizer.ggml.tokens", &["a", "b", "c"]),
    ];
    for default in &defaults {
        if !changes.iter().any(|change| key(change) == key(default)) {
            write(&mut writer, default);
        }
    }
    for change in changes {
        write(&mut writer, change);
    }
    let tensors: [(&str, &[usize]); 11] = [
        ("token_embd", &[3, 32]),
        ("output_norm", &[32]),
        ("blk.0.attn_norm", &[32]),
        ("blk.0.ffn_norm", &[32]),
        ("blk.0.attn_q", &[32, 32]),
        ("blk.0.attn_k", &[16, 32]),
        ("blk.0.attn_v", &[16, 32]),
        ("blk.0.attn_output", &[32, 32]),
        ("blk.0.ffn_gate", &[64, 32]),
        ("blk.0.ffn_up", &[64, 32]),
        ("blk.0.ffn_down", &[32, 64]),
    ];
    for (name, dimensions) in tensors {
        if let Some(dimensions) = shape(name, dimensions.to_vec()) {
            let bytes = vec![0; 4 * dimensions.iter().product::<usize>()];
            writer.tensor(&format!("{name}.weight"), &dimensions, TensorFormat::F32, bytes);
        }
    }
    if let Some((name, dimensions)) = extra {
        let bytes = 2f32.to_le_bytes().repeat(dimensions.iter().product());
        writer.tensor(name, dimensions, TensorFormat::F32, bytes);
    }
    writer.finish()
}

fn as_it_is(_: &str, shape: Vec<usize>) -> Option<Vec<usize>> {
    Some(shape)
}

fn open_changed(changes: &[Change]) -> Result<ModelFile, LoadError> {
    open_only(&changed(changes, as_it_is, None))
}

/// Without the tokenizer.
fn open_only(bytes: &[u8]) -> Result<ModelFile, LoadError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    ModelFile::open(&path)
}

#[test]
fn the_model_that_is_changed_below_is_whole() {
    assert_eq!(open_changed(&[]).unwrap().config().head_dim, 8);
}

#[rstest]
#[case(
    Text("general.architecture", "mamba"),
    "architecture \"mamba\" is not supported"
)]
#[case(
    U32("general.architecture", 7),
    "general.architecture is 7, but must be a string"
)]
#[case(U32("llama.attention.head_count", 5), "divisor of the hidden size 32")]
#[case(
    U32("llama.attention.head_count", 0),
    "head_count is 0, but must be between 1"
)]
#[case(U32("llama.attention.head_count_kv", 3), "divisor of the 4 heads")]
#[case(
    U32("llama.attention.head_count", u32::MAX),
    "is 4294967295, but must be between"
)]
#[case(U32("llama.block_count", 0), "block_count is 0")]
#[case(
    U32("llama.block_count", 1_000_000),
    "tensor blk.1.attn_norm.weight is missing"
)]
#[case(U32("llama.embedding_length", 64), "tensor token_embd.weight is [3, 32]")]
#[case(
    U32("llama.feed_forward_length", 32),
    "tensor blk.0.ffn_gate.weight is [64, 32]"
)]
#[case(Strings("tokenizer.ggml.tokens", &["a"]), "the configuration makes it [1, 32]")]
#[case(Text("llama.context_length", "long"), "context_length is \"long\"")]
#[case(U32("llama.context_length", u32::MAX), "is 4294967295, but must be between")]
#[case(U32("llama.rope.dimension_count", 7), "rotated dimensions is 7")]
#[case(U32("llama.rope.dimension_count", 10), "rotated dimensions is 10")]
#[case(F32("llama.rope.freq_base", 0.0), "freq_base is 0, but must be greater")]
#[case(F32("llama.rope.freq_base", f32::NAN), "freq_base is NaN")]
#[case(F32("llama.attention.layer_norm_rms_epsilon", -1.0), "must be greater than 0")]
#[case(U32("llama.attention.value_length", 4), "must be the key length 8")]
#[case(
    U32("llama.attention.sliding_window", 4096),
    "llama.attention.sliding_window = 4096 is not supported"
)]
#[case(U32("llama.expert_count", 8), "llama.expert_used_count is missing")]
#[case(F32("llama.logit_scale", 0.5), "llama.logit_scale = 0.5")]
#[case(F32("llama.final_logit_softcapping", 30.0), "softcapping = 30")]
#[case(Bool("llama.attention.causal", false), "not causal")]
#[case(Text("llama.rope.scaling.type", "magic"), "RoPE scaling of type \"magic\"")]
#[case(
    Text("llama.rope.scaling.type", "yarn"),
    "llama.rope.scaling.factor is missing"
)]
#[case(F32("llama.rope.scaling.attn_factor", 1.5), "attn_factor = 1.5 without YaRN")]
#[case(
    U32("tokenizer.ggml.eos_token_id", 3),
    "eos_token_id is 3, but must be a token below 3"
)]
#[case(U32("general.alignment", 12), "general.alignment")]
#[case(U32("general.alignment", 0), "general.alignment")]
#[case(Text("tokenizer.ggml.tokens", "a"), "must be an array of strings")]
fn a_contradiction_names_the_key_and_the_value(#[case] change: Change, #[case] expected: &str) {
    refused(open_changed(&[change]), expected);
}

#[test]
fn tensors_must_be_there_and_fit() {
    let missing = changed(&[], |name, shape| (name != "blk.0.ffn_up").then_some(shape), None);
    refused(open_only(&missing), "tensor blk.0.ffn_up.weight is missing");
    let turn = |name: &str, shape| {
        Some(if name == "blk.0.ffn_down" {
            vec![64, 32]
        } else {
            shape
        })
    };
    let expected = "tensor blk.0.ffn_down.weight is [64, 32], but the configuration makes it [32, 64]";
    refused(open_only(&changed(&[], turn, None)), expected);
    // Heads of 8 elements have 4 pairs.
    let divisors = changed(&[], as_it_is, Some(("rope_freqs.weight", &[3])));
    refused(open_only(&divisors), "tensor rope_freqs.weight is [3]");
}

#[rstest]
#[case("blk.0.attn_q_norm.weight")]
#[case("blk.1.attn_q.weight")]
#[case("blk.0.ffn_gate_inp.weight")]
fn a_tensor_that_nothing_would_use_is_refused(#[case] name: &str) {
    let file = changed(&[], as_it_is, Some((name, &[32])));
    refused(open_only(&file), &format!("the tensor {name} is not supported"));
}

#[test]
fn a_tensor_or_key_that_appears_twice_is_refused() {
    let twice = changed(&[], as_it_is, Some(("output_norm.weight", &[32])));
    refused(open_only(&twice), "the tensor output_norm.weight appears twice");
    refused(
        open_changed(&[U32("x", 1), U32("x", 2)]),
        "the key x appears twice",
    );
}

#[test]
fn biases_are_optional_and_fit() {
    let file = open_only(&changed(&[], as_it_is, Some(("blk.0.attn_k.bias", &[16])))).unwrap();
    assert_eq!(
        file.optional_tensor("blk.0.attn_k.bias").unwrap().to_f32(),
        [2.0; 16]
    );
    assert!(file.optional_tensor("blk.0.attn_q.bias").is_none());
    let wrong = changed(&[], as_it_is, Some(("blk.0.attn_k.bias", &[32])));
    refused(open_only(&wrong), "tensor blk.0.attn_k.bias is [32]");
}

#[test]
fn an_unknown_encoding_is_named() {
    let mut bytes = small_bytes();
    let name = b"blk.0.ffn_gate.weight";
    let at = bytes
        .windows(name.len())
        .position(|window| window == name)
        .unwrap();
    let type_at = at + name.len() + 4 + 16;
    bytes[type_at..type_at + 4].copy_from_slice(&39u32.to_le_bytes());
    refused(
        open_only(&bytes),
        "tensor blk.0.ffn_gate.weight is encoded as ggml type 39",
    );
    bytes[type_at..type_at + 4].copy_from_slice(&TensorFormat::Q4K.ggml_type().unwrap().to_le_bytes());
    refused(open_only(&bytes), "not whole Q4_K blocks of 256");
}

#[rstest]
#[case::unaligned(1, "not aligned")]
#[case::far(1 << 40, "beyond the end")]
#[case::wrapping(u64::MAX - 31, "beyond the end")]
fn an_offset_out_of_the_file_is_refused(#[case] offset: u64, #[case] expected: &str) {
    let mut bytes = small_bytes();
    let name = b"blk.0.ffn_gate.weight";
    let at = bytes
        .windows(name.len())
        .position(|window| window == name)
        .unwrap();
    let offset_at = at + name.len() + 4 + 16 + 4;
    bytes[offset_at..offset_at + 8].copy_from_slice(&offset.to_le_bytes());
    refused(open_only(&bytes), expected);
}

#[rstest]
#[case(0, "empty shape")]
#[case(1 << 60, "beyond the end")]
#[case(u64::MAX / 4 * 4, "beyond the end")]
fn a_dimension_out_of_the_file_is_refused(#[case] dimension: u64, #[case] expected: &str) {
    let mut bytes = small_bytes();
    let name = b"blk.0.ffn_gate.weight";
    let at = bytes
        .windows(name.len())
        .position(|window| window == name)
        .unwrap();
    let at = at + name.len() + 4;
    bytes[at..at + 8].copy_from_slice(&dimension.to_le_bytes());
    refused(open_only(&bytes), expected);
}

#[test]
fn rope_scalings_of_gguf_are_read() {
    let scaling = |changes: &[Change]| open_changed(changes).unwrap().config().rope.scaling.clone();
    let kind = |kind| Text("llama.rope.scaling.type", kind);
    let factor = || F32("llama.rope.scaling.factor", 4.0);
    assert_eq!(scaling(&[kind("none"), factor()]), RopeScaling::None);
    assert_eq!(
        scaling(&[kind("linear"), factor()]),
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(
        scaling(&[F32("llama.rope.scale_linear", 2.0)]),
        RopeScaling::Linear { factor: 2.0 }
    );
    let yarn = |attention_factor| RopeScaling::Yarn {
        factor: 4.0,
        original_context: 32,
        beta_fast: 16.0,
        beta_slow: 1.0,
        attention_factor,
    };
    let original = || U32("llama.rope.scaling.original_context_length", 32);
    let fast = || F32("llama.rope.scaling.yarn_beta_fast", 16.0);
    assert_eq!(scaling(&[kind("yarn"), factor(), original(), fast()]), yarn(None));
    let own = F32("llama.rope.scaling.attn_factor", 2.0);
    let expected = (2.0 * (1.0 + 0.1 * 4f64.ln())) as f32;
    assert_eq!(
        scaling(&[kind("yarn"), factor(), original(), fast(), own]),
        yarn(Some(expected))
    );

    let divisors: Option<(&str, &[usize])> = Some(("rope_freqs.weight", &[4]));
    let file = open_only(&changed(&[], as_it_is, divisors)).unwrap();
    let expected = RopeScaling::Factors {
        divisors: vec![2.0; 4],
        attention_factor: 1.0,
    };
    assert_eq!(file.config().rope.scaling, expected);
    let both = changed(&[kind("linear"), factor()], as_it_is, divisors);
    refused(open_only(&both), "together with Linear");
}

#[test]
fn every_end_token_of_gguf_counts() {
    let tokens = |changes: &[Change]| open_changed(changes).unwrap().config().eos_tokens.clone();
    assert_eq!(tokens(&[]), [] as [u32; 0]);
    let id = |name, token| U32(name, token);
    assert_eq!(
        tokens(&[
            id("tokenizer.ggml.eos_token_id", 2),
            id("tokenizer.ggml.eot_token_id", 1)
        ]),
        [2, 1]
    );
    assert_eq!(
        tokens(&[
            id("tokenizer.ggml.eos_token_id", 2),
            id("tokenizer.ggml.eot_token_id", 2)
        ]),
        [2]
    );
}

// --- Hugging Face directories.

/// A small directory with some keys of its `config.json` replaced; `null` removes.
fn hugging_face(changes: Value) -> (tempfile::TempDir, Result<ModelFile, LoadError>) {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_hf(directory.path(), &small(), 1).unwrap();
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(&path, config.to_string()).unwrap();
    let file = ModelFile::open(directory.path());
    (directory, file)
}

#[rstest]
#[case(json!({"architectures": ["GPT2LMHeadModel"]}), "architecture \"GPT2LMHeadModel\" is not supported")]
#[case(json!({"architectures": null}), "architectures is missing")]
#[case(json!({"hidden_size": null}), "hidden_size is missing")]
#[case(json!({"hidden_size": -1}), "hidden_size is -1")]
#[case(json!({"hidden_size": 1u64 << 60}), "hidden_size is 1152921504606846976")]
#[case(json!({"num_key_value_heads": 3}), "divisor of the 2 heads")]
#[case(json!({"num_hidden_layers": 2}), "tensor model.layers.1.input_layernorm.weight is missing")]
#[case(json!({"num_hidden_layers": 1_000_000}), "tensor model.layers.1.input_layernorm.weight is missing")]
#[case(json!({"vocab_size": 261}), "tensor model.embed_tokens.weight is [260, 32]")]
#[case(json!({"tie_word_embeddings": false}), "tensor lm_head.weight is missing")]
#[case(json!({"hidden_act": "gelu"}), "hidden_act = \"gelu\" is not supported")]
#[case(json!({"sliding_window": 16}), "a sliding window of 16 tokens")]
#[case(json!({"layer_types": ["sliding_attention"]}), "sliding_attention")]
#[case(json!({"quantization_config": {"bits": 4}}), "quantization_config")]
#[case(json!({"attention_bias": true}), "tensor model.layers.0.self_attn.q_proj.bias is missing")]
#[case(json!({"rms_norm_eps": 0}), "rms_norm_eps is 0")]
#[case(json!({"rope_theta": "big"}), "rope_theta is \"big\"")]
#[case(json!({"rope_scaling": {"type": "magic"}}), "RoPE scaling of type \"magic\"")]
#[case(json!({"rope_scaling": {"type": "linear"}}), "factor is missing")]
#[case(json!({"rope_scaling": 4}), "rope_scaling is 4, but must be an object")]
#[case(json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}), "partial_rotary_factor = 0.5")]
#[case(json!({"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0]}}),
    "short_factor is 1, but must be 8 numbers long")]
fn a_contradiction_in_json_names_the_key_and_the_value(#[case] changes: Value, #[case] expected: &str) {
    refused(hugging_face(changes).1, expected);
}

/// A tiny model of a family with some keys of its `config.json` replaced.
fn of_family(family: &'static str, changes: Value) -> Result<ModelFile, LoadError> {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_hf(directory.path(), &TinyModel::of(family), 1).unwrap();
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(&path, config.to_string()).unwrap();
    ModelFile::open(directory.path())
}

#[rstest]
#[case("llama", json!({"mlp_bias": true}), "mlp_bias = true")]
#[case("llama", json!({"attn_logit_softcapping": 30.0}), "attn_logit_softcapping = 30.0")]
#[case("llama", json!({"no_rope_layers": [1, 0]}), "no_rope_layers = [1,0]")]
#[case("qwen2", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5")]
#[case("qwen2", json!({"max_window_layers": null}), "max_window_layers is missing")]
#[case("qwen3", json!({"layer_types": ["full_attention"]}), "layer_types")]
#[case("qwen3", json!({"layer_types": ["full_attention", "linear_attention"]}), "a layer of type \"linear_attention\"")]
#[case("qwen3moe", json!({"mlp_only_layers": [1]}), "mlp_only_layers = [1]")]
#[case("qwen3moe", json!({"decoder_sparse_step": 2}), "decoder_sparse_step = 2")]
#[case("qwen3moe", json!({"num_experts_per_tok": 9}), "a row uses is 9")]
#[case("qwen3moe", json!({"num_experts": 1_000_000}), "experts is 1000000")]
#[case("qwen3moe", json!({"num_experts": 9}), "tensor model.layers.0.mlp.gate.weight is [8, 192]")]
#[case("mixtral", json!({"num_local_experts": null}), "num_local_experts is missing")]
#[case("gemma2", json!({"hidden_activation": "gelu"}), "hidden_activation = \"gelu\"")]
#[case("gemma2", json!({"query_pre_attn_scalar": null}), "query_pre_attn_scalar is missing")]
#[case("gemma2", json!({"final_logit_softcapping": -1.0}), "final_logit_softcapping is -1.0")]
#[case("gemma3", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention = true")]
#[case("gemma3", json!({"head_dim": 48}), "q_norm.weight is [64]")]
#[case("gemma3", json!({"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear"}}}),
    "RoPE scaling of type \"linear\" in layers with a window")]
#[case("phi3", json!({"num_key_value_heads": 4}), "qkv_proj.weight is [384, 192]")]
#[case("smollm3", json!({"no_rope_layers": [1, 1]}), "no_rope_layers is [1,1]")]
#[case("smollm3", json!({"no_rope_layers": [1, 1, 2, 0]}), "no_rope_layers is [1,1,2,0]")]
#[case("olmo2", json!({"architectures": ["Olmo3ForCausalLM"]}), "Olmo2ForCausalLM")]
#[case("olmo2", json!({"architectures": ["LlamaForCausalLM"]}), "input_layernorm.weight is missing")]
#[case("qwen3", json!({"architectures": ["Qwen2ForCausalLM"]}), "q_proj.bias is missing")]
#[case("gemma3", json!({"architectures": ["Gemma2ForCausalLM"]}), "k_norm.weight is not supported")]
fn what_a_family_cannot_compute_is_refused_by_name(
    #[case] family: &'static str,
    #[case] changes: Value,
    #[case] expected: &str,
) {
    refused(of_family(family, changes), expected);
}

#[test]
fn defaults_are_those_of_the_familys_class() {
    let without = |family, key: &str| {
        let directory = tempfile::tempdir().unwrap();
        write_tiny_hf(directory.path(), &TinyModel::of(family), 1).unwrap();
        let path = directory.path().join("config.json");
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        config.as_object_mut().unwrap().remove(key);
        fs::write(&path, config.to_string()).unwrap();
        ModelFile::open(directory.path()).unwrap().config().clone()
    };
    assert!(without("gemma2", "tie_word_embeddings").tied_head);
    assert_eq!(without("gemma3", "sliding_window").window.unwrap().tokens, 4096);
    assert_eq!(without("mistral", "sliding_window").window.unwrap().tokens, 4096);
    assert_eq!(without("qwen3", "use_sliding_window").window, None);
    assert_eq!(without("smollm3", "rope_theta").rope.theta, 2e6);
    assert_eq!(without("olmo2", "rms_norm_eps").norm_epsilon, 1e-5);
}

#[test]
fn windows_and_rotations_are_by_layer() {
    let config = |family| of_family(family, json!({})).unwrap().config().clone();
    let windows = |family: &'static str| -> Vec<bool> {
        let config = config(family);
        (0..config.layers)
            .map(|layer| config.window_of(layer).is_some())
            .collect()
    };
    assert_eq!(windows("gemma2"), [true, false]);
    assert_eq!(windows("gemma3"), [true, true, true, true, true, false]);
    assert_eq!(windows("qwen3"), [false, true]);
    assert_eq!(windows("qwen3moe"), [true, true]);
    assert_eq!(windows("llama"), [false, false]);
    let listed = json!({"layer_types": ["full_attention", "sliding_attention"]});
    let listed = of_family("gemma2", listed).unwrap().config().clone();
    assert_eq!(
        [0, 1].map(|layer| listed.window_of(layer).is_some()),
        [false, true]
    );
    let smollm3 = config("smollm3");
    assert_eq!(
        [0, 1, 2, 3].map(|layer| smollm3.unrotated.contains(layer)),
        [false, false, false, true]
    );
    // Its layers rotate differently also if no sequence fills the window.
    let short = of_family("gemma3", json!({"max_position_embeddings": 32}))
        .unwrap()
        .config()
        .clone();
    assert_eq!([0, 5].map(|layer| short.window_of(layer)), [Some(48), None]);
    let gemma3 = config("gemma3");
    assert_eq!(
        (gemma3.rope.theta, gemma3.local_rope.unwrap().theta),
        (100_000.0, 10_000.0)
    );
}

#[test]
fn version_5_of_transformers_says_the_same_in_other_words() {
    let old = of_family("gemma3", json!({})).unwrap().config().clone();
    let new = of_family(
        "gemma3",
        json!({
            "rope_theta": null, "rope_local_base_freq": null, "rope_scaling": null,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        }),
    );
    let new = new.unwrap().config().clone();
    assert_eq!((new.rope, new.local_rope), (old.rope, old.local_rope));
}

/// As the class that sees images keeps the text model: one level further in, with most sizes left out.
#[rstest]
#[case("language_model.")]
#[case("model.language_model.")]
fn a_text_model_is_found_beside_what_sees_images(#[case] prefix: &str) {
    let directory = tempfile::tempdir().unwrap();
    let model = TinyModel::of("gemma3");
    write_tiny_hf(directory.path(), &model, 1).unwrap();
    let alone = ModelFile::open(directory.path()).unwrap();
    let embedding = alone.tensor("token_embd").unwrap().to_f32();

    let path = directory.path().join("config.json");
    let mut text: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let eos = text.as_object_mut().unwrap().remove("eos_token_id").unwrap();
    text["architectures"] = Value::Null;
    let config = json!({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "eos_token_id": eos});
    fs::write(&path, config.to_string()).unwrap();

    let weights = directory.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_end(&bytes)]).unwrap();
    let mut renamed = serde_json::Map::new();
    for (name, entry) in header.as_object().unwrap() {
        let name = match prefix {
            "language_model." => format!("{prefix}{name}"),
            _ => name.replacen("model.", prefix, 1),
        };
        renamed.insert(name, entry.clone());
    }
    let first = renamed.values().next().unwrap().clone();
    renamed.insert("vision_tower.patch.weight".into(), first);
    let header = Value::Object(renamed).to_string();
    let length = (header.len() as u64).to_le_bytes();
    let file = [
        length.as_slice(),
        header.as_bytes(),
        &bytes[8 + header_end(&bytes)..],
    ]
    .concat();
    fs::write(&weights, file).unwrap();

    let inside = ModelFile::open(directory.path()).unwrap();
    let named = |file: &ModelFile| ModelConfig {
        name: String::new(),
        ..file.config().clone()
    };
    assert_eq!(named(&inside), named(&alone));
    assert_eq!(inside.tensor("token_embd").unwrap().to_f32(), embedding);
}

fn header_end(bytes: &[u8]) -> usize {
    u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize
}

#[test]
fn sizes_that_gemma_3_leaves_out_are_its_classs() {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_hf(directory.path(), &TinyModel::of("gemma3"), 1).unwrap();
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("vocab_size");
    fs::write(&path, config.to_string()).unwrap();
    let without = ModelFile::open(directory.path()).unwrap_err();
    assert!(
        without.to_string().contains("makes it [262208, 192]"),
        "{without}"
    );
}

// --- FP8.

fn fp8(changes: Value, remove: Option<&str>) -> Result<ModelFile, LoadError> {
    let directory = tempfile::tempdir().unwrap();
    let model = TinyModel {
        format: TensorFormat::F8E4M3,
        ..TinyModel::of("qwen3")
    };
    write_tiny_hf(directory.path(), &model, 1).unwrap();
    let path = directory.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config["quantization_config"][key] = value.clone();
    }
    fs::write(&path, config.to_string()).unwrap();
    if let Some(name) = remove {
        let weights = directory.path().join("model.safetensors");
        let mut bytes = fs::read(&weights).unwrap();
        let at = bytes
            .windows(name.len())
            .position(|window| window == name.as_bytes())
            .unwrap();
        bytes[at + name.len() - 1] = b'X';
        fs::write(&weights, bytes).unwrap();
    }
    ModelFile::open(directory.path())
}

#[rstest]
#[case(json!({"quant_method": "gptq"}), None, "quant_method Some(\"gptq\")")]
#[case(json!({"fmt": "e5m2"}), None, "quantization_config.fmt = \"e5m2\"")]
#[case(json!({"weight_block_size": [64, 64]}), None, "quantization_config.weight_block_size = [64,64]")]
#[case(json!({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}), None, "kv_cache_scheme")]
#[case(json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}), None, "\"pack-quantized\"")]
#[case(json!({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}), None, "bitmask")]
#[case(json!({}), Some("mlp.up_proj.weight_scale_inv"), "up_proj.weight_scale or")]
fn fp8_that_is_something_else_is_refused(
    #[case] changes: Value,
    #[case] remove: Option<&str>,
    #[case] expected: &str,
) {
    assert!(fp8(json!({}), None).is_ok());
    refused(fp8(changes, remove), expected);
}

#[test]
fn rope_scalings_of_hugging_face_are_read() {
    let rope = |changes: Value| {
        let file = hugging_face(changes).1.unwrap();
        (file.config().rope.clone(), file.config().context_tokens_max)
    };
    let (plain, context) = rope(json!({}));
    assert_eq!(
        (plain.theta, plain.dims, plain.style),
        (10_000.0, 16, RopeStyle::HalfSplit)
    );
    assert_eq!((&plain.scaling, context), (&RopeScaling::None, 8192));

    let (linear, _) = rope(json!({"rope_scaling": {"type": "linear", "factor": 2.0}}));
    assert_eq!(linear.scaling, RopeScaling::Linear { factor: 2.0 });

    let (new_style, _) = rope(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}));
    assert_eq!((new_style.theta, new_style.scaling), (5e5, RopeScaling::None));

    let (llama3, _) = rope(
        json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 512}}),
    );
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 512,
    };
    assert_eq!(llama3.scaling, expected);

    let (yarn, _) = rope(json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 2048, "mscale": 1.0, "mscale_all_dim": 0.5}}));
    let RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast,
        beta_slow,
        attention_factor,
    } = yarn.scaling
    else {
        panic!("not YaRN: {:?}", yarn.scaling);
    };
    assert_eq!(
        (factor, original_context, beta_fast, beta_slow),
        (4.0, 2048, 32.0, 1.0)
    );
    let expected = (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0);
    assert!((f64::from(attention_factor.unwrap()) - expected).abs() < 1e-6);
}

#[test]
fn scalings_that_depend_on_the_length_end_at_the_trained_context() {
    let opened = |changes: Value| hugging_face(changes).1.unwrap().config().clone();
    let dynamic =
        opened(json!({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}));
    assert_eq!(
        (dynamic.rope.scaling, dynamic.context_tokens_max),
        (RopeScaling::None, 2048)
    );
    let long = opened(
        json!({"max_position_embeddings": 4096, "original_max_position_embeddings": 1024,
        "rope_scaling": {"type": "longrope", "short_factor": vec![1.5; 8], "long_factor": vec![9.0; 8]}}),
    );
    assert_eq!(long.context_tokens_max, 1024);
    let attention_factor = (1.0 + 4f64.ln() / 1024f64.ln()).sqrt() as f32;
    assert_eq!(
        long.rope.scaling,
        RopeScaling::Factors {
            divisors: vec![1.5; 8],
            attention_factor
        }
    );
}

#[test]
fn a_window_that_never_fills_is_none() {
    let changes = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 8192});
    assert_eq!(hugging_face(changes).1.unwrap().config().architecture, "mistral");
    assert!(hugging_face(json!({"sliding_window": null})).1.is_ok());
}

#[test]
fn generation_config_decides_where_to_stop() {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_hf(directory.path(), &small(), 1).unwrap();
    let generation = directory.path().join("generation_config.json");
    let tokens = || ModelFile::open(directory.path()).map(|file| file.config().eos_tokens.clone());
    fs::write(&generation, r#"{"eos_token_id": [2, 0]}"#).unwrap();
    assert_eq!(tokens().unwrap(), [2, 0]);
    fs::write(&generation, r#"{"eos_token_id": 1}"#).unwrap();
    assert_eq!(tokens().unwrap(), [1]);
    fs::write(&generation, "{}").unwrap();
    assert_eq!(tokens().unwrap(), [2]);
    fs::write(&generation, r#"{"eos_token_id": "two"}"#).unwrap();
    assert!(
        tokens()
            .unwrap_err()
            .to_string()
            .contains("eos_token_id is \"two\"")
    );
}

#[test]
fn a_template_may_lie_in_its_own_file() {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_hf(directory.path(), &small(), 1).unwrap();
    let rendered = || {
        let file = ModelFile::open(directory.path())?;
        let template = file.chat_template(&file.tokenizer()?)?.unwrap();
        Ok::<_, LoadError>(
            template
                .render(&[], &crate::chat::ChatOptions::default())
                .unwrap(),
        )
    };
    fs::write(
        directory.path().join("chat_template.jinja"),
        "own {{ bos_token }}",
    )
    .unwrap();
    assert_eq!(rendered().unwrap(), "own <|im_start|>");
    fs::write(directory.path().join("chat_template.jinja"), "{% broken").unwrap();
    assert!(matches!(rendered(), Err(LoadError::ChatTemplate { .. })));
    fs::remove_file(directory.path().join("chat_template.jinja")).unwrap();
    let named =
        json!({"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]});
    fs::write(directory.path().join("tokenizer_config.json"), named.to_string()).unwrap();
    assert_eq!(rendered().unwrap(), "yes");
}

#[test]
fn an_index_cannot_lead_out_of_the_directory() {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_hf(directory.path(), &small(), 1).unwrap();
    let index = directory.path().join("model.safetensors.index.json");
    for name in ["../secret", "/etc/passwd", "a/b", "..", ""] {
        fs::write(&index, json!({"weight_map": {"x": name}}).to_string()).unwrap();
        refused(ModelFile::open(directory.path()), "to no file name");
    }
    fs::write(
        &index,
        json!({"weight_map": {"x": "absent.safetensors"}}).to_string(),
    )
    .unwrap();
    let error = ModelFile::open(directory.path()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::NotFound);
    fs::write(&index, r#"{"weight_map": {}}"#).unwrap();
    refused(ModelFile::open(directory.path()), "names 0 files");
}

fn safetensors_file(length: u64, header: &str, data: usize) -> Vec<u8> {
    [length.to_le_bytes().as_slice(), header.as_bytes(), &vec![0; data]].concat()
}

#[rstest]
#[case::no_header(vec![1, 2, 3], "no header")]
#[case::length_2_60(safetensors_file(1 << 60, "{}", 0), "the header has 1152921504606846976 bytes")]
#[case::length_beyond(safetensors_file(100, "{}", 0), "the header has 100 bytes")]
#[case::not_json(safetensors_file(2, "{x", 0), "not a JSON object")]
#[case::not_an_object(safetensors_file(2, "[]", 0), "not a JSON object")]
#[case::no_fields(safetensors_file(8, "{\"t\": 1}", 0), "tensor t is not described")]
#[case::deep(safetensors_file(100_000, &"[".repeat(100_000), 0), "not a JSON object")]
fn a_broken_safetensors_header_is_refused(#[case] bytes: Vec<u8>, #[case] expected: &str) {
    refused(open_shard(&bytes), expected);
}

#[rstest]
#[case::beyond("F32", "[2]", "[0, 8]", 4, "lies at 0..8")]
#[case::backwards("F32", "[1]", "[8, 4]", 8, "lies at 8..4")]
#[case::sizes_differ("F32", "[3]", "[0, 8]", 8, "occupies 8 bytes")]
#[case::overflow(
    "F32",
    "[4294967296, 4294967296, 4294967296]",
    "[0, 8]",
    8,
    "occupies 8 bytes"
)]
#[case::zero("F32", "[0]", "[0, 0]", 8, "occupies 0 bytes")]
#[case::huge_offsets("F32", "[1]", "[18446744073709551608, 18446744073709551612]", 8, "lies at")]
#[case::other_type("I64", "[1]", "[0, 8]", 8, "encoded as I64")]
fn a_broken_safetensors_entry_is_refused(
    #[case] dtype: &str,
    #[case] shape: &str,
    #[case] offsets: &str,
    #[case] data: usize,
    #[case] expected: &str,
) {
    let header = format!(
        "{{\"model.norm.weight\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}"
    );
    refused(
        open_shard(&safetensors_file(header.len() as u64, &header, data)),
        expected,
    );
}

/// A directory whose only shard is these bytes.
fn open_shard(bytes: &[u8]) -> Result<ModelFile, LoadError> {
    let directory = tempfile::tempdir().unwrap();
    write_tiny_hf(directory.path(), &small(), 1).unwrap();
    fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
    ModelFile::open(directory.path())
}

#[test]
fn what_is_not_there_is_not_found() {
    let directory = tempfile::tempdir().unwrap();
    let error = ModelFile::open(directory.path().join("absent.gguf")).unwrap_err();
    assert_eq!(error.code(), ErrorCode::NotFound);
    refused(ModelFile::open(directory.path()), "no config.json");
    write_tiny_hf(directory.path(), &small(), 1).unwrap();
    fs::remove_file(directory.path().join("tokenizer.json")).unwrap();
    let file = ModelFile::open(directory.path()).unwrap();
    assert!(matches!(file.tokenizer(), Err(LoadError::Tokenizer { .. })));
}

// --- Random damage.

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_truncated_file_is_an_error(share in 0.0f64..1.0) {
        static BYTES: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(small_bytes);
        let length = (share * BYTES.len() as f64) as usize;
        prop_assert!(open_bytes(&BYTES[..length]).is_err());
    }

    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((0.0f64..1.0, any::<u8>()), 1..6), header_only in any::<bool>()) {
        static BYTES: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(small_bytes);
        let mut bytes = BYTES.clone();
        // The header is the first kilobytes of the file; that is where damage does most.
        let range = if header_only { bytes.len().min(12_000) } else { bytes.len() };
        for (at, value) in flips {
            bytes[(at * range as f64) as usize] = value;
        }
        let _ = open_bytes(&bytes);
    }

    #[test]
    fn flipped_bytes_of_a_directory_never_panic(
        name in prop::sample::select(vec!["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]),
        flips in prop::collection::vec((0.0f64..1.0, any::<u8>()), 1..4),
    ) {
        let directory = tempfile::tempdir().unwrap();
        write_tiny_hf(directory.path(), &small(), 1).unwrap();
        let path = directory.path().join(name);
        let mut bytes = fs::read(&path).unwrap();
        let range = bytes.len().min(3000);
        for (at, value) in flips {
            bytes[(at * range as f64) as usize] = value;
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(file) = ModelFile::open(directory.path())
            && let Ok(tokenizer) = file.tokenizer()
        {
            tokenizer.encode("some text", true);
            let _ = file.chat_template(&tokenizer);
        }
    }
}

/// The header of the real model is 1.8 MB of vocabulary. Its first 3 MB, damaged, followed by a hole of the right size.
#[test]
fn damage_to_the_real_header_never_panics() {
    const CASES: u64 = 200;
    const PREFIX_BYTES: usize = 3 << 20;
    let whole = fs::File::open(real_model()).unwrap();
    let length = whole.metadata().unwrap().len();
    let mut prefix = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(whole, PREFIX_BYTES as u64), &mut prefix).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("damaged.gguf");
    fs::write(&path, &prefix).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    let mut state = 1u64;
    let mut random = |below: usize| {
        // Xorshift; quality does not matter here.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut outcomes = [0; 2];
    for case in 0..CASES {
        let truncated = case % 4 == 0;
        file.set_len(if truncated {
            random(PREFIX_BYTES) as u64
        } else {
            length
        })
        .unwrap();
        // Half of the flips go to the first kilobyte and the tensor infos, which are the last 20 kB of the header.
        let at = match case % 4 {
            1 => random(1200),
            2 => 1_765_000 + random(20_000),
            _ => random(1_785_000),
        };
        let undo = prefix[at];
        std::os::unix::fs::FileExt::write_all_at(&file, &[random(256) as u8], at as u64).unwrap();
        let opened = ModelFile::open(&path).is_ok();
        outcomes[usize::from(opened)] += 1;
        std::os::unix::fs::FileExt::write_all_at(&file, &[undo], at as u64).unwrap();
        if truncated {
            std::os::unix::fs::FileExt::write_all_at(&file, &prefix, 0).unwrap();
        }
    }
    assert!(outcomes[0] > 20 && outcomes[1] > 20, "both happen: {outcomes:?}");
}
