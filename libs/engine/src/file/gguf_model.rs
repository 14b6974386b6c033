//! What a GGUF file says of a model: configuration, tensors, tokenizer.
//!
//! Keys are those of ggml's `docs/gguf.md`; defaults are llama.cpp's, since it is what files are made for. Some of what
//! `config.json` says is in no key, but in llama.cpp's code for the architecture: which layers have a window or do not rotate (our
//! description of the family says it), and the scale of Gemma's scores.

use std::{collections::HashMap, path::Path, sync::Arc};

use super::{
    LoadError,
    gguf::{Gguf, Value},
    gguf_rope::rope_scaling,
    hugging_face_rope::LOCAL_THETA_DEFAULT,
    limits::{self, Dimensions},
    shapes::Found,
};
use crate::{
    config::{Experts, LayerSet, ModelConfig, RopeConfig, RopeScaling, Window},
    family::{Family, Windows},
    tokenizer::{Pieces, Tokenizer},
};

/// What `rope.freq_base` is when it is not given.
const ROPE_THETA_DEFAULT: f64 = 10_000.0;
/// Layers of the Gemma models of 27 billion parameters, whose scores llama.cpp scales by the root of the hidden size per head.
const GEMMA_27B_LAYERS: [(&str, usize); 2] = [("gemma2", 46), ("gemma3", 62)];
/// `expert_gating_func` of a softmax.
const GATING_SOFTMAX: u64 = 1;

/// Keys that change the computation in a way we do not follow, with the value that leaves it as it is.
const NEUTRAL: [(&str, f64); 7] = [
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
    ("expert_shared_feed_forward_length", 0.0),
    ("expert_weights_scale", 1.0),
];

/// Reads the configuration.
pub(super) fn config(gguf: &Gguf) -> Result<ModelConfig, LoadError> {
    let path = gguf.file.path();
    let (keys, family) = Keys::of(gguf)?;
    keys.refuse_other_computations(family)?;
    let experts = keys.experts(family)?;
    let heads = keys.size("attention.head_count")?;
    let hidden = keys.size("embedding_length")?;
    let vocabulary = match gguf.strings("tokenizer.ggml.tokens")? {
        Some(tokens) => tokens.len(),
        None => keys.size("vocab_size")?,
    };
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => limits::head_dim(path, hidden, heads)?,
    };
    if let Some(value_length) = keys.optional_size("attention.value_length")?
        && value_length != head_dim
    {
        return Err(keys.refused(
            "attention.value_length",
            value_length,
            &format!("the key length {head_dim}"),
        ));
    }
    let dimensions = Dimensions {
        layers: keys.size("block_count")?,
        hidden,
        intermediate: keys.intermediate(family)?,
        heads,
        kv_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocabulary,
        context_tokens_max: keys.size("context_length")?,
        rope_dims: keys.optional_size("rope.dimension_count")?.unwrap_or(head_dim),
    };
    dimensions.check(path)?;
    let (scaling, context_tokens_max) = rope_scaling(&keys, family, &dimensions)?;
    let with = |theta: f64, scaling| RopeConfig {
        theta: theta as f32,
        dims: dimensions.rope_dims,
        style: family.gguf_rope,
        scaling,
    };
    let rope = with(
        keys.positive("rope.freq_base")?.unwrap_or(ROPE_THETA_DEFAULT),
        scaling,
    );
    keys.refuse_other_rotation(family)?;
    let local_theta = keys
        .positive("rope.freq_base_swa")?
        .unwrap_or(LOCAL_THETA_DEFAULT);
    let norm_epsilon = keys
        .positive("attention.layer_norm_rms_epsilon")?
        .ok_or_else(|| LoadError::MissingKey {
            path: path.to_owned(),
            key: keys.name("attention.layer_norm_rms_epsilon"),
        })?;
    Ok(ModelConfig {
        family,
        architecture: family.name.to_owned(),
        name: match gguf.string("general.name")? {
            Some(name) => name.to_owned(),
            None => file_stem(path),
        },
        layers: dimensions.layers,
        hidden,
        intermediate: dimensions.intermediate,
        heads,
        kv_heads: dimensions.kv_heads,
        head_dim,
        vocabulary,
        norm_epsilon: norm_epsilon as f32,
        // Converters write norm weights whole.
        norm_offset: 0.0,
        embedding_scale: family.scaled_embedding.then(|| (hidden as f32).sqrt()),
        attention_scale: keys.attention_scale(&dimensions)?,
        attention_soft_cap: keys.soft_cap("attn_logit_softcapping")?,
        logit_soft_cap: keys.soft_cap("final_logit_softcapping")?,
        window: keys.window(family, &dimensions)?,
        rope,
        local_rope: family.local_rope.then(|| with(local_theta, RopeScaling::None)),
        unrotated: family.unrotated_period.map_or(LayerSet::None, LayerSet::Every),
        experts,
        context_tokens_max,
        tied_head: !gguf.tensors.contains_key("output.weight"),
        eos_tokens: eos_tokens(gguf, vocabulary)?,
    })
}

