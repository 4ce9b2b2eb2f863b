//! A model's chat templates by name. What renders them is Python's.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::error::{Error, Result, quoted};

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

    /// As transformers chooses: the caller's (a template, or the name of one), `tool_use` if there are
    /// tools, `default`. The name is that of a template of the model.
    pub(super) fn choose<'a>(
        &'a self,
        given: Option<&'a str>,
        has_tools: bool,
    ) -> Result<(Option<&'a str>, &'a str)> {
        let named = |name| {
            self.templates.get_key_value(name).map(|(name, text)| (Some(name.as_str()), text.as_str()))
        };
        let tool_use = if has_tools { named("tool_use") } else { None };
        let chosen = match given {
            // Text without any of Jinja's marks is a misspelt name, not a template.
            Some(given) => {
                let is_template = ["{{", "{%", "{#"].iter().any(|mark| given.contains(mark));
                named(given).or(is_template.then_some((None, given)))
            }
            None => tool_use.or_else(|| named("default")),
        };
        chosen.ok_or_else(|| {
            let mut reason = match given {
                Some(given) => {
                    format!("chat_template: {} is neither a template nor the name of one", quoted(given))
                }
                None => "this tokenizer has no chat template: pass chat_template=".to_owned(),
            };
            if !self.templates.is_empty() {
                let names: Vec<&str> = self.templates.keys().map(String::as_str).collect();
                let known =
                    if given.is_some() { "; the names are" } else { ", a template or one of the names" };
                let _ = write!(reason, "{known} {}", names.join(", "));
            }
            Error::Text { reason }
        })
    }
}
