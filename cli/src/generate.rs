//! `perigee generate`: one prompt, streamed to stdout.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::Context;
use client::GenerateEvent;
use proto::v1;
use serde_json::{Value, json};
use types::FinishReason;

use crate::arguments::{GenerateArgs, SamplingArgs};
use crate::output::{Format, View};
use crate::reach::Router;

/// A prompt from stdin larger than this is no prompt.
const STDIN_BYTES_MAX: u64 = 16 << 20;
/// Nobody waits longer at a terminal.
const DEADLINE: Duration = Duration::from_secs(600);

/// Generates and prints.
pub(crate) async fn run(arguments: GenerateArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    format.without_names()?;
    let prompt = match arguments.prompt.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin()
                .take(STDIN_BYTES_MAX)
                .read_to_string(&mut text)
                .context("read the prompt from stdin")?;
            text
        }
        prompt => prompt.to_owned(),
    };
    let input = if arguments.chat {
        let message = v1::ChatMessage {
            role: "user".into(),
            content: prompt,
        };
        v1::generate_request::Input::Chat(v1::ChatMessages {
            messages: vec![message],
        })
    } else {
        v1::generate_request::Input::Prompt(prompt)
    };
    let request = v1::GenerateRequest {
        model: router.model_or_own(&arguments.model),
        input: Some(input),
        sampling: Some(v1::Sampling {
            ignore_eos: arguments.ignore_eos,
            ..sampling(&arguments.sampling)
        }),
        tenant: arguments.tenant,
        priority: arguments.priority.as_str().to_owned(),
        ..v1::GenerateRequest::default()
    };
    let mut out = std::io::stdout();
    let generated = stream(router, request, |text| {
        if format.streams_text() {
            write!(out, "{text}")?;
            out.flush()?;
        }
        Ok(())
    })
    .await?;
    // The text was printed as it came, but for the end of its last line.
    format.print_next(&View::line(generated.to_json(), ""))
}

/// A finished generation.
pub(crate) struct Generated {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) reason: FinishReason,
    pub(crate) usage: v1::Usage,
    pub(crate) report: v1::RequestReport,
}

impl Generated {
    /// For `-o json`.
    pub(crate) fn to_json(&self) -> Value {
        let usage = &self.usage;
        json!({
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.reason.as_str(),
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": usage.cached_tokens,
            },
            "report": report_json(&self.report),
        })
    }
}

fn report_json(report: &v1::RequestReport) -> Value {
    json!({
        "prefill_node": report.prefill_node,
        "decode_node": report.decode_node,
        "fetched_bytes": report.fetched_bytes,
        "handoff_bytes": report.handoff_bytes,
        "transport": report.transport,
        "fetch_ms": report.fetch_ms,
        "queue_ms": report.queue_ms,
        "prefill_ms": report.prefill_ms,
        "handoff_hidden_ms": report.handoff_hidden_ms,
        "handoff_exposed_ms": report.handoff_exposed_ms,
        "ttft_ms": report.ttft_ms,
        "ttft_predicted_ms": report.ttft_predicted_ms,
        "tbt_mean_ms": report.tbt_mean_ms,
        "tbt_max_ms": report.tbt_max_ms,
        "placements": report.placements,
    })
}

/// Sampling parameters from flags.
pub(crate) fn sampling(arguments: &SamplingArgs) -> v1::Sampling {
    v1::Sampling {
        temperature: Some(arguments.temperature),
        top_p: Some(arguments.top_p),
        top_k: Some(arguments.top_k),
        seed: arguments.seed,
        max_tokens: Some(arguments.max_tokens),
        stop: arguments.stop.clone(),
        ..v1::Sampling::default()
    }
}

/// Runs a request to its end, passing text on as it comes.
pub(crate) async fn stream(
    router: &Router,
    request: v1::GenerateRequest,
    mut on_text: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Generated> {
    let mut events = router.inference()?.generate(request, DEADLINE).await?;
    let (mut text, mut tokens) = (String::new(), Vec::new());
    while let Some(event) = events.next().await? {
        match event {
            GenerateEvent::Accepted { .. } => {}
            GenerateEvent::Tokens(chunk) => {
                on_text(&chunk.text)?;
                text.push_str(&chunk.text);
                tokens.extend(chunk.ids);
            }
            GenerateEvent::Finished {
                reason,
                usage,
                report,
            } => {
                return Ok(Generated {
                    text,
                    tokens,
                    reason,
                    usage,
                    report,
                });
            }
        }
    }
    Err(types::Error::internal("the stream went on after its end").into())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::output::golden;

    /// A generation that went from a prefill to a decode node.
    pub(crate) fn generated() -> Generated {
        Generated {
            text: "Paris.".into(),
            tokens: vec![3, 1, 4],
            reason: FinishReason::Stop,
            usage: v1::Usage {
                prompt_tokens: 300,
                completion_tokens: 3,
                cached_tokens: 64,
            },
            report: v1::RequestReport {
                prefill_node: "prefill-0".into(),
                decode_node: "decode-1".into(),
                handoff_bytes: 3 << 20,
                transport: "tcp".into(),
                ttft_ms: 41.5,
                tbt_mean_ms: 12.5,
                placements: 1,
                ..v1::RequestReport::default()
            },
        }
    }

    #[test]
    fn a_generation_is_a_document_with_its_report() {
        golden::check("generate", &View::line(generated().to_json(), ""));
    }
}
