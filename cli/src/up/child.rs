//! One process of `perigee up`: started, watched, restarted within bounds, and ended in order.
//!
//! Invariant: no child outlives the supervisor. Each one's stdin is a pipe that the supervisor holds, and its end is the
//! child's order to stop, so this holds also where the supervisor is killed.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// A child that ends more often than this within [`RESTART_WINDOW`] will not come right by itself.
const RESTARTS_MAX: usize = 5;
const RESTART_WINDOW: Duration = Duration::from_secs(60);
/// Before a restart, so that what the last start left (a port, a lease) has a moment to go.
const RESTART_PAUSE: Duration = Duration::from_millis(500);

/// How to start a child.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Name in the registry and before each line of its log.
    pub(crate) id: String,
    /// The role's subcommand.
    pub(crate) role: &'static str,
    /// The binary.
    pub(crate) program: PathBuf,
    /// Its arguments.
    pub(crate) arguments: Vec<OsString>,
    /// Kept from the child's log, where the supervisor shows results of its own.
    pub(crate) quiet: bool,
    /// Longest orderly end.
    pub(crate) grace: Duration,
}

/// Keeps the child running until `stop`, then ends it. Tells its process id through `pid`.
pub(crate) async fn supervise(
    plan: Plan,
    pid: watch::Sender<Option<u32>>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut starts: VecDeque<Instant> = VecDeque::new();
    loop {
        let now = Instant::now();
        while starts
            .front()
            .is_some_and(|start| now.duration_since(*start) > RESTART_WINDOW)
        {
            starts.pop_front();
        }
        starts.push_back(now);
        let mut running = Running::start(&plan)?;
        pid.send_replace(running.child.id());
        let status = tokio::select! {
            // A child that ends because it was told to is no failure.
            biased;
            () = stop.cancelled() => {
                running.end(plan.grace).await?;
                return Ok(());
            }
            status = running.child.wait() => status.with_context(|| format!("wait for {}", plan.id))?,
        };
        pid.send_replace(None);
        let log = running.last_lines().await;
        // A configuration that is wrong now is wrong at the next start.
        let hopeless = status.code() == Some(i32::from(types::ErrorCode::Invalid.exit()));
        if hopeless || starts.len() > RESTARTS_MAX {
            let tries = starts.len();
            bail!(
                "{} ended with {status} and is not started again (start {tries} within a minute)\n{log}",
                plan.id
            );
        }
        eprintln!("perigee up: {} ended with {status}, starting it again", plan.id);
        sleep(RESTART_PAUSE).await;
    }
}

struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    log: tokio::task::JoinHandle<String>,
}

impl Running {
    fn start(plan: &Plan) -> anyhow::Result<Self> {
        let mut child = Command::new(&plan.program)
            .arg(plan.role)
            .args(&plan.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A terminal's Ctrl-C goes to the supervisor alone, which ends the children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {} {}", plan.program.display(), plan.role))?;
        let stdin = child.stdin.take();
        let stderr = child.stderr.take().context("stderr is piped")?;
        let log = tokio::spawn(forward(stderr, plan.id.clone(), plan.quiet));
        Ok(Self { child, stdin, log })
    }

    /// Tells the child to end, and kills it if it does not within `grace`.
    async fn end(&mut self, grace: Duration) -> anyhow::Result<()> {
        if let Some(pid) = self.child.id() {
            // It may have ended by itself a moment ago.
            let _ = kill(
                Pid::from_raw(i32::try_from(pid).context("a process id")?),
                Signal::SIGTERM,
            );
        }
        drop(self.stdin.take());
        if timeout(grace, self.child.wait()).await.is_err() {
            self.child.kill().await.context("kill a child that did not end")?;
        }
        Ok(())
    }

    async fn last_lines(&mut self) -> String {
        (&mut self.log).await.unwrap_or_default()
    }
}

/// Passes a child's log on, each line under its name; gives the last lines back for an error's sake.
async fn forward(from: impl AsyncRead + Unpin, id: String, quiet: bool) -> String {
    const KEPT_LINES: usize = 8;
    let mut kept = VecDeque::with_capacity(KEPT_LINES);
    let mut lines = BufReader::new(from).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if !quiet {
            eprintln!("[{id}] {line}");
        }
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(format!("  {line}"));
    }
    kept.into_iter().collect::<Vec<_>>().join("\n")
}
