use super::*;

fn profile() -> Profile {
    Profile::parse(Profile::built_in("llama-3-70b-8xa800").expect("built in")).expect("valid")
}

#[test]
fn a_scenario_says_only_what_it_changes() {
    let text = "
        name = \"small\"
        [cluster]
        prefill_nodes = 2
        decode_nodes = 2
        eviction = \"lru\"
        [router]
        policy = \"random\"
        [workload.synthetic]
        kind = \"agents\"
        burst = { period_s = 60.0, share = 0.2, factor = 4.0 }
        [[failures]]
        node = \"prefill-1\"
        at_s = 10.0
        for_s = 5.0
    ";
    let scenario = Scenario::parse(text).expect("a scenario");
    scenario.validate(&profile()).expect("valid");
    assert_eq!(scenario.cluster.eviction, Eviction::Lru);
    assert_eq!(scenario.router.policy, router::policy::PolicyName::Random);
    assert_eq!(scenario.slo, Limits::default());
    let written = toml::to_string(&scenario).expect("it is data");
    assert_eq!(Scenario::parse(&written).expect("read again"), scenario);
}

#[test]
fn what_is_wrong_with_a_scenario_is_named() {
    let cases = [
        ("[cluster]\ndecode_nodes = 0", "cluster.decode_nodes is 0"),
        ("[cluster]\nprefill_nodes = 5000", "cluster.prefill_nodes is 5000"),
        (
            "[cluster]\nprefill_pool_tokens = 1000",
            "cluster.prefill_pool_tokens",
        ),
        ("[slo]\nttft_ms = 0.0", "slo.ttft_ms is 0"),
        ("[workload]\nspeed = -1.0", "workload.speed is -1"),
        ("[router]\nplacements_max = 0", "router.placements_max"),
        (
            "[[failures]]\nnode = \"decode-8\"\nat_s = 1.0\nfor_s = 1.0",
            "failures name decode-8",
        ),
    ];
    for (text, message) in cases {
        let scenario = Scenario::parse(text).expect(text);
        let error = scenario.validate(&profile()).expect_err(text);
        assert!(error.to_string().starts_with(message), "{error}");
    }
    let unknown = Scenario::parse("[cluster]\nnodes = 3").expect_err("no such key");
    assert!(unknown.to_string().contains("nodes"), "{unknown}");
}
