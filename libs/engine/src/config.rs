//! What a model file says of its architecture.

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

/// A Llama-family decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `llama`, `mistral`, … as the file names it.
    pub architecture: String,
    /// The model's own name, or the file's.
    pub name: String,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
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
    /// Position embedding.
    pub rope: RopeConfig,
    /// Longest sequence, in tokens.
    pub context_tokens_max: usize,
    /// Whether the head shares the embedding's weights.
    pub tied_head: bool,
    /// Tokens that end the output.
    pub eos_tokens: Vec<u32>,
}
