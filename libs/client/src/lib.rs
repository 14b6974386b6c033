//! Typed async client of every service.
