//! What a model file says of its architecture.

use crate::family::Family;

/// How the two halves of a rotated pair lie in a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Pairs are neighbours (2i, 2i+1): Llama weights in GGUF, whose Q and K rows are permuted for it.
    Interleaved,
    /// Pairs are (i, i + dims/2): Hugging Face weights.
    HalfSplit,
}

/// How positions beyond the trained context are mapped.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by `factor`.
    Linear {
        /// Divisor.
        factor: f32,
    },
    /// The base grows with the context (NTK-aware); `factor` and the trained length give the base.
    Dynamic {
        /// Growth of the context.
        factor: f32,
    },
    /// Llama 3.1's piecewise scaling of frequencies.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are scaled in full.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context the model was trained with.
        original_context: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Growth of the context.
        factor: f32,
        /// Context the model was trained with.
        original_context: usize,
        /// Rotations above which a frequency is kept.
        beta_fast: f32,
        /// Rotations below which it is interpolated in full.
        beta_slow: f32,
        /// Multiplies cos and sin; `None` means 0.1 ln(factor) + 1.
        attention_factor: Option<f32>,
    },
    /// One divisor per pair, from a `rope_freqs` tensor or LongRoPE's lists.
    Factors {
        /// `dims / 2` divisors.
        divisors: Vec<f32>,
        /// Multiplies cos and sin.
        attention_factor: f32,
    },
}

/// Rotary position embedding (arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f32,
    /// Elements of a head that rotate; the rest pass.
    pub dims: usize,
    /// Layout of pairs.
    pub style: RopeStyle,
    /// Long-context mapping.
    pub scaling: RopeScaling,
}

/// Some of a model's layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerSet {
    /// None.
    None,
    /// All.
    All,
    /// From this one on.
    From(usize),
    /// Every so many: the last of each group of so many layers.
    Every(usize),
    /// All but those.
    AllBut(usize),
    /// Those that are true; layers beyond the list are not in the set.
    Listed(Vec<bool>),
}

impl LayerSet {
    /// Whether a layer is one of them.
    pub fn contains(&self, layer: usize) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::From(first) => layer >= *first,
            Self::Every(period) => (layer + 1).is_multiple_of(*period),
            Self::AllBut(period) => !(layer + 1).is_multiple_of(*period),
            Self::Listed(layers) => layers.get(layer).copied().unwrap_or(false),
        }
    }
}

/// A window that some layers look through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Positions that a query sees, its own among them.
    pub tokens: usize,
    /// The layers.
    pub layers: LayerSet,
}

/// The experts of every feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a row uses.
    pub used: usize,
    /// Whether the weights of those are divided by their sum.
    pub normalised: bool,
}

/// A decoder of one of the [`FAMILIES`](crate::family::FAMILIES).
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// What the family has in common.
    pub family: &'static Family,
    /// The family's name: `llama`, `mistral`, …
    pub architecture: String,
    /// The model's own name, or the file's.
    pub name: String,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer, or of each expert.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Heads of K and V; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Epsilon of RMSNorm.
    pub norm_epsilon: f32,
    /// Added to every norm weight as it is read.
    pub norm_offset: f32,
    /// Multiplies embeddings.
    pub embedding_scale: Option<f32>,
    /// Multiplies the products of queries and keys.
    pub attention_scale: f32,
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub attention_soft_cap: Option<f32>,
    /// Logits likewise.
    pub logit_soft_cap: Option<f32>,
    /// Layers that see a window only.
    pub window: Option<Window>,
    /// Position embedding.
    pub rope: RopeConfig,
    /// That of layers with a window, if it is another one.
    pub local_rope: Option<RopeConfig>,
    /// Layers without position embedding.
    pub unrotated: LayerSet,
    /// Experts, if the feed-forward layers have any.
    pub experts: Option<Experts>,
    /// Longest sequence, in tokens.
    pub context_tokens_max: usize,
    /// Whether the head shares the embedding's weights.
    pub tied_head: bool,
    /// Tokens that end the output.
    pub eos_tokens: Vec<u32>,
}

impl ModelConfig {
    /// Positions that a query of this layer sees, its own among them; all if `None`.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        let window = self.window.as_ref()?;
        window.layers.contains(layer).then_some(window.tokens)
    }
}
