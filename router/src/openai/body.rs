//! What both APIs share: reading a body, the parameters of sampling, usage and report.

use std::collections::BTreeMap;
use std::time::Instant;

use axum::body::Body;
use proto::v1;
use serde_json::{Map, Value, json};
use types::{Error, Millis, Priority, RequestId, SamplingParams, Slo, Token, TraceParent};

use super::error::ApiError;
use super::parameters::{Parameters, wrong};
use crate::request::{Input, MaxTokens, Request};

/// What a request brings beside its body.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) id: RequestId,
    pub(super) received: Instant,
    pub(super) tenant: String,
    pub(super) trace: Option<TraceParent>,
    /// For a request that brings none.
    pub(super) seed: u64,
}

/// How the answer is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Output {
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

/// Reads a JSON object of at most `limit` bytes.
pub(super) async fn read(body: Body, limit: u64) -> Result<Map<String, Value>, ApiError> {
    let bytes = axum::body::to_bytes(body, usize::try_from(limit).unwrap_or(usize::MAX)).await;
    let bytes = bytes.map_err(|error| {
        let message = format!("the body cannot be read, or has more than {limit} bytes: {error}");
        ApiError::new(Error::new(types::ErrorCode::Invalid, message))
    })?;
    let invalid = |message| ApiError::new(Error::new(types::ErrorCode::Invalid, message));
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(invalid("the body is JSON, but no object".to_owned())),
        Err(error) => Err(invalid(format!("the body is no JSON: {error}"))),
    }
}

/// Takes what both APIs know and refuses what nobody took.
pub(super) fn finish(
    mut parameters: Parameters,
    context: Context,
    input: Input,
    max_tokens: MaxTokens,
    logprobs: Option<u8>,
) -> Result<(Request, Output), Error> {
    let p = &mut parameters;
    let model = p.take_string("model")?;
    let model = model.ok_or_else(|| Error::invalid("model", "model must name a model"))?;
    // Accepted for the client's own bookkeeping. We keep nothing by it.
    p.take_string("user")?;
    p.take_only("n", &json!(1))?;
    p.take_only("store", &json!(false))?;
    let output = output(p)?;
    let sampling = sampling(p, logprobs, context.seed)?;
    let slo = Slo {
        ttft: p.take_f64("ttft_slo_ms")?.map(Millis),
        tbt: p.take_f64("tbt_slo_ms")?.map(Millis),
    };
    let priority = priority(p)?;
    parameters.finish()?;
    let Context {
        id,
        received,
        tenant,
        trace,
        seed: _,
    } = context;
    let request = Request {
        id,
        model,
        input,
        sampling,
        max_tokens,
        slo,
        tenant,
        priority,
        received,
        trace,
        time_limit: None,
    };
    Ok((request, output))
}

/// OpenAI's `service_tier`, as far as it says what matters more: `flex` is work that may wait, `priority` is not.
fn priority(p: &mut Parameters) -> Result<Priority, Error> {
    let Some(tier) = p.take_string("service_tier")? else {
        return Ok(Priority::Normal);
    };
    match tier.as_str() {
        "auto" | "default" => Ok(Priority::Normal),
        "flex" => Ok(Priority::Low),
        "priority" => Ok(Priority::High),
        _ => {
            let message =
                format!("service_tier is {tier:?}, but only auto, default, flex and priority are supported");
            Err(Error::invalid("service_tier", message))
        }
    }
}

fn output(p: &mut Parameters) -> Result<Output, Error> {
    let stream = p.take_bool("stream")?.unwrap_or(false);
    let include_usage = match p.take("stream_options") {
        None => false,
        Some(_) if !stream => {
            let message = "stream_options is only allowed together with stream";
            return Err(Error::invalid("stream_options", message));
        }
        Some(options) => {
            let mut options = Parameters::within("stream_options".into(), options)?;
            let include_usage = options.take_bool("include_usage")?.unwrap_or(false);
            options.finish()?;
            include_usage
        }
    };
    Ok(Output {
        stream,
        include_usage,
    })
}

