//! `perigee bench` against a real cluster: what it counts is what the router counts.

#![allow(missing_docs)]

use std::fs;
use std::process::Command;

use serde_json::Value;
use tests::{Cluster, model, perigee, wait_for};

fn bench(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(perigee())
        .args(["bench", "-o", "json"])
        .args(arguments)
        .output()
        .expect("start");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let code = output.status.code().expect("no signal ended it");
    (code, text(output.stdout), text(output.stderr))
}

fn measured(arguments: &[&str]) -> Value {
    let (code, printed, errors) = bench(arguments);
    assert_eq!(code, 0, "{arguments:?}: {errors}");
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
}

/// The router's counters, by name and labels.
fn metric(cluster: &Cluster, name: &str) -> u64 {
    let output = Command::new("curl")
        .args(["-sf", &format!("{}/metrics", cluster.ready.http)])
        .output()
        .expect("curl");
    let page = String::from_utf8(output.stdout).expect("UTF-8");
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0, |value| value.parse::<f64>().expect("a number") as u64)
}

const OK: &str = "perigee_router_requests_total{code=\"ok\"}";
const COMPLETION: &str = "perigee_router_completion_tokens_total";
const PROMPT: &str = "perigee_router_prompt_tokens_total";

/// Runs 20 requests, and compares with what the router's counters grew by.
fn agrees(cluster: &Cluster, arguments: &[&str]) -> Value {
    let read = || [OK, COMPLETION, PROMPT].map(|name| metric(cluster, name));
    let before = read();
    let lengths = [
        "--requests",
        "20",
        "--input-tokens",
        "40",
        "--output-tokens",
        "12",
    ];
    let report = measured(&[arguments, &lengths].concat());
    assert_eq!(report["requests"]["ok"], 20, "{report}");
    assert_eq!(
        (&report["requests"]["failed"], &report["requests"]["rejected"]),
        (&0.into(), &0.into())
    );
    let total = |name: &str| (report[name].as_f64().expect("a number") * 20.0).round() as u64;
    let counted = [20, total("output_tokens_mean"), total("input_tokens_mean")];
    wait_for("the router to have counted the last request", || {
        let now = read();
        let grown: Vec<u64> = now.iter().zip(before).map(|(now, before)| now - before).collect();
        (grown == counted).then_some(())
    });
    let ms = |name: &str, of: &str| report[name][of].as_f64().expect("a number");
    for name in ["ttft_ms", "tbt_ms", "tpot_ms", "latency_ms"] {
        assert!(
            ms(name, "mean") > 0.0 && ms(name, "p50") <= ms(name, "p99"),
            "{name}: {report}"
        );
        assert!(ms(name, "p99") <= ms(name, "max"), "{name}: {report}");
    }
    assert!(
        ms("latency_ms", "mean") > ms("ttft_ms", "mean") + 10.0 * ms("tpot_ms", "p50") / 2.0,
        "{report}"
    );
    report
}

#[test]
fn both_apis_are_measured_and_counted_as_the_router_counts() {
    let cluster = Cluster::start(&model(), &["--prefill", "1", "--decode", "1"]);
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let plot = cluster.folder.path().join("bench.svg");
    let plot = plot.to_str().expect("UTF-8");

    // The HTTP address comes from the router itself.
    let chat = agrees(
        &cluster,
        &[
            "--router",
            router,
            "--concurrency",
            "2",
            "--ttft",
            "1m",
            "--tbt",
            "1m",
            "--plot",
            plot,
        ],
    );
    assert_eq!(
        (&chat["goodput"]["met"], &chat["goodput"]["attainment"]),
        (&20.into(), &1.0.into())
    );
    assert!(fs::read_to_string(plot).expect("the plot").contains("</svg>"));

    // A word is a token, so lengths hold exactly where no template is around the prompt.
    let text = agrees(
        &cluster,
        &[
            "--url",
            &cluster.ready.http,
            "--api",
            "completions",
            "--seed",
            "1",
            "--rate",
            "20",
        ],
    );
    let input = |report: &Value| report["input_tokens_mean"].as_f64().expect("a number");
    // Only the first one, which has no space before it, may be two.
    assert!((40.0..=41.0).contains(&input(&text)), "{text}");
    assert_eq!(text["output_tokens_mean"], 12.0);
    let grpc = agrees(
        &cluster,
        &[
            "--router",
            router,
            "--grpc",
            "--api",
            "completions",
            "--seed",
            "2",
            "--concurrency",
            "4",
        ],
    );
    assert!((40.0..=41.0).contains(&input(&grpc)), "{grpc}");
    assert_eq!(grpc["load"]["concurrency"], 4);

    // Blocks of a trace are shared as it says, so that the second request finds the first one's.
    let trace = cluster.folder.path().join("trace.jsonl");
    let line = |at: u32, last: u32| {
        format!(
            "{{\"timestamp\": {at}, \"input_length\": 1536, \"output_length\": 4, \"hash_ids\": [7, 8, {last}]}}\n"
        )
    };
    fs::write(&trace, line(0, 9) + &line(4000, 10)).expect("written");
    let trace = trace.to_str().expect("UTF-8");
    let replayed = measured(&[
        "--router",
        router,
        "--trace",
        trace,
        "--trace-block-tokens",
        "64",
        "--samples",
        "--speed",
        "2",
    ]);
    let samples = replayed["samples"].as_array().expect("samples");
    let cached: Vec<u64> = samples
        .iter()
        .map(|one| one["cached_tokens"].as_u64().expect("a number"))
        .collect();
    assert!(
        samples[1]["sent_ms"].as_f64().expect("a number") >= 2000.0,
        "{replayed}"
    );
    assert!(cached[0] < 64 && cached[1] >= 96, "{replayed}");
}

#[test]
fn failures_are_told_and_end_with_an_exit_code() {
    let cluster = Cluster::start(&model(), &["--prefill", "0", "--decode", "1"]);
    let too_long = [
        "--url",
        &cluster.ready.http,
        "--input-tokens",
        "20000",
        "--requests",
        "3",
    ];
    let (code, printed, errors) = bench(&too_long);
    assert_eq!(code, 64, "{errors}");
    assert!(errors.contains("3 of 3 requests failed"), "{errors}");
    let report: Value = serde_json::from_str(&printed).expect("the report is printed all the same");
    assert_eq!(
        (
            &report["requests"]["failed"],
            &report["errors"]["invalid"]["count"]
        ),
        (&3.into(), &3.into())
    );
    let (code, ..) = bench(&[&too_long[..], &["--allow-failures"]].concat());
    assert_eq!(code, 0);

    let (code, _, errors) = bench(&["--url", "http://127.0.0.1:1"]);
    assert_eq!(code, 69, "{errors}");
}
