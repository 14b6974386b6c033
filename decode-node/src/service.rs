//! The `perigee.v1.Decode` service: checks a request, accepts or refuses it, and streams what becomes of it.
//!
//! Invariant: a stream ends with `finished` or with an error status, never with neither. Dropping it cancels
//! everything below, down to the handoff.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::{Stream, stream};
use node::LoadSource;
use node::task::OnEnd;
use proto::v1::decode_server::{Decode, DecodeServer};
use proto::{convert, status, v1};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::{Response, Status};
use tracing::Instrument;
use types::{Error, ErrorCode, LoadReport, Millis, SamplingParams, Token, TraceParent};

use crate::output::Output;
use crate::request::{self, Message, Request, Watch};
use crate::shared::Shared;

/// Peers that one request may name. The router names the best few.
const SOURCES_MAX: usize = 64;
/// Bounds a name that is hashed and kept with the request.
const TENANT_BYTES_MAX: usize = 256;

/// The node, as its server and its supervisor use it. Clones are one and the same.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

/// What a request asks for, checked.
struct Checked {
    params: SamplingParams,
    output: Output,
    tokens: Vec<Token>,
}

impl Handle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The `Decode` service in the form that a server takes.
    pub fn server(&self) -> DecodeServer<Self> {
        DecodeServer::new(self.clone())
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
    }

    /// Refuses new requests from now on. Those that run go on.
    pub fn drain(&self) {
        self.shared.store.set_draining(true);
    }

    /// Takes requests again after [`Handle::drain`]. A node that ends takes none.
    pub fn resume(&self) {
        self.shared.store.set_draining(false);
    }

    /// Ends the requests that run, so that they go on elsewhere.
    pub fn move_away(&self) {
        self.shared.moving.end();
    }

    /// Refuses new requests for good.
    pub(crate) fn end(&self) {
        self.shared.ending.store(true, Ordering::Relaxed);
    }

    /// Requests that were accepted and have not ended.
    pub fn requests(&self) -> usize {
        self.shared.accepted()
    }

    /// Longest prompt and output together, in tokens: what both the model and the pool can hold.
    pub fn context_tokens_max(&self) -> usize {
        self.shared.context_tokens
    }

    fn check(&self, wire: &mut v1::DecodeRequest) -> Result<Checked, Error> {
        let shared = &self.shared;
        let root = convert::hash("kv_root", &wire.kv_root)?;
        if root != shared.store.common_root() {
            return Err(Error::new(
                ErrorCode::Conflict,
                format!(
                    "kv_root is {root}, but node {} has {}: its model, format or block size differs",
                    shared.node_id,
                    shared.store.common_root()
                ),
            ));
        }
        let config = shared.model.config();
        let params = convert::sampling(wire.sampling.take())?;
        params.validate(config.vocabulary)?;
        if wire.prompt.is_empty() {
            return Err(Error::invalid("prompt", "the prompt is empty"));
        }
        check_tokens("prompt", &wire.prompt, config.vocabulary)?;
        check_tokens("resumed", &wire.resumed, config.vocabulary)?;
        let prompt_tokens = wire.prompt.len();
        if prompt_tokens >= shared.context_tokens {
            return Err(Error::invalid(
                "prompt",
                format!(
                    "the prompt has {prompt_tokens} tokens, but prompt and output together have at most {}",
                    shared.context_tokens
                ),
            ));
        }
        at_most("sources", wire.sources.len(), SOURCES_MAX)?;
        at_most("tenant", wire.tenant.len(), TENANT_BYTES_MAX)?;
        let tokenizer = shared.model.tokenizer();
        let mut output = Output::new(
            tokenizer,
            &config.eos_tokens,
            &params,
            prompt_tokens,
            shared.context_tokens,
        );
        output.resume(&wire.resumed)?;
        let mut tokens = std::mem::take(&mut wire.prompt);
        tokens.append(&mut wire.resumed);
        Ok(Checked {
            params,
            output,
            tokens,
        })
    }

    /// Accepts the request, or says why not.
    fn accept(
        &self,
        mut wire: v1::DecodeRequest,
        trace: Option<TraceParent>,
    ) -> Result<mpsc::Receiver<Message>, Error> {
        let accepted_at = Instant::now();
        let shared = &self.shared;
        if shared.is_draining() {
            return Err(Error::unavailable(format!("node {} is draining", shared.node_id)));
        }
        let id = convert::request_id(&wire.request_id)?;
        let prompt_tokens = wire.prompt.len();
        let Checked {
            params,
            output,
            tokens,
        } = self.check(&mut wire)?;
        let (client, messages) = mpsc::channel(shared.config.messages_ahead_max + 1);
        let last = client.clone().try_reserve_owned();
        let last = last.map_err(|_| Error::internal("a new channel has no room"))?;
        if let Some(reason) = output.finish() {
            let report = v1::RequestReport {
                decode_node: shared.node_id.as_str().to_owned(),
                transport: "none".to_owned(),
                placements: 1,
                ..v1::RequestReport::default()
            };
            let finished = request::finished(reason, prompt_tokens, output.generated(), 0, report);
            last.send(Ok(request::event(v1::decode_event::Event::Finished(finished))));
            return Ok(messages);
        }
        let permit = shared.requests.clone().try_acquire_owned().map_err(|_| {
            Error::overloaded(
                format!(
                    "node {} has {} requests already",
                    shared.node_id, shared.config.requests_max
                ),
                shared.retry_after_ms(),
            )
        })?;
        let timeout = match wire.deadline_ms {
            0 => shared.config.request_timeout_max,
            asked => Duration::from_millis(asked).min(shared.config.request_timeout_max),
        };
        let request = Request {
            id,
            sequence: shared.next_sequence(),
            tokens,
            prompt_tokens,
            params: Arc::new(params),
            tenant: wire.tenant,
            gap: (wire.tbt_slo_ms > 0.0).then_some(Millis(wire.tbt_slo_ms)),
            prefill: wire.prefill,
            sources: wire.sources,
            trace,
            output,
            accepted_at,
            permit,
        };
        let watch = Watch {
            client,
            deadline: accepted_at + timeout,
            stopping: shared.moving.token(),
        };
        let span = tracing::info_span!(
            "decode",
            request_id = %id,
            trace_id = tracing::field::Empty,
            node_id = %shared.node_id,
            phase = "decode",
        );
        if let Some(parent) = trace {
            span.record("trace_id", format_args!("{:032x}", parent.trace));
        }
        let shared = Arc::clone(shared);
        let task = async move {
            request::serve(shared, request, watch, last).await;
            Ok::<(), Error>(())
        };
        node::task::spawn("decode-request", OnEnd::Log, task.instrument(span));
        Ok(messages)
    }
}

