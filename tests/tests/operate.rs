//! What an operator sees: status, nodes, metrics, health.

#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use tests::{Cluster, free_port, perigee, root, tiny, wait_for};
use types::ErrorCode;

fn run(arguments: &[&str]) -> String {
    let output = Command::new(perigee()).args(arguments).output().expect("start");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The exit code and what was printed.
fn run_to_end(arguments: &[&str]) -> (i32, String) {
    let output = Command::new(perigee()).args(arguments).output().expect("start");
    let printed = String::from_utf8(output.stdout).expect("UTF-8");
    (output.status.code().expect("no signal ended it"), printed)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn get(url: &str) -> String {
    let output = Command::new("curl").args(["-sf", url]).output().expect("curl");
    assert!(output.status.success(), "{url}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn the_cluster_can_be_looked_at_as_text_and_as_json() {
    let folder = tempfile::tempdir().expect("folder");
    // Metrics by label only show once they have been counted, so a handoff must happen.
    let arguments = [
        "--prefill",
        "1",
        "--decode",
        "2",
        "--store",
        "1",
        "--set",
        "router.local_prefill_tokens_max=0",
    ];
    let cluster = Cluster::start(&tiny(folder.path()), &arguments);
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let generated: Value = serde_json::from_str(&run(&[
        "generate",
        "hello there",
        "--max-tokens",
        "5",
        "-o",
        "json",
        "--router",
        router,
    ]))
    .expect("JSON");
    assert!(generated["usage"]["completion_tokens"].as_u64().expect("count") >= 1);
    assert!(
        generated["report"]["decode_node"]
            .as_str()
            .expect("name")
            .starts_with("decode-")
    );

    let status: Value =
        serde_json::from_str(&run(&["status", "-o", "json", "--router", router])).expect("JSON");
    let nodes = status["nodes"].as_array().expect("nodes");
    let roles = |role: &str| nodes.iter().filter(|node| node["record"]["role"] == role).count();
    assert_eq!(
        (roles("prefill"), roles("decode"), roles("store")),
        (1, 2, 1),
        "{status}"
    );
    for text in [
        run(&["status", "--router", router]),
        run(&["node", "list", "--router", router]),
    ] {
        for id in ["prefill-0", "decode-0", "decode-1", "store-0"] {
            assert!(text.contains(id), "{text}");
        }
        assert!(text.contains("ready"), "{text}");
    }

    for node in nodes {
        let http = node["record"]["http_endpoint"].as_str().expect("endpoint");
        assert_eq!(get(&format!("http://{http}/livez")), "ok\n");
        let ready: Value = serde_json::from_str(&get(&format!("http://{http}/readyz"))).expect("JSON");
        assert_eq!(ready["ready"], true, "{ready}");
    }
    let pages = nodes.iter().map(|node| {
        node["record"]["http_endpoint"]
            .as_str()
            .expect("endpoint")
            .to_owned()
    });
    let pages = pages.chain([cluster.ready.http.trim_start_matches("http://").to_owned()]);
    let pages: Vec<String> = pages.map(|http| get(&format!("http://{http}/metrics"))).collect();
    documented(&pages);
}

/// `docs/metrics.md` is the list of what the roles really show. Refresh it with `PERIGEE_UPDATE_GOLDEN=1`.
fn documented(pages: &[String]) {
    let mut metrics: BTreeMap<String, (String, String)> = BTreeMap::new();
    for line in pages.iter().flat_map(|page| page.lines()) {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            metrics.entry(name.to_owned()).or_default().1 = help.trim_end_matches('.').to_owned();
        }
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            metrics.entry(name.to_owned()).or_default().0 = kind.to_owned();
        }
    }
    for role in ["router", "prefill", "decode", "kvstore"] {
        assert!(
            metrics
                .keys()
                .any(|name| name.starts_with(&format!("perigee_{role}_"))),
            "{role} shows nothing"
        );
    }
    let mut page = String::from(
        "# Metrics\n\nEvery process shows its own at `/metrics` in the OpenMetrics text format. Counters end in `_total` there.\n\n\
        | metric | kind | what it says |\n|---|---|---|\n",
    );
    for (name, (kind, help)) in metrics {
        writeln!(page, "| `{name}` | {kind} | {help} |").expect("write");
    }
    let path = root().join("docs/metrics.md");
    if std::env::var_os("PERIGEE_UPDATE_GOLDEN").is_some() {
        fs::write(&path, &page).expect("write");
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page,
        "docs/metrics.md is not what the roles show: PERIGEE_UPDATE_GOLDEN=1\n{page}"
    );
}

/// Messages of the findings that are `level`, with their subjects.
fn findings(report: &Value, level: &str) -> Vec<String> {
    let all = report["findings"].as_array().expect("findings").iter();
    all.filter(|finding| finding["level"] == level)
        .map(|finding| format!("{} {}", finding["subjects"], finding["message"]))
        .collect()
}

#[test]
fn transfers_are_listed_measured_and_verified_between_the_nodes_pools() {
    let folder = tempfile::tempdir().expect("folder");
    let arguments = [
        "--prefill",
        "1",
        "--decode",
        "1",
        "--store",
        "1",
        "--transport",
        "tcp",
    ];
    let cluster = Cluster::start(&tiny(folder.path()), &arguments);
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let between = [
        "transfer",
        "test",
        "prefill-0",
        "store-0",
        "--router",
        router,
        "--bytes",
        "1MiB",
    ];
    let measured = json(&run(&[&between[..], &["--duration", "1s", "-o", "json"]].concat()));
    assert_eq!(
        (&measured["complete"], &measured["to"]),
        (&true.into(), &"store-0".into())
    );
    let rows = measured["measurements"].as_array().expect("measurements");
    assert_eq!(
        rows.len(),
        5 * 2,
        "five sizes from 4 KiB to 1 MiB, both ways: {measured}"
    );
    for row in rows {
        assert_eq!(row["uses"], "tcp", "{row}");
        let figure = |key: &str| row[key].as_f64().expect("a number");
        assert!(
            figure("bytes_per_second") > 0.0 && figure("transfers") >= 3.0,
            "{row}"
        );
        assert!(figure("latency_p50_us") <= figure("latency_p99_us"), "{row}");
    }
    let table = run(&[&between[..], &["--duration", "100ms", "--direction", "read"]].concat());
    assert!(
        table.contains("all bytes verified") && !table.contains("write"),
        "{table}"
    );

    let status = json(&run(&["status", "-o", "json", "--router", router]));
    let store = status["nodes"].as_array().expect("nodes").iter();
    let store = store
        .clone()
        .find(|node| node["record"]["id"] == "store-0")
        .expect("member");
    let metrics = get(&format!(
        "http://{}/metrics",
        store["record"]["http_endpoint"].as_str().expect("text")
    ));
    let counted = |direction: &str| -> u64 {
        let line = format!("perigee_transfer_bytes_total{{transport=\"tcp\",direction=\"{direction}\"}} ");
        let value = metrics
            .lines()
            .find_map(|found| found.strip_prefix(line.as_str()));
        value.expect("is shown").parse().expect("a number")
    };
    assert!(
        counted("received") > 1 << 20 && counted("served") > 1 << 20,
        "{metrics}"
    );
    assert!(
        metrics.contains("perigee_kvstore_blocks{state=\"owned\"} 0\n"),
        "blocks are given back: {metrics}"
    );

    let listed = json(&run(&["transfer", "list", "-o", "json", "--router", router]));
    let pairs = listed["pairs"].as_array().expect("pairs");
    let ids: BTreeSet<(&str, &str)> = pairs
        .iter()
        .map(|pair| {
            (
                pair["from"].as_str().expect("id"),
                pair["to"].as_str().expect("id"),
            )
        })
        .collect();
    assert_eq!(ids.len(), 6, "each of three nodes to both others: {listed}");
    let link = link(&listed, "prefill-0", "store-0");
    assert_eq!(link["uses"], "tcp", "{link}");
    assert!(
        link["obstacle"].as_str().expect("text").contains("TCP only"),
        "{link}"
    );
    for counted in ["written_bytes", "read_bytes"] {
        assert!(link[counted].as_u64().expect("bytes") > 1 << 20, "{link}");
    }
    let hosts = listed["nodes"].as_array().expect("nodes").iter();
    let hosts: BTreeSet<&str> = hosts
        .map(|node| node["host"]["boot_id"].as_str().expect("text"))
        .collect();
    assert_eq!(hosts.len(), 1, "they run on one host");
    let table = run(&["transfer", "list", "--router", router]);
    assert!(table.matches("prefill-0").count() >= 4, "{table}");

    let unknown = ["transfer", "test", "prefill-0", "store-9", "--router", router];
    assert_eq!(run_to_end(&unknown).0, i32::from(ErrorCode::NotFound.exit()));
}

/// How one node reaches another, in what `transfer list` says.
fn link<'a>(listed: &'a Value, from: &str, to: &str) -> &'a Value {
    let mut pairs = listed["pairs"].as_array().expect("pairs").iter();
    let pair = pairs.find(|pair| pair["from"] == from && pair["to"] == to);
    &pair.unwrap_or_else(|| panic!("no pair {from} {to}: {listed}"))["link"]
}

