//! Log-probabilities of given tokens, each after the tokens before it.

use super::{Engine, PREFILL_TOKENS};
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sampling::{TokenScore, score_token};

/// Maximum bytes of logits in memory at a time: a text's rows are scored in chunks.
const CHUNK_BYTES: usize = 64 << 20;

impl Engine {
    /// Scores `tokens[first..]`, each after all tokens before it. The model does not process the last
    /// token, so there may be one token more than the context holds.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no tokens, if ids are out of range, or if `first` is not from
    /// 1 to the index of the last token; [`Error::ContextLength`]; [`Error::Generation`] if logits are NaN or
    /// infinite; [`Error::Cancelled`]; those of [`Engine::check_open`].
    pub fn score(&self, tokens: &[u32], first: usize, cancel: &Cancel) -> Result<Vec<TokenScore>> {
        self.check_tokens(tokens)?;
        let input = &tokens[..tokens.len() - 1];
        if first == 0 || first > input.len() {
            return Err(Error::argument("first", format!("{first} is not from 1 to {}", input.len())));
        }
        if input.len() > self.context_length() {
            return Err(self.too_long(tokens.len()));
        }
        let row_bytes = size_of::<f32>() * self.vocab_size().max(1);
        let max_rows = (CHUNK_BYTES / row_bytes).clamp(1, PREFILL_TOKENS);
        let mut wanted = tokens[first..].iter();
        let mut scores = Vec::with_capacity(wanted.len());
        self.prefill_in_steps(input, first - 1, max_rows, cancel, &mut |logits| {
            for (row, &token) in logits.values.chunks_exact(logits.vocab_size).zip(&mut wanted) {
                if cancel.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                scores.push(score_token(row, token)?);
            }
            Ok(())
        })?;
        Ok(scores)
    }
}
