use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus as Wire;
use tonic_health::pb::health_client::HealthClient;

use super::*;
use crate::channel;

/// Longer than anything here takes; a test that waits for it has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// A drain that must end before this does so by itself.
const DRAIN_DEADLINE: Duration = Duration::from_secs(600);

struct Running {
    grpc: String,
    http: String,
    readiness: Readiness,
    shutdown: CancellationToken,
    server: JoinHandle<Result<(), ServeError>>,
}

async fn start(drain_deadline: Duration, routes: axum::Router) -> Running {
    let config = Config {
        drain_deadline: drain_deadline.into(),
        ..Config::default()
    };
    let listeners = Listeners::bind(&config).await.expect("free ports");
    assert_ne!(listeners.grpc_address().port(), 0);
    let readiness = Readiness::new(["registry", "model"]);
    let shutdown = CancellationToken::new();
    let metrics = Metrics::new();
    metrics.histogram("perigee_test_seconds", "A test", &[1.0]);
    Running {
        grpc: listeners.grpc_address().to_string(),
        http: listeners.http_address().to_string(),
        readiness: readiness.clone(),
        shutdown: shutdown.clone(),
        server: tokio::spawn(
            Server::new(&config, readiness, metrics)
                .http(routes)
                .run(listeners, shutdown),
        ),
    }
}

impl Running {
    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.http).await.expect("listening");
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut response = String::new();
        stream.read_to_string(&mut response).await.expect("answered");
        response
    }

    async fn end(self) -> Result<(), ServeError> {
        let ended = tokio::time::timeout(DEADLINE, self.server).await;
        ended.expect("ends in time").expect("does not panic")
    }
}

#[tokio::test]
async fn readiness_is_told_alike_by_http_and_grpc() {
    let running = start(DRAIN_DEADLINE, axum::Router::new()).await;
    let mut health = HealthClient::new(channel(&running.grpc).expect("is an address"));
    let watched = health
        .watch(HealthCheckRequest::default())
        .await
        .expect("answers");
    let mut watched = watched.into_inner();
    let mut next = async || watched.message().await.expect("alive").expect("goes on").status();

    assert_eq!(next().await, Wire::NotServing);
    running.readiness.meet("model");
    running.readiness.miss("registry", "no answer from etcd");
    let response = running.get("/readyz").await;
    assert!(response.starts_with("HTTP/1.1 503"), "{response}");
    assert!(
        response.contains(r#""registry":"no answer from etcd""#),
        "{response}"
    );
    assert!(!response.contains("model"), "{response}");
    assert!(running.get("/livez").await.starts_with("HTTP/1.1 200"));

    running.readiness.meet("registry");
    assert_eq!(next().await, Wire::Serving);
    let response = running.get("/readyz").await;
    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    assert!(response.contains(r#""ready":true"#), "{response}");
}

#[tokio::test]
async fn metrics_are_served() {
    let running = start(DRAIN_DEADLINE, axum::Router::new()).await;
    let response = running.get("/metrics").await;
    assert!(
        response.contains("content-type: application/openmetrics-text"),
        "{response}"
    );
    assert!(response.contains("perigee_test_seconds_bucket"), "{response}");
}

#[tokio::test]
async fn a_health_watch_does_not_hold_up_the_end() {
    let running = start(DRAIN_DEADLINE, axum::Router::new()).await;
    let mut health = HealthClient::new(channel(&running.grpc).expect("is an address"));
    let mut watched = health
        .watch(HealthCheckRequest::default())
        .await
        .expect("answers")
        .into_inner();
    assert_eq!(
        watched.message().await.expect("alive").expect("goes on").status(),
        Wire::NotServing
    );
    running.shutdown.cancel();
    let watched = async { while watched.message().await.is_ok_and(|message| message.is_some()) {} };
    tokio::time::timeout(DEADLINE, watched)
        .await
        .expect("the watch ends");
    running.end().await.expect("ends in order");
}

/// A route that says when it was entered and answers when it is let go.
fn held_route() -> (axum::Router, oneshot::Receiver<()>, oneshot::Sender<()>) {
    let (entered_tx, entered_rx) = oneshot::channel::<()>();
    let (go_tx, go_rx) = oneshot::channel::<()>();
    let once = std::sync::Mutex::new(Some((entered_tx, go_rx)));
    let once = std::sync::Arc::new(once);
    let handler = move || async move {
        let parts = once.lock().expect("not poisoned").take();
        let (entered, go) = parts.expect("called once");
        entered.send(()).expect("the test waits");
        let _ = go.await;
        "done\n"
    };
    (
        axum::Router::new().route("/held", get(handler)),
        entered_rx,
        go_tx,
    )
}

#[tokio::test]
async fn a_running_request_is_finished_before_the_end() {
    let (routes, entered, go) = held_route();
    let running = start(DRAIN_DEADLINE, routes).await;
    let request = running.get("/held");
    let drain = async {
        entered.await.expect("entered");
        running.shutdown.cancel();
        // Not accepting any more is how the end begins.
        while TcpStream::connect(&running.http).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert!(!running.server.is_finished());
        assert!(running.readiness.reasons().contains_key("drain"));
        go.send(()).expect("the handler waits");
    };
    let (response, ()) = tokio::join!(request, drain);
    assert!(response.ends_with("done\n"), "{response}");
    running.end().await.expect("ends in order");
}

#[tokio::test]
async fn the_drain_ends_with_its_deadline() {
    let (routes, entered, _go) = held_route();
    let running = start(Duration::from_millis(50), routes).await;
    let mut stream = TcpStream::connect(&running.http).await.expect("listening");
    let request = b"GET /held HTTP/1.1\r\nhost: test\r\n\r\n";
    stream.write_all(request).await.expect("sent");
    entered.await.expect("entered");
    running.shutdown.cancel();
    running.end().await.expect("ends although a request runs");
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    let config = Config {
        http_listen: address.clone(),
        ..Config::default()
    };
    let error = Listeners::bind(&config).await.expect_err("must be refused");
    assert!(error.to_string().contains(&address), "{error}");
    assert_eq!(error.code(), ErrorCode::Invalid);
}
