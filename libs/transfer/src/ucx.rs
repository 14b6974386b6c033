//! Moving bytes by UCX: RDMA, NVLink and shared memory, through a library that is loaded at run time.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// What may move the bytes of transfers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// UCX for every pair of nodes where it offers more than TCP, built-in TCP for the others.
    #[default]
    Auto,
    /// Built-in TCP only.
    Tcp,
    /// UCX for every pair, also where it only offers TCP. A node without it does not start.
    Ucx,
}

/// Whether and how UCX is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What may move bytes.
    pub choice: Choice,
    /// The library's file. `None`: `libucp.so.0`, wherever the system finds it.
    pub library: Option<PathBuf>,
    /// UCX's own settings without their prefix, such as `TLS` or `MAX_RMA_RAILS`, which override the environment.
    pub settings: BTreeMap<String, String>,
    /// How long the thread that drives UCX looks for more work before it sleeps.
    pub spin: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            choice: Choice::Auto,
            library: None,
            settings: BTreeMap::new(),
            // Of the order of a wake-up: spinning longer costs more than it saves.
            spin: Duration::from_micros(20),
        }
    }
}
