//! Calls of peers: has them answered, and moves what comes with the one or the other.

use std::sync::{Arc, Weak};

use prost::Message;
use tokio::net::TcpStream;
use types::Checksum;

use super::Shared;
use super::link::{Link, Pull};
use super::messages::{self, Question, Response, Runs};
use super::server::{ServeError, answer};
use super::stream::{self, Destination};
use super::wire::{AnswerHead, RequestHead, Status};
use crate::calls::{CALL_BYTES_MAX, Place, Reply, pair, total};
use crate::cursor::Cursor;
use crate::digest::Digest;
use crate::ucx::Exposed;

/// Where the bytes of a call come from.
enum Source {
    /// The connection: so many.
    Inline(u64),
    /// Memory of the peer.
    Link {
        link: Arc<Link>,
        memory: Exposed,
        runs: Vec<(u64, u64)>,
    },
}

/// A call that was understood.
struct Asked<'a> {
    shared: &'a Shared,
    connection: &'a TcpStream,
    head: &'a RequestHead,
    scratch: &'a mut [u8],
    /// Through which bytes go.
    link: Option<Arc<Link>>,
    source: Source,
    room_bytes: u64,
}

/// Serves one call to the last byte of its answer.
pub(super) async fn serve_call(
    shared: &Shared,
    connection: &TcpStream,
    head: &RequestHead,
    question: Question,
    scratch: &mut [u8],
) -> Result<Status, ServeError> {
    let calls = shared.calls.get().and_then(Weak::upgrade);
    let link = shared.served_links.get(question.link);
    let refused = match (&calls, &link) {
        _ if head.epoch != shared.epoch.0 => Some(Status::StaleEpoch {
            current: shared.epoch.0,
        }),
        (None, _) => Some(Status::Unserved),
        (_, None) if question.link != 0 => Some(Status::NoLink),
        _ => None,
    };
    let source = match (question.place, &link) {
        (None, _) => Source::Inline(head.payload_bytes),
        (Some(place), Some(link)) if head.payload_bytes == 0 => {
            let (memory, runs) = place.take()?;
            let link = link.clone();
            Source::Link { link, memory, runs }
        }
        (Some(_), None) if refused.is_some() => Source::Inline(head.payload_bytes),
        (Some(_), _) => return Err(super::wire::WireError::Message.into()),
    };
    let asked = Asked {
        shared,
        connection,
        head,
        scratch,
        link,
        source,
        room_bytes: question.room_bytes,
    };
    match (refused, calls) {
        (None, Some(calls)) if asked.source.len() <= CALL_BYTES_MAX => {
            let reply = calls.call(&question.message, asked.source.len()).await;
            asked.reply(reply).await
        }
        (refused, _) => {
            asked
                .refuse(refused.unwrap_or(Status::OutOfRange { slice: 0 }))
                .await
        }
    }
}

impl Source {
    fn len(&self) -> u64 {
        match self {
            Self::Inline(bytes) => *bytes,
            Self::Link { runs, .. } => total(runs),
        }
    }
}

