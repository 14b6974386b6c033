//! The front door over HTTP, as OpenAI's API has it.
//!
//! `POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models`, `GET /v1/models/{id}`. Answers and streams are those of
//! OpenAI, with one more object, `perigee`, that tells where the request was served and how long each part took.
//!
//! Invariant: a parameter is obeyed or refused by name, never ignored. Where OpenAI's defaults differ from gRPC's, OpenAI's
//! hold here: the temperature is 1 unless given, an answer in a chat is as long as the context allows, and a plain completion has 16
//! tokens.
//!
//! A stream's headers go out with its first token, so that whatever goes wrong before it has its own status code.

mod body;
mod chat;
mod completions;
mod error;
mod parameters;
mod stream;

use std::time::{Instant, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Map, Value, json};
use types::{ErrorCode, RequestId, TraceParent};

use crate::dispatch::{Dispatcher, Event, Running};
use crate::error::RequestError;
use crate::guard;
use crate::model::Model;
use crate::request;

use error::ApiError;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
const TENANT: HeaderName = HeaderName::from_static("x-perigee-tenant");

/// Characters of a UUID, and which of them are hyphens.
const UUID_CHARS: usize = 36;
const UUID_HYPHENS: [usize; 4] = [8, 13, 18, 23];

/// The routes.
pub(crate) fn routes(dispatcher: Dispatcher) -> Router {
    Router::new()
        .route(
            "/v1/chat/completions",
            post(chat_completions).fallback(wrong_method),
        )
        .route("/v1/completions", post(text_completions).fallback(wrong_method))
        .route("/v1/models", get(list_models).fallback(wrong_method))
        .route("/v1/models/{*id}", get(one_model).fallback(wrong_method))
        .fallback(unknown_route)
        .with_state(dispatcher)
}

/// Which of the two APIs shapes an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Api {
    Chat,
    Completions,
}

/// A request with what only concerns the shape of its answer.
#[derive(Debug)]
struct Call {
    request: request::Request,
    shape: Shape,
    stream: bool,
}

/// What all parts of one answer share.
#[derive(Debug, Clone)]
struct Shape {
    api: Api,
    id: RequestId,
    model: String,
    fingerprint: String,
    created_unix_s: u64,
    /// Whether a stream ends with its usage.
    include_usage: bool,
}

async fn chat_completions(State(dispatcher): State<Dispatcher>, request: Request<Body>) -> Response {
    answer(dispatcher, request, Api::Chat).await
}

async fn text_completions(State(dispatcher): State<Dispatcher>, request: Request<Body>) -> Response {
    answer(dispatcher, request, Api::Completions).await
}

async fn answer(dispatcher: Dispatcher, request: Request<Body>, api: Api) -> Response {
    let received = Instant::now();
    let id = request_id(request.headers()).unwrap_or_else(|| dispatcher.request_id());
    let call = read(&dispatcher, request, api, id, received).await;
    let call = call.inspect_err(|error| dispatcher.refused(error.code()));
    let response = match call {
        Ok(call) => serve(&dispatcher, call).await,
        Err(error) => Err(error),
    };
    let mut response = response.unwrap_or_else(IntoResponse::into_response);
    let value = HeaderValue::from_str(&id.to_string()).expect("hexadecimal digits are a header value");
    response.headers_mut().insert(REQUEST_ID, value);
    response
}

