//! Logits to a token.
//!
//! [`params`] reads and checks what the caller asked for, [`processors`] holds the arithmetic of each
//! parameter as a function over one row of logits, and [`sampler`] runs them in their order and draws.
//! May import `config` and `error`; knows nothing of text or of the model.

pub mod params;
pub mod processors;
pub mod sampler;

pub use params::{OnOverflow, SamplingOptions, SamplingParams};
pub use sampler::{Sampler, TokenLogprob, TokenScore, score_token, token_logprob};
