//! Python's `str.format` and `str.format_map`, as Jinja's sandbox runs them.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, Value};

use super::arguments::{bind, needed};
use super::budget::Budget;
use super::characters::is_digit;
use super::operators::{self, invalid};
use super::{attributes, format_spec, python, text};

/// Formats in formats: fields of a format, and of what says how to write a field.
const MAX_DEPTH: usize = 2;

/// What the fields of a format name.
struct Arguments {
    places: Vec<Value>,
    names: Value,
}

/// Where a format counts its fields, or that it numbers them itself.
enum Numbering {
    Automatic(usize),
    Manual,
}

/// `model.format(…)` and `model.format_map(mapping)`, where `text` is the text of `model`.
pub(super) fn format(
    budget: &Budget,
    model: &Value,
    text: &str,
    method: &str,
    given: &[Value],
) -> Result<Value, Error> {
    let arguments = if method == "format_map" {
        let [names] = bind(method, [""], given)?;
        Arguments { places: vec![], names: needed(method, &names)?.clone() }
    } else {
        let keywords = given.last().filter(|last| !last.is_undefined());
        let keywords = keywords.and_then(|last| Kwargs::try_from(last.clone()).ok());
        let count = given.len() - usize::from(keywords.is_some());
        budget.list(count)?;
        Arguments {
            places: given.iter().take(count).cloned().collect(),
            names: keywords.map_or_else(|| Value::from_pairs(Vec::<(Value, Value)>::new()), Value::from),
        }
    };
    let mut writer =
        Writer { budget, arguments, escapes: model.is_safe(), numbering: Numbering::Automatic(0) };
    writer.format(text, 0).map(|formatted| text::like(model, formatted))
}

struct Writer<'b> {
    budget: &'b Budget,
    arguments: Arguments,
    /// Whether what is put into the format is escaped.
    escapes: bool,
    numbering: Numbering,
}

/// One field, `{name!conversion:spec}`.
struct Field<'t> {
    name: &'t str,
    conversion: Option<char>,
    spec: &'t str,
}

impl Writer<'_> {
    fn format(&mut self, format: &str, depth: usize) -> Result<String, Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("format: too many formats in one another"));
        }
        self.budget.string(format.len())?;
        let mut written = String::new();
        let mut rest = format;
        while let Some(at) = rest.find(['{', '}']) {
            let (literal, tail) = rest.split_at(at);
            written.push_str(literal);
            if let Some(after) = tail.strip_prefix("{{") {
                written.push('{');
                rest = after;
            } else if let Some(after) = tail.strip_prefix("}}") {
                written.push('}');
                rest = after;
            } else if let Some(after) = tail.strip_prefix('{') {
                let (field, after) = Field::parse(after)?;
                self.budget.visit()?;
                let value = self.value(field.name)?;
                let value = self.converted(value, field.conversion)?;
                let spec = self.format(field.spec, depth + 1)?;
                written.push_str(&self.field(&value, &spec)?);
                self.budget.room(written.len())?;
                rest = after;
            } else {
                return Err(invalid("format: a single '}'"));
            }
        }
        written.push_str(rest);
        self.budget.string(written.len())?;
        Ok(written)
    }

    /// The value that a field's name stands for: an argument, and what is looked up in it.
    fn value(&mut self, name: &str) -> Result<Value, Error> {
        let is_number = |name: &str| !name.is_empty() && name.chars().all(is_digit);
        let counted;
        let mut name = name;
        match &mut self.numbering {
            Numbering::Automatic(next) if name.is_empty() => {
                counted = next.to_string();
                *next += 1;
                name = &counted;
            }
            Numbering::Automatic(0) if is_number(name) => self.numbering = Numbering::Manual,
            Numbering::Manual if name.is_empty() => {
                return Err(invalid("format: fields with numbers and fields without"));
            }
            Numbering::Automatic(_) if is_number(name) => {
                return Err(invalid("format: fields with numbers and fields without"));
            }
            _ => {}
        }
        let (first, mut path) = name.split_at(name.find(['.', '[']).unwrap_or(name.len()));
        let mut value = if is_number(first) {
            let place = first.parse().ok().and_then(|place: usize| self.arguments.places.get(place));
            place.cloned().ok_or_else(|| invalid(format!("format: there is no argument {first}")))?
        } else {
            let names =
                self.arguments.names.as_object().filter(|_| self.arguments.names.kind() == ValueKind::Map);
            let found = names.and_then(|names| names.get_value(&Value::from(first)));
            found.ok_or_else(|| invalid(format!("format: there is no argument {first:?}")))?
        };
        while !path.is_empty() {
            self.budget.visit()?;
            if let Some(after) = path.strip_prefix('.') {
                let (attribute, after) = after.split_at(after.find(['.', '[']).unwrap_or(after.len()));
                if attribute.is_empty() {
                    return Err(invalid("format: an attribute without a name"));
                }
                value = attributes::get(&value, attribute)?;
                path = after;
            } else {
                let after = path.strip_prefix('[').unwrap_or_default();
                let Some((key, after)) = after.split_once(']') else {
                    return Err(invalid("format: a '[' without its ']'"));
                };
                if key.is_empty() || !(after.is_empty() || after.starts_with(['.', '['])) {
                    return Err(invalid("format: '[' and ']' must hold a key, and '.' or '[' follow"));
                }
                let key = match key.parse::<i64>() {
                    Ok(index) if is_number(key) => Value::from(index),
                    _ => Value::from(key),
                };
                value = operators::item(self.budget, &value, &key)?;
                path = after;
            }
        }
        Ok(value)
    }

    fn converted(&self, value: Value, conversion: Option<char>) -> Result<Value, Error> {
        Ok(Value::from(match conversion {
            None => return Ok(value),
            Some('s') => python::str(self.budget, &value)?,
            Some('r') => python::repr(self.budget, &value)?,
            Some('a') => python::ascii(&python::repr(self.budget, &value)?),
            Some(other) => return Err(invalid(format!("format: there is no conversion {other:?}"))),
        }))
    }

    /// A field's value as `spec` says.
    fn field(&self, value: &Value, spec: &str) -> Result<String, Error> {
        let formatted = if spec.is_empty() {
            python::str(self.budget, value)?
        } else if self.escapes && value.is_safe() {
            return Err(invalid("format: a safe string can only be put in as it is"));
        } else {
            format_spec::format(self.budget, value, spec)?
        };
        Ok(if self.escapes && !value.is_safe() { python::escape(&formatted) } else { formatted })
    }
}

