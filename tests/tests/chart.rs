//! The Helm chart: what it renders is valid, asks for no rights, says only what the binary knows, and what it refuses, it refuses by name.
//!
//! `scripts/setup.sh test` gets Helm, promtool and the schemas of Kubernetes. `make test-image` runs what is rendered.

#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use engine::fixture::{TinyModel, write_tiny_gguf};
use rstest::rstest;
use serde_json::{Value, json};
use tests::certificates::Authority;
use tests::{Cluster, perigee, records, root, wait_for_status};

/// Files of `tests/chart/values`, and the chart's own values.
const MATRIX: [&str; 6] = ["default", "minimal", "external-etcd", "rdma-gpu", "full", "tls"];
/// From the oldest that the chart is for (`kubeVersion`) to the newest that is known.
const KUBERNETES: [&str; 3] = ["1.31", "1.34", "1.37"];
const RELEASE: &str = "r";
const NAMESPACE: &str = "ns";

fn chart() -> PathBuf {
    root().join("helm/perigee")
}

/// A tool of the tests' own Python environment.
fn tool(path: &str) -> PathBuf {
    let path = root().join(".venv").join(path);
    assert!(
        path.is_file(),
        "{} is missing: scripts/setup.sh test gets it",
        path.display()
    );
    path
}

/// Runs a command with `input`, whose end it must not need to wait for.
fn run(command: &mut Command, input: &str) -> Output {
    let piped = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = piped
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?} does not start (scripts/setup.sh test): {error}"));
    let (mut stdin, input) = (child.stdin.take().expect("piped"), input.to_owned());
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("wait");
    // A child that ended without reading everything has said why.
    let _ = writer.join().expect("no panic");
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a command says if it goes well.
fn ok(command: &mut Command, input: &str) -> String {
    let output = run(command, input);
    let (said, complained) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?}: {said}{complained}");
    said
}

fn helm(version: &str, verb: &[&str], values: &str, sets: &[&str]) -> Command {
    let mut command = Command::new(tool(version).as_os_str());
    command.args(verb).arg(chart()).args(["--namespace", NAMESPACE]);
    if values != "default" {
        command
            .arg("--values")
            .arg(root().join(format!("tests/chart/values/{values}.yaml")));
    }
    for set in sets {
        command.args(["--set", set]);
    }
    // No configuration of the user's, and no cluster.
    command
        .env("HELM_CONFIG_HOME", "/nonexistent")
        .env("KUBECONFIG", "/nonexistent");
    command
}

fn template(version: &str, values: &str, sets: &[&str]) -> Command {
    helm(version, &["template", RELEASE], values, sets)
}

/// The objects that these values make, each one valid.
fn render(values: &str, sets: &[&str]) -> Vec<Value> {
    let manifests = ok(&mut template("tools/helm", values, sets), "");
    let mut python = Command::new(tool("bin/python"));
    python
        .arg(root().join("tests/python/manifests.py"))
        .args(KUBERNETES);
    let read: Value = serde_json::from_str(&ok(&mut python, &manifests)).expect("json");
    assert_eq!(read["errors"], json!([]), "{values} {sets:?}");
    read["objects"].as_array().expect("a list").clone()
}

fn str_of<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn of_kind<'a>(objects: &'a [Value], kind: &'static str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

fn find<'a>(objects: &'a [Value], kind: &'static str, name: &str) -> &'a Value {
    of_kind(objects, kind)
        .find(|object| object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name}"))
}

/// Every pod's specification, with the name of what makes it.
fn pods(objects: &[Value]) -> Vec<(String, &Value)> {
    let of = |object: &Value| format!("{} {}", object["kind"], object["metadata"]["name"]);
    objects
        .iter()
        .filter_map(|object| {
            let spec = match object["kind"].as_str()? {
                "Pod" => object.get("spec"),
                "Deployment" | "StatefulSet" => object.pointer("/spec/template/spec"),
                _ => None,
            };
            Some((of(object), spec?))
        })
        .collect()
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    let of = |field| pod[field].as_array().into_iter().flatten();
    of("initContainers").chain(of("containers"))
}

/// perigee.toml of each pool, by the name of its workload.
fn configs(objects: &[Value]) -> BTreeMap<String, toml::Table> {
    of_kind(objects, "ConfigMap")
        .filter_map(|map| {
            let config = map["data"]["perigee.toml"].as_str()?;
            let name = str_of(map, "/metadata/name").to_owned();
            let table = config
                .parse()
                .unwrap_or_else(|error| panic!("{name}: {error}\n{config}"));
            Some((name, table))
        })
        .collect()
}

#[rstest]
fn every_set_of_values_is_valid_for_both_helms(
    #[values("default", "minimal", "external-etcd", "rdma-gpu", "full", "tls")] values: &str,
) {
    let mut rendered = Vec::new();
    for version in ["tools/helm", "tools/helm3"] {
        ok(&mut helm(version, &["lint", "--strict"], values, &[]), "");
        rendered.push(ok(&mut template(version, values, &[]), ""));
    }
    assert_eq!(
        rendered[0], rendered[1],
        "Helm 3 makes something else of {values} than Helm 4"
    );
    let objects = render(values, &[]);
    assert!(objects.len() > 8, "{values} makes only {} objects", objects.len());
}