/// The tensors by canonical name, which is the name in the file but for Phi's `ffn_up`, which holds the gate as well.
pub(super) fn tensors(gguf: &Gguf, config: &ModelConfig) -> Result<HashMap<String, Found>, LoadError> {
    let mut found = HashMap::with_capacity(gguf.tensors.len());
    for (name, info) in &gguf.tensors {
        let (format, bytes) = gguf.tensor_bytes(name, info)?;
        // ggml pads shapes with ones; a row is the first dimension.
        let mut shape: Vec<u64> = info
            .dimensions
            .iter()
            .rev()
            .copied()
            .skip_while(|rows| *rows == 1)
            .collect();
        if shape.is_empty() {
            shape.push(1);
        }
        let start = info.start as usize;
        let canonical = if config.family.fused {
            name.replace(".ffn_up.", ".ffn_gate_up.")
        } else {
            name.clone()
        };
        found.insert(
            canonical,
            Found {
                native: name.clone(),
                shape,
                format,
                file: Arc::clone(&gguf.file),
                bytes: start..start + bytes.len(),
            },
        );
    }
    Ok(found)
}

/// Builds the tokenizer that the metadata describes.
pub(super) fn tokenizer(gguf: &Gguf) -> Result<Tokenizer, LoadError> {
    let path = gguf.file.path();
    let missing = |key: &str| LoadError::MissingKey {
        path: path.to_owned(),
        key: key.to_owned(),
    };
    let id = |key: &str| -> Result<Option<u32>, LoadError> {
        Ok(gguf.unsigned(key)?.and_then(|id| u32::try_from(id).ok()))
    };
    let pieces = Pieces {
        model: gguf
            .string("tokenizer.ggml.model")?
            .ok_or_else(|| missing("tokenizer.ggml.model"))?,
        pre: gguf.string("tokenizer.ggml.pre")?,
        tokens: gguf
            .strings("tokenizer.ggml.tokens")?
            .ok_or_else(|| missing("tokenizer.ggml.tokens"))?,
        types: gguf.integers("tokenizer.ggml.token_type")?,
        merges: gguf.strings("tokenizer.ggml.merges")?,
        scores: gguf.floats("tokenizer.ggml.scores")?,
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        unknown: id("tokenizer.ggml.unknown_token_id")?,
        add_bos: gguf.bool("tokenizer.ggml.add_bos_token")?,
        add_space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?,
    };
    Tokenizer::from_pieces(&pieces).map_err(|error| LoadError::Tokenizer {
        path: path.to_owned(),
        detail: error.to_string(),
    })
}

