//! The choice of the next token.
//!
//! In order: logit bias; repetition, presence and frequency penalties; temperature; top-k, top-p, min-p; one draw.
//! Log-probabilities are those of the logits as the model gave them.
//!
//! Invariant: the choice is a function of the logits, the parameters, the tokens so far and nothing else. The random number is
//! that of the request's seed and the position alone ([`uniform`]), sums run in the order of token ids in `f64`, and the
//! exponential is made of basic operations instead of the platform's, so another machine chooses the same token.
//! What is not a number counts as impossible.

use std::{cmp::Ordering, collections::HashMap};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use types::{ErrorCode, SamplingParams, Token, TokenLogprob};

/// How many candidates top-p sorts first; it nearly always ends among them.
const SORTED_FIRST: usize = 256;
/// By how much it continues when it does not.
const SORTED_GROWTH: usize = 8;

/// A token and, if asked for, its log-probability.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The choice.
    pub token: Token,
    /// Before bias, penalties, temperature and filters.
    pub logprob: Option<TokenLogprob>,
}

/// Why no token can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model's numbers overflowed, or a bias excluded everything.
    #[error("none of the {vocabulary} logits is a number above minus infinity")]
    NoCandidate {
        /// Number of logits.
        vocabulary: usize,
    },
}

impl SampleError {
    /// What a caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NoCandidate { .. } => ErrorCode::Internal,
        }
    }
}

impl From<SampleError> for types::Error {
    fn from(error: SampleError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// A token in the running.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    token: Token,
    logit: f32,
    /// Probability relative to the most likely token's, once weighed.
    weight: f64,
}

/// Chooses the token after `prompt` and `generated`. Changes `logits`, one for each token of the vocabulary, as scratch.
///
/// `params` have been validated ([`SamplingParams::validate`]).
///
/// # Errors
///
/// [`SampleError`].
pub fn sample(
    logits: &mut [f32],
    params: &SamplingParams,
    prompt: &[Token],
    generated: &[Token],
) -> Result<Sampled, SampleError> {
    for logit in logits.iter_mut() {
        *logit = if logit.is_nan() {
            f32::NEG_INFINITY
        } else {
            logit.min(f32::MAX)
        };
    }
    let raw = params.logprobs.map(|_| logits.to_vec());
    bias_and_penalise(logits, params, prompt, generated);
    let best = argmax(logits).ok_or(SampleError::NoCandidate {
        vocabulary: logits.len(),
    })?;
    let token = if params.temperature > 0.0 {
        let candidates = filter(candidates(logits), logits[best as usize], params);
        draw(&candidates, uniform(params.seed, prompt.len() + generated.len()))
    } else {
        best
    };
    let logprob = raw
        .zip(params.logprobs)
        .map(|(raw, top)| logprob(&raw, token, usize::from(top)));
    Ok(Sampled { token, logprob })
}

/// The random number of a position of a request: in [0, 1), a multiple of 2^-53.
///
/// ChaCha8 keyed with the seed as little-endian bytes followed by zeros; the position is its stream.
pub fn uniform(seed: u64, position: usize) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(position as u64);
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

fn bias_and_penalise(logits: &mut [f32], params: &SamplingParams, prompt: &[Token], generated: &[Token]) {
    for (token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    let SamplingParams {
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        ..
    } = *params;
    let repetition = repetition_penalty != 1.0;
    if !repetition && presence_penalty == 0.0 && frequency_penalty == 0.0 {
        return;
    }
    let mut counts: HashMap<Token, u32> = HashMap::new();
    for token in generated {
        *counts.entry(*token).or_default() += 1;
    }
    if repetition {
        for token in prompt {
            counts.entry(*token).or_default();
        }
    }
    // Each token is changed once, so the order of the map does not matter.
    for (token, count) in counts {
        let Some(logit) = logits.get_mut(token as usize) else {
            continue;
        };
        if repetition {
            *logit = if *logit > 0.0 {
                *logit / repetition_penalty
            } else {
                *logit * repetition_penalty
            };
        }
        if count > 0 {
            *logit -= presence_penalty + frequency_penalty * count as f32;
        }
    }
}

/// The token of the highest logit, the lowest id among equals; `None` if all are minus infinity.
fn argmax(logits: &[f32]) -> Option<Token> {
    let mut best = (f32::NEG_INFINITY, None);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > best.0 {
            best = (*logit, Some(token as Token));
        }
    }
    best.1
}

/// All possible tokens in the order of their ids, not yet weighed.
fn candidates(logits: &[f32]) -> Vec<Candidate> {
    let possible = logits
        .iter()
        .enumerate()
        .filter(|(_, logit)| **logit > f32::NEG_INFINITY);
    possible
        .map(|(token, logit)| Candidate {
            token: token as Token,
            logit: *logit,
            weight: 0.0,
        })
        .collect()
}

/// Sets the weights and gives their sum. `best` is the highest logit.
fn weigh(candidates: &mut [Candidate], best: f32, temperature: f32) -> f64 {
    let (best, temperature) = (f64::from(best), f64::from(temperature));
    let mut whole = 0.0;
    for candidate in candidates {
        candidate.weight = exp((f64::from(candidate.logit) - best) / temperature);
        whole += candidate.weight;
    }
    whole
}

/// What top-k, then top-p, then min-p leave, in the order of ids, weighed.
fn filter(mut candidates: Vec<Candidate>, best: f32, params: &SamplingParams) -> Vec<Candidate> {
    let by_token = |candidate: &Candidate| candidate.token;
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, more_likely);
        candidates.truncate(top_k);
        candidates.sort_unstable_by_key(by_token);
    }
    let whole = weigh(&mut candidates, best, params.temperature);
    if params.top_p < 1.0 {
        let kept = nucleus(&mut candidates, f64::from(params.top_p) * whole);
        candidates.truncate(kept);
        candidates.sort_unstable_by_key(by_token);
    }
    if params.min_p > 0.0 {
        // The most likely token has weight 1.
        candidates.retain(|candidate| candidate.weight >= f64::from(params.min_p));
    }
    candidates
}

