//! Requests over `perigee.v1.Inference/Generate`.

use std::time::Instant;

use client::{GenerateEvent, Inference};
use proto::v1;
use proto::v1::generate_request::Input;
use types::Error;

use super::flags::Api;
use super::plan::Planned;
use super::target::{Answer, Shape, Stopwatch};

/// A client of one router.
#[derive(Debug)]
pub(super) struct Client {
    inference: Inference,
}

impl Client {
    pub(super) fn new(inference: Inference) -> Self {
        Self { inference }
    }

    pub(super) async fn send(&self, shape: &Shape, request: &Planned) -> Result<Answer, Error> {
        let wire = to_wire(shape, request);
        let mut watch = Stopwatch::new(Instant::now());
        let mut events = self.inference.generate(wire, shape.timeout).await?;
        while let Some(event) = events.next().await? {
            match event {
                GenerateEvent::Accepted { .. } => {}
                GenerateEvent::Tokens(chunk) if chunk.ids.is_empty() => {}
                GenerateEvent::Tokens(_) => watch.content(Instant::now()),
                GenerateEvent::Finished { usage, .. } => {
                    return watch.answer(
                        usage.prompt_tokens,
                        usage.cached_tokens,
                        Some(usage.completion_tokens),
                    );
                }
            }
        }
        Err(Error::internal("the stream went on after its end"))
    }
}

fn to_wire(shape: &Shape, request: &Planned) -> v1::GenerateRequest {
    let input = match shape.api {
        Api::Completions => Input::Prompt(request.prompt.clone()),
        Api::Chat => Input::Chat(v1::ChatMessages {
            messages: vec![v1::ChatMessage {
                role: "user".to_owned(),
                content: request.prompt.clone(),
            }],
        }),
    };
    v1::GenerateRequest {
        model: shape.model.clone(),
        input: Some(input),
        sampling: Some(v1::Sampling {
            temperature: Some(0.0),
            max_tokens: Some(request.output_tokens),
            ignore_eos: true,
            ..v1::Sampling::default()
        }),
        ..v1::GenerateRequest::default()
    }
}
