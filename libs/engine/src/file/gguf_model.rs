//! What a GGUF file says of a Llama-family model: configuration, tensors, tokenizer.
//!
//! Keys are those of ggml's `docs/gguf.md`; defaults are llama.cpp's, since it is what files are made for.

use std::{collections::HashMap, path::Path, sync::Arc};

use super::{
    LoadError,
    gguf::{Gguf, Value},
    limits::{self, Dimensions},
    shapes::Found,
};
use crate::{
    config::{ModelConfig, RopeConfig, RopeScaling, RopeStyle},
    dequantise::dequantise_row,
    tokenizer::{Pieces, Tokenizer},
};

/// What `rope.freq_base` is when it is not given.
const ROPE_THETA_DEFAULT: f64 = 10_000.0;
/// YaRN's defaults, from its paper and from ggml.
const YARN_BETA_FAST_DEFAULT: f64 = 32.0;
const YARN_BETA_SLOW_DEFAULT: f64 = 1.0;

/// Keys that change the computation in a way we do not follow, with the value that leaves it as it is.
const NEUTRAL: [(&str, f64); 10] = [
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("attention.sliding_window", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
];

/// Reads the configuration.
pub(super) fn config(gguf: &Gguf) -> Result<ModelConfig, LoadError> {
    let path = gguf.file.path();
    let keys = Keys {
        gguf,
        architecture: architecture(gguf)?,
    };
    keys.refuse_other_computations()?;
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
        intermediate: keys.size("feed_forward_length")?,
        heads,
        kv_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocabulary,
        context_tokens_max: keys.size("context_length")?,
        rope_dims: keys.optional_size("rope.dimension_count")?.unwrap_or(head_dim),
    };
    dimensions.check(path)?;
    let rope = RopeConfig {
        theta: keys.positive("rope.freq_base")?.unwrap_or(ROPE_THETA_DEFAULT) as f32,
        dims: dimensions.rope_dims,
        style: RopeStyle::Interleaved,
        scaling: rope_scaling(&keys, &dimensions)?,
    };
    let norm_epsilon = keys
        .positive("attention.layer_norm_rms_epsilon")?
        .ok_or_else(|| LoadError::MissingKey {
            path: path.to_owned(),
            key: keys.name("attention.layer_norm_rms_epsilon"),
        })?;
    Ok(ModelConfig {
        architecture: keys.architecture.to_owned(),
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
        rope,
        context_tokens_max: dimensions.context_tokens_max,
        tied_head: !gguf.tensors.contains_key("output.weight"),
        eos_tokens: eos_tokens(gguf, vocabulary)?,
    })
}

