//! The router's two front doors, with nodes that are scripted at the RPC border and everything else real.

mod access;
mod failover;
mod grpc;
mod harness;
mod openai;
mod requests;
mod restart;
mod routing;
mod ui;
