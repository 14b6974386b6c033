//! What routers are measured in front of: nodes and HTTP workers that compute nothing and answer at once.
//!
//! `trivial_cluster MODEL COUNT` serves a registry, so many decode nodes of the model in it, and as many OpenAI workers over HTTP.
//! It prints where they are as a line of JSON and ends with its input.

use std::convert::Infallible;
use std::io::Read;
use std::path::Path;
use std::time::SystemTime;

use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use node::registry::{self, Registration, embedded};
use node::serve::Server;
use node::{Listeners, Metrics, Readiness, identity};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use types::{KvDtype, KvLayout, KvSpace, Role};

#[path = "../tests/front_door/harness.rs"]
#[allow(dead_code)]
mod harness;

/// Every answer, in pieces as they are streamed.
const PIECES: [&str; 2] = ["Hi", " there"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, count] = arguments.as_slice() else {
        panic!("usage: trivial_cluster MODEL COUNT");
    };
    let (count, space): (usize, _) = (count.parse().expect("a number"), space(Path::new(model)));
    let start = |number| {
        let script = |_: &_| harness::greeting();
        harness::FakeNode::start(&space, &format!("d{number}"), Role::Decode, script)
    };
    let nodes: Vec<_> = (0..count).map(start).collect();
    let runtime = tokio::runtime::Runtime::new().expect("threads can be made");
    let _registrations = runtime.block_on(async {
        let url = serve_registry().await;
        let registrations = register(&url, &nodes).await;
        let mut workers = Vec::new();
        for _ in 0..count {
            workers.push(serve_worker().await);
        }
        println!("{}", json!({ "registry": url, "workers": workers }));
        registrations
    });
    std::io::stdin().read_to_end(&mut Vec::new()).expect("read");
    runtime.shutdown_background();
}

async fn register(url: &str, nodes: &[harness::FakeNode]) -> Vec<Registration> {
    let config = registry::Config::default();
    let connected = registry::connect(url, &config, CancellationToken::new()).await;
    let registry = connected.expect("it was just started");
    let mut registrations = Vec::new();
    for node in nodes {
        let registration = registry.register(node.record.clone()).await;
        registrations.push(registration.expect("registered"));
    }
    registrations
}

fn space(model: &Path) -> KvSpace {
    let model = router::Model::open(model, harness::MODEL).expect("a model");
    let layout = KvLayout {
        layers: 30,
        kv_heads: 3,
        head_dim: 64,
        block_tokens: 32,
        dtype: KvDtype::F16,
    };
    harness::space(&model, layout)
}

async fn serve_registry() -> String {
    let config = node::serve::Config::default();
    let listeners = Listeners::bind(&config).await.expect("port 0 is free");
    let url = format!("perigee://{}", listeners.grpc_address());
    let forever = CancellationToken::new();
    let epoch = identity::epoch(SystemTime::now(), None);
    let service = embedded::Service::new(epoch, forever.clone());
    let routes = tonic::service::Routes::new(service.server());
    let server = Server::new(&config, Readiness::new([]), Metrics::new()).grpc(routes);
    tokio::spawn(service.run());
    tokio::spawn(server.run(listeners, forever));
    url
}

/// An OpenAI worker, as sglang's router wants one.
async fn serve_worker() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let info =
        || async { Json(json!({ "model_path": harness::MODEL, "served_model_name": harness::MODEL })) };
    let routes = Router::new()
        .route("/health", get(|| async {}))
        .route("/get_model_info", get(info))
        .route("/model_info", get(info))
        .route("/server_info", get(info))
        .route("/get_server_info", get(info))
        .route("/v1/completions", post(completion));
    // What a router asks for in pieces must not wait for its acknowledgements.
    let listener = listener.tap_io(|stream| stream.set_nodelay(true).expect("TCP"));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    url
}

async fn completion(Json(request): Json<Value>) -> Response {
    if request["stream"] != true {
        return Json(body(&PIECES.concat(), json!("stop"))).into_response();
    }
    let pieces = PIECES.map(|piece| body(piece, Value::Null).to_string());
    let last = body("", json!("stop")).to_string();
    let events = pieces.into_iter().chain([last, "[DONE]".to_owned()]);
    let events = events.map(|data| Ok::<_, Infallible>(Event::default().data(data)));
    Sse::new(futures::stream::iter(events)).into_response()
}

fn body(text: &str, finish_reason: Value) -> Value {
    json!({
        "id": "cmpl-0", "object": "text_completion", "created": 0, "model": harness::MODEL,
        "choices": [{ "index": 0, "text": text, "logprobs": null, "finish_reason": finish_reason }],
        "usage": { "prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12 },
    })
}
