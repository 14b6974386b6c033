//! `perigee doctor` names the cause of what was really set up wrong.

#![allow(missing_docs)]

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use engine::fixture::{TinyModel, write_tiny_gguf};
use futures::Stream;
use node::registry;
use proto::v1;
use proto::v1::node_server::{Node, NodeServer};
use serde_json::Value;
use tests::certificates::{Authority, expired};
use tests::etcd::Etcd;
use tests::{Cluster, Process, free_port, perigee, wait_for, wait_for_status};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use types::{Epoch, NodeId, NodeRecord, Role};

const UNHEALTHY: i32 = 10;

fn tiny(folder: &Path, seed: u64) -> PathBuf {
    let path = folder.join(format!("tiny-{seed}.gguf"));
    let model = TinyModel {
        seed,
        ..TinyModel::default()
    };
    write_tiny_gguf(&path, &model).expect("write the model");
    path
}

/// A report: its exit code, and its findings that are not good.
#[derive(Debug)]
struct Report {
    code: i32,
    bad: Vec<(String, String, String)>,
}

impl Report {
    fn of(command: &mut Command) -> Self {
        let output = command.output().expect("start");
        let printed = String::from_utf8(output.stdout).expect("UTF-8");
        let complained = String::from_utf8_lossy(&output.stderr);
        let report: Value =
            serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}{complained}"));
        let findings = report["findings"].as_array().expect("findings").iter();
        let text = |finding: &Value, name: &str| finding[name].as_str().expect("text").to_owned();
        let bad = findings
            .filter(|finding| finding["level"] == "failed")
            .map(|finding| {
                let message = format!("{}: {}", finding["subjects"], text(finding, "message"));
                (text(finding, "group"), message, text(finding, "hint"))
            });
        Self {
            code: output.status.code().expect("no signal ended it"),
            bad: bad.collect(),
        }
    }

    /// That one of the failures is this one, and says what to do.
    fn names(&self, group: &str, cause: &str, remedy: &str) {
        let named = self
            .bad
            .iter()
            .any(|(of, message, hint)| of == group && message.contains(cause) && hint.contains(remedy));
        assert!(named, "{group}: {cause:?} ({remedy:?}) is not in {self:#?}");
        assert_eq!(self.code, UNHEALTHY, "{self:#?}");
    }

    /// That this group has no failure.
    fn is_silent_on(&self, group: &str) {
        assert!(self.bad.iter().all(|(of, ..)| of != group), "{self:#?}");
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(perigee());
    command.args(["doctor", "-o", "json"]).args(arguments);
    command
}

fn doctor(arguments: &[&str]) -> Report {
    Report::of(&mut command(arguments))
}

#[test]
fn a_healthy_cluster_is_told_to_be_healthy() {
    let folder = tempfile::tempdir().expect("folder");
    let model = tiny(folder.path(), 1);
    let cluster = Cluster::start(&model, &["--prefill", "1", "--decode", "1"]);
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let registry = format!("registry.url={}", cluster.ready.registry);
    let healthy = [
        "--router",
        router,
        "--set",
        &registry,
        "--model",
        model.to_str().expect("UTF-8"),
    ];
    let report = doctor(&healthy);
    assert_eq!((report.code, report.bad.len()), (0, 0), "{report:#?}");
    let output = Command::new(perigee())
        .arg("doctor")
        .args(healthy)
        .output()
        .expect("start");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    for said in [
        "√ the settings are valid",
        "answers, and has 3 members",
        "is what the cluster serves as tiny-1",
        "√ all clocks are within",
        "√ all run",
        "0 failed",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
}

#[test]
fn a_registry_that_is_not_there_is_named() {
    let nobody = format!("127.0.0.1:{}", free_port());
    let report = doctor(&["--set", &format!("registry.url=etcd://{nobody}")]);
    report.names(
        "registry",
        &format!("{nobody}: Connection refused"),
        "start etcd there",
    );

    // Something else than a registry listens.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let report = doctor(&["--set", &format!("registry.url=etcd://{address}")]);
    report.names("registry", &address, "registry.etcd_authority");
}

#[test]
fn another_model_file_than_the_clusters_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let cluster = Cluster::start(
        &tiny(folder.path(), 1),
        &["--model-name", "tiny", "--prefill", "0", "--decode", "1"],
    );
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let other = tiny(folder.path(), 2);
    let other = other.to_str().expect("UTF-8");
    let report = doctor(&["--router", router, "--model", other, "--model-name", "tiny"]);
    report.names(
        "model",
        "is another file than decode-0 serves as tiny",
        "the same file",
    );

    // The node itself is refused, for the same reason.
    let mut node = Process::start(
        Command::new(perigee())
            .args([
                "decode",
                "--id",
                "other",
                "--model",
                other,
                "--model-name",
                "tiny",
            ])
            .args(["--registry", &cluster.ready.registry]),
        folder.path(),
        "other",
    );
    assert_eq!(node.wait(), Some(73), "{}", node.log());

    let same = tiny(folder.path(), 1);
    let same = [
        "--router",
        router,
        "--model",
        same.to_str().expect("UTF-8"),
        "--model-name",
        "tiny",
    ];
    doctor(&same).is_silent_on("model");
    let report = doctor(&[&same[..], &["--block-tokens", "64"]].concat());
    report.names("model", "kv.block_tokens here is 64", "the same settings");
    let cut = folder.path().join("cut.gguf");
    let whole = fs::read(other).expect("the model");
    fs::write(&cut, &whole[..whole.len() / 2]).expect("written");
    let report = doctor(&["--router", router, "--model", cut.to_str().expect("UTF-8")]);
    report.names("model", "cannot be read", "copied whole");
}

