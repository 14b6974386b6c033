//! How a process ends: in order on the first signal, at once on the second.
//!
//! Order of an end: stop accepting, drain, and after the drain's deadline let go of what is left
//! ([`crate::serve`]). Everything that lives long holds a clone of [`Shutdown`], or its token.

use std::io::Read;
use std::sync::{Arc, OnceLock};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};
use types::Error;

/// What the shell says of a process that SIGINT ended; an impatient second Ctrl-C ends in it.
const EXIT_INTERRUPTED: i32 = 130;

/// Says when to end, and whether a failure is why. Clones are one and the same.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
    failure: Arc<OnceLock<Error>>,
}

impl Shutdown {
    /// One that only [`Shutdown::start`] and [`Shutdown::fail`] set off: for tests, and for parts of a process.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that SIGTERM and SIGINT set off. A second signal ends the process at once, with exit code 130. Call it
    /// once per process, in its runtime.
    ///
    /// # Errors
    ///
    /// The operating system refused the signal handlers.
    pub fn listen() -> std::io::Result<Self> {
        let shutdown = Self::new();
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        // Ends with the process: there is nothing to wait for.
        tokio::spawn(obey(shutdown.clone(), terminate, interrupt));
        Ok(shutdown)
    }

    /// As [`Shutdown::listen`], and also set off when the parent process is gone: for the children of `perigee up`,
    /// which must not survive it however it ended.
    ///
    /// # Errors
    ///
    /// The operating system refused the signal handlers.
    pub fn listen_with_parent() -> std::io::Result<Self> {
        let shutdown = Self::listen()?;
        let started = shutdown.clone();
        tokio::spawn(async move {
            exit_with_parent().await;
            tracing::info!("parent is gone, shutting down");
            started.start();
        });
        Ok(shutdown)
    }

    /// Sets it off.
    pub fn start(&self) {
        self.token.cancel();
    }

    /// Sets it off because of `error`, which the process shall report and exit with. The first one counts.
    pub fn fail(&self, error: Error) {
        tracing::error!(%error, code = %error.code, "shutting down after a failure");
        // A later failure is a consequence of the first one.
        let _ = self.failure.set(error);
        self.token.cancel();
    }

    /// Why the process fails, if it does.
    pub fn failure(&self) -> Option<&Error> {
        self.failure.get()
    }

    /// Whether it was set off.
    pub fn is_started(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until it is set off. Cancel safe.
    pub fn started(&self) -> WaitForCancellationFuture<'_> {
        self.token.cancelled()
    }

    /// For parts that know cancellation only.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }
}

async fn obey(shutdown: Shutdown, mut terminate: Signal, mut interrupt: Signal) {
    next_signal(&mut terminate, &mut interrupt).await;
    tracing::info!("shutting down; a second signal ends the process at once");
    shutdown.start();
    next_signal(&mut terminate, &mut interrupt).await;
    exit_at_once();
}

async fn next_signal(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "whoever signals twice wants no orderly end; main may be stuck in the very drain that is given up"
)]
fn exit_at_once() -> ! {
    std::process::exit(EXIT_INTERRUPTED)
}

/// Waits until stdin ends: a parent holds the other end of the pipe, and however the parent ends, the kernel
/// closes it. What arrives before is thrown away. Cancel safe.
pub async fn exit_with_parent() {
    end_of(std::io::stdin()).await;
}

/// Reads on a thread of its own, because a runtime that is dropped waits for its blocking reads, and this one
/// may never return.
async fn end_of(mut input: impl Read + Send + 'static) {
    let (ended_tx, ended_rx) = oneshot::channel::<()>();
    let thread = std::thread::Builder::new().name("parent-watch".to_owned());
    let started = thread.spawn(move || {
        let mut buffer = [0; 256];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        drop(ended_tx);
    });
    match started {
        // The sender is never used, only dropped: that is the message.
        Ok(_) => drop(ended_rx.await),
        Err(error) => {
            tracing::error!(%error, "cannot watch the parent process");
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests;
