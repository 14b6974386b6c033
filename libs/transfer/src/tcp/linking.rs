//! How the side that asks comes to a UCX link with a peer, and what it does until then, or without.
//!
//! A pair that was never looked at moves its first bytes over TCP while the two nodes introduce themselves, unless UCX
//! is forced. A pair for which UCX has nothing to offer is looked at again after a while; so is one whose link broke.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use prost::Message;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use types::Memory;

use super::Shared;
use super::client::Peer;
use super::link::Link;
use super::messages::{self, Introduced, Introduction};
use super::request::{Failure, ask};
use super::stream;
use super::wire::{Operation, RequestHead, Status};
use crate::ucx::{self, Choice, Ucx, UcxError, Way};

/// Until a pair that has nothing better than TCP is looked at again: a node may have been restarted with other settings.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// The same after a failure, such as that of a peer which may be back soon.
const LOOK_AGAIN_SOON: Duration = Duration::from_millis(200);

/// Why there is no link.
enum NoLink {
    /// The peer says that there is nothing better than TCP.
    Refused(String),
    /// It could not be found out.
    Failed(UcxError),
}

impl From<UcxError> for NoLink {
    fn from(error: UcxError) -> Self {
        Self::Failed(error)
    }
}

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

    fn is_linked(&self, id: u64) -> bool {
        matches!(&*self.state(), State::Linked(link) if link.id == id)
    }

    /// The connection of a link ended.
    fn lost(&self, id: u64) {
        if self.is_linked(id) {
            self.reset();
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

    /// Ends an introduction.
    fn settle(&self, result: Result<Link, NoLink>) {
        *self.state() = match result {
            Ok(link) => State::Linked(Arc::new(link)),
            Err(NoLink::Refused(obstacle)) => State::unlinked(obstacle, LOOK_AGAIN),
            Err(NoLink::Failed(error)) => State::unlinked(error.to_string(), LOOK_AGAIN_SOON),
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
                link.close();
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
                            None => Err(UcxError::new("the transport closed".to_owned()).into()),
                        };
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

/// Introduces this node to a peer. The link lives for as long as the connection over which that is done.
async fn introduce(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    ucx: &Arc<Ucx>,
    memory: &Arc<dyn Memory>,
    forced: bool,
) -> Result<Link, NoLink> {
    let introduction = Introduction {
        endpoint: shared.endpoint.clone(),
        epoch: shared.epoch.0,
        workers: Some(ucx.addresses().clone()),
        memory: Some(ucx.expose(memory)?),
        forced,
        host: ucx::host().unwrap_or_default(),
    };
    if !messages::fits(&introduction) {
        let too_long = "this node's UCX addresses are too long to be sent".to_owned();
        return Err(NoLink::Refused(too_long));
    }
    let within = shared.config.connect_timeout * 2;
    let late = |_| UcxError::new(format!("no link came about within {within:?}"));
    let (introduced, stream) = timeout(within, exchange(shared, peer, &introduction))
        .await
        .map_err(late)??;
    if introduced.link == 0 {
        tracing::debug!(
            peer = peer.endpoint,
            obstacle = introduced.obstacle,
            "no ucx link"
        );
        return Err(NoLink::Refused(introduced.obstacle));
    }
    let way = if introduced.shared {
        Way::Shared
    } else {
        Way::Network
    };
    let addresses = introduced.workers.unwrap_or_default();
    let connected = timeout(within, ucx.connect(way, &addresses))
        .await
        .map_err(late)??;
    tracing::info!(peer = peer.endpoint, lanes = ?introduced.lanes, "ucx link");
    let endpoint = peer.endpoint.clone();
    let link = Link::new(introduced.link, endpoint, introduced.lanes, Arc::new(connected));
    let watching = watch(
        shared.clone(),
        Arc::downgrade(peer),
        link.id,
        link.closed(),
        stream,
    );
    shared.tasks.spawn(watching);
    Ok(link)
}

/// Ends the link when its connection does: the peer is gone, and its memory must not stay mapped here. Dropping the
/// connection tells the peer the same of this node.
async fn watch(
    shared: Arc<Shared>,
    peer: Weak<Peer>,
    link: u64,
    closed: CancellationToken,
    stream: TcpStream,
) {
    let mut byte = [0];
    tokio::select! {
        // The server never speaks first.
        _ = stream::receive_some(&stream, &mut byte) => {}
        () = closed.cancelled() => {}
        () = shared.closed.cancelled() => {}
    }
    if let Some(peer) = peer.upgrade() {
        peer.linking.lost(link);
    }
}

/// Sends the introduction over a connection of its own.
async fn exchange(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    introduction: &Introduction,
) -> Result<(Introduced, TcpStream), UcxError> {
    let extra = introduction.encode_to_vec();
    let head = RequestHead {
        operation: Operation::Introduce,
        id: peer.next_request(),
        epoch: 0,
        key: 0,
        payload_bytes: 0,
        slices: 0,
        extra_bytes: u32::try_from(extra.len()).unwrap_or(u32::MAX),
    };
    let stream = peer.connect(shared).await;
    let stream = stream.map_err(|error| UcxError::new(error.to_string()))?;
    match ask(&stream, &peer.endpoint, &head, &[], &extra, Duration::ZERO).await {
        Ok((Status::Done, answer)) => {
            let introduced = messages::read(&answer).map_err(|error| UcxError::new(error.to_string()))?;
            Ok((introduced, stream))
        }
        Ok((status, _)) => Err(UcxError::new(format!("the peer answered {status:?}"))),
        Err(Failure::Connection(error)) => Err(UcxError::new(format!(
            "the peer hung up on an introduction: {error}"
        ))),
        Err(Failure::Final(error)) => Err(UcxError::new(error.to_string())),
    }
}
