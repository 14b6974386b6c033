//! A request as both front doors put it, and its way from there to something that can be placed.
//!
//! Invariant: whatever became a [`Prepared`] is within every range and bound, so that nodes refuse only what changed
//! meanwhile. Pure but for the model's tables.

use std::time::{Duration, Instant};

use types::{BlockHash, Error, KvSpace, Priority, RequestId, SamplingParams, Slo, Token, TraceParent};

use crate::config::Config;
use crate::error::RequestError;
use crate::model::Model;
use crate::tenants::Terms;

/// Longest tenant name: it is hashed for every request.
pub const TENANT_BYTES_MAX: usize = 256;
/// Most messages of one conversation.
pub const MESSAGES_MAX: usize = 4096;

/// What the answer continues.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Text in the model's own format.
    Text(String),
    /// Tokens of the model.
    Tokens(Vec<Token>),
    /// A conversation: objects with `role` and `content`.
    Chat(Vec<serde_json::Value>),
}

impl Input {
    /// The parameter that it came in.
    pub fn param(&self) -> &'static str {
        match self {
            Self::Text(_) | Self::Tokens(_) => "prompt",
            Self::Chat(_) => "messages",
        }
    }
}

/// A request before anything was checked against the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Names it in answers and logs.
    pub id: RequestId,
    /// The model's name; empty takes the one that is served.
    pub model: String,
    /// What the answer continues.
    pub input: Input,
    /// How tokens are drawn. `max_tokens` is decided by the field below.
    pub sampling: SamplingParams,
    /// Most tokens of the answer.
    pub max_tokens: MaxTokens,
    /// What the client asks of latency.
    pub slo: Slo,
    /// Whose cache it uses; empty is the common one.
    pub tenant: String,
    /// How much it matters, as the client says.
    pub priority: Priority,
    /// When it arrived.
    pub received: Instant,
    /// The trace that its client is in.
    pub trace: Option<TraceParent>,
    /// The client's own time limit, if it is shorter than the router's.
    pub time_limit: Option<Duration>,
}

/// A bound on the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaxTokens {
    /// As the client says. The context may end the answer before.
    Given(u64),
    /// What the context leaves, but at most this.
    AtMost(u32),
    /// What the context leaves.
    Context,
}

/// A request that can be placed.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// Names it in answers and logs.
    pub id: RequestId,
    /// Its tokens; at least 1.
    pub prompt: Vec<Token>,
    /// How tokens are drawn, with everything decided: another node continues with the same.
    pub sampling: SamplingParams,
    /// Whose cache it uses.
    pub tenant: String,
    /// What holds for it.
    pub terms: Terms,
    /// When it arrived.
    pub received: Instant,
    /// Time that it has in all.
    pub time_limit: Duration,
}

/// Checks a request against the model. `context_tokens_max` is what the nodes hold, if any are known.
pub fn prepare(
    request: Request,
    model: &Model,
    config: &Config,
    context_tokens_max: Option<u64>,
    now_unix_s: u64,
) -> Result<Prepared, RequestError> {
    let Request {
        id,
        model: name,
        input,
        mut sampling,
        max_tokens,
        slo,
        tenant,
        priority,
        received,
        trace: _,
        time_limit,
    } = request;
    if !name.is_empty() && name != model.name() {
        return Err(RequestError::UnknownModel {
            model: name,
            served: model.name().to_owned(),
        });
    }
    check_bounds(&tenant, slo).map_err(RequestError::Parameter)?;
    let param = input.param();
    let prompt = tokens(input, model, now_unix_s).map_err(RequestError::Parameter)?;
    let context = model.context_tokens_max();
    let context = context_tokens_max.map_or(context, |nodes| nodes.min(context));
    let prompt_tokens = prompt.len() as u64;
    if prompt_tokens >= context {
        return Err(RequestError::ContextLength {
            param,
            prompt_tokens,
            context_tokens_max: context,
        });
    }
    let time_limit_max = config.request_deadline.get();
    let left = u32::try_from(context - prompt_tokens).unwrap_or(u32::MAX);
    sampling.max_tokens = max_tokens_of(max_tokens, left).map_err(RequestError::Parameter)?;
    sampling
        .validate(model.vocabulary())
        .map_err(RequestError::Parameter)?;
    Ok(Prepared {
        id,
        prompt,
        sampling,
        terms: config.terms(&tenant, priority, slo),
        tenant,
        received,
        time_limit: time_limit.map_or(time_limit_max, |limit| limit.min(time_limit_max)),
    })
}

/// The hashes of a sequence's full blocks, and what decides between placements that are as good as equal: the first block, or
/// the tokens of a sequence that has none.
pub fn hashes(space: &KvSpace, tenant: &str, sequence: &[Token]) -> (Vec<BlockHash>, BlockHash) {
    let root = space.with_tenant(tenant).root();
    let hashes = root.chain(sequence, space.layout.block_tokens);
    let key = hashes.first().copied().unwrap_or_else(|| root.child(sequence));
    (hashes, key)
}

fn check_bounds(tenant: &str, slo: Slo) -> Result<(), Error> {
    if tenant.len() > TENANT_BYTES_MAX {
        let message = format!(
            "tenant has {} bytes, but at most {TENANT_BYTES_MAX} are allowed",
            tenant.len()
        );
        return Err(Error::invalid("tenant", message));
    }
    for (name, limit) in [("ttft_slo_ms", slo.ttft), ("tbt_slo_ms", slo.tbt)] {
        if let Some(limit) = limit
            && !(limit.0.is_finite() && limit.0 > 0.0)
        {
            let message = format!("{name} is {}, but must be a positive number", limit.0);
            return Err(Error::invalid(name, message));
        }
    }
    Ok(())
}

fn tokens(input: Input, model: &Model, now_unix_s: u64) -> Result<Vec<Token>, Error> {
    let param = input.param();
    let prompt = match input {
        Input::Text(text) => model.tokens_of_text(&text),
        Input::Chat(messages) => model.tokens_of_chat(&messages, now_unix_s)?,
        Input::Tokens(tokens) => tokens,
    };
    let vocabulary = model.vocabulary();
    if prompt.is_empty() {
        return Err(Error::invalid(param, format!("{param} must not be empty")));
    }
    if let Some(token) = prompt.iter().find(|token| **token as usize >= vocabulary) {
        let message = format!("{param} names token {token}, but the model has {vocabulary}");
        return Err(Error::invalid(param, message));
    }
    Ok(prompt)
}

fn max_tokens_of(wanted: MaxTokens, left: u32) -> Result<u32, Error> {
    match wanted {
        MaxTokens::Context => Ok(left),
        MaxTokens::AtMost(limit) => Ok(left.min(limit)),
        MaxTokens::Given(0) => Err(Error::invalid(
            "max_tokens",
            "max_tokens is 0, but must be at least 1",
        )),
        // More than the context holds is fine, the context ends the answer; but a number like 2^63 is a mistake that
        // the client wants to hear of.
        MaxTokens::Given(count) => u32::try_from(count).map(|count| count.min(left)).map_err(|_| {
            let message = format!("max_tokens is {count}, but must be at most {}", u32::MAX);
            Error::invalid("max_tokens", message)
        }),
    }
}