#[test]
fn nodes_of_one_host_use_ucx_where_it_is_and_say_why_where_not() {
    let folder = tempfile::tempdir().expect("folder");
    let cluster = Cluster::start(&tiny(folder.path()), &["--prefill", "1", "--decode", "1"]);
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let list = || json(&run(&["transfer", "list", "-o", "json", "--router", router]));
    let test = [
        "transfer",
        "test",
        "prefill-0",
        "decode-0",
        "-o",
        "json",
        "--router",
        router,
    ];
    let test = |more: [&str; 4]| json(&run(&[&test[..], &more].concat()));

    let listed = list();
    let mut movers = listed["nodes"].as_array().expect("nodes").iter().map(|node| {
        let movers = node["movers"].as_array().expect("movers").iter();
        movers
            .clone()
            .find(|mover| mover["name"] == "ucx")
            .expect("looked for")
    });
    let everywhere = movers.all(|mover| mover["usable"] == true);
    let best = if everywhere { "ucx" } else { "tcp" };
    // Two nodes use TCP until they know each other.
    let link = wait_for("the nodes to use the best that both have", || {
        test(["--bytes", "4KiB", "--duration", "100ms"]);
        let link = link(&list(), "prefill-0", "decode-0").clone();
        (link["uses"] == best).then_some(link)
    });
    assert_eq!(
        link["obstacle"].as_str().expect("text").is_empty(),
        everywhere,
        "{link}"
    );
    let measured = test(["--bytes", "1MiB", "--duration", "500ms"]);
    for row in measured["measurements"].as_array().expect("measurements") {
        assert_eq!(row["uses"], best, "{measured}");
    }
}

