//! The life of one request on this node: check, queue, memory, prefix, computation and handoff.
//!
//! Elsewhere: the stream ([`crate::peer`]), the part after the blocks are in place ([`crate::handover`]).

use std::sync::Arc;

use proto::v1;
use proto::v1::prefill_event::Event;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::{Status, Streaming};
use types::Error;

use crate::handover::{Handover, prepare};
use crate::peer::{End, Peer};
use crate::shared::Shared;

/// Serves one stream to its end.
pub(crate) async fn run(
    shared: Arc<Shared>,
    commands: Streaming<v1::PrefillCommand>,
    events: mpsc::Sender<Result<v1::PrefillEvent, Status>>,
) {
    let start_due = Instant::now() + shared.config.start_timeout;
    let heartbeat = shared.config.heartbeat_interval;
    let mut peer = Peer::new(commands, events, start_due, heartbeat, shared.moving.token());
    let outcome = match serve(&shared, &mut peer).await {
        Ok(()) => "landed",
        Err(end) => {
            peer.finish(&end);
            report(&end)
        }
    };
    shared.metrics.ended(outcome);
}

async fn serve(shared: &Shared, peer: &mut Peer) -> Result<(), End> {
    let start = peer.start().await?;
    let arrived = Instant::now();
    let prompt = shared.accepts.prompt(start)?;
    tracing::Span::current().record("request_id", prompt.request_id.to_string());
    peer.expire_in(prompt.timeout);
    let admitted = shared.admit(prompt.tokens.len())?;
    let place = admitted.place();
    peer.send(Event::Queued(v1::PrefillQueued {
        requests_ahead: place.requests_ahead as u64,
        tokens_ahead: place.tokens_ahead as u64,
        heartbeat_ms: u64::try_from(shared.config.heartbeat_interval.as_millis()).unwrap_or(u64::MAX),
    }));
    if shared.store.disk().is_some() {
        // The disk reads while the request queues.
        shared
            .store
            .read_ahead(shared.store.chain(&prompt.tenant, &prompt.tokens).1);
    }
    // At most the pool's capacity, which is below 2^32: checked with the prompt.
    let blocks = prompt.blocks(&shared.accepts.layout) as u32;
    let claim = peer
        .meanwhile(shared.memory.clone().acquire_many_owned(blocks))
        .await?;
    let _claim = claim.map_err(|_| Error::unavailable("the prefill node is shutting down"))?;
    let deadline = peer.deadline();
    let prepared = peer.meanwhile(prepare(shared, &prompt, deadline)).await?;
    let handover = Handover::begin(shared, &prompt, admitted, prepared, arrived).await?;
    handover.run(peer).await
}

/// Logs how a request ended that did not land, and names it.
fn report(end: &End) -> &'static str {
    match end {
        End::Aborted => "aborted",
        End::Gone => {
            tracing::info!("the decode node went away");
            "gone"
        }
        End::Failed(error) => {
            tracing::warn!(%error, code = %error.code, "prefill failed");
            error.code.as_str()
        }
    }
}
