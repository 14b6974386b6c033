//! Turns prompts into KV blocks and a first token.
//!
//! A decode node opens one stream per prompt. The node queues the prompt, fetches the cached prefix it lacks,
//! computes the rest in chunks beside other prompts, and writes every layer of every block straight into the
//! decode node's memory as soon as it is complete. What it computed stays in its own store.
//!
//! Architecture invariants:
//! - the decode node owns the request: when its stream ends, everything here ends and is given back;
//! - after `Quiesced` no write of ours is on its way or will be started;
//! - our blocks are given back only when neither the engine nor a write uses them;
//! - nothing waits for a peer without a deadline, and no peer holds another request up.
//!
//! Where things are, the pure modules first:
//! - [`schedule`]: which prompt is computed next, and how much of it;
//! - [`handoff`]: which slices may be written, and when the handoff has ended;
//! - [`rates`]: how fast this node is, for the router; [`overlap`]: how much of a handoff was hidden;
//! - [`request`]: what a decode node asks for, checked;
//! - `engine_loop`: the thread that owns the engine; `push`: the writes;
//! - `peer`, `session`, `handover`: one stream, from its start to its end;
//! - [`service`]: all of them, and their end.
//!
//! Elsewhere: blocks and fetching (`kv-store`), computing (`engine`), moving bytes (`transfer`), the other side of the
//! stream (`decode-node`).

pub mod config;
mod engine_loop;
pub mod handoff;
mod handover;
mod metrics;
pub mod overlap;
mod peer;
mod push;
pub mod rates;
pub mod request;
pub mod schedule;
pub mod service;
mod session;
mod shared;

pub use config::Config;
pub use service::{Deps, Handle, Service};
