//! A model in memory: its weights, packed for the kernels, and what else its files say.

use std::path::Path;
use std::sync::Arc;
use std::{io, panic, thread};

use types::{KvDtype, KvLayout, KvSpace};

use crate::chat::ChatTemplate;
use crate::compute::matrix::Matrix;
use crate::config::ModelConfig;
use crate::dequantise::{dequantise_row, is_f8_nan};
use crate::file::{LoadError, ModelFile};
use crate::tensor::{TensorFormat, TensorView};
use crate::tokenizer::Tokenizer;

/// How the engine computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// `f32` weights, activations and KV: the oracle.
    Exact,
    /// Weights as the file has them, activations rounded to 8 bits where weights are quantised, `f16` KV.
    #[default]
    Fast,
}

impl Precision {
    /// Names the arithmetic in a [`KvSpace`]. Changing any operation's order or rounding changes the number.
    pub fn arithmetic(self) -> &'static str {
        match self {
            Self::Exact => "exact-1",
            Self::Fast => "fast-1",
        }
    }
}

/// How the engine computes, and in which form it keeps KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Numerics {
    /// Arithmetic.
    pub precision: Precision,
    /// What K and V are rounded to in blocks.
    pub kv: KvDtype,
}

impl From<Precision> for Numerics {
    /// With the KV that loses nothing beside what the arithmetic loses.
    fn from(precision: Precision) -> Self {
        let kv = match precision {
            Precision::Exact => KvDtype::F32,
            Precision::Fast => KvDtype::F16,
        };
        Self { precision, kv }
    }
}

/// An immutable model, shared by the engines of a process.
pub struct Model {
    config: ModelConfig,
    numerics: Numerics,
    digest: String,
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    pub(crate) weights: Weights,
}

/// All weights of a model.
pub(crate) struct Weights {
    pub(crate) embedding: Embedding,
    pub(crate) layers: Vec<Layer>,
    pub(crate) output_norm: Vec<f32>,
    pub(crate) head: Matrix,
}

/// A transformer layer. It has the norms that its family says, and biases that its file has.
pub(crate) struct Layer {
    pub(crate) attention_norm: Option<Vec<f32>>,
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) query_norm: Option<Vec<f32>>,
    pub(crate) key_norm: Option<Vec<f32>>,
    pub(crate) attention_output: Linear,
    pub(crate) post_attention_norm: Option<Vec<f32>>,
    pub(crate) feed_forward_norm: Option<Vec<f32>>,
    pub(crate) feed_forward: FeedForward,
    pub(crate) post_feed_forward_norm: Option<Vec<f32>>,
}

/// What every row goes through, or some of which each row does.
pub(crate) enum FeedForward {
    Dense(Gated),
    Experts { router: Matrix, experts: Vec<Gated> },
}

/// `down (activation(gate x) * up x)`.
pub(crate) struct Gated {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
}

impl Gated {
    fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}

impl FeedForward {
    fn bytes(&self) -> usize {
        match self {
            Self::Dense(gated) => gated.bytes(),
            Self::Experts { router, experts } => {
                router.bytes() + experts.iter().map(Gated::bytes).sum::<usize>()
            }
        }
    }
}

/// A matrix and what is added to its products.
pub(crate) struct Linear {
    pub(crate) matrix: Matrix,
    pub(crate) bias: Option<Vec<f32>>,
}

/// Rows of the embedding, encoded as in the file: one row per token is read, so packing would gain nothing.
pub(crate) struct Embedding {
    format: TensorFormat,
    cols: usize,
    bytes: Box<[u8]>,
}

impl Embedding {
    fn new(view: &TensorView<'_>) -> Self {
        Self {
            format: view.format,
            cols: view.cols,
            bytes: view.bytes.into(),
        }
    }

    /// The row of a token, which must be below the vocabulary.
    pub(crate) fn row(&self, token: usize, out: &mut [f32]) {
        let bytes = self.format.row_bytes(self.cols);
        dequantise_row(self.format, &self.bytes[token * bytes..][..bytes], out);
    }
}

impl Model {
    /// Loads a `.gguf` file or a Hugging Face directory.
    pub fn load(path: &Path, numerics: impl Into<Numerics>) -> Result<Arc<Self>, LoadError> {
        Self::load_with(path, numerics, &mut |_, _| {})
    }

