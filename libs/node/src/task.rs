//! Tasks and threads with a name, and with a policy for their end.
//!
//! Invariant: no task of ours ends unnoticed. One that the process cannot do without takes the process down in an
//! orderly way; any other one says in the log that it ended.

use std::fmt::Display;
use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use types::Error;

use crate::shutdown::Shutdown;

/// What the end of a task means while the process is not shutting down.
#[derive(Debug, Clone)]
pub enum OnEnd {
    /// The process cannot serve without it: shut down and exit with a failure.
    FailProcess(Shutdown),
    /// The same, unless the task was told to end by this token, and ended well.
    FailProcessUnless(Shutdown, CancellationToken),
    /// Say so in the log and go on.
    Log,
}

/// Runs `future` as a task. A panic counts as an error.
pub fn spawn<E: Display + Send + 'static>(
    name: &'static str,
    on_end: OnEnd,
    future: impl Future<Output = Result<(), E>> + Send + 'static,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let failure = match AssertUnwindSafe(future).catch_unwind().await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!("panicked: {}", panic_text(&*panic))),
        };
        end(name, &on_end, failure);
    })
}

fn end(name: &'static str, on_end: &OnEnd, failure: Option<String>) {
    match (on_end, failure) {
        (OnEnd::FailProcess(shutdown), None) if shutdown.is_started() => {}
        (OnEnd::FailProcessUnless(_, told), None) if told.is_cancelled() => {}
        (OnEnd::FailProcess(shutdown) | OnEnd::FailProcessUnless(shutdown, _), failure) => {
            let reason = failure.unwrap_or_else(|| "ended before its time".to_owned());
            shutdown.fail(Error::internal(format!("task {name}: {reason}")));
        }
        (OnEnd::Log, None) => tracing::debug!(task = name, "task ended"),
        (OnEnd::Log, Some(failure)) => tracing::error!(task = name, %failure, "task failed"),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Runs `work`, which blocks or computes for longer than a task may (some 500 µs), on a thread of its own, and
/// waits for its result. For what is done now and then, such as loading a model: a thread is made per call. Work
/// that was begun goes on to its end also where the caller no longer waits.
///
/// # Errors
///
/// [`types::ErrorCode::Internal`] if the thread cannot be made, or `work` panicked.
pub async fn blocking<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (result_tx, result_rx) = oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread
        .spawn(move || {
            // Nobody waits any more if this fails, so nobody misses the result.
            let _ = result_tx.send(work());
        })
        .map_err(|error| Error::internal(format!("thread {name} cannot start: {error}")))?;
    result_rx
        .await
        .map_err(|_| Error::internal(format!("thread {name} panicked")))
}

#[cfg(test)]
mod tests;
