//! Whole-cluster tests: e2e, golden, chaos, tidy.
