//! How the side that asks comes to a UCX link with a peer, and what it does until then, or without.
//!
//! A pair that was never looked at moves its first bytes over TCP while the two nodes introduce themselves, unless UCX
//! is forced. A pair for which UCX has nothing to offer is looked at again after a while; so is one whose link broke.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use types::Memory;

use super::Shared;
use super::client::Peer;
use super::link::Link;
use super::messages::{self, Introduced, Introduction};
use super::request::{Failure, ask};
use super::wire::{Operation, RequestHead, Status};
use crate::ucx::{Choice, Ucx, UcxError};

/// Until a pair without a link is looked at again: a peer may have been restarted with other settings.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// The same after a link that had worked broke: the peer may be back soon.
const LOOK_AGAIN_SOON: Duration = Duration::from_secs(1);

/// What is known of UCX to one peer.
#[derive(Default)]
pub(super) struct Linking {
    state: Mutex<State>,
    /// Rung when an introduction ended.
    settled: Notify,
}

#[derive(Default)]
enum State {
    #[default]
    Untried,
    Introducing,
    Linked(Arc<Link>),
    Unlinked {
        obstacle: String,
        look_again: Instant,
    },
}

impl Linking {
    /// The link, and what is in the way of one, for people.
    pub(super) fn describe(&self) -> (Option<Arc<Link>>, String) {
        match &*self.state() {
            State::Linked(link) if link.is_alive() => (Some(link.clone()), String::new()),
            State::Linked(_) => (
                None,
                "UCX lost the peer; it is looked for again with the next transfer".into(),
            ),
            State::Untried | State::Introducing => (None, "the nodes are introducing themselves".into()),
            State::Unlinked { obstacle, .. } => (None, obstacle.clone()),
        }
    }

    /// The link failed to do something: bytes go over TCP for a while.
    pub(super) fn broke(&self, link: &Link, why: &str) {
        link.close();
        let mut state = self.state();
        if matches!(&*state, State::Linked(known) if std::ptr::eq(Arc::as_ptr(known), link)) {
            tracing::info!(peer = link.endpoint, why, "ucx link broke");
            *state = State::unlinked(format!("the link broke: {why}"), LOOK_AGAIN_SOON);
        }
    }

    /// Closes the link; the next transfer looks for another one.
    pub(super) fn reset(&self) {
        if let State::Linked(link) = std::mem::take(&mut *self.state()) {
            link.close();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, result: Result<Link, UcxError>) {
        *self.state() = match result {
            Ok(link) => State::Linked(Arc::new(link)),
            Err(error) => State::unlinked(error.to_string(), LOOK_AGAIN),
        };
        self.settled.notify_waiters();
    }
}

impl State {
    fn unlinked(obstacle: String, after: Duration) -> Self {
        let look_again = Instant::now() + after;
        Self::Unlinked { obstacle, look_again }
    }
}

/// The link to a peer, to move bytes of `memory`. `None`: they go over TCP. The error is for UCX that is forced.
pub(super) async fn link(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    memory: &Arc<dyn Memory>,
) -> Result<Option<Arc<Link>>, UcxError> {
    let Ok(ucx) = &shared.ucx else {
        return Ok(None);
    };
    let forced = shared.config.ucx.choice == Choice::Ucx;
    loop {
        let settled = peer.linking.settled.notified();
        {
            let mut state = peer.linking.state();
            if let State::Linked(link) = &*state
                && !link.is_alive()
            {
                *state = State::Untried;
            }
            match &*state {
                State::Linked(link) => return Ok(Some(link.clone())),
                State::Unlinked { obstacle, look_again } if *look_again > Instant::now() => {
                    return if forced {
                        Err(UcxError::new(obstacle.clone()))
                    } else {
                        Ok(None)
                    };
                }
                State::Introducing => {}
                State::Untried | State::Unlinked { .. } => {
                    *state = State::Introducing;
                    let (shared, peer, ucx, memory) =
                        (shared.clone(), peer.clone(), ucx.clone(), memory.clone());
                    shared.clone().tasks.spawn(async move {
                        let introduced = introduce(&shared, &peer, &ucx, &memory, forced);
                        let result = match shared.closed.run_until_cancelled(introduced).await {
                            Some(result) => result,
                            None => Err(UcxError::new("the transport closed".to_owned())),
                        };
                        if let Err(error) = &result {
                            tracing::debug!(peer = peer.endpoint, %error, "no ucx link");
                        }
                        peer.linking.settle(result);
                    });
                }
            }
        }
        if !forced {
            return Ok(None);
        }
        settled.await;
    }
}

async fn introduce(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    ucx: &Arc<Ucx>,
    memory: &Arc<dyn Memory>,
    forced: bool,
) -> Result<Link, UcxError> {
    let introduction = Introduction {
        endpoint: shared.endpoint.clone(),
        epoch: shared.epoch.0,
        worker: ucx.address().to_vec(),
        memory: Some(ucx.expose(memory)?.into()),
        forced,
    };
    if !messages::fits(&introduction) {
        return Err(UcxError::new(
            "this node's UCX address is too long to be sent".to_owned(),
        ));
    }
    let within = shared.config.connect_timeout * 2;
    let introduced = timeout(within, exchange(shared, peer, &introduction))
        .await
        .map_err(|_| {
            UcxError::new(format!(
                "the peer did not answer an introduction within {within:?}"
            ))
        })??;
    if introduced.link == 0 {
        return Err(UcxError::new(introduced.obstacle));
    }
    let connected = timeout(within, ucx.connect(introduced.worker))
        .await
        .map_err(|_| UcxError::new(format!("UCX did not connect within {within:?}")))??;
    tracing::info!(peer = peer.endpoint, lanes = ?introduced.lanes, "ucx link");
    let endpoint = peer.endpoint.clone();
    Ok(Link::new(
        introduced.link,
        endpoint,
        introduced.lanes,
        Arc::new(connected),
    ))
}

/// Sends the introduction over one of the peer's connections.
async fn exchange(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    introduction: &Introduction,
) -> Result<Introduced, UcxError> {
    let extra = introduction.encode_to_vec();
    let mut tries_left = 2;
    loop {
        tries_left -= 1;
        let connection = peer.connection(shared).await;
        let connection = connection.map_err(|error| UcxError::new(error.to_string()))?;
        let head = RequestHead {
            operation: Operation::Introduce,
            id: peer.next_request(),
            epoch: 0,
            key: 0,
            payload_bytes: 0,
            slices: 0,
            extra_bytes: u32::try_from(extra.len()).unwrap_or(u32::MAX),
        };
        match ask(&connection, &head, &[], &extra).await {
            Ok((Status::Done, answer)) => {
                connection.give_back();
                return messages::read(&answer).map_err(|error| UcxError::new(error.to_string()));
            }
            Ok((status, _)) => return Err(UcxError::new(format!("the peer answered {status:?}"))),
            // An idle connection that the peer had closed.
            Err(Failure::Connection(_)) if connection.is_reused() && tries_left > 0 => {}
            Err(Failure::Connection(error)) => {
                return Err(UcxError::new(format!(
                    "the peer hung up on an introduction: {error}"
                )));
            }
            Err(Failure::Final(error)) => return Err(UcxError::new(error.to_string())),
        }
    }
}
