//! How likely given tokens are, each after those before it.

use super::{Engine, PREFILL_TOKENS};
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sampling::{TokenScore, score_token};

/// Bytes of logits that exist at a time: a text's rows are looked at in chunks, then dropped.
const CHUNK_BYTES: usize = 64 << 20;

impl Engine {
    /// Scores `tokens[first..]`, each after all tokens before it. The last token is looked up, not
    /// read, so there may be one more than the context holds.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no tokens, ids out of range, or a `first` that is not from 1 to
    /// the last; [`Error::ContextLength`]; [`Error::Generation`] if the model gives logits that are no
    /// numbers; [`Error::Cancelled`]; those of [`Engine::check_open`].
    pub fn score(&self, tokens: &[u32], first: usize, cancel: &Cancel) -> Result<Vec<TokenScore>> {
        self.check_tokens(tokens)?;
        let read = &tokens[..tokens.len() - 1];
        if first == 0 || first > read.len() {
            return Err(Error::argument("first", format!("{first} is not from 1 to {}", read.len())));
        }
        if read.len() > self.context_length() {
            return Err(self.too_long(tokens.len()));
        }
        let row_bytes = size_of::<f32>() * self.vocab_size().max(1);
        let most_rows = (CHUNK_BYTES / row_bytes).clamp(1, PREFILL_TOKENS);
        let mut wanted = tokens[first..].iter();
        let mut scores = Vec::with_capacity(wanted.len());
        self.read(read, first - 1, most_rows, cancel, &mut |logits| {
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
