//! What every process of the cluster needs, whatever its role: configuration, the registry of members, channels
//! to peers, telemetry, metrics, health, and an orderly end.
//!
//! Architecture invariant: nothing here knows what a role does, and nothing is global. Configuration, clock
//! and shutdown are values that the process's `main` makes and passes on.
//!
//! Where things are:
//! - [`config`]: file, environment and flags, in layers, into any raw struct;
//! - [`identity`]: who this process is, and which start of it; [`host`]: what the machine offers for transfers;
//! - [`registry`]: who else is there (etcd, or embedded in `perigee up`);
//! - [`mod@channel`]: connections to peers that notice when a partition has healed;
//! - [`tls`]: certificates, for what is served and what is called; [`reload`]: files that are read again when they change;
//! - [`serve`]: listeners, gRPC, HTTP, health, and draining;
//! - [`service`]: the `perigee.v1.Node` service;
//! - [`shutdown`] and [`task`]: how a process ends, and what may end it;
//! - [`telemetry`] and [`metrics`]: what it says meanwhile;
//! - [`backoff`]: how long to wait before trying again.

pub mod backoff;
pub mod channel;
pub mod clock;
pub mod config;
pub mod host;
pub mod identity;
pub mod metrics;
pub mod recall;
pub mod registry;
pub mod reload;
pub mod serve;
pub mod service;
pub mod shutdown;
pub mod task;
pub mod telemetry;
pub mod tls;

pub use channel::{ApiKey, Channel, Channels, Connector, channel};
pub use identity::Identity;
pub use metrics::Metrics;
pub use recall::Recall;
pub use serve::{Listeners, Readiness};
pub use service::{Drainable, Flippable, LoadSource, NodeService};
pub use shutdown::Shutdown;
pub use tls::Tls;
