//! The bytes of a block: one format on every tier and on the wire.
//!
//! A block is `[layer][K|V][kv_head][inner]`, contiguous and little-endian. The inner order is `K[head_dim][token]`,
//! so that attention scores vectorise over tokens, and `V[token][head_dim]`, so that the weighted sum
//! vectorises over the head. A layer is one contiguous slice; a run of kv heads is one slice of K and
//! one of V in every layer. Of [`KvDtype::Int8`] a head's inner bytes are followed by one binary32 per token, in the order of the
//! slots: what its codes of that token are multiplied with.
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
    /// bfloat16.
    Bf16,
    /// Signed bytes, with a scale for each head and token.
    Int8,
}

impl KvDtype {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Int8];

    /// Size of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::Int8 => 1,
        }
    }

    /// Bytes beside the elements, for each head and token of K, and as many of V.
    pub fn scale_bytes(self) -> usize {
        match self {
            Self::F16 | Self::F32 | Self::Bf16 => 0,
            Self::Int8 => size_of::<f32>(),
        }
    }

    /// How it is called in settings, in the registry and in [`KvLayout::canonical`].
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
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
        let of_token = self.head_dim.checked_mul(self.dtype.bytes());
        let of_token = of_token.and_then(|bytes| bytes.checked_add(self.dtype.scale_bytes()));
        let of_head = of_token.and_then(|bytes| bytes.checked_mul(self.block_tokens));
        let factors = [self.kv_heads, self.layers, 2];
        let bytes = of_head.and_then(|bytes| factors.into_iter().try_fold(bytes, usize::checked_mul));
        match bytes {
            Some(bytes) if bytes <= BLOCK_BYTES_MAX => Ok(()),
            Some(_) | None => Err(LayoutError::TooLarge),
        }
    }

    /// Bytes of K (or of V) of one head of one layer.
    pub fn head_bytes(&self) -> usize {
        self.scales_offset() + self.block_tokens * self.dtype.scale_bytes()
    }

    /// Where the scales of a head's tokens begin, from K (or V) of the head on.
    pub fn scales_offset(&self) -> usize {
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
        for dtype in KvDtype::ALL {
            let layout = KvLayout { dtype, ..LAYOUT };
            layout.validate().expect("possible");
            let mut end = 0;
            for layer in 0..layout.layers {
                assert_eq!(layout.layer_range(layer).start, end);
                for head in 0..layout.kv_heads {
                    assert_eq!(layout.k_offset(layer, head), end);
                    end += layout.head_bytes();
                }
                for head in 0..layout.kv_heads {
                    assert_eq!(layout.v_offset(layer, head), end);
                    end += layout.head_bytes();
                }
                assert_eq!(layout.layer_range(layer).end, end);
            }
            assert_eq!(layout.block_bytes(), end);
            assert_eq!(layout.token_bytes() * layout.block_tokens, end);
        }
    }

    #[test]
    fn formats_differ_in_size_and_in_name() {
        let of = |dtype| KvLayout { dtype, ..LAYOUT };
        let bytes = KvDtype::ALL.map(|dtype| of(dtype).token_bytes());
        // 3 layers, 2 heads, K and V: 12 times 64 elements, and a scale.
        assert_eq!(bytes, [12 * 256, 12 * 128, 12 * 128, 12 * 68]);
        let names: std::collections::BTreeSet<String> =
            KvDtype::ALL.iter().map(|dtype| of(*dtype).canonical()).collect();
        assert_eq!(names.len(), KvDtype::ALL.len());
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
