//! Explanations: of what was decided, and of what would be.

use proto::v1;
use proto::v1::explain_request::Input as Prompt;
use proto::v1::generate_request::Input;
use proto::v1::routing_client::RoutingClient;
use tonic::Code;
use tonic::transport::Channel;
use types::Role;

use super::grpc::{events, held};
use super::harness::{FakeNode, Fixture, Router, config, greeting};

async fn routing(router: &Router) -> RoutingClient<Channel> {
    let address = format!("http://{}", router.grpc);
    RoutingClient::connect(address).await.expect("the router listens")
}

fn tokens() -> v1::TokenIds {
    v1::TokenIds {
        ids: (0..100).collect(),
    }
}

fn explain() -> v1::ExplainRequest {
    v1::ExplainRequest {
        input: Some(Prompt::Tokens(tokens())),
        ..v1::ExplainRequest::default()
    }
}

fn request() -> v1::GenerateRequest {
    v1::GenerateRequest {
        request_id: format!("{:032x}", 0xabc),
        input: Some(Input::Tokens(tokens())),
        ..v1::GenerateRequest::default()
    }
}

async fn decisions(client: &mut RoutingClient<Channel>, request_id: &str) -> Vec<v1::Decision> {
    let request = v1::ListDecisionsRequest {
        request_id: request_id.into(),
        count: 0,
    };
    let answer = client.list_decisions(request).await.expect("kept");
    answer.into_inner().decisions
}

#[tokio::test]
async fn an_explanation_says_that_a_prompt_would_be_turned_away_and_why() {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |_| greeting());
    let router = Router::start(&fixture, config(), &[&node]).await;
    let mut client = routing(&router).await;
    let hurried = v1::ExplainRequest {
        ttft_slo_ms: 1e-6,
        ..explain()
    };
    let answer = client.explain(hurried).await.expect("explained").into_inner();
    let decision = answer.decision.expect("a decision");
    let rejection = decision.admission.and_then(|foreseen| foreseen.rejection);
    let rejection = rejection.expect("too late from the start");
    assert_eq!(rejection.code, "overloaded", "{rejection:?}");
    assert_eq!(rejection.overload.expect("it names one").constraint, "ttft");
    assert!(rejection.retry_after_ms.is_some());
}

#[tokio::test]
async fn a_prompt_is_explained_as_it_is_then_placed_and_nothing_is_counted() {
    let fixture = Fixture::new();
    let conversation = tokens().ids;
    let script = |_: &v1::DecodeRequest| greeting();
    let store = FakeNode::with_blocks(
        &fixture.space,
        "s0",
        Role::Store,
        held(&fixture, "", &conversation),
        script,
    );
    let nodes: Vec<FakeNode> = (0..3)
        .map(|number| fixture.decode(&format!("d{number}"), script))
        .collect();
    let all = [&store, &nodes[0], &nodes[1], &nodes[2]];
    let router = Router::start(&fixture, config(), &all).await;
    let mut client = routing(&router).await;
    let mut explained = Vec::new();
    for _ in 0..5 {
        let answer = client.explain(explain()).await.expect("explained").into_inner();
        explained.push(answer.decision.expect("a decision"));
    }
    let first = &explained[0];
    assert_eq!(first.candidates.len(), 3, "{first:?}");
    // Nothing was counted, or the next one would go elsewhere.
    assert!(explained.iter().all(|one| one.candidates == first.candidates));
    assert!(decisions(&mut client, "").await.is_empty());
    let admission = first.admission.as_ref().expect("only explained");
    assert_eq!((admission.wait_ms, &admission.rejection), (0.0, &None));
    assert!(admission.ttft_ms >= first.candidates[0].ttft_ms, "{admission:?}");
    events(&router, request()).await.expect("served");
    let kept = decisions(&mut client, &request().request_id).await;
    assert_eq!(kept.len(), 1);
    let kept = &kept[0];
    assert_eq!(kept.candidates[0], first.candidates[0]);
    assert_eq!((kept.number, kept.reason.as_str()), (1, first.reason.as_str()));
    let choice = &kept.candidates[0];
    let sum = choice.queue_ms + choice.promote_ms + choice.fetch_ms + choice.compute_ms + choice.handoff_ms;
    assert!((sum - choice.ttft_ms).abs() < 1e-9, "{choice:?}");
    assert_eq!(choice.sources[0].node, "s0");
    let outcome = kept.outcome.as_ref().expect("it was placed");
    assert_eq!(outcome.state, "finished");
    assert!(outcome.ttft_ms > 0.0);
    let served = nodes.iter().find(|node| !node.requests().is_empty());
    assert_eq!(
        served.expect("one of them").record.id.as_str(),
        choice.decode_node
    );
}

#[tokio::test]
async fn decisions_are_watched_as_they_are_made() {
    let fixture = Fixture::new();
    let decode = fixture.decode("d0", |_| greeting());
    let router = Router::start(&fixture, config(), &[&decode]).await;
    let mut client = routing(&router).await;
    let watched = client.watch_decisions(v1::WatchDecisionsRequest {}).await;
    let mut watched = watched.expect("watched").into_inner();
    events(&router, request()).await.expect("served");
    let news = watched.message().await.expect("open").expect("a decision");
    let decision = news.decision.expect("a decision");
    assert_eq!(decision.request_id, request().request_id);
    assert_eq!(
        (decision.candidates[0].decode_node.as_str(), news.missed),
        ("d0", 0)
    );
}

#[tokio::test]
async fn what_was_turned_away_is_kept_with_its_end_and_what_is_unknown_is_not_found() {
    let fixture = Fixture::new();
    let decode = fixture.decode("d0", |_| greeting());
    let router = Router::start(&fixture, config(), &[&decode]).await;
    let mut client = routing(&router).await;
    // 100 tokens take 100 ms by what the node reports. A limit that is over on arrival would leave nothing to decide.
    let impatient = v1::GenerateRequest {
        ttft_slo_ms: 90.0,
        ..request()
    };
    events(&router, impatient).await.expect_err("turned away");
    let kept = decisions(&mut client, "").await;
    assert_eq!(kept[0].outcome.as_ref().expect("an end").state, "overloaded");
    assert_eq!(kept[0].candidates[0].objection, "misses_ttft");
    let unknown = v1::ListDecisionsRequest {
        request_id: format!("{:032x}", 0xdef),
        count: 0,
    };
    let status = client.list_decisions(unknown).await.expect_err("unknown");
    assert_eq!(status.code(), Code::NotFound);
    let empty = client.explain(v1::ExplainRequest::default()).await;
    assert_eq!(empty.expect_err("no prompt").code(), Code::InvalidArgument);
}
