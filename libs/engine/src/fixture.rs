//! Tiny random models for tests: whole model files of some hundred kilobytes.
//!
//! The same [`TinyModel`] gives the same bytes everywhere, and the same weights in both containers: only the order of the
//! rows of Q and K differs, as it does between real files. Its answers are noise, but its arithmetic is a real model's.

mod gguf_writer;
mod quantise;
mod safetensors_writer;
mod vocabulary;

use std::{fs, io, path::Path};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use serde_json::json;

pub(crate) use self::gguf_writer::GgufWriter;
pub use self::quantise::quantise_row;
use crate::tensor::TensorFormat;

/// Base of the rotary embedding.
const ROPE_THETA: f32 = 10_000.0;
const NORM_EPSILON: f32 = 1e-5;
/// Longest sequence, so that whole-cluster tests can use prompts of 3,000 tokens.
const CONTEXT_TOKENS_MAX: u32 = 8192;
/// The template of the fixture: ChatML.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The shape of a random Llama model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TinyModel {
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of K and V; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Tokens; at least [`TinyModel::VOCABULARY_MIN`].
    pub vocabulary: usize,
    /// Encoding of every matrix. The widths must be whole blocks of it.
    pub format: TensorFormat,
    /// Determines every weight.
    pub seed: u64,
    /// Whether the head shares the embedding's weights.
    pub tied: bool,
}

impl Default for TinyModel {
    /// Wide enough for every format, small enough to run thousands of times.
    fn default() -> Self {
        Self {
            layers: 2,
            hidden: 256,
            heads: 8,
            kv_heads: 4,
            head_dim: 32,
            intermediate: 512,
            vocabulary: 320,
            format: TensorFormat::Q8_0,
            seed: 1,
            tied: true,
        }
    }
}

impl TinyModel {
    /// The bytes and the special tokens.
    pub const VOCABULARY_MIN: usize = vocabulary::VOCABULARY_MIN;

    /// Every matrix with its rows and columns, in the order of the file; canonical names.
    fn tensors(&self) -> Vec<Matrix> {
        let matrix = |name: String, rows: usize, cols: usize| Matrix { name, rows, cols };
        let (hidden, q, kv) = (
            self.hidden,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        );
        let mut tensors = vec![matrix("token_embd".into(), self.vocabulary, hidden)];
        for layer in 0..self.layers {
            for (name, rows, cols) in [
                ("attn_norm", 1, hidden),
                ("attn_q", q, hidden),
                ("attn_k", kv, hidden),
                ("attn_v", kv, hidden),
                ("attn_output", hidden, q),
                ("ffn_norm", 1, hidden),
                ("ffn_gate", self.intermediate, hidden),
                ("ffn_up", self.intermediate, hidden),
                ("ffn_down", hidden, self.intermediate),
            ] {
                tensors.push(matrix(format!("blk.{layer}.{name}"), rows, cols));
            }
        }
        tensors.push(matrix("output_norm".into(), 1, hidden));
        if !self.tied {
            tensors.push(matrix("output".into(), self.vocabulary, hidden));
        }
        tensors
    }

    fn check(&self) -> io::Result<()> {
        let invalid = |message: String| Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        if self.kv_heads == 0
            || !self.heads.is_multiple_of(self.kv_heads)
            || !self.head_dim.is_multiple_of(2)
            || self.head_dim == 0
        {
            return invalid(format!("the heads of {self:?} do not divide"));
        }
        if self.vocabulary < Self::VOCABULARY_MIN {
            return invalid(format!(
                "a vocabulary of {} is below {}",
                self.vocabulary,
                Self::VOCABULARY_MIN
            ));
        }
        let block = self.format.block_elements();
        match [self.hidden, self.intermediate, self.heads * self.head_dim]
            .iter()
            .find(|cols| !cols.is_multiple_of(block))
        {
            Some(cols) => invalid(format!(
                "{cols} columns are not whole {} blocks",
                self.format.name()
            )),
            None => Ok(()),
        }
    }
}

/// A weight to be made up.
struct Matrix {
    name: String,
    rows: usize,
    cols: usize,
}

impl Matrix {
    /// Norms are vectors, and vectors stay `F32`, as in real files.
    fn is_vector(&self) -> bool {
        self.name.ends_with("_norm")
    }

    fn shape(&self) -> Vec<usize> {
        if self.is_vector() {
            vec![self.cols]
        } else {
            vec![self.rows, self.cols]
        }
    }

    fn format(&self, model: &TinyModel) -> TensorFormat {
        if self.is_vector() {
            TensorFormat::F32
        } else {
            model.format
        }
    }

    /// The encoded rows, as Hugging Face orders them. A weight's values depend on the seed and its name alone.
    fn rows(&self, model: &TinyModel) -> Vec<Vec<u8>> {
        let mut rng = ChaCha8Rng::seed_from_u64(model.seed);
        let name = blake3::hash(self.name.as_bytes());
        rng.set_stream(u64::from_le_bytes(
            *name.as_bytes().first_chunk().expect("a hash has 32 bytes"),
        ));
        let format = self.format(model);
        let row = |rng: &mut ChaCha8Rng| {
            if self.is_vector() {
                let values: Vec<f32> = (0..self.cols).map(|_| 1.0 + 0.25 * uniform(rng)).collect();
                return quantise_row(format, &values).expect("F32 can be encoded");
            }
            // Unit variance out of unit variance in; the embedding has no inputs to sum over.
            let fan_in = if self.name == "token_embd" { 1 } else { self.cols };
            let deviation = 1.0 / (fan_in as f32).sqrt();
            let values: Vec<f32> = (0..self.cols)
                .map(|_| deviation * 3f32.sqrt() * uniform(rng))
                .collect();
            quantise_row(format, &values)
                .unwrap_or_else(|| quantise::random_row(format, self.cols, deviation, rng))
        };
        (0..self.rows).map(|_| row(&mut rng)).collect()
    }
}

