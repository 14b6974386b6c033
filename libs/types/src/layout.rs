//! The bytes of a block: one format on every tier and on the wire.
//!
//! A block is `[layer][K|V][kv_head][inner]`, contiguous and little-endian. The inner order is `K[head_dim][token]`,
//! so that attention scores vectorise over tokens, and `V[token][head_dim]`, so that the weighted sum
//! vectorises over the head. A layer is one contiguous slice; a run of kv heads is one slice of K and
//! one of V in every layer.
//!
//! Outside `types` and `engine` nothing may assume what the bytes mean: others use [`KvLayout::block_bytes`] and
//! [`KvLayout::layer_range`] alone.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The element type of K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvDtype {
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
}

impl KvDtype {
    /// Size of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }
}

/// The shape of a block of attention KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvLayout {
    /// Transformer layers.
    pub layers: usize,
    /// Heads of K and V per layer.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Tokens per block; a power of two.
    pub block_tokens: usize,
    /// Element type.
    pub dtype: KvDtype,
}

/// Why a layout cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A dimension is zero.
    #[error("{0} must not be 0")]
    Zero(&'static str),
    /// The engine addresses tokens by mask and shift.
    #[error("block_tokens is {0}, which is not a power of two between 8 and 1024")]
    BlockTokens(usize),
    /// The block would not fit an address.
    #[error("a block of this layout exceeds {BLOCK_BYTES_MAX} bytes")]
    TooLarge,
}

/// Bounds what one transfer slice, one checksum and one allocation can be.
pub const BLOCK_BYTES_MAX: usize = 1 << 30;

/// Tokens per block where nothing else is configured. 32 tokens of a small model are some hundred KiB:
/// large enough for one efficient transfer, small enough that a prefix wastes little.
pub const BLOCK_TOKENS_DEFAULT: usize = 32;

impl KvLayout {
    /// Checks the shape. Every other method assumes that this passed.
    pub fn validate(&self) -> Result<(), LayoutError> {
        for (name, value) in [
            ("layers", self.layers),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
        ] {
            if value == 0 {
                return Err(LayoutError::Zero(name));
            }
        }
        if !self.block_tokens.is_power_of_two() || !(8..=1024).contains(&self.block_tokens) {
            return Err(LayoutError::BlockTokens(self.block_tokens));
        }
        let bytes = [
            self.kv_heads,
            self.head_dim,
            self.block_tokens,
            self.dtype.bytes(),
            2,
        ]
        .into_iter()
        .try_fold(self.layers, usize::checked_mul);
        match bytes {
            Some(bytes) if bytes <= BLOCK_BYTES_MAX => Ok(()),
            Some(_) | None => Err(LayoutError::TooLarge),
        }
    }

    /// Bytes of K (or of V) of one head of one layer.
    pub fn head_bytes(&self) -> usize {
        self.head_dim * self.block_tokens * self.dtype.bytes()
    }

    /// Bytes of one layer: K and V of all heads.
    pub fn layer_bytes(&self) -> usize {
        2 * self.kv_heads * self.head_bytes()
    }

    /// Bytes of a whole block.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.layer_bytes()
    }

    /// Bytes of KV that one token occupies.
    pub fn token_bytes(&self) -> usize {
        self.block_bytes() / self.block_tokens
    }

    /// Where a layer lies within a block.
    pub fn layer_range(&self, layer: usize) -> Range<usize> {
        let bytes = self.layer_bytes();
        layer * bytes..(layer + 1) * bytes
    }

    /// Where K of a head lies within a block.
    pub fn k_offset(&self, layer: usize, kv_head: usize) -> usize {
        layer * self.layer_bytes() + kv_head * self.head_bytes()
    }

    /// Where V of a head lies within a block.
    pub fn v_offset(&self, layer: usize, kv_head: usize) -> usize {
        layer * self.layer_bytes() + (self.kv_heads + kv_head) * self.head_bytes()
    }

    /// Blocks that `tokens` tokens occupy, the last one perhaps partly.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// The text that [`crate::KvSpace::root`] hashes. Persisted: never change what an existing layout gives.
    pub fn canonical(&self) -> String {
        format!(
            "attention/v1 layers={} kv_heads={} head_dim={} block_tokens={} dtype={} k=dim,token v=token,dim",
            self.layers,
            self.kv_heads,
            self.head_dim,
            self.block_tokens,
            self.dtype.name()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: KvLayout = KvLayout {
        layers: 3,
        kv_heads: 2,
        head_dim: 64,
        block_tokens: 32,
        dtype: KvDtype::F16,
    };

    #[test]
    fn slices_tile_the_block_exactly() {
        let mut end = 0;
        for layer in 0..LAYOUT.layers {
            assert_eq!(LAYOUT.layer_range(layer).start, end);
            for head in 0..LAYOUT.kv_heads {
                assert_eq!(LAYOUT.k_offset(layer, head), end);
                end += LAYOUT.head_bytes();
            }
            for head in 0..LAYOUT.kv_heads {
                assert_eq!(LAYOUT.v_offset(layer, head), end);
                end += LAYOUT.head_bytes();
            }
            assert_eq!(LAYOUT.layer_range(layer).end, end);
        }
        assert_eq!(LAYOUT.block_bytes(), end);
        assert_eq!(LAYOUT.token_bytes() * LAYOUT.block_tokens, end);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        let refused = |layout: KvLayout| layout.validate().is_err();
        assert!(LAYOUT.validate().is_ok());
        assert!(refused(KvLayout { layers: 0, ..LAYOUT }));
        assert!(refused(KvLayout {
            block_tokens: 24,
            ..LAYOUT
        }));
        assert!(refused(KvLayout {
            block_tokens: 4,
            ..LAYOUT
        }));
        assert!(refused(KvLayout {
            layers: usize::MAX,
            ..LAYOUT
        }));
    }
}