async fn read(
    dispatcher: &Dispatcher,
    request: Request<Body>,
    api: Api,
    id: RequestId,
    received: Instant,
) -> Result<Call, ApiError> {
    let caller = guard::caller(request.extensions().get());
    let tenant = match request.headers().get(TENANT) {
        None => String::new(),
        Some(value) => value
            .to_str()
            .map_err(|_| ApiError::invalid("x-perigee-tenant", "x-perigee-tenant is not ASCII text"))?
            .to_owned(),
    };
    let tenant = caller.tenant(tenant)?;
    let trace = request.headers().get(TraceParent::HEADER);
    let trace = trace.and_then(|value| TraceParent::parse(value.to_str().ok()?));
    let limit = dispatcher.config().body_bytes_max.get();
    let object = body::read(request.into_body(), limit).await?;
    let model = dispatcher.model();
    let context = body::Context {
        id,
        received,
        tenant,
        trace,
        seed: dispatcher.seed(),
    };
    let (request, output) = match api {
        Api::Chat => chat::read(object, context)?,
        Api::Completions => completions::read(object, context)?,
    };
    Ok(Call {
        request,
        shape: Shape {
            api,
            id,
            model: model.name().to_owned(),
            fingerprint: fingerprint(model),
            created_unix_s: node::clock::unix_s(SystemTime::now()),
            include_usage: output.include_usage,
        },
        stream: output.stream,
    })
}

async fn serve(dispatcher: &Dispatcher, call: Call) -> Result<Response, ApiError> {
    let Call {
        request,
        shape,
        stream,
    } = call;
    let mut running = dispatcher.begin(request).await?;
    let first = next(&mut running).await?;
    let answer = match shape.api {
        Api::Chat => Answer::Chat(chat::Answer::default()),
        Api::Completions => Answer::Completions(completions::Answer::default()),
    };
    let answer = Assembly {
        shape,
        answer,
        model: dispatcher.model().clone(),
    };
    if stream {
        let timing = running.server_timing();
        return Ok(timed(stream::respond(answer, first, running), &timing));
    }
    collect(answer, first, running).await
}

/// Tells the client where its time went, as browsers and proxies know to show it.
fn timed(mut response: Response, timing: &str) -> Response {
    let value = HeaderValue::from_str(timing).expect("tokens and numbers are a header value");
    response.headers_mut().insert(SERVER_TIMING, value);
    response
}

/// The answer in one piece.
async fn collect(mut assembly: Assembly, first: Event, mut running: Running) -> Result<Response, ApiError> {
    let mut event = first;
    loop {
        match event {
            Event::Tokens(tokens) => assembly.add(&tokens),
            Event::Finished {
                reason,
                usage,
                report,
            } => {
                let mut object = assembly.whole(&reason);
                object.insert("usage".into(), body::usage(&usage));
                object.insert("perigee".into(), body::report(&report));
                let timing = running.server_timing();
                return Ok(timed(axum::Json(object).into_response(), &timing));
            }
        }
        event = next(&mut running).await?;
    }
}

async fn next(running: &mut Running) -> Result<Event, ApiError> {
    match running.next().await {
        Some(event) => Ok(event?),
        None => {
            let message = "the stream ended without an end";
            Err(RequestError::Internal(types::Error::internal(message)).into())
        }
    }
}

/// An answer in the making.
struct Assembly {
    shape: Shape,
    answer: Answer,
    model: std::sync::Arc<Model>,
}

enum Answer {
    Chat(chat::Answer),
    Completions(completions::Answer),
}

impl Assembly {
    /// Takes in tokens for [`Assembly::whole`].
    fn add(&mut self, tokens: &proto::v1::DecodeTokens) {
        match &mut self.answer {
            Answer::Chat(answer) => answer.add(tokens, &self.model),
            Answer::Completions(answer) => answer.add(tokens, &self.model),
        }
    }

    /// The whole answer, but for its usage.
    fn whole(&mut self, reason: &str) -> Map<String, Value> {
        let (object, choice) = match &mut self.answer {
            Answer::Chat(answer) => ("chat.completion", answer.choice(reason)),
            Answer::Completions(answer) => ("text_completion", answer.choice(reason)),
        };
        self.shape.object(object, json!([choice]))
    }

    /// What a stream begins with, if anything.
    fn opening(&self) -> Option<Map<String, Value>> {
        match &self.answer {
            Answer::Chat(_) => Some(self.chunk(chat::opening())),
            Answer::Completions(_) => None,
        }
    }

