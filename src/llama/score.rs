//! Log-probabilities of given text: perplexity, and the log-likelihood of one text after another.

use super::{Llama, Prompt};
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sampling::{OnOverflow, TokenScore};

/// The log-probabilities of a text's tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The text's tokens.
    pub token_ids: Vec<u32>,
    /// The natural log-probabilities of all tokens but the first, which has nothing before it.
    pub logprobs: Vec<f32>,
}

impl Score {
    /// The exponential of the negative mean of the log-probabilities.
    pub fn perplexity(&self) -> f64 {
        (-sum(&self.logprobs) / self.logprobs.len() as f64).exp()
    }
}

/// The log-probabilities of a continuation's tokens after a context.
#[derive(Clone, Debug, PartialEq)]
pub struct LogLikelihood {
    /// The continuation's tokens.
    pub token_ids: Vec<u32>,
    /// Their natural log-probabilities.
    pub logprobs: Vec<f32>,
    /// Whether greedy decoding would generate exactly these tokens.
    pub is_greedy: bool,
}

impl LogLikelihood {
    /// The natural logarithm of the continuation's probability.
    pub fn sum(&self) -> f64 {
        sum(&self.logprobs)
    }
}

fn sum(logprobs: &[f32]) -> f64 {
    logprobs.iter().map(|&logprob| f64::from(logprob)).sum()
}

impl Llama {
    /// The log-probability of each token of a text, given those before it, from unprocessed logits.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a text of fewer than two tokens, or ids out of range;
    /// [`Error::ContextLength`]; [`Error::Cancelled`]; [`Error::Closed`], and the model's errors.
    pub fn score(&self, text: Prompt, cancel: &Cancel) -> Result<Score> {
        self.engine.check_open()?;
        let token_ids = self.ids(text, OnOverflow::Error, cancel)?;
        if token_ids.len() < 2 {
            let reason = format!(
                "{} tokens cannot be scored: the first has nothing before it, so there must be two",
                token_ids.len()
            );
            return Err(Error::argument("prompt", reason));
        }
        let scores = self.engine.score(&token_ids, 1, cancel)?;
        Ok(Score { token_ids, logprobs: scores.iter().map(|score| score.logprob).collect() })
    }

    /// The log-probabilities of `continuation` after `context`.
    ///
    /// Two texts are encoded as in lm-eval's harness. Spaces at the end of the context move to the start of
    /// the continuation, and both are encoded together. If the context alone has n tokens, the continuation
    /// is all tokens after the first n. After a context of ids, a text is encoded on its own, without
    /// special tokens. Ids are used as they are.
    ///
    /// # Errors
    /// As [`Llama::score`]; [`Error::InvalidArgument`] if context or continuation has no tokens.
    pub fn loglikelihood(
        &self,
        context: Prompt,
        continuation: Prompt,
        cancel: &Cancel,
    ) -> Result<LogLikelihood> {
        self.engine.check_open()?;
        let ids = |prompt| self.ids(prompt, OnOverflow::Error, cancel);
        let (mut tokens, continuation) = match (context, continuation) {
            (Prompt::Text(context), Prompt::Text(continuation)) => {
                let stripped = context.trim_end_matches(is_python_space);
                let whole = ids(Prompt::Text(context.clone() + &continuation))?;
                let context = ids(Prompt::Text(stripped.to_owned()))?;
                let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
                (context, continuation)
            }
            (context, Prompt::TokenIds(continuation) | Prompt::Conversation(continuation)) => {
                (ids(context)?, continuation)
            }
            (Prompt::TokenIds(context) | Prompt::Conversation(context), Prompt::Text(continuation)) => {
                (context, self.tokenizer()?.encode_unless_cancelled(&continuation, false, false, cancel)?)
            }
        };
        if tokens.is_empty() {
            let reason = "has no tokens: give at least the id of the token that begins or separates texts";
            return Err(Error::argument("context", reason));
        }
        if continuation.is_empty() {
            return Err(Error::argument("continuation", "has no tokens of its own after the context"));
        }
        let first = tokens.len();
        tokens.extend(&continuation);
        let scores = self.engine.score(&tokens, first, cancel)?;
        Ok(LogLikelihood {
            token_ids: continuation,
            logprobs: scores.iter().map(|score| score.logprob).collect(),
            is_greedy: scores.iter().all(|score: &TokenScore| score.is_greedy),
        })
    }
}

/// Whether Python's `str.isspace` accepts the character. lm-eval, which is written in Python, strips these.
fn is_python_space(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}
