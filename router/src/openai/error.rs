//! Errors in OpenAI's shape.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use types::{Error, ErrorCode};

use crate::error::RequestError;

/// An error on its way to an HTTP client.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    error: Error,
    /// OpenAI's own name for it, where it has one.
    name: Option<&'static str>,
}

impl ApiError {
    pub(super) fn new(error: Error) -> Self {
        Self { error, name: None }
    }

    pub(super) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Error::invalid(param, message))
    }

    pub(super) fn code(&self) -> ErrorCode {
        self.error.code
    }

    /// The body.
    pub(super) fn body(&self) -> Value {
        let mut error = json!({
            "message": self.error.message,
            "type": kind(self.error.code),
            "param": self.error.param,
            "code": self.name.unwrap_or(self.error.code.as_str()),
        });
        if let Some(overload) = self.error.overload {
            error["constraint"] = json!(overload.constraint);
            error["ttft_predicted_ms"] = json!(overload.ttft_predicted);
        }
        json!({ "error": error })
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let name = (error.code == ErrorCode::Unauthenticated).then_some("invalid_api_key");
        Self { error, name }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let name = match &error {
            RequestError::UnknownModel { .. } => Some("model_not_found"),
            RequestError::ContextLength { .. } => Some("context_length_exceeded"),
            RequestError::Cancelled => Some("request_cancelled"),
            RequestError::Parameter(_)
            | RequestError::Rejected(_)
            | RequestError::NoPlacement(_)
            | RequestError::Deadline { .. }
            | RequestError::Node(_)
            | RequestError::Internal(_) => None,
        };
        Self {
            error: error.to_error(),
            name,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.error.code.http()).expect("every code has a valid status");
        let mut response = (status, axum::Json(self.body())).into_response();
        if self.error.code == ErrorCode::Unauthenticated {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(ms) = self.error.retry_after_ms {
            // The header counts in seconds; a client that comes a little late is fine, one that comes early is not.
            let seconds = HeaderValue::from(ms.div_ceil(1000).max(1));
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}

fn kind(code: ErrorCode) -> &'static str {
    match code {
        // As OpenAI has it, a key that does not count is one more mistake of the request.
        ErrorCode::Invalid | ErrorCode::NotFound | ErrorCode::Conflict | ErrorCode::Unauthenticated => {
            "invalid_request_error"
        }
        ErrorCode::Denied => "permission_error",
        ErrorCode::Overloaded => "rate_limit_error",
        ErrorCode::Timeout => "timeout_error",
        ErrorCode::Unavailable | ErrorCode::Fenced | ErrorCode::Corrupt | ErrorCode::Internal => {
            "server_error"
        }
    }
}
