//! The place of the raw UCX bindings: declarations of `libucp`, resolved with `dlopen` at run time, so that
//! one binary builds without UCX and starts where there is none.
//!
//! There are no bindings yet: the crate is empty and nothing depends on it. Its one user will be the UCX
//! transport of the `transfer` crate, whose documentation shows the seam.
