//! Model files: a GGUF file, or a directory in the manner of Hugging Face.
//!
//! [`ModelFile`] maps the bytes, understands the headers and holds every tensor against the configuration before
//! anybody computes with it. Whatever is wrong with a file, or would make the engine compute something else than the
//! model's authors meant, is a [`LoadError`] that names the file and the values.
//!
//! Invariant: a file is hostile until it is checked. No length, count, offset or shape in it is trusted, and none
//! leads to a panic or to an allocation that its size does not justify.
//!
//! Tensors have the same canonical names whatever the container: `token_embd`, `output_norm`, `output` (which is the
//! embedding when the head is tied) and, per layer, `blk.{i}.` with `attn_norm`, `attn_q`, `attn_k`, `attn_v`,
//! `attn_q_norm`, `attn_k_norm`, `attn_output`, `post_attention_norm`, `ffn_norm`, `ffn_gate`, `ffn_up`, `ffn_down`,
//! `post_ffw_norm`, as far as the family has them. With experts, `ffn_gate_inp` is the router, and expert `e` has `ffn_gate.{e}`
//! and so on. `.weight` is implied; `.bias`, and `.scale` of an FP8 weight, are written out.

mod error;
mod gguf;
mod gguf_model;
mod gguf_rope;
mod hugging_face;
mod hugging_face_config;
mod hugging_face_rope;
mod limits;
mod mapped;
mod names;
mod safetensors;
mod shapes;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

pub use error::LoadError;
pub(crate) use names::Names;
pub(crate) use shapes::SCALE_BLOCK;
use types::Token;

use self::{gguf::Gguf, hugging_face::Directory, mapped::MappedFile, shapes::Located};
use crate::{chat::ChatTemplate, config::ModelConfig, tensor::TensorView, tokenizer::Tokenizer};

/// Bytes of a file that are hashed at a time.
const HASHED_BYTES: usize = 8 << 20;

/// An opened model. Weights stay mapped for as long as the value lives.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    config: ModelConfig,
    tensors: HashMap<String, Located>,
    container: Container,
    digest: OnceLock<String>,
}

#[derive(Debug)]
enum Container {
    Gguf(Box<Gguf>),
    HuggingFace(Box<Directory>),
}

