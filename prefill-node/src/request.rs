//! What a decode node asks for, checked once.
//!
//! Pure. Elsewhere: whether there is room for it (`schedule`, `session`).

use std::sync::Arc;
use std::time::Duration;

use kv_store::Source;
use proto::{convert, v1};
use types::{BlockHash, Epoch, Error, ErrorCode, KvLayout, RequestId, SamplingParams, Token};

/// Peers that are asked for a prefix. The router lists the best ones first.
pub const SOURCES_MAX: usize = 8;
/// Bounds what a tenant's salt can cost to hash and to log.
pub const TENANT_BYTES_MAX: usize = 256;

/// What this node accepts.
#[derive(Debug, Clone, Copy)]
pub struct Accepts {
    /// Identity of the KV space that all nodes share.
    pub kv_root: BlockHash,
    /// This incarnation.
    pub epoch: Epoch,
    /// Tokens of the model.
    pub vocabulary: usize,
    /// Longest sequence the model takes.
    pub context_tokens_max: usize,
    /// Blocks of the pool.
    pub capacity_blocks: usize,
    /// Format of a block.
    pub layout: KvLayout,
    /// Longest time of a request.
    pub timeout_max: Duration,
}

/// A prompt to be computed and handed over.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// The request's name, for logs.
    pub request_id: RequestId,
    /// All that is known: prompt, then what was generated before.
    pub tokens: Arc<[Token]>,
    /// How many of [`Prompt::tokens`] are the client's.
    pub prompt_tokens: usize,
    /// Leading full blocks that the decode node holds.
    pub held_blocks: usize,
    /// How the first token is drawn.
    pub sampling: SamplingParams,
    /// Peers that may hold a prefix, best first.
    pub sources: Vec<Source>,
    /// How long it may take.
    pub timeout: Duration,
    /// Salts the hashes of its blocks.
    pub tenant: String,
}

impl Prompt {
    /// Blocks that the prompt occupies, the last one perhaps partly.
    pub fn blocks(&self, layout: &KvLayout) -> usize {
        layout.blocks_for(self.tokens.len())
    }
}

impl Accepts {
    /// Checks a request.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Conflict`] for another KV space, [`ErrorCode::Fenced`] for another incarnation of this node,
    /// [`ErrorCode::Invalid`] for what can never be computed here.
    pub fn prompt(&self, start: v1::PrefillStart) -> Result<Prompt, Error> {
        let v1::PrefillStart {
            request_id,
            kv_root,
            tokens,
            prompt_tokens,
            held_blocks,
            sampling,
            sources,
            deadline_ms,
            prefill_epoch,
            tenant,
        } = start;
        self.check_identity(&kv_root, Epoch(prefill_epoch))?;
        self.check_tokens(&tokens)?;
        let sampling = convert::sampling(sampling)?;
        sampling.validate(self.vocabulary)?;
        if tenant.len() > TENANT_BYTES_MAX {
            return Err(Error::invalid(
                "tenant",
                format!(
                    "tenant has {} bytes, but at most {TENANT_BYTES_MAX} are allowed",
                    tenant.len()
                ),
            ));
        }
        let full_blocks = tokens.len() / self.layout.block_tokens;
        Ok(Prompt {
            request_id: convert::request_id(&request_id)?,
            prompt_tokens: within("prompt_tokens", prompt_tokens, 1, tokens.len())?,
            held_blocks: within("held_blocks", held_blocks, 0, full_blocks)?,
            sources: sources.iter().take(SOURCES_MAX).map(Source::from).collect(),
            timeout: match deadline_ms {
                0 => return Err(Error::new(ErrorCode::Timeout, "the request has no time left")),
                left => Duration::from_millis(left).min(self.timeout_max),
            },
            tokens: tokens.into(),
            sampling,
            tenant,
        })
    }

    fn check_identity(&self, kv_root: &[u8], epoch: Epoch) -> Result<(), Error> {
        let kv_root = convert::hash("kv_root", kv_root)?;
        if kv_root != self.kv_root {
            return Err(Error::new(
                ErrorCode::Conflict,
                format!(
                    "this node's KV space is {}, but the request's is {kv_root}",
                    self.kv_root
                ),
            ));
        }
        if epoch != self.epoch {
            return Err(Error::new(
                ErrorCode::Fenced,
                format!(
                    "this node is at epoch {}, but the request is for {epoch}",
                    self.epoch
                ),
            ));
        }
        Ok(())
    }

    fn check_tokens(&self, tokens: &[Token]) -> Result<(), Error> {
        let capacity = self.capacity_blocks.saturating_mul(self.layout.block_tokens);
        let limit = self.context_tokens_max.min(capacity);
        if tokens.is_empty() {
            return Err(Error::invalid("tokens", "the prompt has no tokens"));
        }
        if tokens.len() > limit {
            return Err(Error::invalid(
                "tokens",
                format!("the prompt has {} tokens, but at most {limit} fit", tokens.len()),
            ));
        }
        match tokens.iter().find(|token| **token as usize >= self.vocabulary) {
            None => Ok(()),
            Some(token) => Err(Error::invalid(
                "tokens",
                format!("token {token} is not one of the model's {}", self.vocabulary),
            )),
        }
    }
}

fn within(field: &str, value: u64, low: usize, high: usize) -> Result<usize, Error> {
    let wanted = usize::try_from(value)
        .ok()
        .filter(|value| (low..=high).contains(value));
    wanted.ok_or_else(|| {
        Error::invalid(
            field,
            format!("{field} is {value}, but must be between {low} and {high}"),
        )
    })
}

#[cfg(test)]
mod tests;
