//! Clusters of real processes for tests: the `perigee` binary, as users run it.
//!
//! Invariant: whatever a test starts is gone when its guard is dropped, also when the test panics.

#![allow(clippy::disallowed_methods)] // Waiting on a predicate of another process needs a pause between looks.

pub mod cases;
pub mod certificates;
pub mod etcd;
pub mod load;
pub mod pod;

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use engine::fixture::{TinyModel, write_tiny_gguf};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::v1;
use proto::v1::inference_client::InferenceClient;
use serde::Deserialize;
use tonic::transport::Channel;
use types::{Epoch, NodeRecord, Token};

/// How long anything may take here before the test fails: generous, since CI machines are small and shared.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The binary under test, built beside the tests.
///
/// # Panics
///
/// If it is not there.
pub fn perigee() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let path = test
        .parent()
        .and_then(Path::parent)
        .expect("target/PROFILE/deps/TEST")
        .join("perigee");
    assert!(
        path.is_file(),
        "{} is missing: cargo build --release -p perigee",
        path.display()
    );
    path
}

/// The workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace holds this crate")
        .to_owned()
}

/// The real model.
///
/// # Panics
///
/// If it is not there.
pub fn model() -> PathBuf {
    let path = std::env::var_os("PERIGEE_MODEL")
        .map(PathBuf::from)
        .unwrap_or_else(|| root().join("models/SmolLM2-135M-Instruct.Q4_1.gguf"));
    assert!(
        path.is_file(),
        "{} is missing: perigee model pull smollm2-135m-instruct",
        path.display()
    );
    path
}

/// A port that nothing listened on a moment ago, and that Linux gives to no outgoing connection (those begin at 32768):
/// a node that is killed and started again finds its port free, however many connections were opened in between.
///
/// # Panics
///
/// If none of a hundred ports is free.
pub fn free_port() -> u16 {
    let mut random = cases::Random::new(RandomState::new().hash_one(()));
    (0..100)
        .map(|_| u16::try_from(random.between(10_000, 30_000)).expect("small"))
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port among a hundred")
}

/// Waits until `look` gives something.
///
/// # Panics
///
/// If it does not within [`PATIENCE`].
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A running process that is killed when dropped.
pub struct Process {
    child: Child,
    /// Open for as long as the process may live: children of `perigee up` end with it.
    _stdin: Option<ChildStdin>,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its stderr in a file of `folder`.
    pub fn start(command: &mut Command, folder: &Path, name: &str) -> Self {
        let log = folder.join(format!("{name}.log"));
        let stderr = File::create(&log).expect("create log");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        let stdin = child.stdin.take();
        Self {
            child,
            _stdin: stdin,
            log,
        }
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().expect("pid"))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("the process lives");
    }

    /// Whether the process has not ended.
    pub fn alive(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Waits for the end and gives the exit code; `None` if a signal ended it.
    pub fn wait(&mut self) -> Option<i32> {
        wait_for("the process to end", || self.child.try_wait().expect("wait")).code()
    }

    /// Kills it at once, without any chance to clean up.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// What it wrote to stderr so far.
    pub fn log(&self) -> String {
        let mut text = Vec::new();
        File::open(&self.log)
            .and_then(|mut file| file.read_to_end(&mut text))
            .expect("read log");
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Reads one line of stdout.
    pub fn line(&mut self) -> String {
        let stdout = self.child.stdout.as_mut().expect("stdout is piped");
        let mut line = String::new();
        BufReader::with_capacity(1, stdout)
            .read_line(&mut line)
            .expect("read stdout");
        line
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if thread::panicking() {
            eprintln!("--- {} ---\n{}", self.log.display(), self.log());
        }
    }
}

/// What `perigee up -o json` says once the cluster serves.
#[derive(Debug, Deserialize)]
pub struct Ready {
    /// Base URL of the HTTP API.
    pub http: String,
    /// URL of the gRPC API.
    pub grpc: String,
    /// URL of the registry.
    pub registry: String,
    /// The processes.
    pub nodes: Vec<ReadyNode>,
}

/// A tiny model, written into `folder`.
///
/// # Panics
///
/// It cannot be written.
pub fn tiny(folder: &Path) -> PathBuf {
    let path = folder.join("tiny.gguf");
    write_tiny_gguf(&path, &TinyModel::default()).expect("write the model");
    path
}

/// One process of a cluster.
#[derive(Debug, Deserialize)]
pub struct ReadyNode {
    /// Its name.
    pub id: String,
    /// Its role.
    pub role: String,
    /// Its process id.
    pub pid: i32,
}

/// A cluster of `perigee up`.
pub struct Cluster {
    /// Where it is.
    pub ready: Ready,
    /// The supervisor.
    pub up: Process,
    /// Logs and files of this test.
    pub folder: tempfile::TempDir,
}

impl Cluster {
    /// Starts a cluster on free ports and waits until it serves.
    pub fn start(model: &Path, arguments: &[&str]) -> Self {
        Self::start_with(model, arguments, &[])
    }

    /// As [`Cluster::start`], with these variables in the environment of all processes.
    pub fn start_with(model: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let mut command = Command::new(perigee());
        command
            .args([
                "up",
                "-o",
                "json",
                "--http-port",
                "0",
                "--grpc-port",
                "0",
                "--model",
            ])
            .arg(model)
            .args(arguments)
            .envs(environment.iter().copied());
        let mut up = Process::start(&mut command, folder.path(), "up");
        let line = up.line();
        let ready = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("up said {line:?}: {error}\n{}", up.log()));
        Self { ready, up, folder }
    }

    /// A client of the router.
    pub async fn client(&self) -> InferenceClient<Channel> {
        client(&self.ready.grpc).await
    }

    /// The process ids of a role.
    pub fn pids(&self, role: &str) -> Vec<Pid> {
        let nodes = self.ready.nodes.iter().filter(|node| node.role == role);
        nodes.map(|node| Pid::from_raw(node.pid)).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.up.alive() {
            self.up.signal(Signal::SIGTERM);
            self.up.wait();
        }
    }
}

