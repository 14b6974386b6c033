//! HTTP for S3, over the client and the TLS that gRPC and the rest of the process use already.
//!
//! Timeouts, retries and signatures are the caller's: this sends one request and gives one answer.

use std::error::Error as StdError;
use std::time::Duration;

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector as TcpConnector;
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
    HttpResponseBody, HttpService,
};

/// A connection that is not there within it would be of no use to a request.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Servers close idle connections after some seconds; one that is found closed costs a retry.
const IDLE_MAX: Duration = Duration::from_secs(15);

/// Makes clients that trust the authorities of this machine (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others).
#[derive(Debug)]
pub(super) struct Connector;

#[derive(Debug)]
struct Service(Client<HttpsConnector<TcpConnector>, HttpRequestBody>);

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        let mut tcp = TcpConnector::new();
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let https = HttpsConnectorBuilder::new()
            .with_native_roots()
            .map_err(|error| object_store::Error::Generic {
                store: "HTTP",
                source: Box::new(error),
            })?
            // Whether plain HTTP is allowed, the store decides (`AWS_ALLOW_HTTP`).
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let mut client = Client::builder(TokioExecutor::new());
        client.pool_timer(TokioTimer::new()).pool_idle_timeout(IDLE_MAX);
        Ok(HttpClient::new(Service(client.build(https))))
    }
}

#[tonic::async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let response = self.0.request(request).await.map_err(failure)?;
        let (parts, body) = response.into_parts();
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(Body(body))))
    }
}

fn failure(error: ClientError) -> HttpError {
    let cause = error
        .source()
        .and_then(|cause| cause.downcast_ref::<hyper::Error>());
    let kind = if error.is_connect() {
        HttpErrorKind::Connect
    } else if cause.is_some_and(|cause| cause.is_incomplete_message() || cause.is_canceled()) {
        // A connection that the server had closed while it was idle.
        HttpErrorKind::Interrupted
    } else {
        HttpErrorKind::Request
    };
    HttpError::new(kind, error)
}

/// The answer's bytes, with errors of the kind that the store knows.
struct Body(hyper::body::Incoming);

impl hyper::body::Body for Body {
    type Data = bytes::Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        let frame = std::pin::Pin::new(&mut self.0).poll_frame(context);
        frame.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.0.size_hint()
    }
}
