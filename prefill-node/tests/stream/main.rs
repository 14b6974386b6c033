//! A prefill node as a decode node meets it: real engine, real gRPC, real TCP transfers.

mod ends;
mod harness;
mod landing;
