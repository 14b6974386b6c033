//! What happens when nodes fail.

use std::time::Duration;

use proto::v1;
use rstest::rstest;
use serde_json::json;
use tokio::io::AsyncReadExt;
use types::{Error, ErrorCode};

use crate::harness::{Fixture, PATIENCE, Router, Step, config, greeting, usage};

/// Four tokens of the alphabet, however many of them another node has sent already.
fn alphabet(request: &v1::DecodeRequest, until: usize, end: Step) -> Vec<Step> {
    const LETTERS: [(u32, &str); 4] = [(65, "A"), (66, "B"), (67, "C"), (68, "D")];
    let from = request.resumed.len();
    let sent: Vec<u32> = LETTERS[..from].iter().map(|(id, _)| *id).collect();
    assert_eq!(request.resumed, sent);
    let steps = LETTERS[from..until.max(from)].iter();
    steps
        .map(|(id, text)| Step::Tokens(vec![*id], text))
        .chain([end])
        .collect()
}

fn done() -> Step {
    Step::Finish("length", usage(5, 4, 0))
}

fn prompt() -> serde_json::Value {
    json!({ "model": "tiny", "prompt": "x", "max_tokens": 4 })
}

async fn text_of(router: &Router) -> String {
    let response = router.post("/v1/completions", prompt()).await;
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()["choices"][0]["text"]
        .as_str()
        .expect("text")
        .to_owned()
}

#[rstest]
#[case::connection(Step::Break)]
#[case::early_end(Step::End)]
#[case::unavailable(Step::Fail(Error::unavailable("shutting down")))]
#[case::fenced(Step::Fail(Error::new(ErrorCode::Fenced, "an older epoch")))]
#[case::corrupt(Step::Fail(Error::new(ErrorCode::Corrupt, "a checksum differs")))]
#[tokio::test]
async fn another_node_continues_where_one_failed(#[case] failure: Step) {
    let fixture = Fixture::new();
    for after in 0..4 {
        // Whichever node is asked first fails.
        let first = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let script = || {
            let (first, failure) = (first.clone(), failure.clone());
            move |request: &v1::DecodeRequest| match first.swap(false, std::sync::atomic::Ordering::SeqCst) {
                true => alphabet(request, after, failure.clone()),
                false => alphabet(request, 4, done()),
            }
        };
        let nodes = [fixture.decode("d0", script()), fixture.decode("d1", script())];
        let router = Router::start(&fixture, config(), &[&nodes[0], &nodes[1]]).await;
        assert_eq!(text_of(&router).await, "ABCD");
        let asked: Vec<_> = nodes.iter().flat_map(|node| node.requests()).collect();
        assert_eq!(asked.len(), 2);
        assert_eq!([nodes[0].requests().len(), nodes[1].requests().len()], [1, 1]);
        // The draw of a token depends on the seed: it must not change on the way.
        assert_eq!(asked[0].sampling, asked[1].sampling);
        assert_eq!(asked[0].prompt, asked[1].prompt);
        assert_eq!(asked[0].request_id, asked[1].request_id);
        router.idle().await;
    }
}

#[tokio::test]
async fn a_killed_node_s_stream_goes_on_elsewhere_without_a_seam() {
    let fixture = Fixture::new();
    let mut nodes = ["d0", "d1"].map(|id| {
        fixture.decode(id, |request| match request.resumed.len() {
            0 => alphabet(request, 2, Step::Hang),
            _ => alphabet(request, 4, done()),
        })
    });
    let router = Router::start(&fixture, config(), &[&nodes[0], &nodes[1]]).await;
    let body = json!({ "model": "tiny", "prompt": "x", "stream": true }).to_string();
    let mut client = router.open("/v1/completions", &body).await;
    let mut seen = String::new();
    while !seen.contains("\"B\"") {
        let mut buffer = [0; 1024];
        let read = tokio::time::timeout(PATIENCE, client.read(&mut buffer)).await;
        let count = read.expect("in time").expect("connected");
        assert_ne!(count, 0, "{seen}");
        seen.push_str(std::str::from_utf8(&buffer[..count]).expect("ASCII"));
    }
    let victim = nodes
        .iter_mut()
        .find(|node| !node.requests().is_empty())
        .expect("one was asked");
    let victim_id = victim.record.id.clone();
    victim.kill();
    let rest = tokio::time::timeout(PATIENCE, client.read_to_string(&mut seen)).await;
    rest.expect("in time").expect("text");
    let at = |text: &str| seen.find(text).unwrap_or_else(|| panic!("no {text} in {seen}"));
    assert!(at("\"A\"") < at("\"B\"") && at("\"B\"") < at("\"C\"") && at("\"C\"") < at("\"D\""));
    assert_eq!(seen.matches("\"B\"").count(), 1);
    assert!(at("\"D\"") < at("[DONE]"));
    let survivor = nodes
        .iter()
        .find(|node| node.record.id != victim_id)
        .expect("two nodes");
    assert_eq!(survivor.requests()[0].resumed, [65, 66]);
    // A dead stream tells at once, whatever the registry says.
    router
        .connected_with(std::slice::from_ref(&survivor.record.id))
        .await;
}

