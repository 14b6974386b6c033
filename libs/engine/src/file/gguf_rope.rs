//! Rotary embedding as a GGUF file describes it.

use super::{
    LoadError,
    gguf_model::Keys,
    limits::{self, Dimensions},
};
use crate::{config::RopeScaling, dequantise::dequantise_row, family::Family};

/// YaRN's defaults, from its paper and from ggml.
const YARN_BETA_FAST_DEFAULT: f64 = 32.0;
const YARN_BETA_SLOW_DEFAULT: f64 = 1.0;
/// Llama 3.1's scaling, which converters write out as one divisor per pair.
const DIVISORS: &str = "rope_freqs.weight";
/// LongRoPE's divisors of short sequences.
const SHORT_DIVISORS: &str = "rope_factors_short.weight";

/// The scaling, and the longest sequence it is good for.
pub(super) fn rope_scaling(
    keys: &Keys<'_>,
    family: &Family,
    dimensions: &Dimensions,
) -> Result<(RopeScaling, usize), LoadError> {
    let context = dimensions.context_tokens_max;
    if family.fused {
        return match keys.gguf.tensors.contains_key(SHORT_DIVISORS) {
            true => long_rope(keys, dimensions),
            false => Ok((plain_scaling(keys, dimensions)?, context)),
        };
    }
    Ok((plain_scaling(keys, dimensions)?, context))
}

/// LongRoPE (arXiv 2402.13753) with the divisors of short sequences, which are right up to the trained context; see
/// `hugging_face_rope.rs`.
fn long_rope(keys: &Keys<'_>, dimensions: &Dimensions) -> Result<(RopeScaling, usize), LoadError> {
    let kind = keys.gguf.string(&keys.name("rope.scaling.type"))?;
    if let Some(kind) = kind.filter(|kind| !["longrope", "none"].contains(kind)) {
        return Err(keys.unsupported(format!(
            "the tensor {SHORT_DIVISORS} with RoPE scaling of type {kind:?}"
        )));
    }
    let original = keys.size("rope.scaling.original_context_length")?;
    let divisors = divisors(keys, SHORT_DIVISORS, dimensions)?.unwrap_or_default();
    let scaling = RopeScaling::Factors {
        divisors,
        attention_factor: keys.positive("rope.scaling.attn_factor")?.unwrap_or(1.0) as f32,
    };
    Ok((scaling, original.min(dimensions.context_tokens_max)))
}

fn plain_scaling(keys: &Keys<'_>, dimensions: &Dimensions) -> Result<RopeScaling, LoadError> {
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
    let Some(divisors) = divisors(keys, DIVISORS, dimensions)? else {
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

/// One divisor per pair.
fn divisors(
    keys: &Keys<'_>,
    name: &'static str,
    dimensions: &Dimensions,
) -> Result<Option<Vec<f32>>, LoadError> {
    let Some(info) = keys.gguf.tensors.get(name) else {
        return Ok(None);
    };
    let (format, bytes) = keys.gguf.tensor_bytes(name, info)?;
    let expected = vec![dimensions.rope_dims as u64 / 2];
    if info.dimensions != expected {
        return Err(LoadError::WrongShape {
            path: keys.gguf.file.path().to_owned(),
            tensor: name.into(),
            found: info.dimensions.clone(),
            expected,
        });
    }
    let mut divisors = vec![0.0; dimensions.rope_dims / 2];
    dequantise_row(format, bytes, &mut divisors);
    limits::divisors(keys.gguf.file.path(), name, &divisors)?;
    Ok(Some(divisors))
}