#[test]
fn a_check_tells_a_healthy_cluster_from_one_with_a_silent_node() {
    let folder = tempfile::tempdir().expect("folder");
    let cluster = Cluster::start(&tiny(folder.path()), &["--prefill", "1", "--decode", "2"]);
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let check = ["check", "-o", "json", "--router", router];
    let (code, printed) = run_to_end(&check);
    let report = json(&printed);
    assert_eq!((code, &report["healthy"]), (0, &true.into()), "{printed}");
    let (code, printed) = run_to_end(&["check", "--router", router]);
    assert!(code == 0 && printed.contains("0 failed"), "{printed}");

    let silent = cluster
        .ready
        .nodes
        .iter()
        .find(|node| node.id == "decode-1")
        .expect("node");
    let silent = nix::unistd::Pid::from_raw(silent.pid);
    kill(silent, Signal::SIGSTOP).expect("it lives");
    let (code, printed) = run_to_end(&check);
    kill(silent, Signal::SIGCONT).expect("it lives");
    let report = json(&printed);
    assert_eq!((code, &report["healthy"]), (10, &false.into()), "{printed}");
    let failed = findings(&report, "failed");
    assert!(
        failed.iter().any(|found| found.contains("does not answer")),
        "{printed}"
    );
    assert!(failed.iter().all(|found| found.contains("decode-1")), "{printed}");
}

