//! The side that calls.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use prost::Message;
use tokio::net::TcpStream;
use tokio::time::Instant;
use types::{Checksum, Epoch, Memory, MemoryKind};

use super::client::{Peer, within};
use super::link::{Link, Pull};
use super::linking;
use super::messages::{self, Question, Response, Runs};
use super::request::{Failure, Tries, receive_answer, violation};
use super::stream::{self, Destination};
use super::wire::{EXTRA_BYTES_MAX, Operation, RequestHead, Status};
use super::{SCHEME, Shared, UCX};
use crate::TransferError;
use crate::calls::{Answered, Call, Payload, pair, total};
use crate::cursor::Cursor;
use crate::digest::Digest;
use crate::transport::Keep;
use crate::ucx::Choice;

/// A call that was checked.
struct Asking {
    peer: Arc<Peer>,
    epoch: Epoch,
    message: Vec<u8>,
    payload: Option<Bytes>,
}

/// What is moved.
struct Bytes {
    memory: Arc<dyn Memory>,
    runs: Vec<(u64, u64)>,
    /// With the call; with the answer otherwise.
    sent: bool,
    keep: Keep,
    /// Of what comes with the answer: of how many bytes each the caller wants checksums.
    unit_bytes: Option<NonZeroU64>,
}

/// How an attempt ended that was not refused.
enum Attempt {
    Answered(Answered),
    /// The link does not work.
    Broken(String),
}

/// An answer, and what came with it in line.
struct Reply {
    response: Response,
    received_bytes: u64,
    /// Of the units that came, if they are wanted.
    checksums: Vec<Checksum>,
}

/// See [`crate::Transport::call`].
pub(super) fn call(
    shared: Arc<Shared>,
    call: Call,
    deadline: Instant,
) -> BoxFuture<'static, Result<Answered, TransferError>> {
    async move {
        let _in_flight = shared.stats.batches_in_flight.enter();
        let asking = Asking::new(&shared, call);
        let result = match &asking {
            Ok(asking) => within(&shared, &asking.peer, deadline, asking.ask(&shared)).await,
            Err(error) => Err(error.clone()),
        };
        count(&shared, asking.as_ref().ok(), &result);
        result
    }
    .boxed()
}

fn count(shared: &Shared, asking: Option<&Asking>, result: &Result<Answered, TransferError>) {
    let stats = &shared.stats;
    let answered = match result {
        Ok(answered) => answered,
        Err(error) => return stats.batch_failed(error.code()),
    };
    let payload = asking.and_then(|asking| asking.payload.as_ref());
    let sent_bytes = payload
        .filter(|bytes| bytes.sent)
        .map_or(0, |bytes| total(&bytes.runs));
    stats.written_bytes.add(sent_bytes);
    stats.read_bytes.add(answered.received_bytes);
    if answered.mover == UCX {
        stats.ucx_written_bytes.add(sent_bytes);
        stats.ucx_read_bytes.add(answered.received_bytes);
    }
    if let Some(asking) = asking {
        asking.peer.count(sent_bytes, answered.received_bytes);
    }
}

impl Asking {
    fn new(shared: &Shared, call: Call) -> Result<Self, TransferError> {
        call.check()?;
        let (region, runs, sent, keep, unit_bytes) = match call.payload {
            Payload::None => (None, Vec::new(), false, Keep::default(), None),
            Payload::Send { region, runs } => (Some(region), runs, true, Keep::default(), None),
            Payload::Receive {
                region,
                runs,
                keep,
                unit_bytes,
            } => (Some(region), runs, false, keep, unit_bytes),
        };
        let payload = match region {
            None => None,
            Some(region) => {
                let memory = shared.regions.memory(region)?;
                check(&runs, memory.len() as u64)?;
                Some(Bytes {
                    memory,
                    runs,
                    sent,
                    keep,
                    unit_bytes,
                })
            }
        };
        Ok(Self {
            peer: shared.peers.get(shared, &call.endpoint)?,
            epoch: call.epoch,
            message: call.message,
            payload,
        })
    }