impl ModelFile {
    /// Opens a `.gguf` file or a Hugging Face directory and checks everything but the tokenizer.
    ///
    /// # Errors
    ///
    /// See [`LoadError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        let path = path.as_ref();
        let (config, tensors, container) = if path.is_dir() {
            let directory = Directory::open(path)?;
            let config = directory.config()?;
            let found = directory.tensors(&config)?;
            let names = Names::new(config.family);
            let tensors = shapes::locate(path, &config, found, |name| names.native(name))?;
            (config, tensors, Container::HuggingFace(Box::new(directory)))
        } else {
            let gguf = Gguf::parse(Arc::new(MappedFile::open(path)?))?;
            let config = gguf_model::config(&gguf)?;
            let found = gguf_model::tensors(&gguf, &config)?;
            let tensors = shapes::locate(path, &config, found, str::to_owned)?;
            (config, tensors, Container::Gguf(Box::new(gguf)))
        };
        Ok(Self {
            path: path.to_owned(),
            config,
            tensors,
            container,
            digest: OnceLock::new(),
        })
    }

    /// Where the model was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A weight by its canonical name.
    ///
    /// # Errors
    ///
    /// [`LoadError::MissingTensor`] for a name that is no required tensor of this model.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, LoadError> {
        self.optional_tensor(name)
            .ok_or_else(|| LoadError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            })
    }

    /// A weight that a model may lack, such as `blk.0.attn_q.bias`.
    pub fn optional_tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let Located {
            format,
            rows,
            cols,
            file,
            bytes,
        } = self.located(name)?;
        Some(TensorView {
            format: *format,
            rows: *rows,
            cols: *cols,
            bytes: file.range(bytes),
        })
    }

    /// Gives back the memory that reading a weight has taken, since it was packed.
    pub(crate) fn release(&self, name: &str) {
        if let Some(Located { file, bytes, .. }) = self.located(name) {
            file.release(bytes);
        }
    }

    fn located(&self, name: &str) -> Option<&Located> {
        let name = if name == "output" && self.config.tied_head {
            "token_embd"
        } else {
            name
        };
        let whole = [".bias", ".scale", ".weight"];
        if whole.iter().any(|kind| name.ends_with(kind)) {
            self.tensors.get(name)
        } else {
            self.tensors.get(&format!("{name}.weight"))
        }
    }

    /// BLAKE3 in hexadecimal of what determines the model's results. Of a GGUF file it is the digest of its bytes; of a
    /// directory, of every weight, configuration and tokenizer file in the order of their names, each as
    /// `name length, name, length, bytes` with lengths as little-endian `u64`.
    ///
    /// The first call reads all of it; later ones are free.
    pub fn digest(&self) -> &str {
        self.digest.get_or_init(|| {
            let mut hasher = blake3::Hasher::new();
            match &self.container {
                Container::Gguf(gguf) => {
                    hash_file(&mut hasher, &gguf.file);
                }
                Container::HuggingFace(directory) => {
                    for (name, file) in &directory.files {
                        hasher.update(&(name.len() as u64).to_le_bytes());
                        hasher.update(name.as_bytes());
                        hasher.update(&(file.len() as u64).to_le_bytes());
                        hash_file(&mut hasher, file);
                    }
                }
            }
            hasher.finalize().to_hex().to_string()
        })
    }

    /// Builds the tokenizer. Costs some 100 ms for a large vocabulary, so keep it.
    ///
    /// # Errors
    ///
    /// [`LoadError::Tokenizer`], or an error of its metadata.
    pub fn tokenizer(&self) -> Result<Tokenizer, LoadError> {
        let tokenizer = match &self.container {
            Container::Gguf(gguf) => gguf_model::tokenizer(gguf)?,
            Container::HuggingFace(directory) => {
                let file = directory.tokenizer_json()?;
                let (bos, eos) = (
                    directory.special_token("bos_token"),
                    directory.special_token("eos_token"),
                );
                Tokenizer::from_json(file, bos, eos)
                    .map_err(|error| self.tokenizer_error(file.path(), error.to_string()))?
            }
        };
        if tokenizer.vocabulary() > self.config.vocabulary {
            let detail = format!(
                "it has {} tokens, but the embedding has {} rows",
                tokenizer.vocabulary(),
                self.config.vocabulary
            );
            return Err(self.tokenizer_error(&self.path, detail));
        }
        Ok(tokenizer)
    }

    /// The chat template, if the model has one. `tokenizer` is the model's; its special tokens are the template's
    /// `bos_token` and `eos_token`.
    ///
    /// # Errors
    ///
    /// [`LoadError::ChatTemplate`] when it is not a valid template.
    pub fn chat_template(&self, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, LoadError> {
        let source = match &self.container {
            Container::Gguf(gguf) => gguf
                .string("tokenizer.chat_template")?
                .map(|source| (self.path.as_path(), source)),
            Container::HuggingFace(directory) => directory.chat_template()?,
        };
        let Some((path, source)) = source else {
            return Ok(None);
        };
        let text = |token: Option<Token>| token.and_then(|token| tokenizer.piece(token)).unwrap_or_default();
        ChatTemplate::new(source, &text(tokenizer.bos()), &text(tokenizer.eos()))
            .map(Some)
            .map_err(|error| LoadError::ChatTemplate {
                path: path.to_owned(),
                detail: error.to_string(),
            })
    }

    fn tokenizer_error(&self, path: &Path, detail: String) -> LoadError {
        LoadError::Tokenizer {
            path: path.to_owned(),
            detail,
        }
    }
}

/// Piece by piece, so that the file is never in memory as a whole.
fn hash_file(hasher: &mut blake3::Hasher, file: &MappedFile) {
    for start in (0..file.len()).step_by(HASHED_BYTES) {
        let piece = start..(start + HASHED_BYTES).min(file.len());
        hasher.update(file.range(&piece));
        file.release(&piece);
    }
}

#[cfg(test)]
mod tests;
