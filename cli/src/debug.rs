//! `perigee debug bundle`: what others need to see of a cluster to help with it, in one file.
//!
//! Every part has a deadline, and one that fails is told in `errors.txt` beside the others. What is collected holds no prompt and no
//! key by itself; what is written went through [`redact::Redactor`] all the same, which also hides the names of tenants.

mod bundle;
mod redact;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::{Args, Subcommand};
use client::{ClusterStatus, NodeStatus, Requests, Routing};
use futures::{StreamExt, stream};
use node::task;
use serde_json::json;
use types::{Error, ErrorCode};
use ureq::Agent;

use crate::arguments::SettingFlags;
use crate::cache;
use crate::check;
use crate::context::Target;
use crate::door::Door;
use crate::node_admin::show;
use crate::nodes::ASKED_MAX;
use crate::output::{self, Format, View};
use crate::reach::Router;
use crate::{requests, route, settings, status, transfers};
use bundle::{Bundle, Content};
use redact::Redactor;

/// What a part may take. The longest, `check`, asks every node several things.
const PART_DEADLINE: Duration = Duration::from_secs(30);
/// What a node's metrics may take.
const METRICS_DEADLINE: Duration = Duration::from_secs(5);
/// Metrics beyond this are no metrics of ours.
const METRICS_BYTES_MAX: u64 = 4 << 20;
/// Nodes that are asked one by one: with more, a bundle would hold what nobody reads.
const NODES_MAX: usize = 256;
const REQUESTS_MAX: u32 = 100;
/// Parts that are asked of the cluster as a whole, and of this machine.
const PARTS: u64 = 8;

/// `perigee debug`.
#[derive(Debug, Subcommand)]
pub(crate) enum DebugCommand {
    /// Write what is known of the cluster into one file, without keys, prompts and names of tenants
    Bundle(BundleArgs),
}

/// Flags of `debug bundle`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BundleArgs {
    /// File to write; it must not exist. Left out, it is named by the time.
    #[arg(long, value_name = "FILE.tar.gz")]
    to: Option<PathBuf>,
    /// Keep the names of tenants.
    #[arg(long)]
    keep_tenants: bool,
    /// TOML file of the settings to put in.
    #[arg(long, env = "PERIGEE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Runs the command.
pub(crate) async fn run(command: DebugCommand, target: &Target, format: Format) -> anyhow::Result<()> {
    let DebugCommand::Bundle(flags) = command;
    let now = SystemTime::now();
    let path = flags.to.clone().unwrap_or_else(|| default_path(now));
    // Nothing is asked for what could not be kept.
    let file = bundle::create(&path)?;
    let mut bundle = collect(&flags, target).await;
    bundle.finish();
    let mut redactor = Redactor::new(target.key.as_ref())?;
    if !flags.keep_tenants {
        redactor.hide_tenants(bundle.documents());
    }
    bundle.redact(&redactor);
    let (parts, failed) = (bundle.len(), bundle.failed());
    let shown = path.display().to_string();
    let written = task::blocking("bundle", move || bundle.write(file, now)).await?;
    written.with_context(|| format!("write {shown}"))?;
    let document = json!({ "file": shown, "parts": parts, "failed": failed });
    let errors = match failed {
        0 => String::new(),
        failed => format!("; {failed} could not be had: errors.txt within says why"),
    };
    format.print(&View::line(document, format!("{shown} has {parts} parts{errors}")).named([shown]))
}

/// `perigee-debug-20260102T030405Z.tar.gz`.
fn default_path(now: SystemTime) -> PathBuf {
    let time = humantime::format_rfc3339_seconds(now).to_string();
    format!("perigee-debug-{}.tar.gz", time.replace(['-', ':'], "")).into()
}

async fn collect(flags: &BundleArgs, target: &Target) -> Bundle {
    let bar = output::step_bar("bundle");
    bar.set_length(PARTS);
    let mut bundle = Bundle::new(bar);
    bundle.add(
        "version.txt",
        Content::Text(format!("perigee {}\n", env!("CARGO_PKG_VERSION"))),
    );
    let settings = SettingFlags {
        config: flags.config.clone(),
        ..SettingFlags::default()
    };
    let configuration = async {
        let loaded = settings::load_for_command(&settings)?;
        Ok(Content::Json(vec![serde_json::to_value(loaded.value)?]))
    };
    part(&mut bundle, "config.json", configuration).await;
    part(&mut bundle, "check.json", async {
        Ok(check::look(target, &settings).await?.into())
    })
    .await;
    let router = match target.router() {
        Ok(router) => router,
        Err(error) => {
            bundle.fail("router", &error);
            return bundle;
        }
    };
    of_router(&mut bundle, &router).await;
    let mut nodes = Vec::new();
    let status = async {
        let status: ClusterStatus = router.inference()?.cluster_status().await?;
        nodes.clone_from(&status.nodes);
        Ok(status::cluster_view(&status).into())
    };
    part(&mut bundle, "status.json", status).await;
    of_nodes(&mut bundle, target, &router, &nodes).await;
    bundle
}

