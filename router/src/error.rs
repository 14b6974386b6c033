//! How a request can fail at the front door.

use types::{Error, ErrorCode, Overload};

use crate::admission::Rejection;
use crate::placement::NoPlacement;

/// Why a request did not end in tokens.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// A parameter cannot be accepted.
    #[error("{0}")]
    Parameter(Error),
    /// Nobody serves a model of that name.
    #[error("model {model:?} is not served; {served:?} is")]
    UnknownModel {
        /// As the request names it.
        model: String,
        /// What could be named instead.
        served: String,
    },
    /// The prompt leaves no room for a token.
    #[error(
        "the prompt has {prompt_tokens} tokens, but the context holds {context_tokens_max}, answer included"
    )]
    ContextLength {
        /// The parameter that holds the prompt.
        param: &'static str,
        /// Its tokens.
        prompt_tokens: u64,
        /// Most tokens of prompt and answer.
        context_tokens_max: u64,
    },
    /// Turned away at the door.
    #[error("{0}")]
    Rejected(#[from] Rejection),
    /// No node could take it.
    #[error("{0}")]
    NoPlacement(#[from] NoPlacement),
    /// Its time was up.
    #[error("the request did not end within {limit_ms} ms")]
    Deadline {
        /// The time it had.
        limit_ms: u64,
    },
    /// Somebody who may ended it.
    #[error("an operator cancelled the request")]
    Cancelled,
    /// A node failed it, and no other one could take over.
    #[error("{0}")]
    Node(Error),
    /// A defect of ours.
    #[error("{0}")]
    Internal(Error),
}

impl RequestError {
    /// What the client can do.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Parameter(error) | Self::Internal(error) | Self::Node(error) => error.code,
            Self::UnknownModel { .. } => ErrorCode::NotFound,
            Self::ContextLength { .. } => ErrorCode::Invalid,
            Self::Rejected(_) => ErrorCode::Overloaded,
            Self::NoPlacement(_) => ErrorCode::Unavailable,
            Self::Deadline { .. } => ErrorCode::Timeout,
            // Clients try again by themselves what is `unavailable`, which is what the operator does not want.
            Self::Cancelled => ErrorCode::Denied,
        }
    }

    /// The form in which it leaves.
    pub fn to_error(&self) -> Error {
        let (retry_after_ms, overload) = self.shortage();
        Error {
            code: self.code(),
            message: self.to_string(),
            param: self.param().map(str::to_owned),
            retry_after_ms,
            overload,
        }
    }

    /// The parameter at fault.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::Parameter(error) | Self::Internal(error) | Self::Node(error) => error.param.as_deref(),
            Self::UnknownModel { .. } => Some("model"),
            Self::ContextLength { param, .. } => Some(param),
            Self::Rejected(_) | Self::NoPlacement(_) | Self::Deadline { .. } | Self::Cancelled => None,
        }
    }

    /// When a new try has a chance, and what there was too little of.
    fn shortage(&self) -> (Option<u64>, Option<Overload>) {
        match self {
            Self::Rejected(rejection) => (Some(rejection.retry_after_ms()), Some(rejection.overload())),
            Self::Node(error) => (error.retry_after_ms, error.overload),
            Self::Parameter(_)
            | Self::UnknownModel { .. }
            | Self::ContextLength { .. }
            | Self::NoPlacement(_)
            | Self::Deadline { .. }
            | Self::Cancelled
            | Self::Internal(_) => (None, None),
        }
    }
}
