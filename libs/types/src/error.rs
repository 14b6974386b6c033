//! The closed set of failures that a request, an RPC or a command can end in.
//!
//! A miss, a throttle and a full queue that may be waited for are outcomes, not errors; they have their
//! own types where they arise.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Overload;

/// What a caller can do about a failure. Every error of every crate maps to one of these, and each maps
/// to one gRPC status and one HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request can never succeed as it is. Correct it.
    Invalid,
    /// What the request names does not exist.
    NotFound,
    /// No credentials, or wrong ones.
    Unauthenticated,
    /// The credentials do not allow this.
    Denied,
    /// What should be created exists, or disagrees with what exists.
    Conflict,
    /// No capacity within the request's limits. Try again later.
    Overloaded,
    /// The service cannot be reached or is draining. Nothing was done: trying elsewhere is safe.
    Unavailable,
    /// The deadline passed.
    Timeout,
    /// The caller's or callee's epoch is stale. Look up the node again.
    Fenced,
    /// Bytes do not match their checksum.
    Corrupt,
    /// A defect of ours.
    Internal,
}

impl ErrorCode {
    /// All codes, in the order of their definition.
    pub const ALL: [Self; 11] = [
        Self::Invalid,
        Self::NotFound,
        Self::Unauthenticated,
        Self::Denied,
        Self::Conflict,
        Self::Overloaded,
        Self::Unavailable,
        Self::Timeout,
        Self::Fenced,
        Self::Corrupt,
        Self::Internal,
    ];

    /// The name used in answers, logs and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::NotFound => "not_found",
            Self::Unauthenticated => "unauthenticated",
            Self::Denied => "denied",
            Self::Conflict => "conflict",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Fenced => "fenced",
            Self::Corrupt => "corrupt",
            Self::Internal => "internal",
        }
    }

    /// Reads what [`ErrorCode::as_str`] gives.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == name)
    }

    /// The gRPC status code, as numbered by the gRPC specification.
    pub fn grpc(self) -> i32 {
        match self {
            Self::Invalid => 3,
            Self::NotFound => 5,
            Self::Unauthenticated => 16,
            Self::Denied => 7,
            Self::Conflict => 6,
            Self::Overloaded => 8,
            Self::Unavailable => 14,
            Self::Timeout => 4,
            Self::Fenced => 9,
            Self::Corrupt => 15,
            Self::Internal => 13,
        }
    }

    /// The code that a gRPC status stands for. Statuses that we never send fold into the nearest one.
    pub fn from_grpc(status: i32) -> Self {
        match status {
            3 | 11 => Self::Invalid,
            5 => Self::NotFound,
            16 => Self::Unauthenticated,
            7 => Self::Denied,
            6 | 10 => Self::Conflict,
            8 => Self::Overloaded,
            14 | 1 => Self::Unavailable,
            4 => Self::Timeout,
            9 => Self::Fenced,
            15 => Self::Corrupt,
            _ => Self::Internal,
        }
    }

    /// The HTTP status.
    pub fn http(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::Unauthenticated => 401,
            Self::Denied => 403,
            Self::Conflict | Self::Fenced => 409,
            Self::Overloaded => 429,
            Self::Unavailable => 503,
            Self::Timeout => 504,
            Self::Corrupt | Self::Internal => 500,
        }
    }

    /// Whether the same request may be tried on another node without asking the client.
    pub fn retry_elsewhere(self) -> bool {
        match self {
            Self::Unavailable | Self::Fenced | Self::Corrupt => true,
            Self::Invalid
            | Self::NotFound
            | Self::Unauthenticated
            | Self::Denied
            | Self::Conflict
            | Self::Overloaded
            | Self::Timeout
            | Self::Internal => false,
        }
    }

    /// The exit code of a command that ends in this error, after `sysexits.h`.
    pub fn exit(self) -> u8 {
        match self {
            Self::Invalid => 64,
            Self::NotFound => 66,
            Self::Unauthenticated | Self::Denied => 77,
            Self::Conflict | Self::Fenced => 73,
            Self::Overloaded | Self::Timeout => 75,
            Self::Unavailable => 69,
            Self::Corrupt => 65,
            Self::Internal => 70,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error on its way to a caller in another process: the code, and one actionable line.
///
/// Domain code has its own enums per operation and converts into this at its border.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What the caller can do.
    pub code: ErrorCode,
    /// Lowercase, without a full stop, with the values that matter.
    pub message: String,
    /// The request parameter at fault, for [`ErrorCode::Invalid`].
    pub param: Option<String>,
    /// When a new try has a chance, in milliseconds, for [`ErrorCode::Overloaded`].
    pub retry_after_ms: Option<u64>,
    /// What there was too little of, for an [`ErrorCode::Overloaded`] of a router.
    pub overload: Option<Overload>,
}

impl Error {
    /// An error without a parameter or retry time.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
            retry_after_ms: None,
            overload: None,
        }
    }

    /// A request parameter that cannot be accepted.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(ErrorCode::Invalid, message)
        }
    }

    /// No capacity; a new try has a chance after `retry_after_ms`.
    pub fn overloaded(message: impl Into<String>, retry_after_ms: u64) -> Self {
        Self {
            retry_after_ms: Some(retry_after_ms),
            ..Self::new(ErrorCode::Overloaded, message)
        }
    }

    /// The service cannot be reached or is going away, and did nothing.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unavailable, message)
    }

    /// A defect of ours.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_statuses_survive_a_round_trip() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::parse(code.as_str()), Some(code));
            assert_eq!(ErrorCode::from_grpc(code.grpc()), code);
            assert!((400..600).contains(&code.http()));
        }
    }
}
