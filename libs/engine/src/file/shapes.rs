//! Which tensors a Llama-family decoder is made of, and how large each one is.
//!
//! Both containers hand over what they hold under canonical names; here it is held against the configuration, so
//! that a model that opens has every weight, in a readable format, of the right shape, and none that would be
//! left out of the computation.

use std::{collections::HashMap, ops::Range, path::Path, sync::Arc};

use super::{LoadError, mapped::MappedFile};
use crate::{
    config::{ModelConfig, RopeScaling},
    tensor::TensorFormat,
};

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
    for expected in expected(config) {
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
        let cols = *expected.shape.last().expect("every tensor has a dimension");
        let rows = expected.shape.iter().rev().skip(1).product();
        let Found {
            format, file, bytes, ..
        } = tensor;
        located.insert(
            expected.name,
            Located {
                format,
                rows,
                cols,
                file,
                bytes,
            },
        );
    }
    if let Some(tensor) = found.into_values().min_by(|a, b| a.native.cmp(&b.native)) {
        return Err(LoadError::UnsupportedFeature {
            path: tensor.file.path().to_owned(),
            feature: format!("the tensor {}", tensor.native),
        });
    }
    Ok(located)
}

/// Every tensor that the architecture knows. Lazily, because the number of layers is only a claim of the file until
/// the first missing one ends the search.
fn expected(config: &ModelConfig) -> impl Iterator<Item = Expected> + '_ {
    let required = |name: &str, shape: &[usize]| Expected {
        name: format!("{name}.weight"),
        shape: shape.to_vec(),
        required: true,
    };
    let hidden = config.hidden;
    let mut shared = vec![
        required("token_embd", &[config.vocabulary, hidden]),
        required("output_norm", &[hidden]),
    ];
    if !config.tied_head {
        shared.push(required("output", &[config.vocabulary, hidden]));
    }
    if let RopeScaling::Factors { divisors, .. } = &config.rope.scaling {
        // Already read into the configuration; named here so that it counts as used.
        shared.push(Expected {
            name: "rope_freqs.weight".into(),
            shape: vec![divisors.len()],
            required: false,
        });
    }
    shared
        .into_iter()
        .chain((0..config.layers).flat_map(|layer| layer_tensors(config, layer)))
}

fn layer_tensors(config: &ModelConfig, layer: usize) -> Vec<Expected> {
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let matrices = [
        ("attn_q", q, hidden),
        ("attn_k", kv, hidden),
        ("attn_v", kv, hidden),
        ("attn_output", hidden, q),
        ("ffn_gate", intermediate, hidden),
        ("ffn_up", intermediate, hidden),
        ("ffn_down", hidden, intermediate),
    ];
    let norms = ["attn_norm", "ffn_norm"].into_iter().map(|name| Expected {
        name: format!("blk.{layer}.{name}.weight"),
        shape: vec![hidden],
        required: true,
    });
    let weights = matrices.iter().map(|(name, rows, cols)| Expected {
        name: format!("blk.{layer}.{name}.weight"),
        shape: vec![*rows, *cols],
        required: true,
    });
    let biases = matrices.iter().map(|(name, rows, _)| Expected {
        name: format!("blk.{layer}.{name}.bias"),
        shape: vec![*rows],
        required: false,
    });
    norms.chain(weights).chain(biases).collect()
}
