//! Logs: to stderr only, since stdout belongs to a command's data.
//!
//! Elsewhere: changing what is logged while the process runs (`telemetry/levels.rs`).

mod levels;

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, reload};
use types::ErrorCode;

pub use levels::{LogLevels, Showing};

/// How a log line looks.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// For a person.
    #[default]
    Text,
    /// One object per line, for a collector.
    Json,
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// How a line looks.
    pub format: Format,
    /// Levels by module, such as `info,kv_store=debug`.
    pub filter: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            format: Format::Text,
            // Libraries below say at `info` what only their authors need.
            filter: "info,h2=warn,hyper=warn,tower=warn".to_owned(),
        }
    }
}

/// Why logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The filter cannot be read.
    #[error("log filter {filter:?} cannot be read: {reason}")]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Logging was started before.
    #[error("logging was started twice")]
    Started,
}

impl InitError {
    /// What the caller can do.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Filter { .. } => ErrorCode::Invalid,
            Self::Started => ErrorCode::Internal,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("log format is {other:?}, but must be text or json")),
        }
    }
}

/// Starts logging for this process. What is logged can be changed by what it returns.
///
/// # Errors
///
/// The filter cannot be read, or logging was started before.
pub fn init(config: &Config) -> Result<LogLevels, InitError> {
    let (filter, handle) = reload::Layer::new(filter(&config.filter)?);
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let started = match config.format {
        Format::Text => registry
            .with(layer.with_ansi(std::io::stderr().is_terminal()))
            .try_init(),
        Format::Json => registry
            .with(layer.json().flatten_event(true).with_current_span(true))
            .try_init(),
    };
    started.map_err(|_| InitError::Started)?;
    Ok(LogLevels::new(&config.filter, move |filter| {
        // Fails only once the subscriber is gone, and with it whoever would read a log.
        let _ = handle.reload(filter);
    }))
}

fn filter(text: &str) -> Result<EnvFilter, InitError> {
    EnvFilter::try_new(text).map_err(|error| InitError::Filter {
        filter: text.to_owned(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_cannot_be_read_is_named() {
        let error = filter("info,kv_store=loudly").expect_err("must be refused");
        assert!(error.to_string().contains("kv_store=loudly"), "{error}");
        assert_eq!(error.code(), ErrorCode::Invalid);
        filter(&Config::default().filter).expect("the default can be read");
    }

    #[test]
    fn formats_read_as_they_show() {
        for format in [Format::Text, Format::Json] {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert!("xml".parse::<Format>().is_err());
    }
}
