//! What `perigee doctor` finds on this machine, beside what the host offers for transfers: registry, ports, disk, limits, and the
//! model's file. Pure.

use types::{HostFacts, KvSpace, NodeRecord};

use super::Finding;
use crate::output::bytes;
use crate::settings::Transport;

const REGISTRY: &str = "registry";
const PORTS: &str = "ports";
const DISK: &str = "disk";
const MEMORY: &str = "memory";
const MODEL: &str = "model";
/// Of a digest, what tells two files apart for a reader.
const DIGEST_SHOWN: usize = 12;

/// What was found at the registry's address.
#[derive(Debug, Default)]
pub(super) struct RegistryFacts {
    pub(super) url: String,
    /// Its endpoints, each with why nobody could connect to it.
    pub(super) endpoints: Vec<(String, Option<String>)>,
    /// Members, or why it does not tell them; `None` where nobody was to be asked.
    pub(super) members: Option<Result<usize, String>>,
}

/// Judges the registry.
pub(super) fn judge_registry(facts: &RegistryFacts) -> Vec<Finding> {
    let url = &facts.url;
    if url.is_empty() {
        let message = "no registry.url is set: a cluster of perigee up has its own";
        return vec![Finding::passed(REGISTRY, "", message)];
    }
    let silent = facts
        .endpoints
        .iter()
        .filter_map(|(endpoint, error)| Some(format!("{endpoint}: {}", error.as_ref()?)));
    let silent: Vec<String> = silent.collect();
    if silent.len() == facts.endpoints.len() {
        return vec![Finding::failed(
            REGISTRY,
            "",
            format!("there is no registry at {url}: {}", silent.join("; ")),
            "start etcd there, or correct registry.url; nodes that run serve on without one, but none can join",
        )];
    }
    let mut findings: Vec<Finding> = silent
        .into_iter()
        .map(|silent| {
            Finding::warning(
                REGISTRY,
                "",
                format!("a member of the registry does not answer: {silent}"),
                "start it again, or take it out of registry.url",
            )
        })
        .collect();
    findings.push(match &facts.members {
        Some(Ok(members)) => Finding::passed(REGISTRY, "", format!("{url} answers, and has {members} members")),
        Some(Err(reason)) => Finding::failed(
            REGISTRY,
            "",
            reason.clone(),
            "is it what the scheme of registry.url says, is registry.etcd_authority its authority, and has it a leader?",
        ),
        None => Finding::passed(REGISTRY, "", format!("{url} listens")),
    });
    findings
}

/// A port that the settings name.
#[derive(Debug)]
pub(super) struct PortFacts {
    /// Such as `node.http_port`.
    pub(super) setting: &'static str,
    pub(super) port: u16,
    /// `host:port` as others would reach it.
    pub(super) endpoint: String,
    pub(super) state: PortState,
}

/// What listening on a port gave.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PortState {
    Free,
    /// Somebody listens there: who, where that can be seen.
    Taken(Option<String>),
    /// It cannot be listened on at all.
    Refused(String),
}

/// Judges a port. One that is taken by a member that runs here is no trouble.
pub(super) fn judge_port(facts: &PortFacts, members: &[NodeRecord]) -> Finding {
    let PortFacts {
        setting,
        port,
        endpoint,
        state,
    } = facts;
    let transfer = format!("tcp://{endpoint}");
    let holds = |record: &&NodeRecord| {
        [
            &record.grpc_endpoint,
            &record.http_endpoint,
            &record.transfer_endpoint,
        ]
        .into_iter()
        .any(|own| own == endpoint || *own == transfer)
    };
    match state {
        PortState::Free => Finding::passed(PORTS, "", format!("{setting} {port} is free")),
        PortState::Refused(reason) => Finding::failed(
            PORTS,
            "",
            format!("{setting} {port} cannot be listened on: {reason}"),
            "node.listen must be an address of this machine, and ports below 1024 need a privilege",
        ),
        PortState::Taken(holder) => match (members.iter().find(holds), holder) {
            (Some(member), _) => Finding::passed(
                PORTS,
                "",
                format!("{setting} {port} is that of {}, which runs here", member.id),
            ),
            (None, holder) => {
                let by = holder.as_deref().unwrap_or("another process");
                Finding::failed(
                    PORTS,
                    "",
                    format!("{setting} {port} is taken by {by}"),
                    format!("stop it, or choose another {setting}: 0 takes a free one"),
                )
            }
        },
    }
}

