//! What all calls have in common: a deadline, and errors as [`types::Error`].

use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};
use tonic::{Request, Response, Status, Streaming};
use types::{Error, ErrorCode};

/// Every unary call ends within this, unless the client was made with another one. Nodes answer in milliseconds; the
/// rest is for a machine whose cores are all busy computing.
pub const UNARY_DEADLINE: Duration = Duration::from_secs(5);

/// What tonic says where the peer's first words are no HTTP/2: those of one that has TLS where we have none, most often.
const NO_HTTP2: &str = "h2 protocol error: http2 error";

/// A request that tells its server how long the caller will wait.
pub(crate) fn request<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// The answer to a call, or the error it ended in, at the latest after `deadline`.
pub(crate) async fn unary<T>(
    method: &'static str,
    deadline: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    match timeout(deadline, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(failed(method, &status)),
        Err(_) => Err(late(method, deadline)),
    }
}

/// The next message of a stream, at the latest at `until`. `None` waits for as long as the peer lives.
pub(crate) async fn next<T>(
    method: &'static str,
    stream: &mut Streaming<T>,
    until: Option<Instant>,
) -> Result<Option<T>, Error> {
    let message = match until {
        None => stream.message().await,
        Some(until) => match timeout_at(until, stream.message()).await {
            Ok(message) => message,
            Err(_) => {
                return Err(Error::new(
                    ErrorCode::Timeout,
                    format!("{method}: the deadline passed"),
                ));
            }
        },
    };
    message.map_err(|status| failed(method, &status))
}

fn failed(method: &str, status: &Status) -> Error {
    // tonic answers with CANCELLED where its own timer, set from our deadline, ran out before ours.
    if status.code() == tonic::Code::Cancelled && status.message().contains("Timeout expired") {
        return Error::new(ErrorCode::Timeout, format!("{method}: the deadline passed"));
    }
    if status.details().is_empty() && status.message() == NO_HTTP2 {
        let message =
            format!("{method}: the peer speaks something else than is expected: is TLS on at one end alone?");
        return Error::unavailable(message);
    }
    let error = proto::status::from_status(status);
    // A server's own error is told as it is; one of the connection needs to be told what it interrupted.
    match status.details().is_empty() {
        true => Error {
            message: format!("{method}: {}", error.message),
            ..error
        },
        false => error,
    }
}

fn late(method: &str, deadline: Duration) -> Error {
    Error::new(
        ErrorCode::Timeout,
        format!("{method}: no answer within {deadline:?}"),
    )
}

/// A stream that ended although its contract says that it cannot.
pub(crate) fn cut_off(method: &str) -> Error {
    Error::unavailable(format!("{method}: the stream ended before its last message"))
}

/// A message without the part that makes it one.
pub(crate) fn empty(method: &str) -> Error {
    Error::internal(format!("{method}: the peer sent an empty message"))
}
