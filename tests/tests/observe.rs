//! Requests seen from outside, over real processes: their way, their trace, and what nodes log of them.

#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Attribute;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span};
use serde_json::{Value, json};
use tests::{Cluster, model, perigee, tiny, wait_for};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// Runs a command against the cluster's router.
fn run(cluster: &Cluster, arguments: &[&str]) -> (i32, String) {
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let output = Command::new(perigee())
        .args(arguments)
        .args(["--router", router])
        .output()
        .expect("start");
    let printed = String::from_utf8(output.stdout).expect("UTF-8");
    (output.status.code().expect("no signal ended it"), printed)
}

fn run_json(cluster: &Cluster, arguments: &[&str]) -> Value {
    let (code, text) = run(cluster, &[arguments, &["-o", "json"]].concat());
    assert_eq!(code, 0, "{arguments:?}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Asks for tokens over HTTP. Gives the headers of the answer.
fn complete(cluster: &Cluster, prompt: &str, max_tokens: u64) -> BTreeMap<String, String> {
    let body = json!({
        "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
    });
    let output = Command::new("curl")
        .args([
            "-sf",
            "-o",
            "/dev/null",
            "-D",
            "-",
            "-H",
            "content-type: application/json",
        ])
        .args(["-H", &format!("traceparent: 00-{TRACE}-{PARENT}-01")])
        .args([
            "-d",
            &body.to_string(),
            &format!("{}/v1/completions", cluster.ready.http),
        ])
        .output()
        .expect("curl");
    assert!(output.status.success(), "{body}");
    let head = String::from_utf8(output.stdout).expect("ASCII");
    let headers = head.lines().filter_map(|line| line.split_once(": "));
    headers
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect()
}

/// Always over a prefill node, so that there is a handoff.
const DISAGGREGATED: [&str; 6] = [
    "--prefill",
    "1",
    "--decode",
    "1",
    "--set",
    "router.local_prefill_tokens_max=0",
];

const PROMPT: &str = "the quick brown fox jumps over the lazy dog and the quick brown fox jumps again";

#[test]
fn a_requests_way_is_told_by_router_prefill_and_decode_node() {
    let folder = tempfile::tempdir().expect("folder");
    let cluster = Cluster::start(&tiny(folder.path()), &DISAGGREGATED);
    let headers = complete(&cluster, PROMPT, 12);
    let id = headers["x-request-id"].as_str();
    for part in [
        "tokenise;",
        "admission;",
        "queue;",
        "prefill;",
        "handoff;",
        "verify;",
        "decode;",
    ] {
        assert!(
            headers["server-timing"].contains(part),
            "{}",
            headers["server-timing"]
        );
    }

    let list = run_json(&cluster, &["request", "list"]);
    assert_eq!(list["requests"][0]["request_id"], id);
    assert_eq!(list["requests"][0]["state"], "finished");
    let running = run_json(&cluster, &["request", "list", "--running"]);
    assert_eq!(running["requests"], json!([]));

    let shown = run_json(&cluster, &["request", "trace", id]);
    assert_eq!(
        (&shown["output_tokens"], &shown["trace_id"]),
        (&json!(12), &json!(TRACE))
    );
    let number = |span: &Value, name: &str| span[name].as_f64().expect("a number");
    let spans = shown["spans"].as_array().expect("spans");
    let total = number(&spans[0], "duration_ms");
    let of = |name: &str, node: &str| {
        let found = spans.iter().find(|span| span["name"] == name);
        let span = found.unwrap_or_else(|| panic!("no {name}: {shown}"));
        assert_eq!(span["node"], node, "{name}");
        (
            number(span, "start_ms"),
            number(span, "start_ms") + number(span, "duration_ms"),
        )
    };
    let (queue, prefill) = (of("queue", "prefill-0"), of("prefill", "prefill-0"));
    let (handoff, verify) = (of("handoff", "prefill-0"), of("verify", "decode-0"));
    let decode = of("decode", "decode-0");
    // One clock decides, and nodes' messages take a while: parts lie in order but for that.
    let slack_ms = 50.0;
    assert!(queue.1 <= prefill.0 + 0.01 && prefill.0 <= handoff.1, "{shown}");
    assert!(
        prefill.1 <= verify.1 + slack_ms && verify.1 <= decode.0 + slack_ms,
        "{shown}"
    );
    assert!(decode.1 <= total + slack_ms, "{shown}");
    let handed = spans
        .iter()
        .find(|span| span["name"] == "handoff")
        .expect("found before");
    assert_eq!(handed["bytes"], shown["placements"][0]["handoff_bytes"]);
    assert!(handed["bytes"].as_u64().expect("bytes") > 0);

    for (arguments, wanted) in [
        (
            vec!["request", "list"],
            vec!["STATE", id, "finished", "prefill-0"],
        ),
        (
            vec!["request", "show", id],
            vec!["placement", "prefill-0 → decode-0", TRACE],
        ),
        (
            vec!["request", "trace", id],
            vec!["█", "handoff", "prefill-0", "finished"],
        ),
    ] {
        let (code, text) = run(&cluster, &arguments);
        assert_eq!(code, 0, "{text}");
        for word in wanted {
            assert!(text.contains(word), "{word} in {text}");
        }
    }
    let unknown = "7".repeat(32);
    for command in ["show", "trace", "cancel"] {
        let (code, _) = run(&cluster, &["request", command, &unknown]);
        assert_eq!(code, i32::from(types::ErrorCode::NotFound.exit()), "{command}");
    }
}

#[test]
fn a_request_that_runs_is_cancelled_from_the_command_line() {
    // The real model, since the tiny one would have answered before it is cancelled.
    let cluster = Cluster::start(&model(), &["--prefill", "1", "--decode", "1"]);
    let router = cluster.ready.grpc.trim_start_matches("http://").to_owned();
    let client = std::thread::spawn(move || {
        let arguments = [
            "generate",
            "hello",
            "--ignore-eos",
            "--max-tokens",
            "1500",
            "--router",
            &router,
        ];
        Command::new(perigee()).args(arguments).output().expect("start")
    });
    let id = wait_for("a request that decodes", || {
        let list = run_json(&cluster, &["request", "list", "--running"]);
        let request = &list["requests"][0];
        (request["state"] == "decoding").then(|| request["request_id"].as_str().expect("an id").to_owned())
    });
    let cancelled = run_json(&cluster, &["request", "cancel", &id]);
    assert_eq!(cancelled, json!({ "request_id": id, "cancelled": 1 }));
    let output = client.join().expect("it ends");
    assert_eq!(
        output.status.code(),
        Some(i32::from(types::ErrorCode::Denied.exit()))
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("an operator cancelled the request"), "{said}");
    let shown = run_json(&cluster, &["request", "show", &id]);
    assert_eq!(shown["state"], "denied");
}

/// What a collector was sent.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ResourceSpans>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let spans = request.into_inner().resource_spans;
        self.0.lock().expect("no test panicked").extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// The spans, each with the node that it is of.
    fn spans(&self) -> Vec<(String, Span)> {
        let mut spans = Vec::new();
        for resource in self.0.lock().expect("no test panicked").iter() {
            let attributes = resource.resource.iter().flat_map(|resource| &resource.attributes);
            let node = attributes.filter(|attribute| attribute.key == "service.instance.id");
            let node = node
                .filter_map(|attribute| attribute.value.as_ref()?.value.as_ref())
                .next();
            let Some(Attribute::StringValue(node)) = node else {
                panic!("a resource without a name: {resource:?}");
            };
            let own = resource.scope_spans.iter().flat_map(|scope| scope.spans.clone());
            spans.extend(own.map(|span| (node.clone(), span)));
        }
        spans
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_one_tree_and_nodes_log_its_trace() {
    let collector = Collector::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let address = listener.local_addr().expect("bound");
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let folder = tempfile::tempdir().expect("folder");
    let endpoint = format!("telemetry.otlp_endpoint={address}");
    let settings = [
        "--set",
        &endpoint,
        "--set",
        "log.filter=info,decode_node=debug,prefill_node=debug",
    ];
    let cluster = Cluster::start(&tiny(folder.path()), &[&DISAGGREGATED[..], &settings].concat());
    let headers = complete(&cluster, PROMPT, 5);
    let id = headers["x-request-id"].clone();

    let spans = wait_for("a trace", || {
        Some(collector.spans()).filter(|spans| !spans.is_empty())
    });
    let by_id: BTreeMap<&[u8], &str> = spans
        .iter()
        .map(|(_, span)| (span.span_id.as_slice(), span.name.as_str()))
        .collect();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut tree = BTreeMap::new();
    for (node, span) in &spans {
        assert_eq!(hex(&span.trace_id), TRACE);
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{span:?}");
        let parent = by_id.get(span.parent_span_id.as_slice());
        let parent = parent.map_or_else(|| hex(&span.parent_span_id), |name| (*name).to_owned());
        tree.insert(span.name.clone(), (node.clone(), parent));
    }
    let node = |name: &str, parent: &str| (name.to_owned(), parent.to_owned());
    let router = cluster
        .ready
        .nodes
        .iter()
        .find(|node| node.role == "router")
        .expect("there is one");
    assert_eq!(tree["request"], node(&router.id, PARENT));
    assert_eq!(tree["placement"], node(&router.id, "request"));
    for name in ["queue", "prefill", "handoff"] {
        assert_eq!(tree[name], node("prefill-0", "placement"), "{name}");
    }
    for name in ["verify", "decode"] {
        assert_eq!(tree[name], node("decode-0", "placement"), "{name}");
    }
    let requests = spans.iter().filter(|(_, span)| span.name == "request");
    assert_eq!(requests.count(), 1);

    for said in ["prefill started", "request finished"] {
        let line = wait_for(said, || {
            let log = cluster.up.log();
            log.lines().find(|line| line.contains(said)).map(str::to_owned)
        });
        assert!(line.contains(TRACE) && line.contains(&id), "{line}");
    }
}

#[test]
fn what_a_node_logs_is_changed_for_a_while_and_put_back() {
    let folder = tempfile::tempdir().expect("folder");
    let cluster = Cluster::start(&tiny(folder.path()), &DISAGGREGATED);
    let told = run_json(&cluster, &["node", "log-level", "prefill-0"]);
    assert_eq!(told["reverts_in_ms"], Value::Null);
    let own = told["configured"].as_str().expect("a filter");
    assert_eq!(told["filter"], own);
    complete(&cluster, "before", 2);
    let arguments = [
        "node",
        "log-level",
        "prefill-0",
        "info,prefill_node=debug",
        "--for",
        "1h",
    ];
    let (code, text) = run(&cluster, &arguments);
    assert_eq!(code, 0);
    assert!(
        text.starts_with("prefill-0 logs info,prefill_node=debug for "),
        "{text}"
    );
    assert!(text.contains(own), "{text}");
    assert!(
        !cluster.up.log().contains("prefill started"),
        "it was not logged before"
    );
    complete(&cluster, PROMPT, 2);
    wait_for("a line that was not logged before", || {
        cluster.up.log().contains("prefill started").then_some(())
    });
    let told = run_json(&cluster, &["node", "log-level", "prefill-0", "--revert"]);
    assert_eq!(
        (&told["filter"], &told["reverts_in_ms"]),
        (&json!(own), &Value::Null)
    );
    for arguments in [
        &["node", "log-level", "prefill-0", "prefill_node=loudly"][..],
        &["node", "log-level", "prefill-0", "debug", "--for", "48h"],
    ] {
        let (code, _) = run(&cluster, arguments);
        assert_eq!(code, i32::from(types::ErrorCode::Invalid.exit()), "{arguments:?}");
    }
}
