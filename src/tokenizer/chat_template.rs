//! Messages to a prompt, through the model's own Jinja template, as transformers renders it.
//!
//! The environment is transformers': `trim_blocks`, `lstrip_blocks`, loop controls, generation tags, the
//! globals `raise_exception`, `strftime_now` and `namespace`, and a `tojson` that is Python's `json.dumps`.
//! [`json`] holds that filter, [`python`] what a template expects of Python's strings and numbers.

mod json;
mod python;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Instructions that a template may run: a hundred times what a conversation of a thousand messages takes.
const MAX_INSTRUCTIONS: u64 = 20_000_000;

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
        context.insert("messages".into(), messages.clone());
        context.insert("tools".into(), options.tools.clone().unwrap_or(Value::Null));
        context.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        render(template, &Value::Object(context))
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

fn render(template: &str, context: &Value) -> Result<String> {
    let environment = environment().map_err(|error| failed(&error))?;
    let compiled =
        environment.template_from_named_str("chat_template", template).map_err(|error| failed(&error))?;
    compiled.render(to_template_value(context)).map_err(|error| failed(&error))
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

fn environment() -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    environment.add_filter("tojson", json::tojson);
    environment.add_function(
        "raise_exception",
        |message: String| -> std::result::Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_function("strftime_now", python::strftime_now);
    Ok(environment)
}

fn failed(error: &minijinja::Error) -> Error {
    let mut reason = "chat template".to_owned();
    if let Some(line) = error.line() {
        let _ = write!(reason, ", line {line}");
    }
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let _ = write!(reason, ": {detail}");
    Error::Text { reason }
}