/// The disk tier's place.
#[derive(Debug)]
pub(super) struct DiskFacts {
    pub(super) path: String,
    /// Bytes that blocks may take.
    pub(super) capacity: u64,
    /// Bytes that files of the tier take already.
    pub(super) used: u64,
    /// Bytes that are free there, or why that cannot be told.
    pub(super) free: Result<u64, String>,
}

/// Judges the disk tier's place.
pub(super) fn judge_disk(facts: &DiskFacts) -> Finding {
    let DiskFacts {
        path,
        capacity,
        used,
        free,
    } = facts;
    let wanted = capacity.saturating_sub(*used);
    match free {
        Err(reason) => Finding::failed(
            DISK,
            "",
            format!("kv.disk_path {path} cannot be used: {reason}"),
            "make the folder, or correct kv.disk_path",
        ),
        Ok(free) if *free < wanted => Finding::failed(
            DISK,
            "",
            format!(
                "the disk of kv.disk_path {path} is too full: {} are free, but kv.disk_capacity of {} takes {} more",
                bytes(*free),
                bytes(*capacity),
                bytes(wanted)
            ),
            "free space there, or lower kv.disk_capacity: blocks that find no room are not kept",
        ),
        Ok(free) => Finding::passed(
            DISK,
            "",
            format!(
                "{path} has room for {}: {} are free",
                bytes(*capacity),
                bytes(*free)
            ),
        ),
    }
}

/// Judges the limit on locked memory where the findings on adapters do not: who demands UCX means to register the pool.
pub(super) fn judge_memlock(facts: &HostFacts, transport: Transport, pool_bytes: u64) -> Option<Finding> {
    if !facts.rdma_devices.is_empty() {
        return None;
    }
    let limit = facts.memlock_bytes.map_or_else(|| "no limit".to_owned(), bytes);
    if facts.can_lock(pool_bytes) {
        return Some(Finding::passed(
            MEMORY,
            "",
            format!("the pool of {} may be locked", bytes(pool_bytes)),
        ));
    }
    Some(match transport {
        Transport::Ucx => Finding::failed(
            MEMORY,
            "",
            format!(
                "the memlock limit of {limit} is below the pool of {}: transfer.transport is ucx, which locks what it registers",
                bytes(pool_bytes)
            ),
            "ulimit -l unlimited, LimitMEMLOCK=infinity of a systemd unit, or the capability IPC_LOCK; or a smaller kv.memory",
        ),
        Transport::Auto | Transport::Tcp => Finding::passed(
            MEMORY,
            "",
            format!("the memlock limit of {limit} is below the pool, but nothing here has to lock it"),
        ),
    })
}

/// Judges the model's file: nodes of one name share blocks, so all must be of one file.
pub(super) fn judge_model(
    path: &str,
    name: &str,
    own: &Result<KvSpace, String>,
    members: &[NodeRecord],
) -> Option<Finding> {
    let own = match own {
        Ok(own) => own,
        Err(reason) => {
            return Some(Finding::failed(
                MODEL,
                "",
                format!("model {path} cannot be read: {reason}"),
                "perigee model pull gets one; a file that was not copied whole must be copied again",
            ));
        }
    };
    let spaces = members.iter().filter(|record| record.model == name);
    let mut spaces = spaces.filter_map(|record| Some((record, record.kv_space.as_ref()?)));
    let (member, theirs) = spaces.next()?;
    let shown = |digest: &str| digest.chars().take(DIGEST_SHOWN).collect::<String>();
    let message = if own.model_digest != theirs.model_digest {
        format!(
            "{path} is another file than {} serves as {name}: its digest is {}…, theirs {}…",
            member.id,
            shown(&own.model_digest),
            shown(&theirs.model_digest)
        )
    } else if own.arithmetic != theirs.arithmetic {
        format!(
            "{} serves {name} in {}, but model.precision here is {}",
            member.id, theirs.arithmetic, own.arithmetic
        )
    } else if own.layout.dtype != theirs.layout.dtype {
        format!(
            "{} keeps KV of {name} as {}, but model.kv_format here is {}",
            member.id,
            theirs.layout.dtype.name(),
            own.layout.dtype.name()
        )
    } else if own.layout.block_tokens != theirs.layout.block_tokens {
        format!(
            "{} serves {name} in blocks of {} tokens, but kv.block_tokens here is {}",
            member.id, theirs.layout.block_tokens, own.layout.block_tokens
        )
    } else {
        return Some(Finding::passed(
            MODEL,
            "",
            format!("{path} is what the cluster serves as {name}"),
        ));
    };
    Some(Finding::failed(
        MODEL,
        "",
        message,
        "give all nodes of a model the same file and the same settings, or this one another model.name: the registry refuses it as it is",
    ))
}

#[cfg(test)]
mod tests;