/// A client of the router at `url`.
pub async fn client(url: &str) -> InferenceClient<Channel> {
    let channel = Channel::from_shared(url.to_owned())
        .expect("url")
        .connect()
        .await
        .expect("connect");
    InferenceClient::new(channel)
}

/// A finished generation.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The tokens.
    pub tokens: Vec<Token>,
    /// The text.
    pub text: String,
    /// The end of the stream.
    pub finished: v1::Finished,
}

impl Generated {
    /// Its token counts.
    pub fn usage(&self) -> &v1::Usage {
        self.finished
            .usage
            .as_ref()
            .expect("a finished request has usage")
    }

    /// How it was served.
    pub fn report(&self) -> &v1::RequestReport {
        self.finished
            .report
            .as_ref()
            .expect("a finished request has a report")
    }
}

/// Generates to the end.
///
/// # Errors
///
/// The status of the RPC.
///
/// # Panics
///
/// If the stream ends without a status and without `finished`, which the API promises never to do.
pub async fn generate(
    client: &mut InferenceClient<Channel>,
    request: v1::GenerateRequest,
) -> Result<Generated, tonic::Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let (mut tokens, mut text) = (Vec::new(), String::new());
    while let Some(response) = stream.message().await? {
        match response.event {
            Some(v1::generate_response::Event::Tokens(chunk)) => {
                tokens.extend(chunk.ids);
                text.push_str(&chunk.text);
            }
            Some(v1::generate_response::Event::Finished(finished)) => {
                return Ok(Generated {
                    tokens,
                    text,
                    finished,
                });
            }
            Some(v1::generate_response::Event::Accepted(_)) | None => {}
        }
    }
    panic!("the stream ended with neither an error nor `finished`");
}

/// A request of token ids.
pub fn request(tokens: &[Token], sampling: v1::Sampling) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Tokens(v1::TokenIds {
            ids: tokens.to_vec(),
        })),
        sampling: Some(sampling),
        ..v1::GenerateRequest::default()
    }
}

/// Asks the router for the cluster's status until `look` finds what it wants in it. Its error says what there is instead.
///
/// # Panics
///
/// If it does not within [`PATIENCE`].
pub async fn wait_for_status<T>(
    client: &mut InferenceClient<Channel>,
    mut look: impl FnMut(v1::ClusterStatusResponse) -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        let status = client
            .cluster_status(v1::ClusterStatusRequest {})
            .await
            .expect("status")
            .into_inner();
        let instead = match look(status) {
            Ok(found) => return found,
            Err(instead) => instead,
        };
        assert!(start.elapsed() < PATIENCE, "{instead}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Nodes that the router has heard of.
pub fn heard(status: &v1::ClusterStatusResponse) -> impl Iterator<Item = &v1::NodeStatus> {
    let nodes = status.nodes.iter();
    nodes.filter(|node| node.connected && !node.load_json.is_empty())
}

/// Entries of the nodes that the router has heard of.
pub fn records(status: &v1::ClusterStatusResponse) -> impl Iterator<Item = NodeRecord> {
    heard(status).map(|node| serde_json::from_str(&node.record_json).expect("record"))
}

/// Waits until the router at `url` has heard of an incarnation of `id` that is newer than `than`.
pub async fn newer(url: &str, id: &str, than: Epoch) -> NodeRecord {
    let mut client = client(url).await;
    wait_for_status(&mut client, |status| {
        let mut records = records(&status);
        let found = records.find(|record| record.id.as_str() == id && record.epoch > than);
        found.ok_or_else(|| format!("{id} did not come back"))
    })
    .await
}

/// Waits until the router's index knows at least `blocks` blocks: logs reach it a moment after a request ended.
pub async fn wait_for_index(client: &mut InferenceClient<Channel>, blocks: u64) {
    wait_for_status(client, |status| {
        let known = status.nodes.iter().map(|node| node.indexed_blocks).max();
        let known = known.unwrap_or(0);
        if known >= blocks {
            return Ok(());
        }
        Err(format!(
            "the index knows {known} blocks, but {blocks} were expected"
        ))
    })
    .await;
}