/// Keys of the architecture, which carry its name in front.
pub(super) struct Keys<'a> {
    pub(super) gguf: &'a Gguf,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    /// The keys of a file, and its family.
    fn of(gguf: &'a Gguf) -> Result<(Self, &'static Family), LoadError> {
        let path = gguf.file.path();
        let architecture = gguf
            .string("general.architecture")?
            .ok_or_else(|| LoadError::MissingKey {
                path: path.to_owned(),
                key: "general.architecture".into(),
            })?;
        let keys = Self { gguf, architecture };
        let experts = gguf
            .unsigned(&keys.name("expert_count"))?
            .is_some_and(|count| count > 0);
        match Family::of_gguf(architecture, experts) {
            Some(family) => Ok((keys, family)),
            None => Err(LoadError::UnsupportedArchitecture {
                path: path.to_owned(),
                architecture: architecture.to_owned(),
                supported: Family::gguf_list(),
            }),
        }
    }

    fn intermediate(&self, family: &Family) -> Result<usize, LoadError> {
        let of_experts = match family.mixture {
            Some(_) => self.optional_size("expert_feed_forward_length")?,
            None => None,
        };
        match of_experts {
            Some(width) => Ok(width),
            None => self.size("feed_forward_length"),
        }
    }

    fn experts(&self, family: &Family) -> Result<Option<Experts>, LoadError> {
        if family.mixture.is_none() {
            return Ok(None);
        }
        let gating = self.gguf.unsigned(&self.name("expert_gating_func"))?;
        if let Some(gating) = gating.filter(|gating| *gating != GATING_SOFTMAX) {
            return Err(self.unsupported(format!("{} = {gating}", self.name("expert_gating_func"))));
        }
        let experts = Experts {
            count: self.size("expert_count")?,
            used: self.size("expert_used_count")?,
            // llama.cpp divides for all of our architectures, unless a file says otherwise.
            normalised: self.gguf.bool(&self.name("expert_weights_norm"))?.unwrap_or(true),
        };
        limits::experts(self.gguf.file.path(), experts)?;
        Ok(Some(experts))
    }

    /// A base of layers with a window is for families that have one.
    fn refuse_other_rotation(&self, family: &Family) -> Result<(), LoadError> {
        let (local, base) = (
            self.positive("rope.freq_base_swa")?,
            self.positive("rope.freq_base")?,
        );
        match local {
            Some(theta) if !family.local_rope && local != base => {
                Err(self.unsupported(format!("{} = {theta}", self.name("rope.freq_base_swa"))))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn attention_scale(&self, dimensions: &Dimensions) -> Result<f32, LoadError> {
        if let Some(scale) = self.positive("attention.scale")? {
            return Ok(scale as f32);
        }
        let shape = (self.architecture, dimensions.layers);
        let of = if GEMMA_27B_LAYERS.contains(&shape) {
            dimensions.hidden / dimensions.heads
        } else {
            dimensions.head_dim
        };
        Ok(1.0 / (of as f32).sqrt())
    }

    /// 0 is none.
    fn soft_cap(&self, key: &str) -> Result<Option<f32>, LoadError> {
        match self.gguf.float(&self.name(key))? {
            Some(cap) if cap < 0.0 => Err(self.refused(key, cap, "at least 0")),
            cap => Ok(cap.filter(|cap| *cap > 0.0).map(|cap| cap as f32)),
        }
    }

    /// The window and its layers. A window that the context never fills is none, unless its layers rotate differently.
    fn window(&self, family: &Family, dimensions: &Dimensions) -> Result<Option<Window>, LoadError> {
        const PATTERN: &str = "attention.sliding_window_pattern";
        let key = "attention.sliding_window";
        let tokens = match self.gguf.unsigned(&self.name(key))? {
            Some(0) => return Ok(None),
            Some(_) => self.optional_size(key)?,
            None if family.gguf == Some("gemma2") => family.window_default,
            None => None,
        };
        let layers = match (self.gguf.get(&self.name(PATTERN)), family.windows) {
            // llama.cpp computes none for these, so that a key would be somebody's own idea.
            (_, Windows::None | Windows::Late | Windows::Switched) => LayerSet::None,
            (_, Windows::All) if family.gguf == Some("llama") => LayerSet::None,
            (None, Windows::All) => LayerSet::All,
            (None, Windows::AllBut { period }) => LayerSet::AllBut(period),
            (Some(Value::Unsigned(_) | Value::Signed(_)), _) => LayerSet::AllBut(self.size(PATTERN)?),
            (Some(_), _) => LayerSet::Listed(self.gguf.bools(&self.name(PATTERN))?.unwrap_or_default()),
        };
        if let LayerSet::Listed(listed) = &layers
            && listed.len() != dimensions.layers
        {
            let expected = format!("{} layers long", dimensions.layers);
            return Err(self.refused(PATTERN, listed.len(), &expected));
        }
        match tokens {
            Some(tokens) if layers == LayerSet::None => {
                Err(self.unsupported(format!("{} = {tokens}", self.name(key))))
            }
            Some(tokens) if tokens < dimensions.context_tokens_max || family.local_rope => {
                Ok(Some(Window { tokens, layers }))
            }
            Some(_) | None => Ok(None),
        }
    }

    pub(super) fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.gguf.unsigned(&self.name(key))? else {
            return Ok(None);
        };
        match usize::try_from(value) {
            Ok(size) if (1..=limits::SIZE_MAX).contains(&size) => Ok(Some(size)),
            _ => Err(self.refused(key, value, &format!("between 1 and {}", limits::SIZE_MAX))),
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, LoadError> {
        self.optional_size(key)?.ok_or_else(|| LoadError::MissingKey {
            path: self.gguf.file.path().to_owned(),
            key: self.name(key),
        })
    }

    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.gguf.float(&self.name(key))? {
            Some(value) if value <= 0.0 => Err(self.refused(key, value, "greater than 0")),
            other => Ok(other),
        }
    }

    pub(super) fn refused(&self, key: &str, value: impl ToString, expected: &str) -> LoadError {
        LoadError::BadValue {
            path: self.gguf.file.path().to_owned(),
            key: self.name(key),
            value: value.to_string(),
            expected: expected.to_owned(),
        }
    }

    fn refuse_other_computations(&self, family: &Family) -> Result<(), LoadError> {
        let ours = |admitted: bool, key: &'static str| (!admitted).then_some((key, 0.0));
        let of_family = [
            ours(family.capped_scores, "attn_logit_softcapping"),
            ours(family.capped_logits, "final_logit_softcapping"),
            ours(family.mixture.is_some(), "expert_count"),
            ours(family.mixture.is_some(), "expert_used_count"),
        ];
        for (key, neutral) in NEUTRAL.into_iter().chain(of_family.into_iter().flatten()) {
            let name = self.name(key);
            let value = match self.gguf.get(&name) {
                None => continue,
                Some(Value::Unsigned(value)) => *value as f64,
                Some(Value::Signed(value)) => *value as f64,
                Some(Value::Float(value)) => *value,
                Some(other @ (Value::Bool(_) | Value::String(_) | Value::Array(_))) => {
                    return Err(self.gguf.bad_value(&name, other, "a number"));
                }
            };
            if value != neutral {
                return Err(self.unsupported(format!("{name} = {value}")));
            }
        }
        if self.gguf.bool(&self.name("attention.causal"))? == Some(false) {
            return Err(self.unsupported("attention that is not causal".into()));
        }
        Ok(())
    }

    pub(super) fn unsupported(&self, feature: String) -> LoadError {
        LoadError::UnsupportedFeature {
            path: self.gguf.file.path().to_owned(),
            feature,
        }
    }
}

fn eos_tokens(gguf: &Gguf, vocabulary: usize) -> Result<Vec<u32>, LoadError> {
    let mut tokens = Vec::new();
    for key in ["eos", "eot", "eom"].map(|name| format!("tokenizer.ggml.{name}_token_id")) {
        if let Some(id) = gguf.unsigned(&key)? {
            limits::token(gguf.file.path(), &key, id, vocabulary, &mut tokens)?;
        }
    }
    Ok(tokens)
}

fn file_stem(path: &Path) -> String {
    path.file_stem()
        .map(|stem| stem.to_string_lossy().into_owned())
        .unwrap_or_default()
}
