//! What an HTTP client sees.

use rstest::rstest;
use serde_json::{Value, json};
use types::Error;

use crate::harness::{Fixture, Router, Step, config, greeting, usage};

fn hello() -> Value {
    json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hello" }] })
}

fn with(mut base: Value, more: Value) -> Value {
    let object = base.as_object_mut().expect("an object");
    object.extend(more.as_object().expect("an object").clone());
    base
}

/// Takes out what differs from run to run, after checking its form.
fn stable(mut value: Value) -> Value {
    let object = value.as_object_mut().expect("an object");
    let id = object["id"].as_str().expect("an id").to_owned();
    let (prefix, digits) = id.split_once('-').expect("a prefix");
    assert!(
        matches!(prefix, "chatcmpl" | "cmpl") && digits.len() == 32,
        "{id}"
    );
    object.insert("id".into(), prefix.into());
    assert!(object["created"].as_u64().expect("a time") > 1_700_000_000);
    object.shift_remove("created");
    let fingerprint = object.shift_remove("system_fingerprint").expect("a fingerprint");
    assert!(fingerprint.as_str().expect("text").starts_with("fp_"));
    value
}

async fn one_node(steps: fn() -> Vec<Step>) -> (Router, crate::harness::FakeNode, Fixture) {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", move |_| steps());
    let router = Router::start(&fixture, config(), &[&node]).await;
    (router, node, fixture)
}

#[tokio::test]
async fn a_chat_is_answered_in_openai_s_form() {
    let (router, node, _fixture) = one_node(greeting).await;
    let response = router.post("/v1/chat/completions", hello()).await;
    assert_eq!(response.status, 200, "{}", response.body);
    let mut body = stable(response.json());
    let report = body
        .as_object_mut()
        .expect("an object")
        .shift_remove("perigee")
        .expect("a report");
    assert_eq!(
        body,
        json!({
            "id": "chatcmpl",
            "object": "chat.completion",
            "model": "tiny",
            "choices": [{
                "index": 0,
                "message": { "role": "assistant", "content": "Hi there", "refusal": null },
                "logprobs": null,
                "finish_reason": "stop",
            }],
            "usage": {
                "prompt_tokens": 9,
                "completion_tokens": 3,
                "total_tokens": 12,
                "prompt_tokens_details": { "cached_tokens": 4 },
            },
        })
    );
    assert_eq!(report["decode_node"], "scripted");
    assert_eq!(report["placements"], 1);
    assert!(report["ttft_ms"].as_f64().expect("a number") > 0.0);
    assert!(report["ttft_predicted_ms"].as_f64().expect("a number") > 0.0);
    let request = &node.requests()[0];
    assert_eq!(response.headers["x-request-id"], request.request_id);
    let sampling = request.sampling.as_ref().expect("always sent");
    // OpenAI's default, and all that the context leaves.
    assert_eq!(sampling.temperature, Some(1.0));
    assert_eq!(sampling.max_tokens, Some(4096 - request.prompt.len() as u64));
}

#[tokio::test]
async fn a_chat_streams_role_text_reason_usage_and_done() {
    let (router, _node, _fixture) = one_node(greeting).await;
    let body = with(
        hello(),
        json!({ "stream": true, "stream_options": { "include_usage": true } }),
    );
    let response = router.post("/v1/chat/completions", body).await;
    assert_eq!(response.status, 200);
    let mut chunks: Vec<Value> = response.chunks().into_iter().map(stable).collect();
    let mut last = chunks.pop().expect("a usage chunk");
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["total_tokens"], 12);
    assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], 4);
    assert_eq!(last["perigee"].take()["decode_node"], "scripted");
    let chunk = |delta: Value, reason: Value| {
        json!({
            "id": "chatcmpl",
            "object": "chat.completion.chunk",
            "model": "tiny",
            "choices": [{ "index": 0, "delta": delta, "logprobs": null, "finish_reason": reason }],
            "usage": null,
        })
    };
    assert_eq!(
        chunks,
        [
            chunk(json!({ "role": "assistant", "content": "" }), Value::Null),
            chunk(json!({ "content": "Hi" }), Value::Null),
            chunk(json!({ "content": " there" }), Value::Null),
            chunk(json!({}), json!("stop")),
        ]
    );
}