/// What the router knows, and what it takes the nodes together to say.
async fn of_router(bundle: &mut Bundle, router: &Router) {
    part(bundle, "requests.json", async {
        let requests = Requests::new(router.channel()?);
        let last = requests.list(false, Some(REQUESTS_MAX)).await?;
        Ok(requests::list_view(&last).into())
    })
    .await;
    part(bundle, "route-explain.json", async {
        let decisions = Routing::new(router.channel()?).decisions(None, Some(1)).await?;
        let views = decisions
            .iter()
            .map(|decision| route::explain_view(decision, true));
        Ok(View::several(views.collect()).into())
    })
    .await;
    part(bundle, "transfers.json", async {
        Ok(transfers::look(router).await?.into())
    })
    .await;
    part(bundle, "cache-stats.json", async {
        let members = cache::members(router).await?;
        Ok(cache::stats_view(&cache::store_stats(&members).await).into())
    })
    .await;
}

/// What each node says of itself, and its metrics.
async fn of_nodes(bundle: &mut Bundle, target: &Target, router: &Router, nodes: &[NodeStatus]) {
    let asked = &nodes[..nodes.len().min(NODES_MAX)];
    if asked.len() < nodes.len() {
        let message = format!("{} of {} nodes were asked", asked.len(), nodes.len());
        bundle.fail("nodes", &anyhow::Error::msg(message));
    }
    bundle.expect(2 * asked.len() as u64);
    let shown = stream::iter(asked).map(|node| async move {
        let said = tokio::time::timeout(PART_DEADLINE, show::ask(router, node)).await;
        let said = said.unwrap_or_else(|_| Err(late()));
        (node, said)
    });
    let shown: Vec<_> = shown.buffered(ASKED_MAX).collect().await;
    for (node, said) in shown {
        let name = format!("nodes/{}.json", node.record.id);
        if let Err(error) = &said {
            bundle.fail(&name, &error.clone().into());
        }
        bundle.add(&name, show::view(node, &said).into());
    }
    // Metrics are shown to whoever can reach them, so no key is.
    let door = target.tls().map(|tls| Door::new(tls, None));
    let opened = door.and_then(|door| {
        Ok((
            door.scheme(),
            door.agent(METRICS_DEADLINE).map_err(anyhow::Error::msg)?,
        ))
    });
    let (scheme, agent) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            for node in asked {
                bundle.fail(&metrics_file(node), &error);
            }
            return;
        }
    };
    let metrics = stream::iter(asked).map(|node| {
        let (agent, url) = (
            agent.clone(),
            format!("{scheme}://{}/metrics", node.record.http_endpoint),
        );
        async move { (node, metrics(agent, url).await) }
    });
    let metrics: Vec<_> = metrics.buffered(ASKED_MAX).collect().await;
    for (node, text) in metrics {
        let name = metrics_file(node);
        match text {
            Ok(text) => bundle.add(&name, Content::Text(text)),
            Err(error) => bundle.fail(&name, &error),
        }
    }
}

fn metrics_file(node: &NodeStatus) -> String {
    format!("metrics/{}.txt", node.record.id)
}

async fn metrics(agent: Agent, url: String) -> anyhow::Result<String> {
    let asked = move || -> Result<String, String> {
        let answer = agent.get(&url).call();
        let mut answer = answer.map_err(|error| format!("{url}: {error}"))?;
        if !answer.status().is_success() {
            return Err(format!("{url}: status {}", answer.status()));
        }
        let body = answer.body_mut().with_config().limit(METRICS_BYTES_MAX);
        body.read_to_string().map_err(|error| format!("{url}: {error}"))
    };
    task::blocking("metrics", asked)
        .await?
        .map_err(anyhow::Error::msg)
}

async fn part(bundle: &mut Bundle, name: &str, question: impl Future<Output = anyhow::Result<Content>>) {
    let answer = tokio::time::timeout(PART_DEADLINE, question).await;
    match answer.unwrap_or_else(|_| Err(late().into())) {
        Ok(content) => bundle.add(name, content),
        Err(error) => bundle.fail(name, &error),
    }
}

fn late() -> Error {
    Error::new(ErrorCode::Timeout, format!("it took more than {PART_DEADLINE:?}"))
}
