//! What there is to show: the cluster's status and a router's requests, as figures. Pure but for asking.

use client::{ClusterStatus, NodeStatus, RequestTimeline, Requests};
use serde::Serialize;
use sim::report::Summary;
use types::{Error, ErrorCode, LoadReport, Role};

use crate::reach::Router;
use crate::status;

/// The time that rates are of.
const WINDOW_MS: u64 = 60_000;

/// Everything that a frame shows.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub(super) struct Snapshot {
    pub(super) router: String,
    pub(super) cluster: Figures,
    pub(super) nodes: Vec<NodeRow>,
    /// Those that run.
    pub(super) requests: Vec<RequestRow>,
}

/// The cluster in some figures. Rates and times are of the requests that ended within the last minute, as far as the router keeps them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Figures {
    pub(super) running: u64,
    pub(super) waiting: u64,
    pub(super) requests_per_s: f64,
    pub(super) output_tokens_per_s: f64,
    pub(super) ttft_ms: Summary,
    /// Of requests' means.
    pub(super) tbt_ms: Summary,
    /// Part of the prompt tokens that came from a cache.
    pub(super) hit_ratio: f64,
    pub(super) rejected: u64,
    pub(super) failed: u64,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct NodeRow {
    pub(super) id: String,
    pub(super) role: &'static str,
    pub(super) state: &'static str,
    pub(super) running: u64,
    pub(super) queued: u64,
    /// Part of the pool that requests hold.
    pub(super) kv_used: f64,
    /// Part of the pool that is cached, and free on demand.
    pub(super) kv_cached: f64,
    /// Tokens per second: decoded by the running batch, or prefilled while prompts wait.
    pub(super) tokens_per_s: f64,
}

/// A request that runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct RequestRow {
    pub(super) id: String,
    pub(super) state: String,
    pub(super) age_ms: f64,
    pub(super) tenant: String,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) output_tokens: u64,
    pub(super) output_tokens_max: u64,
    /// `prefill-0 → decode-1`, or the decode node alone.
    pub(super) nodes: String,
}

/// Asks a router.
///
/// # Errors
///
/// It cannot be reached in time.
pub(super) async fn ask(router: &Router, now_unix_ms: u64) -> Result<Snapshot, Error> {
    let (inference, requests) = (router.inference()?, Requests::new(router.channel()?));
    let (status, requests) = tokio::join!(inference.cluster_status(), requests.list(false, None));
    Ok(Snapshot::of(
        &router.to_string(),
        &status?,
        &requests?,
        now_unix_ms,
    ))
}

impl Snapshot {
    /// What these answers say at `now_unix_ms`.
    pub(super) fn of(
        router: &str,
        status: &ClusterStatus,
        requests: &[RequestTimeline],
        now_unix_ms: u64,
    ) -> Self {
        let (ended, running): (Vec<_>, Vec<_>) = requests.iter().partition(|request| has_ended(request));
        Self {
            router: router.to_owned(),
            cluster: Figures {
                running: status.requests_running,
                waiting: status.requests_waiting,
                ..figures(&ended, now_unix_ms)
            },
            nodes: status.nodes.iter().map(node_row).collect(),
            requests: running.into_iter().map(request_row).collect(),
        }
    }
}

/// States that are no code of an error and no end are those of requests that run.
fn has_ended(request: &RequestTimeline) -> bool {
    ["finished", "cancelled"].contains(&request.state.as_str()) || ErrorCode::parse(&request.state).is_some()
}

fn figures(ended: &[&RequestTimeline], now_unix_ms: u64) -> Figures {
    let ended_at = |request: &RequestTimeline| request.arrived_unix_ms + request.age_ms as u64;
    let recent = |request: &&&RequestTimeline| ended_at(request) + WINDOW_MS >= now_unix_ms;
    let recent: Vec<&RequestTimeline> = ended.iter().filter(recent).copied().collect();
    // Where the router keeps no more of them, the window is shorter.
    let oldest = recent
        .iter()
        .map(|request| ended_at(request))
        .min()
        .unwrap_or(now_unix_ms);
    let forgets = recent.len() == ended.len() && ended.len() >= LISTED_MAX / 2;
    let window_ms = match forgets {
        true => now_unix_ms.saturating_sub(oldest).clamp(1_000, WINDOW_MS),
        false => WINDOW_MS,
    };
    let per_s = |count: u64| count as f64 * 1e3 / window_ms as f64;
    let of_state = |wanted: &str| recent.iter().filter(|request| request.state == wanted).count() as u64;
    let finished = || recent.iter().filter(|request| request.state == "finished");
    let sum = |of: fn(&RequestTimeline) -> u64| finished().map(|request| of(request)).sum::<u64>();
    let times = |of: fn(&RequestTimeline) -> f64| {
        let times = finished().map(|request| of(request)).filter(|ms| *ms > 0.0);
        Summary::of(times.collect())
    };
    let rejected = of_state(ErrorCode::Overloaded.as_str());
    let ok = of_state("finished");
    Figures {
        running: 0,
        waiting: 0,
        requests_per_s: per_s(ok),
        output_tokens_per_s: per_s(sum(|request| request.output_tokens)),
        ttft_ms: times(|request| request.ttft_ms),
        tbt_ms: times(|request| request.tbt_mean_ms),
        hit_ratio: sum(|request| request.cached_tokens) as f64
            / sum(|request| request.prompt_tokens).max(1) as f64,
        rejected,
        failed: recent.len() as u64 - ok - rejected - of_state("cancelled"),
    }
}

/// Requests that one answer has at most.
const LISTED_MAX: usize = 256;

fn node_row(node: &NodeStatus) -> NodeRow {
    let load = node.load.unwrap_or_default();
    let part = |blocks: u64| blocks as f64 / node.record.capacity_blocks.max(1) as f64;
    NodeRow {
        id: node.record.id.to_string(),
        role: node.record.role.as_str(),
        state: status::state(node),
        running: load.running_sequences,
        queued: load.queued_requests,
        // A router has no pool.
        kv_used: match (node.record.role, node.load) {
            (Role::Router, _) | (_, None) => 0.0,
            (_, Some(_)) => part(load.used_blocks(node.record.capacity_blocks)),
        },
        kv_cached: part(load.evictable_blocks),
        tokens_per_s: tokens_per_s(node.record.role, &load),
    }
}

fn tokens_per_s(role: Role, load: &LoadReport) -> f64 {
    let rate = |tokens: u64, ms: f64| if ms > 0.0 { tokens as f64 * 1e3 / ms } else { 0.0 };
    match role {
        Role::Decode => rate(load.running_sequences, load.decode_step_ms),
        Role::Prefill => rate(
            u64::from(load.queued_prefill_tokens > 0),
            load.prefill_ms_per_token,
        ),
        Role::Store | Role::Router => 0.0,
    }
}

fn request_row(request: &RequestTimeline) -> RequestRow {
    let nodes = match request.placements.last() {
        None => String::new(),
        Some(placement) if placement.prefill_node.is_empty() => placement.decode_node.clone(),
        Some(placement) => format!("{} → {}", placement.prefill_node, placement.decode_node),
    };
    RequestRow {
        id: request.request_id.clone(),
        state: request.state.clone(),
        age_ms: request.age_ms,
        tenant: request.tenant.clone(),
        prompt_tokens: request.prompt_tokens,
        cached_tokens: request.cached_tokens,
        output_tokens: request.output_tokens,
        output_tokens_max: request.output_tokens_max,
        nodes,
    }
}

#[cfg(test)]
pub(super) mod tests;
