//! The model families that the engine computes: one table, in which each is described by what sets it apart.
//!
//! A description says which of the shared blocks a layer is made of; files are read (`crate::file`) and steps computed
//! (`crate::step`) by it. There is no code of one family. What a file may set for itself (sizes, windows, soft caps, scalings)
//! is in [`ModelConfig`](crate::config::ModelConfig), as far as the description admits it; anything else is refused by name.

use crate::config::RopeStyle;

/// Where the RMSNorms of a layer's two branches (attention and feed-forward) are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// The branch reads the normalised stream.
    Before,
    /// The branch reads the stream itself, and what it gives is normalised before it is added.
    After,
    /// Both.
    Around,
}

impl NormPlacement {
    /// Whether a branch's input is normalised.
    pub fn before(self) -> bool {
        self != Self::After
    }

    /// Whether a branch's output is.
    pub fn after(self) -> bool {
        self != Self::Before
    }
}

/// What the feed-forward layer's gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³)))`.
    GeluTanh,
}

/// RMSNorm of queries and keys, before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// None.
    None,
    /// Each head by itself, with one weight for all.
    PerHead,
    /// All heads together.
    FullWidth,
}

/// Which products have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Biases {
    /// All four of the attention if `attention_bias` says so.
    Configured,
    /// Queries, keys and values, always.
    QueryKeyValue,
}

/// Which layers see no further back than a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// None; a file that asks for one is refused.
    None,
    /// All, if the file gives a size.
    All,
    /// All, if `use_sliding_window` says so.
    Switched,
    /// From the `max_window_layers`-th on, if `use_sliding_window` says so.
    Late,
    /// All but every `period`-th.
    AllBut {
        /// Layers from one without a window to the next.
        period: usize,
    },
}

/// A feed-forward layer of experts, of which each row uses a few.
#[derive(Debug, PartialEq, Eq)]
pub struct Mixture {
    /// Key of `config.json` for the number of experts.
    pub count_key: &'static str,
    /// Key of `config.json` for their width.
    pub width_key: &'static str,
    /// Key that says whether the weights of the chosen are divided by their sum; always, if there is none.
    pub normalise_key: Option<&'static str>,
    /// `transformers`' name of the router, within a layer.
    pub router: &'static str,
    /// `transformers`' name of what holds the experts, within a layer.
    pub experts: &'static str,
    /// Its names of an expert's gate, up and down projections.
    pub projections: [&'static str; 3],
}

/// A class whose directories hold the family's model beside what sees images.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrapper {
    /// The class in `architectures`. Its `text_config` is the family's `config.json`.
    pub hugging_face: &'static str,
    /// What stands before the names of the family's tensors, and what they begin with without it: as version 4 of `transformers`
    /// wrote it, and as version 5 does.
    pub prefixes: [(&'static str, &'static str); 3],
    /// What the names of the other tensors begin with. No text goes through them.
    pub others: [&'static str; 4],
}

/// What sets a family apart.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// Short name, as `perigee model list` shows it.
    pub name: &'static str,
    /// What its authors call it.
    pub title: &'static str,
    /// The class in `architectures` of `config.json`.
    pub hugging_face: &'static str,
    /// A class that holds it, if there is one.
    pub wrapper: Option<Wrapper>,
    /// `general.architecture` of GGUF files, if llama.cpp has one that tells all of the family.
    pub gguf: Option<&'static str>,
    /// How GGUF files pair the rotated elements: llama.cpp permutes the rows of Q and K for some architectures.
    pub gguf_rope: RopeStyle,
    /// Norms of the branches.
    pub norms: NormPlacement,
    /// Whether Hugging Face files hold norm weights less one. GGUF files hold them whole.
    pub centred_norms: bool,
    /// Norms of queries and keys.
    pub query_key_norm: QueryKeyNorm,
    /// The gate's activation.
    pub activation: Activation,
    /// Biases.
    pub biases: Biases,
    /// Whether the embedding is multiplied by the root of its width.
    pub scaled_embedding: bool,
    /// Whether the scores' scale comes from `query_pre_attn_scalar` instead of the head size.
    pub query_scalar: bool,
    /// Whether scores may have a soft cap.
    pub capped_scores: bool,
    /// Whether logits may have one.
    pub capped_logits: bool,
    /// Sliding windows.
    pub windows: Windows,
    /// What `transformers` takes for the window's size if `config.json` does not give one.
    pub window_default: Option<usize>,
    /// Whether layers with a window rotate by a base of their own, `rope_local_base_freq`.
    pub local_rope: bool,
    /// Every so many layers, one does not rotate, unless the file lists them.
    pub unrotated_period: Option<usize>,
    /// Whether `partial_rotary_factor` may leave a part of each head unrotated.
    pub partial_rotary: bool,
    /// Whether Q, K and V, and the gate and up projections, are one tensor each.
    pub fused: bool,
    /// Experts.
    pub mixture: Option<Mixture>,
    /// `transformers`' defaults of sizes that real files leave out.
    pub defaults: &'static [(&'static str, u64)],
    /// `transformers`' default of `rms_norm_eps`.
    pub norm_epsilon_default: f64,
    /// `transformers`' default of `rope_theta`.
    pub rope_theta_default: f64,
    /// `transformers`' default of `tie_word_embeddings`.
    pub tied_default: bool,
}

