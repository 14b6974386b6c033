//! `perigee node`: the cluster's nodes one by one, and taking them out of service.
//!
//! A node is named and found through a router, or is the one of this host (`--self`), which is found by its own settings: that works
//! in a container that is about to end, whatever becomes of the router meanwhile.

mod drain;
pub(crate) mod flip;
mod log_level;
pub(crate) mod show;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use client::{Node, NodeStatus};
use serde_json::json;
use types::{Error, ErrorCode, NodeId, NodeRecord};

use crate::arguments::{NodeCommand, NodeTarget, SettingFlags};
use crate::output::{Format, View};
use crate::reach::Router;
use crate::settings::{self, NodeSettings};
use crate::status;

/// Runs one of the commands.
pub(crate) async fn run(command: NodeCommand, router: &Router, format: Format) -> anyhow::Result<()> {
    match command {
        NodeCommand::List(watch) => status::nodes(watch, router, format).await,
        NodeCommand::Show { node, watch } => show::run(&node, watch, router, format).await,
        NodeCommand::Drain(flags) => drain::run(&flags, router, format).await,
        NodeCommand::Cordon(target) => cordon(&target, router, format).await,
        NodeCommand::Resume(target) => resume(&target, router, format).await,
        NodeCommand::Flip(flags) => flip::run(&flags, router, format).await,
        NodeCommand::LogLevel(flags) => log_level::run(flags, router, format).await,
    }
}

async fn cordon(target: &NodeTarget, router: &Router, format: Format) -> anyhow::Result<()> {
    let (node, id) = named(target, router).await?;
    node.cordon().await?;
    format.print(&cordoned(&id))
}

fn cordoned(id: &NodeId) -> View {
    let document = json!({ "node": id, "state": "cordoned" });
    View::line(
        document,
        format!("{id} is cordoned: perigee node resume {id} ends that"),
    )
    .named([id])
}

async fn resume(target: &NodeTarget, router: &Router, format: Format) -> anyhow::Result<()> {
    let (node, id) = named(target, router).await?;
    node.resume().await?;
    format.print(&resumed(&id))
}

fn resumed(id: &NodeId) -> View {
    let document = json!({ "node": id, "state": "ready" });
    View::line(document, format!("{id} takes requests")).named([id])
}

/// The node that is meant, and its name.
async fn named(target: &NodeTarget, router: &Router) -> anyhow::Result<(Node, NodeId)> {
    let Some(id) = &target.node else {
        return this_node(target, router).await;
    };
    let members = members(router).await?;
    let record = &find(&members, id)?.record;
    Ok((connect(router, record)?, record.id.clone()))
}

/// The nodes as the router sees them.
async fn members(router: &Router) -> anyhow::Result<Vec<NodeStatus>> {
    Ok(router.inference()?.cluster_status().await?.nodes)
}

fn find<'a>(members: &'a [NodeStatus], id: &str) -> Result<&'a NodeStatus, Error> {
    let found = members.iter().find(|node| node.record.id.as_str() == id);
    found.ok_or_else(|| {
        let known: Vec<&str> = members.iter().map(|node| node.record.id.as_str()).collect();
        let message = format!("no node is named {id}; there are: {}", known.join(", "));
        Error::new(ErrorCode::NotFound, message)
    })
}

fn connect(router: &Router, record: &NodeRecord) -> Result<Node, Error> {
    Ok(Node::new(router.channel_to(record)?))
}

/// The node whose settings these are, asked for its name.
async fn this_node(target: &NodeTarget, router: &Router) -> anyhow::Result<(Node, NodeId)> {
    let flags = SettingFlags {
        config: target.config.clone(),
        ..SettingFlags::default()
    };
    let address = own_address(&settings::load_for_command(&flags)?.value.node)?;
    let node = router.node_at(&address.to_string())?;
    let id = node.info().await?.record.id;
    Ok((node, id))
}

/// Where a process with these settings is reached from its own host.
fn own_address(node: &NodeSettings) -> Result<SocketAddr, Error> {
    if node.grpc_port == 0 {
        return Err(Error::invalid(
            "node.grpc_port",
            "node.grpc_port is 0, so the node took a free port that its settings do not tell: name the node, or set the port",
        ));
    }
    let ip = match node.listen {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    Ok(SocketAddr::new(ip, node.grpc_port))
}

#[cfg(test)]
pub(crate) mod tests;