#[tokio::test]
async fn a_stream_has_usage_only_where_it_was_asked_for() {
    let (router, _node, _fixture) = one_node(greeting).await;
    let response = router
        .post("/v1/chat/completions", with(hello(), json!({ "stream": true })))
        .await;
    let chunks = response.chunks();
    assert_eq!(chunks.len(), 4);
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk.get("usage").is_none() && chunk.get("perigee").is_none())
    );
}

#[tokio::test]
async fn a_completion_takes_text_or_tokens() {
    let (router, node, fixture) = one_node(greeting).await;
    let text = json!({ "model": "tiny", "prompt": "once upon" });
    let body = stable(router.post("/v1/completions", text).await.json());
    assert_eq!(body["object"], "text_completion");
    assert_eq!(
        body["choices"],
        json!([{ "index": 0, "text": "Hi there", "logprobs": null, "finish_reason": "stop" }])
    );
    let tokens = fixture.model.tokens_of_text("once upon");
    let list = json!({ "model": "tiny", "prompt": tokens, "stream": true });
    let chunks = router.post("/v1/completions", list).await.chunks();
    let texts: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["text"]).collect();
    assert_eq!(texts, [&json!("Hi"), &json!(" there"), &json!("")]);
    assert_eq!(chunks[2]["choices"][0]["finish_reason"], "stop");
    let requests = node.requests();
    assert_eq!(requests[0].prompt, requests[1].prompt);
    assert_eq!(requests[0].sampling.as_ref().expect("sent").max_tokens, Some(16));
}

#[tokio::test]
async fn every_parameter_reaches_the_node() {
    let (router, node, _fixture) = one_node(greeting).await;
    let body = with(
        hello(),
        json!({
            "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5,
            "presence_penalty": 0.75, "frequency_penalty": -0.5, "seed": -1, "max_completion_tokens": 5,
            "stop": ["a", "b"], "stop_token_ids": [3], "ignore_eos": true, "logit_bias": { "5": -100 },
            "n": 1, "user": "someone", "response_format": { "type": "text" }, "logprobs": true, "top_logprobs": 2,
            "store": null,
        }),
    );
    let response = router
        .send(
            "POST",
            "/v1/chat/completions",
            &[("x-perigee-tenant", "acme"), ("x-request-id", &"ab".repeat(16))],
            body.to_string().as_bytes(),
        )
        .await;
    assert_eq!(response.status, 200, "{}", response.body);
    let request = &node.requests()[0];
    assert_eq!(
        (request.tenant.as_str(), request.request_id.clone()),
        ("acme", "ab".repeat(16))
    );
    let sampling = request.sampling.clone().expect("always sent");
    assert_eq!(
        sampling,
        proto::v1::Sampling {
            temperature: Some(0.5),
            top_k: Some(7),
            top_p: Some(0.25),
            min_p: Some(0.125),
            repetition_penalty: Some(1.5),
            presence_penalty: Some(0.75),
            frequency_penalty: Some(-0.5),
            logit_bias: [(5, -100.0)].into(),
            seed: Some(u64::MAX),
            max_tokens: Some(5),
            stop: vec!["a".into(), "b".into()],
            stop_tokens: vec![3],
            ignore_eos: true,
            logprobs: Some(2),
        }
    );
}

#[tokio::test]
async fn content_parts_are_their_text() {
    let (router, node, _fixture) = one_node(greeting).await;
    let parts = json!([{ "type": "text", "text": "hel" }, { "type": "text", "text": "lo" }]);
    let parts = json!({ "model": "tiny", "messages": [{ "role": "user", "content": parts }] });
    for body in [hello(), parts] {
        assert_eq!(router.post("/v1/chat/completions", body).await.status, 200);
    }
    let requests = node.requests();
    assert_eq!(requests[0].prompt, requests[1].prompt);
}

fn scored() -> Vec<Step> {
    vec![
        Step::Logprobs(72, "H", vec![(72, -0.5), (73, -1.5)]),
        Step::Logprobs(105, "i", vec![(105, -0.25), (106, -2.0)]),
        Step::Finish("length", usage(1, 2, 0)),
    ]
}

