//! Tiny random models for tests: whole model files of some hundred kilobytes.
//!
//! The same [`TinyModel`] gives the same bytes everywhere, and the same weights in both containers: only the order of the
//! rows of Q and K, what is one tensor, and what norms are counted from differ, as they do between real files. Its answers are noise,
//! but its arithmetic is a real model's. There is one of every family, [`TinyModel::of`].

mod families;
mod gguf_writer;
mod quantise;
mod safetensors_writer;
mod vocabulary;
mod weights;

use std::{fs, io, path::Path};

use serde_json::json;

pub(crate) use self::gguf_writer::GgufWriter;
pub use self::quantise::quantise_row;
use self::weights::Container;
use crate::{family::Family, file::Names, tensor::TensorFormat};

const NORM_EPSILON: f32 = 1e-5;
/// Longest sequence, so that whole-cluster tests can use prompts of 3,000 tokens.
const CONTEXT_TOKENS_MAX: u32 = 8192;
/// The template of the fixture: ChatML.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// How the scales of FP8 weights are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scales {
    /// One for a matrix.
    Matrix,
    /// One for a row.
    Rows,
    /// One for each 128 rows and columns.
    Blocks,
}

/// The shape of a random model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TinyModel {
    /// Short name of one of the [`FAMILIES`](crate::family::FAMILIES).
    pub family: &'static str,
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
    /// Width of the feed-forward layer, or of each expert.
    pub intermediate: usize,
    /// Tokens; at least [`TinyModel::VOCABULARY_MIN`].
    pub vocabulary: usize,
    /// Encoding of every matrix. The widths must be whole blocks of it. With `F8E4M3`, which only directories can have, embedding,
    /// head and routers are `Bf16`.
    pub format: TensorFormat,
    /// Scales of FP8 weights.
    pub scales: Scales,
    /// Whether layers that may have windows have them.
    pub windows: bool,
    /// Determines every weight.
    pub seed: u64,
    /// Whether the head shares the embedding's weights.
    pub tied: bool,
}

impl Default for TinyModel {
    /// Wide enough for every format, small enough to run thousands of times.
    fn default() -> Self {
        Self {
            family: "llama",
            layers: 2,
            hidden: 256,
            heads: 8,
            kv_heads: 4,
            head_dim: 32,
            intermediate: 512,
            vocabulary: 320,
            format: TensorFormat::Q8_0,
            scales: Scales::Blocks,
            windows: true,
            seed: 1,
            tied: true,
        }
    }
}

impl TinyModel {
    /// The bytes and the special tokens.
    pub const VOCABULARY_MIN: usize = vocabulary::VOCABULARY_MIN;

    fn check(&self) -> io::Result<()> {
        let invalid = |message: String| Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        if self.kv_heads == 0
            || !self.heads.is_multiple_of(self.kv_heads)
            || !self.head_dim.is_multiple_of(2)
            || self.head_dim == 0
        {
            return invalid(format!("the heads of {self:?} do not divide"));
        }
        if Family::named(self.family).is_none() {
            return invalid(format!("there is no family {:?}", self.family));
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

/// Writes `model` as a GGUF file with a byte-level tokenizer and [`CHAT_TEMPLATE`].
///
/// # Errors
///
/// `InvalidInput` for a model that cannot be (llama.cpp has no names for some families), or what the file system says.
pub fn write_tiny_gguf(path: impl AsRef<Path>, model: &TinyModel) -> io::Result<()> {
    model.check()?;
    let vocabulary = vocabulary::Vocabulary::new(model.vocabulary);
    let mut writer = GgufWriter::default();
    families::write_gguf_keys(model, &mut writer)?;
    writer.string("tokenizer.ggml.model", "gpt2");
    writer.string("tokenizer.ggml.pre", "smollm");
    writer.strings("tokenizer.ggml.tokens", &vocabulary.pieces);
    writer.i32s("tokenizer.ggml.token_type", &vocabulary.types());
    writer.strings("tokenizer.ggml.merges", &vocabulary.merge_lines());
    writer.u32("tokenizer.ggml.bos_token_id", vocabulary::IM_START);
    writer.u32("tokenizer.ggml.eos_token_id", vocabulary::IM_END);
    writer.bool("tokenizer.ggml.add_bos_token", false);
    writer.string("tokenizer.chat_template", CHAT_TEMPLATE);
    for tensor in model.tensors(Container::Gguf) {
        writer.tensor(&tensor.name, &tensor.shape, tensor.format, tensor.bytes);
    }
    fs::write(path, writer.finish())
}

/// Writes `model` as a Hugging Face directory with everything that [`write_tiny_gguf`] writes. Its format must be `F32`, `F16` or
/// `Bf16`, or `F8E4M3`. More than one shard comes with an index.
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
    json_file("config.json", families::config_json(model))?;
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
    let names = Names::new(model.description());
    let mut tensors = model.tensors(Container::HuggingFace);
    for tensor in &mut tensors {
        tensor.name = names.native(&tensor.name);
    }
    safetensors_writer::write(directory, &tensors, shards)
}

#[cfg(test)]
mod tests;
