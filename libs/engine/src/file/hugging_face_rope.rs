//! Rotary embedding as `config.json` describes it (`transformers`' `modeling_rope_utils.py`).
//!
//! The engine's results at a position must depend on the position alone, never on how long the sequence will become.
//! Two of `transformers`' scalings depend on the length: `dynamic` grows the base with it, `longrope` changes its
//! divisors when it passes the trained context. Both are exact up to the trained context, so that is where such a
//! model's context ends here.

use serde_json::Value;

use super::{
    LoadError,
    hugging_face::Object,
    limits::{self, Dimensions},
};
use crate::{
    config::{RopeConfig, RopeScaling, RopeStyle},
    family::Family,
};

/// Gemma 3's default of `rope_local_base_freq`, which GGUF files for llama.cpp leave out.
pub(super) const LOCAL_THETA_DEFAULT: f64 = 10_000.0;

/// YaRN's defaults.
const YARN_BETA_FAST_DEFAULT: f64 = 32.0;
const YARN_BETA_SLOW_DEFAULT: f64 = 1.0;

/// What positions of layers without and with a window are told apart by, and the longest sequence it is good for.
pub(super) struct Ropes {
    pub(super) rope: RopeConfig,
    pub(super) local_rope: Option<RopeConfig>,
    pub(super) context_tokens_max: usize,
}

/// Reads the embeddings.
pub(super) fn ropes(config: &Object, family: &Family, dimensions: &Dimensions) -> Result<Ropes, LoadError> {
    let (parameters, local) = parameters(config)?;
    let theta = match &parameters {
        Some(parameters) => parameters.positive("rope_theta")?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => config
            .positive("rope_theta")?
            .unwrap_or(family.rope_theta_default),
    };
    let (scaling, context_tokens_max) = match &parameters {
        Some(parameters) => scaling(config, parameters, dimensions)?,
        None => (RopeScaling::None, dimensions.context_tokens_max),
    };
    let with = |theta: f64, scaling| RopeConfig {
        theta: theta as f32,
        dims: dimensions.rope_dims,
        style: RopeStyle::HalfSplit,
        scaling,
    };
    let local_rope = match (family.local_rope, local) {
        (true, local) => Some(with(local_theta(config, local.as_ref())?, RopeScaling::None)),
        (false, Some(local)) => {
            return Err(local.unsupported("rope_parameters of layers with a window".into()));
        }
        (false, None) => None,
    };
    Ok(Ropes {
        rope: with(theta, scaling),
        local_rope,
        context_tokens_max,
    })
}

/// The parameters, and those of layers with a window where they are apart. Version 5 of `transformers` moved everything into
/// `rope_parameters`, and there by the type of the layer for models with several.
fn parameters(config: &Object) -> Result<(Option<Object>, Option<Object>), LoadError> {
    let Some(parameters) = config.object("rope_parameters")? else {
        return Ok((config.object("rope_scaling")?, None));
    };
    match parameters.object("full_attention")? {
        Some(full) => Ok((Some(full), parameters.object("sliding_attention")?)),
        None => Ok((Some(parameters), None)),
    }
}

fn local_theta(config: &Object, local: Option<&Object>) -> Result<f64, LoadError> {
    if let Some(local) = local {
        if let Some(kind) = local.string("rope_type")?.filter(|kind| *kind != "default") {
            return Err(local.unsupported(format!("RoPE scaling of type {kind:?} in layers with a window")));
        }
        if let Some(theta) = local.positive("rope_theta")? {
            return Ok(theta);
        }
    }
    Ok(config
        .positive("rope_local_base_freq")?
        .unwrap_or(LOCAL_THETA_DEFAULT))
}

/// How many elements of a head rotate.
pub(super) fn rotated_dims(config: &Object, family: &Family, head_dim: usize) -> Result<usize, LoadError> {
    const KEY: &str = "partial_rotary_factor";
    let (parameters, _) = parameters(config)?;
    let share = match parameters {
        Some(parameters) => parameters.positive(KEY)?,
        None => None,
    };
    let share = match share {
        Some(share) => share,
        None => config.positive(KEY)?.unwrap_or(1.0),
    };
    if share == 1.0 {
        return Ok(head_dim);
    }
    if !family.partial_rotary {
        return Err(config.unsupported(format!("{KEY} = {share}")));
    }
    Ok((head_dim as f64 * share) as usize)
}

