//! Which tensors a decoder is made of, and how large each one is.
//!
//! Both containers hand over what they hold under canonical names; here it is held against the configuration, so
//! that a model that opens has every weight, in a readable format, of the right shape, and none that would be
//! left out of the computation. Weights that a file keeps in one tensor (Q, K and V, gate and up, all experts of a layer) come out
//! as rows of it, each under its own name.

use std::{
    collections::{HashMap, hash_map::Entry},
    ops::Range,
    path::Path,
    sync::Arc,
};

use super::{LoadError, mapped::MappedFile, names::PROJECTIONS};
use crate::{
    config::{Experts, ModelConfig, RopeScaling},
    family::{Biases, QueryKeyNorm},
    tensor::TensorFormat,
};

/// Rows and columns of an FP8 weight that share a scale, where scales come by blocks.
pub(crate) const SCALE_BLOCK: usize = 128;

/// A tensor as its container describes it.
#[derive(Debug)]
pub(super) struct Found {
    /// The name in the file, for messages.
    pub(super) native: String,
    /// Slowest dimension first.
    pub(super) shape: Vec<u64>,
    pub(super) format: TensorFormat,
    pub(super) file: Arc<MappedFile>,
    pub(super) bytes: Range<usize>,
}

/// A tensor that fits the configuration.
#[derive(Debug)]
pub(super) struct Located {
    pub(super) format: TensorFormat,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) file: Arc<MappedFile>,
    pub(super) bytes: Range<usize>,
}

/// What the configuration says of one tensor.
struct Expected {
    name: String,
    shape: Vec<usize>,
    required: bool,
    /// Whether it may be FP8 with a tensor of scales.
    scalable: bool,
    /// Names and rows of the weights that it consists of, if it is not one.
    parts: Vec<(String, usize)>,
}

impl Expected {
    fn new(name: String, shape: &[usize]) -> Self {
        Self {
            name,
            shape: shape.to_vec(),
            required: true,
            scalable: false,
            parts: Vec::new(),
        }
    }

    fn optional(self) -> Self {
        Self {
            required: false,
            ..self
        }
    }

    fn scalable(self) -> Self {
        Self {
            scalable: true,
            ..self
        }
    }

    fn of(self, parts: Vec<(String, usize)>) -> Self {
        Self { parts, ..self }
    }
}

/// Matches what a container holds (`found`, by canonical name) with what the configuration asks for.
///
/// # Errors
///
/// A missing tensor, a wrong shape, or a tensor that nothing would use.
pub(super) fn locate(
    path: &Path,
    config: &ModelConfig,
    mut found: HashMap<String, Found>,
    native_name: impl Fn(&str) -> String,
) -> Result<HashMap<String, Located>, LoadError> {
    let mut located = HashMap::with_capacity(found.len());
    let stacked = found.contains_key("blk.0.ffn_gate_exps.weight");
    for expected in expected(config, stacked) {
        let Some(tensor) = found.remove(&expected.name) else {
            if expected.required {
                let tensor = native_name(&expected.name);
                return Err(LoadError::MissingTensor {
                    path: path.to_owned(),
                    tensor,
                });
            }
            continue;
        };
        let shape: Vec<u64> = expected.shape.iter().map(|dimension| *dimension as u64).collect();
        if tensor.shape != shape {
            return Err(LoadError::WrongShape {
                path: tensor.file.path().to_owned(),
                tensor: tensor.native,
                found: tensor.shape,
                expected: shape,
            });
        }
        let scale = scale(&expected, &tensor, &mut found)?;
        located.extend(scale);
        place(expected, tensor, &mut located);
    }
    if let Some(tensor) = found.into_values().min_by(|a, b| a.native.cmp(&b.native)) {
        return Err(LoadError::UnsupportedFeature {
            path: tensor.file.path().to_owned(),
            feature: format!("the tensor {}", tensor.native),
        });
    }
    Ok(located)
}