/// A node that is a member, and whose version and clock are not ours.
struct Odd {
    record: NodeRecord,
    version: &'static str,
    ahead_ms: u64,
}

#[tonic::async_trait]
impl Node for Odd {
    async fn info(&self, _: Request<v1::InfoRequest>) -> Result<Response<v1::InfoResponse>, Status> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        Ok(Response::new(v1::InfoResponse {
            record_json: serde_json::to_string(&self.record).expect("JSON"),
            version: self.version.to_owned(),
            unix_time_ms: now.as_millis() as u64 + self.ahead_ms,
        }))
    }

    type WatchLoadStream = Pin<Box<dyn Stream<Item = Result<v1::LoadReport, Status>> + Send>>;

    async fn watch_load(
        &self,
        _: Request<v1::WatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        Err(Status::unimplemented("none"))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Err(Status::unimplemented("none"))
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        Err(Status::unimplemented("none"))
    }

    async fn cordon(&self, _: Request<v1::CordonRequest>) -> Result<Response<v1::CordonResponse>, Status> {
        Err(Status::unimplemented("none"))
    }

    async fn flip(&self, _: Request<v1::FlipRequest>) -> Result<Response<v1::FlipResponse>, Status> {
        Err(Status::unimplemented("none"))
    }

    async fn log_level(
        &self,
        _: Request<v1::LogLevelRequest>,
    ) -> Result<Response<v1::LogLevelResponse>, Status> {
        Err(Status::unimplemented("none"))
    }
}

fn odd_record(address: SocketAddr) -> NodeRecord {
    NodeRecord {
        id: NodeId::new("odd"),
        epoch: Epoch(1),
        role: Role::Store,
        grpc_endpoint: address.to_string(),
        http_endpoint: address.to_string(),
        transfer_endpoint: String::new(),
        model: String::new(),
        kv_space: None,
        capacity_blocks: 0,
        context_tokens_max: 0,
    }
}

/// Makes such a node a member of the cluster, and examines it.
async fn with_odd_node(cluster: &Cluster, version: &'static str, ahead_ms: u64) -> Report {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let record = odd_record(listener.local_addr().expect("bound"));
    let odd = Odd {
        record: record.clone(),
        version,
        ahead_ms,
    };
    let served = tonic::transport::Server::builder().add_service(NodeServer::new(odd));
    let serving = tokio::spawn(served.serve_with_incoming(TcpListenerStream::new(listener)));
    let end = CancellationToken::new();
    let config = registry::Config::default();
    let registry = registry::connect(&cluster.ready.registry, &config, end.clone())
        .await
        .expect("the registry");
    let registration = registry.register(record).await.expect("registered");
    wait_for_status(&mut cluster.client().await, |status| {
        let known = status
            .nodes
            .iter()
            .any(|node| node.record_json.contains("\"odd\""));
        if known {
            Ok(())
        } else {
            Err("the router does not know of the node".to_owned())
        }
    })
    .await;
    let router = cluster.ready.grpc.trim_start_matches("http://").to_owned();
    let examined = node::task::blocking("doctor", move || doctor(&["--router", &router]));
    let report = examined.await.expect("it ends");
    registration.unregister().await.expect("unregistered");
    end.cancel();
    serving.abort();
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_differ_and_versions_that_meet_are_named() {
    let folder = tempfile::tempdir().expect("folder");
    let cluster = Cluster::start(&tiny(folder.path(), 1), &["--prefill", "0", "--decode", "1"]);
    let report = with_odd_node(&cluster, env!("CARGO_PKG_VERSION"), 3_600_000).await;
    report.names("clocks", "\"odd\"]: its clock is 36", "chrony");
    report.is_silent_on("versions");
    let report = with_odd_node(&cluster, "0.0.9", 0).await;
    report.names("versions", "0.0.9 on odd", "finish the upgrade");
    report.is_silent_on("clocks");
}

/// Whether this test may do what only root may.
fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

#[test]
fn a_memlock_limit_below_the_pool_is_named() {
    let shell = |pool: &str| {
        let arguments = format!("--transport ucx --kv-memory {pool}");
        let mut command = Command::new("sh");
        // Limits of a shell are those of what it becomes.
        let line = format!(
            "ulimit -l 64 && exec {} doctor -o json {arguments}",
            perigee().display()
        );
        command.args(["-c", &line]).env("HOME", "/");
        if is_root() {
            // Root may lock whatever the limit is.
            command.uid(65_534).gid(65_534);
        }
        Report::of(&mut command)
    };
    shell("64MiB").names(
        "memory",
        "memlock limit of 64.0 KiB is below the pool of 64.0 MiB",
        "ulimit -l",
    );
}

#[test]
fn a_port_that_is_taken_is_named_with_its_holder() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let report = doctor(&["--set", &format!("node.http_port={port}")]);
    let holder = format!("node.http_port {port} is taken by ");
    report.names("ports", &holder, "node.http_port");
    report.names("ports", &format!("({})", std::process::id()), "stop it");
    drop(listener);
    doctor(&["--set", &format!("node.http_port={port}")]).is_silent_on("ports");
}

