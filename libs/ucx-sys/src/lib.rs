//! Raw UCX bindings, loaded at run time.
