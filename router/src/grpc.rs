//! The front door over gRPC: `perigee.v1.Inference`.

use std::pin::Pin;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt, stream};
use proto::convert;
use proto::status::to_status;
use proto::v1;
use proto::v1::generate_request::Input as WireInput;
use proto::v1::generate_response::Event as WireEvent;
use proto::v1::inference_server::{Inference, InferenceServer};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use types::{Error, Millis, Slo};

use crate::access::Caller;
use crate::dispatch::{Dispatcher, Event, Running};
use crate::error::RequestError;
use crate::guard;
use crate::request::{self, Input, MESSAGES_MAX, MaxTokens};

/// Most tokens of an answer whose request names no limit. Documented in `common.proto`.
const MAX_TOKENS_DEFAULT: u32 = 256;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    dispatcher: Dispatcher,
}

impl Service {
    pub(crate) fn server(dispatcher: Dispatcher) -> InferenceServer<Self> {
        InferenceServer::new(Self { dispatcher })
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }
}

type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = GenerateStream;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<GenerateStream>, Status> {
        let received = Instant::now();
        let time_limit = time_limit(request.metadata());
        let caller = guard::caller(request.extensions().get());
        let trace = proto::trace::read(request.metadata());
        let request = read(
            &self.dispatcher,
            request.into_inner(),
            &caller,
            received,
            time_limit,
        );
        let request = request.map(|read| request::Request { trace, ..read });
        let request = request.inspect_err(|error| self.dispatcher.refused(error.code));
        let running = self
            .dispatcher
            .begin(request.map_err(|error| to_status(&error))?)
            .await;
        let running = running?;
        let accepted = v1::Accepted {
            request_id: running.request().id.to_string(),
            model: self.dispatcher.model().name().to_owned(),
            prompt_tokens: running.request().prompt.len() as u64,
        };
        let accepted = stream::iter([Ok(response(WireEvent::Accepted(accepted)))]);
        Ok(Response::new(Box::pin(
            accepted.chain(stream::unfold(running, next)),
        )))
    }

    async fn list_models(
        &self,
        _: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let model = self.dispatcher.model();
        let nodes = self.dispatcher.cluster().lock().context_tokens_max();
        let context = nodes.map_or(model.context_tokens_max(), |nodes| {
            nodes.min(model.context_tokens_max())
        });
        let model = v1::ModelInfo {
            name: model.name().to_owned(),
            context_tokens_max: context,
            model_digest: model.digest().to_owned(),
        };
        Ok(Response::new(v1::ListModelsResponse { models: vec![model] }))
    }

    async fn cluster_status(
        &self,
        _: Request<v1::ClusterStatusRequest>,
    ) -> Result<Response<v1::ClusterStatusResponse>, Status> {
        let members = self.dispatcher.cluster().lock().status();
        let nodes = members.into_iter().map(|member| v1::NodeStatus {
            record_json: convert::record_to_json(&member.record),
            load_json: member.load.map_or_else(String::new, |load| {
                serde_json::to_string(&load).expect("a report has string keys only")
            }),
            connected: member.connected,
            indexed_blocks: member.indexed_blocks,
        });
        let (running, waiting) = self.dispatcher.counts();
        Ok(Response::new(v1::ClusterStatusResponse {
            nodes: nodes.collect(),
            requests_running: running as u64,
            requests_waiting: waiting as u64,
        }))
    }
}

async fn next(mut running: Running) -> Option<(Result<v1::GenerateResponse, Status>, Running)> {
    let event = running.next().await?;
    let item = match event {
        Ok(Event::Tokens(v1::DecodeTokens {
            ids, text, logprobs, ..
        })) => Ok(response(WireEvent::Tokens(v1::TokenChunk {
            ids,
            text,
            logprobs,
        }))),
        Ok(Event::Finished {
            reason,
            usage,
            report,
        }) => Ok(response(WireEvent::Finished(v1::Finished {
            reason,
            usage: Some(usage),
            report: Some(report),
        }))),
        Err(error) => Err(error.into()),
    };
    Some((item, running))
}