#[rstest]
#[case::a_value("router.replica=3", "replica")]
#[case::a_setting("config.kv.memroy=1GiB", "memroy")]
#[case::a_setting_of_a_pool("decode.pools.big.config.decode.sequences=1", "sequences")]
#[case::the_name_of_a_policy("config.router.policy=fastest", "policy")]
#[case::a_size("config.kv.memory=lots", "memory")]
#[case::what_the_chart_sets("config.node.listen=0.0.0.0", "listen")]
#[case::a_file_that_the_chart_mounts("config.tls.key=/a", "tls")]
#[case::a_field_of_kubernetes("defaults.tolerations[0].keyy=gpu", "keyy")]
#[case::a_setting_of_another_role("prefill.autoscaling.kvUsedPercent=70", "kvUsedPercent")]
#[case::a_limit_that_no_bucket_has("slo.interTokenLatencySeconds=0.11", "interTokenLatencySeconds")]
#[case::a_pool_with_no_name_for_kubernetes("store.pools.Big_One.replicas=1", "Big_One")]
fn a_misspelt_value_fails_the_install(#[case] set: &str, #[case] named: &str) {
    for version in ["tools/helm", "tools/helm3"] {
        for mut command in [
            template(version, "default", &[set]),
            helm(version, &["lint"], "default", &[set]),
        ] {
            let output = run(&mut command, "");
            assert!(!output.status.success(), "{version} takes {set}");
            let said = text(&output.stderr) + &text(&output.stdout);
            assert!(
                said.contains(named),
                "{version} does not say what is wrong with {set}: {said}"
            );
        }
    }
}

#[rstest]
#[case(&["etcd.persistence.enabled=false"], "etcd.replicas: 1")]
#[case(&["etcd.replicas=2"], "replicas")]
#[case(&["etcd.enabled=false"], "etcd.endpoints must name")]
#[case(&["etcd.endpoints={a:1}"], "etcd.enabled must be false")]
#[case(&["model.pull.enabled=false"], "model.path")]
#[case(&["model.pull.enabled=false", "model.path=a.gguf"], "emptyDir")]
#[case(&["model.volume.type=image"], "disable model.pull")]
#[case(&["model.volume.type=existingClaim"], "model.volume.existingClaim")]
#[case(&["decode.autoscaling.kind=hpa"], "metrics.rules")]
#[case(&["router.httpRoute.enabled=true"], "parentRefs")]
#[case(&["tls.enabled=true"], "name tls.existingSecret, or enable tls.certManager")]
#[case(&["tls.enabled=true", "tls.certManager.enabled=true"], "tls.certManager.issuerRef.name")]
#[case(&["tls.enabled=true", "tls.existingSecret=a", "tls.certManager.enabled=true"], "must be false")]
#[case(&["etcd.tls.existingSecret=a"], "etcd.enabled must be false")]
#[case(&["apiKeys.existingSecret=a"], "tests.apiKey.existingSecret")]
fn what_cannot_work_is_refused_with_what_to_do(#[case] sets: &[&str], #[case] says: &str) {
    let output = run(&mut template("tools/helm", "default", sets), "");
    assert!(!output.status.success(), "{sets:?} is taken");
    let said = text(&output.stderr);
    assert!(said.contains(says), "{said}");
}

#[test]
fn the_schema_has_the_binarys_own_settings_and_defaults() {
    let mut python = Command::new(tool("bin/python"));
    python
        .arg(root().join("scripts/chart_schema.py"))
        .arg("--check")
        .arg("--perigee")
        .arg(perigee());
    ok(&mut python, "");

    let schema = fs::read_to_string(chart().join("values.schema.json")).expect("schema");
    let schema: Value = serde_json::from_str(&schema).expect("json");
    let defaults = ok(Command::new(perigee()).args(["config", "-o", "json"]), "");
    let defaults: Value = serde_json::from_str(&defaults).expect("json");
    let mut compared = 0;
    for (section, settings) in defaults.as_object().expect("sections") {
        for (key, default) in settings.as_object().expect("settings") {
            let pointer = format!("/definitions/config/properties/{section}/properties/{key}");
            // What is missing there is what the chart sets.
            if let Some(setting) = schema.pointer(&pointer) {
                assert_eq!(&setting["default"], default, "{section}.{key}");
                compared += 1;
            }
        }
    }
    assert!(compared > 100, "only {compared} settings are in the schema");
    refuse_open_objects(&schema, "");
}

