//! Requests over OpenAI's HTTP API, which any server that speaks it can be measured by.

use std::future::poll_fn;
use std::pin::Pin;
use std::time::{Duration, Instant};

use hyper::body::{Body, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{self};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use node::ApiKey;
use serde_json::{Value, json};
use types::{Error, ErrorCode};

use super::flags::Api;
use super::plan::Planned;
use super::sse;
use super::target::{Answer, Shape, Stopwatch};

/// Who does not answer a connection within it is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The list of models is small, and at hand.
const MODELS_TIMEOUT: Duration = Duration::from_secs(10);
/// Bodies that are no streams: lists of models and errors.
const BODY_BYTES_MAX: usize = 1 << 20;

/// A client of one API. Connections are kept for the next request.
#[derive(Debug)]
pub(super) struct Client {
    client: legacy::Client<HttpsConnector<HttpConnector>, String>,
    base: String,
    authorization: Option<String>,
}

impl Client {
    /// A client of the API at `url`, which trusts the authorities of this machine (`SSL_CERT_FILE` names others).
    ///
    /// # Errors
    ///
    /// The URL cannot be used, or the machine's authorities cannot be read.
    pub(super) fn new(url: &str, key: Option<&ApiKey>) -> Result<Self, Error> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let scheme = base
            .parse::<Uri>()
            .ok()
            .and_then(|uri| uri.scheme_str().map(str::to_owned));
        if !matches!(scheme.as_deref(), Some("http" | "https")) {
            return Err(Error::invalid(
                "url",
                format!("{url:?} is not of the form http://HOST:PORT"),
            ));
        }
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let https = HttpsConnectorBuilder::new()
            .with_native_roots()
            .map_err(|error| Error::internal(format!("the machine's authorities cannot be read: {error}")))?
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let mut client = legacy::Client::builder(TokioExecutor::new());
        client.pool_timer(TokioTimer::new());
        Ok(Self {
            client: client.build(https),
            base,
            authorization: key.map(|key| format!("Bearer {}", key.secret())),
        })
    }

    /// The first model that is served.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, or serves none.
    pub(super) async fn model(&self) -> Result<String, Error> {
        let asked = async {
            let response = self.call(Method::GET, "/v1/models", String::new()).await?;
            whole(response).await
        };
        let late = |_| Error::unavailable(format!("{} does not list its models", self.base));
        let body = tokio::time::timeout(MODELS_TIMEOUT, asked)
            .await
            .map_err(late)??;
        let models: Value = serde_json::from_slice(&body).unwrap_or_default();
        let model = models["data"][0]["id"].as_str();
        let none = || Error::new(ErrorCode::NotFound, format!("{} serves no model", self.base));
        Ok(model.ok_or_else(none)?.to_owned())
    }

    pub(super) async fn send(&self, shape: &Shape, request: &Planned) -> Result<Answer, Error> {
        let (path, body) = to_json(shape, request);
        let mut watch = Stopwatch::new(Instant::now());
        let mut body = self.call(Method::POST, path, body.to_string()).await?.into_body();
        let (mut reader, mut usage) = (sse::Reader::default(), Value::Null);
        while let Some(bytes) = next(&mut body).await? {
            let now = Instant::now();
            for event in reader.push(&bytes)? {
                match read(&event)? {
                    Piece::Content => watch.content(now),
                    Piece::Usage(value) => usage = value,
                    Piece::Other => {}
                    Piece::Done => {
                        let count = |name: &str| usage[name].as_u64();
                        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
                        return watch.answer(
                            count("prompt_tokens").unwrap_or(0),
                            cached.unwrap_or(0),
                            count("completion_tokens"),
                        );
                    }
                }
            }
        }
        Err(Error::unavailable("the stream ended before its last event"))
    }

    /// The answer's head, if it is a success.
    async fn call(&self, method: Method, path: &str, body: String) -> Result<Response<Incoming>, Error> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let request = request
            .body(body)
            .map_err(|error| Error::invalid("url", format!("{}{path}: {error}", self.base)))?;
        let response = self.client.request(request).await.map_err(|error| {
            let cause =
                std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
            Error::unavailable(format!("{}: {error}{cause}", self.base))
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = whole(response).await.unwrap_or_default();
        Err(refusal(status.as_u16(), &String::from_utf8_lossy(&body)))
    }
}

/// What an event is to a measurement.
#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Content,
    Usage(Value),
    Other,
    Done,
}

