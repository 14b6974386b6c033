//! What is sent and when: a sequence of requests that is a function of a seed. Pure.

use std::time::Duration;

use kv_store::replay::workloads::Random;
use sim::trace::{self, TRACE_BLOCK_TOKENS, TraceError};
use types::{BlockHash, Error};

use super::prompts;

/// Most requests of a run: each one leaves a sample.
pub(crate) const REQUESTS_MAX: u64 = 1_000_000;
/// Most tokens of a prompt or an answer: far beyond any context.
pub(super) const TOKENS_MAX: u64 = 1 << 20;

/// One request to send.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Planned {
    /// From 0.
    pub(super) number: u64,
    /// When, from the start; `None` is as soon as there is room.
    pub(super) at: Option<Duration>,
    pub(super) prompt: String,
    pub(super) output_tokens: u64,
}

/// When requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pace {
    /// As soon as there is room.
    Closed,
    /// Evenly, so many per second.
    Constant(f64),
    /// At random, so many per second in the mean.
    Poisson(f64),
}

/// A number of tokens: normal, and at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Length {
    pub(super) mean: u64,
    pub(super) deviation: u64,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    /// Prompts of random words.
    Synthetic {
        input: Length,
        output: Length,
        shared_prefix_tokens: u64,
    },
    /// Those of a trace, with its times.
    Trace {
        requests: Vec<Traced>,
        speed: f64,
        block_tokens: u64,
        /// Answers' lengths instead of the trace's.
        output: Option<Length>,
    },
}

/// One request of a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Traced {
    at: Duration,
    blocks: Vec<BlockHash>,
    prompt_tokens: u64,
    output_tokens: u64,
}

/// The requests of a run, one after the other.
#[derive(Debug)]
pub(super) struct Plan {
    content: Content,
    pace: Pace,
    seed: u64,
    arrivals: Random,
    next: u64,
    end: u64,
    elapsed_s: f64,
}

impl Plan {
    /// `count` requests, or as many as a trace has.
    pub(super) fn new(content: Content, pace: Pace, seed: u64, count: u64) -> Self {
        let end = match &content {
            Content::Synthetic { .. } => count,
            Content::Trace { requests, .. } => count.min(requests.len() as u64),
        };
        Self {
            content,
            pace,
            seed,
            // Apart from the prompts, so that a rate does not change them.
            arrivals: Random::new(!seed),
            next: 0,
            end,
            elapsed_s: 0.0,
        }
    }

    /// Requests that are still to come.
    pub(super) fn left(&self) -> u64 {
        self.end - self.next
    }

    fn arrival(&mut self) -> Option<Duration> {
        let at = match self.pace {
            Pace::Closed => return None,
            Pace::Constant(rate) => self.next as f64 / rate,
            Pace::Poisson(rate) => {
                self.elapsed_s += self.arrivals.exponential(1.0 / rate);
                self.elapsed_s
            }
        };
        // A time that no duration can hold never comes.
        Some(Duration::try_from_secs_f64(at).unwrap_or(Duration::MAX))
    }
}

impl Iterator for Plan {
    type Item = Planned;

    fn next(&mut self) -> Option<Planned> {
        if self.next >= self.end {
            return None;
        }
        let number = self.next;
        let arrival = self.arrival();
        self.next += 1;
        let mut random = prompts::stream(!self.seed, number);
        Some(match &self.content {
            Content::Synthetic {
                input,
                output,
                shared_prefix_tokens,
            } => {
                let tokens = input.draw(&mut random);
                Planned {
                    number,
                    at: arrival,
                    prompt: prompts::synthetic(self.seed, number, tokens, *shared_prefix_tokens),
                    output_tokens: output.draw(&mut random),
                }
            }
            Content::Trace {
                requests,
                speed,
                block_tokens,
                output,
            } => {
                let request = &requests[number as usize];
                Planned {
                    number,
                    at: Some(request.at.div_f64(*speed)),
                    prompt: prompts::of_blocks(&request.blocks, *block_tokens, request.scaled(*block_tokens)),
                    output_tokens: output.map_or(request.output_tokens, |output| output.draw(&mut random)),
                }
            }
        })
    }
}

impl Traced {
    /// Tokens of the prompt where a block has `block_tokens`.
    fn scaled(&self, block_tokens: u64) -> u64 {
        (self.prompt_tokens * block_tokens).div_ceil(TRACE_BLOCK_TOKENS)
    }
}

impl Length {
    /// Checks the numbers of `--{what}`.
    pub(super) fn check(self, what: &str) -> Result<Self, Error> {
        if !(1..=TOKENS_MAX).contains(&self.mean) || self.deviation > TOKENS_MAX {
            let message = format!(
                "--{what} is {} with a deviation of {}, but must be from 1 to {TOKENS_MAX}",
                self.mean, self.deviation
            );
            return Err(Error::invalid(what, message));
        }
        Ok(self)
    }

    fn draw(self, random: &mut Random) -> u64 {
        if self.deviation == 0 {
            return self.mean;
        }
        // Box-Muller: one of the two normal numbers that two uniform ones give.
        let radius = (-2.0 * (1.0 - random.unit()).ln()).sqrt();
        let normal = radius * (std::f64::consts::TAU * random.unit()).cos();
        let drawn = self.mean as f64 + normal * self.deviation as f64;
        (drawn.round().max(1.0) as u64).min(TOKENS_MAX)
    }
}

/// Reads a trace in Mooncake's format, in the order of its times, the first of which becomes 0.
pub(super) fn read_trace(text: &str) -> Result<Vec<Traced>, TraceError> {
    let mut requests = trace::each_line(text, |line| {
        let prompt_tokens = line.prompt_tokens(TRACE_BLOCK_TOKENS)?;
        if prompt_tokens > TOKENS_MAX {
            return Err(format!(
                "a prompt of {prompt_tokens} tokens, but at most {TOKENS_MAX} are sent"
            ));
        }
        Ok(Traced {
            at: line.at()?,
            blocks: line.blocks(),
            prompt_tokens,
            output_tokens: line.output_tokens(),
        })
    })?;
    requests.sort_by_key(|request| request.at);
    let first = requests.first().map_or(Duration::ZERO, |request| request.at);
    for request in &mut requests {
        request.at -= first;
    }
    Ok(requests)
}

#[cfg(test)]
mod tests;
