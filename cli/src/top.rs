//! `perigee top`: the cluster, full screen and live.
//!
//! A frame is a pure function (`draw.rs`) of what was answered (`snapshot.rs`) and of how it is looked at (`view.rs`); this file asks,
//! reads keys, and gives the terminal back however it ends.

mod draw;
mod snapshot;
mod view;

use std::io::IsTerminal;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::Args;
use node::{clock, config};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEvent, KeyEventKind};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use types::Error;

use crate::output::{self, Format};
use crate::reach::Router;
use snapshot::Snapshot;
use view::{View, Wish};

/// Asking more often would tell nothing new: nodes report ten times a second.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// How often the thread that reads keys looks whether anybody wants them.
const KEY_WAIT: Duration = Duration::from_millis(200);
/// Keys that wait to be taken.
const KEYS_MAX: usize = 64;

/// Flags of `top`.
#[derive(Debug, Clone, Args)]
pub(crate) struct TopArgs {
    /// Time between two looks at the cluster.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    interval: config::Duration,
    /// Print one frame and end, as -o json does.
    #[arg(long)]
    once: bool,
    /// Columns of that frame.
    #[arg(long, value_name = "COLUMNS", default_value_t = 120, value_parser = clap::value_parser!(u16).range(40..=400))]
    width: u16,
    /// Lines of that frame.
    #[arg(long, value_name = "LINES", default_value_t = 40, value_parser = clap::value_parser!(u16).range(10..=400))]
    height: u16,
}

/// Shows the cluster until a key ends it.
pub(crate) async fn run(arguments: TopArgs, router: &Router, format: Format) -> anyhow::Result<()> {
    let first = look(router).await?;
    if arguments.once || !format.streams_text() {
        let document = serde_json::to_value(&first)?;
        let (width, height) = (arguments.width, arguments.height);
        return format.print(&output::View::new(document, |_| {
            draw::text(&first, width, height)
        }));
    }
    if !std::io::stdout().is_terminal() {
        let message = "top needs a terminal: --once prints one frame, -o json the figures";
        return Err(Error::invalid("once", message).into());
    }
    let (looks_tx, looks_rx) = mpsc::channel(1);
    let screen = Screen::open()?;
    tokio::select! {
        () = keep_looking(router, arguments.interval.get().max(INTERVAL_MIN), looks_tx) => Ok(()),
        shown = screen.show(first, looks_rx, read_keys()?) => shown,
    }
}

async fn look(router: &Router) -> Result<Snapshot, Error> {
    snapshot::ask(router, clock::unix_ms(SystemTime::now())).await
}

/// Ends when nobody listens any more.
async fn keep_looking(router: &Router, every: Duration, looks: mpsc::Sender<Result<Snapshot, Error>>) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !looks.is_closed() {
        ticks.tick().await;
        if looks.send(look(router).await).await.is_err() {
            return;
        }
    }
}

/// Keys, from a thread of their own, since reading them blocks. It ends when nobody takes them any more.
fn read_keys() -> anyhow::Result<mpsc::Receiver<KeyEvent>> {
    let (keys_tx, keys_rx) = mpsc::channel(KEYS_MAX);
    let read = move || {
        while !keys_tx.is_closed() {
            match event::poll(KEY_WAIT) {
                Ok(false) => continue,
                Ok(true) => {}
                Err(_) => return,
            }
            match event::read() {
                Ok(Event::Key(key)) if key.kind != KeyEventKind::Release => {
                    if keys_tx.blocking_send(key).is_err() {
                        return;
                    }
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    };
    let thread = thread::Builder::new().name("keys".to_owned());
    thread.spawn(read).context("start the thread that reads keys")?;
    Ok(keys_rx)
}

/// The terminal, which is as it was once this is gone, also after a panic.
struct Screen {
    terminal: DefaultTerminal,
}

impl Screen {
    fn open() -> anyhow::Result<Self> {
        // Also sets a panic hook that restores the terminal before the message is printed.
        let terminal = ratatui::try_init().context("take the terminal")?;
        Ok(Self { terminal })
    }

    async fn show(
        mut self,
        first: Snapshot,
        mut looks: mpsc::Receiver<Result<Snapshot, Error>>,
        mut keys: mpsc::Receiver<KeyEvent>,
    ) -> anyhow::Result<()> {
        let (mut snapshot, mut view) = (first, View::default());
        loop {
            self.terminal
                .draw(|frame| draw::draw(frame, &snapshot, &view))
                .context("draw")?;
            tokio::select! {
                // Whoever presses a key waits for what it does.
                biased;
                key = keys.recv() => match key {
                    Some(key) if view.key(key) == Wish::Stay => {}
                    Some(_) | None => return Ok(()),
                },
                look = looks.recv() => match look {
                    Some(Ok(newer)) => {
                        view.trouble = None;
                        if !view.paused {
                            snapshot = newer;
                        }
                    }
                    Some(Err(error)) => view.trouble = Some(error.message),
                    None => return Ok(()),
                },
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}
