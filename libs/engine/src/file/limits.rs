//! What both kinds of model files must satisfy in their numbers.

use std::path::Path;

use super::LoadError;
use crate::config::Experts;

/// Above every dimension of every known model (the largest vocabularies are near 2^18), and small enough that no
/// product of three of them overflows 64 bits before the tensors' shapes are checked.
pub(super) const SIZE_MAX: usize = 1 << 20;
/// Positions of 2^24 are the last that `f32` tells apart.
const CONTEXT_TOKENS_MAX: usize = 1 << 24;

/// The largest models have some hundred; the bound keeps a hostile file from making us list millions.
const EXPERTS_MAX: usize = 4096;

/// The numbers that make up a decoder.
#[derive(Debug)]
pub(super) struct Dimensions {
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocabulary: usize,
    pub(super) context_tokens_max: usize,
    pub(super) rope_dims: usize,
}

impl Dimensions {
    /// Whether they make a model at all.
    pub(super) fn check(&self, path: &Path) -> Result<(), LoadError> {
        let Self {
            layers,
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            vocabulary,
            context_tokens_max,
            rope_dims,
        } = *self;
        let refused = |key: &str, value: usize, expected: String| {
            Err(LoadError::BadValue {
                path: path.to_owned(),
                key: key.to_owned(),
                value: value.to_string(),
                expected,
            })
        };
        let sizes = [
            ("the number of layers", layers, SIZE_MAX),
            ("the hidden size", hidden, SIZE_MAX),
            ("the feed-forward size", intermediate, SIZE_MAX),
            ("the number of heads", heads, SIZE_MAX),
            ("the number of KV heads", kv_heads, SIZE_MAX),
            ("the head size", head_dim, SIZE_MAX),
            ("the vocabulary", vocabulary, SIZE_MAX),
            ("the context length", context_tokens_max, CONTEXT_TOKENS_MAX),
        ];
        for (key, value, limit) in sizes {
            if !(1..=limit).contains(&value) {
                return refused(key, value, format!("between 1 and {limit}"));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return refused(
                "the number of KV heads",
                kv_heads,
                format!("a divisor of the {heads} heads"),
            );
        }
        if !rope_dims.is_multiple_of(2) || rope_dims == 0 || rope_dims > head_dim {
            let expected = format!("an even number up to the head size {head_dim}");
            return refused("the number of rotated dimensions", rope_dims, expected);
        }
        Ok(())
    }
}

/// Whether the experts can be routed to.
pub(super) fn experts(path: &Path, experts: Experts) -> Result<(), LoadError> {
    let Experts { count, used, .. } = experts;
    let limits = [
        ("the number of experts", count, EXPERTS_MAX),
        ("the number of experts that a row uses", used, count),
    ];
    for (key, value, limit) in limits {
        if !(1..=limit).contains(&value) {
            return Err(LoadError::BadValue {
                path: path.to_owned(),
                key: key.to_owned(),
                value: value.to_string(),
                expected: format!("between 1 and {limit}"),
            });
        }
    }
    Ok(())
}

/// The head size of a file that does not give one.
pub(super) fn head_dim(path: &Path, hidden: usize, heads: usize) -> Result<usize, LoadError> {
    if hidden.is_multiple_of(heads) {
        return Ok(hidden / heads);
    }
    Err(LoadError::BadValue {
        path: path.to_owned(),
        key: "the number of heads".into(),
        value: heads.to_string(),
        expected: format!("a divisor of the hidden size {hidden}, since no head size is given"),
    })
}

/// Adds a token to a list without repeating it.
pub(super) fn token(
    path: &Path,
    key: &str,
    id: u64,
    vocabulary: usize,
    tokens: &mut Vec<u32>,
) -> Result<(), LoadError> {
    match u32::try_from(id) {
        Ok(token) if (token as usize) < vocabulary => {
            if !tokens.contains(&token) {
                tokens.push(token);
            }
            Ok(())
        }
        _ => Err(LoadError::BadValue {
            path: path.to_owned(),
            key: key.to_owned(),
            value: id.to_string(),
            expected: format!("a token below {vocabulary}"),
        }),
    }
}

/// Divisors of frequencies must leave them finite.
pub(super) fn divisors(path: &Path, key: &str, divisors: &[f32]) -> Result<(), LoadError> {
    match divisors
        .iter()
        .find(|divisor| !divisor.is_normal() || **divisor < 0.0)
    {
        None => Ok(()),
        Some(divisor) => Err(LoadError::BadValue {
            path: path.to_owned(),
            key: key.to_owned(),
            value: divisor.to_string(),
            expected: "a positive number for every pair".into(),
        }),
    }
}
