//! Chooses a token from a row of logits.
//!
//! [`params`] checks the caller's sampling parameters. [`processors`] has the arithmetic of each parameter,
//! as a function over one row of logits. [`constraint`] has the interfaces for what callers add: functions
//! over logits, and constraints on the text. [`sampler`] runs them in order and draws a token. Nothing here
//! depends on text or on the model.

pub mod constraint;
pub mod params;
pub mod processors;
pub mod sampler;

pub use constraint::{Constraint, LogitsProcessor, SharedProcessor, TokenMask};
pub use params::{OnOverflow, SamplingOptions, SamplingParams};
pub use sampler::{Sampler, TokenLogprob, TokenScore, score_token, token_logprob};