    async fn ask(&self, shared: &Arc<Shared>) -> Result<Answered, TransferError> {
        let endpoint = || self.peer.endpoint.clone();
        let out_of_reach = |reason: String| TransferError::Ucx {
            endpoint: endpoint(),
            reason,
        };
        if let Some(bytes) = &self.payload {
            let link = linking::link(shared, &self.peer, &bytes.memory).await;
            let link = link.map_err(|error| out_of_reach(error.to_string()))?;
            if let Some(link) = link {
                match self.through(shared, &link, bytes).await? {
                    Attempt::Answered(answered) => return Ok(answered),
                    Attempt::Broken(why) => {
                        self.peer.linking.broke(&link, &why);
                        if shared.config.ucx.choice == Choice::Ucx || bytes.memory.kind() != MemoryKind::Host
                        {
                            return Err(out_of_reach(why));
                        }
                    }
                }
            }
        }
        match self.in_line(shared).await? {
            Attempt::Answered(answered) => Ok(answered),
            Attempt::Broken(reason) => Err(TransferError::Protocol {
                endpoint: endpoint(),
                reason,
            }),
        }
    }

    /// UCX moves the bytes.
    async fn through(&self, shared: &Shared, link: &Link, bytes: &Bytes) -> Result<Attempt, TransferError> {
        let broken = |error: &dyn std::fmt::Display| Ok(Attempt::Broken(error.to_string()));
        let mut question = self.question(link.id);
        if bytes.sent {
            let exposed = match &shared.ucx {
                Ok(ucx) => ucx.expose(&bytes.memory),
                Err(reason) => return broken(reason),
            };
            match exposed {
                Ok(exposed) => question.place = Some(Runs::new(exposed, &bytes.runs)),
                Err(error) => return broken(&error),
            }
        }
        if !messages::fits(&question) {
            return Err(TransferError::TooLarge {
                what: "message with the places of its bytes",
                bytes: question.encoded_len() as u64,
                limit: EXTRA_BYTES_MAX as u64,
            });
        }
        let response = match self.exchange(shared, &question, None).await? {
            (Status::NoLink, _) => return broken(&"the peer has no such link"),
            (Status::NotMoved, _) => return broken(&"UCX failed at the peer"),
            (status, reply) => {
                self.done_or_refused(status)?;
                reply.response
            }
        };
        let (mut received_bytes, mut digest) = (0, bytes.unit_bytes.map(Digest::new));
        if let Some(place) = response.place {
            let moved = async {
                let (memory, theirs) = place.take().map_err(|error| error.to_string())?;
                let runs = pair(&theirs, &bytes.runs);
                let window = link.window(&memory).await.map_err(|error| error.to_string())?;
                let pull = Pull {
                    window: &window,
                    memory: &bytes.memory,
                    runs: &runs,
                    grant: None,
                    keep: bytes.keep.clone(),
                    digest: digest.as_mut(),
                };
                link.pull(pull, || false)
                    .await
                    .map_err(|error| error.to_string())?;
                Ok::<u64, String>(runs.iter().map(|(_, _, bytes)| bytes).sum())
            };
            match moved.await {
                Ok(bytes) => received_bytes = bytes,
                Err(why) => return Ok(Attempt::Broken(why)),
            }
        }
        Ok(Attempt::Answered(Answered {
            message: response.message,
            received_bytes,
            mover: UCX,
            checksums: digest.map(Digest::finish).unwrap_or_default(),
        }))
    }

    /// The connection moves the bytes, if any.
    async fn in_line(&self, shared: &Shared) -> Result<Attempt, TransferError> {
        let question = self.question(0);
        let (status, reply) = self.exchange(shared, &question, self.payload.as_ref()).await?;
        if let Status::NoLink | Status::NotMoved = status {
            return Ok(Attempt::Broken("an answer about UCX to a call without it".into()));
        }
        self.done_or_refused(status)?;
        Ok(Attempt::Answered(Answered {
            message: reply.response.message,
            received_bytes: reply.received_bytes,
            mover: SCHEME,
            checksums: reply.checksums,
        }))
    }

    /// Asks and takes the answer, on one connection or another; moves `payload` in line.
    async fn exchange(
        &self,
        shared: &Shared,
        question: &Question,
        payload: Option<&Bytes>,
    ) -> Result<(Status, Reply), TransferError> {
        let extra = question.encode_to_vec();
        let mut tries = Tries::new();
        loop {
            let connection = self.peer.connection(shared).await?;
            let tried = self.try_on(connection.stream()?, &extra, shared.config.ucx.spin, payload);
            let tried = tried.await;
            if let Some(settled) = tries.settle(connection, tried) {
                return settled;
            }
        }
    }