/// Files a tensor, or the weights that it consists of.
fn place(expected: Expected, tensor: Found, located: &mut HashMap<String, Located>) {
    let cols = *expected.shape.last().expect("every tensor has a dimension");
    let rows: usize = expected.shape.iter().rev().skip(1).product();
    let Found {
        format, file, bytes, ..
    } = tensor;
    let mut parts = expected.parts;
    if parts.is_empty() {
        parts.push((expected.name, rows));
    }
    let mut start = bytes.start;
    for (name, rows) in parts {
        let end = start + rows * format.row_bytes(cols);
        let part = Located {
            format,
            rows,
            cols,
            file: Arc::clone(&file),
            bytes: start..end,
        };
        located.insert(name, part);
        start = end;
    }
}

/// The scales of an FP8 weight, under its name with `.scale`.
fn scale(
    expected: &Expected,
    weight: &Found,
    found: &mut HashMap<String, Found>,
) -> Result<Option<(String, Located)>, LoadError> {
    if weight.format != TensorFormat::F8E4M3 {
        return Ok(None);
    }
    let unsupported = |tensor: &Found| LoadError::UnsupportedFormat {
        path: tensor.file.path().to_owned(),
        tensor: tensor.native.clone(),
        format: tensor.format.name().to_owned(),
    };
    if !expected.scalable {
        return Err(unsupported(weight));
    }
    let name = expected.name.replace(".weight", ".scale");
    let Entry::Occupied(entry) = found.entry(name) else {
        return Err(LoadError::MissingTensor {
            path: weight.file.path().to_owned(),
            tensor: format!("{}_scale or {}_scale_inv", weight.native, weight.native),
        });
    };
    let (name, scale) = entry.remove_entry();
    if scale.format == TensorFormat::F8E4M3 {
        return Err(unsupported(&scale));
    }
    let (rows, cols) = (weight.shape[0], weight.shape[1]);
    let block = SCALE_BLOCK as u64;
    let blocks = [rows.div_ceil(block), cols.div_ceil(block)];
    let (scale_rows, scale_cols) = match scale.shape.as_slice() {
        [] | [1] | [1, 1] => (1, 1),
        [count] | [count, 1] if *count == rows => (rows, 1),
        shape if shape == blocks => (blocks[0], blocks[1]),
        _ => {
            return Err(LoadError::WrongShape {
                path: scale.file.path().to_owned(),
                tensor: scale.native,
                found: scale.shape,
                expected: blocks.to_vec(),
            });
        }
    };
    let located = Located {
        format: scale.format,
        rows: scale_rows as usize,
        cols: scale_cols as usize,
        file: scale.file,
        bytes: scale.bytes,
    };
    Ok(Some((name, located)))
}

/// Every tensor that the architecture knows. Lazily, because the number of layers is only a claim of the file until
/// the first missing one ends the search.
fn expected(config: &ModelConfig, stacked: bool) -> impl Iterator<Item = Expected> + '_ {
    let hidden = config.hidden;
    let mut shared = vec![
        Expected::new("token_embd.weight".into(), &[config.vocabulary, hidden]),
        Expected::new("output_norm.weight".into(), &[hidden]),
    ];
    if !config.tied_head {
        shared.push(Expected::new("output.weight".into(), &[config.vocabulary, hidden]).scalable());
    }
    if let RopeScaling::Factors { divisors, .. } = &config.rope.scaling {
        // Already read into the configuration; named here so that they count as used.
        let names: &[&str] = if config.family.fused {
            &["rope_factors_short", "rope_factors_long"]
        } else {
            &["rope_freqs"]
        };
        shared.extend(
            names
                .iter()
                .map(|name| Expected::new(format!("{name}.weight"), &[divisors.len()]).optional()),
        );
    }
    shared
        .into_iter()
        .chain((0..config.layers).flat_map(move |layer| layer_tensors(config, layer, stacked)))
}