#[test]
fn an_own_port_is_no_trouble() {
    let folder = tempfile::tempdir().expect("folder");
    let cluster = Cluster::start(&tiny(folder.path(), 1), &["--prefill", "0", "--decode", "1"]);
    let router = cluster.ready.grpc.trim_start_matches("http://");
    let (_, port) = router.rsplit_once(':').expect("a port");
    let report = doctor(&["--router", router, "--set", &format!("node.grpc_port={port}")]);
    assert_eq!(report.code, 0, "{report:#?}");
}

#[test]
fn an_expired_certificate_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let files = Authority::new(folder.path()).issue("old", &["127.0.0.1"], expired);
    let report = Report::of(command(&[]).envs(files.settings("127.0.0.1")));
    report.names("certificates", "expired", "renew");
}

#[test]
fn a_disk_without_room_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().to_str().expect("UTF-8").to_owned();
    let of = |path: &str, capacity: &str| {
        doctor(&[
            "--set",
            &format!("kv.disk_path={path}"),
            "--set",
            &format!("kv.disk_capacity={capacity}"),
        ])
    };
    of(&path, "4096TiB").names("disk", "is too full", "kv.disk_capacity");
    of(&path, "1MiB").is_silent_on("disk");
    if is_root() {
        let small = SmallDisk::mount(folder.path());
        of(&path, "2MiB").names(
            "disk",
            "1.0 MiB are free, but kv.disk_capacity of 2.0 MiB",
            "free space",
        );
        fs::write(folder.path().join("full"), vec![1; 1 << 20]).expect("it has room for this");
        of(&path, "512KiB").names("disk", "0 B are free", "free space");
        drop(small);
    }
}

/// A file system of a mebibyte, until it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &Path) -> Self {
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(path)
            .status();
        assert!(
            mount.expect("mount").success(),
            "a file system for {}",
            path.display()
        );
        Self(path.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg(&self.0).status().ok();
    }
}

#[test]
fn a_setting_that_nobody_reads_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("perigee.toml");
    fs::write(&file, "[kv]\nmemory = \"64MiB\"\nblock_token = 32\n").expect("written");
    let report = doctor(&["--config", file.to_str().expect("UTF-8")]);
    report.names("settings", "kv.block_token", "correct or remove");
}

#[test]
fn a_cluster_without_a_decode_node_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let etcd = Etcd::start();
    let port = free_port();
    let mut router = Command::new(perigee());
    router
        .args(["router", "--id", "router-0", "--registry", &etcd.url()])
        .args(["--grpc-port", &port.to_string(), "--model"])
        .arg(tiny(folder.path(), 1));
    let _router = Process::start(&mut router, folder.path(), "router");
    let address = format!("127.0.0.1:{port}");
    wait_for("the router to answer", || {
        let status = Command::new(perigee())
            .args(["status", "--router", &address])
            .output()
            .expect("start");
        status.status.success().then_some(())
    });
    let report = doctor(&[
        "--router",
        &address,
        "--set",
        &format!("registry.url={}", etcd.url()),
    ]);
    report.names(
        "members",
        "no request can be served without a decode node",
        "start one",
    );
    report.is_silent_on("registry");
}