#[tokio::test]
async fn logprobs_come_in_the_form_of_each_api() {
    let (router, _node, fixture) = one_node(scored).await;
    let name = |token: u32| String::from_utf8_lossy(fixture.model.token_bytes(token)).into_owned();
    let bytes = |token: u32| fixture.model.token_bytes(token).to_vec();
    let entry =
        |token: u32, logprob: f64| json!({ "token": name(token), "logprob": logprob, "bytes": bytes(token) });
    let wanted = json!({ "logprobs": true, "top_logprobs": 2 });
    let body = router
        .post("/v1/chat/completions", with(hello(), wanted.clone()))
        .await
        .json();
    let first = with(
        entry(72, -0.5),
        json!({ "top_logprobs": [entry(72, -0.5), entry(73, -1.5)] }),
    );
    assert_eq!(body["choices"][0]["logprobs"]["content"][0], first);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    let streamed = with(with(hello(), wanted), json!({ "stream": true }));
    let chunks = router.post("/v1/chat/completions", streamed).await.chunks();
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["content"], json!([first]));

    let body = json!({ "model": "tiny", "prompt": "x", "logprobs": 2 });
    let body = router.post("/v1/completions", body).await.json();
    let mut top = [json!({}), json!({})];
    for (column, (token, logprob)) in [
        (0, (72, -0.5)),
        (0, (73, -1.5)),
        (1, (105, -0.25)),
        (1, (106, -2.0)),
    ] {
        top[column][name(token)] = json!(logprob);
    }
    assert_eq!(
        body["choices"][0]["logprobs"],
        json!({
            "tokens": [name(72), name(105)],
            "token_logprobs": [-0.5, -0.25],
            "top_logprobs": top,
            "text_offset": [0, 1],
        })
    );
}

