//! Messages to a prompt, through the model's own Jinja template, as transformers renders it.
//!
//! The environment is transformers': `trim_blocks`, `lstrip_blocks`, loop controls, generation tags, the
//! globals `raise_exception` and `strftime_now`, and a `tojson` that is Python's `json.dumps`.
//! minijinja parses and runs the template. In between, [`compiler`], [`expressions`], [`statements`] and
//! [`definitions`] make the program, with the scopes of Jinja and with [`operators`] and [`comparison`]s of
//! ours. [`macros`], [`namespace`]s, [`cycles`] and [`views`] of dicts are ours too, and so are filters and
//! methods, in [`sequences`], [`selections`], [`scalars`], [`text`], [`web`], [`wrapping`] and [`pretty`], with
//! [`generators`], [`classes`] and [`attributes`]; [`calls`] brings them together with what minijinja has and checks what that
//! is given, and [`budget`] bounds what all of them make and look at. [`json`], [`printf`], [`str_format`], [`format_spec`] and [`python`] write values
//! as Python does.
//!
//! What still differs from Jinja:
//! - An error instead: what Jinja prints as an address (generators, cyclers, joiners, methods, functions); `true` and 1 as two keys of one dict; a generator as a key; complex numbers; integers beyond
//!   128 bits; `lipsum`; the filters `random` and `urlize`; names of characters in `striptags`, but for the most
//!   common; the methods `encode`, `fromkeys`, `translate`, and those of numbers; in `format`, `z`, and `#` with
//!   a float; an attribute of a method; `%*d`; widths above 10,000; `loop` as the name of a variable; operators
//!   of sets with the keys and items of dicts.
//! - Another result: the items of a generator are computed when it is made, so that an error in one that is
//!   never gone through, or is gone through late, comes all the same; what `loop` itself prints as, and that it is
//!   a mapping; attributes of numbers, and of cyclers and joiners, that are not called; a method is not equal to
//!   itself; a slice of a constant that is computed, not written out, where Jinja's own optimizer makes an error
//!   undefined; `repr` and `isalpha` and the like go by this crate's Unicode tables.

mod arguments;
mod attributes;
mod budget;
mod calls;
mod characters;
mod classes;
mod comparison;
mod compiler;
mod cycles;
mod definitions;
mod expressions;
mod format_spec;
mod generators;
mod json;
mod macros;
mod namespace;
mod operators;
mod pretty;
mod printf;
mod program;
mod python;
mod range;
mod render;
mod scalars;
mod selections;
mod sequences;
mod statements;
mod str_format;
mod text;
mod views;
mod web;
mod wrapping;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// What to render beside the messages.
#[derive(Clone, Debug, Default)]
pub struct ChatTemplateOptions {
    /// A template, or the name of one of the model's own; `None` takes the model's default.
    pub chat_template: Option<String>,
    /// JSON schemas of the tools that the model may call. With tools, a model's template named `tool_use`
    /// goes before its default.
    pub tools: Option<Value>,
    /// Whether to end with the start of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Further variables for the template.
    pub variables: Map<String, Value>,
}

/// A model's templates by name.
#[derive(Clone, Debug, Default)]
pub(super) struct ChatTemplates {
    templates: BTreeMap<String, String>,
}

impl ChatTemplates {
    pub(super) fn insert(&mut self, name: &str, template: &str) {
        self.templates.insert(name.to_owned(), template.to_owned());
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.templates.iter().map(|(name, template)| (name.as_str(), template.as_str()))
    }

    pub(super) fn default_template(&self) -> Option<&str> {
        self.templates.get("default").map(String::as_str)
    }

    pub(super) fn apply(
        &self,
        messages: &Value,
        options: &ChatTemplateOptions,
        special_tokens: &Map<String, Value>,
    ) -> Result<String> {
        check_messages(messages)?;
        let template = self.choose(options)?;
        let mut context = Map::new();
        // BOS and EOS are always there, so that a template can join them to other strings.
        context.insert("bos_token".into(), "".into());
        context.insert("eos_token".into(), "".into());
        context.extend(special_tokens.clone());
        context.insert("documents".into(), Value::Null);
        context.extend(options.variables.clone());
        context.insert("messages".into(), with_reasoning(messages));
        context.insert("tools".into(), options.tools.clone().unwrap_or(Value::Null));
        context.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        render::render(template, &Value::Object(context))
    }

    /// As transformers chooses: the caller's (a template, or the name of one), `tool_use` if there are
    /// tools, `default`.
    fn choose<'a>(&'a self, options: &'a ChatTemplateOptions) -> Result<&'a str> {
        if let Some(given) = &options.chat_template {
            return Ok(self.templates.get(given).unwrap_or(given));
        }
        let tool_use = options.tools.as_ref().and_then(|_| self.templates.get("tool_use"));
        tool_use.map(String::as_str).or_else(|| self.default_template()).ok_or_else(|| {
            let mut reason = "this tokenizer has no chat template: pass chat_template=".to_owned();
            if !self.templates.is_empty() {
                let names: Vec<&str> = self.templates.keys().map(String::as_str).collect();
                let _ = write!(reason, ", a template or one of the names {}", names.join(", "));
            }
            Error::Text { reason }
        })
    }
}

/// The messages with their reasoning under each name that templates read: `reasoning_content`, and `thinking`
/// where the message has no such key. The caller may have it under `reasoning`, too.
///
/// Source: transformers, `chat_template_utils.py`, `_alias_reasoning_fields`.
fn with_reasoning(messages: &Value) -> Value {
    let mut messages = messages.clone();
    for message in messages.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        let names = ["reasoning_content", "thinking", "reasoning"];
        let given = names.into_iter().filter_map(|name| message.get(name)).find(|given| !given.is_null());
        let Some(reasoning) = given.cloned() else { continue };
        let mut renamed = Map::new();
        renamed.insert("thinking".into(), reasoning.clone());
        renamed.append(message);
        renamed.insert("reasoning_content".into(), reasoning);
        *message = renamed;
    }
    messages
}

fn check_messages(messages: &Value) -> Result<()> {
    let bad = |reason: String| Err(Error::argument("messages", reason));
    let Some(list) = messages.as_array() else {
        return bad("expected a list of objects with a role".into());
    };
    for (index, message) in list.iter().enumerate() {
        if !message.get("role").is_some_and(Value::is_string) {
            return bad(format!("message {index} is not an object with a role"));
        }
    }
    Ok(())
}
