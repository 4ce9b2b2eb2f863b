//! The `tojson` filter: Python's `json.dumps`, as transformers gives it to templates (no HTML escapes,
//! `ensure_ascii=False`).

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::python;

/// Python gives up at about this depth too.
const MAX_DEPTH: usize = 500;
/// Longest text that the filter writes.
const MAX_BYTES: usize = 32 << 20;

struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
pub(super) fn tojson(value: &Value, positional: Rest<Value>, keywords: Kwargs) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    if positional.len() > names.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => keywords.get::<Option<Value>>(name)?,
        };
        Ok(given.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let indent = argument(1, names[1])?.map(indentation).transpose()?;
    let (mut item_separator, mut key_separator) = (", ".to_owned(), ": ".to_owned());
    if indent.is_some() {
        item_separator = ",".to_owned();
    }
    if let Some(separators) = argument(2, names[2])? {
        let both: Vec<Value> = separators.try_iter()?.take(3).collect();
        match both.as_slice() {
            [item, key] if item.as_str().is_some() && key.as_str().is_some() => {
                item_separator = item.to_string();
                key_separator = key.to_string();
            }
            _ => return Err(invalid("tojson: separators must be two strings")),
        }
    }
    let style = Style {
        ensure_ascii: argument(0, names[0])?.is_some_and(|value| value.is_true()),
        indent,
        item_separator,
        key_separator,
        sort_keys: argument(3, names[3])?.is_some_and(|value| value.is_true()),
    };
    keywords.assert_all_used()?;
    let mut text = String::new();
    write_value(&mut text, value, &style, 0)?;
    Ok(text)
}

fn invalid(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

/// A number of spaces or a string, as `json.dumps` takes it.
fn indentation(value: Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    // Python takes a negative number for no indentation at all.
    let width = i64::try_from(value).map_err(|_| invalid("tojson: indent must be a number or a string"))?;
    match usize::try_from(width.max(0)) {
        Ok(width) if width <= 1000 => Ok(" ".repeat(width)),
        _ => Err(invalid("tojson: indent is too large")),
    }
}

fn write_value(text: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid("tojson: the value is nested too deeply"));
    }
    if text.len() > MAX_BYTES {
        return Err(invalid("tojson: the value is too large"));
    }
    match value.kind() {
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => text.push_str(&number(value)),
        ValueKind::String => write_string(text, value.as_str().unwrap_or_default(), style.ensure_ascii),
        ValueKind::Map => {
            let mut entries = Vec::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                entries.push((key_text(&key)?, item));
            }
            if style.sort_keys {
                entries.sort_by(|a, b| a.0.cmp(&b.0));
            }
            write_container(text, ('{', '}'), entries, style, depth, |text, (key, item)| {
                write_string(text, &key, style.ensure_ascii);
                text.push_str(&style.key_separator);
                write_value(text, &item, style, depth + 1)
            })?;
        }
        ValueKind::Seq => {
            write_container(text, ('[', ']'), value.try_iter()?, style, depth, |text, item| {
                write_value(text, &item, style, depth + 1)
            })?;
        }
        // Ranges, generators and a dict's items too are none to Python.
        other => return Err(invalid(format!("tojson: a value of type {other} is not JSON"))),
    }
    Ok(())
}

fn write_container<T>(
    text: &mut String,
    (open, close): (char, char),
    items: impl IntoIterator<Item = T>,
    style: &Style,
    depth: usize,
    mut write: impl FnMut(&mut String, T) -> Result<(), Error>,
) -> Result<(), Error> {
    let new_line = |text: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            text.push('\n');
            for _ in 0..depth {
                text.push_str(indent);
            }
        }
    };
    text.push(open);
    let mut is_empty = true;
    for item in items {
        if !is_empty {
            text.push_str(&style.item_separator);
        }
        is_empty = false;
        new_line(text, depth + 1);
        write(text, item)?;
    }
    if !is_empty {
        new_line(text, depth);
    }
    text.push(close);
    Ok(())
}

/// A key as Python writes it: scalars become strings.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => Ok(number(key)),
        other => Err(invalid(format!("tojson: a key of type {other} is not JSON"))),
    }
}

fn number(value: &Value) -> String {
    match python::float(value) {
        Some(number) if number.is_nan() => "NaN".into(),
        Some(number) if number.is_infinite() => if number > 0.0 { "Infinity" } else { "-Infinity" }.into(),
        Some(number) => python::float_repr(number),
        None => value.to_string(),
    }
}

fn write_string(text: &mut String, string: &str, ensure_ascii: bool) {
    text.push('"');
    for character in string.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            // Python's escapes stop at U+001F without ensure_ascii and at U+007E with it.
            c if c < ' ' || (ensure_ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(text, "\\u{unit:04x}");
                }
            }
            c => text.push(c),
        }
    }
    text.push('"');
}
