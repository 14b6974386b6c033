//! Configuration in layers: defaults < TOML file < environment < flags, into any raw struct.
//!
//! A raw struct is `Default + Serialize + Deserialize` with `serde(default)`, and without `serde(alias)` or
//! `serde(skip…)`: what a value would not give back when serialised counts as unknown. Unknown keys are reported and
//! not refused, so that a newer file can be given to an older binary; `--check-config` refuses them.
//!
//! Environment: `PERIGEE_<SECTION>__<KEY>`, so `PERIGEE_DECODE__BATCH_MAX=8` sets `batch_max` in `[decode]`. Deeper
//! sections add more `__`. A variable without `__` is no configuration.
//!
//! [`layer`] is pure; [`load`] reads the file and the environment for it.

mod layers;
mod units;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use types::ErrorCode;

pub use units::{ByteSize, Duration, UnitError};

/// What every variable of ours begins with.
pub const ENVIRONMENT_PREFIX: &str = "PERIGEE_";
/// A configuration file beyond this is some other file.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The file of this name.
    File(String),
    /// This environment variable.
    Environment(String),
    /// A flag of the command line.
    Flag,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(name) => write!(f, "{name}"),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Flag => f.write_str("flag"),
        }
    }
}

/// A configuration that could be read.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The value, with defaults where no layer says otherwise.
    pub value: T,
    /// What no field took, each with where it comes from and the nearest known key: for a warning, or an error.
    pub unknown_keys: Vec<String>,
    /// Where each value that is not a default comes from, by dotted key.
    pub sources: BTreeMap<String, Source>,
}

/// What goes over the defaults, lowest first.
#[derive(Debug, Clone, Default)]
pub struct Layers<'a> {
    /// Name and text of the TOML file.
    pub file: Option<(&'a str, &'a str)>,
    /// Environment variables; others than configuration are ignored.
    pub environment: Vec<(String, String)>,
    /// Dotted keys and values from the command line.
    pub flags: Vec<(String, String)>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration file {name}: {source}")]
    Read {
        /// Its path.
        name: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file is larger than any configuration.
    #[error("configuration file {name} has {bytes} bytes, but at most {FILE_BYTES_MAX} are read")]
    TooLarge {
        /// Its path.
        name: String,
        /// Its size.
        bytes: u64,
    },
    /// The file is no TOML, or a value in it does not fit its key.
    #[error("{name}:{line}: {message}")]
    File {
        /// Its path.
        name: String,
        /// The line at fault, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value from elsewhere does not fit its key.
    #[error("{origin} sets {key} to {value:?}: {message}")]
    Value {
        /// Where it comes from.
        origin: Source,
        /// The dotted key.
        key: String,
        /// What was given.
        value: String,
        /// What is wrong with it.
        message: String,
    },
    /// The defaults themselves cannot be expressed.
    #[error("defaults cannot be serialised: {0}")]
    Defaults(String),
}

impl ConfigError {
    /// What the caller can do.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Read { .. } => ErrorCode::NotFound,
            Self::TooLarge { .. } | Self::File { .. } | Self::Value { .. } => ErrorCode::Invalid,
            Self::Defaults(_) => ErrorCode::Internal,
        }
    }
}

/// Puts the layers over the defaults of `T`.
///
/// # Errors
///
/// The file is no TOML, or a value does not fit its key.
pub fn layer<T: Default + Serialize + DeserializeOwned>(
    layers: &Layers<'_>,
) -> Result<Loaded<T>, ConfigError> {
    layers::layer(layers)
}

/// Reads `file`, if there is one, and this process's environment, and puts `flags` over both.
///
/// # Errors
///
/// As [`layer`], or the file cannot be read.
pub fn load<T: Default + Serialize + DeserializeOwned>(
    file: Option<&Path>,
    flags: Vec<(String, String)>,
) -> Result<Loaded<T>, ConfigError> {
    let file = match file {
        Some(path) => Some((path.display().to_string(), read(path)?)),
        None => None,
    };
    // A variable that is not UTF-8 is not ours: all our keys and values are.
    let environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    layer(&Layers {
        file: file.as_ref().map(|(name, text)| (name.as_str(), text.as_str())),
        environment,
        flags,
    })
}

/// Reads a configuration file.
///
/// # Errors
///
/// It cannot be read, or is larger than any configuration.
pub fn read(path: &Path) -> Result<String, ConfigError> {
    let name = || path.display().to_string();
    let refuse = |source| ConfigError::Read { name: name(), source };
    let bytes = std::fs::metadata(path).map_err(refuse)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(ConfigError::TooLarge { name: name(), bytes });
    }
    std::fs::read_to_string(path).map_err(refuse)
}

#[cfg(test)]
mod tests;