fn sampling(p: &mut Parameters, logprobs: Option<u8>, seed: u64) -> Result<SamplingParams, Error> {
    let default = SamplingParams::default();
    Ok(SamplingParams {
        // OpenAI's default, where ours is greedy.
        temperature: p.take_f32("temperature")?.unwrap_or(1.0),
        top_p: p.take_f32("top_p")?.unwrap_or(default.top_p),
        top_k: p.take_u32("top_k")?.unwrap_or(default.top_k),
        min_p: p.take_f32("min_p")?.unwrap_or(default.min_p),
        repetition_penalty: p
            .take_f32("repetition_penalty")?
            .unwrap_or(default.repetition_penalty),
        presence_penalty: p
            .take_f32("presence_penalty")?
            .unwrap_or(default.presence_penalty),
        frequency_penalty: p
            .take_f32("frequency_penalty")?
            .unwrap_or(default.frequency_penalty),
        logit_bias: logit_bias(p)?,
        seed: take_seed(p)?.unwrap_or(seed),
        // Decided once the prompt's length is known.
        max_tokens: default.max_tokens,
        stop: stop(p)?,
        stop_tokens: match p.take("stop_token_ids") {
            None => Vec::new(),
            Some(value) => token_ids("stop_token_ids", &value)?,
        },
        ignore_eos: p.take_bool("ignore_eos")?.unwrap_or(default.ignore_eos),
        logprobs,
    })
}

/// Any 64-bit integer. A negative one stands for the number with the same bits.
fn take_seed(p: &mut Parameters) -> Result<Option<u64>, Error> {
    let Some(value) = p.take("seed") else {
        return Ok(None);
    };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some)
        .ok_or_else(|| wrong("seed", "a 64-bit integer", &value))
}

fn stop(p: &mut Parameters) -> Result<Vec<String>, Error> {
    let expected = "a string or a list of strings";
    match p.take("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop]),
        Some(Value::Array(list)) => list
            .into_iter()
            .map(|value| match value {
                Value::String(stop) => Ok(stop),
                other => Err(wrong("stop", expected, &other)),
            })
            .collect(),
        Some(other) => Err(wrong("stop", expected, &other)),
    }
}

fn logit_bias(p: &mut Parameters) -> Result<BTreeMap<Token, f32>, Error> {
    let map = match p.take("logit_bias") {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong("logit_bias", "an object of token ids and numbers", &other)),
    };
    let entries = map.into_iter().map(|(token, bias)| {
        let token = token.parse::<Token>().map_err(|_| {
            let message = format!("logit_bias has the key {token:?}, but keys must be token ids");
            Error::invalid("logit_bias", message)
        })?;
        let number = bias
            .as_f64()
            .ok_or_else(|| wrong("logit_bias", "an object of numbers", &bias))?;
        Ok((token, number as f32))
    });
    entries.collect()
}

/// A list of token ids. Whether the model has them is checked with the prompt.
pub(super) fn token_ids(name: &str, value: &Value) -> Result<Vec<Token>, Error> {
    let expected = "a list of token ids";
    let list = value.as_array().ok_or_else(|| wrong(name, expected, value))?;
    let ids = list.iter().map(|value| {
        let id = value.as_u64().and_then(|id| Token::try_from(id).ok());
        id.ok_or_else(|| wrong(name, expected, value))
    });
    ids.collect()
}

/// `usage` of an answer.
pub(super) fn usage(usage: &v1::Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

/// `perigee` of an answer: where and how it was made.
pub(super) fn report(report: &v1::RequestReport) -> Value {
    let v1::RequestReport {
        prefill_node,
        decode_node,
        fetched_bytes,
        handoff_bytes,
        transport,
        queue_ms,
        prefill_ms,
        handoff_hidden_ms,
        handoff_exposed_ms,
        ttft_ms,
        tbt_mean_ms,
        tbt_max_ms,
        placements,
        ttft_predicted_ms,
        fetch_ms,
        // The header `Server-Timing` tells them.
        spans: _,
    } = report;
    json!({
        "prefill_node": prefill_node,
        "decode_node": decode_node,
        "fetched_bytes": fetched_bytes,
        "handoff_bytes": handoff_bytes,
        "transport": transport,
        "fetch_ms": fetch_ms,
        "queue_ms": queue_ms,
        "prefill_ms": prefill_ms,
        "handoff_hidden_ms": handoff_hidden_ms,
        "handoff_exposed_ms": handoff_exposed_ms,
        "ttft_ms": ttft_ms,
        "tbt_mean_ms": tbt_mean_ms,
        "tbt_max_ms": tbt_max_ms,
        "placements": placements,
        "ttft_predicted_ms": ttft_predicted_ms,
    })
}
