//! A decode node, which owns a request from here to its last token.

use std::time::Duration;

use node::Channel;
use proto::v1;
use proto::v1::decode_client::DecodeClient;
use proto::v1::decode_event::Event;
use tokio::time::Instant;
use tonic::Streaming;
use types::{Error, FinishReason};

use crate::call;

const METHOD: &str = "Decode/Decode";

/// Client of `perigee.v1.Decode`. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Decode {
    client: DecodeClient<Channel>,
}

/// What happens to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum DecodeEvent {
    /// Tokens, with the text they complete.
    Tokens(v1::DecodeTokens),
    /// The last event.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// Tokens of prompt and output.
        usage: v1::Usage,
        /// Where and how it was served.
        report: v1::RequestReport,
    },
}

impl Decode {
    /// Calls over `channel`.
    pub fn new(channel: Channel) -> Self {
        let client = DecodeClient::new(channel);
        Self {
            client: client
                .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(proto::MESSAGE_BYTES_MAX),
        }
    }

    /// Hands the request to the node. `request.deadline_ms` bounds the whole of it, to the last event, on both sides.
    /// Dropping the stream cancels everything below it.
    ///
    /// # Errors
    ///
    /// The node cannot be reached or does not take the request; it did nothing then unless the error says otherwise.
    pub async fn decode(&self, request: v1::DecodeRequest) -> Result<DecodeStream, Error> {
        let mut client = self.client.clone();
        let deadline = Duration::from_millis(request.deadline_ms);
        let until = Instant::now().checked_add(deadline);
        let request = call::request(request, deadline);
        let stream = call::unary(METHOD, deadline, client.decode(request)).await?;
        Ok(DecodeStream {
            stream: Some(stream),
            until,
        })
    }
}

/// The events of one request.
#[derive(Debug)]
pub struct DecodeStream {
    /// `None` after the last event.
    stream: Option<Streaming<v1::DecodeEvent>>,
    until: Option<Instant>,
}

impl DecodeStream {
    /// The next event; `None` only after [`DecodeEvent::Finished`]. Cancel safe.
    ///
    /// # Errors
    ///
    /// What the node ended the request with, a broken connection (`unavailable`), or the deadline. Nothing follows.
    pub async fn next(&mut self) -> Result<Option<DecodeEvent>, Error> {
        let Some(stream) = &mut self.stream else {
            return Ok(None);
        };
        let event = match call::next(METHOD, stream, self.until).await {
            Ok(Some(event)) => read(event),
            Ok(None) => Err(call::cut_off(METHOD)),
            Err(error) => Err(error),
        };
        if !matches!(event, Ok(DecodeEvent::Tokens(_))) {
            self.stream = None;
        }
        event.map(Some)
    }
}

fn read(event: v1::DecodeEvent) -> Result<DecodeEvent, Error> {
    match event.event.ok_or_else(|| call::empty(METHOD))? {
        Event::Tokens(tokens) => Ok(DecodeEvent::Tokens(tokens)),
        Event::Finished(finished) => Ok(DecodeEvent::Finished {
            reason: finish_reason(METHOD, &finished.reason)?,
            usage: finished.usage.unwrap_or_default(),
            report: finished.report.unwrap_or_default(),
        }),
    }
}

/// Reads what [`FinishReason::as_str`] gives.
pub(crate) fn finish_reason(method: &str, name: &str) -> Result<FinishReason, Error> {
    [FinishReason::Stop, FinishReason::Length]
        .into_iter()
        .find(|reason| reason.as_str() == name)
        .ok_or_else(|| Error::internal(format!("{method}: unknown finish reason {name:?}")))
}
