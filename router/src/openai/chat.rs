//! `/v1/chat/completions`.

use proto::v1;
use serde_json::{Map, Value, json};
use types::{Error, TokenLogprob};

use super::body::{self, Context, Output};
use super::parameters::{Parameters, wrong};
use crate::model::Model;
use crate::request::{Input, MESSAGES_MAX, MaxTokens, Request};

/// Roles that chat templates know.
const ROLES: [&str; 3] = ["system", "user", "assistant"];

/// Reads a request.
pub(super) fn read(object: Map<String, Value>, context: Context) -> Result<(Request, Output), Error> {
    let mut p = Parameters::new(object);
    let messages = messages(&mut p)?;
    let max_tokens = max_tokens(&mut p)?;
    let logprobs = logprobs(&mut p)?;
    p.take_only("response_format", &json!({ "type": "text" }))?;
    body::finish(p, context, Input::Chat(messages), max_tokens, logprobs)
}

fn messages(p: &mut Parameters) -> Result<Vec<Value>, Error> {
    let list = match p.take("messages") {
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong("messages", "a list of messages", &other)),
        None => return Err(Error::invalid("messages", "messages must not be empty")),
    };
    if list.is_empty() || list.len() > MESSAGES_MAX {
        let message = format!(
            "messages has {}, but must have between 1 and {MESSAGES_MAX}",
            list.len()
        );
        return Err(Error::invalid("messages", message));
    }
    list.into_iter()
        .enumerate()
        .map(|(index, value)| message(index, value))
        .collect()
}

fn message(index: usize, value: Value) -> Result<Value, Error> {
    let mut p = Parameters::within(format!("messages[{index}]"), value)?;
    let role = p.take_string("role")?.unwrap_or_default();
    if !ROLES.contains(&role.as_str()) {
        let name = p.name("role");
        let message = format!("{name} is {role:?}, but must be one of {}", ROLES.join(", "));
        return Err(Error::invalid(name, message));
    }
    let name = p.name("content");
    let content = match p.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => text_of_parts(&name, parts)?,
        Some(other) => return Err(wrong(&name, "a string or a list of parts", &other)),
        None => return Err(wrong(&name, "a string or a list of parts", &Value::Null)),
    };
    p.finish()?;
    Ok(json!({ "role": role, "content": content }))
}

fn text_of_parts(name: &str, parts: Vec<Value>) -> Result<String, Error> {
    let mut text = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let mut p = Parameters::within(format!("{name}[{index}]"), part)?;
        p.take_only("type", &json!("text"))?;
        let part = p.take_string("text")?;
        let missing = || Error::invalid(p.name("text"), format!("{} is missing", p.name("text")));
        text.push_str(&part.ok_or_else(missing)?);
        p.finish()?;
    }
    Ok(text)
}

/// `max_completion_tokens`, or `max_tokens` as it was called before.
fn max_tokens(p: &mut Parameters) -> Result<MaxTokens, Error> {
    let (old, new) = (p.take_u64("max_tokens")?, p.take_u64("max_completion_tokens")?);
    match (old, new) {
        (Some(old), Some(new)) if old != new => {
            let message = format!("max_tokens is {old} and max_completion_tokens is {new}: give one of them");
            Err(Error::invalid("max_completion_tokens", message))
        }
        (Some(count), _) | (None, Some(count)) => Ok(MaxTokens::Given(count)),
        (None, None) => Ok(MaxTokens::Context),
    }
}

fn logprobs(p: &mut Parameters) -> Result<Option<u8>, Error> {
    let wanted = p.take_bool("logprobs")?.unwrap_or(false);
    match p.take_u64("top_logprobs")? {
        None => Ok(wanted.then_some(0)),
        Some(_) if !wanted => {
            let message = "top_logprobs is only allowed together with logprobs";
            Err(Error::invalid("top_logprobs", message))
        }
        // What exceeds a byte exceeds the limit too, which is checked with all other ranges.
        Some(count) => Ok(Some(u8::try_from(count).unwrap_or(u8::MAX))),
    }
}

/// An answer in one piece, in the making.
#[derive(Debug, Default)]
pub(super) struct Answer {
    text: String,
    logprobs: Vec<Value>,
}

impl Answer {
    pub(super) fn add(&mut self, tokens: &v1::DecodeTokens, model: &Model) {
        self.text.push_str(&tokens.text);
        self.logprobs.extend(entries(tokens, model));
    }

    pub(super) fn choice(&mut self, reason: &str) -> Value {
        json!({
            "index": 0,
            "message": {
                "role": "assistant",
                "content": std::mem::take(&mut self.text),
                "refusal": null,
            },
            "logprobs": logprobs_object(std::mem::take(&mut self.logprobs)),
            "finish_reason": reason,
        })
    }
}

/// The choice of a stream's first chunk.
pub(super) fn opening() -> Value {
    chunk(
        json!({ "role": "assistant", "content": "" }),
        Value::Null,
        Value::Null,
    )
}

/// The choice of a chunk with tokens.
pub(super) fn part(tokens: &v1::DecodeTokens, model: &Model) -> Value {
    let logprobs = logprobs_object(entries(tokens, model).collect());
    chunk(json!({ "content": tokens.text }), logprobs, Value::Null)
}

/// The choice of a stream's last chunk.
pub(super) fn closing(reason: &str) -> Value {
    chunk(json!({}), Value::Null, reason.into())
}

fn chunk(delta: Value, logprobs: Value, reason: Value) -> Value {
    json!({ "index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason })
}

fn logprobs_object(entries: Vec<Value>) -> Value {
    if entries.is_empty() {
        return Value::Null;
    }
    json!({ "content": entries, "refusal": null })
}

fn entries(tokens: &v1::DecodeTokens, model: &Model) -> impl Iterator<Item = Value> {
    tokens.ids.iter().zip(&tokens.logprobs).map(|(token, logprob)| {
        let TokenLogprob { logprob, top } = proto::convert::logprob(logprob);
        let mut entry = entry(model, *token, logprob);
        let top = top
            .iter()
            .map(|(token, logprob)| entry_value(model, *token, *logprob));
        entry.insert("top_logprobs".into(), top.collect());
        Value::Object(entry)
    })
}

fn entry_value(model: &Model, token: u32, logprob: f32) -> Value {
    Value::Object(entry(model, token, logprob))
}

fn entry(model: &Model, token: u32, logprob: f32) -> Map<String, Value> {
    let bytes = model.token_bytes(token);
    let mut entry = Map::new();
    entry.insert("token".into(), String::from_utf8_lossy(bytes).into());
    entry.insert("logprob".into(), json!(logprob));
    entry.insert("bytes".into(), json!(bytes));
    entry
}