#[tokio::test]
async fn models_are_listed_and_named() {
    let (router, _node, _fixture) = one_node(greeting).await;
    let list = router.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], "tiny");
    assert_eq!(list["data"][0]["object"], "model");
    assert_eq!(router.get("/v1/models/tiny").await.json(), list["data"][0]);
    let missing = router.get("/v1/models/org/other").await;
    assert_eq!(
        (missing.status, missing.json()["error"]["code"].clone()),
        (404, json!("model_not_found"))
    );
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn what_is_wrong_is_named() {
    let (router, node, _fixture) = one_node(greeting).await;
    let chat = |more: Value| with(hello(), more);
    let text = |more: Value| with(json!({ "model": "tiny", "prompt": "x" }), more);
    let messages = |list: Value| json!({ "model": "tiny", "messages": list });
    let user = |more: Value| messages(json!([with(json!({ "role": "user", "content": "x" }), more)]));
    let cases = [
        // What is not supported, or not known.
        (CHAT, chat(json!({ "tools": [] })), 400, "tools", "invalid"),
        (CHAT, chat(json!({ "audio": null })), 400, "audio", "invalid"),
        (
            CHAT,
            chat(json!({ "frobnicate": 1 })),
            400,
            "frobnicate",
            "invalid",
        ),
        (CHAT, chat(json!({ "n": 2 })), 400, "n", "invalid"),
        (
            CHAT,
            chat(json!({ "response_format": { "type": "json_object" } })),
            400,
            "response_format",
            "invalid",
        ),
        (CHAT, chat(json!({ "prompt": "x" })), 400, "prompt", "invalid"),
        (
            CHAT,
            chat(json!({ "stream_options": {} })),
            400,
            "stream_options",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "stream": true, "stream_options": { "x": 1 } })),
            400,
            "stream_options.x",
            "invalid",
        ),
        (TEXT, text(json!({ "echo": true })), 400, "echo", "invalid"),
        (TEXT, text(json!({ "suffix": "x" })), 400, "suffix", "invalid"),
        (TEXT, text(json!({ "best_of": 2 })), 400, "best_of", "invalid"),
        (TEXT, text(json!({ "messages": [] })), 400, "messages", "invalid"),
        (
            TEXT,
            text(json!({ "prompt": ["a", "b"] })),
            400,
            "prompt",
            "invalid",
        ),
        (
            TEXT,
            text(json!({ "prompt": [[1], [2]] })),
            400,
            "prompt",
            "invalid",
        ),
        (
            CHAT,
            user(json!({ "name": "x" })),
            400,
            "messages[0].name",
            "invalid",
        ),
        (
            CHAT,
            user(json!({ "role": "tool" })),
            400,
            "messages[0].role",
            "invalid",
        ),
        (
            CHAT,
            user(json!({ "content": null })),
            400,
            "messages[0].content",
            "invalid",
        ),
        (
            CHAT,
            user(json!({ "content": [{ "type": "image_url", "image_url": {} }] })),
            400,
            "messages[0].content[0].type",
            "invalid",
        ),
        // Wrong types and ranges.
        (
            CHAT,
            chat(json!({ "temperature": "hot" })),
            400,
            "temperature",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "temperature": 3 })),
            400,
            "temperature",
            "invalid",
        ),
        (CHAT, chat(json!({ "top_p": 0 })), 400, "top_p", "invalid"),
        (CHAT, chat(json!({ "top_k": -1 })), 400, "top_k", "invalid"),
        (CHAT, chat(json!({ "stop": [1] })), 400, "stop", "invalid"),
        (CHAT, chat(json!({ "stop": "" })), 400, "stop", "invalid"),
        (
            CHAT,
            chat(json!({ "logit_bias": { "x": 1 } })),
            400,
            "logit_bias",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "logit_bias": { "9999": 1 } })),
            400,
            "logit_bias",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "logprobs": true, "top_logprobs": 21 })),
            400,
            "top_logprobs",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "top_logprobs": 2 })),
            400,
            "top_logprobs",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "max_tokens": 0 })),
            400,
            "max_tokens",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "max_tokens": 1_u64 << 63 })),
            400,
            "max_tokens",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "max_tokens": -1 })),
            400,
            "max_tokens",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "max_tokens": 1, "max_completion_tokens": 2 })),
            400,
            "max_completion_tokens",
            "invalid",
        ),
        (CHAT, chat(json!({ "seed": 1.5 })), 400, "seed", "invalid"),
        (CHAT, chat(json!({ "stream": "yes" })), 400, "stream", "invalid"),
        (
            CHAT,
            chat(json!({ "ttft_slo_ms": -5 })),
            400,
            "ttft_slo_ms",
            "invalid",
        ),
        (
            CHAT,
            chat(json!({ "service_tier": "scale" })),
            400,
            "service_tier",
            "invalid",
        ),
        // The prompt.
        (CHAT, messages(json!([])), 400, "messages", "invalid"),
        (CHAT, messages(json!("x")), 400, "messages", "invalid"),
        (CHAT, json!({ "model": "tiny" }), 400, "messages", "invalid"),
        (TEXT, json!({ "model": "tiny" }), 400, "prompt", "invalid"),
        (TEXT, text(json!({ "prompt": "" })), 400, "prompt", "invalid"),
        (TEXT, text(json!({ "prompt": [] })), 400, "prompt", "invalid"),
        (
            TEXT,
            text(json!({ "prompt": [99_999] })),
            400,
            "prompt",
            "invalid",
        ),
        (TEXT, text(json!({ "prompt": [-1] })), 400, "prompt", "invalid"),
        (
            TEXT,
            text(json!({ "prompt": vec![1; 4096] })),
            400,
            "prompt",
            "context_length_exceeded",
        ),
        // The model.
        (
            CHAT,
            chat(json!({ "model": "gpt-4o" })),
            404,
            "model",
            "model_not_found",
        ),
        (TEXT, json!({ "prompt": "x" }), 400, "model", "invalid"),
    ];
    for (path, body, status, param, code) in cases {
        let response = router.post(path, &body).await;
        let found = response.json();
        let error = &found["error"];
        assert_eq!(response.status, status, "{body} got {found}");
        assert_eq!(error["param"], param, "{body} got {found}");
        assert_eq!(error["code"], code, "{body} got {found}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|message| !message.is_empty())
        );
        assert_eq!(response.headers["x-request-id"].len(), 32);
    }
    assert!(node.requests().is_empty(), "a bad request reached a node");
}

#[tokio::test]
async fn what_is_no_request_is_refused() {
    let (router, _node, _fixture) = one_node(greeting).await;
    let bodies: [&[u8]; 5] = [b"", b"{", b"[1]", b"{\"model\": \"\xff\xfe\"}", b"nonsense"];
    for body in bodies {
        let response = router.send("POST", CHAT, &[], body).await;
        assert_eq!(
            (response.status, response.json()["error"]["code"].clone()),
            (400, json!("invalid"))
        );
    }
    let unknown = router.get("/v1/embeddings").await;
    assert_eq!(
        (unknown.status, unknown.json()["error"]["code"].clone()),
        (404, json!("not_found"))
    );
    let method = router.get(CHAT).await;
    assert_eq!(
        (method.status, method.json()["error"]["type"].clone()),
        (405, json!("invalid_request_error"))
    );
}