    /// The part of a stream that carries `tokens`.
    fn part(&mut self, tokens: &proto::v1::DecodeTokens) -> Map<String, Value> {
        let choice = match &mut self.answer {
            Answer::Chat(_) => chat::part(tokens, &self.model),
            Answer::Completions(answer) => answer.part(tokens, &self.model),
        };
        self.chunk(choice)
    }

    /// The part that says why the answer ended.
    fn closing(&self, reason: &str) -> Map<String, Value> {
        self.chunk(match &self.answer {
            Answer::Chat(_) => chat::closing(reason),
            Answer::Completions(_) => completions::closing(reason),
        })
    }

    /// The part that carries the usage, after the closing one.
    fn accounting(&self, usage: &proto::v1::Usage, report: &proto::v1::RequestReport) -> Map<String, Value> {
        let mut object = self.shape.object(self.chunk_name(), json!([]));
        object.insert("usage".into(), body::usage(usage));
        object.insert("perigee".into(), body::report(report));
        object
    }

    fn chunk(&self, choice: Value) -> Map<String, Value> {
        let mut object = self.shape.object(self.chunk_name(), json!([choice]));
        if self.shape.include_usage {
            object.insert("usage".into(), Value::Null);
        }
        object
    }

    fn chunk_name(&self) -> &'static str {
        match self.shape.api {
            Api::Chat => "chat.completion.chunk",
            Api::Completions => "text_completion",
        }
    }
}

impl Shape {
    fn object(&self, object: &str, choices: Value) -> Map<String, Value> {
        let prefix = match self.api {
            Api::Chat => "chatcmpl",
            Api::Completions => "cmpl",
        };
        let mut map = Map::new();
        map.insert("id".into(), format!("{prefix}-{}", self.id).into());
        map.insert("object".into(), object.into());
        map.insert("created".into(), self.created_unix_s.into());
        map.insert("model".into(), self.model.as_str().into());
        map.insert("system_fingerprint".into(), self.fingerprint.as_str().into());
        map.insert("choices".into(), choices);
        map
    }
}

async fn list_models(State(dispatcher): State<Dispatcher>) -> Response {
    let models = json!({ "object": "list", "data": [model_object(dispatcher.model())] });
    axum::Json(models).into_response()
}

async fn one_model(State(dispatcher): State<Dispatcher>, Path(id): Path<String>) -> Response {
    let model = dispatcher.model();
    if id == model.name() {
        return axum::Json(model_object(model)).into_response();
    }
    let served = model.name().to_owned();
    ApiError::from(RequestError::UnknownModel { model: id, served }).into_response()
}

fn model_object(model: &Model) -> Value {
    json!({
        "id": model.name(),
        "object": "model",
        // When the weights were made is not known.
        "created": 0,
        "owned_by": "perigee",
        "context_tokens_max": model.context_tokens_max(),
    })
}

/// The answer to who may not call.
pub(crate) fn refused(error: types::Error) -> impl IntoResponse {
    ApiError::from(error)
}

async fn unknown_route(request: Request<Body>) -> Response {
    let message = format!("there is no {}", request.uri().path());
    ApiError::new(types::Error::new(ErrorCode::NotFound, message)).into_response()
}

async fn wrong_method(request: Request<Body>) -> Response {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    let mut response = ApiError::new(types::Error::new(ErrorCode::Invalid, message)).into_response();
    *response.status_mut() = axum::http::StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// The client's own id, if it is 32 hexadecimal digits, as ours are, or a UUID.
fn request_id(headers: &HeaderMap) -> Option<RequestId> {
    let text = headers.get(REQUEST_ID)?.to_str().ok()?;
    if text.len() == UUID_CHARS {
        let is_hyphen = |(at, byte): (usize, u8)| (byte == b'-') == UUID_HYPHENS.contains(&at);
        let is_uuid = text.bytes().enumerate().all(is_hyphen);
        return is_uuid
            .then(|| text.replace('-', ""))
            .as_deref()
            .and_then(RequestId::parse);
    }
    RequestId::parse(text)
}

fn fingerprint(model: &Model) -> String {
    let digest = model.digest();
    format!("fp_{}", digest.get(..10).unwrap_or(digest))
}
