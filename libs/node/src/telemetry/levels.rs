//! What the process logs, changed for a while.
//!
//! Invariant: a change ends by itself, so that nobody forgets a node that logs everything. A later change takes the place of
//! the one before, with its end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing_subscriber::EnvFilter;
use types::Error;

use super::filter;

/// How long a change lasts that says nothing of it: long enough to see something happen again.
const LASTS_DEFAULT: Duration = Duration::from_secs(600);
/// Longest change. What is wanted for longer is a setting.
const LASTS_MAX: Duration = Duration::from_secs(24 * 3600);
/// Bounds what is kept of a filter, and how long reading it takes.
const FILTER_BYTES_MAX: usize = 4096;

/// Changes what is logged. Clones are one and the same.
#[derive(Clone)]
pub struct LogLevels {
    shared: Arc<Shared>,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Showing {
    /// Levels by module.
    pub filter: String,
    /// The process's own setting.
    pub configured: String,
    /// When that holds again; `None` if it does.
    pub reverts_in: Option<Duration>,
}

struct Shared {
    configured: String,
    apply: Box<dyn Fn(EnvFilter) + Send + Sync>,
    change: Mutex<Option<Change>>,
}

/// Another filter than the configured one, and what ends it.
struct Change {
    filter: String,
    ends: Instant,
    reverting: AbortHandle,
}

impl LogLevels {
    /// Levels that `apply` puts into effect. `configured` holds now, and can be read.
    pub(super) fn new(configured: &str, apply: impl Fn(EnvFilter) + Send + Sync + 'static) -> Self {
        Self {
            shared: Arc::new(Shared {
                configured: configured.to_owned(),
                apply: Box::new(apply),
                change: Mutex::new(None),
            }),
        }
    }

    /// Logs by `text` for as long as `lasts`, or ten minutes. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`types::ErrorCode::Invalid`] if the filter cannot be read, or is to last for more than a day.
    pub fn set(&self, text: &str, lasts: Option<Duration>) -> Result<(), Error> {
        if text.len() > FILTER_BYTES_MAX {
            let message = format!(
                "the filter has {} bytes, but at most {FILTER_BYTES_MAX} are read",
                text.len()
            );
            return Err(Error::invalid("filter", message));
        }
        let parsed = filter(text).map_err(|error| Error::invalid("filter", error.to_string()))?;
        let lasts = lasts.unwrap_or(LASTS_DEFAULT);
        if lasts > LASTS_MAX {
            let message = format!("{} s are longer than a day: set log.filter", lasts.as_secs());
            return Err(Error::invalid("for", message));
        }
        tracing::warn!(filter = text, seconds = lasts.as_secs(), "log levels change");
        let ends = Instant::now() + lasts;
        let mut change = self.lock();
        let levels = self.clone();
        let reverting = tokio::spawn(async move {
            tokio::time::sleep_until(ends).await;
            levels.end(Some(ends));
        });
        let next = Change {
            filter: text.to_owned(),
            ends,
            reverting: reverting.abort_handle(),
        };
        if let Some(before) = change.replace(next) {
            before.reverting.abort();
        }
        (self.shared.apply)(parsed);
        Ok(())
    }

    /// Logs by the process's own setting again.
    pub fn revert(&self) {
        self.end(None);
    }

    /// Ends the change that there is; only the one with that end, if one is named, since another may have come meanwhile.
    fn end(&self, only: Option<Instant>) {
        let mut change = self.lock();
        let is_meant = |change: &mut Change| only.is_none_or(|ends| change.ends == ends);
        let Some(before) = change.take_if(is_meant) else {
            return;
        };
        // It was read once, so it can be read again.
        if let Ok(configured) = filter(&self.shared.configured) {
            (self.shared.apply)(configured);
        }
        tracing::warn!(
            filter = self.shared.configured,
            "log levels are the configured ones again"
        );
        // Last: this may be the very task.
        before.reverting.abort();
    }

    /// What is logged now.
    pub fn showing(&self) -> Showing {
        let configured = self.shared.configured.clone();
        match &*self.lock() {
            None => Showing {
                filter: configured.clone(),
                configured,
                reverts_in: None,
            },
            Some(change) => Showing {
                filter: change.filter.clone(),
                configured,
                reverts_in: Some(change.ends.saturating_duration_since(Instant::now())),
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Change>> {
        // Every change is complete before anything can panic.
        self.shared.change.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for LogLevels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogLevels")
            .field("showing", &self.showing())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
    use types::ErrorCode;

    use super::*;

    /// Nothing here takes longer unless it is broken.
    const PATIENCE: Duration = Duration::from_secs(20);
    const HOUR: Option<Duration> = Some(Duration::from_secs(3600));

    /// Levels, and the filters that they put into effect.
    fn levels() -> (LogLevels, UnboundedReceiver<String>) {
        let (applied, seen) = unbounded_channel();
        let apply = move |filter: EnvFilter| applied.send(filter.to_string()).unwrap();
        (LogLevels::new("info", apply), seen)
    }

    async fn next(seen: &mut UnboundedReceiver<String>) -> String {
        let next = tokio::time::timeout(PATIENCE, seen.recv()).await;
        next.expect("in time").expect("the levels live")
    }

    #[tokio::test]
    async fn a_change_ends_by_itself_and_a_later_one_takes_its_place() {
        let (levels, mut seen) = levels();
        levels.set("debug", Some(Duration::from_millis(200))).unwrap();
        levels.set("trace", HOUR).unwrap();
        levels.set("warn", Some(Duration::from_millis(300))).unwrap();
        let showing = levels.showing();
        assert_eq!(
            (showing.filter.as_str(), showing.configured.as_str()),
            ("warn", "info")
        );
        assert!(showing.reverts_in.is_some());
        for filter in ["debug", "trace", "warn", "info"] {
            assert_eq!(next(&mut seen).await, filter);
        }
        assert_eq!(levels.showing().reverts_in, None);
        assert!(seen.try_recv().is_err());
    }

    #[tokio::test]
    async fn the_end_of_a_change_that_was_replaced_ends_nothing() {
        let (levels, mut seen) = levels();
        levels.set("debug", HOUR).unwrap();
        levels.end(Some(Instant::now()));
        assert_eq!(levels.showing().filter, "debug");
        levels.revert();
        levels.revert();
        assert_eq!(next(&mut seen).await, "debug");
        assert_eq!(next(&mut seen).await, "info");
        assert!(seen.try_recv().is_err());
    }

    #[tokio::test]
    async fn what_cannot_be_read_or_lasts_too_long_changes_nothing() {
        let (levels, mut seen) = levels();
        let days = Some(Duration::from_secs(48 * 3600));
        for (text, lasts) in [
            ("info,router=loudly", None),
            ("debug", days),
            (&*"a".repeat(5000), None),
        ] {
            let error = levels.set(text, lasts).expect_err("must be refused");
            assert_eq!(error.code, ErrorCode::Invalid);
        }
        assert!(seen.try_recv().is_err());
    }
}
