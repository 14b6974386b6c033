//! The one binary: all roles, `up`, and the cluster admin commands.
fn main() {}
