//! Runs sequences of token ids, step by step. Does not deal with text.
//!
//! - `engine.rs`: a model that several threads share, one step at a time
//! - `sequence.rs`: a prompt and the tokens generated after it
//! - `batch.rs`: sequences that are generated together
//! - `score.rs`: log-probabilities of given tokens

mod batch;
#[allow(clippy::module_inception)] // engine/engine.rs holds the type Engine
mod engine;
mod score;
mod sequence;
#[cfg(test)]
mod tests;

pub use engine::Engine;
pub use sequence::{Finish, FinishReason, Sequence, Stats, Step, StopReason, Token};

/// Maximum prompt tokens in one call of the model, so that its lock is not held for long.
const PREFILL_TOKENS: usize = 512;