#[rstest]
#[case::broken(Step::Fail(Error::unavailable("p0 broke off")))]
#[case::stalled(Step::Hang)]
#[tokio::test]
async fn a_failed_prefill_is_not_held_against_the_decode_node(#[case] failure: Step) {
    let fixture = Fixture::new();
    let prefill = fixture.prefill("p0");
    let decode = fixture.decode("d0", move |request| match request.prefill {
        Some(_) => vec![failure.clone()],
        None => alphabet(request, 4, done()),
    });
    let remote = router::Config {
        local_prefill_tokens_max: 0,
        first_token_silence_max: node::config::Duration::from_millis(100),
        ..config()
    };
    let router = Router::start(&fixture, remote, &[&prefill, &decode]).await;
    assert_eq!(text_of(&router).await, "ABCD");
    let requests = decode.requests();
    let placement = requests[0]
        .prefill
        .as_ref()
        .expect("the first placement is remote");
    assert_eq!((placement.node_id.as_str(), placement.epoch), ("p0", 1));
    assert_eq!(placement.grpc_endpoint, prefill.record.grpc_endpoint);
    assert_eq!(requests[1].prefill, None);
}

#[tokio::test]
async fn a_full_node_is_passed_over_for_one_with_room() {
    let fixture = Fixture::new();
    let full = || vec![Step::Fail(Error::overloaded("the batch is full", 500))];
    let full = fixture.decode("d0", move |_| full());
    let free = fixture.decode("d1", |request| alphabet(request, 4, done()));
    let round_robin = router::Config {
        policy: router::policy::PolicyName::RoundRobin,
        ..config()
    };
    let router = Router::start(&fixture, round_robin, &[&full, &free]).await;
    assert_eq!(text_of(&router).await, "ABCD");
    assert_eq!([full.requests().len(), free.requests().len()], [1, 1]);
}

#[tokio::test]
async fn placements_are_bounded() {
    let fixture = Fixture::new();
    let nodes: Vec<_> = (0..6)
        .map(|n| fixture.decode(&format!("d{n}"), |_| vec![Step::Break]))
        .collect();
    let router = Router::start(&fixture, config(), &nodes.iter().collect::<Vec<_>>()).await;
    let response = router.post("/v1/completions", prompt()).await;
    assert_eq!(
        (response.status, response.json()["error"]["code"].clone()),
        (503, json!("unavailable"))
    );
    assert_eq!(nodes.iter().map(|node| node.requests().len()).sum::<usize>(), 4);
    assert!(nodes.iter().all(|node| node.requests().len() <= 1));
    router.idle().await;
}

#[tokio::test]
async fn what_can_never_succeed_is_tried_once() {
    let fixture = Fixture::new();
    let refuse = || vec![Step::Fail(Error::invalid("prompt", "too long for this node"))];
    let nodes = ["d0", "d1"].map(|id| fixture.decode(id, move |_| refuse()));
    let router = Router::start(&fixture, config(), &[&nodes[0], &nodes[1]]).await;
    let response = router.post("/v1/completions", prompt()).await;
    assert_eq!(
        (response.status, response.json()["error"]["param"].clone()),
        (400, json!("prompt"))
    );
    assert_eq!(nodes.iter().map(|node| node.requests().len()).sum::<usize>(), 1);
}

#[tokio::test]
async fn a_silent_node_counts_as_lost() {
    let fixture = Fixture::new();
    let nodes = ["d0", "d1"].map(|id| {
        fixture.decode(id, |request| match request.resumed.len() {
            0 => alphabet(request, 1, Step::Hang),
            _ => alphabet(request, 4, done()),
        })
    });
    let impatient = router::Config {
        token_silence_max: node::config::Duration::from_millis(50),
        ..config()
    };
    let router = Router::start(&fixture, impatient, &[&nodes[0], &nodes[1]]).await;
    assert_eq!(text_of(&router).await, "ABCD");
    for node in &nodes {
        node.open_streams(0).await;
    }
}

