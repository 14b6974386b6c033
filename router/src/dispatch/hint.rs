//! Hints of requests that wait for their place: what a node has on its disk of their prompts, it reads meanwhile.
//!
//! A hint is worth nothing once the request is placed, since its nodes then read by themselves; so there is one only where there
//! is time, and nobody waits for it or hears of its failure.

use std::sync::Arc;
use std::time::Duration;

use proto::convert;
use proto::v1;
use proto::v1::kv_store_client::KvStoreClient;
use tokio::time::timeout;

use super::Shared;
use crate::request::Prepared;

/// Hints under way at a time. Beyond it, requests wait without one.
pub(super) const HINTS_MAX: usize = 32;
/// Longer than the answer to a hint takes, which comes before anything was read.
const HINT_TIMEOUT: Duration = Duration::from_secs(1);

/// Tells the node that holds most of a prompt to read what it has of it on disk only.
pub(super) fn hint(shared: &Arc<Shared>, prepared: &Prepared) {
    let Ok(permit) = Arc::clone(&shared.hints).try_acquire_owned() else {
        return;
    };
    let Some(space) = shared.cluster.lock().kv_space() else {
        return;
    };
    let root = space.with_tenant(prepared.tenant.as_str()).root();
    let mut hashes = root.chain(&prepared.prompt, space.layout.block_tokens);
    let Some((holder, held)) = shared.cluster.lock().on_disk(&hashes) else {
        return;
    };
    hashes.truncate(held);
    let Ok(channel) = shared.channels.get(&holder.grpc_endpoint) else {
        return;
    };
    let request = v1::PrefetchRequest {
        kv_root: space.root().0.to_vec(),
        hashes: convert::hashes_to_wire(&hashes),
    };
    tokio::spawn(async move {
        let hinted = timeout(HINT_TIMEOUT, KvStoreClient::new(channel).prefetch(request)).await;
        tracing::debug!(node_id = %holder.id, ok = matches!(hinted, Ok(Ok(_))), "hint of a request that waits");
        drop(permit);
    });
}
