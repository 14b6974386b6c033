//! What a gRPC client sees.

use futures::StreamExt;
use node::Channel;
use proto::v1;
use proto::v1::generate_request::Input;
use proto::v1::generate_response::Event;
use proto::v1::inference_client::InferenceClient;
use tonic::{Code, Status};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use types::{BlockEvent, Error, NodeRecord, Role, Tier};

use crate::harness::{FakeNode, Fixture, Router, Step, config, greeting, usage};

fn client(router: &Router) -> InferenceClient<Channel> {
    InferenceClient::new(node::channel(&router.grpc.to_string()).expect("an address"))
}

fn text(prompt: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(Input::Prompt(prompt.into())),
        ..v1::GenerateRequest::default()
    }
}

pub(crate) async fn events(router: &Router, request: v1::GenerateRequest) -> Result<Vec<Event>, Status> {
    let stream = client(router).generate(request).await?.into_inner();
    let events: Vec<_> = stream.collect().await;
    events
        .into_iter()
        .map(|event| event.map(|event| event.event.expect("an event")))
        .collect()
}

#[tokio::test]
async fn a_request_is_accepted_streamed_and_finished() {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |_| greeting());
    let router = Router::start(&fixture, config(), &[&node]).await;
    let events = events(&router, text("hello")).await.expect("served");
    let [
        Event::Accepted(accepted),
        Event::Tokens(first),
        Event::Tokens(second),
        Event::Finished(finished),
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    let sent = &node.requests()[0];
    assert_eq!(
        (accepted.model.as_str(), &accepted.request_id),
        ("tiny", &sent.request_id)
    );
    assert_eq!(accepted.prompt_tokens, sent.prompt.len() as u64);
    assert_eq!((first.text.as_str(), second.text.as_str()), ("Hi", " there"));
    assert_eq!(finished.usage, Some(usage(9, 3, 4)));
    let report = finished.report.as_ref().expect("a report");
    assert!(report.ttft_ms > 0.0 && report.tbt_max_ms > 0.0 && report.placements == 1);
    assert_eq!(sent.kv_root, fixture.space.root().0);
    let sampling = sent.sampling.as_ref().expect("always sent");
    assert_eq!(
        (sampling.temperature, sampling.max_tokens),
        (Some(0.0), Some(256))
    );
}

#[tokio::test]
async fn what_is_wrong_has_a_code_and_names_its_parameter() {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |_| greeting());
    let router = Router::start(&fixture, config(), &[&node]).await;
    let sampling = |sampling| v1::GenerateRequest {
        sampling: Some(sampling),
        ..text("x")
    };
    let max_tokens = |count| {
        sampling(v1::Sampling {
            max_tokens: Some(count),
            ..v1::Sampling::default()
        })
    };
    let cases = [
        (max_tokens(0), Code::InvalidArgument, "max_tokens"),
        (max_tokens(1 << 63), Code::InvalidArgument, "max_tokens"),
        (text(""), Code::InvalidArgument, "prompt"),
        (text(&"x".repeat(20_000)), Code::InvalidArgument, "prompt"),
        (v1::GenerateRequest::default(), Code::InvalidArgument, "input"),
        (
            v1::GenerateRequest {
                model: "other".into(),
                ..text("x")
            },
            Code::NotFound,
            "model",
        ),
        (
            v1::GenerateRequest {
                request_id: "7".into(),
                ..text("x")
            },
            Code::InvalidArgument,
            "request_id",
        ),
        (
            v1::GenerateRequest {
                tenant: "t".repeat(257),
                ..text("x")
            },
            Code::InvalidArgument,
            "tenant",
        ),
        (
            v1::GenerateRequest {
                ttft_slo_ms: f64::NAN,
                ..text("x")
            },
            Code::InvalidArgument,
            "ttft_slo_ms",
        ),
        (
            sampling(v1::Sampling {
                temperature: Some(f32::NAN),
                ..v1::Sampling::default()
            }),
            Code::InvalidArgument,
            "temperature",
        ),
        (
            sampling(v1::Sampling {
                logprobs: Some(1000),
                ..v1::Sampling::default()
            }),
            Code::InvalidArgument,
            "top_logprobs",
        ),
        (
            v1::GenerateRequest {
                input: Some(Input::Chat(v1::ChatMessages::default())),
                ..v1::GenerateRequest::default()
            },
            Code::InvalidArgument,
            "messages",
        ),
    ];
    for (request, code, param) in cases {
        let status = events(&router, request.clone())
            .await
            .expect_err("must be refused");
        assert_eq!(status.code(), code, "{request:?} got {status:?}");
        let error: Error = proto::status::from_status(&status);
        assert_eq!(error.param.as_deref(), Some(param), "{request:?} got {error:?}");
    }
    assert!(node.requests().is_empty());
}

