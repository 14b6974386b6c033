//! `perigee doctor`: everything of `perigee check`, and what else settings and machine tell of the cause.
//!
//! This file asks and reads; the judgement is pure (`machine.rs`, and that of `check`). What is wrong with one thing keeps
//! nobody from being asked about the others.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use engine::file::ModelFile;
use node::registry;
use node::{Connector, Tls, task};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use types::{KvSpace, NodeRecord};

use super::machine::{self, DiskFacts, PortFacts, PortState, RegistryFacts};
use super::{ChatFlags, Finding, Level};
use crate::arguments::SettingFlags;
use crate::context::Target;
use crate::output::Format;
use crate::reach::Router;
use crate::roles;
use crate::settings::{self, Settings};

/// Who does not answer within it does not answer a node either, which waits longer only to survive elections.
const REGISTRY_DEADLINE: Duration = Duration::from_secs(3);
/// Files of a disk tier, and processes of a machine, that are looked at.
const ENTRIES_MAX: usize = 65_536;
/// The state of a socket that listens, in `/proc/net/tcp`.
const LISTENING: &str = "0A";

/// Flags of `doctor`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    chat: ChatFlags,
    /// The settings of the process that has trouble.
    #[command(flatten)]
    settings: SettingFlags,
}

/// Examines settings, machine and cluster, prints, and fails with [`super::Unhealthy`] where something is wrong.
pub(crate) async fn run(arguments: DoctorArgs, target: &Target, format: Format) -> anyhow::Result<()> {
    format.without_names()?;
    super::conclude(examine(&arguments, target).await?, format)
}

async fn examine(arguments: &DoctorArgs, target: &Target) -> anyhow::Result<Vec<Finding>> {
    let loaded = settings::load_for_command(&arguments.settings)?;
    let settings = &loaded.value;
    let mut findings = super::judge_settings(&loaded, Level::Failed);
    let shown = target.tls_or(settings.tls.clone());
    let (tls, certificate) = super::own_certificate(&shown);
    findings.extend(certificate);
    findings.extend(super::judge_keys(settings));
    findings.extend(machine::judge_registry(
        &read_registry(settings, tls.clone()).await,
    ));
    findings.extend(read_disk(settings).as_ref().map(machine::judge_disk));
    let facts = super::host_facts(settings).await?;
    findings.extend(machine::judge_memlock(
        &facts,
        settings.transfer.transport,
        settings.kv.memory.0,
    ));
    findings.extend(super::judge_host(settings, &facts).await);
    let ports = read_ports(settings);
    // Nobody can be asked without certificates that are to be shown.
    let askable = tls.is_some() || !shown.is_on();
    let router = Router::with_tls(&target.address, tls, target.key.as_ref());
    let (of_cluster, members) = match askable {
        true => super::of_members(&router).await?,
        false => (Vec::new(), Vec::new()),
    };
    findings.extend(ports.iter().map(|port| machine::judge_port(port, &members)));
    findings.extend(examine_model(settings, &members).await?);
    findings.extend(of_cluster);
    if askable {
        findings.extend(super::of_chat(&arguments.chat, shown, &router).await?);
    }
    Ok(findings)
}

async fn read_registry(settings: &Settings, tls: Option<Tls>) -> RegistryFacts {
    let url = settings.registry.url.clone();
    let hosts = url.split_once("://").map_or("", |(_, hosts)| hosts);
    let mut endpoints = Vec::new();
    for host in hosts.split(',').filter(|host| !host.is_empty()) {
        let error = match timeout(REGISTRY_DEADLINE, TcpStream::connect(host)).await {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no connection within {REGISTRY_DEADLINE:?}")),
        };
        endpoints.push((host.to_owned(), error));
    }
    let listens = endpoints.is_empty() || endpoints.iter().any(|(_, error)| error.is_none());
    let members = if listens && !url.is_empty() {
        let config = registry::Config {
            connect_deadline: REGISTRY_DEADLINE,
            ..settings.registry.config(Connector::new(tls))
        };
        let end = CancellationToken::new();
        let _following = end.clone().drop_guard();
        let connected = registry::connect(&url, &config, end).await;
        let members = connected.map(|registry| registry.watch().borrow().nodes.len());
        Some(members.map_err(|error| error.to_string()))
    } else {
        None
    };
    RegistryFacts {
        url,
        endpoints,
        members,
    }
}

fn read_ports(settings: &Settings) -> Vec<PortFacts> {
    let node = &settings.node;
    let ports = [
        ("node.grpc_port", node.grpc_port),
        ("node.http_port", node.http_port),
        ("node.transfer_port", node.transfer_port),
    ];
    let named = ports.into_iter().filter(|(_, port)| *port != 0);
    named
        .map(|(setting, port)| PortFacts {
            setting,
            port,
            endpoint: node.reached_at(port),
            state: port_state(node.listen, port),
        })
        .collect()
}

