//! The stream to one decode node, as its session sees it.
//!
//! Invariant: whatever a session waits for, it waits beside [`Peer::next`] or within [`Peer::meanwhile`], so an abort, a broken
//! stream, the deadline and the node's own end are noticed at any time.

use std::time::Duration;

use futures::StreamExt;
use proto::v1::prefill_command::Command;
use proto::v1::prefill_event::Event;
use proto::{status, v1};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use types::{Error, ErrorCode};

/// Holds every event that one session sends: `Queued`, `Started`, one that ends it, and a heartbeat, which is only sent
/// while none of them waits.
pub(crate) const EVENTS_MAX: usize = 4;

/// Why a session ends before it landed.
#[derive(Debug)]
pub(crate) enum End {
    /// The decode node does not want it any more, and waits for `Quiesced`.
    Aborted,
    /// The decode node does not listen any more.
    Gone,
    /// The decode node is to be told.
    Failed(Error),
}

impl<E: Into<Error>> From<E> for End {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Both directions of the stream, and what bounds it.
pub(crate) struct Peer {
    commands: Streaming<v1::PrefillCommand>,
    events: mpsc::Sender<Result<v1::PrefillEvent, Status>>,
    deadline: Instant,
    heartbeat: Interval,
    /// The node ends: nothing goes on.
    stop: CancellationToken,
    /// Whether the peer may close its side: it has said all that it must.
    offered: bool,
    commands_ended: bool,
}

impl Peer {
    pub(crate) fn new(
        commands: Streaming<v1::PrefillCommand>,
        events: mpsc::Sender<Result<v1::PrefillEvent, Status>>,
        deadline: Instant,
        heartbeat_interval: Duration,
        stop: CancellationToken,
    ) -> Self {
        let mut heartbeat = interval_at(Instant::now() + heartbeat_interval, heartbeat_interval);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            commands,
            events,
            deadline,
            heartbeat,
            stop,
            offered: false,
            commands_ended: false,
        }
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Waits for the first command, and lets the request's own deadline take over.
    pub(crate) async fn start(&mut self) -> Result<v1::PrefillStart, End> {
        match self.command().await? {
            Command::Start(start) => Ok(start),
            Command::Abort(_) => Err(End::Aborted),
            Command::Offer(_) => Err(Error::invalid("offer", "memory was offered before the start").into()),
        }
    }

    /// Ends the request after `timeout` from now.
    pub(crate) fn expire_in(&mut self, timeout: Duration) {
        self.deadline = Instant::now() + timeout;
    }

    /// The next offer, or the end. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<v1::PrefillOffer, End> {
        match self.command().await? {
            Command::Offer(offer) => {
                self.offered = true;
                Ok(offer)
            }
            Command::Abort(abort) => {
                tracing::debug!(reason = abort.reason, "aborted by the decode node");
                Err(End::Aborted)
            }
            Command::Start(_) => Err(Error::invalid("start", "the request was started twice").into()),
        }
    }

    /// Carries on with `work` until the session ends otherwise. An offer is out of place meanwhile.
    pub(crate) async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, End> {
        tokio::select! {
            // An end is heard before anything else is begun.
            biased;
            command = self.next() => match command {
                Err(end) => Err(end),
                Ok(_) => Err(crate::handoff::OfferError::Early.into()),
            },
            result = work => Ok(result),
        }
    }

    /// Sends an event. A peer that is gone is noticed by the next [`Peer::next`].
    pub(crate) fn send(&self, event: Event) {
        // Full is impossible: the channel holds all events of a session.
        let _ = self.events.try_send(Ok(v1::PrefillEvent { event: Some(event) }));
    }

    /// Ends the conversation in the way of `end`.
    pub(crate) fn finish(&self, end: &End) {
        match end {
            End::Aborted => self.send(Event::Quiesced(v1::PrefillQuiesced {})),
            End::Failed(error) => self.send(Event::Failure(status::to_failure(error))),
            End::Gone => {}
        }
    }

    async fn command(&mut self) -> Result<Command, End> {
        loop {
            tokio::select! {
                // Nothing that arrives counts once the session must end.
                biased;
                () = self.stop.cancelled() => {
                    return Err(Error::unavailable("the prefill node gives up its requests, which go on elsewhere").into());
                }
                () = sleep_until(self.deadline) => {
                    return Err(Error::new(ErrorCode::Timeout, "the deadline passed").into());
                }
                () = self.events.closed() => return Err(End::Gone),
                command = receive(&mut self.commands, &mut self.commands_ended, self.offered) => return command,
                _ = self.heartbeat.tick() => self.beat(),
            }
        }
    }

    /// What waits to be read says as much as a heartbeat, and must never find the channel full of those.
    fn beat(&self) {
        if self.events.capacity() == self.events.max_capacity() {
            self.send(Event::Alive(v1::PrefillAlive {}));
        }
    }
}

/// The next command. After the peer has closed its side, having said all that it must, none comes.
async fn receive(
    commands: &mut Streaming<v1::PrefillCommand>,
    ended: &mut bool,
    may_end: bool,
) -> Result<Command, End> {
    if *ended && may_end {
        return std::future::pending().await;
    }
    match commands.next().await {
        Some(Ok(v1::PrefillCommand {
            command: Some(command),
        })) => Ok(command),
        Some(Ok(v1::PrefillCommand { command: None })) => {
            Err(Error::invalid("command", "a command of an unknown kind").into())
        }
        Some(Err(status)) => {
            tracing::debug!(%status, "stream of the decode node broke");
            Err(End::Gone)
        }
        None if may_end => {
            *ended = true;
            std::future::pending().await
        }
        None => Err(End::Gone),
    }
}
