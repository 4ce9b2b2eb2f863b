//! Stands in for constraints in a build without the Cargo feature `grammar`.

use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sampling::{Constraint, TokenMask};
use crate::tokenizer::Tokenizer;

/// Refuses every constraint.
#[derive(Default)]
pub(super) struct Grammars;

/// There is none.
#[derive(Clone)]
pub(super) enum GrammarMask {}

impl TokenMask for GrammarMask {
    fn apply(&self, _: &mut [f32]) -> bool {
        match *self {}
    }

    fn accept(&mut self, _: u32) -> Result<bool> {
        match *self {}
    }
}

impl Grammars {
    pub(super) fn begin(
        &self,
        constraint: &Constraint,
        _: &Tokenizer,
        _: &[u32],
        _: &Cancel,
    ) -> Result<GrammarMask> {
        Err(Error::argument(constraint.name(), "this build lacks the Cargo feature \"grammar\""))
    }
}