/// What the others are told apart from.
const LLAMA: Family = Family {
    name: "llama",
    title: "Llama 2, 3, SmolLM2",
    hugging_face: "LlamaForCausalLM",
    wrapper: None,
    gguf: Some("llama"),
    gguf_rope: RopeStyle::Interleaved,
    norms: NormPlacement::Before,
    centred_norms: false,
    query_key_norm: QueryKeyNorm::None,
    activation: Activation::Silu,
    biases: Biases::Configured,
    scaled_embedding: false,
    query_scalar: false,
    capped_scores: false,
    capped_logits: false,
    windows: Windows::None,
    window_default: None,
    local_rope: false,
    unrotated_period: None,
    partial_rotary: false,
    fused: false,
    mixture: None,
    defaults: &[],
    norm_epsilon_default: 1e-6,
    rope_theta_default: 10_000.0,
    tied_default: false,
};

const QWEN3: Family = Family {
    name: "qwen3",
    title: "Qwen3",
    hugging_face: "Qwen3ForCausalLM",
    gguf: Some("qwen3"),
    gguf_rope: RopeStyle::HalfSplit,
    query_key_norm: QueryKeyNorm::PerHead,
    windows: Windows::Late,
    window_default: Some(4096),
    ..LLAMA
};

const GEMMA2: Family = Family {
    name: "gemma2",
    title: "Gemma 2",
    hugging_face: "Gemma2ForCausalLM",
    gguf: Some("gemma2"),
    gguf_rope: RopeStyle::HalfSplit,
    norms: NormPlacement::Around,
    centred_norms: true,
    activation: Activation::GeluTanh,
    scaled_embedding: true,
    query_scalar: true,
    capped_scores: true,
    capped_logits: true,
    windows: Windows::AllBut { period: 2 },
    window_default: Some(4096),
    tied_default: true,
    ..LLAMA
};