#[test]
fn a_check_without_a_cluster_judges_the_machine_and_the_settings() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path()).display().to_string();
    let (code, printed) = run_to_end(&["check", "--pre", "--model", &model, "-o", "json"]);
    let report = json(&printed);
    let passed = findings(&report, "passed");
    assert!(
        passed
            .iter()
            .any(|found| found.contains("the settings are valid")),
        "{printed}"
    );
    // What is wrong with the machine itself, if anything, is about its adapters.
    let failed = findings(&report, "failed");
    assert_eq!(code, if failed.is_empty() { 0 } else { 10 }, "{printed}");

    let (code, printed) = run_to_end(&["check", "--pre", "--model", "/nowhere.gguf"]);
    assert!(
        code == 10 && printed.contains("× model /nowhere.gguf does not exist"),
        "{printed}"
    );
    assert!(printed.contains("hint: perigee model pull"), "{printed}");

    let nobody = format!("127.0.0.1:{}", free_port());
    let (code, printed) = run_to_end(&["check", "--router", &nobody]);
    assert!(code == 10 && printed.contains("does not answer"), "{printed}");
}

#[test]
fn a_request_is_explained_by_the_numbers_that_it_was_placed_by() {
    let folder = tempfile::tempdir().expect("folder");
    let local_max = "router.local_prefill_tokens_max=0";
    let nodes = ["--prefill", "2", "--decode", "2", "--set", local_max];
    let log = [
        "--set",
        "log.filter=info,router=debug",
        "--set",
        "log.format=json",
    ];
    let cluster = Cluster::start(&tiny(folder.path()), &[&nodes[..], &log].concat());
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let ask = |arguments: &[&str]| {
        let rest = ["-o", "json", "--router", router];
        json(&run(&[arguments, &rest].concat()))
    };
    let prompt = "hello there, what is there to say";
    let before = ask(&["route", "explain", "--prompt", prompt]);
    assert_eq!(before["candidates"].as_array().expect("candidates").len(), 6);
    assert!(before["request_id"].is_null() && before["outcome"].is_null());
    assert_eq!(ask(&["route", "list"])["decisions"], Value::Array(Vec::new()));

    let report = ask(&["generate", prompt, "--max-tokens", "5"])["report"].clone();
    let explained = ask(&["route", "explain"]);
    let choice = &explained["candidates"][0];
    assert_eq!(choice["prefill_node"], report["prefill_node"], "{explained}");
    assert_eq!(choice["decode_node"], report["decode_node"], "{explained}");
    // The report counts from the request's arrival.
    let number = |value: &Value| value.as_f64().expect("a number");
    assert!(number(&choice["ttft_ms"]) <= number(&report["ttft_predicted_ms"]));
    assert_eq!(explained["outcome"]["state"], "finished");
    assert!(!explained["reason"].as_str().expect("text").is_empty());
    let id = explained["request_id"].as_str().expect("an id");
    assert_eq!(ask(&["route", "explain", "--request", id]), explained);
    let logged = wait_for("the placement in the log", || {
        placement_logged(&cluster.up.log(), id)
    });
    for term in [
        "queue_ms",
        "promote_ms",
        "fetch_ms",
        "compute_ms",
        "handoff_ms",
        "ttft_ms",
        "tbt_ms",
        "interference_charge_ms",
        "gap_charge_ms",
        "score_ms",
        "new_tokens",
    ] {
        assert!(
            (number(&logged[term]) - number(&choice[term])).abs() < 1e-9,
            "{term}: {logged}"
        );
    }
    assert_eq!(logged["prefill"], choice["prefill_node"]);
    assert_eq!(logged["decode"], choice["decode_node"]);

    let unknown = ["route", "explain", "--router", router, "--request"];
    let (code, _) = run_to_end(&[&unknown[..], &["0123456789abcdef0123456789abcdef"]].concat());
    assert_eq!(code, i32::from(ErrorCode::NotFound.exit()));
}

/// What the router logged when it placed the request.
fn placement_logged(log: &str, request_id: &str) -> Option<Value> {
    let events = log.lines().filter_map(|line| {
        // The supervisor puts the node's name before each line.
        let event = &line[line.find('{')?..];
        serde_json::from_str::<Value>(event).ok()
    });
    events
        .into_iter()
        .find(|event| event["message"] == "placed" && event["request_id"] == request_id)
}