/// The tensors by canonical name, which is the name in the file.
pub(super) fn tensors(gguf: &Gguf) -> Result<HashMap<String, Found>, LoadError> {
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
        found.insert(
            name.clone(),
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

fn architecture(gguf: &Gguf) -> Result<&str, LoadError> {
    let path = gguf.file.path();
    let architecture = gguf
        .string("general.architecture")?
        .ok_or_else(|| LoadError::MissingKey {
            path: path.to_owned(),
            key: "general.architecture".into(),
        })?;
    if architecture != "llama" {
        return Err(LoadError::UnsupportedArchitecture {
            path: path.to_owned(),
            architecture: architecture.to_owned(),
            supported: "llama",
        });
    }
    Ok(architecture)
}

/// Keys of the architecture, which carry its name in front.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.gguf.unsigned(&self.name(key))? else {
            return Ok(None);
        };
        match usize::try_from(value) {
            Ok(size) if (1..=limits::SIZE_MAX).contains(&size) => Ok(Some(size)),
            _ => Err(self.refused(key, value, &format!("between 1 and {}", limits::SIZE_MAX))),
        }
    }

    fn size(&self, key: &str) -> Result<usize, LoadError> {
        self.optional_size(key)?.ok_or_else(|| LoadError::MissingKey {
            path: self.gguf.file.path().to_owned(),
            key: self.name(key),
        })
    }

    fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.gguf.float(&self.name(key))? {
            Some(value) if value <= 0.0 => Err(self.refused(key, value, "greater than 0")),
            other => Ok(other),
        }
    }

    fn refused(&self, key: &str, value: impl ToString, expected: &str) -> LoadError {
        LoadError::BadValue {
            path: self.gguf.file.path().to_owned(),
            key: self.name(key),
            value: value.to_string(),
            expected: expected.to_owned(),
        }
    }

    fn refuse_other_computations(&self) -> Result<(), LoadError> {
        for (key, neutral) in NEUTRAL {
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

    fn unsupported(&self, feature: String) -> LoadError {
        LoadError::UnsupportedFeature {
            path: self.gguf.file.path().to_owned(),
            feature,
        }
    }
}

fn rope_scaling(keys: &Keys<'_>, dimensions: &Dimensions) -> Result<RopeScaling, LoadError> {
    let kind = keys.gguf.string(&keys.name("rope.scaling.type"))?;
    // Files from before 2024 have only this key.
    let linear_legacy = keys.positive("rope.scale_linear")?;
    let factor = keys.positive("rope.scaling.factor")?.or(linear_legacy);
    let attention_factor = keys.positive("rope.scaling.attn_factor")?;
    let scaling = match (kind, factor) {
        (Some("none"), _) | (None | Some("linear"), None) => RopeScaling::None,
        (None | Some("linear"), Some(1.0)) => RopeScaling::None,
        (None | Some("linear"), Some(factor)) => RopeScaling::Linear {
            factor: factor as f32,
        },
        (Some("yarn"), Some(factor)) => yarn(keys, factor, attention_factor)?,
        (Some("yarn"), None) => {
            return Err(LoadError::MissingKey {
                path: keys.gguf.file.path().to_owned(),
                key: keys.name("rope.scaling.factor"),
            });
        }
        (Some(other), _) => return Err(keys.unsupported(format!("RoPE scaling of type {other:?}"))),
    };
    let Some(divisors) = rope_divisors(keys, dimensions)? else {
        let applied = matches!(scaling, RopeScaling::Yarn { .. });
        return match attention_factor {
            Some(factor) if factor != 1.0 && !applied => {
                Err(keys.unsupported(format!("rope.scaling.attn_factor = {factor} without YaRN")))
            }
            _ => Ok(scaling),
        };
    };
    if scaling != RopeScaling::None {
        return Err(keys.unsupported(format!("the tensor rope_freqs.weight together with {scaling:?}")));
    }
    let attention_factor = attention_factor.unwrap_or(1.0) as f32;
    Ok(RopeScaling::Factors {
        divisors,
        attention_factor,
    })
}

fn yarn(keys: &Keys<'_>, factor: f64, attention_factor: Option<f64>) -> Result<RopeScaling, LoadError> {
    // ggml mixes by this; 1 is the paper's YaRN.
    let mix = keys.gguf.float(&keys.name("rope.scaling.yarn_ext_factor"))?;
    if mix.is_some_and(|mix| mix != 1.0 && mix != -1.0) {
        return Err(keys.unsupported(format!("yarn_ext_factor = {mix:?}")));
    }
    let beta = |key: &str, default: f64| keys.positive(key).map(|beta| beta.unwrap_or(default) as f32);
    let original = keys.optional_size("rope.scaling.original_context_length")?;
    // ggml multiplies the paper's factor by the file's; ours is the product.
    let attention_factor = attention_factor
        .filter(|attention_factor| *attention_factor != 1.0)
        .map(|attention_factor| (attention_factor * (1.0 + 0.1 * factor.ln())) as f32);
    Ok(RopeScaling::Yarn {
        factor: factor as f32,
        original_context: match original {
            Some(original) => original,
            None => keys.size("context_length")?,
        },
        beta_fast: beta("rope.scaling.yarn_beta_fast", YARN_BETA_FAST_DEFAULT)?,
        beta_slow: beta("rope.scaling.yarn_beta_slow", YARN_BETA_SLOW_DEFAULT)?,
        attention_factor,
    })
}

/// Llama 3.1's scaling, which converters write out as one divisor per pair.
fn rope_divisors(keys: &Keys<'_>, dimensions: &Dimensions) -> Result<Option<Vec<f32>>, LoadError> {
    const NAME: &str = "rope_freqs.weight";
    let Some(info) = keys.gguf.tensors.get(NAME) else {
        return Ok(None);
    };
    let (format, bytes) = keys.gguf.tensor_bytes(NAME, info)?;
    let expected = vec![dimensions.rope_dims as u64 / 2];
    if info.dimensions != expected {
        return Err(LoadError::WrongShape {
            path: keys.gguf.file.path().to_owned(),
            tensor: NAME.into(),
            found: info.dimensions.clone(),
            expected,
        });
    }
    let mut divisors = vec![0.0; dimensions.rope_dims / 2];
    dequantise_row(format, bytes, &mut divisors);
    limits::divisors(keys.gguf.file.path(), NAME, &divisors)?;
    Ok(Some(divisors))
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
