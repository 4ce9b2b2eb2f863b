//! Answers that follow a JSON schema, a regular expression, a grammar, or are one of several texts.
//!
//! llguidance compiles the constraint and finds, before each token, which tokens may come next.
//!
//! - `token_trie.rs`: the bytes of the tokenizer's tokens, as llguidance wants them
//! - `json_schema.rs`: what is changed in a schema before it is compiled
//! - `mask.rs`: the state of one sequence
//!
//! Without the Cargo feature `grammar`, `unsupported.rs` takes the place of all of them.

mod json_schema;
mod mask;
mod token_trie;

use crate::checkpoint::background::{self, Limits};
use crate::error::{Error, Result};
use crate::model::Cancel;
use crate::sampling::Constraint;
use crate::sys::panics;
use crate::sys::sync::{Mutex, get_or_make};
use crate::tokenizer::Tokenizer;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};
pub(super) use mask::GrammarMask;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The longest time to compile a constraint. llguidance's own limits end most attempts within 100 ms.
const MAX_COMPILE_TIME: Duration = Duration::from_secs(5);
/// The stack of a thread that compiles. llguidance follows the nesting of a constraint in nested calls.
const STACK_BYTES: usize = 64 << 20;
/// How many compiled constraints a model keeps.
const MAX_KEPT: usize = 16;
/// The most states of a constraint's lexer. They take up to half a kilobyte each. A string with a length
/// limit needs one for each byte, and a few for the tokens that may come next.
const MAX_LEXER_STATES: usize = 50_000;
/// The most work to build a constraint's lexer. Half of llguidance's own limit, with which a hostile
/// expression takes 400 MB of memory for two seconds.
const INITIAL_LEXER_FUEL: u64 = 500_000;
/// The most work of a constraint's lexer for one token. A quarter of llguidance's own limit, for the same
/// reason.
const STEP_LEXER_FUEL: u64 = 50_000;

/// A model's compiled constraints.
#[derive(Default)]
pub(super) struct Grammars {
    /// The tokenizer's tokens, made on first use, or why that is impossible.
    factory: OnceLock<std::result::Result<Arc<ParserFactory>, String>>,
    /// Those used last, the newest at the end.
    kept: Mutex<VecDeque<(Constraint, GrammarMask)>>,
}

impl Grammars {
    /// The beginning of a text that follows `constraint`. Compiling can be cancelled.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the constraint is malformed, too complex or not supported, or allows no
    /// text; [`Error::Text`] if compiling takes too long; [`Error::Unsupported`] if the
    /// tokenizer's tokens have no bytes of their own; [`Error::Cancelled`].
    pub(super) fn begin(
        &self,
        constraint: &Constraint,
        tokenizer: &Tokenizer,
        eos_token_ids: &[u32],
        cancel: &Cancel,
    ) -> Result<GrammarMask> {
        if let Some(kept) = self.kept(constraint) {
            return Ok(kept);
        }
        let factory =
            get_or_make(&self.factory, || catching(|| factory(tokenizer, eos_token_ids)).map(Arc::new));
        let factory = factory.as_ref().map_err(|reason| Error::unsupported("tokenizer", reason))?;
        let (factory, wanted) = (Arc::clone(factory), constraint.clone());
        let compile = move || catching(|| compile(&factory, &wanted));
        let limits = Limits { time: MAX_COMPILE_TIME, stack_bytes: STACK_BYTES };
        let compiled = background::run_within(constraint.name(), limits, cancel, compile)?;
        let mask = compiled.map_err(|reason| Error::argument(constraint.name(), reason))?;
        let mut kept = self.kept.lock();
        if kept.len() >= MAX_KEPT {
            kept.pop_front();
        }
        kept.push_back((constraint.clone(), mask.clone()));
        Ok(mask)
    }

    fn kept(&self, constraint: &Constraint) -> Option<GrammarMask> {
        let mut kept = self.kept.lock();
        let at = kept.iter().position(|(one, _)| one == constraint)?;
        let found = kept.remove(at)?;
        let mask = found.1.clone();
        if !mask.is_broken() {
            kept.push_back(found);
            return Some(mask);
        }
        None
    }
}

/// Prepares the tokenizer's tokens for all constraints. Takes some 100 ms.
fn factory(tokenizer: &Tokenizer, eos_token_ids: &[u32]) -> std::result::Result<ParserFactory, String> {
    let tokens = token_trie::build(tokenizer, eos_token_ids)?;
    // The engine takes one token at a time and takes none back.
    let capabilities = InferenceCapabilities {
        ff_tokens: false,
        conditional_ff_tokens: false,
        backtrack: false,
        fork: false,
    };
    let slices = SlicedBiasComputer::json_slices();
    let mut factory =
        ParserFactory::new(&tokens, capabilities, &slices).map_err(|error| error.to_string())?;
    factory.quiet();
    let limits = ParserLimits {
        max_lexer_states: MAX_LEXER_STATES,
        initial_lexer_fuel: INITIAL_LEXER_FUEL,
        step_lexer_fuel: STEP_LEXER_FUEL,
        verbose_errors: false,
        // It takes seconds and much memory for hostile expressions.
        precompute_large_lexemes: false,
        ..ParserLimits::default()
    };
    *factory.limits_mut() = limits;
    Ok(factory)
}

fn compile(factory: &ParserFactory, constraint: &Constraint) -> std::result::Result<GrammarMask, String> {
    let grammar = match constraint {
        Constraint::JsonSchema(text) => TopLevelGrammar::from_json_schema(json_schema::read(text)?),
        Constraint::Regex(regex) => TopLevelGrammar::from_regex(regex),
        Constraint::Grammar(lark) => TopLevelGrammar::from_lark(json_schema::prepare_in_lark(lark)?),
        Constraint::Choice(texts) => TopLevelGrammar::from_lark(one_of(texts)),
    };
    let matcher = Matcher::new(factory.create_parser(grammar));
    if let Some(reason) = matcher.get_error() {
        return Err(reason);
    }
    GrammarMask::new(matcher, factory.tok_env().eos_token())
}

/// A grammar of some texts. Lark writes strings as JSON does, but refuses the last control character.
fn one_of(texts: &[String]) -> String {
    let quoted =
        |text: &String| serde_json::Value::from(text.as_str()).to_string().replace('\u{7f}', r"\u007f");
    let texts: Vec<String> = texts.iter().map(quoted).collect();
    format!("start: TEXT\nTEXT: {}\n", texts.join(" | "))
}

/// Runs code of llguidance, and turns its errors and panics into messages.
fn catching<T>(run: impl FnOnce() -> std::result::Result<T, String>) -> std::result::Result<T, String> {
    let message = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error,
        Err(payload) => panics::describe(payload.as_ref()),
    };
    Err(shortened(&message))
}

/// Messages of llguidance may quote the whole constraint, or a trace of its calls.
fn shortened(message: &str) -> String {
    if message.starts_with("oneOf constraints are not supported") {
        return "oneOf is not supported, unless its alternatives are seen to exclude each other: by types, \
                by constants, or by a property with another constant in each"
            .into();
    }
    if message.contains("missing special token prefix") {
        return "special tokens are not supported in grammars".into();
    }
    let message = message.split("<backtrace>").next().unwrap_or_default().replace("<non-verbose/>", "");
    let end = message.char_indices().nth(500).map_or(message.len(), |(end, _)| end);
    let dots = if end < message.len() { "..." } else { "" };
    format!("{}{dots}", message[..end].trim_end())
}
