//! The side that owns the memory: takes requests, checks them against the grants, moves the payload.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use types::{ErrorCode, MemoryKind};

use super::stream::{self, Destination, Moved};
use super::wire::{
    AnswerHead, EXTRA_BYTES_MAX, Operation, REQUEST_HEAD_BYTES, RequestHead, SLICES_MAX, Status,
    TABLE_ENTRY_BYTES, WireError,
};
use super::{Shared, called, messages, served};
use crate::cursor::Cursor;
use crate::region::{Grant, Refused};

/// What a connection holds besides its request: the slice table, then what follows it, or payload on its way to nowhere.
const SCRATCH_BYTES: usize = EXTRA_BYTES_MAX;
const _: () = assert!(SLICES_MAX * TABLE_ENTRY_BYTES <= SCRATCH_BYTES);
/// Between attempts to accept while the process is out of descriptors or the like.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Why a connection was cut.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    #[error("protocol violation: {0}")]
    Violation(#[from] WireError),
    #[error("the connection broke in the middle of a request: {0}")]
    Lost(#[from] io::Error),
    #[error("no complete request within the bound")]
    Stalled,
    #[error("the grant was revoked while it was being read")]
    Revoked,
}

impl ServeError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Violation(_) => ErrorCode::Invalid,
            Self::Lost(_) => ErrorCode::Unavailable,
            Self::Stalled => ErrorCode::Timeout,
            Self::Revoked => ErrorCode::NotFound,
        }
    }
}

/// Serves every connection to `listener` until the transport closes.
pub(super) async fn accept(shared: Arc<Shared>, listener: TcpListener) {
    let closed = shared.closed.clone();
    let permits = Arc::new(Semaphore::new(shared.config.served_connections_max.get()));
    let accepting = async {
        loop {
            let (connection, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a transfer connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                shared.stats.connections_rejected.add(1);
                continue;
            };
            shared.stats.connections_accepted.add(1);
            let shared = shared.clone();
            shared.clone().tasks.spawn(async move {
                serve(shared, connection, peer).await;
                drop(permit);
            });
        }
    };
    closed.run_until_cancelled(accepting).await;
}

/// Serves one connection to its end.
async fn serve(shared: Arc<Shared>, connection: TcpStream, peer: SocketAddr) {
    let _open = shared.stats.connections_served.enter();
    let served = shared
        .closed
        .run_until_cancelled(serve_requests(&shared, &connection))
        .await;
    if let Some(Err(error)) = served {
        stream::reset_on_drop(&connection);
        shared.stats.serve_failed(error.code());
        if let ServeError::Violation(_) = error {
            shared.stats.protocol_violations.add(1);
        }
        tracing::debug!(%peer, %error, "transfer connection cut");
    }
}

/// Ends without an error when the peer closes between requests, or leaves the connection idle for too long.
async fn serve_requests(shared: &Arc<Shared>, connection: &TcpStream) -> Result<(), ServeError> {
    stream::prepare(connection)?;
    let mut scratch = vec![0; SCRATCH_BYTES];
    loop {
        let mut head = [0; REQUEST_HEAD_BYTES];
        let first = stream::receive_some(connection, &mut head);
        let received = match timeout(shared.config.idle_timeout, first).await {
            Err(_) | Ok(Ok(0)) => return Ok(()),
            Ok(received) => received?,
        };
        let mut hot = false;
        let request = async {
            stream::receive_exact(connection, &mut head[received..]).await?;
            let head = RequestHead::decode(&head)?;
            hot = head.operation != Operation::Introduce;
            serve_request(shared, connection, &head, &mut scratch).await
        };
        let introduced = timeout(shared.config.request_timeout, request)
            .await
            .map_err(|_| ServeError::Stalled)??;
        if let Some(link) = introduced {
            // It is the link's from now on, and nothing comes over it but its end.
            let _link = shared.served_links.lifeline(link);
            stream::receive_some(connection, &mut head).await?;
            return Ok(());
        }
        // Who moves bytes by UCX often asks again at once.
        if hot {
            stream::spin_for_readable(connection, shared.config.ucx.spin).await;
        }
    }
}

/// Serves one request to the last byte of its answer. Gives the link that it made, if any.
async fn serve_request(
    shared: &Arc<Shared>,
    connection: &TcpStream,
    head: &RequestHead,
    scratch: &mut [u8],
) -> Result<Option<u64>, ServeError> {
    let table = &mut scratch[..head.table_bytes()];
    stream::receive_exact(connection, table).await?;
    let slices = head.decode_table(table)?;
    // Empty for payload in line.
    let extra = &mut scratch[..head.extra_bytes as usize];
    stream::receive_exact(connection, extra).await?;
    let mut link = None;
    let (status, answer_behind) = match head.operation {
        Operation::Read => {
            serve_read(shared, connection, head, &slices).await?;
            return Ok(None);
        }
        Operation::Write => {
            let status = receive_write(shared, connection, head, &slices, scratch).await?;
            (status, Vec::new())
        }
        Operation::Introduce => {
            let introduced = served::introduce(shared, messages::read(extra)?).await;
            link = Some(introduced.link).filter(|link| *link != 0);
            (Status::Done, introduced.encode_to_vec())
        }
        Operation::Call => {
            let question = messages::read(extra)?;
            let status = called::serve_call(shared, connection, head, question, scratch).await?;
            count(shared, head, status);
            return Ok(None);
        }
        Operation::Admit => served::admit(shared, head, &slices, &messages::read(extra)?),
        Operation::Fetch => {
            let gone = || stream::is_stale(connection);
            let status = served::fetch(shared, head, &slices, messages::read(extra)?, gone).await;
            (status, Vec::new())
        }
    };
    // Before the answer, so that who has it finds it counted.
    count(shared, head, status);
    let mut whole = answer(head, status, answer_behind.len() as u64).to_vec();
    whole.extend(answer_behind);
    stream::send_head(connection, &whole).await?;
    Ok(link)
}

