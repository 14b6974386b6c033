//! Model execution: weights, tokenizer, paged KV, CPU kernels, sampler.
//!
//! Invariant: a row's logits and its KV depend on the tokens before it and on nothing else, bit for bit: not on who
//! shares the batch, how the prompt was chunked, what came from the cache, how many threads ran or which
//! instruction set they used.

// Kernels use intrinsics and raw block memory; every block has its SAFETY argument.
#![allow(unsafe_code)]

pub mod chat;
pub mod compute;
pub mod config;
pub mod dequantise;
pub mod detokenizer;
pub mod family;
pub mod file;
pub mod fixture;
pub mod model;
pub mod monolith;
pub mod sampler;
pub mod step;
pub mod tensor;
mod threads;
pub mod tokenizer;

pub use chat::{ChatError, ChatOptions, ChatTemplate};
pub use compute::Isa;
pub use detokenizer::{Detokenizer, StopMatcher, StopOutcome};
pub use file::{LoadError, ModelFile};
pub use model::{Model, Numerics, Precision};
pub use sampler::{SampleError, Sampled, sample};
pub use step::{
    CALIBRATION_TOKENS, Calibration, Engine, Logits, LogitsWanted, SequenceStep, StepError, StepObserver,
};
pub use tokenizer::{Tokenizer, TokenizerError};
