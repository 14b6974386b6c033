//! Requests seen from outside: listed, shown, cancelled, and with the trace of their client.

use std::time::Duration;

use proto::span::span;
use proto::v1;
use proto::v1::requests_client::RequestsClient;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tonic::Code;
use tonic::transport::Channel;
use types::TraceParent;

use super::harness::{Fixture, MODEL, PATIENCE, Router, Step, config, greeting, usage};

const COMPLETIONS: &str = "/v1/completions";

async fn requests(router: &Router) -> RequestsClient<Channel> {
    let address = format!("http://{}", router.grpc);
    RequestsClient::connect(address)
        .await
        .expect("the router listens")
}

fn body(stream: bool) -> String {
    json!({ "model": MODEL, "prompt": "Hello", "stream": stream }).to_string()
}

/// The newest request, once it is in `state`.
async fn in_state(client: &mut RequestsClient<Channel>, state: &str) -> v1::RequestTimeline {
    let waited = tokio::time::timeout(PATIENCE, async {
        loop {
            let list = client
                .list(v1::ListRequestsRequest::default())
                .await
                .expect("listed");
            let newest = list.into_inner().requests.into_iter().next();
            if let Some(request) = newest.filter(|request| request.state == state) {
                return request;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("no request is {state}"))
}

async fn show(client: &mut RequestsClient<Channel>, request_id: &str) -> v1::RequestTimeline {
    let request_id = request_id.to_owned();
    let shown = client
        .show(v1::ShowRequestRequest { request_id })
        .await
        .expect("known");
    shown.into_inner().requests.remove(0)
}

fn told() -> v1::RequestReport {
    let ms = Duration::from_millis;
    v1::RequestReport {
        prefill_node: "p0".into(),
        handoff_bytes: 4096,
        spans: vec![
            span("queue", "p0", ms(1), ms(2)),
            span("prefill", "p0", ms(3), ms(10)),
        ],
        ..v1::RequestReport::default()
    }
}

#[tokio::test]
async fn a_request_is_listed_while_it_runs_and_its_client_is_told_when_it_is_cancelled() {
    let fixture = Fixture::new();
    let decode = fixture.decode("d0", |_| vec![Step::Told(vec![72], "H", told()), Step::Hang]);
    let router = Router::start(&fixture, config(), &[&decode]).await;
    let mut client = requests(&router).await;
    let mut answer = router.open(COMPLETIONS, &body(true)).await;
    let listed = in_state(&mut client, "decoding").await;
    assert_eq!((listed.output_tokens, listed.spans.len()), (1, 0));
    assert_eq!(listed.placements[0].decode_node, "d0");
    assert_eq!(listed.placements[0].handoff_bytes, 4096);
    let shown = show(&mut client, &listed.request_id).await;
    let prefill = shown
        .spans
        .iter()
        .find(|span| span.name == "prefill")
        .expect("told");
    assert_eq!((prefill.node.as_str(), prefill.duration_ms), ("p0", 10.0));
    let running = shown.spans.iter().filter(|span| span.running);
    let running: Vec<&str> = running.map(|span| span.name.as_str()).collect();
    assert_eq!(running, ["request", "placement", "decode"]);

    let request_id = listed.request_id.clone();
    let cancel = v1::CancelRequestRequest { request_id };
    let cancelled = client.cancel(cancel.clone()).await.expect("it runs").into_inner();
    assert_eq!(cancelled.requests, 1);
    let mut text = String::new();
    let read = tokio::time::timeout(PATIENCE, answer.read_to_string(&mut text));
    read.await.expect("in time").expect("UTF-8");
    assert!(
        text.contains("event: error") && text.contains("request_cancelled"),
        "{text}"
    );
    decode.open_streams(0).await;
    let ended = in_state(&mut client, "denied").await;
    assert_eq!(ended.error, "an operator cancelled the request");
    let again = client.cancel(cancel).await.expect_err("it has ended");
    assert_eq!(again.code(), Code::NotFound);
}

#[tokio::test]
async fn a_request_that_waits_for_admission_can_be_cancelled() {
    let fixture = Fixture::new();
    let decode = fixture.decode("d0", |_| vec![Step::Tokens(vec![72], "H"), Step::Hang]);
    let config = router::Config {
        running_requests_max: 1,
        ..config()
    };
    let router = Router::start(&fixture, config, &[&decode]).await;
    let mut client = requests(&router).await;
    let _running = router.open(COMPLETIONS, &body(true)).await;
    in_state(&mut client, "decoding").await;
    let waits = async {
        let waiting = in_state(&mut client, "waiting").await;
        let request_id = waiting.request_id;
        client
            .cancel(v1::CancelRequestRequest { request_id })
            .await
            .expect("it waits");
    };
    let (answer, ()) = tokio::join!(router.post(COMPLETIONS, body(false)), waits);
    assert_eq!(answer.status, 403, "{answer:?}");
    assert_eq!(answer.json()["error"]["code"], "request_cancelled");
    assert_eq!(decode.requests().len(), 1);
}

#[tokio::test]
async fn what_has_ended_is_kept_with_what_its_nodes_told_and_what_is_unknown_is_not_found() {
    let fixture = Fixture::new();
    let decode = fixture.decode("d0", |_| {
        vec![
            Step::Told(vec![72, 105], "Hi", told()),
            Step::Finish("stop", usage(9, 2, 4)),
        ]
    });
    let router = Router::start(&fixture, config(), &[&decode]).await;
    let mut client = requests(&router).await;
    let answer = router.post(COMPLETIONS, body(false)).await;
    let timing = &answer.headers["server-timing"];
    for part in [
        "tokenise;dur=",
        "admission;dur=",
        "place;dur=",
        "prefill;dur=10.00;desc=p0",
    ] {
        assert!(timing.contains(part), "{timing}");
    }
    let kept = show(&mut client, &answer.headers["x-request-id"]).await;
    assert_eq!((kept.state.as_str(), kept.cached_tokens), ("finished", 4));
    assert!(kept.ttft_ms > 0.0 && kept.age_ms >= kept.ttft_ms, "{kept:?}");
    // A stream's headers go out with its first token, when the prefill has been told.
    let stream = router.post(COMPLETIONS, body(true)).await;
    assert!(stream.headers["server-timing"].contains("queue;dur=2.00;desc=p0"));
    for (request_id, code) in [("7", Code::InvalidArgument), (&*"7".repeat(32), Code::NotFound)] {
        let request_id = request_id.to_owned();
        let refused = client.show(v1::ShowRequestRequest { request_id }).await;
        assert_eq!(refused.expect_err("unknown").code(), code);
    }
}

#[tokio::test]
async fn a_request_goes_on_under_its_clients_id_and_in_its_clients_trace() {
    let fixture = Fixture::new();
    let decode = fixture.decode("d0", |_| greeting());
    let router = Router::start(&fixture, config(), &[&decode]).await;
    let (trace, uuid) = (
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "0ddba11c-0000-4000-8000-00000000c0de",
    );
    let headers = [("traceparent", trace), ("x-request-id", uuid)];
    let answer = router
        .send("POST", COMPLETIONS, &headers, body(false).as_bytes())
        .await;
    assert_eq!(answer.headers["x-request-id"], uuid.replace('-', ""));
    let parent = TraceParent::parse(trace).expect("it can be read");
    let seen = decode.traces()[0].expect("nodes are told");
    assert_eq!((seen.trace, seen.sampled), (parent.trace, true));
    assert_ne!(seen.span, parent.span);
    let kept = show(&mut requests(&router).await, &uuid.replace('-', "")).await;
    assert_eq!(kept.trace_id, "4bf92f3577b34da6a3ce929d0e0e4736");
    // One that is in no trace is one by itself, named like the request.
    let answer = router.post(COMPLETIONS, body(false)).await;
    let seen = decode.traces()[1].expect("nodes are told");
    assert_eq!(format!("{:032x}", seen.trace), answer.headers["x-request-id"]);
}
