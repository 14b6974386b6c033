//! `--watch`: the same question again and again.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use tokio::time::MissedTickBehavior;

use super::{Format, View, tone, write};

/// More often would keep the router busy with being looked at.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Moves to the upper left corner; what stands there is written over, so that nothing flickers.
const HOME: &str = "\x1b[H";
/// Clears the rest of a line.
const CLEAR_LINE: &str = "\x1b[K\n";
/// Clears what is below.
const CLEAR_REST: &str = "\x1b[J";
const CLEAR_ALL: &str = "\x1b[2J";

/// Flag of commands that show what changes.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct Watch {
    /// Show it again and again until Ctrl-C, every 2s unless said otherwise; at least 100ms.
    #[arg(long = "watch", value_name = "INTERVAL", num_args = 0..=1, default_missing_value = "2s", value_parser = interval)]
    every: Option<Duration>,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval: node::config::Duration = text.parse().map_err(|error| format!("{error}"))?;
    match interval.get() {
        interval if interval < INTERVAL_MIN => Err(format!("it must be at least {INTERVAL_MIN:?}")),
        interval => Ok(interval),
    }
}

impl Watch {
    /// Whether it goes on until Ctrl-C.
    pub(crate) fn repeats(self) -> bool {
        self.every.is_some()
    }

    /// Prints what `view` gives: once, or until Ctrl-C. A terminal is drawn again; elsewhere each time is a document of its own.
    ///
    /// # Errors
    ///
    /// The first time fails. Later failures are told and may pass: the cluster that is watched may be restarting.
    pub(crate) async fn show(
        self,
        format: Format,
        view: impl AsyncFn() -> anyhow::Result<View>,
    ) -> anyhow::Result<()> {
        let Some(every) = self.every else {
            return format.print(&view().await?);
        };
        tokio::select! {
            // Whoever interrupts has seen enough, which is no failure.
            interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
            failed = repeat(every, format, view) => failed,
        }
    }
}

/// Ends only with what is wrong.
async fn repeat(
    every: Duration,
    format: Format,
    view: impl AsyncFn() -> anyhow::Result<View>,
) -> anyhow::Result<()> {
    let drawn = format.streams_text() && std::io::stdout().is_terminal();
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut first = true;
    loop {
        ticks.tick().await;
        let text = match view().await {
            Ok(view) => format.next(&view, tone::on_stdout())?,
            Err(error) if first => return Err(error),
            Err(error) => {
                eprintln!("perigee: {error:#}");
                continue;
            }
        };
        write(&if drawn { screen(&text, first) } else { text })?;
        first = false;
    }
}

/// `text` over what was there.
fn screen(text: &str, first: bool) -> String {
    let clear = if first { CLEAR_ALL } else { "" };
    format!("{clear}{HOME}{}{CLEAR_REST}", text.replace('\n', CLEAR_LINE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_has_a_least_value() {
        assert_eq!(interval("100ms"), Ok(INTERVAL_MIN));
        assert_eq!(interval("2s"), Ok(Duration::from_secs(2)));
        let refused = interval("99ms").expect_err("too often");
        assert!(refused.contains("at least 100ms"), "{refused}");
        assert!(interval("often").is_err());
    }

    #[test]
    fn a_screen_is_written_over_and_not_below_the_last_one() {
        assert_eq!(screen("a\nb\n", true), "\x1b[2J\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        assert!(!screen("a\n", false).contains(CLEAR_ALL));
    }
}
