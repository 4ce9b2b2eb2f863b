//! Compiles a template and runs it, in transformers' environment and within a budget.

use std::fmt::Write as _;
use std::sync::Arc;

use minijinja::machinery::{eval, make_string_output};
use minijinja::{AutoEscape, Environment, Output, State, UndefinedBehavior};
use serde_json::Value;

use super::budget::{Budget, MAX_BYTES};
use super::{calls, operators, program, python};
use crate::error::{Error, Result};

/// Instructions that a template may run: a hundred times what a conversation of a thousand messages takes.
const MAX_INSTRUCTIONS: u64 = 20_000_000;
/// The parser and the compiler recurse, within the bounds of [`program::prepare`], and so do macros.
const STACK_BYTES: usize = 64 << 20;
/// Longest message of an error: a template may put all it has into one.
const MAX_REASON_CHARS: usize = 2000;

/// Renders `template` on a stack of its own, as the caller's may be small.
pub(super) fn render(template: &str, context: &Value) -> Result<String> {
    let thread = std::thread::Builder::new().name("chat-template".into()).stack_size(STACK_BYTES);
    std::thread::scope(|scope| {
        let run = thread.spawn_scoped(scope, || run(template, context).map_err(|error| failed(&error)));
        let run = run.map_err(|error| Error::Text {
            reason: format!("chat template: no thread to run on: {error}"),
        })?;
        run.join().unwrap_or_else(|panic| {
            Err(Error::Internal { reason: crate::tokenizer::panic_message(panic.as_ref()) })
        })
    })
}

fn run(template: &str, context: &Value) -> std::result::Result<String, minijinja::Error> {
    let source = program::prepare(template)?;
    let program = program::compile(&source)?;
    let environment = environment();
    let mut text = String::new();
    let mut output = make_string_output(&mut text);
    let context = to_template_value(context);
    eval(&environment, &program.main, context, &program.blocks, &mut output, AutoEscape::None)?;
    if text.len() > MAX_BYTES {
        let reason = format!("the prompt has {} bytes, the most is {MAX_BYTES}", text.len());
        return Err(operators::invalid(reason));
    }
    Ok(text)
}

/// JSON as templates see it; objects keep the order of their keys.
fn to_template_value(value: &Value) -> minijinja::Value {
    match value {
        Value::Null => minijinja::Value::from(()),
        Value::Bool(flag) => minijinja::Value::from(*flag),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => minijinja::Value::from(number),
            (_, Some(number), _) => minijinja::Value::from(number),
            (_, _, number) => minijinja::Value::from(number.unwrap_or(f64::NAN)),
        },
        Value::String(text) => minijinja::Value::from(text),
        Value::Array(items) => items.iter().map(to_template_value).collect(),
        Value::Object(map) => {
            minijinja::Value::from_pairs(map.iter().map(|(key, item)| (key, to_template_value(item))))
        }
    }
}

fn environment() -> Environment<'static> {
    let budget = Arc::new(Budget::default());
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    operators::add_to(&mut environment, &budget);
    calls::add_to(&mut environment, &budget);
    environment.add_function("strftime_now", python::strftime_now);
    let shared = Arc::clone(&budget);
    environment.add_function("raise_exception", move |message: &minijinja::Value| {
        Err::<String, _>(operators::invalid(python::str(&shared, message)?))
    });
    environment.set_formatter(
        move |output: &mut Output<'_>, state: &mut State<'_, '_>, value: &minijinja::Value| {
            let escapes = *state.auto_escape() == AutoEscape::Html && !value.is_safe();
            match value.as_str() {
                _ if escapes => {
                    let text = python::escape(&python::str(&budget, value)?);
                    budget.written(text.len())?;
                    output.write_str(&text)?;
                }
                Some(text) => {
                    budget.written(text.len())?;
                    output.write_str(text)?;
                }
                None => {
                    let text = python::str(&budget, value)?;
                    budget.written(text.len())?;
                    output.write_str(&text)?;
                }
            }
            Ok(())
        },
    );
    environment
}

/// What failed, and in which line.
fn failed(error: &minijinja::Error) -> Error {
    // The innermost error says what happened, those around it where macros and blocks were called.
    let mut innermost = error;
    while let Some(source) =
        std::error::Error::source(innermost).and_then(|source| source.downcast_ref::<minijinja::Error>())
    {
        innermost = source;
    }
    let mut reason = "chat template".to_owned();
    if let Some(line) = innermost.line().or(error.line()) {
        let _ = write!(reason, ", line {line}");
    }
    let detail = innermost.detail().map_or_else(|| innermost.kind().to_string(), str::to_owned);
    let _ = write!(reason, ": {detail}");
    if let Some((cut, _)) = reason.char_indices().nth(MAX_REASON_CHARS) {
        reason.truncate(cut);
        reason.push('…');
    }
    Error::Text { reason }
}
