//! The state of a constrained text: which tokens it may have next.

use crate::error::{Error, Result};
use crate::sampling::TokenMask;
use llguidance::Matcher;
use llguidance::api::StopReason;
use llguidance::toktrie::SimpleVob;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bits of a word of a set of tokens.
const WORD_BITS: usize = 32;
/// Why a constraint is refused at once.
const NO_TEXT: &str = "allows no text";

/// The tokens that a text may have next. Clones are independent, but share a cache of lexer states.
#[derive(Clone)]
pub(in crate::llama) struct GrammarMask {
    matcher: Matcher,
    /// The state at the beginning, with a cache of its own.
    beginning: Arc<Matcher>,
    /// The text's tokens.
    tokens: Vec<u32>,
    allowed: Arc<SimpleVob>,
    /// The id that stands for the end of the text.
    end: u32,
    /// Whether a clone has failed. The shared cache may be full then, so that all would fail.
    is_broken: Arc<AtomicBool>,
}

impl GrammarMask {
    /// The state at the beginning of a text.
    pub(super) fn new(matcher: Matcher, end: u32) -> std::result::Result<Self, String> {
        let mut mask = GrammarMask {
            beginning: Arc::new(matcher.deep_clone()),
            matcher,
            tokens: Vec::new(),
            allowed: Arc::default(),
            end,
            is_broken: Arc::default(),
        };
        if mask.matcher.is_stopped() {
            return Err(NO_TEXT.into());
        }
        match mask.find_allowed() {
            Ok(false) => Ok(mask),
            Ok(true) => Err(NO_TEXT.into()),
            Err(reason) if reason.contains(&StopReason::NoExtensionBias.to_string()) => Err(NO_TEXT.into()),
            Err(reason) => Err(reason),
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    /// Finds the tokens that may come next. Returns whether there are none.
    fn find_allowed(&mut self) -> std::result::Result<bool, String> {
        let allowed = self.matcher.compute_mask().map_err(|error| error.to_string())?;
        let is_complete = allowed.is_allowed(self.end) && allowed.num_set() == 1;
        self.allowed = Arc::new(allowed);
        Ok(is_complete)
    }

    /// Takes the same tokens from the beginning, with a cache of its own.
    fn start_again(&mut self) -> std::result::Result<(), String> {
        self.matcher = self.beginning.deep_clone();
        self.matcher.consume_tokens(&self.tokens).map_err(|error| error.to_string())
    }

    fn advance(&mut self, token: u32) -> std::result::Result<bool, String> {
        self.matcher.consume_token(token).map_err(|error| error.to_string())?;
        if !self.matcher.is_stopped() {
            return self.find_allowed();
        }
        let reason = self.matcher.stop_reason();
        if reason.is_ok() { Ok(true) } else { Err(reason.to_string()) }
    }
}

impl TokenMask for GrammarMask {
    fn apply(&self, logits: &mut [f32]) -> bool {
        let mut words = self.allowed.as_slice().iter();
        for logits in logits.chunks_mut(WORD_BITS) {
            match words.next().copied().unwrap_or(0) {
                0 => logits.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                word => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        // The model may have a row, of padding, with the id that stands for the end.
        if let Some(logit) = logits.get_mut(self.end as usize) {
            *logit = f32::NEG_INFINITY;
        }
        self.allowed.is_allowed(self.end)
    }

    fn accept(&mut self, token: u32) -> Result<bool> {
        let accepted = self.advance(token).or_else(|_| {
            self.is_broken.store(true, Ordering::Relaxed);
            // The shared cache may be full, perhaps of other texts' states. Those of this text alone are few.
            self.start_again()?;
            self.advance(token)
        });
        self.tokens.push(token);
        accepted.map_err(|reason| {
            let reason = super::shortened(&reason);
            Error::Generation {
                reason: format!("the answer cannot be continued as its constraint demands: {reason}"),
            }
        })
    }
}