/// All families. Where two have one architecture in GGUF, the one with experts is taken if the file has experts, and else the first.
pub static FAMILIES: [Family; 11] = [
    LLAMA,
    // llama.cpp writes Mistral as `llama`, which has no window, so only directories can have one.
    Family {
        name: "mistral",
        title: "Mistral",
        hugging_face: "MistralForCausalLM",
        gguf: None,
        windows: Windows::All,
        window_default: Some(4096),
        ..LLAMA
    },
    Family {
        name: "mixtral",
        title: "Mixtral",
        hugging_face: "MixtralForCausalLM",
        windows: Windows::All,
        mixture: Some(Mixture {
            count_key: "num_local_experts",
            width_key: "intermediate_size",
            normalise_key: None,
            router: "block_sparse_moe.gate",
            experts: "block_sparse_moe.experts",
            projections: ["w1", "w3", "w2"],
        }),
        norm_epsilon_default: 1e-5,
        rope_theta_default: 1e6,
        ..LLAMA
    },
    Family {
        name: "qwen2",
        title: "Qwen2, Qwen2.5",
        hugging_face: "Qwen2ForCausalLM",
        gguf: Some("qwen2"),
        query_key_norm: QueryKeyNorm::None,
        biases: Biases::QueryKeyValue,
        ..QWEN3
    },
    QWEN3,
    Family {
        name: "qwen3moe",
        title: "Qwen3 MoE",
        hugging_face: "Qwen3MoeForCausalLM",
        gguf: Some("qwen3moe"),
        windows: Windows::Switched,
        mixture: Some(Mixture {
            count_key: "num_experts",
            width_key: "moe_intermediate_size",
            normalise_key: Some("norm_topk_prob"),
            router: "mlp.gate",
            experts: "mlp.experts",
            projections: ["gate_proj", "up_proj", "down_proj"],
        }),
        ..QWEN3
    },
    GEMMA2,
    Family {
        name: "gemma3",
        title: "Gemma 3 (text)",
        hugging_face: "Gemma3ForCausalLM",
        wrapper: Some(Wrapper {
            hugging_face: "Gemma3ForConditionalGeneration",
            prefixes: [
                ("language_model.model.", "model."),
                ("language_model.lm_head.", "lm_head."),
                ("model.language_model.", "model."),
            ],
            others: [
                "vision_tower.",
                "multi_modal_projector.",
                "model.vision_tower.",
                "model.multi_modal_projector.",
            ],
        }),
        gguf: Some("gemma3"),
        query_key_norm: QueryKeyNorm::PerHead,
        windows: Windows::AllBut { period: 6 },
        local_rope: true,
        defaults: &[
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("head_dim", 256),
            ("query_pre_attn_scalar", 256),
            ("max_position_embeddings", 131_072),
            ("vocab_size", 262_208),
        ],
        rope_theta_default: 1e6,
        ..GEMMA2
    },
    Family {
        name: "phi3",
        title: "Phi-3, Phi-4",
        hugging_face: "Phi3ForCausalLM",
        gguf: Some("phi3"),
        gguf_rope: RopeStyle::HalfSplit,
        windows: Windows::All,
        partial_rotary: true,
        fused: true,
        norm_epsilon_default: 1e-5,
        ..LLAMA
    },
    Family {
        name: "smollm3",
        title: "SmolLM3",
        hugging_face: "SmolLM3ForCausalLM",
        gguf: Some("smollm3"),
        unrotated_period: Some(4),
        rope_theta_default: 2e6,
        tied_default: true,
        ..LLAMA
    },
    Family {
        name: "olmo2",
        title: "OLMo 2",
        hugging_face: "Olmo2ForCausalLM",
        gguf: Some("olmo2"),
        gguf_rope: RopeStyle::HalfSplit,
        norms: NormPlacement::After,
        query_key_norm: QueryKeyNorm::FullWidth,
        norm_epsilon_default: 1e-5,
        ..LLAMA
    },
];

impl Family {
    /// The family of a class of `transformers`.
    pub fn of_hugging_face(class: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.hugging_face == class)
    }

    /// The family that a class of `transformers` holds beside what sees images.
    pub fn of_wrapper(class: &str) -> Option<(&'static Self, &'static Wrapper)> {
        let wrappers = FAMILIES
            .iter()
            .filter_map(|family| Some((family, family.wrapper.as_ref()?)));
        wrappers
            .into_iter()
            .find(|(_, wrapper)| wrapper.hugging_face == class)
    }

    /// The family of an architecture of GGUF files.
    pub fn of_gguf(architecture: &str, experts: bool) -> Option<&'static Self> {
        let mut named = FAMILIES.iter().filter(|family| family.gguf == Some(architecture));
        let first = named.clone().next();
        named.find(|family| family.mixture.is_some() == experts).or(first)
    }

    /// The family of this short name.
    pub fn named(name: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.name == name)
    }

    /// The classes of `transformers` that the engine computes, for messages.
    pub fn hugging_face_list() -> String {
        let wrappers = FAMILIES.iter().filter_map(|family| family.wrapper.as_ref());
        FAMILIES
            .iter()
            .map(|family| family.hugging_face)
            .chain(wrappers.map(|wrapper| wrapper.hugging_face))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// The architectures of GGUF files that the engine computes, for messages.
    pub fn gguf_list() -> String {
        let mut names: Vec<&str> = FAMILIES.iter().filter_map(|family| family.gguf).collect();
        names.sort_unstable();
        names.dedup();
        names.join(", ")
    }
}
