//! The identity of KV content: what a block's bytes were computed from.
//!
//! Invariant: two blocks with one hash hold the same tokens after the same prefix, for the same weights,
//! format, adapter and tenant. The hashes are persisted and cross versions; the golden vectors in the
//! tests pin them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Token;
use crate::layout::KvLayout;

/// Separates our root hashes from any other use of BLAKE3 over the same bytes. Persisted: never change.
const ROOT_CONTEXT: &str = "perigee 2026-11 kv space root v1";

const HASH_BYTES: usize = 16;
const TOKEN_BYTES: usize = size_of::<Token>();
/// Tokens that are hashed with one call; blocks have 32 unless somebody wants it otherwise.
const TOKENS_IN_ONE_PIECE: usize = 64;

/// First 16 bytes of BLAKE3(parent ‖ tokens as little-endian u32). 128 bits make an accidental collision
/// in 10^12 blocks a 10^-15 event.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BlockHash(pub [u8; 16]);

/// Writes tokens as little-endian words. Gives how many bytes that took.
fn write(tokens: &[Token], bytes: &mut [u8]) -> usize {
    let words = bytes.chunks_exact_mut(TOKEN_BYTES);
    for (token, word) in tokens.iter().zip(words) {
        word.copy_from_slice(&token.to_le_bytes());
    }
    tokens.len() * TOKEN_BYTES
}

impl BlockHash {
    /// The hash of the block that holds `tokens` after the prefix that ends in `self`.
    pub fn child(self, tokens: &[Token]) -> Self {
        // In one piece: a hasher that is fed token by token takes several times as long.
        let mut bytes = [0; HASH_BYTES + TOKEN_BYTES * TOKENS_IN_ONE_PIECE];
        if tokens.len() > TOKENS_IN_ONE_PIECE {
            return self.child_by_pieces(tokens, &mut bytes);
        }
        bytes[..HASH_BYTES].copy_from_slice(&self.0);
        let end = HASH_BYTES + write(tokens, &mut bytes[HASH_BYTES..]);
        Self::truncate(blake3::hash(&bytes[..end]))
    }

    fn child_by_pieces(self, tokens: &[Token], bytes: &mut [u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        for piece in tokens.chunks(TOKENS_IN_ONE_PIECE) {
            let end = write(piece, bytes);
            hasher.update(&bytes[..end]);
        }
        Self::truncate(hasher.finalize())
    }

    /// The hashes of every full block of `tokens`, first block first. `self` is the root of the space.
    pub fn chain(self, tokens: &[Token], block_tokens: usize) -> Vec<Self> {
        let mut parent = self;
        let blocks = tokens.chunks_exact(block_tokens);
        blocks
            .map(|block| {
                parent = parent.child(block);
                parent
            })
            .collect()
    }

    /// Reads 32 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != 32 {
            return None;
        }
        u128::from_str_radix(text, 16)
            .ok()
            .map(|value| Self(value.to_be_bytes()))
    }

    fn truncate(hash: blake3::Hash) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.as_bytes()[..16]);
        Self(bytes)
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for BlockHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BlockHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("expected 32 hexadecimal digits"))
    }
}

/// Everything but the tokens that decides the bytes of a block. Nodes exchange blocks only within one
/// space.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvSpace {
    /// BLAKE3 of the model's files, as hexadecimal digits.
    pub model_digest: String,
    /// How the engine computes: its precision and the version of its arithmetic. Two engines that do not
    /// give the same bits must not share a name.
    pub arithmetic: String,
    /// Format and size of a block.
    pub layout: KvLayout,
    /// The LoRA or other adapter that is applied, if any.
    pub adapter: Option<String>,
    /// Keeps tenants apart. Empty for blocks that all tenants share.
    pub tenant_salt: String,
}

impl KvSpace {
    /// The parent of every first block in this space.
    pub fn root(&self) -> BlockHash {
        let mut hasher = blake3::Hasher::new_derive_key(ROOT_CONTEXT);
        let mut field = |bytes: &[u8]| {
            // Lengths keep ("ab", "c") and ("a", "bc") apart.
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(self.model_digest.as_bytes());
        field(self.arithmetic.as_bytes());
        field(self.layout.canonical().as_bytes());
        match &self.adapter {
            None => field(&[0]),
            Some(adapter) => {
                field(&[1]);
                field(adapter.as_bytes());
            }
        }
        field(self.tenant_salt.as_bytes());
        BlockHash::truncate(hasher.finalize())
    }

    /// The same model and format for another tenant.
    pub fn with_tenant(&self, tenant_salt: impl Into<String>) -> Self {
        Self {
            tenant_salt: tenant_salt.into(),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests;
