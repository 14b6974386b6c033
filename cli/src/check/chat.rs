//! `perigee check --chat URL`: a request as any client sends it, and what its answer says of the way that it took.
//!
//! The prompt is new and long, so that a prefill node has to compute it: short ones, and what is cached, decode nodes do by themselves.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};

use super::Finding;
use crate::door::Door;

pub(super) const GROUP: &str = "chat";
/// Models that are loaded and idle answer within seconds.
const DEADLINE: Duration = Duration::from_secs(120);
const ANSWER_BYTES_MAX: u64 = 4 << 20;
const ANSWER_TOKENS: usize = 8;
/// No tokenizer puts two of them into one token.
const WORDS: [&str; 8] = ["one", "two", "three", "four", "five", "six", "seven", "eight"];

/// Flags of the chat request of a check.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ChatFlags {
    /// Also send a chat request to this OpenAI API, and check that a prefill node and a decode node answered it together.
    #[arg(long, value_name = "URL")]
    pub(crate) chat: Option<String>,
    /// Least length of its prompt; more than `router.local_prefill_tokens_max`, or no prefill node is asked.
    #[arg(long, value_name = "TOKENS", default_value_t = 320)]
    pub(crate) chat_tokens: usize,
}

/// Asks the OpenAI API at `url` for its model, and that for an answer to a prompt of at least `tokens` tokens. Blocks.
pub(super) fn ask(url: &str, door: &Door, tokens: usize) -> Result<Value, String> {
    let url = url.trim_end_matches('/');
    let agent = door.agent(DEADLINE)?;
    let authorization = door.authorization();
    let read = |answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>| {
        let mut answer = answer.map_err(|error| error.to_string())?;
        let status = answer.status();
        let body = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX);
        let text = body.read_to_string().map_err(|error| error.to_string())?;
        if !status.is_success() {
            return Err(format!("status {status}: {}", text.trim()));
        }
        serde_json::from_str::<Value>(&text).map_err(|error| format!("no JSON came back: {error}"))
    };
    let mut get = agent.get(format!("{url}/v1/models"));
    if let Some(authorization) = authorization {
        get = get.header("authorization", authorization);
    }
    let models = read(get.call())?;
    let model = models["data"][0]["id"].as_str().ok_or("it serves no model")?;
    let request = json!({
        "model": model,
        "messages": [{ "role": "user", "content": prompt(SystemTime::now(), tokens) }],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    });
    let mut post = agent.post(format!("{url}/v1/chat/completions"));
    if let Some(authorization) = authorization {
        post = post.header("authorization", authorization);
    }
    read(post.content_type("application/json").send(request.to_string()))
}

/// The time stands first, so that nothing after it is cached.
fn prompt(now: SystemTime, tokens: usize) -> String {
    let nanos = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let mut text = format!("{nanos}: go on with this list:");
    for word in WORDS.iter().cycle().take(tokens) {
        // A string takes whatever is written.
        let _ = write!(text, " {word}");
    }
    text
}

/// Judges what came back from `url`.
pub(super) fn judge(url: &str, answer: &Result<Value, String>) -> Finding {
    let failed = |message: String, hint: &str| Finding::failed(GROUP, "", message, hint);
    let answer = match answer {
        Ok(answer) => answer,
        Err(reason) => {
            return failed(
                format!("{url} did not answer: {reason}"),
                "the findings above may say why; routers log each failed request with its reason",
            );
        }
    };
    let text = answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap_or_default();
    let tokens = answer["usage"]["completion_tokens"].as_u64().unwrap_or(0);
    if text.is_empty() || tokens == 0 {
        return failed(
            format!("{url} answered without a text: {answer}"),
            "is it a router of Perigee, and is the model one for conversations?",
        );
    }
    let report = &answer["perigee"];
    let node = |name: &str| report[name].as_str().unwrap_or_default();
    let (prefill, decode) = (node("prefill_node"), node("decode_node"));
    let bytes = report["handoff_bytes"].as_u64().unwrap_or(0);
    if prefill.is_empty() || decode.is_empty() || prefill == decode || bytes == 0 {
        return failed(
            format!(
                "a chat request was answered by {decode:?} alone, without a prefill node ({prefill:?}, {bytes} bytes moved)"
            ),
            "is a prefill node ready? prompts of up to router.local_prefill_tokens_max tokens need none: raise --chat-tokens above it",
        );
    }
    let transport = node("transport");
    let ttft = report["ttft_ms"].as_f64().unwrap_or(0.0);
    Finding::passed(
        GROUP,
        "",
        format!(
            "a chat request was prefilled by {prefill} and decoded by {decode}: {tokens} tokens, the first after {ttft:.0} ms, {bytes} bytes of KV over {transport}"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;

    fn answer(prefill: &str, decode: &str, bytes: u64, text: &str) -> Result<Value, String> {
        Ok(json!({
            "choices": [{ "message": { "content": text } }],
            "usage": { "completion_tokens": 8 },
            "perigee": {
                "prefill_node": prefill, "decode_node": decode, "handoff_bytes": bytes, "transport": "tcp", "ttft_ms": 41.5,
            },
        }))
    }

    #[test]
    fn an_answer_must_come_through_a_prefill_and_a_decode_node() {
        for (answer, passes, says) in [
            (
                answer("prefill-0", "decode-1", 4096, "nine"),
                true,
                "prefilled by prefill-0 and decoded by decode-1",
            ),
            (
                answer("decode-1", "decode-1", 0, "nine"),
                false,
                "without a prefill node",
            ),
            (answer("", "decode-1", 0, "nine"), false, "without a prefill node"),
            (answer("prefill-0", "decode-1", 0, "nine"), false, "0 bytes moved"),
            (answer("prefill-0", "decode-1", 4096, ""), false, "without a text"),
            (Ok(json!({})), false, "without a text"),
            (Err("status 503".to_owned()), false, "did not answer: status 503"),
        ] {
            let finding = judge("http://router:8080", &answer);
            assert_eq!(finding.level == Level::Passed, passes, "{finding:?}");
            assert!(finding.message.contains(says), "{finding:?}");
            assert_eq!(finding.hint.is_empty(), passes);
        }
    }

    #[test]
    fn prompts_are_long_enough_and_differ_from_their_beginning() {
        let at = |seconds| prompt(UNIX_EPOCH + Duration::from_secs(seconds), 320);
        assert!(at(1).split_whitespace().count() >= 320);
        assert_ne!(at(1)[..10], at(2)[..10]);
    }
}