    /// Loads a model; `progress(done, total)` is called after each weight, in bytes of the file.
    pub fn load_with(
        path: &Path,
        numerics: impl Into<Numerics>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Arc<Self>, LoadError> {
        let (file, numerics) = (ModelFile::open(path)?, numerics.into());
        // What does not need the weights is done while they are packed.
        let (beside, weights) = thread::scope(|scope| {
            let beside = scope.spawn(|| {
                let tokenizer = file.tokenizer()?;
                let chat_template = file.chat_template(&tokenizer)?;
                file.digest();
                Ok::<_, LoadError>((tokenizer, chat_template))
            });
            let weights = Packer::new(&file, numerics.precision, progress).and_then(Packer::weights);
            (beside.join(), weights)
        });
        let (tokenizer, chat_template) = beside.unwrap_or_else(|panic| panic::resume_unwind(panic))?;
        let weights = weights?;
        Ok(Arc::new(Self {
            config: file.config().clone(),
            numerics,
            digest: file.digest().to_owned(),
            tokenizer,
            chat_template,
            weights,
        }))
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How it computes.
    pub fn precision(&self) -> Precision {
        self.numerics.precision
    }

    /// How it computes, and keeps KV.
    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Its chat template, if the files have one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Bytes of packed weights and embedding.
    pub fn weight_bytes(&self) -> usize {
        self.weights.embedding.bytes.len() + self.step_weight_bytes()
    }

    /// Bytes of weights that every step reads: all but the embedding, of which a token needs a row.
    pub fn step_weight_bytes(&self) -> usize {
        let Weights { layers, head, .. } = &self.weights;
        let of_layer = |layer: &Layer| {
            let linear = [&layer.query, &layer.key, &layer.value, &layer.attention_output];
            let matrices = linear.map(|linear| linear.matrix.bytes()).iter().sum::<usize>();
            matrices + layer.feed_forward.bytes()
        };
        head.bytes() + layers.iter().map(of_layer).sum::<usize>()
    }

    /// The format of its KV.
    pub fn layout(&self, block_tokens: usize) -> KvLayout {
        layout(&self.config, self.numerics, block_tokens)
    }

    /// The space of its blocks, for no adapter and no tenant.
    pub fn kv_space(&self, block_tokens: usize) -> KvSpace {
        space(&self.config, &self.digest, self.numerics, block_tokens)
    }
}

/// What [`Model::kv_space`] gives, without loading the weights: for nodes that hold blocks and do not compute.
pub fn kv_space(file: &ModelFile, numerics: impl Into<Numerics>, block_tokens: usize) -> KvSpace {
    space(file.config(), file.digest(), numerics.into(), block_tokens)
}

fn layout(config: &ModelConfig, numerics: Numerics, block_tokens: usize) -> KvLayout {
    KvLayout {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        block_tokens,
        dtype: numerics.kv,
    }
}

fn space(config: &ModelConfig, digest: &str, numerics: Numerics, block_tokens: usize) -> KvSpace {
    KvSpace {
        model_digest: digest.to_owned(),
        arithmetic: numerics.precision.arithmetic().to_owned(),
        layout: layout(config, numerics, block_tokens),
        adapter: None,
        tenant_salt: String::new(),
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("name", &self.config.name)
            .field("numerics", &self.numerics)
            .finish_non_exhaustive()
    }
}

/// Packs the weights of a file one by one.
struct Packer<'a> {
    file: &'a ModelFile,
    exact: bool,
    progress: &'a mut dyn FnMut(u64, u64),
    done_bytes: u64,
    total_bytes: u64,
}

impl<'a> Packer<'a> {
    fn new(
        file: &'a ModelFile,
        precision: Precision,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        let mut total_bytes = 0;
        for name in ["token_embd", "output"] {
            total_bytes += file.tensor(name)?.bytes.len() as u64;
        }
        for layer in 0..file.config().layers {
            for name in matrix_names(file.config()) {
                total_bytes += file.tensor(&format!("blk.{layer}.{name}"))?.bytes.len() as u64;
            }
        }
        let exact = precision == Precision::Exact;
        Ok(Self {
            file,
            exact,
            progress,
            done_bytes: 0,
            total_bytes,
        })
    }

    fn weights(mut self) -> Result<Weights, LoadError> {
        let view = self.file.tensor("token_embd")?;
        let embedding = Embedding::new(&view);
        self.advance(view.bytes.len());
        self.file.release("token_embd");
        let layers = (0..self.file.config().layers)
            .map(|layer| self.layer(layer))
            .collect::<Result<_, _>>()?;
        let output_norm = self.norm(&self.file.tensor("output_norm")?);
        let head = self.matrix("output")?;
        Ok(Weights {
            embedding,
            layers,
            output_norm,
            head,
        })
    }