fn read(event: &sse::Event) -> Result<Piece, Error> {
    if event.data == "[DONE]" {
        return Ok(Piece::Done);
    }
    let value: Value = serde_json::from_str(&event.data)
        .map_err(|error| Error::internal(format!("an event is no JSON: {error}")))?;
    if event.name == "error" || value["error"].is_object() {
        return Err(refusal(500, &event.data));
    }
    let choice = &value["choices"][0];
    let text = choice["delta"]["content"].as_str().or(choice["text"].as_str());
    Ok(match (text, &value["usage"]) {
        (Some(text), _) if !text.is_empty() => Piece::Content,
        (_, usage) if usage.is_object() => Piece::Usage(usage.clone()),
        _ => Piece::Other,
    })
}

/// The error that a status and its body tell.
fn refusal(status: u16, body: &str) -> Error {
    let value: Value = serde_json::from_str(body).unwrap_or_default();
    let error = &value["error"];
    let message = error["message"].as_str().unwrap_or_else(|| body.trim());
    let named = error["code"].as_str().and_then(ErrorCode::parse);
    // Conflict and fenced have one status: the first one is what clients see.
    let of_status = || ErrorCode::ALL.into_iter().find(|code| code.http() == status);
    let code = named.or_else(of_status).unwrap_or(match status {
        400..=499 => ErrorCode::Invalid,
        _ => ErrorCode::Internal,
    });
    Error::new(code, format!("status {status}: {message}"))
}

fn to_json(shape: &Shape, request: &Planned) -> (&'static str, Value) {
    let mut body = json!({
        "model": shape.model,
        "max_tokens": request.output_tokens,
        "ignore_eos": true,
        "temperature": 0,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    match shape.api {
        Api::Chat => {
            body["messages"] = json!([{ "role": "user", "content": request.prompt }]);
            ("/v1/chat/completions", body)
        }
        Api::Completions => {
            body["prompt"] = json!(request.prompt);
            ("/v1/completions", body)
        }
    }
}

/// The next bytes of a body.
async fn next(body: &mut Incoming) -> Result<Option<bytes::Bytes>, Error> {
    loop {
        let frame = poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await;
        match frame {
            None => return Ok(None),
            Some(Err(error)) => return Err(Error::unavailable(format!("the connection broke: {error}"))),
            Some(Ok(frame)) => {
                // Trailers tell nothing.
                if let Ok(bytes) = frame.into_data() {
                    return Ok(Some(bytes));
                }
            }
        }
    }
}

async fn whole(response: Response<Incoming>) -> Result<Vec<u8>, Error> {
    let (mut body, mut bytes) = (response.into_body(), Vec::new());
    while let Some(more) = next(&mut body).await? {
        bytes.extend_from_slice(&more);
        if bytes.len() > BODY_BYTES_MAX {
            return Err(Error::internal(format!(
                "an answer of more than {BODY_BYTES_MAX} bytes"
            )));
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: &str) -> sse::Event {
        sse::Event {
            name: name.to_owned(),
            data: data.to_owned(),
        }
    }

    #[test]
    fn pieces_with_text_alone_are_content() {
        let usage = json!({ "prompt_tokens": 3, "completion_tokens": 2 });
        for (data, piece) in [
            (
                r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#.to_owned(),
                Piece::Other,
            ),
            (
                r#"{"choices":[{"delta":{"content":"a"}}]}"#.to_owned(),
                Piece::Content,
            ),
            (
                r#"{"choices":[{"text":"a"}],"usage":null}"#.to_owned(),
                Piece::Content,
            ),
            (
                r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#.to_owned(),
                Piece::Other,
            ),
            (
                format!(r#"{{"choices":[],"usage":{usage}}}"#),
                Piece::Usage(usage),
            ),
            ("[DONE]".to_owned(), Piece::Done),
        ] {
            assert_eq!(read(&event("", &data)).expect("a piece"), piece, "{data}");
        }
    }

    #[test]
    fn refusals_keep_their_code() {
        for (status, body, code) in [
            (
                429,
                r#"{"error":{"message":"busy","code":"overloaded"}}"#,
                ErrorCode::Overloaded,
            ),
            (429, "slow down", ErrorCode::Overloaded),
            (503, "", ErrorCode::Unavailable),
            (422, "{}", ErrorCode::Invalid),
            (502, "<html>", ErrorCode::Internal),
        ] {
            let error = refusal(status, body);
            assert_eq!(error.code, code, "{status} {body}");
            assert!(error.message.contains(&status.to_string()), "{error}");
        }
        let data = r#"{"error":{"message":"gone","code":"unavailable"}}"#;
        let error = read(&event("error", data)).expect_err("an error");
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert!(read(&event("", "{")).is_err());
    }

    #[test]
    fn urls_are_checked() {
        assert!(
            Client::new("http://127.0.0.1:8080/v1/", None)
                .is_ok_and(|client| client.base == "http://127.0.0.1:8080")
        );
        for url in ["127.0.0.1:8080", "", "ftp://host", "http:// x"] {
            assert!(Client::new(url, None).is_err(), "{url}");
        }
    }
}
