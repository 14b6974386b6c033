//! A real model, real processes, real clients.

#![allow(missing_docs)]

use std::process::Command;

use proto::v1;
use serde_json::Value;
use tests::{Cluster, Generated, generate, model, root};

const BLOCK_TOKENS: u64 = 32;

fn chat(messages: &[(&str, &str)], max_tokens: u64) -> v1::GenerateRequest {
    let messages = messages
        .iter()
        .map(|(role, content)| v1::ChatMessage {
            role: (*role).into(),
            content: (*content).into(),
        })
        .collect();
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Chat(v1::ChatMessages { messages })),
        sampling: Some(v1::Sampling {
            max_tokens: Some(max_tokens),
            ..v1::Sampling::default()
        }),
        ..v1::GenerateRequest::default()
    }
}

/// Renders and tokenises as the router does.
fn chat_tokens(messages: &[(&str, &str)]) -> Vec<types::Token> {
    let file = engine::file::ModelFile::open(model()).expect("model");
    let tokenizer = file.tokenizer().expect("tokenizer");
    let template = file
        .chat_template(&tokenizer)
        .expect("template")
        .expect("the model has one");
    let messages: Vec<Value> = messages
        .iter()
        .map(|(role, content)| serde_json::json!({ "role": role, "content": content }))
        .collect();
    let options = engine::chat::ChatOptions {
        add_generation_prompt: true,
        ..Default::default()
    };
    let text = template.render(&messages, &options).expect("renders");
    tokenizer.encode(&text, true)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_turn_hits_every_full_block_on_other_nodes_too() {
    let arguments = &[
        "--prefill",
        "2",
        "--decode",
        "2",
        "--set",
        "router.policy=round_robin",
    ];
    let cluster = Cluster::start(&model(), arguments);
    let mut client = cluster.client().await;
    let system = "You are a patient teacher who explains every step. ".repeat(12);
    let mut messages = vec![
        ("system", system.as_str()),
        ("user", "Name three primary colors."),
    ];
    let first: Generated = generate(&mut client, chat(&messages, 48))
        .await
        .expect("first turn");
    let before: Vec<_> = chat_tokens(&messages)
        .into_iter()
        .chain(first.tokens.clone())
        .collect();
    let answer = first.text.clone();
    messages.extend([
        ("assistant", answer.as_str()),
        ("user", "Mix the first two. What do you get?"),
    ]);
    let prompt = chat_tokens(&messages);
    let shared = prompt.iter().zip(&before).take_while(|(a, b)| a == b).count() as u64;
    tests::wait_for_index(&mut client, before.len() as u64 / BLOCK_TOKENS).await;
    let second = generate(&mut client, chat(&messages, 48))
        .await
        .expect("second turn");
    assert_ne!(
        first.report().prefill_node,
        second.report().prefill_node,
        "another prefill node"
    );
    assert_ne!(
        first.report().decode_node,
        second.report().decode_node,
        "another decode node"
    );
    assert_eq!(second.usage().prompt_tokens, prompt.len() as u64);
    assert_eq!(
        second.usage().cached_tokens,
        shared / BLOCK_TOKENS * BLOCK_TOKENS,
        "of {shared} shared tokens"
    );
    assert!(
        second.usage().cached_tokens >= 5 * BLOCK_TOKENS,
        "the test must share something"
    );
    assert!(
        second.report().fetched_bytes > 0,
        "the other prefill node fetched the prefix"
    );
}

fn python(script: &str, arguments: &[&str]) -> Value {
    let python = root().join(".venv/bin/python");
    assert!(
        python.is_file(),
        "{} is missing: make setup-test",
        python.display()
    );
    let output = Command::new(python)
        .arg(root().join("tests/python").join(script))
        .args(arguments)
        .output()
        .expect("start python");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {errors}");
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_openai_client_and_a_reflection_client_are_served() {
    let cluster = Cluster::start(&model(), &["--prefill", "1", "--decode", "1"]);
    let seen = python("openai_client.py", &[&cluster.ready.http]);
    let streamed = seen["streamed"].as_str().expect("text");
    assert!(
        streamed.contains("100") && streamed.contains("degrees Celsius"),
        "{streamed}"
    );
    assert_eq!(seen["whole"], seen["streamed"], "streaming changes nothing");
    assert_eq!(
        seen["logprob_tokens"], seen["whole"],
        "every token has its log-probability"
    );
    assert_eq!(
        seen["completion"]
            .as_str()
            .expect("text")
            .trim_start()
            .chars()
            .take(5)
            .collect::<String>(),
        "Paris"
    );
    let usage = &seen["usage"];
    assert_eq!(
        usage["total_tokens"],
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );
    assert!(usage["prompt_tokens_details"]["cached_tokens"].is_u64());
    for (name, status, param) in [
        ("unknown_model", 404, "model"),
        ("empty_messages", 400, "messages"),
        ("n_2", 400, "n"),
        ("tools", 400, "tools"),
        ("max_tokens_0", 400, "max_tokens"),
        ("max_tokens_2_63", 400, "max_tokens"),
        ("long_prompt", 400, "prompt"),
        ("empty_prompt", 400, "prompt"),
    ] {
        let error = &seen["errors"][name];
        assert_eq!(
            (error["status"].as_u64(), error["param"].as_str()),
            (Some(status), Some(param)),
            "{name}: {error}"
        );
    }

    let target = cluster.ready.grpc.trim_start_matches("http://").to_owned();
    let request = r#"{"prompt": "The capital of France is", "sampling": {"max_tokens": 4}}"#;
    let seen = python("reflection_client.py", &[&target, request]);
    let services: Vec<&str> = seen["services"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    for service in [
        "perigee.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    ] {
        assert!(services.contains(&service), "{services:?}");
    }
    let events = seen["events"].as_array().unwrap();
    let text: String = events
        .iter()
        .filter_map(|event| event["tokens"]["text"].as_str())
        .collect();
    assert!(text.contains("Paris"), "{text}");
    assert_eq!(events.last().unwrap()["finished"]["reason"], "length");
}
