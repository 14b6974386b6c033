//! `perigee up`: a whole cluster on this machine, one process per node, around the embedded registry.
//!
//! The roles are the same as in a deployment; only the registry differs. When this process ends, in whichever way, so
//! do its children.

mod child;

use std::ffi::OsString;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use node::registry::Registry;
use node::registry::embedded;
use node::tls::ClientCertificates;
use node::{ApiKey, Connector, Listeners, Metrics, Readiness, Tls, identity, registry};
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use types::{ErrorCode, NodeRecord, Role};

use crate::arguments::{Precision, SettingFlags, UpArgs};
use crate::output::{self, Format, View};
use crate::reach::{self, Router};
use crate::settings;
use child::Plan;

/// Loading a large model takes long; a cluster that is not there by then will not come.
const READY_DEADLINE: Duration = Duration::from_secs(600);
const READY_POLL: Duration = Duration::from_millis(50);
/// A router that listens answers at once.
const STATUS_DEADLINE: Duration = Duration::from_secs(2);
/// What a child may take to end in order before it is killed.
const GRACE: Duration = Duration::from_secs(15);
/// More processes than this on one machine are a mistake in the arguments.
const NODES_MAX: usize = 64;

/// Runs until Ctrl-C, SIGTERM, or a child that cannot be kept running.
pub(crate) async fn run(arguments: UpArgs, key: Option<&ApiKey>, format: Format) -> anyhow::Result<()> {
    format.without_names()?;
    let shutdown = node::Shutdown::listen()?;
    let mut cluster = tokio::select! {
        cluster = Cluster::start(arguments, key, false) => cluster?,
        () = shutdown.started() => return Ok(()),
    };
    let ready = cluster.ready();
    format.print(&View::new(serde_json::to_value(&ready)?, |_| {
        announcement(&ready)
    }))?;
    let result = tokio::select! {
        () = shutdown.started() => Ok(()),
        error = cluster.failed() => Err(error),
    };
    cluster.stop().await?;
    result
}

fn announcement(ready: &Ready<'_>) -> String {
    let mut table = output::table(&["NODE", "ROLE", "PID"]);
    for node in &ready.nodes {
        table.add_row([
            node.id.to_owned(),
            node.role.to_owned(),
            node.pid.map_or("-".to_owned(), |pid| pid.to_string()),
        ]);
    }
    format!(
        "OpenAI API  {}/v1   models: {}\n\
        gRPC        {}\n\
        registry    {}\n\
        {}\n\
        Try: perigee chat --router {}      Ctrl-C ends the cluster.\n",
        ready.http,
        ready.models.join(", "),
        ready.grpc,
        ready.registry,
        output::table_text(&table),
        ready.grpc_address
    )
}

/// What a cluster says of itself once it serves.
#[derive(Debug, Serialize)]
pub(crate) struct Ready<'a> {
    http: String,
    grpc: String,
    #[serde(skip)]
    grpc_address: &'a str,
    registry: &'a str,
    models: Vec<String>,
    nodes: Vec<ReadyNode<'a>>,
}

#[derive(Debug, Serialize)]
struct ReadyNode<'a> {
    id: &'a str,
    role: &'static str,
    pid: Option<u32>,
}

struct Started {
    id: String,
    role: &'static str,
    pid: watch::Receiver<Option<u32>>,
}

/// A running cluster.
pub(crate) struct Cluster {
    registry: String,
    reach: Router,
    router: NodeRecord,
    models: Vec<String>,
    nodes: Vec<Started>,
    children: JoinSet<anyhow::Result<()>>,
    /// Ends the children; the registry goes on, so that they can leave it.
    stop: CancellationToken,
    /// Ends everything else.
    end: CancellationToken,
}

