//! Model execution: weights, tokenizer, paged KV, CPU kernels, sampler.
//!
//! Invariant: a row's logits and its KV depend on the tokens before it and on nothing else, bit for bit: not on who
//! shares the batch, how the prompt was chunked, what came from the cache, how many threads ran or which
//! instruction set they used.

// Kernels use intrinsics and raw block memory; every block has its SAFETY argument.
#![allow(unsafe_code)]

pub mod config;
pub mod tensor;
