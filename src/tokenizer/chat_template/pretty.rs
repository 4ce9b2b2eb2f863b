//! The `pprint` filter: values as Python's `pprint.pformat` writes them, in lines of 80 characters.
//!
//! Source: CPython, `Lib/pprint.py`.

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, Value};

use super::arguments::bind;
use super::budget::Budget;
use super::characters::is_space;
use super::{comparison, python, sequences, text};

const WIDTH: usize = 80;

/// `pprint`
pub(super) fn pretty_print(budget: &Budget, given: &[Value]) -> Result<Value, Error> {
    let [value] = bind("pprint", [""], given)?;
    // The walk bounds the depth of what follows.
    budget.walk(&value)?;
    let value = sorted(budget, &value)?;
    let mut writer = Writer { budget, text: String::new() };
    writer.write(&value, 0, 0, 0)?;
    Ok(Value::from(writer.text))
}

/// The same value with the keys of all dicts in order.
fn sorted(budget: &Budget, value: &Value) -> Result<Value, Error> {
    budget.visit()?;
    match value.kind() {
        ValueKind::Map => {
            budget.list(value.len().unwrap_or(0))?;
            let entries = value.try_iter()?.map(|key| {
                let item = sorted(budget, &value.get_item(&key)?)?;
                Ok((key, item))
            });
            let entries = entries.collect::<Result<Vec<_>, Error>>()?;
            // Keys without an order go by their types.
            let less = |a: &Value, b: &Value| match comparison::less(budget, a, b) {
                Ok(is_less) => Ok(is_less.is_true()),
                Err(_) => budget.visit().map(|()| python::type_name(a) < python::type_name(b)),
            };
            Ok(Value::from_pairs(sequences::merge_sort(entries, &less)?))
        }
        ValueKind::Seq if !python::is_tuple(value) || value.is_tuple() => {
            budget.list(value.len().unwrap_or(0))?;
            let items = value.try_iter()?.map(|item| sorted(budget, &item));
            let items = items.collect::<Result<Vec<_>, Error>>()?;
            Ok(if value.is_tuple() { Value::from(Tuple::from(items)) } else { Value::from(items) })
        }
        _ => Ok(value.clone()),
    }
}

struct Writer<'b> {
    budget: &'b Budget,
    text: String,
}