#[tokio::test]
async fn a_body_above_the_limit_is_refused() {
    let fixture = Fixture::new();
    let node = fixture.decode("d0", |_| greeting());
    let limit = router::Config {
        body_bytes_max: node::config::ByteSize(1000),
        ..config()
    };
    let router = Router::start(&fixture, limit, &[&node]).await;
    let long = json!({ "model": "tiny", "prompt": "x".repeat(1000) });
    let response = router.post(TEXT, long).await;
    assert_eq!(response.status, 400);
    assert!(response.body.contains("1000 bytes"), "{}", response.body);
}

#[rstest]
#[case(
    Error::overloaded("the batch is full", 2_500),
    429,
    "rate_limit_error",
    Some("3")
)]
#[case(Error::new(types::ErrorCode::Timeout, "too late"), 504, "timeout_error", None)]
#[case(Error::unavailable("draining"), 503, "server_error", None)]
#[case(Error::internal("a defect"), 500, "server_error", None)]
#[tokio::test]
async fn a_node_s_error_keeps_its_code(
    #[case] error: Error,
    #[case] status: u16,
    #[case] kind: &str,
    #[case] retry_after: Option<&str>,
) {
    let fixture = Fixture::new();
    let failing = error.clone();
    let node = fixture.decode("d0", move |_| vec![Step::Fail(failing.clone())]);
    let router = Router::start(&fixture, config(), &[&node]).await;
    let streamed = with(hello(), json!({ "stream": true }));
    for body in [hello(), streamed] {
        let response = router.post(CHAT, body).await;
        assert_eq!(response.status, status, "{}", response.body);
        assert_eq!(response.json()["error"]["type"], kind);
        assert_eq!(response.json()["error"]["message"], error.message.as_str());
        assert_eq!(
            response.headers.get("retry-after").map(String::as_str),
            retry_after
        );
    }
    router.idle().await;
}

#[tokio::test]
async fn a_limit_that_cannot_be_met_is_429_before_any_node_is_asked() {
    let (router, node, _fixture) = one_node(greeting).await;
    let response = router
        .post(CHAT, with(hello(), json!({ "ttft_slo_ms": 0.001 })))
        .await;
    assert_eq!(response.status, 429, "{}", response.body);
    assert!(
        response.json()["error"]["message"]
            .as_str()
            .expect("text")
            .contains("predicted")
    );
    assert_eq!(response.headers["retry-after"], "1");
    let error = &response.json()["error"];
    assert_eq!(error["constraint"], "ttft");
    assert!(error["ttft_predicted_ms"].as_f64().expect("a number") > 0.001);
    assert!(node.requests().is_empty());
    let response = router
        .post(CHAT, with(hello(), json!({ "tbt_slo_ms": 0.001 })))
        .await;
    assert_eq!(response.status, 429, "{}", response.body);
    assert_eq!(response.json()["error"]["constraint"], "tbt");
    assert!(node.requests().is_empty());
    router.idle().await;
    let metrics = router.get("/metrics").await.body;
    for constraint in ["ttft", "tbt"] {
        let line = format!("perigee_router_rejections_total{{constraint=\"{constraint}\"}} 1");
        assert!(metrics.contains(&line), "{metrics}");
    }
}

fn broken_stream() -> Vec<Step> {
    let error = Error::internal("the engine failed");
    vec![Step::Tokens(vec![72], "H"), Step::Fail(error)]
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_an_error_event_and_the_end() {
    let (router, _node, _fixture) = one_node(broken_stream).await;
    let response = router.post(CHAT, with(hello(), json!({ "stream": true }))).await;
    assert_eq!(response.status, 200);
    let events = response.events();
    let (name, data) = events.last().expect("events");
    assert_eq!(name, "error");
    let error: Value = serde_json::from_str(data).expect("JSON");
    assert_eq!(error["error"]["code"], "internal");
    assert_eq!(error["error"]["message"], "the engine failed");
    assert!(events.iter().all(|(_, data)| data != "[DONE]"));
    // In one piece there is no half an answer.
    let response = router.post(CHAT, hello()).await;
    assert_eq!(
        (response.status, response.json()["error"]["code"].clone()),
        (500, json!("internal"))
    );
}
