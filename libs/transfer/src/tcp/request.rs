//! One request of a batch: over UCX where there is a link, in line where there is none or it breaks.
//!
//! Elsewhere: batches, connections and deadlines (`client.rs`), how links come about (`linking.rs`).

use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use prost::Message;
use tokio::net::TcpStream;
use types::{Checksum, Epoch, Memory, MemoryKind};

use super::Shared;
use super::client::{Connection, Peer};
use super::link::{Link, Pull};
use super::messages::{self, Source, Visit};
use super::stream::{self, Destination};
use super::wire::{ANSWER_HEAD_BYTES, AnswerHead, EXTRA_BYTES_MAX, Operation, RequestHead, Status};
use crate::TransferError;
use crate::cursor::Cursor;
use crate::digest::Digest;
use crate::split::Part;
use crate::transport::{Keep, RemoteRegion, Slice};
use crate::ucx::{Choice, Exposed, UcxError};

/// What all requests of a batch have in common.
pub(super) struct Job {
    pub(super) peer: Arc<Peer>,
    pub(super) memory: Arc<dyn Memory>,
    /// `Write` or `Read`.
    pub(super) operation: Operation,
    pub(super) remote: RemoteRegion,
    pub(super) keep: Keep,
    /// For reads: of how many bytes each the caller wants checksums.
    pub(super) unit_bytes: Option<NonZeroU64>,
    /// Whether some bytes went over TCP.
    pub(super) some_inline: AtomicBool,
}