impl Writer<'_> {
    fn push(&mut self, part: &str) -> Result<(), Error> {
        self.budget.string(part.len())?;
        self.text.push_str(part);
        self.budget.room(self.text.len())
    }

    fn new_line(&mut self, indent: usize) -> Result<(), Error> {
        self.push("\n")?;
        self.push(&" ".repeat(indent))
    }

    /// Writes `value`, which begins `indent` characters from the left and is followed by `after` more.
    fn write(&mut self, value: &Value, indent: usize, after: usize, depth: usize) -> Result<(), Error> {
        let written = python::repr(self.budget, value)?;
        if written.chars().count() <= WIDTH.saturating_sub(indent + after) {
            return self.push(&written);
        }
        match value.kind() {
            ValueKind::Map => {
                self.push("{")?;
                let count = value.len().unwrap_or(0);
                for (index, key) in value.try_iter()?.enumerate() {
                    if index > 0 {
                        self.push(",")?;
                        self.new_line(indent + 1)?;
                    }
                    let written = python::repr(self.budget, &key)? + ": ";
                    self.push(&written)?;
                    let indent = indent + 1 + written.chars().count();
                    let after = if index + 1 == count { after + 1 } else { 1 };
                    self.write(&value.get_item(&key)?, indent, after, depth + 1)?;
                }
                self.push("}")
            }
            ValueKind::Seq if value.is_tuple() || !python::is_tuple(value) => {
                let count = value.len().unwrap_or(0);
                let (open, close) = match value.is_tuple() {
                    true if count == 1 => ("(", ",)"),
                    true => ("(", ")"),
                    false => ("[", "]"),
                };
                self.push(open)?;
                for (index, item) in value.try_iter()?.enumerate() {
                    if index > 0 {
                        self.push(",")?;
                        self.new_line(indent + 1)?;
                    }
                    let after = if index + 1 == count { after + close.len() } else { 1 };
                    self.write(&item, indent + 1, after, depth + 1)?;
                }
                self.push(close)
            }
            ValueKind::String if !value.is_safe() => {
                self.string(value.as_str().unwrap_or_default(), &written, (indent, after), depth == 0)
            }
            _ => self.push(&written),
        }
    }

    /// A long string as several, line by line and word by word.
    fn string(
        &mut self,
        string: &str,
        whole: &str,
        (indent, after): (usize, usize),
        is_alone: bool,
    ) -> Result<(), Error> {
        self.budget.characters(string)?;
        let (indent, after) = if is_alone { (indent + 1, after + 1) } else { (indent, after) };
        // Wider than a line, nothing fits.
        let room = |taken: usize| WIDTH.checked_sub(taken);
        let fits =
            |written: &str, room: Option<usize>| room.is_some_and(|room| written.chars().count() <= room);
        let lines = text::lines(string, true);
        self.budget.list(lines.len())?;
        let mut pieces: Vec<String> = Vec::new();
        let count = lines.len();
        for (index, line) in lines.into_iter().enumerate() {
            let is_last = index + 1 == count;
            let written = python::quoted(line);
            if fits(&written, room(if is_last { indent + after } else { indent })) {
                pieces.push(written);
                continue;
            }
            let words = words(line);
            self.budget.list(words.len())?;
            let (mut start, mut end) = (0, 0);
            for (place, word) in words.iter().enumerate() {
                let is_last = is_last && place + 1 == words.len();
                let candidate = python::quoted(line.get(start..*word).unwrap_or_default());
                self.budget.work(2 * candidate.len() as u64)?;
                if !fits(&candidate, room(if is_last { indent + after } else { indent })) {
                    if start < end {
                        pieces.push(python::quoted(line.get(start..end).unwrap_or_default()));
                    }
                    start = end;
                }
                end = *word;
            }
            if start < end {
                pieces.push(python::quoted(line.get(start..end).unwrap_or_default()));
            }
        }
        if pieces.len() == 1 {
            return self.push(whole);
        }
        if is_alone {
            self.push("(")?;
        }
        for (index, piece) in pieces.iter().enumerate() {
            if index > 0 {
                self.new_line(indent)?;
            }
            self.push(piece)?;
        }
        if is_alone { self.push(")") } else { Ok(()) }
    }
}

/// Where words end, each with the white space behind it.
fn words(line: &str) -> Vec<usize> {
    let mut ends = Vec::new();
    let mut after_space = false;
    for (at, c) in line.char_indices() {
        if after_space && !is_space(c) {
            ends.push(at);
        }
        after_space = is_space(c);
    }
    ends.push(line.len());
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pretty(value: Value) -> String {
        pretty_print(&Budget::default(), &[value]).unwrap().as_str().unwrap_or_default().to_owned()
    }

    #[test]
    fn what_fits_in_a_line_is_one() {
        let dict = Value::from_pairs([("b", Value::from(1)), ("a", Value::from("x"))]);
        assert_eq!(pretty(Value::from(vec![dict])), "[{'a': 'x', 'b': 1}]");
    }

    #[test]
    fn longer_values_are_broken() {
        let words = "word ".repeat(10);
        let line = format!("'{words}'");
        assert_eq!(
            pretty(Value::from(vec![Value::from(words.clone()), Value::from(words.clone())])),
            format!("[{line},\n {line}]")
        );
        let twenty = "four ".repeat(20);
        let (first, second) = (format!("'{}'", "four ".repeat(15)), format!("'{}'", "four ".repeat(5)));
        assert_eq!(pretty(Value::from(twenty)), format!("({first}\n {second})"));
    }
}