fn port_state(listen: IpAddr, port: u16) -> PortState {
    match TcpListener::bind((listen, port)) {
        Ok(_) => PortState::Free,
        Err(error) if error.kind() == ErrorKind::AddrInUse => PortState::Taken(holder(port)),
        Err(error) => PortState::Refused(error.to_string()),
    }
}

/// The process that listens on a port: `etcd (4711)`. Those of other users cannot be seen without privileges.
fn holder(port: u16) -> Option<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|file| fs::read_to_string(file).unwrap_or_default());
    let inodes = tables.iter().flat_map(|table| listening(table, port));
    let sockets: Vec<String> = inodes.map(|inode| format!("socket:[{inode}]")).collect();
    let holds = |process: &Path| {
        let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        files
            .take(ENTRIES_MAX)
            .filter_map(|file| fs::read_link(file.path()).ok())
            .any(|target| sockets.iter().any(|socket| Path::new(socket) == target))
    };
    let processes = fs::read_dir("/proc").ok()?.flatten().take(ENTRIES_MAX);
    // Beside numbers there are other names for the same processes.
    let numbered = processes.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok());
    let process = numbered.map(|entry| entry.path()).find(|path| holds(path))?;
    let name = fs::read_to_string(process.join("comm")).ok()?;
    Some(format!("{} ({})", name.trim(), process.file_name()?.to_str()?))
}

/// The inodes of sockets that listen on `port`. A line has its address as the second word, its state as the fourth and its inode as the
/// tenth.
fn listening(table: &str, port: u16) -> Vec<&str> {
    let suffix = format!(":{port:04X}");
    let words = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listening = words.filter(|words| words.get(1).is_some_and(|local| local.ends_with(&suffix)));
    listening
        .filter(|words| words.get(3) == Some(&LISTENING))
        .filter_map(|words| words.get(9).copied())
        .collect()
}

fn read_disk(settings: &Settings) -> Option<DiskFacts> {
    let path = &settings.kv.disk_path;
    if path.is_empty() {
        return None;
    }
    // The folder is made by the node that uses it.
    let there = Path::new(path).ancestors().find(|folder| folder.exists());
    let there = there.unwrap_or(Path::new("."));
    let free = nix::sys::statvfs::statvfs(there)
        .map(|stat| stat.blocks_available().saturating_mul(stat.fragment_size()))
        .map_err(|error| format!("{}: {error}", there.display()));
    Some(DiskFacts {
        path: path.clone(),
        capacity: settings.kv.disk_capacity.0,
        used: used_below(Path::new(path)),
        free,
    })
}

/// Bytes that the files of all nodes' tiers take: a folder per node, and files in it.
fn used_below(path: &Path) -> u64 {
    let entries = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten();
    let nodes = entries(path.to_owned()).take(ENTRIES_MAX);
    let files = nodes.flat_map(|node| entries(node.path())).take(ENTRIES_MAX);
    // As many as there are on the disk: files of the tier have holes.
    files
        .filter_map(|file| file.metadata().ok())
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}

/// Reads the whole file, as a node does that starts.
async fn examine_model(settings: &Settings, members: &[NodeRecord]) -> anyhow::Result<Option<Finding>> {
    let path = settings.model.path.clone();
    // That there is none is said of the settings.
    if path.is_empty() || !Path::new(&path).exists() {
        return Ok(None);
    }
    let name = roles::model_name(&settings.model.name, Path::new(&path));
    let (numerics, block_tokens) = (settings.model.numerics(), settings.kv.block_tokens);
    let file = PathBuf::from(&path);
    let own = task::blocking("model-digest", move || -> Result<KvSpace, String> {
        let file = ModelFile::open(&file).map_err(|error| error.to_string())?;
        Ok(engine::model::kv_space(&file, numerics, block_tokens))
    });
    Ok(machine::judge_model(&path, &name, &own.await?, members))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_that_listen_are_told_from_others() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0
   1: 0100007F:1F90 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 20 4 30 10 -1
   2: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0 100 0 0 10 0
";
        assert_eq!(listening(table, 8080), ["4711"]);
        assert_eq!(listening(table, 80), ["4713"]);
        assert!(listening(table, 81).is_empty());
    }

    #[test]
    fn a_port_that_somebody_listens_on_is_taken_by_this_process() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let PortState::Taken(Some(holder)) = port_state(address.ip(), address.port()) else {
            panic!("the port is taken, and by whom can be seen");
        };
        assert!(holder.ends_with(&format!("({})", std::process::id())), "{holder}");
        drop(listener);
        assert_eq!(port_state(address.ip(), address.port()), PortState::Free);
        let elsewhere = IpAddr::from([192, 0, 2, 1]);
        assert!(matches!(port_state(elsewhere, 1), PortState::Refused(_)));
    }
}
