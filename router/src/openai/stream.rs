//! Answers as server-sent events: one `data:` per chunk, `data: [DONE]` at the end.
//!
//! A failure in mid-stream is an event named `error` whose data has the shape of every other error; nothing follows it, and
//! above all no `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::http::{HeaderValue, header};
use axum::response::sse::{Event as SseEvent, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::{Assembly, next};
use crate::dispatch::{Event, Running};

struct Chunks {
    assembly: Assembly,
    running: Running,
    /// Ready to go out. At most an opening, a closing, an accounting and the end.
    ready: VecDeque<SseEvent>,
    ended: bool,
}

/// The response that streams what is left of `running` after its `first` event.
pub(super) fn respond(assembly: Assembly, first: Event, running: Running) -> Response {
    let mut chunks = Chunks {
        assembly,
        running,
        ready: VecDeque::new(),
        ended: false,
    };
    if let Some(opening) = chunks.assembly.opening() {
        chunks.push(opening);
    }
    chunks.take(first);
    let events = stream::unfold(chunks, |mut chunks| async move {
        let event = chunks.pull().await?;
        Some((Ok::<_, Infallible>(event), chunks))
    });
    let mut response = Sse::new(events).into_response();
    // A proxy that buffers would turn a stream into one late answer.
    response
        .headers_mut()
        .insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

impl Chunks {
    async fn pull(&mut self) -> Option<SseEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match next(&mut self.running).await {
                Ok(event) => self.take(event),
                Err(error) => self.fail(&error),
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Tokens(tokens) => {
                // Text may be held back until a character or a stop string is decided; a chunk without text and
                // without log-probabilities tells nothing.
                if !tokens.text.is_empty() || !tokens.logprobs.is_empty() {
                    let part = self.assembly.part(&tokens);
                    self.push(part);
                }
            }
            Event::Finished {
                reason,
                usage,
                report,
            } => {
                self.push(self.assembly.closing(&reason));
                if self.assembly.shape.include_usage {
                    self.push(self.assembly.accounting(&usage, &report));
                }
                self.ready.push_back(SseEvent::default().data("[DONE]"));
                self.ended = true;
            }
        }
    }

    fn fail(&mut self, error: &ApiError) {
        let event = SseEvent::default().event("error").data(error.body().to_string());
        self.ready.push_back(event);
        self.ended = true;
    }

    fn push(&mut self, chunk: Map<String, Value>) {
        self.ready
            .push_back(SseEvent::default().data(Value::Object(chunk).to_string()));
    }
}