impl Cluster {
    /// Starts all processes and waits until the router serves with every node connected. `key` is shown to the router; `quiet` keeps
    /// the children's logs off the terminal.
    pub(crate) async fn start(arguments: UpArgs, key: Option<&ApiKey>, quiet: bool) -> anyhow::Result<Self> {
        check(&arguments)?;
        let settings = settings::load_for_command(&arguments.settings)?.value;
        settings.tls.validate_server().map_err(types::Error::from)?;
        let reach = Router::with_tls("", reach::load_tls(&settings.tls)?, key);
        let end = CancellationToken::new();
        // Everything below ends with this guard if the start fails half way.
        let guard = end.clone().drop_guard();
        let registry = match &arguments.registry {
            Some(url) => url.clone(),
            None => serve_registry(reach.tls().cloned(), end.clone()).await?,
        };
        let program = std::env::current_exe().context("find the perigee binary")?;
        let stop = end.child_token();
        let mut children = JoinSet::new();
        let mut nodes = Vec::new();
        for (role, index) in nodes_of(&arguments) {
            let id = if role == Role::Router {
                "router".to_owned()
            } else {
                format!("{role}-{index}")
            };
            let plan = Plan {
                arguments: child_arguments(&arguments, &registry, role, &id),
                role: role.as_str(),
                program: program.clone(),
                id: id.clone(),
                quiet,
                grace: GRACE,
            };
            let (pid_tx, pid) = watch::channel(None);
            children.spawn(child::supervise(plan, pid_tx, stop.clone()));
            nodes.push(Started {
                id,
                role: role.as_str(),
                pid,
            });
        }
        let expected: Vec<String> = nodes.iter().map(|node| node.id.clone()).collect();
        let config = settings.registry.config(Connector::new(reach.tls().cloned()));
        let ready = ready(&registry, &config, &reach, &expected, end.clone());
        let (router, models) = tokio::select! {
            ready = ready => ready?,
            error = first_failure(&mut children) => return Err(error),
        };
        guard.disarm();
        Ok(Self {
            reach: reach.at(&router.grpc_endpoint),
            registry,
            router,
            models,
            nodes,
            children,
            stop,
            end,
        })
    }

    /// How the router is reached.
    pub(crate) fn router(&self) -> &Router {
        &self.reach
    }

    fn ready(&self) -> Ready<'_> {
        let nodes = self.nodes.iter();
        let scheme = self.reach.tls().map_or("http", |_| "https");
        Ready {
            http: format!("{scheme}://{}", self.router.http_endpoint),
            grpc: format!("{scheme}://{}", self.router.grpc_endpoint),
            grpc_address: &self.router.grpc_endpoint,
            registry: &self.registry,
            models: self.models.clone(),
            nodes: nodes
                .map(|node| ReadyNode {
                    id: &node.id,
                    role: node.role,
                    pid: *node.pid.borrow(),
                })
                .collect(),
        }
    }

    /// Waits until a child cannot be kept running.
    pub(crate) async fn failed(&mut self) -> anyhow::Error {
        first_failure(&mut self.children).await
    }

    /// Ends all processes in order and waits for them.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        let mut result = Ok(());
        while let Some(ended) = self.children.join_next().await {
            result = result.and(ended.map_err(Into::into).flatten());
        }
        self.end.cancel();
        result
    }
}

fn check(arguments: &UpArgs) -> anyhow::Result<()> {
    let total = arguments.prefill + arguments.decode + arguments.store;
    if arguments.decode == 0 {
        bail!(types::Error::invalid(
            "decode",
            "--decode is 0, but a request needs a decode node"
        ));
    }
    if total > NODES_MAX {
        bail!(types::Error::invalid(
            "decode",
            format!("{total} nodes are asked for, but at most {NODES_MAX} run here")
        ));
    }
    Ok(())
}

fn nodes_of(arguments: &UpArgs) -> Vec<(Role, usize)> {
    let groups = [
        (Role::Prefill, arguments.prefill),
        (Role::Decode, arguments.decode),
        (Role::Store, arguments.store),
        (Role::Router, 1),
    ];
    groups
        .into_iter()
        .flat_map(|(role, count)| (0..count).map(move |index| (role, index)))
        .collect()
}

fn child_arguments(arguments: &UpArgs, registry: &str, role: Role, id: &str) -> Vec<OsString> {
    let mut list: Vec<OsString> = ["--exit-with-parent", "--registry", registry, "--id", id]
        .map(Into::into)
        .into();
    if role == Role::Router {
        list.extend(["--http-port".into(), arguments.http_port.to_string().into()]);
        list.extend(["--grpc-port".into(), arguments.grpc_port.to_string().into()]);
    } else {
        list.extend(["--http-port", "0", "--grpc-port", "0"].map(OsString::from));
    }
    let SettingFlags {
        config,
        model,
        model_name,
        precision,
        threads,
        kv_memory,
        block_tokens,
        transport,
        set,
    } = &arguments.settings;
    let mut flag = |name: &str, value: OsString| list.extend([name.into(), value]);
    if let Some(config) = config {
        flag("--config", config.into());
    }
    if let Some(model) = model {
        flag("--model", model.into());
    }
    if let Some(name) = model_name {
        flag("--model-name", name.into());
    }
    if let Some(precision) = precision {
        let name = match precision {
            Precision::Exact => "exact",
            Precision::Fast => "fast",
        };
        flag("--precision", name.into());
    }
    if let Some(threads) = threads {
        flag("--threads", threads.to_string().into());
    }
    if let Some(memory) = kv_memory {
        flag("--kv-memory", memory.into());
    }
    if let Some(tokens) = block_tokens {
        flag("--block-tokens", tokens.to_string().into());
    }
    if let Some(transport) = transport {
        flag("--transport", transport.as_str().into());
    }
    for setting in set {
        flag("--set", setting.into());
    }
    list
}