impl<'t> Field<'t> {
    /// A field from behind its '{', and what follows its '}'.
    fn parse(text: &'t str) -> Result<(Self, &'t str), Error> {
        let unclosed = || invalid("format: a '{' without its '}'");
        let mut in_brackets = false;
        let mut end = None;
        for (at, c) in text.char_indices() {
            match c {
                '{' => return Err(invalid("format: a '{' in the name of a field")),
                '[' => in_brackets = true,
                ']' => in_brackets = false,
                '}' | ':' | '!' if !in_brackets => {
                    end = Some(at);
                    break;
                }
                _ => {}
            }
        }
        let (name, mut rest) = text.split_at(end.ok_or_else(unclosed)?);
        let mut conversion = None;
        if let Some(after) = rest.strip_prefix('!') {
            let mut characters = after.chars();
            conversion = characters.next();
            rest = characters.as_str();
            if !rest.starts_with([':', '}']) {
                return Err(invalid("format: ':' or '}' must follow a conversion"));
            }
        }
        if let Some(after) = rest.strip_prefix('}') {
            return Ok((Self { name, conversion, spec: "" }, after));
        }
        let rest = rest.strip_prefix(':').unwrap_or_default();
        let mut open = 1;
        for (at, c) in rest.char_indices() {
            match c {
                '{' => open += 1,
                '}' => open -= 1,
                _ => {}
            }
            if open == 0 {
                let (spec, after) = rest.split_at(at);
                return Ok((Self { name, conversion, spec }, after.get(1..).unwrap_or_default()));
            }
        }
        Err(unclosed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formatted(text: &str, value: Value) -> Result<String, Error> {
        format(&Budget::default(), &Value::from(text), text, "format", &[value])
            .map(|value| value.as_str().unwrap_or_default().to_owned())
    }

    #[test]
    fn formats_as_python_does() {
        let cases = [
            ("{{{!r:>6}}}", Value::from("é"), "{   'é'}"),
            ("{!a}", Value::from("é"), "'\\xe9'"),
            ("{0:,}|{0:_x}|{0:=+12}", Value::from(1_234_567), "1,234,567|12_d687|+    1234567"),
            ("{0:012,}|{0:.2f}|{0:%}", Value::from(12), "0,000,000,012|12.00|1200.000000%"),
            ("{0:.1}|{0:.3}|{0:08.1e}", Value::from(1.5), "2e+00|1.5|01.5e+00"),
            ("{0:*^5}|{0:.1}|{0:05}", Value::from("ab"), "*ab**|a|ab000"),
        ];
        for (text, value, expected) in cases {
            assert_eq!(formatted(text, value).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn refuses_what_python_refuses() {
        let cases =
            ["{", "}", "{0", "{!x}", "{!r", "{0[}", "{0.}", "{0}{}", "{1}", "{a}", "{:d}", "{:=5}", "{:5,}"];
        for text in cases {
            assert!(formatted(text, Value::from("a")).is_err(), "{text}");
        }
        for text in ["{:.1d}", "{:,x}", "{:s}", "{:9999999999}", "{:{:{:{}}}}"] {
            assert!(formatted(text, Value::from(1)).is_err(), "{text}");
        }
    }
}
