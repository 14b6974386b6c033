//! What `config.json` says of a model, read by its family's description.
//!
//! Keys and defaults are those of `transformers`. A key that its class reads and that changes the computation is
//! followed or refused by name, never passed over.

use serde_json::Value;

use super::{
    LoadError,
    hugging_face::Object,
    hugging_face_rope::{self, Ropes},
    limits::{self, Dimensions},
    shapes::SCALE_BLOCK,
};
use crate::{
    config::{Experts, LayerSet, ModelConfig, Window},
    family::{Activation, Family, Mixture, Windows, Wrapper},
};

/// Keys that change the computation in ways that we do not follow, with the values that leave it as it is.
const NEUTRAL: [(&str, &[&str]); 6] = [
    ("mlp_bias", &["false", "null"]),
    ("use_bidirectional_attention", &["false", "null"]),
    ("mlp_only_layers", &["[]", "null"]),
    ("decoder_sparse_step", &["1", "null"]),
    ("use_qk_norm", &["null"]),
    ("clip_qkv", &["null"]),
];

/// Keys that a class that sees images has beside its text model's.
const OUTER: [&str; 3] = ["eos_token_id", "quantization_config", "tie_word_embeddings"];

/// The configuration of the text model, with what `transformers` would put where it says nothing, and the class that it is in.
pub(super) fn text_model(config: Object) -> Result<(Object, Option<&'static Wrapper>), LoadError> {
    let Some((family, wrapper)) = Family::of_wrapper(class(&config)?) else {
        let family = family(&config)?;
        return Ok((config.with_defaults(family.defaults), None));
    };
    let text = config
        .object("text_config")?
        .ok_or_else(|| config.missing("text_config"))?;
    let outer = OUTER
        .iter()
        .filter_map(|key| Some((*key, config.value(key)?.clone())));
    let text = text.with(outer).with_class(family.hugging_face);
    Ok((text.with_defaults(family.defaults), Some(wrapper)))
}

fn class(config: &Object) -> Result<&str, LoadError> {
    config
        .value("architectures")
        .and_then(|architectures| architectures.get(0))
        .and_then(Value::as_str)
        .ok_or_else(|| config.missing("architectures"))
}

/// The family that `architectures` names.
fn family(config: &Object) -> Result<&'static Family, LoadError> {
    let class = class(config)?;
    Family::of_hugging_face(class).ok_or_else(|| LoadError::UnsupportedArchitecture {
        path: config.path().to_owned(),
        architecture: class.to_owned(),
        supported: Family::hugging_face_list(),
    })
}

/// Reads the configuration of a model called `name`.
pub(super) fn config(
    config: &Object,
    name: String,
    eos_tokens: impl FnOnce(usize) -> Result<Vec<u32>, LoadError>,
) -> Result<ModelConfig, LoadError> {
    let family = family(config)?;
    refuse_other_computations(config, family)?;
    refuse_other_quantisations(config)?;
    let experts = match &family.mixture {
        Some(mixture) => Some(experts(config, mixture)?),
        None => None,
    };
    let dimensions = dimensions(config, family)?;
    let Dimensions {
        layers,
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        vocabulary,
        ..
    } = dimensions;
    let Ropes {
        rope,
        local_rope,
        context_tokens_max,
    } = hugging_face_rope::ropes(config, family, &dimensions)?;
    let scale_of = match config.positive("query_pre_attn_scalar")? {
        Some(scalar) if family.query_scalar => scalar as f32,
        None if family.query_scalar => return Err(config.missing("query_pre_attn_scalar")),
        Some(_) | None => head_dim as f32,
    };
    Ok(ModelConfig {
        family,
        architecture: family.name.to_owned(),
        name,
        layers,
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        vocabulary,
        norm_epsilon: config
            .positive("rms_norm_eps")?
            .unwrap_or(family.norm_epsilon_default) as f32,
        norm_offset: if family.centred_norms { 1.0 } else { 0.0 },
        embedding_scale: family.scaled_embedding.then(|| (hidden as f32).sqrt()),
        attention_scale: 1.0 / scale_of.sqrt(),
        attention_soft_cap: config.positive("attn_logit_softcapping")?.map(|cap| cap as f32),
        logit_soft_cap: config.positive("final_logit_softcapping")?.map(|cap| cap as f32),
        window: window(config, family, layers, context_tokens_max)?,
        rope,
        local_rope,
        unrotated: unrotated(config, family, layers)?,
        experts,
        context_tokens_max,
        tied_head: config.bool("tie_word_embeddings")?.unwrap_or(family.tied_default),
        eos_tokens: eos_tokens(vocabulary)?,
    })
}