/// Every object of the schema has no other properties than those that it names, but for the few that are meant to.
fn refuse_open_objects(schema: &Value, path: &str) {
    // Objects of any kind, and Helm's own.
    const OPEN: [&str; 2] = ["/properties/global", "/properties/extraObjects/items"];
    let is_object = schema["type"] == "object" || schema.get("properties").is_some_and(|all| all.is_object());
    // Kubernetes' own schemas have maps of strings, whose names are free.
    let closed = match &schema["additionalProperties"] {
        Value::Bool(open) => !open,
        Value::Object(values) => path.starts_with("/definitions/k8s.") && !values.is_empty(),
        _ => path.contains("/k8s."),
    };
    if schema.get("type").is_some() && is_object && !path.ends_with("/properties") {
        assert!(closed || OPEN.contains(&path), "{path} takes any names");
    }
    match schema {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(key, value)| refuse_open_objects(value, &format!("{path}/{key}"))),
        Value::Array(items) => items.iter().for_each(|item| refuse_open_objects(item, path)),
        _ => {}
    }
}

/// A default that the chart says again could differ from the code's one day.
#[test]
fn the_charts_values_repeat_no_setting() {
    let objects = render("default", &[]);
    let set: BTreeSet<String> = configs(&objects)
        .values()
        .flat_map(|config| {
            let sections = config.iter();
            sections.flat_map(|(section, settings)| {
                let settings = settings.as_table().expect("a section");
                settings.keys().map(move |key| format!("{section}.{key}"))
            })
        })
        .collect();
    let own = [
        "model.path",
        "node.drain_deadline",
        "node.grpc_port",
        "node.http_port",
        "node.listen",
        "node.transfer_port",
        "registry.url",
    ];
    assert_eq!(set.iter().map(String::as_str).collect::<Vec<_>>(), own);
}

#[test]
fn every_pool_starts_with_its_settings_and_arguments() {
    let folder = tempfile::tempdir().expect("folder");
    let model = folder.path().join("tiny.gguf");
    fs::write(&model, "").expect("write");
    let secrets = secrets(folder.path());
    for values in MATRIX {
        let objects = render(values, &[]);
        let configs = configs(&objects);
        let mut checked = 0;
        for (name, pod) in pods(&objects) {
            let container = &pod["containers"][0];
            if container["name"] != "perigee" {
                continue;
            }
            let config = &configs[str_of(pod, "/volumes/0/configMap/name")];
            let file = folder.path().join("perigee.toml");
            let config = toml::to_string(config).expect("toml");
            // What Kubernetes mounts there lies elsewhere here.
            fs::write(&file, config.replace("/etc/perigee-", &secrets)).expect("write");
            let mut command = Command::new(perigee());
            let arguments = container["args"].as_array().expect("arguments");
            command.args(arguments.iter().map(|argument| argument.as_str().expect("text")));
            for variable in container["env"].as_array().expect("variables") {
                let value = match str_of(variable, "/valueFrom/fieldRef/fieldPath") {
                    "metadata.name" => "r-perigee-decode-0",
                    "status.podIP" => "fd00::7",
                    _ => variable["value"].as_str().expect("a value"),
                };
                command.env(str_of(variable, "/name"), value.replace("$(POD_IP)", "fd00::7"));
            }
            command
                .env("PERIGEE_CONFIG", &file)
                .arg("--check-config")
                .arg("--model")
                .arg(&model);
            let output = run(&mut command, "");
            assert!(
                output.status.success(),
                "{values} {name}: {}",
                text(&output.stderr)
            );
            checked += 1;
        }
        assert!(checked >= 3, "{values} has only {checked} workloads");
    }
}

/// The secrets that the values name, each in a folder of its own, and what their paths begin with.
fn secrets(folder: &Path) -> String {
    let authority = Authority::new(folder);
    let member = authority.member("member", &["r-perigee.ns.svc"]);
    for (name, files) in [
        ("tls", ["tls.crt", "tls.key", "ca.crt"]),
        ("etcd", ["tls.crt", "tls.key", "ca.crt"]),
    ] {
        let mounted = folder.join(format!("perigee-{name}"));
        fs::create_dir(&mounted).expect("a folder");
        for (file, from) in files
            .iter()
            .zip([&member.certificate, &member.key, &member.authority])
        {
            fs::copy(from, mounted.join(file)).expect("copied");
        }
    }
    let keys = folder.join("perigee-keys");
    fs::create_dir(&keys).expect("a folder");
    let made = ok(Command::new(perigee()).args(["key", "new", "--tenant", "a"]), "");
    fs::write(
        keys.join("keys.toml"),
        made.lines().nth(1).expect("the key's line"),
    )
    .expect("written");
    format!("{}/perigee-", folder.display())
}