fn response(event: WireEvent) -> v1::GenerateResponse {
    v1::GenerateResponse { event: Some(event) }
}

/// Reads the wire form. What only the model can tell is checked later, by [`request::prepare`].
fn read(
    dispatcher: &Dispatcher,
    wire: v1::GenerateRequest,
    caller: &Caller,
    received: Instant,
    time_limit: Option<Duration>,
) -> Result<request::Request, Error> {
    let v1::GenerateRequest {
        request_id,
        model,
        input,
        sampling,
        ttft_slo_ms,
        tbt_slo_ms,
        tenant,
        priority,
    } = wire;
    let id = match request_id.as_str() {
        "" => dispatcher.request_id(),
        text => convert::request_id(text)?,
    };
    let input = match input {
        None => return Err(no_input()),
        Some(WireInput::Prompt(text)) => Input::Text(text),
        Some(WireInput::Tokens(tokens)) => Input::Tokens(tokens.ids),
        Some(WireInput::Chat(chat)) => Input::Chat(messages(chat.messages)?),
    };
    let given = sampling.unwrap_or_default();
    let max_tokens = given
        .max_tokens
        .map_or(MaxTokens::AtMost(MAX_TOKENS_DEFAULT), MaxTokens::Given);
    let seed = given.seed.unwrap_or_else(|| dispatcher.seed());
    let mut sampling = convert::sampling(Some(given))?;
    sampling.seed = seed;
    Ok(request::Request {
        id,
        model,
        input,
        sampling,
        max_tokens,
        slo: slo(ttft_slo_ms, tbt_slo_ms),
        tenant: caller.tenant(tenant)?,
        priority: convert::priority(&priority)?,
        received,
        trace: None,
        time_limit,
    })
}

/// A request or question without a prompt.
pub(crate) fn no_input() -> Error {
    Error::invalid("input", "one of prompt, tokens and chat is needed")
}

/// Limits in milliseconds, of which 0 is none.
pub(crate) fn slo(ttft_ms: f64, tbt_ms: f64) -> Slo {
    let limit = |ms: f64| (ms != 0.0).then_some(Millis(ms));
    Slo {
        ttft: limit(ttft_ms),
        tbt: limit(tbt_ms),
    }
}

pub(crate) fn messages(wire: Vec<v1::ChatMessage>) -> Result<Vec<serde_json::Value>, Error> {
    if wire.is_empty() || wire.len() > MESSAGES_MAX {
        let message = format!(
            "messages has {}, but must have between 1 and {MESSAGES_MAX}",
            wire.len()
        );
        return Err(Error::invalid("messages", message));
    }
    let messages = wire.into_iter().map(|message| {
        let v1::ChatMessage { role, content } = message;
        if role.is_empty() {
            return Err(Error::invalid("messages", "a message has no role"));
        }
        Ok(serde_json::json!({ "role": role, "content": content }))
    });
    messages.collect()
}

/// The client's deadline, as gRPC over HTTP/2 writes it: at most 8 digits and a unit. An unreadable one is none.
fn time_limit(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count = digits.parse::<u32>().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(u64::from(count) * 3600)),
        "M" => Some(Duration::from_secs(u64::from(count) * 60)),
        "S" => Some(Duration::from_secs(u64::from(count))),
        "m" => Some(Duration::from_millis(u64::from(count))),
        "u" => Some(Duration::from_micros(u64::from(count))),
        "n" => Some(Duration::from_nanos(u64::from(count))),
        _ => None,
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        to_status(&error.to_error())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("5S", Some(Duration::from_secs(5)))]
    #[case("250m", Some(Duration::from_millis(250)))]
    #[case("99999999n", Some(Duration::from_nanos(99_999_999)))]
    #[case("123456789S", None)]
    #[case("S", None)]
    #[case("", None)]
    #[case("-1S", None)]
    #[case("5x", None)]
    fn a_client_deadline_is_read(#[case] text: &'static str, #[case] expected: Option<Duration>) {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", text.parse().expect("ascii"));
        assert_eq!(time_limit(&metadata), expected);
    }
}