fn dimensions(config: &Object, family: &Family) -> Result<Dimensions, LoadError> {
    let heads = config.size("num_attention_heads")?;
    let hidden = config.size("hidden_size")?;
    let head_dim = match config.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None => limits::head_dim(config.path(), hidden, heads)?,
    };
    let width_key = family
        .mixture
        .as_ref()
        .map_or("intermediate_size", |mixture| mixture.width_key);
    let dimensions = Dimensions {
        layers: config.size("num_hidden_layers")?,
        hidden,
        intermediate: config.size(width_key)?,
        heads,
        kv_heads: config.optional_size("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        vocabulary: config.size("vocab_size")?,
        context_tokens_max: config.size("max_position_embeddings")?,
        rope_dims: hugging_face_rope::rotated_dims(config, family, head_dim)?,
    };
    dimensions.check(config.path())?;
    Ok(dimensions)
}

fn experts(config: &Object, mixture: &Mixture) -> Result<Experts, LoadError> {
    let experts = Experts {
        count: config.size(mixture.count_key)?,
        used: config.size("num_experts_per_tok")?,
        normalised: match mixture.normalise_key {
            Some(key) => config.bool(key)?.unwrap_or(false),
            None => true,
        },
    };
    limits::experts(config.path(), experts)?;
    Ok(experts)
}

fn refuse_other_computations(config: &Object, family: &Family) -> Result<(), LoadError> {
    let activations: &[&str] = match family.activation {
        Activation::Silu => &["\"silu\"", "\"swish\"", "null"],
        Activation::GeluTanh => &["\"gelu_pytorch_tanh\"", "null"],
    };
    let null: &[&str] = &["null"];
    let ours = |admitted: bool, key: &'static str| (!admitted).then_some((key, null));
    let of_family = [
        Some(("hidden_act", activations)),
        Some(("hidden_activation", activations)),
        ours(family.capped_scores, "attn_logit_softcapping"),
        ours(family.capped_logits, "final_logit_softcapping"),
        ours(family.unrotated_period.is_some(), "no_rope_layers"),
    ];
    for (key, neutral) in NEUTRAL.into_iter().chain(of_family.into_iter().flatten()) {
        if let Some(value) = config.value(key)
            && !neutral.contains(&value.to_string().as_str())
        {
            return Err(config.unsupported(format!("{key} = {value}")));
        }
    }
    Ok(())
}

/// FP8 weights are what their tensors say; here is only whether the weights are anything else. Activations are never rounded to
/// FP8: that is a way to compute faster, not a part of the model.
fn refuse_other_quantisations(config: &Object) -> Result<(), LoadError> {
    const KEY: &str = "quantization_config";
    let Some(quantisation) = config.object(KEY)? else {
        return Ok(());
    };
    let block = Value::from(vec![SCALE_BLOCK; 2]);
    let admitted: &[(&str, &[Value])] = match quantisation.string("quant_method")? {
        Some("fp8") => &[
            ("fmt", &["e4m3".into()]),
            ("weight_block_size", std::slice::from_ref(&block)),
        ],
        Some("compressed-tensors") => &[("format", &["float-quantized".into()]), ("kv_cache_scheme", &[])],
        other => return Err(config.unsupported(format!("{KEY} with quant_method {other:?}"))),
    };
    let sparsity = quantisation.object("sparsity_config")?;
    let sparsity = sparsity.as_ref().and_then(|sparsity| sparsity.value("format"));
    if let Some(format) = sparsity.filter(|format| **format != "dense") {
        return Err(config.unsupported(format!("{KEY}.sparsity_config.format = {format}")));
    }
    for (key, values) in admitted {
        if let Some(value) = quantisation.value(key).filter(|value| !value.is_null())
            && !values.contains(value)
        {
            return Err(config.unsupported(format!("{KEY}.{key} = {value}")));
        }
    }
    Ok(())
}

