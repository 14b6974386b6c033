//! Discrete-event cluster simulator over the real placement, admission and eviction code.
