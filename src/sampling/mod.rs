//! Chooses a token from a row of logits.
//!
//! [`params`] checks the caller's sampling parameters. [`processors`] has the arithmetic of each parameter,
//! as a function over one row of logits. [`sampler`] runs them in order and draws a token. Nothing here
//! depends on text or on the model.

pub mod params;
pub mod processors;
pub mod sampler;

pub use params::{OnOverflow, SamplingOptions, SamplingParams};
pub use sampler::{Sampler, TokenLogprob, TokenScore, score_token, token_logprob};