#[test]
fn every_port_but_that_of_transfers_is_served_and_probed_over_tls() {
    let objects = render("tls", &[]);
    let configs = configs(&objects);
    let certificate = find(&objects, "Certificate", "r-perigee");
    let names = certificate["spec"]["dnsNames"].as_array().expect("names");
    let secret = str_of(certificate, "/spec/secretName");
    let mut seen = 0;
    for (name, pod) in pods(&objects) {
        let container = &pod["containers"][0];
        let mounted = |name: &str| {
            let mounts = container["volumeMounts"].as_array().expect("mounts").iter();
            let mount = mounts.clone().find(|mount| mount["name"] == name)?;
            assert_eq!(mount.get("subPath"), None, "{name} would never change");
            let volumes = pod["volumes"].as_array().expect("volumes").iter();
            let volume = volumes
                .clone()
                .find(|volume| volume["name"] == name)
                .expect("a volume");
            assert_eq!(volume["secret"]["defaultMode"], 0o440);
            Some((str_of(mount, "/mountPath"), str_of(volume, "/secret/secretName")))
        };
        assert_eq!(mounted("tls"), Some(("/etc/perigee-tls", secret)), "{name}");
        if container["name"] != "perigee" {
            continue;
        }
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            assert_eq!(container[probe]["httpGet"]["scheme"], "HTTPS", "{name} {probe}");
        }
        assert_eq!(mounted("etcd-tls"), Some(("/etc/perigee-etcd", "etcd-client")));
        let config = &configs[str_of(pod, "/volumes/0/configMap/name")];
        let router = name.contains("router");
        assert_eq!(mounted("api-keys").is_some(), router, "{name}");
        assert_eq!(config.contains_key("router"), router);
        // Whatever pod is dialled, its certificate bears the name that is expected.
        let expected = config["tls"]["name"].as_str().expect("a name");
        assert!(names.iter().any(|name| name == expected));
        seen += 1;
    }
    assert_eq!(seen, 4);
    // What clients dial is borne, too.
    for service in ["r-perigee-router", "r-perigee-router.ns.svc", "llm.example.com"] {
        assert!(names.iter().any(|name| name == service), "{service}");
    }
    let test = find(&objects, "Pod", "r-perigee-test-chat");
    let arguments = test["spec"]["containers"][0]["args"].to_string();
    assert!(
        arguments.contains("--chat=https://r-perigee-router:8080"),
        "{arguments}"
    );
    let monitor = find(&objects, "PodMonitor", "r-perigee");
    let scheme = |index: usize| str_of(monitor, &format!("/spec/podMetricsEndpoints/{index}/scheme"));
    assert_eq!((scheme(0), scheme(1)), ("https", ""));
}

#[test]
fn an_administrators_key_reaches_the_test_where_there_is_no_certificate() {
    let sets = [
        "apiKeys.existingSecret=clients",
        "tests.apiKey.existingSecret=operator",
    ];
    let objects = render("default", &sets);
    let test = find(&objects, "Pod", "r-perigee-test-chat");
    let variable = &test["spec"]["containers"][0]["env"][0];
    assert_eq!(variable["name"], "PERIGEE_API_KEY");
    assert_eq!(str_of(variable, "/valueFrom/secretKeyRef/name"), "operator");
}

#[test]
fn settings_go_from_all_roles_to_the_pool() {
    let configs = configs(&render("rdma-gpu", &[]));
    let get = |pool: &str, section: &str, key: &str| configs[pool][section].get(key).cloned();
    let text = |value: &str| Some(toml::Value::String(value.into()));
    assert_eq!(get("r-perigee-router", "kv", "memory"), text("64GiB"));
    assert_eq!(get("r-perigee-prefill", "kv", "memory"), text("64GiB"));
    assert_eq!(get("r-perigee-prefill-long", "kv", "memory"), text("128GiB"));
    assert_eq!(
        get("r-perigee-prefill", "prefill", "step_tokens"),
        Some(4096.into())
    );
    assert_eq!(
        get("r-perigee-prefill-long", "prefill", "step_tokens"),
        Some(8192.into())
    );
    assert!(configs["r-perigee-decode"].get("prefill").is_none());
    assert_eq!(get("r-perigee-decode", "kv", "huge_pages"), text("reserved"));
    assert_eq!(get("r-perigee-router", "kv", "huge_pages"), None);
    assert_eq!(
        get("r-perigee-store-ssd", "kv", "disk_path"),
        text("/var/lib/perigee")
    );
    assert_eq!(get("r-perigee-decode", "kv", "disk_path"), None);
    assert_eq!(
        get("r-perigee-decode", "model", "path"),
        text("/models/model.Q4_K_M.gguf")
    );
}

#[test]
fn a_pool_may_take_back_what_its_role_has() {
    let sets = [
        "decode.config.router.local_prefill_tokens_max=512",
        "decode.pools.default.config.router.local_prefill_tokens_max=0",
        "decode.pools.default.replicas=0",
        "decode.pools.default.drain.enabled=false",
        "decode.pools.default.pdb.enabled=false",
    ];
    let objects = render("default", &sets);
    let router = &configs(&objects)["r-perigee-decode"]["router"];
    assert_eq!(router["local_prefill_tokens_max"].as_integer(), Some(0));
    let workload = find(&objects, "StatefulSet", "r-perigee-decode");
    assert_eq!(workload["spec"]["replicas"], 0);
    assert!(
        workload
            .pointer("/spec/template/spec/containers/0/lifecycle")
            .is_none()
    );
    let budgets = of_kind(&objects, "PodDisruptionBudget");
    assert!(
        !budgets
            .map(Value::to_string)
            .collect::<String>()
            .contains("decode")
    );
}