async fn serve_read(
    shared: &Shared,
    connection: &TcpStream,
    head: &RequestHead,
    slices: &[(u64, u64)],
) -> Result<(), ServeError> {
    let (grant, mut cursor) = match admit_inline(shared, head, slices) {
        Ok(admitted) => admitted,
        Err(status) => {
            count(shared, head, status);
            return Ok(stream::send_head(connection, &answer(head, status, 0)).await?);
        }
    };
    let answer = answer(head, Status::Done, head.payload_bytes);
    match stream::send(connection, &answer, &mut cursor, Some(&grant)).await? {
        Moved::All => {
            count(shared, head, Status::Done);
            Ok(())
        }
        // The answer's head said that the bytes follow, so only the cut can tell that they do not.
        Moved::Revoked => Err(ServeError::Revoked),
    }
}

/// Takes the payload of a write to its last byte, wherever that goes.
async fn receive_write(
    shared: &Shared,
    connection: &TcpStream,
    head: &RequestHead,
    slices: &[(u64, u64)],
    scratch: &mut [u8],
) -> Result<Status, ServeError> {
    let (grant, mut cursor) = match admit_inline(shared, head, slices) {
        Ok(admitted) => admitted,
        Err(status) => {
            stream::discard(connection, head.payload_bytes, scratch).await?;
            return Ok(status);
        }
    };
    Ok(
        match stream::receive_payload(connection, &mut cursor, Destination::Granted(&grant)).await? {
            Moved::All => Status::Done,
            Moved::Revoked => {
                stream::discard(connection, cursor.remaining(), scratch).await?;
                Status::UnknownKey
            }
        },
    )
}

/// The same for payload that comes or goes over the connection.
fn admit_inline(
    shared: &Shared,
    head: &RequestHead,
    slices: &[(u64, u64)],
) -> Result<(Arc<Grant>, Cursor), Status> {
    let grant = admit(shared, head, slices)?;
    if grant.memory().kind() != MemoryKind::Host {
        return Err(Status::NotMoved);
    }
    let cursor = Cursor::new(grant.memory().clone(), slices.iter().copied())
        .map_err(|_| Status::OutOfRange { slice: 0 })?;
    Ok((grant, cursor))
}

/// Finds what the request may touch, or the status that refuses it.
pub(super) fn admit(
    shared: &Shared,
    head: &RequestHead,
    slices: &[(u64, u64)],
) -> Result<Arc<Grant>, Status> {
    if head.epoch != shared.epoch.0 {
        let current = shared.epoch.0;
        return Err(Status::StaleEpoch { current });
    }
    let grant = shared.regions.lookup(head.key).ok_or(Status::UnknownKey)?;
    grant
        .admit(head.operation.direction(), slices.iter().copied())
        .map_err(|refused| match refused {
            Refused::Denied => Status::Denied,
            Refused::OutOfRange { slice } => Status::OutOfRange { slice: slice as u64 },
        })?;
    Ok(grant)
}

pub(super) fn answer(
    head: &RequestHead,
    status: Status,
    payload_bytes: u64,
) -> [u8; super::wire::ANSWER_HEAD_BYTES] {
    let id = head.id;
    AnswerHead {
        status,
        id,
        payload_bytes,
        message_bytes: 0,
    }
    .encode()
}

fn count(shared: &Shared, head: &RequestHead, status: Status) {
    let (stats, bytes) = (&shared.stats, head.payload_bytes);
    let refused = match status {
        Status::Done => {
            match head.operation {
                // Calls count their bytes themselves.
                Operation::Introduce | Operation::Call => {}
                Operation::Write => stats.received_bytes.add(bytes),
                Operation::Read => stats.served_bytes.add(bytes),
                Operation::Fetch => {
                    stats.received_bytes.add(bytes);
                    stats.ucx_received_bytes.add(bytes);
                }
                Operation::Admit => {
                    stats.served_bytes.add(bytes);
                    stats.ucx_served_bytes.add(bytes);
                }
            }
            return;
        }
        Status::UnknownKey => ErrorCode::NotFound,
        Status::Denied => ErrorCode::Denied,
        Status::StaleEpoch { .. } => ErrorCode::Fenced,
        Status::OutOfRange { .. } => ErrorCode::Invalid,
        Status::NoLink | Status::NotMoved | Status::Unserved => ErrorCode::Unavailable,
    };
    stats.serve_failed(refused);
}
