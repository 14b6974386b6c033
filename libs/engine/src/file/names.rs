//! `transformers`' names of tensors and the canonical ones, which are GGUF's.

use crate::family::{Family, NormPlacement};

/// How names of a directory's tensors are read.
#[derive(Debug)]
pub(crate) struct Names {
    family: &'static Family,
    /// Parts of a layer: `transformers`' name and the canonical one.
    parts: Vec<(&'static str, &'static str)>,
}

/// Tensors outside of the layers.
const SHARED: [(&str, &str); 3] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// Parts of every family's layers.
const LAYER: [(&str, &str); 11] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_gate_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Norms: what stands behind the attention is the feed-forward layer's in most families, and the attention's own in the others.
const NORMS_BEFORE: [(&str, &str); 2] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];
const NORMS_AFTER: [(&str, &str); 2] = [
    ("post_attention_layernorm", "post_attention_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
const NORMS_AROUND: [(&str, &str); 2] = [
    ("input_layernorm", "attn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
];

/// What stands behind the last dot of a name.
const KINDS: [(&str, &str); 4] = [
    ("weight", "weight"),
    ("bias", "bias"),
    ("weight_scale_inv", "scale"),
    ("weight_scale", "scale"),
];

/// Canonical names of an expert's projections, in the order of [`Mixture::projections`](crate::family::Mixture).
pub(crate) const PROJECTIONS: [&str; 3] = ["ffn_gate", "ffn_up", "ffn_down"];

impl Names {
    /// The names of a family.
    pub(crate) fn new(family: &'static Family) -> Self {
        let norms: &[&[(&str, &str)]] = match family.norms {
            NormPlacement::Before => &[&NORMS_BEFORE],
            NormPlacement::After => &[&NORMS_AFTER],
            NormPlacement::Around => &[&NORMS_AROUND, &NORMS_AFTER],
        };
        let mut parts = LAYER.to_vec();
        parts.extend(norms.iter().copied().flatten());
        if let Some(mixture) = &family.mixture {
            parts.push((mixture.router, "ffn_gate_inp"));
        }
        Self { family, parts }
    }

    /// The canonical name of a tensor; `None` for one that no family has.
    pub(crate) fn canonical(&self, native: &str) -> Option<String> {
        let (stem, kind) = native.rsplit_once('.')?;
        let (_, kind) = KINDS.iter().find(|(native, _)| *native == kind)?;
        if let Some((_, ours)) = SHARED.iter().find(|(native, _)| *native == stem) {
            return Some(format!("{ours}.{kind}"));
        }
        let (layer, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
        let layer = layer.parse::<u32>().ok()?;
        match self.parts.iter().find(|(native, _)| *native == part) {
            Some((_, ours)) => Some(format!("blk.{layer}.{ours}.{kind}")),
            None => {
                let (expert, ours) = self.expert(part)?;
                Some(format!("blk.{layer}.{ours}.{expert}.{kind}"))
            }
        }
    }

    /// The name in a directory of a tensor with a canonical name.
    pub(crate) fn native(&self, canonical: &str) -> String {
        let (stem, kind) = canonical.rsplit_once('.').unwrap_or((canonical, "weight"));
        let kind = KINDS
            .iter()
            .find(|(_, ours)| *ours == kind)
            .map_or(kind, |(native, _)| *native);
        if let Some((native, _)) = SHARED.iter().find(|(_, ours)| *ours == stem) {
            return format!("{native}.{kind}");
        }
        let Some((layer, part)) = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            return format!("{stem}.{kind}");
        };
        let native = match self.parts.iter().find(|(_, ours)| *ours == part) {
            Some((native, _)) => (*native).to_owned(),
            None => self.native_expert(part).unwrap_or_else(|| part.to_owned()),
        };
        format!("model.layers.{layer}.{native}.{kind}")
    }

    /// The expert and the projection of a part such as `mlp.experts.7.up_proj`.
    fn expert(&self, part: &str) -> Option<(u32, &'static str)> {
        let mixture = self.family.mixture.as_ref()?;
        let (expert, projection) = part
            .strip_prefix(mixture.experts)?
            .strip_prefix('.')?
            .split_once('.')?;
        let index = mixture
            .projections
            .iter()
            .position(|native| *native == projection)?;
        Some((expert.parse().ok()?, PROJECTIONS[index]))
    }

    fn native_expert(&self, part: &str) -> Option<String> {
        let mixture = self.family.mixture.as_ref()?;
        let (ours, expert) = part.rsplit_once('.')?;
        let index = PROJECTIONS.iter().position(|projection| *projection == ours)?;
        Some(format!(
            "{}.{expert}.{}",
            mixture.experts, mixture.projections[index]
        ))
    }
}