#[tokio::test]
async fn a_stream_that_fails_ends_with_a_status() {
    let fixture = Fixture::new();
    let fail = || {
        vec![
            Step::Tokens(vec![1], "x"),
            Step::Fail(Error::internal("the engine failed")),
        ]
    };
    let node = fixture.decode("d0", move |_| fail());
    let router = Router::start(&fixture, config(), &[&node]).await;
    let status = events(&router, text("x")).await.expect_err("the node failed");
    assert_eq!(
        (status.code(), status.message()),
        (Code::Internal, "the engine failed")
    );
}

#[tokio::test]
async fn models_and_nodes_are_told() {
    let fixture = Fixture::new();
    let (prefill, decode) = (fixture.prefill("p0"), fixture.decode("d0", |_| greeting()));
    let router = Router::start(&fixture, config(), &[&prefill, &decode]).await;
    let models = client(&router)
        .list_models(v1::ListModelsRequest {})
        .await
        .expect("served")
        .into_inner();
    assert_eq!(models.models[0].name, "tiny");
    assert_eq!(models.models[0].context_tokens_max, 4096);
    assert_eq!(models.models[0].model_digest, fixture.model.digest());
    let status = client(&router)
        .cluster_status(v1::ClusterStatusRequest {})
        .await
        .expect("served");
    let nodes = status.into_inner().nodes;
    let records: Vec<NodeRecord> = nodes
        .iter()
        .map(|node| proto::convert::record(&node.record_json).expect("readable"))
        .collect();
    assert_eq!(records, [decode.record.clone(), prefill.record.clone()]);
    assert!(
        nodes
            .iter()
            .all(|node| node.connected && node.load_json.contains("\"decode_step_ms\":5.0"))
    );
}

#[tokio::test]
async fn reflection_lists_what_can_be_called() {
    let fixture = Fixture::new();
    let router = Router::start(&fixture, config(), &[]).await;
    let channel = node::channel(&router.grpc.to_string()).expect("an address");
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = ServerReflectionClient::new(channel)
        .server_reflection_info(futures::stream::iter([request]))
        .await
        .expect("served");
    let answer = answers
        .into_inner()
        .message()
        .await
        .expect("an answer")
        .expect("an answer");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for name in [
        "perigee.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
    ] {
        assert!(
            names.iter().any(|found| found == name),
            "{name} is not in {names:?}"
        );
    }
}

/// The log of a node that holds the full blocks of `tokens`.
pub(crate) fn held(fixture: &Fixture, tenant: &str, tokens: &[u32]) -> Vec<BlockEvent> {
    let mut parent = fixture.space.with_tenant(tenant).root();
    let hashes = parent.chain(tokens, fixture.space.layout.block_tokens);
    let events = hashes.into_iter().map(|hash| {
        let stored = BlockEvent::Stored {
            hash,
            parent,
            tier: Tier::Host,
        };
        parent = hash;
        stored
    });
    events.collect()
}

