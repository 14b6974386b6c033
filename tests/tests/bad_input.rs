//! What cannot be served is refused with a typed error that names what is wrong, and nothing dies of it.

#![allow(missing_docs)]

use std::fs;
use std::path::Path;
use std::process::Command;

use engine::fixture::{TinyModel, write_tiny_hf};
use proto::v1;
use proto::v1::generate_request::Input;
use rstest::rstest;
use tests::{Cluster, generate, perigee, tiny};
use types::ErrorCode;

fn prompt(text: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(Input::Prompt(text.into())),
        ..v1::GenerateRequest::default()
    }
}

fn with_max_tokens(value: u64) -> v1::GenerateRequest {
    v1::GenerateRequest {
        sampling: Some(v1::Sampling {
            max_tokens: Some(value),
            ..v1::Sampling::default()
        }),
        ..prompt("hello")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_typed_errors_and_the_cluster_lives() {
    let folder = tempfile::tempdir().expect("folder");
    let cluster = Cluster::start(&tiny(folder.path()), &["--prefill", "1", "--decode", "1"]);
    let mut client = cluster.client().await;
    let tokens = |ids| v1::GenerateRequest {
        input: Some(Input::Tokens(v1::TokenIds { ids })),
        ..Default::default()
    };
    let requests = [
        (
            "unknown model",
            v1::GenerateRequest {
                model: "nonsense".into(),
                ..prompt("hello")
            },
            ErrorCode::NotFound,
        ),
        ("no input", v1::GenerateRequest::default(), ErrorCode::Invalid),
        ("empty prompt", prompt(""), ErrorCode::Invalid),
        ("no tokens", tokens(vec![]), ErrorCode::Invalid),
        (
            "token outside the vocabulary",
            tokens(vec![1, u32::MAX]),
            ErrorCode::Invalid,
        ),
        (
            "prompt longer than the context",
            tokens(vec![1; 100_000]),
            ErrorCode::Invalid,
        ),
        ("max_tokens of 0", with_max_tokens(0), ErrorCode::Invalid),
        ("max_tokens of 2^63", with_max_tokens(1 << 63), ErrorCode::Invalid),
        (
            "bad request id",
            v1::GenerateRequest {
                request_id: "x".into(),
                ..prompt("hello")
            },
            ErrorCode::Invalid,
        ),
    ];
    for (what, request, code) in requests {
        let status = generate(&mut client, request)
            .await
            .err()
            .unwrap_or_else(|| panic!("{what} was served"));
        let error = proto::status::from_status(&status);
        assert_eq!(error.code, code, "{what}: {error}");
        assert!(!error.message.is_empty(), "{what}");
    }
    generate(&mut client, prompt("hello"))
        .await
        .expect("good requests are still served");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_bodies_are_refused_over_http() {
    let folder = tempfile::tempdir().expect("folder");
    let cluster = Cluster::start(&tiny(folder.path()), &["--prefill", "1", "--decode", "1"]);
    let url = format!("{}/v1/completions", cluster.ready.http);
    let bodies: [(&str, &[u8]); 5] = [
        (
            "invalid UTF-8",
            b"{\"model\": \"tiny\", \"prompt\": \"\xff\xfe\"}",
        ),
        ("no JSON", b"prompt=hello"),
        ("no object", b"[1]"),
        (
            "an unknown parameter",
            b"{\"model\": \"tiny\", \"prompt\": \"a\", \"no_such_thing\": 1}",
        ),
        ("nesting without end", &[b'['; 100_000]),
    ];
    for (what, body) in bodies {
        let path = folder.path().join("body");
        fs::write(&path, body).expect("write");
        let output = Command::new("curl")
            .args([
                "-s",
                "-w",
                "\n%{http_code}",
                "-H",
                "content-type: application/json",
                "--data-binary",
            ])
            .arg(format!("@{}", path.display()))
            .arg(&url)
            .output()
            .expect("curl");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').expect("status");
        assert_eq!(status, "400", "{what}: {body}");
        let error: serde_json::Value = serde_json::from_str(body).expect("an OpenAI error is JSON");
        assert!(error["error"]["message"].is_string(), "{what}: {body}");
        if what == "an unknown parameter" {
            assert_eq!(error["error"]["param"], "no_such_thing");
        }
    }
    let mut client = cluster.client().await;
    generate(&mut client, prompt("hello"))
        .await
        .expect("good requests are still served");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_one_block_serves_what_fits_and_says_what_does_not() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let layout = engine::Model::load(&model, engine::Precision::Fast)
        .expect("load")
        .layout(32);
    let memory = layout.block_bytes().to_string();
    let cluster = Cluster::start(
        &model,
        &["--prefill", "1", "--decode", "1", "--kv-memory", &memory],
    );
    let mut client = cluster.client().await;
    let served = generate(&mut client, prompt("hi"))
        .await
        .expect("a short prompt fits");
    assert_eq!(served.finished.reason, "length", "the pool is the context");
    let status = generate(&mut client, prompt(&"long ".repeat(50)))
        .await
        .expect_err("a long one does not");
    let error = proto::status::from_status(&status);
    assert_eq!(error.code, ErrorCode::Invalid, "{error}");
    assert!(error.message.contains("32"), "{error}");
    generate(&mut client, prompt("hi")).await.expect("still served");
}

/// Runs a role on a broken model: it must end by itself with a typed exit code and one line that names the file.
fn refused(path: &Path) -> String {
    let output = Command::new(perigee())
        .args(["decode", "--registry", "perigee://127.0.0.1:1", "--model"])
        .arg(path)
        .output()
        .expect("start");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output
        .status
        .code()
        .unwrap_or_else(|| panic!("ended by a signal: {errors}"));
    assert!([64, 65, 66].contains(&code), "exit code {code}: {errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    errors
}

#[rstest]
#[case::empty(0)]
#[case::magic_only(4)]
#[case::in_the_metadata(400)]
#[case::in_the_weights(200_000)]
fn a_truncated_gguf_is_refused(#[case] keep: usize) {
    let folder = tempfile::tempdir().expect("folder");
    let path = tiny(folder.path());
    let bytes = fs::read(&path).expect("read");
    assert!(bytes.len() > keep, "the model has {} bytes", bytes.len());
    fs::write(&path, &bytes[..keep]).expect("write");
    let errors = refused(&path);
    assert!(errors.contains("tiny.gguf"), "{errors}");
}

#[test]
fn a_safetensors_header_of_2_to_the_60_bytes_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    write_tiny_hf(
        folder.path(),
        &TinyModel {
            format: engine::tensor::TensorFormat::F32,
            ..TinyModel::default()
        },
        1,
    )
    .expect("write");
    let weights = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("read");
    bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    fs::write(&weights, bytes).expect("write");
    let errors = refused(folder.path());
    assert!(errors.contains("safetensors"), "{errors}");
}

#[rstest]
#[case::no_model(&["decode", "--registry", "perigee://127.0.0.1:1"], 64)]
#[case::missing_model(&["decode", "--registry", "perigee://127.0.0.1:1", "--model", "/nonexistent.gguf"], 66)]
#[case::no_registry(&["router", "--model", "/etc/hostname"], 64)]
#[case::unknown_command(&["launch"], 64)]
#[case::unknown_setting_value(&["config", "--set", "kv.memory=lots"], 64)]
#[case::block_tokens(&["config", "--block-tokens", "24"], 64)]
#[case::disk_without_capacity(&["config", "--set", "kv.disk_path=/nowhere"], 64)]
#[case::disk_threads(&["config", "--set", "kv.disk_path=/nowhere", "--set", "kv.disk_capacity=1GiB", "--set", "kv.disk_threads=1"], 64)]
#[case::disk_bypass(&["config", "--set", "kv.disk_path=/nowhere", "--set", "kv.disk_capacity=1GiB", "--set", "kv.disk_bypass_max=1s"], 64)]
#[case::huge_pages(&["config", "--set", "kv.huge_pages=maybe"], 64)]
#[case::unknown_catalogue_name(&["model", "pull", "no-such-model"], 66)]
#[case::no_router(&["status", "--router", "127.0.0.1:1"], 69)]
fn a_bad_command_line_ends_with_a_code_that_says_so(#[case] arguments: &[&str], #[case] code: i32) {
    let output = Command::new(perigee()).args(arguments).output().expect("start");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert!(!errors.is_empty());
}

#[test]
fn check_config_names_unknown_keys() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path());
    let file = folder.path().join("perigee.toml");
    fs::write(&file, "[decode]\nsequence_max = 4\n").expect("write");
    let run = |check: bool| {
        let mut command = Command::new(perigee());
        command
            .args(["decode", "--registry", "perigee://127.0.0.1:1", "--config"])
            .arg(&file);
        command
            .arg("--model")
            .arg(&model)
            .args(check.then_some("--check-config"));
        command.output().expect("start")
    };
    let output = run(true);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{errors}");
    assert!(
        errors.contains("sequence_max") && errors.contains("sequences_max"),
        "{errors}"
    );
    fs::write(&file, "[decode]\nsequences_max = 4\n").expect("write");
    assert_eq!(run(true).status.code(), Some(0));
}