    async fn try_on(
        &self,
        stream: &TcpStream,
        extra: &[u8],
        spin: Duration,
        payload: Option<&Bytes>,
    ) -> Result<(Status, Reply), Failure> {
        let sent = payload.filter(|bytes| bytes.sent);
        let sent_bytes = sent.map_or(0, |bytes| total(&bytes.runs));
        let head = self.head(sent_bytes, extra);
        let whole = head.encode([], extra);
        match sent {
            None => stream::send_head(stream, &whole).await?,
            Some(bytes) => {
                let mut cursor = bytes.cursor(sent_bytes)?;
                stream::send(stream, &whole, &mut cursor, None).await?;
            }
        }
        let room = payload.filter(|bytes| !bytes.sent);
        self.receive(stream, &head, spin, room).await
    }

    /// Takes the answer to its last byte, and what came with it.
    async fn receive(
        &self,
        stream: &TcpStream,
        head: &RequestHead,
        spin: Duration,
        room: Option<&Bytes>,
    ) -> Result<(Status, Reply), Failure> {
        let endpoint = &self.peer.endpoint;
        let answer = receive_answer(stream, head, endpoint, spin).await?;
        let behind = answer.payload_bytes.checked_sub(answer.message_bytes);
        let room_bytes = room.map_or(0, |bytes| total(&bytes.runs));
        let behind = behind.filter(|bytes| *bytes <= room_bytes);
        let message_bytes = usize::try_from(answer.message_bytes).ok();
        let (Some(behind), Some(message_bytes @ 0..=EXTRA_BYTES_MAX)) = (behind, message_bytes) else {
            let reason = format!(
                "{} bytes, {} of them a message, to a call with room for {room_bytes}",
                answer.payload_bytes, answer.message_bytes
            );
            return Err(violation(endpoint, reason));
        };
        let mut message = vec![0; message_bytes];
        stream::receive_exact(stream, &mut message).await?;
        let response = messages::read(&message).map_err(|error| violation(endpoint, error.to_string()))?;
        let mut digest = room.and_then(|bytes| bytes.unit_bytes).map(Digest::new);
        if let (Some(bytes), 1..) = (room, behind) {
            let destination = Destination::Own(digest.as_mut());
            stream::receive_payload(stream, &mut bytes.cursor(behind)?, destination).await?;
        }
        let reply = Reply {
            response,
            received_bytes: behind,
            checksums: digest.map(Digest::finish).unwrap_or_default(),
        };
        Ok((answer.status, reply))
    }

    fn question(&self, link: u64) -> Question {
        let received = self.payload.as_ref().filter(|bytes| !bytes.sent);
        Question {
            message: self.message.clone(),
            link,
            place: None,
            room_bytes: received.map_or(0, |bytes| total(&bytes.runs)),
        }
    }

    fn head(&self, payload_bytes: u64, extra: &[u8]) -> RequestHead {
        RequestHead {
            operation: Operation::Call,
            id: self.peer.next_request(),
            epoch: self.epoch.0,
            key: 0,
            payload_bytes,
            slices: 0,
            extra_bytes: u32::try_from(extra.len()).unwrap_or(u32::MAX),
        }
    }

    fn done_or_refused(&self, status: Status) -> Result<(), TransferError> {
        let endpoint = self.peer.endpoint.clone();
        Err(match status {
            Status::Done => return Ok(()),
            Status::Unserved => TransferError::Unserved { endpoint },
            Status::StaleEpoch { current } => TransferError::Fenced {
                endpoint,
                epoch: self.epoch,
                current: Epoch(current),
            },
            other => TransferError::Protocol {
                endpoint,
                reason: format!("answered {other:?} to a call"),
            },
        })
    }
}

impl Bytes {
    /// A walk over the first `bytes`.
    fn cursor(&self, bytes: u64) -> Result<Cursor, Failure> {
        let kind = self.memory.kind();
        if kind != MemoryKind::Host {
            return Err(Failure::Final(TransferError::UnsupportedMemory { kind }));
        }
        let runs = pair(&self.runs, &[(0, bytes)]);
        let runs = runs.into_iter().map(|(at, _, bytes)| (at, bytes));
        let cursor = Cursor::new(self.memory.clone(), runs);
        cursor.map_err(|(offset, len)| {
            Failure::Final(TransferError::OutOfBounds {
                offset,
                len,
                region_bytes: self.memory.len() as u64,
            })
        })
    }
}

/// Refuses runs that are not inside of a region.
pub(crate) fn check(runs: &[(u64, u64)], region_bytes: u64) -> Result<(), TransferError> {
    let outside = |(offset, len): &&(u64, u64)| offset.checked_add(*len).is_none_or(|end| end > region_bytes);
    match runs.iter().find(outside) {
        None => Ok(()),
        Some((offset, len)) => Err(TransferError::OutOfBounds {
            offset: *offset,
            len: *len,
            region_bytes,
        }),
    }
}