/// One try of a request that came to nothing.
pub(super) enum Failure {
    /// The connection broke.
    Connection(io::Error),
    /// Another connection would not help.
    Final(TransferError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

/// Carries out one request, through UCX where there is a link, inline where there is none or it breaks. Gives the
/// checksums of what was copied by this processor, if they are wanted.
pub(super) async fn request(
    shared: &Shared,
    job: &Job,
    link: Option<&Arc<Link>>,
    part: &Part,
) -> Result<Vec<Checksum>, TransferError> {
    if let Some(link) = link {
        match request_on(shared, job, Some(link), part).await? {
            Answered::Done(checksums) => return Ok(checksums),
            Answered::Broken(why) => {
                job.peer.linking.broke(link, &why);
                if shared.config.ucx.choice == Choice::Ucx || job.memory.kind() != MemoryKind::Host {
                    return Err(TransferError::Ucx {
                        endpoint: job.remote.endpoint.clone(),
                        reason: why,
                    });
                }
            }
        }
    }
    job.some_inline.store(true, Relaxed);
    match request_on(shared, job, None, part).await? {
        Answered::Done(checksums) => Ok(checksums),
        Answered::Broken(reason) => Err(TransferError::Protocol {
            endpoint: job.remote.endpoint.clone(),
            reason,
        }),
    }
}

/// How a request that was not refused ended.
enum Answered {
    Done(Vec<Checksum>),
    /// The link does not work. Nothing is on its way.
    Broken(String),
}

async fn request_on(
    shared: &Shared,
    job: &Job,
    link: Option<&Arc<Link>>,
    part: &Part,
) -> Result<Answered, TransferError> {
    let remote = &job.remote;
    let mut tries = Tries::new();
    let (status, answer, checksums) = loop {
        let connection = job.peer.connection(shared).await?;
        let tried = try_on(shared, job, link, part, connection.stream()?).await;
        if let Some(settled) = tries.settle(connection, tried) {
            break settled?;
        }
    };
    match (link, status) {
        (Some(_), Status::NoLink) => Ok(Answered::Broken("the peer has no such link".into())),
        (Some(_), Status::NotMoved) => Ok(Answered::Broken("UCX failed at the peer".into())),
        (Some(link), Status::Done) if job.operation == Operation::Read => {
            Ok(match job.visit(link, &answer, part).await {
                Ok(checksums) => Answered::Done(checksums),
                Err(error) => Answered::Broken(error.to_string()),
            })
        }
        (_, status) => done_or_refused(status, remote, &part.slices).map(|()| Answered::Done(checksums)),
    }
}

async fn try_on(
    shared: &Shared,
    job: &Job,
    link: Option<&Arc<Link>>,
    part: &Part,
    stream: &TcpStream,
) -> Result<(Status, Vec<u8>, Vec<Checksum>), Failure> {
    let (remote, spin) = (&job.remote, shared.config.ucx.spin);
    let Some(link) = link else {
        let mut cursor = job.cursor(part).map_err(Failure::Final)?;
        let head = job.head(job.operation, part, 0);
        let mut digest = job.unit_bytes.map(Digest::new);
        let destination = Destination::Own(digest.as_mut());
        let status = exchange(
            stream,
            &head,
            &part.slices,
            (&mut cursor, destination),
            remote,
            spin,
        )
        .await?;
        let checksums = digest.map(Digest::finish).unwrap_or_default();
        return Ok((status, Vec::new(), checksums));
    };
    let (operation, extra) = job.by_ucx(shared, link, part).map_err(Failure::Final)?;
    let extra_bytes = u32::try_from(extra.len()).unwrap_or(u32::MAX);
    let head = job.head(operation, part, extra_bytes);
    let (status, behind) = ask(stream, &remote.endpoint, &head, &part.slices, &extra, spin).await?;
    Ok((status, behind, Vec::new()))
}

/// A request may be tried once more if it failed on a connection that had served before: most likely the peer closed that
/// one, and a request that is repeated does the same again.
pub(super) struct Tries {
    left: u32,
}

impl Tries {
    pub(super) fn new() -> Self {
        Self { left: 2 }
    }

    /// What came of a try. `None`: it is worth another one.
    pub(super) fn settle<T>(
        &mut self,
        connection: Connection,
        tried: Result<T, Failure>,
    ) -> Option<Result<T, TransferError>> {
        self.left -= 1;
        let peer = connection.peer().clone();
        match tried {
            Ok(answered) => {
                connection.give_back();
                Some(Ok(answered))
            }
            Err(Failure::Connection(_)) if connection.is_reused() && self.left > 0 => {
                peer.forget_idle();
                None
            }
            Err(Failure::Connection(error)) => Some(Err(TransferError::ConnectionLost {
                endpoint: peer.endpoint.clone(),
                reason: error.to_string(),
            })),
            Err(Failure::Final(error)) => Some(Err(error)),
        }
    }
}

impl Job {
    fn head(&self, operation: Operation, part: &Part, extra_bytes: u32) -> RequestHead {
        RequestHead {
            operation,
            id: self.peer.next_request(),
            epoch: self.remote.epoch.0,
            key: self.remote.key,
            payload_bytes: part.bytes,
            slices: u32::try_from(part.slices.len()).expect("`split` keeps to SLICES_MAX"),
            extra_bytes,
        }
    }

    fn cursor(&self, part: &Part) -> Result<Cursor, TransferError> {
        if self.memory.kind() != MemoryKind::Host {
            let kind = self.memory.kind();
            return Err(TransferError::UnsupportedMemory { kind });
        }
        let local = part.slices.iter().map(|slice| (slice.local_offset, slice.len));
        Cursor::new(self.memory.clone(), local).map_err(|(offset, len)| TransferError::OutOfBounds {
            offset,
            len,
            region_bytes: self.memory.len() as u64,
        })
    }

    /// What asks for the part through UCX.
    fn by_ucx(
        &self,
        shared: &Shared,
        link: &Link,
        part: &Part,
    ) -> Result<(Operation, Vec<u8>), TransferError> {
        let failed = |reason: String| TransferError::Ucx {
            endpoint: self.remote.endpoint.clone(),
            reason,
        };
        if self.operation == Operation::Read {
            return Ok((Operation::Admit, Visit { link: link.id }.encode_to_vec()));
        }
        let ucx = shared.ucx.as_ref().map_err(|reason| failed(reason.clone()))?;
        let exposed = ucx
            .expose(&self.memory)
            .map_err(|error| failed(error.to_string()))?;
        let source = Source {
            link: link.id,
            memory: Some(exposed),
            offsets: part.slices.iter().map(|slice| slice.local_offset).collect(),
        };
        if !messages::fits(&source) {
            return Err(failed("a request with too many slices for UCX".to_owned()));
        }
        Ok((Operation::Fetch, source.encode_to_vec()))
    }

    /// Reads bytes of the peer, which has admitted it.
    async fn visit(&self, link: &Link, answer: &[u8], part: &Part) -> Result<Vec<Checksum>, UcxError> {
        let exposed: Exposed = messages::read(answer).map_err(|error| UcxError::new(error.to_string()))?;
        let window = link.window(&exposed).await?;
        let run = |slice: &Slice| (slice.remote_offset, slice.local_offset, slice.len);
        let runs: Vec<_> = part.slices.iter().map(run).collect();
        let mut digest = self.unit_bytes.map(Digest::new);
        let pull = Pull {
            window: &window,
            memory: &self.memory,
            runs: &runs,
            grant: None,
            keep: self.keep.clone(),
            digest: digest.as_mut(),
        };
        link.pull(pull, || false).await?;
        Ok(digest.map(Digest::finish).unwrap_or_default())
    }
}

/// Sends a request, and takes an answer with what follows it. For requests whose payload is not inline.
pub(super) async fn ask(
    stream: &TcpStream,
    endpoint: &str,
    head: &RequestHead,
    slices: &[Slice],
    extra: &[u8],
    spin: Duration,
) -> Result<(Status, Vec<u8>), Failure> {
    let table = slices.iter().map(|slice| (slice.remote_offset, slice.len));
    stream::send_head(stream, &head.encode(table, extra)).await?;
    let answer = receive_answer(stream, head, endpoint, spin).await?;
    let follows = usize::try_from(answer.payload_bytes).unwrap_or(usize::MAX);
    if follows > EXTRA_BYTES_MAX {
        return Err(violation(
            endpoint,
            format!("{follows} bytes follow an answer, more than {EXTRA_BYTES_MAX}"),
        ));
    }
    let mut behind = vec![0; follows];
    stream::receive_exact(stream, &mut behind).await?;
    Ok((answer.status, behind))
}

/// Sends a request, and takes its answer, to the last byte of both.
async fn exchange(
    stream: &TcpStream,
    head: &RequestHead,
    slices: &[Slice],
    (cursor, destination): (&mut Cursor, Destination<'_>),
    remote: &RemoteRegion,
    spin: Duration,
) -> Result<Status, Failure> {
    let table = slices.iter().map(|slice| (slice.remote_offset, slice.len));
    let request = head.encode(table, &[]);
    if head.operation == Operation::Write {
        stream::send(stream, &request, cursor, None).await?;
    } else {
        stream::send_head(stream, &request).await?;
    }
    let answer = receive_answer(stream, head, &remote.endpoint, spin).await?;
    let follows = match (head.operation, answer.status) {
        (Operation::Read, Status::Done) => head.payload_bytes,
        _ => 0,
    };
    if answer.payload_bytes != follows {
        return Err(violation(
            &remote.endpoint,
            format!("{} payload bytes instead of {follows}", answer.payload_bytes),
        ));
    }
    if follows > 0 {
        stream::receive_payload(stream, cursor, destination).await?;
    }
    Ok(answer.status)
}

pub(super) async fn receive_answer(
    stream: &TcpStream,
    head: &RequestHead,
    endpoint: &str,
    spin: Duration,
) -> Result<AnswerHead, Failure> {
    stream::spin_for_readable(stream, spin).await;
    let mut answer = [0; ANSWER_HEAD_BYTES];
    stream::receive_exact(stream, &mut answer).await?;
    let answer = AnswerHead::decode(&answer).map_err(|error| violation(endpoint, error.to_string()))?;
    if answer.id != head.id {
        return Err(violation(
            endpoint,
            format!("an answer to request {} instead of {}", answer.id, head.id),
        ));
    }
    Ok(answer)
}

pub(super) fn violation(endpoint: &str, reason: String) -> Failure {
    Failure::Final(TransferError::Protocol {
        endpoint: endpoint.to_owned(),
        reason,
    })
}

fn done_or_refused(status: Status, remote: &RemoteRegion, slices: &[Slice]) -> Result<(), TransferError> {
    let (endpoint, key) = (remote.endpoint.clone(), remote.key);
    Err(match status {
        Status::Done => return Ok(()),
        Status::UnknownKey => TransferError::UnknownKey { endpoint, key },
        Status::Denied => TransferError::Denied { endpoint, key },
        Status::StaleEpoch { current } => TransferError::Fenced {
            endpoint,
            epoch: remote.epoch,
            current: Epoch(current),
        },
        Status::NoLink | Status::NotMoved => TransferError::Protocol {
            endpoint,
            reason: "an answer about UCX to a request without it".into(),
        },
        Status::Unserved => TransferError::Unserved { endpoint },
        Status::OutOfRange { slice } => {
            let slice = usize::try_from(slice).ok().and_then(|slice| slices.get(slice));
            match slice {
                Some(slice) => TransferError::OutOfRange {
                    endpoint,
                    offset: slice.remote_offset,
                    len: slice.len,
                },
                None => TransferError::Protocol {
                    endpoint,
                    reason: "refused a slice that was not asked for".into(),
                },
            }
        }
    })
}
