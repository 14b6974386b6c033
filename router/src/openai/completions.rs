//! `/v1/completions`.

use proto::v1;
use serde_json::{Map, Value, json};
use types::{Error, TokenLogprob};

use super::body::{self, Context, Output};
use super::parameters::{Parameters, wrong};
use crate::model::Model;
use crate::request::{Input, MaxTokens, Request};

/// OpenAI's default.
const MAX_TOKENS_DEFAULT: u32 = 16;

/// Reads a request.
pub(super) fn read(object: Map<String, Value>, context: Context) -> Result<(Request, Output), Error> {
    let mut p = Parameters::new(object);
    let input = prompt(&mut p)?;
    let max_tokens = p.take_u64("max_tokens")?;
    let max_tokens = max_tokens.map_or(MaxTokens::AtMost(MAX_TOKENS_DEFAULT), MaxTokens::Given);
    // What exceeds a byte exceeds the limit too, which is checked with all other ranges.
    let logprobs = p
        .take_u64("logprobs")?
        .map(|count| u8::try_from(count).unwrap_or(u8::MAX));
    p.take_only("echo", &json!(false))?;
    p.take_only("best_of", &json!(1))?;
    // `null` alone: no suffix.
    p.take_only("suffix", &Value::Null)?;
    body::finish(p, context, input, max_tokens, logprobs)
}

fn prompt(p: &mut Parameters) -> Result<Input, Error> {
    match p.take("prompt") {
        Some(Value::String(text)) => Ok(Input::Text(text)),
        Some(Value::Array(list)) if matches!(list.first(), Some(Value::String(_) | Value::Array(_))) => {
            let message = "prompt is a list of prompts, but one prompt per request is supported";
            Err(Error::invalid("prompt", message))
        }
        Some(list @ Value::Array(_)) => Ok(Input::Tokens(body::token_ids("prompt", &list)?)),
        Some(other) => Err(wrong("prompt", "a string or a list of token ids", &other)),
        None => Err(Error::invalid("prompt", "prompt must not be empty")),
    }
}

/// An answer in the making.
#[derive(Debug, Default)]
pub(super) struct Answer {
    text: String,
    /// Characters of text so far, which is what OpenAI's offsets count.
    characters: usize,
    logprobs: Logprobs,
}

/// OpenAI's older form of log-probabilities: a column per field.
#[derive(Debug, Default)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
}

impl Answer {
    pub(super) fn add(&mut self, tokens: &v1::DecodeTokens, model: &Model) {
        self.text.push_str(&tokens.text);
        self.measure(tokens, model);
    }

    pub(super) fn choice(&mut self, reason: &str) -> Value {
        let text = std::mem::take(&mut self.text);
        choice(&text, self.logprobs.take(), reason.into())
    }

    /// The choice of a chunk with tokens.
    pub(super) fn part(&mut self, tokens: &v1::DecodeTokens, model: &Model) -> Value {
        self.measure(tokens, model);
        choice(&tokens.text, self.logprobs.take(), Value::Null)
    }

    fn measure(&mut self, tokens: &v1::DecodeTokens, model: &Model) {
        let text = |token: u32| String::from_utf8_lossy(model.token_bytes(token)).into_owned();
        for (token, logprob) in tokens.ids.iter().zip(&tokens.logprobs) {
            let TokenLogprob { logprob, top } = proto::convert::logprob(logprob);
            let top: Map<String, Value> = top
                .iter()
                .map(|(token, logprob)| (text(*token), json!(logprob)))
                .collect();
            let columns = &mut self.logprobs;
            columns.tokens.push(text(*token));
            columns.token_logprobs.push(logprob);
            columns.top_logprobs.push(Value::Object(top));
            columns.text_offset.push(self.characters);
        }
        self.characters += tokens.text.chars().count();
    }
}

impl Logprobs {
    fn take(&mut self) -> Value {
        let Self {
            tokens,
            token_logprobs,
            top_logprobs,
            text_offset,
        } = std::mem::take(self);
        if tokens.is_empty() {
            return Value::Null;
        }
        json!({
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        })
    }
}

/// The choice of a stream's last chunk.
pub(super) fn closing(reason: &str) -> Value {
    choice("", Value::Null, reason.into())
}

fn choice(text: &str, logprobs: Value, reason: Value) -> Value {
    json!({ "index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason })
}