#[tokio::test]
async fn a_request_ends_with_its_deadline_and_is_cancelled_below() {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |_| vec![Step::Hang]);
    let short = router::Config {
        request_deadline: node::config::Duration::from_millis(100),
        ..config()
    };
    let router = Router::start(&fixture, short, &[&node]).await;
    let response = router.post("/v1/completions", prompt()).await;
    assert_eq!(
        (response.status, response.json()["error"]["code"].clone()),
        (504, json!("timeout"))
    );
    assert!((1..=100).contains(&node.requests()[0].deadline_ms));
    node.open_streams(0).await;
    router.idle().await;
}

#[rstest]
#[case::streamed(true)]
#[case::in_one_piece(false)]
#[tokio::test]
async fn a_client_that_leaves_cancels_everything(#[case] stream: bool) {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |request| alphabet(request, 1, Step::Hang));
    let router = Router::start(&fixture, config(), &[&node]).await;
    let body = json!({ "model": "tiny", "prompt": "x", "stream": stream }).to_string();
    let client = router.open("/v1/completions", &body).await;
    node.open_streams(1).await;
    assert_eq!(router.handle.dispatcher.counts(), (1, 0));
    drop(client);
    node.open_streams(0).await;
    router.idle().await;
}

#[tokio::test]
async fn without_nodes_the_answer_is_503() {
    let fixture = Fixture::new();
    let router = Router::start(&fixture, config(), &[]).await;
    let response = router.post("/v1/completions", prompt()).await;
    assert_eq!(
        (response.status, response.json()["error"]["code"].clone()),
        (503, json!("unavailable"))
    );
    assert_eq!(router.get("/readyz").await.status, 503);
}

#[tokio::test]
async fn a_request_waits_for_a_node_that_is_about_to_come() {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |request| alphabet(request, 4, done()));
    let patient = router::Config {
        placement_wait: PATIENCE.into(),
        ..config()
    };
    let router = Router::start(&fixture, patient, &[]).await;
    let answer = text_of(&router);
    let come = async {
        while router.handle.dispatcher.counts() != (1, 0) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        router.set_members([node.record.clone()]);
    };
    let (answer, ()) = tokio::join!(answer, come);
    assert_eq!(answer, "ABCD");
}

#[tokio::test]
async fn nodes_that_the_registry_lost_serve_on_while_they_live() {
    let fixture = Fixture::new();
    let mut node = fixture.decode("d0", |_| greeting());
    let router = Router::start(&fixture, config(), &[&node]).await;
    router.set_members([]);
    let response = router.post("/v1/completions", prompt()).await;
    assert_eq!(response.status, 200, "{}", response.body);
    node.kill();
    router.connected_with(&[]).await;
    let gone = || router.handle.dispatcher.cluster().lock().status().is_empty();
    let mut changes = router.handle.dispatcher.cluster().changes();
    let waited = tokio::time::timeout(PATIENCE, async {
        while !gone() {
            changes.changed().await.expect("the router lives");
        }
    });
    waited
        .await
        .expect("the node is forgotten once its streams ended");
}

#[tokio::test]
async fn a_waiting_request_takes_the_place_of_one_that_ended() {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |request| match request.prompt.len() {
        1 => vec![Step::Hang],
        _ => alphabet(request, 4, done()),
    });
    let narrow = router::Config {
        running_requests_max: 1,
        waiting_requests_max: 1,
        ..config()
    };
    let router = Router::start(&fixture, narrow, &[&node]).await;
    let body = json!({ "model": "tiny", "prompt": [65] }).to_string();
    let first = router.open("/v1/completions", &body).await;
    node.open_streams(1).await;
    let second = router.post("/v1/completions", json!({ "model": "tiny", "prompt": [65, 66] }));
    let rest = async {
        while router.handle.dispatcher.counts() != (1, 1) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let third = router.post("/v1/completions", prompt()).await;
        assert_eq!(
            (third.status, third.json()["error"]["code"].clone()),
            (429, json!("overloaded"))
        );
        assert!(third.headers.contains_key("retry-after"));
        drop(first);
    };
    let (second, ()) = tokio::join!(second, rest);
    assert_eq!(second.status, 200, "{}", second.body);
    router.idle().await;
}

#[tokio::test]
async fn a_router_that_ends_lets_requests_finish() {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |request| alphabet(request, 4, done()));
    let router = Router::start(&fixture, config(), &[&node]).await;
    assert_eq!(text_of(&router).await, "ABCD");
    router.stop().await;
}