    fn layer(&mut self, layer: usize) -> Result<Layer, LoadError> {
        let name = |tensor: &str| format!("blk.{layer}.{tensor}");
        Ok(Layer {
            attention_norm: self.optional_norm(&name("attn_norm")),
            query: self.linear(&name("attn_q"))?,
            key: self.linear(&name("attn_k"))?,
            value: self.linear(&name("attn_v"))?,
            query_norm: self.optional_norm(&name("attn_q_norm")),
            key_norm: self.optional_norm(&name("attn_k_norm")),
            attention_output: self.linear(&name("attn_output"))?,
            post_attention_norm: self.optional_norm(&name("post_attention_norm")),
            feed_forward_norm: self.optional_norm(&name("ffn_norm")),
            feed_forward: self.feed_forward(layer)?,
            post_feed_forward_norm: self.optional_norm(&name("post_ffw_norm")),
        })
    }

    fn feed_forward(&mut self, layer: usize) -> Result<FeedForward, LoadError> {
        let Some(experts) = self.file.config().experts else {
            return Ok(FeedForward::Dense(self.gated(layer, "")?));
        };
        let router = self.matrix(&format!("blk.{layer}.ffn_gate_inp"))?;
        let experts = (0..experts.count).map(|expert| self.gated(layer, &format!(".{expert}")));
        Ok(FeedForward::Experts {
            router,
            experts: experts.collect::<Result<_, _>>()?,
        })
    }

    fn gated(&mut self, layer: usize, suffix: &str) -> Result<Gated, LoadError> {
        let mut matrix = |name: &str| self.matrix(&format!("blk.{layer}.{name}{suffix}"));
        Ok(Gated {
            gate: matrix("ffn_gate")?,
            up: matrix("ffn_up")?,
            down: matrix("ffn_down")?,
        })
    }

    fn norm(&self, view: &TensorView<'_>) -> Vec<f32> {
        let offset = self.file.config().norm_offset;
        let mut weights = view.to_f32();
        if offset != 0.0 {
            weights.iter_mut().for_each(|weight| *weight += offset);
        }
        weights
    }

    /// `None` where the family has no such norm: that all it has are there was checked when the file was opened.
    fn optional_norm(&self, name: &str) -> Option<Vec<f32>> {
        self.file.optional_tensor(name).map(|view| self.norm(&view))
    }

    fn linear(&mut self, name: &str) -> Result<Linear, LoadError> {
        let bias = self.file.optional_tensor(&format!("{name}.bias"));
        Ok(Linear {
            matrix: self.matrix(name)?,
            bias: bias.map(|view| view.to_f32()),
        })
    }

    fn matrix(&mut self, name: &str) -> Result<Matrix, LoadError> {
        let view = self.file.tensor(name)?;
        let memory = |source: io::Error| LoadError::Io {
            path: self.file.path().to_owned(),
            source,
        };
        let matrix = match self.file.optional_tensor(&format!("{name}.scale")) {
            Some(scales) => {
                self.check_scaled(name, &view, &scales)?;
                Matrix::pack_scaled(&view, &scales, self.exact)
            }
            None => Matrix::pack(&view, self.exact),
        };
        let matrix = matrix.map_err(memory)?;
        self.file.release(name);
        self.advance(view.bytes.len());
        Ok(matrix)
    }

    /// FP8 has no infinities, so that what does not fit becomes no number: such a weight is damaged, and so is such a scale.
    fn check_scaled(
        &self,
        name: &str,
        weights: &TensorView<'_>,
        scales: &TensorView<'_>,
    ) -> Result<(), LoadError> {
        let numbers = !weights.bytes.iter().any(|byte| is_f8_nan(*byte))
            && scales.to_f32().iter().all(|scale| scale.is_finite());
        if numbers {
            return Ok(());
        }
        Err(LoadError::Malformed {
            path: self.file.path().to_owned(),
            detail: format!("tensor {name} or its scales hold something that is no number"),
        })
    }

    fn advance(&mut self, bytes: usize) {
        self.done_bytes += bytes as u64;
        (self.progress)(self.done_bytes, self.total_bytes);
    }
}

/// Matrices of a layer.
fn matrix_names(config: &ModelConfig) -> Vec<String> {
    let attention = ["attn_q", "attn_k", "attn_v", "attn_output"].map(str::to_owned);
    let projections = ["ffn_gate", "ffn_up", "ffn_down"];
    let mut names = attention.to_vec();
    match config.experts {
        None => names.extend(projections.map(str::to_owned)),
        Some(experts) => {
            names.push("ffn_gate_inp".to_owned());
            let of_expert = |expert| projections.map(|projection| format!("{projection}.{expert}"));
            names.extend((0..experts.count).flat_map(of_expert));
        }
    }
    names
}