impl Asked<'_> {
    async fn reply(mut self, reply: Reply) -> Result<Status, ServeError> {
        match reply {
            Reply::Answer(message) => {
                self.discard(0).await?;
                self.respond(Response { message, place: None }, None).await
            }
            Reply::Take { into, landed } => {
                let taken = self.take(&into).await?;
                // The taker wants to be alone with its memory.
                drop(into);
                match taken {
                    Ok(checksums) => {
                        let message = landed(checksums).await;
                        self.respond(Response { message, place: None }, None).await
                    }
                    Err(status) => self.refuse(status).await,
                }
            }
            Reply::Give { message, from } => self.give(message, from).await,
        }
    }

    /// Moves what came with the call; what there is no room for is thrown away. Gives the checksums of what was copied by
    /// this processor, if they are wanted.
    async fn take(&mut self, into: &Place) -> Result<Result<Vec<Checksum>, Status>, ServeError> {
        let stats = &self.shared.stats;
        let mut digest = into.unit_bytes.map(Digest::new);
        match &self.source {
            Source::Inline(bytes) => {
                let bytes = into.len().min(*bytes);
                let Some(mut cursor) = cursor(into, bytes) else {
                    return Ok(Err(Status::OutOfRange { slice: 0 }));
                };
                let destination = Destination::Own(digest.as_mut());
                stream::receive_payload(self.connection, &mut cursor, destination).await?;
                stats.received_bytes.add(bytes);
                self.discard(bytes).await?;
            }
            Source::Link { link, memory, runs } => {
                let runs = pair(runs, &into.runs);
                let gone = || stream::is_stale(self.connection);
                let moved = async {
                    let window = link.window(memory).await?;
                    let pull = Pull {
                        window: &window,
                        memory: &into.memory,
                        runs: &runs,
                        grant: None,
                        keep: into.keep.clone(),
                        digest: digest.as_mut(),
                    };
                    link.pull(pull, gone).await
                };
                if let Err(error) = moved.await {
                    tracing::debug!(peer = link.endpoint, %error, "ucx did not move what came with a call");
                    return Ok(Err(Status::NotMoved));
                }
                let bytes = runs.iter().map(|(_, _, bytes)| bytes).sum();
                stats.received_bytes.add(bytes);
                stats.ucx_received_bytes.add(bytes);
            }
        }
        Ok(Ok(digest.map(Digest::finish).unwrap_or_default()))
    }

    async fn give(mut self, message: Vec<u8>, from: Place) -> Result<Status, ServeError> {
        self.discard(0).await?;
        let bytes = from.len();
        let (Some(cursor), true) = (cursor(&from, bytes), bytes <= self.room_bytes) else {
            return self.refuse(Status::OutOfRange { slice: 0 }).await;
        };
        let stats = &self.shared.stats;
        let (Some(_), Ok(ucx)) = (&self.link, &self.shared.ucx) else {
            stats.served_bytes.add(bytes);
            let response = Response { message, place: None };
            return self.respond(response, Some(cursor)).await;
        };
        let exposed = match ucx.expose(&from.memory) {
            Ok(exposed) => exposed,
            Err(error) => {
                tracing::debug!(%error, "what comes with an answer cannot be read through ucx");
                return self.refuse(Status::NotMoved).await;
            }
        };
        stats.served_bytes.add(bytes);
        stats.ucx_served_bytes.add(bytes);
        let place = Some(Runs::new(exposed, &from.runs));
        self.respond(Response { message, place }, None).await
    }

    /// Throws away what came in line, after the first `taken` bytes of it.
    async fn discard(&mut self, taken: u64) -> Result<(), ServeError> {
        let left = self.head.payload_bytes - taken;
        stream::discard(self.connection, left, self.scratch).await?;
        // Nothing is left for whoever comes next.
        self.source = Source::Inline(0);
        Ok(())
    }

    async fn refuse(mut self, status: Status) -> Result<Status, ServeError> {
        if let Source::Inline(1..) = self.source {
            self.discard(0).await?;
        }
        let head = answer(self.head, status, 0);
        stream::send_head(self.connection, &head).await?;
        Ok(status)
    }

    async fn respond(self, response: Response, bytes: Option<Cursor>) -> Result<Status, ServeError> {
        if !messages::fits(&response) {
            return self.refuse(Status::NotMoved).await;
        }
        let response = response.encode_to_vec();
        let message_bytes = response.len() as u64;
        let behind = bytes.as_ref().map_or(0, Cursor::remaining);
        let head = AnswerHead {
            status: Status::Done,
            id: self.head.id,
            payload_bytes: message_bytes + behind,
            message_bytes,
        };
        let mut whole = head.encode().to_vec();
        whole.extend(response);
        match bytes {
            None => stream::send_head(self.connection, &whole).await?,
            Some(mut cursor) => {
                // Without a grant there is nothing that could be revoked.
                stream::send(self.connection, &whole, &mut cursor, None).await?;
            }
        }
        Ok(Status::Done)
    }
}

/// A walk over the first `bytes` of a place. `None` if it is not inside of its memory, or of memory out of reach.
fn cursor(place: &Place, bytes: u64) -> Option<Cursor> {
    if place.memory.kind() != types::MemoryKind::Host {
        return None;
    }
    let runs = pair(&place.runs, &[(0, bytes)]);
    Cursor::new(
        place.memory.clone(),
        runs.into_iter().map(|(at, _, bytes)| (at, bytes)),
    )
    .ok()
}
