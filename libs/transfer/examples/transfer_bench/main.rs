//! Measures how fast two processes of one machine move bytes through [`transfer::Transport`], and over a bare TCP
//! stream beside it. `scripts/bench_transfer.py` (`make bench-transfer`) drives it next to its peers; by hand:
//!
//! ```sh
//! transfer_bench serve > ready &    # ends with its standard input
//! echo '{"op": "write", "slice_bytes": 65536, "slices": 16, "in_flight": 1}' | transfer_bench drive --peer "$(cat ready)"
//! ```
//!
//! `drive` takes cases as lines of JSON and answers each with a line of JSON; see [`drive::Case`] and
//! [`drive::Outcome`].
#![allow(clippy::disallowed_methods)] // Its blocking tasks are bounded by a case's `in_flight` and `places`.
#![allow(unsafe_code)] // The processor time of a process is known to the system only; see `usage`.

mod drive;
mod serve;
mod usage;

use std::error::Error;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use transfer::{tcp, ucx};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Offers memory, prints how to reach it, and serves until standard input ends.
    Serve(TransportArguments),
    /// Takes cases from standard input and measures them against a serving process.
    Drive {
        /// The line that the serving process printed.
        #[arg(long)]
        peer: String,
        #[command(flatten)]
        transport: TransportArguments,
    },
}

#[derive(Args)]
struct TransportArguments {
    /// What may move bytes.
    #[arg(long, default_value = "auto")]
    choice: Choice,
    /// UCX's library, where it is not the system's.
    #[arg(long)]
    ucx_library: Option<PathBuf>,
    /// A setting of UCX without its prefix, such as `TLS=tcp`.
    #[arg(long, value_parser = key_and_value)]
    ucx_setting: Vec<(String, String)>,
    /// Connections to one peer, if not the default.
    #[arg(long)]
    connections: Option<std::num::NonZeroUsize>,
    /// Largest payload of one request, if not the default.
    #[arg(long)]
    part_bytes: Option<std::num::NonZeroUsize>,
    /// How long the thread that drives UCX spins, if not the default.
    #[arg(long)]
    ucx_spin_us: Option<u64>,
    /// How much memory is registered.
    #[arg(long, default_value_t = 256 << 20)]
    pool_bytes: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum Choice {
    Auto,
    Tcp,
    Ucx,
}

impl TransportArguments {
    fn config(&self) -> tcp::Config {
        let mut config = tcp::Config::default();
        config.ucx.choice = match self.choice {
            Choice::Auto => ucx::Choice::Auto,
            Choice::Tcp => ucx::Choice::Tcp,
            Choice::Ucx => ucx::Choice::Ucx,
        };
        config.ucx.library.clone_from(&self.ucx_library);
        if let Some(spin_us) = self.ucx_spin_us {
            config.ucx.spin = std::time::Duration::from_micros(spin_us);
        }
        config.ucx.settings = self.ucx_setting.iter().cloned().collect();
        config.connections_per_peer = self.connections.unwrap_or(config.connections_per_peer);
        config.part_bytes = self.part_bytes.unwrap_or(config.part_bytes);
        config
    }
}

fn key_and_value(text: &str) -> std::result::Result<(String, String), String> {
    let pair = text.split_once('=').ok_or("expected KEY=VALUE")?;
    Ok((pair.0.to_owned(), pair.1.to_owned()))
}

#[tokio::main]
async fn main() -> Result<()> {
    match Arguments::parse().role {
        Role::Serve(transport) => serve::run(&transport).await,
        Role::Drive { peer, transport } => drive::run(&peer, &transport).await,
    }
}
