//! Requests, and reading them from a trace in the format that Mooncake published: one JSON object per line, with `timestamp` in milliseconds,
//! `input_length` and `output_length` in tokens, and `hash_ids`: numbers of blocks that are chained on their prefix.

use std::time::Duration;

use serde::Deserialize;
use types::BlockHash;

/// Tokens per block of the published traces.
pub const TRACE_BLOCK_TOKENS: u64 = 512;

/// One request of a workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// When it comes, from the start.
    pub at: Duration,
    /// Decides between placements that are as good as equal: the prompt's first block, be it full or not.
    pub key: BlockHash,
    /// Hashes of the prompt's full blocks.
    pub chain: Vec<BlockHash>,
    /// Tokens of the prompt; at least 1.
    pub prompt_tokens: u64,
    /// Tokens that it will generate; at least 1.
    pub output_tokens: u64,
}

/// A line that is no request.
#[derive(Debug, thiserror::Error)]
#[error("line {line} is no request of a trace: {reason}")]
pub struct TraceError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// A line of a trace.
#[derive(Debug, Deserialize)]
pub struct Line {
    timestamp: f64,
    #[serde(default)]
    input_length: Option<u64>,
    #[serde(default)]
    output_length: Option<u64>,
    hash_ids: Vec<u64>,
}

/// Reads a trace whose blocks have `block_tokens` tokens. A prompt's last block is in its chain only if it is full, since no node caches a
/// part of a block. Without lengths, a prompt is its blocks and an answer one token.
///
/// # Errors
///
/// The first line that is no request.
pub fn parse(text: &str, block_tokens: u64) -> Result<Vec<Request>, TraceError> {
    each_line(text, |line| request(&line, block_tokens))
}

/// Reads what `read` makes of every line.
///
/// # Errors
///
/// The first line that is no request, or that `read` refuses.
pub fn each_line<T>(text: &str, read: impl Fn(Line) -> Result<T, String>) -> Result<Vec<T>, TraceError> {
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            let parsed = serde_json::from_str(line).map_err(|error| error.to_string());
            parsed.and_then(&read).map_err(|reason| TraceError {
                line: index + 1,
                reason,
            })
        })
        .collect()
}

impl Line {
    /// When it comes, from the start.
    ///
    /// # Errors
    ///
    /// It says no time.
    pub fn at(&self) -> Result<Duration, String> {
        Duration::try_from_secs_f64(self.timestamp / 1e3).map_err(|error| error.to_string())
    }

    /// All its blocks, the last one also if it is not full.
    pub fn blocks(&self) -> Vec<BlockHash> {
        self.hash_ids.iter().map(|id| hash(*id)).collect()
    }

    /// Tokens of its prompt, whose blocks have `block_tokens` tokens.
    ///
    /// # Errors
    ///
    /// There are none, or not as many as blocks say.
    pub fn prompt_tokens(&self, block_tokens: u64) -> Result<u64, String> {
        let blocks = self.hash_ids.len() as u64;
        let prompt_tokens = self.input_length.unwrap_or(blocks * block_tokens);
        if prompt_tokens == 0 {
            return Err("the prompt is empty".to_owned());
        }
        if prompt_tokens.div_ceil(block_tokens) != blocks {
            return Err(format!(
                "{prompt_tokens} tokens in {blocks} blocks of {block_tokens} tokens"
            ));
        }
        Ok(prompt_tokens)
    }

    /// Tokens of its answer; at least 1.
    pub fn output_tokens(&self) -> u64 {
        self.output_length.unwrap_or(1).max(1)
    }
}

fn request(line: &Line, block_tokens: u64) -> Result<Request, String> {
    let prompt_tokens = line.prompt_tokens(block_tokens)?;
    let full = usize::try_from(prompt_tokens / block_tokens).map_err(|error| error.to_string())?;
    let mut chain = line.blocks();
    let key = chain[0];
    chain.truncate(full);
    Ok(Request {
        at: line.at()?,
        key,
        chain,
        prompt_tokens,
        output_tokens: line.output_tokens(),
    })
}

/// A hash of a block's number that is as uniform as a real one, in all its bytes.
pub(crate) fn hash(id: u64) -> BlockHash {
    BlockHash(
        (u128::from(id) + 1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
            .to_be_bytes(),
    )
}

#[cfg(test)]
mod tests;