#[test]
fn another_setting_starts_the_pods_of_its_pool_anew() {
    let annotations = |sets: &[&str]| -> BTreeMap<String, Value> {
        let objects = render("default", sets);
        let workloads = objects
            .iter()
            .filter(|object| object["spec"]["template"].is_object());
        let checksum = |object: &Value| object["spec"]["template"]["metadata"].clone();
        workloads
            .map(|object| (str_of(object, "/metadata/name").to_owned(), checksum(object)))
            .collect()
    };
    let (before, after) = (
        annotations(&[]),
        annotations(&["decode.config.decode.sequences_max=64"]),
    );
    let changed: Vec<_> = before
        .iter()
        .filter(|(name, metadata)| after[*name] != **metadata)
        .collect();
    assert_eq!(changed.len(), 1, "{changed:?}");
    assert_eq!(changed[0].0, "r-perigee-decode");
}

#[test]
fn containers_may_do_nothing_but_run() {
    for values in MATRIX {
        let objects = render(values, &[]);
        for kind in [
            "Role",
            "ClusterRole",
            "RoleBinding",
            "ClusterRoleBinding",
            "CustomResourceDefinition",
        ] {
            assert_eq!(of_kind(&objects, kind).count(), 0, "{values} has a {kind}");
        }
        for (name, pod) in pods(&objects) {
            let node = name.contains("prefill") || name.contains("decode") || name.contains("store");
            let rdma = values == "rdma-gpu" && node;
            let root = rdma && name.contains("store");
            let context = format!("{values} {name}: {pod}");
            assert_eq!(pod["automountServiceAccountToken"], false, "{context}");
            assert_eq!(pod["enableServiceLinks"], false, "{context}");
            assert_eq!(pod["securityContext"]["runAsNonRoot"], !root, "{context}");
            assert_eq!(
                pod["securityContext"]["runAsUser"],
                if root { 0 } else { 65532 },
                "{context}"
            );
            assert_eq!(
                pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault",
                "{context}"
            );
            assert_eq!(pod["hostNetwork"] == true, root, "{context}");
            assert!(pod["hostIPC"].is_null() && pod["hostPID"].is_null(), "{context}");
            for container in containers(pod) {
                let capabilities = match rdma && container["name"] == "perigee" {
                    true => json!({ "drop": ["ALL"], "add": ["IPC_LOCK"] }),
                    false => json!({ "drop": ["ALL"] }),
                };
                let expected = json!({
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": capabilities,
                });
                assert_eq!(container["securityContext"], expected, "{context}");
                assert!(
                    container["resources"]["limits"]["memory"].is_string() || values == "rdma-gpu",
                    "{context}"
                );
            }
        }
    }
}

#[test]
fn rdma_and_accelerators_are_asked_for_where_they_are_wanted() {
    let objects = render("rdma-gpu", &[]);
    let limits = |kind, name| {
        find(&objects, kind, name)
            .pointer("/spec/template/spec/containers/0/resources/limits")
            .cloned()
    };
    assert_eq!(
        limits("StatefulSet", "r-perigee-prefill-long"),
        Some(json!({
            "nvidia.com/gpu": 8, "memory": "256Gi", "nvidia.com/rdma_shared": "2", "hugepages-1Gi": "64Gi",
        }))
    );
    assert_eq!(
        limits("Deployment", "r-perigee-router"),
        Some(json!({ "memory": "2Gi" }))
    );
    let long = find(&objects, "StatefulSet", "r-perigee-prefill-long")
        .pointer("/spec/template/spec")
        .expect("a pod");
    assert_eq!(long["nodeSelector"], json!({ "gpu": "h200" }));
    assert_eq!(long["tolerations"][0]["key"], "nvidia.com/gpu");
    let secret = long.pointer("/initContainers/0/env/0/valueFrom/secretKeyRef");
    assert_eq!(secret, Some(&json!({ "name": "hub", "key": "token" })));
}