#[tokio::test]
async fn a_request_goes_to_the_node_that_holds_its_prefix() {
    let fixture = Fixture::new();
    let conversation: Vec<u32> = (0..100).collect();
    let script = |_: &v1::DecodeRequest| greeting();
    let nodes: Vec<FakeNode> = (0..4)
        .map(|n| {
            let blocks = if n == 2 {
                held(&fixture, "", &conversation)
            } else {
                Vec::new()
            };
            FakeNode::with_blocks(&fixture.space, &format!("d{n}"), Role::Decode, blocks, script)
        })
        .collect();
    let router = Router::start(&fixture, config(), &nodes.iter().collect::<Vec<_>>()).await;
    let request = v1::GenerateRequest {
        input: Some(Input::Tokens(v1::TokenIds { ids: conversation })),
        ..v1::GenerateRequest::default()
    };
    for _ in 0..3 {
        events(&router, request.clone()).await.expect("served");
    }
    assert_eq!(nodes[2].requests().len(), 3);
    let status = client(&router)
        .cluster_status(v1::ClusterStatusRequest {})
        .await
        .expect("served");
    let indexed: Vec<u64> = status
        .into_inner()
        .nodes
        .iter()
        .map(|node| node.indexed_blocks)
        .collect();
    assert_eq!(indexed, [0, 0, 12, 0]);
}

#[tokio::test]
async fn a_node_elsewhere_is_told_where_the_prefix_is() {
    let fixture = Fixture::new();
    let conversation: Vec<u32> = (0..100).collect();
    let script = |_: &v1::DecodeRequest| greeting();
    let store = FakeNode::with_blocks(
        &fixture.space,
        "s0",
        Role::Store,
        held(&fixture, "acme", &conversation),
        script,
    );
    let decode = fixture.decode("d0", script);
    let router = Router::start(&fixture, config(), &[&store, &decode]).await;
    let request = |tenant: &str| v1::GenerateRequest {
        input: Some(Input::Tokens(v1::TokenIds {
            ids: conversation.clone(),
        })),
        tenant: tenant.into(),
        ..v1::GenerateRequest::default()
    };
    events(&router, request("acme")).await.expect("served");
    events(&router, request("")).await.expect("served");
    let requests = decode.requests();
    let source = &requests[0].sources[0];
    assert_eq!((source.node_id.as_str(), source.blocks), ("s0", 12));
    assert_eq!(source.grpc_endpoint, store.record.grpc_endpoint);
    assert!(requests[1].sources.is_empty(), "tenants share no cache");
}

#[tokio::test]
async fn while_a_request_waits_the_holder_of_its_prompt_is_told_to_read_its_disk() {
    let fixture = Fixture::new();
    let conversation: Vec<u32> = (0..100).collect();
    let mut blocks = held(&fixture, "acme", &conversation);
    for event in &mut blocks[5..] {
        if let BlockEvent::Stored { tier, .. } = event {
            *tier = Tier::Disk;
        }
    }
    let store = FakeNode::with_blocks(&fixture.space, "s0", Role::Store, blocks, |_| greeting());
    let decode = fixture.decode("d0", |request| match request.prompt.len() {
        1 => vec![Step::Hang],
        _ => greeting(),
    });
    let narrow = router::Config {
        running_requests_max: 1,
        ..config()
    };
    let router = Router::start(&fixture, narrow, &[&store, &decode]).await;
    let request = |ids: &[u32]| v1::GenerateRequest {
        input: Some(Input::Tokens(v1::TokenIds { ids: ids.to_vec() })),
        tenant: "acme".into(),
        ..v1::GenerateRequest::default()
    };
    let first = client(&router).generate(request(&[65])).await.expect("begun");
    decode.open_streams(1).await;
    let second = events(&router, request(&conversation));
    let rest = async {
        let hints = store.hints().await;
        assert_eq!(hints.len(), 1);
        assert_eq!(hints[0].kv_root, fixture.space.root().0);
        assert_eq!(hints[0].hashes.len(), 12, "as far as the store holds it");
        drop(first);
    };
    let (second, ()) = tokio::join!(second, rest);
    second.expect("served");
}
