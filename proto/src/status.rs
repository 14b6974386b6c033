//! `types::Error` as a gRPC status and back, without loss.

use prost::Message;
use tonic::{Code, Status};
use types::{Constraint, Error, ErrorCode, Millis, Overload};

use crate::v1;

/// The status that carries `error`: code, message, and a [`v1::Failure`] as its details.
pub fn to_status(error: &Error) -> Status {
    let details = to_failure(error).encode_to_vec();
    Status::with_details(
        Code::from_i32(error.code.grpc()),
        error.message.clone(),
        details.into(),
    )
}

/// The error that a status carries. A status made elsewhere (a broken connection, a proxy) has no details; its
/// code is folded into ours.
pub fn from_status(status: &Status) -> Error {
    if !status.details().is_empty()
        && let Ok(failure) = v1::Failure::decode(status.details())
        && ErrorCode::parse(&failure.code).is_some()
    {
        return from_failure(&failure);
    }
    let code = match status.code() {
        // What tonic reports for a connection that broke in the middle of a call.
        Code::Unknown => ErrorCode::Unavailable,
        code => ErrorCode::from_grpc(code as i32),
    };
    Error::new(code, status.message())
}

/// The message form of an error, for streams that serve more than one request.
pub fn to_failure(error: &Error) -> v1::Failure {
    v1::Failure {
        code: error.code.as_str().to_owned(),
        message: error.message.clone(),
        param: error.param.clone(),
        retry_after_ms: error.retry_after_ms,
        overload: error.overload.map(|overload| v1::Overload {
            constraint: overload.constraint.as_str().to_owned(),
            ttft_predicted_ms: overload.ttft_predicted.0,
        }),
    }
}

/// The error that a message form stands for. A code that we do not know is a defect of the sender.
pub fn from_failure(failure: &v1::Failure) -> Error {
    Error {
        code: ErrorCode::parse(&failure.code).unwrap_or(ErrorCode::Internal),
        message: failure.message.clone(),
        param: failure.param.clone(),
        retry_after_ms: failure.retry_after_ms,
        overload: failure.overload.as_ref().and_then(overload),
    }
}

/// A constraint that we do not know is one of a newer router: the rest of the error says enough.
fn overload(wire: &v1::Overload) -> Option<Overload> {
    Some(Overload {
        constraint: Constraint::parse(&wire.constraint)?,
        ttft_predicted: Millis(wire.ttft_predicted_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_survives_the_wire() {
        for code in ErrorCode::ALL {
            let error = Error {
                code,
                message: "the store holds 1 block, but 3 are needed".into(),
                param: Some("prompt".into()),
                retry_after_ms: Some(250),
                overload: Some(Overload {
                    constraint: Constraint::Ttft,
                    ttft_predicted: Millis(812.5),
                }),
            };
            assert_eq!(from_status(&to_status(&error)), error);
        }
    }

    #[test]
    fn a_broken_connection_is_unavailable() {
        let error = from_status(&Status::unknown("h2 protocol error"));
        assert_eq!(error.code, ErrorCode::Unavailable);
    }
}