/// Between -1 and 1, exactly representable, so the same everywhere.
fn uniform(rng: &mut ChaCha8Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// Rows of Q or K as GGUF orders them: the halves of each head interleaved, so that rotated pairs are neighbours.
fn interleave_halves(rows: Vec<Vec<u8>>, head_dim: usize) -> Vec<Vec<u8>> {
    let half = head_dim / 2;
    let source = |row: usize| {
        let (head, within) = (row / head_dim, row % head_dim);
        head * head_dim + within / 2 + within % 2 * half
    };
    (0..rows.len()).map(|row| rows[source(row)].clone()).collect()
}

/// Writes `model` as a GGUF file with a byte-level tokenizer and [`CHAT_TEMPLATE`].
///
/// # Errors
///
/// `InvalidInput` for a model that cannot be, or what the file system says.
pub fn write_tiny_gguf(path: impl AsRef<Path>, model: &TinyModel) -> io::Result<()> {
    model.check()?;
    let vocabulary = vocabulary::Vocabulary::new(model.vocabulary);
    let mut writer = GgufWriter::default();
    writer.string("general.architecture", "llama");
    writer.string("general.name", "tiny");
    writer.u32("llama.block_count", model.layers as u32);
    writer.u32("llama.context_length", CONTEXT_TOKENS_MAX);
    writer.u32("llama.embedding_length", model.hidden as u32);
    writer.u32("llama.feed_forward_length", model.intermediate as u32);
    writer.u32("llama.attention.head_count", model.heads as u32);
    writer.u32("llama.attention.head_count_kv", model.kv_heads as u32);
    writer.u32("llama.attention.key_length", model.head_dim as u32);
    writer.u32("llama.attention.value_length", model.head_dim as u32);
    writer.f32("llama.attention.layer_norm_rms_epsilon", NORM_EPSILON);
    writer.f32("llama.rope.freq_base", ROPE_THETA);
    writer.u32("llama.rope.dimension_count", model.head_dim as u32);
    writer.string("tokenizer.ggml.model", "gpt2");
    writer.string("tokenizer.ggml.pre", "smollm");
    writer.strings("tokenizer.ggml.tokens", &vocabulary.pieces);
    writer.i32s("tokenizer.ggml.token_type", &vocabulary.types());
    writer.strings("tokenizer.ggml.merges", &vocabulary.merge_lines());
    writer.u32("tokenizer.ggml.bos_token_id", vocabulary::IM_START);
    writer.u32("tokenizer.ggml.eos_token_id", vocabulary::IM_END);
    writer.bool("tokenizer.ggml.add_bos_token", false);
    writer.string("tokenizer.chat_template", CHAT_TEMPLATE);
    for matrix in model.tensors() {
        let mut rows = matrix.rows(model);
        if matrix.name.ends_with("attn_q") || matrix.name.ends_with("attn_k") {
            rows = interleave_halves(rows, model.head_dim);
        }
        let name = format!("{}.weight", matrix.name);
        writer.tensor(&name, &matrix.shape(), matrix.format(model), rows.concat());
    }
    fs::write(path, writer.finish())
}

/// Writes `model` as a Hugging Face directory with everything that [`write_tiny_gguf`] writes. Its format must be `F32`, `F16` or
/// `Bf16`. More than one shard comes with an index.
///
/// # Errors
///
/// `InvalidInput` for a model that cannot be, or what the file system says.
pub fn write_tiny_hf(directory: impl AsRef<Path>, model: &TinyModel, shards: usize) -> io::Result<()> {
    model.check()?;
    let directory = directory.as_ref();
    fs::create_dir_all(directory)?;
    let vocabulary = vocabulary::Vocabulary::new(model.vocabulary);
    let json_file = |name: &str, value: serde_json::Value| fs::write(directory.join(name), value.to_string());
    json_file(
        "config.json",
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "num_hidden_layers": model.layers,
            "hidden_size": model.hidden,
            "intermediate_size": model.intermediate,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "vocab_size": model.vocabulary,
            "max_position_embeddings": CONTEXT_TOKENS_MAX,
            "rms_norm_eps": NORM_EPSILON,
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": model.tied,
            "eos_token_id": vocabulary::IM_END,
        }),
    )?;
    json_file(
        "generation_config.json",
        json!({ "eos_token_id": [vocabulary::IM_END] }),
    )?;
    json_file("tokenizer.json", vocabulary.tokenizer_json())?;
    json_file(
        "tokenizer_config.json",
        json!({
            "bos_token": vocabulary.pieces[vocabulary::IM_START as usize],
            "eos_token": { "content": vocabulary.pieces[vocabulary::IM_END as usize] },
            "chat_template": CHAT_TEMPLATE,
        }),
    )?;
    let tensors: Vec<safetensors_writer::Tensor> = model
        .tensors()
        .iter()
        .map(|matrix| safetensors_writer::Tensor {
            name: crate::file::native_name(&format!("{}.weight", matrix.name)),
            shape: matrix.shape(),
            format: matrix.format(model),
            bytes: matrix.rows(model).concat(),
        })
        .collect();
    safetensors_writer::write(directory, &tensors, shards)
}

#[cfg(test)]
mod tests;
