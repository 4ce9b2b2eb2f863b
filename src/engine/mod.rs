//! Sequences of token ids, step by step. Knows nothing of text.
//!
//! - `engine.rs`: a model that several threads share, one step at a time
//! - `sequence.rs`: a prompt and what is generated after it
//! - `batch.rs`: sequences that are generated together
//! - `score.rs`: how likely given tokens are

mod batch;
#[allow(clippy::module_inception)] // engine/engine.rs, as the house has it
mod engine;
mod score;
mod sequence;
#[cfg(test)]
mod tests;

pub use engine::Engine;
pub use sequence::{Finish, FinishReason, Sequence, Stats, Step, StopReason, Token};

/// Tokens of a prompt that one step reads: the model's lock is held no longer.
const PREFILL_TOKENS: usize = 512;