#[test]
fn nodes_have_lasting_names_and_say_where_they_are() {
    let objects = render("default", &[]);
    let decode = find(&objects, "StatefulSet", "r-perigee-decode");
    let environment = &decode["spec"]["template"]["spec"]["containers"][0]["env"];
    let of = |name: &str| {
        let variables = environment.as_array().expect("variables").iter();
        variables
            .clone()
            .find(|variable| variable["name"] == name)
            .expect("a variable")
            .clone()
    };
    assert_eq!(
        of("PERIGEE_NODE__ID")["valueFrom"]["fieldRef"]["fieldPath"],
        "metadata.name"
    );
    assert_eq!(of("PERIGEE_NODE__ADVERTISE")["value"], "$(POD_IP)");
    let headless = find(&objects, "Service", str_of(decode, "/spec/serviceName"));
    assert_eq!(headless["spec"]["clusterIP"], "None");
    // Whatever the service selects has the label.
    let labels = decode["spec"]["template"]["metadata"]["labels"]
        .as_object()
        .expect("labels");
    for (label, value) in headless["spec"]["selector"].as_object().expect("labels") {
        assert_eq!(labels.get(label), Some(value));
    }
    assert_eq!(
        configs(&objects)["r-perigee-decode"]["node"]["listen"].as_str(),
        Some("0.0.0.0")
    );
    let ipv6 = render("external-etcd", &[]);
    let router = find(&ipv6, "Deployment", "r-perigee-router");
    let advertise = router.pointer("/spec/template/spec/containers/0/env/3/value");
    assert_eq!(advertise, Some(&json!("[$(POD_IP)]")));
    let listening = |sets: &[&str]| {
        let objects = render("default", sets);
        let etcd = find(&objects, "StatefulSet", "r-perigee-etcd");
        etcd["spec"]["template"]["spec"]["containers"][0]["command"].to_string()
    };
    assert_eq!(listening(&[]).matches("urls=http://0.0.0.0:").count(), 3);
    assert_eq!(
        listening(&["ipFamily=IPv6"]).matches("urls=http://[::]:").count(),
        3
    );
}

#[test]
fn nodes_drain_before_they_end_and_routers_leave_their_service() {
    let objects = render("default", &[]);
    let ends = |kind, name| {
        let pod = find(&objects, kind, name)
            .pointer("/spec/template/spec")
            .expect("a pod");
        let grace = pod["terminationGracePeriodSeconds"].as_u64().expect("a number");
        (
            pod.pointer("/containers/0/lifecycle/preStop")
                .expect("a hook")
                .clone(),
            grace,
        )
    };
    let (hook, grace) = ends("StatefulSet", "r-perigee-decode");
    let seconds = format!("{}s", grace - 30);
    let drain = [
        "perigee",
        "node",
        "drain",
        "--self",
        "--wait",
        "--timeout",
        &seconds,
    ];
    assert_eq!(hook["exec"]["command"], json!(drain));
    assert!(grace > 60);
    let short = render("default", &["decode.terminationGracePeriodSeconds=10"]);
    let hook = "/spec/template/spec/containers/0/lifecycle/preStop/exec/command/6";
    let seconds = find(&short, "StatefulSet", "r-perigee-decode").pointer(hook);
    assert_eq!(seconds, Some(&json!("1s")));
    let (hook, grace) = ends("Deployment", "r-perigee-router");
    let deadline = configs(&objects)["r-perigee-router"]["node"]["drain_deadline"].clone();
    let deadline: u64 = deadline
        .as_str()
        .expect("text")
        .trim_end_matches('s')
        .parse()
        .expect("seconds");
    let leaving = hook["sleep"]["seconds"].as_u64().expect("seconds");
    assert!(
        leaving > 0 && leaving + deadline < grace,
        "{leaving} {deadline} {grace}"
    );
    let forced = render("default", &["router.config.node.drain_deadline=3s"]);
    assert_eq!(
        configs(&forced)["r-perigee-router"]["node"]["drain_deadline"].as_str(),
        Some("3s")
    );
}

/// Components of the release as they are named in a policy's peers, or `dns`, `clients`, … for what is no pod of ours.
fn peers(rule: &Value, side: &str) -> BTreeSet<String> {
    let Some(peers) = rule[side].as_array() else {
        return BTreeSet::from(["anyone".to_owned()]);
    };
    peers
        .iter()
        .map(|peer| {
            let labels = &peer["podSelector"]["matchLabels"];
            match labels["app.kubernetes.io/component"].as_str() {
                Some(component) => {
                    assert_eq!(labels["app.kubernetes.io/instance"], RELEASE);
                    component.to_owned()
                }
                None => format!("others {peer}"),
            }
        })
        .collect()
}

/// `port: who` for every port of a policy.
fn flows(policy: &Value, direction: &str, side: &str) -> BTreeMap<u64, BTreeSet<String>> {
    let mut flows: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
    for rule in policy["spec"][direction].as_array().expect("rules") {
        for port in rule["ports"].as_array().expect("every rule names ports") {
            flows
                .entry(port["port"].as_u64().expect("a number"))
                .or_default()
                .extend(peers(rule, side));
        }
    }
    flows
}