/// Brings the most likely tokens to the front, in order, until they have `share` of the weight; how many they are.
fn nucleus(candidates: &mut [Candidate], share: f64) -> usize {
    let (mut sorted, mut reached) = (0, 0.0);
    let mut next = SORTED_FIRST;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let count = next.min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count - 1, more_likely);
        }
        rest[..count].sort_unstable_by(more_likely);
        for candidate in &rest[..count] {
            sorted += 1;
            reached += candidate.weight;
            if reached >= share {
                return sorted;
            }
        }
        next *= SORTED_GROWTH;
    }
    sorted
}

/// A total order: by logit, the lower id first among equals.
fn more_likely(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

fn draw(candidates: &[Candidate], uniform: f64) -> Token {
    let whole: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    let target = uniform * whole;
    let mut reached = 0.0;
    let mut last = None;
    for candidate in candidates.iter().filter(|candidate| candidate.weight > 0.0) {
        reached += candidate.weight;
        last = Some(candidate.token);
        if reached > target {
            break;
        }
    }
    last.expect("the most likely token passes every filter with a weight of 1")
}

fn logprob(raw: &[f32], token: Token, top: usize) -> TokenLogprob {
    let mut candidates = candidates(raw);
    let best = argmax(raw).expect("neither bias nor penalty makes an impossible token possible");
    let best = raw[best as usize];
    let whole = weigh(&mut candidates, best, 1.0);
    let normaliser = f64::from(best) + whole.ln();
    let of = |logit: f32| (f64::from(logit) - normaliser) as f32;
    let top = top.min(candidates.len());
    if top > 0 && top < candidates.len() {
        candidates.select_nth_unstable_by(top - 1, more_likely);
    }
    candidates.truncate(top);
    candidates.sort_unstable_by(more_likely);
    TokenLogprob {
        logprob: of(raw[token as usize]),
        top: candidates
            .iter()
            .map(|candidate| (candidate.token, of(candidate.logit)))
            .collect(),
    }
}

/// `e^x` for `x <= 0`, within some units in the last place of the true value, from basic operations alone.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; `ln 2` is split so that `n` times its first part is exact; the exponential of
/// `r` is its Taylor series to the 13th power, whose next term is below 2^-57.
fn exp(x: f64) -> f64 {
    const LN_2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN_2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
    /// Below, the result is not a normal number.
    const LOWEST: f64 = -708.0;
    /// Adding it leaves no room for a fraction, so that taking it away again rounds to a whole number.
    const ROUNDER: f64 = 1.5 * (1u64 << 52) as f64;
    const COEFFICIENTS: [f64; 14] = inverse_factorials();
    if x < LOWEST {
        return 0.0;
    }
    let n = (x * std::f64::consts::LOG2_E + ROUNDER) - ROUNDER;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let series = COEFFICIENTS
        .iter()
        .rev()
        .fold(0.0, |series, coefficient| series * r + coefficient);
    let power = f64::from_bits(((n as i64 + 1023) as u64) << 52);
    series * power
}

/// `1 / n!`, each rounded once: all these factorials are exact in `f64`.
const fn inverse_factorials() -> [f64; 14] {
    let mut inverses = [1.0; 14];
    let (mut n, mut factorial) = (1, 1.0);
    while n < inverses.len() {
        factorial *= n as f64;
        inverses[n] = 1.0 / factorial;
        n += 1;
    }
    inverses
}

#[cfg(test)]
mod tests;