#[tonic::async_trait]
impl Decode for Handle {
    type DecodeStream = Pin<Box<dyn Stream<Item = Message> + Send>>;

    async fn decode(
        &self,
        request: tonic::Request<v1::DecodeRequest>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let trace = proto::trace::read(request.metadata());
        match self.accept(request.into_inner(), trace) {
            Ok(messages) => Ok(Response::new(Box::pin(stream(messages)))),
            Err(error) => {
                self.shared.metrics.request_ended(Some(error.code), false);
                Err(status::to_status(&error))
            }
        }
    }
}

impl LoadSource for Handle {
    fn load(&self) -> LoadReport {
        self.shared.load()
    }
}

/// The messages up to the last one. A request's task that ended without it has panicked, which the client must not
/// take for an end.
fn stream(messages: mpsc::Receiver<Message>) -> impl Stream<Item = Message> + Send {
    stream::unfold(Some(messages), async |open| {
        let mut messages = open?;
        let message = messages.recv().await.unwrap_or_else(|| {
            Err(status::to_status(&Error::internal(
                "the request ended without a result",
            )))
        });
        let is_last = match &message {
            Ok(event) => matches!(event.event, Some(v1::decode_event::Event::Finished(_))),
            Err(_) => true,
        };
        Some((message, (!is_last).then_some(messages)))
    })
}

fn check_tokens(name: &str, tokens: &[Token], vocabulary: usize) -> Result<(), Error> {
    match tokens.iter().find(|token| **token as usize >= vocabulary) {
        None => Ok(()),
        Some(token) => Err(Error::invalid(
            name,
            format!("{name} has token {token}, but the model has {vocabulary}"),
        )),
    }
}

fn at_most(name: &str, value: usize, limit: usize) -> Result<(), Error> {
    if value <= limit {
        return Ok(());
    }
    Err(Error::invalid(
        name,
        format!("{name} has {value}, but at most {limit} are allowed"),
    ))
}