#[test]
fn network_policies_open_exactly_what_is_used() {
    let objects = render("default", &["metrics.podMonitor.enabled=true"]);
    let own = r#"others {"podSelector":{}}"#;
    let monitoring =
        r#"others {"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"monitoring"}}}"#;
    let nodes = ["prefill", "decode", "store"];
    let all = ["prefill", "decode", "store", "router", "test"];
    type Flows<'a> = &'a [(u64, &'a [&'a str])];
    let expected: [(&str, Flows<'_>, Flows<'_>); 4] = [
        (
            "r-perigee-router",
            &[(8080, &["test", own, monitoring]), (50051, &["test", own])],
            &[
                (53, &["anyone"]),
                (443, &["anyone"]),
                (2379, &["etcd"]),
                (50051, &["prefill", "decode", "store", "router"]),
            ],
        ),
        (
            "r-perigee-node",
            &[(8080, &[monitoring]), (50051, &all), (50052, &nodes)],
            &[
                (53, &["anyone"]),
                (443, &["anyone"]),
                (2379, &["etcd"]),
                (50051, &nodes),
                (50052, &nodes),
            ],
        ),
        (
            "r-perigee-etcd",
            &[
                (2379, &["etcd", "prefill", "decode", "store", "router"]),
                (2380, &["etcd"]),
                (2381, &[monitoring]),
            ],
            &[(53, &["anyone"]), (2379, &["etcd"]), (2380, &["etcd"])],
        ),
        (
            "r-perigee-test",
            &[],
            &[
                (53, &["anyone"]),
                (8080, &["router"]),
                (50051, &["prefill", "decode", "store", "router"]),
            ],
        ),
    ];
    assert_eq!(of_kind(&objects, "NetworkPolicy").count(), expected.len());
    for (name, ingress, egress) in expected {
        let policy = find(&objects, "NetworkPolicy", name);
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        for (direction, side, expected) in [("ingress", "from", ingress), ("egress", "to", egress)] {
            let expected: BTreeMap<u64, BTreeSet<String>> = expected
                .iter()
                .map(|(port, who)| (*port, who.iter().map(|who| (*who).to_owned()).collect()))
                .collect();
            assert_eq!(flows(policy, direction, side), expected, "{name} {direction}");
        }
        // It selects pods that there are, or may be.
        let selector = policy["spec"]["podSelector"]["matchLabels"]
            .as_object()
            .expect("labels");
        let labels = objects
            .iter()
            .filter_map(|object| match object["kind"].as_str()? {
                "Pod" => object.pointer("/metadata/labels"),
                _ => object.pointer("/spec/template/metadata/labels"),
            });
        assert!(
            labels.clone().any(|labels| selector
                .iter()
                .all(|(label, value)| labels.get(label) == Some(value))),
            "{name} selects nothing"
        );
    }
    let external = render("external-etcd", &[]);
    let policy = find(&external, "NetworkPolicy", "r-perigee-node");
    let ports: Vec<u64> = flows(policy, "egress", "to").into_keys().collect();
    assert_eq!(ports, [53, 2379, 2390, 50051, 50052]);
}

/// Names of our metrics in a text: `perigee_…` as they are scraped.
fn metric_names(text: &str) -> BTreeSet<String> {
    let part_of_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
    text.split(|character| !part_of_name(character))
        .filter(|word| word.starts_with("perigee_"))
        .map(str::to_owned)
        .collect()
}

/// The metrics of docs/metrics.md, under the names that they are scraped by.
fn documented() -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("docs/metrics.md")).expect("docs");
    text.lines()
        .filter_map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let (name, kind) = (cells.next()?.trim_matches('`').to_owned(), cells.next()?);
            Some(match kind {
                "counter" => vec![format!("{name}_total")],
                "gauge" => vec![name],
                "histogram" => ["bucket", "count", "sum"]
                    .map(|part| format!("{name}_{part}"))
                    .into(),
                _ => return None,
            })
        })
        .flatten()
        .collect()
}

