use clap::Parser;

use sim::report::{Load, NodeReport, Summary};

use super::*;
use crate::arguments::{Arguments, Command};
use crate::output::golden;

fn flags(more: &[&str]) -> RunArgs {
    let words = ["perigee", "sim", "run", "--scenario"].iter().chain(more);
    let arguments = Arguments::try_parse_from(words).expect("flags");
    match arguments.command {
        Command::Sim(SimCommand::Run(flags)) => flags,
        other => panic!("{other:?}"),
    }
}

#[test]
fn settings_go_before_the_file_and_files_lie_beside_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("scenario.toml");
    let profile = Profile::built_in("llama-3-8b-1xa800").expect("built in");
    fs::write(folder.path().join("own.toml"), profile).expect("write");
    fs::write(&path, "profile = \"own.toml\"\n[router]\npolicy = \"random\"\n").expect("write");
    let path = path.to_str().expect("text");
    let given = flags(&[
        path,
        "--set",
        "router.policy=round_robin",
        "--set",
        "cluster.routers=2",
    ]);
    let loaded = load(&given.scenario, Some("seed=7")).expect("valid");
    assert_eq!(
        loaded.scenario.router.policy,
        router::policy::PolicyName::RoundRobin
    );
    assert_eq!((loaded.scenario.cluster.routers, loaded.scenario.seed), (2, 7));
    assert_eq!(loaded.profile.hardware.accelerators, 1.0);
    for wrong in [
        "router",
        "router.policy=best",
        "router.policy.name=x",
        "nothing=1",
    ] {
        let given = flags(&[path, "--set", wrong]);
        let error = load(&given.scenario, None).err().expect(wrong);
        assert!(error.is::<Error>(), "{error}");
    }
}

#[test]
fn jobs_keep_their_order() {
    let jobs: Vec<u64> = (0..50).collect();
    let squares = in_parallel("square", &jobs, |job| job * job);
    assert_eq!(squares, jobs.iter().map(|job| job * job).collect::<Vec<_>>());
}

#[test]
fn every_scenario_of_the_repository_can_be_run() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../libs/sim/scenarios");
    let mut found = 0;
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let scenario = Scenario::parse(&read(&path).expect("text")).expect("a scenario");
        let profile = Profile::built_in(&scenario.profile).expect("a built-in profile");
        scenario
            .validate(&Profile::parse(profile).expect("a profile"))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        found += 1;
    }
    assert!(found >= 3, "{found}");
}

fn report() -> Report {
    let summary = |mean| Summary {
        mean,
        p50: mean,
        p90: 2.0 * mean,
        p95: 2.0 * mean,
        p99: 3.0 * mean,
        max: 4.0 * mean,
    };
    Report {
        name: "small".into(),
        policy: "perigee".into(),
        seed: 7,
        prefill_nodes: 1,
        decode_nodes: 1,
        requests: 10,
        served: 8,
        rejected: 1,
        failed: 1,
        arrivals_s: 5.0,
        duration_s: 6.0,
        ttft_ms: summary(250.0),
        ttft_percentiles_ms: vec![250.0],
        tbt_ms: summary(20.0),
        tbt_tail_ms: summary(25.0),
        hit_ratio: 0.5,
        fetched_ratio: 0.25,
        compute_ms_mean: 100.0,
        prediction_error_ms: 4.0,
        met: 7,
        attainment: 0.7,
        goodput_per_s: 1.4,
        goodput_per_node_per_s: 0.7,
        prefill_balance: 1.0,
        decode_balance: 1.0,
        prefill_utilisation: 0.5,
        decode_load: Load {
            mean: 0.5,
            deviation: 0.125,
        },
        nodes: vec![NodeReport {
            node: "prefill-0".into(),
            prefills: 8,
            prefill_s: 2.5,
            decoded_tokens: 0,
        }],
        samples: Vec::new(),
    }
}

#[test]
fn a_run_is_shown_with_its_nodes_and_several_beside_each_other() {
    let one = run_view(&["perigee".to_owned()], &[report()]).expect("JSON");
    golden::check("sim-run", &one);
    let names = ["seed=1", "seed=2"].map(str::to_owned);
    golden::check(
        "sim-run-vary",
        &run_view(&names, &[report(), report()]).expect("JSON"),
    );
}

#[test]
fn a_sweep_is_shown_with_the_best_of_what_is_sustained() {
    let at = |prefill_nodes, speed| Sustained {
        point: sweep::Point {
            prefill_nodes,
            decode_nodes: 4 - prefill_nodes,
            pool_tokens: 1_000_000,
        },
        speed,
        report: report(),
    };
    let view = sweep_view(&[at(1, Some(1.5)), at(3, None)]).expect("JSON");
    golden::check("sim-sweep", &view);
}
