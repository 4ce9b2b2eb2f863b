//! What a caller may do to the choice of tokens: change logits, or allow only some tokens.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};

/// The most bytes of a JSON schema, a regular expression, a grammar or a list of choices.
const MAX_BYTES: usize = 1 << 20;

/// What the text of an answer must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Constraint {
    /// JSON that is valid under this JSON schema, which is JSON too.
    JsonSchema(String),
    /// A text that this regular expression matches as a whole.
    Regex(String),
    /// A text of this context-free grammar, in llguidance's dialect of Lark.
    Grammar(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl Constraint {
    /// The name of the parameter that gives it.
    pub fn name(&self) -> &'static str {
        match self {
            Constraint::JsonSchema(_) => "json_schema",
            Constraint::Regex(_) => "regex",
            Constraint::Grammar(_) => "grammar",
            Constraint::Choice(_) => "choice",
        }
    }

    /// # Errors
    /// [`Error::InvalidArgument`] if it is too long, or has no choices or an empty one.
    pub(super) fn check(self) -> Result<Self> {
        let bytes = match &self {
            Constraint::JsonSchema(text) | Constraint::Regex(text) | Constraint::Grammar(text) => text.len(),
            Constraint::Choice(texts) if texts.is_empty() || texts.iter().any(String::is_empty) => {
                return Err(Error::argument("choice", "needs at least one text, and none may be empty"));
            }
            Constraint::Choice(texts) => texts.iter().map(String::len).sum(),
        };
        if bytes > MAX_BYTES {
            return Err(Error::argument(
                self.name(),
                format!("got {bytes} bytes, expected at most {MAX_BYTES}"),
            ));
        }
        Ok(self)
    }
}

/// A function of the caller that changes logits before a token is drawn.
pub trait LogitsProcessor: Send + Sync {
    /// Changes a row of logits.
    ///
    /// - `tokens`: the prompt and the tokens generated so far
    /// - `logits`: `(vocab_size,)`, after penalties and bias, before the temperature
    ///
    /// # Errors
    /// Any error ends the sequence and is returned to its caller; [`Error::Callback`] carries a foreign one.
    fn process(&self, tokens: &[u32], logits: &mut [f32]) -> Result<()>;
}

/// A processor that several sequences share. Equal to its clones only.
#[derive(Clone)]
pub struct SharedProcessor(pub Arc<dyn LogitsProcessor>);

impl PartialEq for SharedProcessor {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for SharedProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SharedProcessor").field(&Arc::as_ptr(&self.0)).finish()
    }
}

/// The tokens that a constrained text may have next. Each sequence has its own.
pub trait TokenMask: Send {
    /// Sets the logits of all tokens that may not come next to negative infinity. Tokens that end a text are
    /// among them. Returns whether the text may end here.
    fn apply(&self, logits: &mut [f32]) -> bool;

    /// Takes the token that was drawn. Returns whether the text is complete: nothing can follow.
    ///
    /// # Errors
    /// [`Error::Generation`] if the token is not allowed, or if what may follow takes too long to find out.
    fn accept(&mut self, token: u32) -> Result<bool>;
}
