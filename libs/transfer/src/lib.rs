//! One-sided memory transfers: the transport trait, built-in TCP, and a deterministic in-memory transport.