fn scaling(
    config: &Object,
    parameters: &Object,
    dimensions: &Dimensions,
) -> Result<(RopeScaling, usize), LoadError> {
    let context = dimensions.context_tokens_max;
    let kind = match parameters.string("rope_type")? {
        Some(kind) => kind,
        None => parameters.string("type")?.unwrap_or("default"),
    };
    let required = |key: &str| parameters.positive(key)?.ok_or_else(|| parameters.missing(key));
    let original = match parameters.optional_size("original_max_position_embeddings")? {
        Some(original) => Some(original),
        None => config.optional_size("original_max_position_embeddings")?,
    };
    Ok(match kind {
        "default" => (RopeScaling::None, context),
        "linear" => (
            RopeScaling::Linear {
                factor: required("factor")? as f32,
            },
            context,
        ),
        "dynamic" => {
            required("factor")?;
            (RopeScaling::None, original.unwrap_or(context).min(context))
        }
        "llama3" => {
            let low_freq_factor = required("low_freq_factor")? as f32;
            let high_freq_factor = required("high_freq_factor")? as f32;
            if low_freq_factor >= high_freq_factor {
                return Err(LoadError::BadValue {
                    path: parameters.path().to_owned(),
                    key: "high_freq_factor".into(),
                    value: high_freq_factor.to_string(),
                    expected: format!("greater than the low_freq_factor {low_freq_factor}"),
                });
            }
            let factor = required("factor")? as f32;
            let original_context =
                original.ok_or_else(|| parameters.missing("original_max_position_embeddings"))?;
            (
                RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_context,
                },
                context,
            )
        }
        "yarn" => (yarn(parameters, original, context)?, context),
        "longrope" | "su" => longrope(parameters, original, dimensions)?,
        other => return Err(parameters.unsupported(format!("RoPE scaling of type {other:?}"))),
    })
}

fn yarn(parameters: &Object, original: Option<usize>, context: usize) -> Result<RopeScaling, LoadError> {
    if parameters.bool("truncate")? == Some(false) {
        return Err(parameters.unsupported("YaRN without truncation".into()));
    }
    let original_context = original.unwrap_or(context);
    let factor = match parameters.positive("factor")? {
        Some(factor) => factor,
        None => context as f64 / original_context as f64,
    };
    let scale = |weight: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * weight * factor.ln() + 1.0
        }
    };
    let explicit = parameters.positive("attention_factor")?;
    let attention_factor = match (
        explicit,
        parameters.positive("mscale")?,
        parameters.positive("mscale_all_dim")?,
    ) {
        (Some(explicit), _, _) => Some(explicit),
        (None, Some(mscale), Some(all)) => Some(scale(mscale) / scale(all)),
        (None, _, _) => None,
    };
    let beta = |key: &str, default: f64| {
        parameters
            .positive(key)
            .map(|beta| beta.unwrap_or(default) as f32)
    };
    Ok(RopeScaling::Yarn {
        factor: factor as f32,
        original_context,
        beta_fast: beta("beta_fast", YARN_BETA_FAST_DEFAULT)?,
        beta_slow: beta("beta_slow", YARN_BETA_SLOW_DEFAULT)?,
        attention_factor: attention_factor.map(|factor| factor as f32),
    })
}

/// LongRoPE (arXiv 2402.13753) with the divisors of short sequences.
fn longrope(
    parameters: &Object,
    original: Option<usize>,
    dimensions: &Dimensions,
) -> Result<(RopeScaling, usize), LoadError> {
    let context = dimensions.context_tokens_max;
    let original = original.ok_or_else(|| parameters.missing("original_max_position_embeddings"))?;
    let divisors: Vec<f32> = parameters
        .positives("short_factor")?
        .iter()
        .map(|divisor| *divisor as f32)
        .collect();
    if divisors.len() != dimensions.rope_dims / 2 {
        return Err(LoadError::BadValue {
            path: parameters.path().to_owned(),
            key: "short_factor".into(),
            value: Value::from(divisors.len()).to_string(),
            expected: format!("{} numbers long", dimensions.rope_dims / 2),
        });
    }
    limits::divisors(parameters.path(), "short_factor", &divisors)?;
    let growth = match parameters.positive("factor")? {
        Some(factor) => factor,
        None => context as f64 / original as f64,
    };
    let attention_factor = match parameters.positive("attention_factor")? {
        Some(factor) => factor,
        None if growth <= 1.0 => 1.0,
        None => (1.0 + growth.ln() / (original as f64).ln()).sqrt(),
    };
    Ok((
        RopeScaling::Factors {
            divisors,
            attention_factor: attention_factor as f32,
        },
        original.min(context),
    ))
}