/// Serves the embedded registry on a free port and gives its URL.
async fn serve_registry(tls: Option<Tls>, end: CancellationToken) -> anyhow::Result<String> {
    let config = node::serve::Config::default();
    let listeners = Listeners::bind(&config).await?;
    let url = format!("perigee://{}", listeners.grpc_address());
    let epoch = identity::epoch(SystemTime::now(), None);
    let service = embedded::Service::new(epoch, end.clone());
    let server = node::serve::Server::new(&config, Readiness::new([]), Metrics::new())
        .tls(tls.clone(), ClientCertificates::Required)
        .grpc(tonic::service::Routes::new(service.server()));
    tokio::spawn(service.run());
    if let Some(tls) = tls {
        tokio::spawn(tls.follow(end.clone()));
    }
    tokio::spawn(async move {
        if let Err(error) = server.run(listeners, end).await {
            eprintln!("perigee up: the registry failed: {error}");
        }
    });
    Ok(url)
}

/// Waits until every expected node is a member and the router is connected to all of them.
async fn ready(
    url: &str,
    config: &registry::Config,
    reach: &Router,
    expected: &[String],
    end: CancellationToken,
) -> anyhow::Result<(NodeRecord, Vec<String>)> {
    let registry: Arc<dyn Registry> = registry::connect(url, config, end).await?;
    let mut members = registry.watch();
    let all = |members: &registry::Members| {
        expected
            .iter()
            .all(|id| members.nodes.contains_key(&types::NodeId::from(id.as_str())))
    };
    let deadline = Instant::now() + READY_DEADLINE;
    let router = tokio::select! {
        found = members.wait_for(|members| all(members)) => {
            let found = found.context("the registry ended")?;
            found.nodes.values().find(|record| record.role == Role::Router).cloned().context("no router")?
        }
        () = sleep_until(deadline) => bail!("the nodes did not register within {READY_DEADLINE:?}"),
    };
    let model = router.model.clone();
    let reach = reach.at(&router.grpc_endpoint);
    let client = reach.inference()?.with_deadline(STATUS_DEADLINE);
    let health = reach.node_at(&router.grpc_endpoint)?;
    loop {
        let ready = match client.cluster_status().await {
            Ok(status) => serves(&status, expected.len()),
            // Whoever has no key of an administrator is told no more than the health.
            Err(error) if matches!(error.code, ErrorCode::Unauthenticated | ErrorCode::Denied) => {
                health.serving().await.unwrap_or(false)
            }
            // A router that does not listen yet is waited for like nodes that have not reported.
            Err(_) => false,
        };
        if ready {
            return Ok((router, vec![model]));
        }
        if Instant::now() > deadline {
            bail!("the router did not reach all nodes within {READY_DEADLINE:?}");
        }
        tokio::time::sleep(READY_POLL).await;
    }
}

/// Whether the router hears of all nodes but itself.
fn serves(status: &client::ClusterStatus, expected: usize) -> bool {
    let heard = status
        .nodes
        .iter()
        .filter(|node| node.connected && node.load.is_some())
        .count();
    heard + 1 >= expected
}

async fn first_failure(children: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Error {
    while let Some(ended) = children.join_next().await {
        if let Err(error) = ended.map_err(Into::into).flatten() {
            return error;
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::golden;

    #[test]
    fn a_cluster_says_where_it_is_reached() {
        let node = |id, role, pid| ReadyNode { id, role, pid };
        let ready = Ready {
            http: "http://127.0.0.1:8080".into(),
            grpc: "http://127.0.0.1:50051".into(),
            grpc_address: "127.0.0.1:50051",
            registry: "perigee://127.0.0.1:4000",
            models: vec!["tiny".into()],
            nodes: vec![
                node("router", "router", Some(7)),
                node("decode-0", "decode", None),
            ],
        };
        let document = serde_json::to_value(&ready).expect("JSON");
        golden::check("up", &View::new(document, |_| announcement(&ready)));
    }
}