#[test]
fn rules_dashboards_and_autoscaling_name_metrics_that_there_are() {
    let documented = documented();
    assert!(documented.len() > 100, "docs/metrics.md was not understood");
    let objects = render("full", &[]);
    let recorded: BTreeSet<String> = find(&objects, "PrometheusRule", "r-perigee")["spec"]["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .flat_map(|group| group["rules"].as_array().expect("rules"))
        .filter_map(|rule| Some(rule["record"].as_str()?.to_owned()))
        .collect();
    assert_eq!(recorded.len(), 2);
    let named = |kind| metric_names(&of_kind(&objects, kind).map(Value::to_string).collect::<String>());
    let known = |name: &String| documented.contains(name) || recorded.contains(name);
    for (kind, least) in [
        ("PrometheusRule", 20),
        ("ScaledObject", 3),
        ("HorizontalPodAutoscaler", 2),
    ] {
        let named = named(kind);
        assert!(named.len() >= least, "{kind} names only {named:?}");
        let unknown: Vec<_> = named.into_iter().filter(|name| !known(name)).collect();
        assert!(unknown.is_empty(), "{kind}: {unknown:?}");
    }
    for name in ["overview", "nodes", "cache", "transfers"] {
        let map = find(&objects, "ConfigMap", &format!("r-perigee-dashboard-{name}"));
        assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
        let dashboard: Value = serde_json::from_str(str_of(map, &format!("/data/perigee-{name}.json")))
            .expect("a dashboard is JSON");
        let panels = dashboard["panels"].as_array().expect("panels");
        let queries: Vec<&str> = panels
            .iter()
            .flat_map(|panel| panel["targets"].as_array().expect("targets"))
            .map(|target| str_of(target, "/expr"))
            .collect();
        assert!(queries.len() >= panels.len() && panels.len() >= 6, "{name}");
        let named = metric_names(&queries.join(" "));
        let unknown: Vec<_> = named.iter().filter(|name| !documented.contains(*name)).collect();
        assert!(unknown.is_empty(), "{name}: {unknown:?}");
    }
    ok(
        Command::new(tool("bin/python"))
            .arg(root().join("scripts/dashboards.py"))
            .arg("--check"),
        "",
    );
}

#[test]
fn alerts_pass_their_unit_tests_and_each_has_one() {
    let folder = tempfile::tempdir().expect("folder");
    let rules_in = |values, sets: &[&str]| {
        let objects = render(values, sets);
        let rules = find(&objects, "PrometheusRule", "r-perigee")["spec"].clone();
        let file = folder.path().join(format!("{values}.json"));
        fs::write(&file, rules.to_string()).expect("write");
        ok(
            Command::new("promtool")
                .args(["check", "rules", "--lint-fatal"])
                .arg(&file),
            "",
        );
        (rules, file)
    };
    rules_in("full", &[]);
    let (rules, file) = rules_in("default", &["metrics.rules.enabled=true"]);
    let tests = fs::read_to_string(root().join("tests/chart/alerts_test.yaml")).expect("tests");
    let path = folder.path().join("alerts_test.yaml");
    fs::write(&path, tests.replace("{{RULES}}", &file.display().to_string())).expect("write");
    ok(Command::new("promtool").args(["test", "rules"]).arg(&path), "");

    let alerts = rules["groups"][1]["rules"].as_array().expect("rules");
    assert!(alerts.len() >= 15);
    for alert in alerts {
        let name = str_of(alert, "/alert");
        let fires = format!("alertname: {name}\n        exp_alerts:\n");
        assert!(tests.contains(&fires), "no test makes {name} fire");
    }
}

#[test]
fn autoscaling_takes_the_number_of_replicas_over() {
    let objects = render("full", &[]);
    for (name, replicas) in [
        ("r-perigee-prefill", false),
        ("r-perigee-decode", false),
        ("r-perigee-store", true),
    ] {
        let workload = find(&objects, "StatefulSet", name);
        assert_eq!(workload["spec"].get("replicas").is_some(), replicas, "{name}");
    }
    let text: String = ["ScaledObject", "HorizontalPodAutoscaler"]
        .iter()
        .flat_map(|kind| of_kind(&objects, kind))
        .map(Value::to_string)
        .collect();
    assert!(text.contains("perigee_prefill_queued_tokens") && text.contains("perigee_kv_used_ratio"));
    assert!(!text.contains("cpu"), "nothing scales on processors");
}

/// Prometheus reads the pages as OpenMetrics, where a counter's family has no `_total`; promtool reads its older format only.
fn as_promtool_reads(page: &str) -> String {
    let counters: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut text = String::new();
    for line in page
        .lines()
        .filter(|line| *line != "# EOF" && !line.starts_with("# UNIT"))
    {
        let mut words = line.splitn(4, ' ');
        let parts = (words.next(), words.next(), words.next(), words.next());
        if let (Some("#"), Some(what), Some(name), Some(rest)) = parts
            && counters.contains(name)
        {
            text.push_str(&format!("# {what} {name}_total {rest}\n"));
        } else {
            text.push_str(&format!("{line}\n"));
        }
    }
    text
}

fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("connect");
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )
    .expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(!head.contains("chunked"), "{head}");
    body.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_of_every_role_pass_promtool() {
    let folder = tempfile::tempdir().expect("folder");
    let model = folder.path().join("tiny.gguf");
    write_tiny_gguf(&model, &TinyModel::default()).expect("model");
    let arguments = [
        "--prefill",
        "1",
        "--decode",
        "1",
        "--store",
        "1",
        "--kv-memory",
        "4MiB",
    ];
    let cluster = Cluster::start(Path::new(&model), &arguments);
    let mut client = cluster.client().await;
    let mut pages: BTreeMap<String, String> = wait_for_status(&mut client, |status| {
        let nodes: Vec<_> = records(&status).collect();
        if nodes.len() < 3 {
            return Err(format!("{} of 3 nodes have been heard of", nodes.len()));
        }
        Ok(nodes
            .iter()
            .map(|node| (node.role.to_string(), node.http_endpoint.clone()))
            .collect())
    })
    .await;
    pages.insert("router".into(), cluster.ready.http.clone());
    assert_eq!(pages.len(), 4, "{pages:?}");
    for (role, endpoint) in pages {
        let page = get(endpoint.trim_start_matches("http://"), "/metrics");
        let mut promtool = Command::new("promtool");
        let output = run(promtool.args(["check", "metrics"]), &as_promtool_reads(&page));
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(
            output.status.success() && said.is_empty(),
            "{role}: {said}\n{page}"
        );
        assert!(page.contains("perigee_"), "{role}");
    }
}
