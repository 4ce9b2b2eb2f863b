//! Runs sequences of token ids together, on one thread. Does not deal with text.
//!
//! - `engine.rs`: the handle that callers share, and the thread that owns the model
//! - `scheduler.rs`: the sequences, and which of their tokens the next forward pass processes
//! - `pace.rs`: how many tokens of prompts a pass may have
//! - `sequence.rs`: a prompt and the tokens after it: plain data
//! - `output.rs`: how a sequence hands over its tokens or logits, and how its caller stops it
//! - `rereads.rs`: the answers of conversations, which are read again for the next turn
//! - `metrics.rs`: counts of what the engine does
//! - `score.rs`: logits and log-probabilities of given tokens

#[allow(clippy::module_inception)] // engine/engine.rs holds the type Engine
mod engine;
mod metrics;
mod output;
mod pace;
mod rereads;
mod scheduler;
mod score;
mod sequence;
#[cfg(test)]
mod tests;

pub use engine::{Engine, EngineOptions};
pub use metrics::Metrics;
pub use output::{Flow, Ticket, TokenSink};
pub use sequence::{Finish, FinishReason, Sequence, Stats, Step, StopReason, Token};