/// The window and its layers. A window that the context never fills is none, unless its layers rotate differently.
fn window(
    config: &Object,
    family: &Family,
    layers: usize,
    context_tokens_max: usize,
) -> Result<Option<Window>, LoadError> {
    let listed = layer_types(config, layers)?;
    let tokens = match config.value("sliding_window") {
        None => family.window_default,
        Some(_) => config.optional_size("sliding_window")?,
    };
    let used = config
        .bool("use_sliding_window")?
        .unwrap_or(!matches!(family.windows, Windows::Late | Windows::Switched));
    let tokens = tokens.filter(|_| used);
    let set = match (listed, family.windows) {
        (Some(listed), _) if !listed.contains(&true) => LayerSet::None,
        (Some(_), Windows::None) => {
            return Err(config.unsupported("a layer of type \"sliding_attention\"".into()));
        }
        (Some(listed), _) => LayerSet::Listed(listed),
        (None, Windows::None | Windows::All | Windows::Switched) => LayerSet::All,
        (None, Windows::Late) => match config.count("max_window_layers")? {
            Some(first) => LayerSet::From(first),
            None if tokens.is_some() => return Err(config.missing("max_window_layers")),
            None => LayerSet::None,
        },
        (None, Windows::AllBut { period }) => {
            LayerSet::AllBut(config.optional_size("sliding_window_pattern")?.unwrap_or(period))
        }
    };
    if set == LayerSet::None {
        return Ok(None);
    }
    match (tokens, &set) {
        (Some(tokens), _) if tokens >= context_tokens_max && !family.local_rope => Ok(None),
        (Some(tokens), _) if family.windows == Windows::None => {
            Err(config.unsupported(format!("a sliding window of {tokens} tokens")))
        }
        (Some(tokens), _) => Ok(Some(Window { tokens, layers: set })),
        (None, LayerSet::Listed(_)) => Err(config.missing("sliding_window")),
        (None, _) => Ok(None),
    }
}

/// Which layers `layer_types` gives a window, if it is there.
fn layer_types(config: &Object, layers: usize) -> Result<Option<Vec<bool>>, LoadError> {
    let Some(types) = config.value("layer_types").and_then(Value::as_array) else {
        return Ok(None);
    };
    if types.len() != layers {
        return Err(config.bad("layer_types", types.len(), &format!("{layers} layers long")));
    }
    let sliding = types.iter().map(|layer| match layer.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(config.unsupported(format!("a layer of type {layer}"))),
    });
    sliding.collect::<Result<_, _>>().map(Some)
}

/// The layers that do not rotate: `no_rope_layers` has a zero for each of them.
fn unrotated(config: &Object, family: &Family, layers: usize) -> Result<LayerSet, LoadError> {
    let Some(period) = family.unrotated_period else {
        return Ok(LayerSet::None);
    };
    let Some(listed) = config.value("no_rope_layers").filter(|value| !value.is_null()) else {
        let period = config.optional_size("no_rope_layer_interval")?.unwrap_or(period);
        return Ok(LayerSet::Every(period));
    };
    let flags: Option<Vec<bool>> = listed.as_array().and_then(|listed| {
        let flag = |value: &Value| value.as_u64().filter(|flag| *flag <= 1).map(|flag| flag == 0);
        listed.iter().map(flag).collect()
    });
    match flags.filter(|flags| flags.len() == layers) {
        Some(flags) => Ok(LayerSet::Listed(flags)),
        None => Err(config.bad("no_rope_layers", listed, &format!("{layers} zeros and ones"))),
    }
}