fn layer_tensors(config: &ModelConfig, layer: usize, stacked: bool) -> Vec<Expected> {
    let name = |part: &str| format!("blk.{layer}.{part}.weight");
    let mut tensors: Vec<Expected> = norms(config)
        .into_iter()
        .map(|(part, width)| Expected::new(name(part), &[width]))
        .collect();
    attention_tensors(config, layer, &mut tensors);
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let shapes = [
        [intermediate, hidden],
        [intermediate, hidden],
        [hidden, intermediate],
    ];
    match config.experts {
        Some(Experts { count, .. }) => {
            tensors.push(Expected::new(name("ffn_gate_inp"), &[count, hidden]));
            for (projection, shape) in PROJECTIONS.iter().zip(shapes) {
                let of_expert = |expert: usize| name(&format!("{projection}.{expert}"));
                if stacked {
                    let parts = (0..count).map(|expert| (of_expert(expert), shape[0])).collect();
                    let all = name(&format!("{projection}_exps"));
                    tensors.push(Expected::new(all, &[count, shape[0], shape[1]]).of(parts));
                } else {
                    tensors
                        .extend((0..count).map(|expert| Expected::new(of_expert(expert), &shape).scalable()));
                }
            }
        }
        None if config.family.fused => {
            let parts = vec![(name("ffn_gate"), intermediate), (name("ffn_up"), intermediate)];
            tensors.push(Expected::new(name("ffn_gate_up"), &[2 * intermediate, hidden]).of(parts));
            tensors.push(Expected::new(name("ffn_down"), &shapes[2]).scalable());
        }
        None => {
            let weights = PROJECTIONS.iter().zip(shapes);
            tensors.extend(
                weights.map(|(projection, shape)| Expected::new(name(projection), &shape).scalable()),
            );
        }
    }
    tensors
}

/// Norms of a layer and their widths.
fn norms(config: &ModelConfig) -> Vec<(&'static str, usize)> {
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut norms = Vec::new();
    if config.family.norms.before() {
        norms.extend(["attn_norm", "ffn_norm"].map(|name| (name, config.hidden)));
    }
    if config.family.norms.after() {
        norms.extend(["post_attention_norm", "post_ffw_norm"].map(|name| (name, config.hidden)));
    }
    match config.family.query_key_norm {
        QueryKeyNorm::None => {}
        QueryKeyNorm::PerHead => {
            norms.extend(["attn_q_norm", "attn_k_norm"].map(|name| (name, config.head_dim)));
        }
        QueryKeyNorm::FullWidth => norms.extend([("attn_q_norm", q), ("attn_k_norm", kv)]),
    }
    norms
}

fn attention_tensors(config: &ModelConfig, layer: usize, tensors: &mut Vec<Expected>) {
    let name = |part: &str, kind: &str| format!("blk.{layer}.{part}.{kind}");
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let hidden = config.hidden;
    let output = Expected::new(name("attn_output", "weight"), &[hidden, q]).scalable();
    let inputs = [("attn_q", q), ("attn_k", kv), ("attn_v", kv)];
    if config.family.fused {
        let parts = inputs.map(|(part, rows)| (name(part, "weight"), rows)).to_vec();
        tensors.push(Expected::new(name("attn_qkv", "weight"), &[q + 2 * kv, hidden]).of(parts));
        tensors.push(output);
        return;
    }
    for (part, rows) in inputs {
        tensors.push(Expected::new(name(part, "weight"), &[rows, hidden]).scalable());
        let bias = Expected::new(name(part, "bias"), &[rows]);
        tensors.push(match config.family.biases {
            Biases::Configured => bias.optional(),
            Biases::QueryKeyValue => bias,
        });
    }
    tensors.push(output);
    if config.family.biases == Biases::Configured {
        tensors.push(Expected::new(name("attn_output", "bias"), &[hidden]).optional());
    }
}
