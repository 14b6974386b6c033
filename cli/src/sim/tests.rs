use clap::Parser;

use super::*;
use crate::arguments::{Arguments, Command};

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
