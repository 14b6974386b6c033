//! Clusters in virtual time, over the code that serves.
//!
//! - [`simulation`]: requests through routers, prefill and decode nodes; [`front`]: its routers;
//! - [`scenario`], [`profile`], [`workload`] and [`trace`]: what is simulated, as data;
//! - [`report`]: what came of it; [`plot`]: the same as a picture; [`sweep`]: the best of several clusters;
//! - [`cooperation`]: pools that hold blocks for each other, without time.

pub mod cooperation;
pub mod front;
pub mod plot;
mod pool;
pub mod profile;
pub mod report;
pub mod scenario;
pub mod simulation;
pub mod sweep;
pub mod trace;
pub mod workload;
