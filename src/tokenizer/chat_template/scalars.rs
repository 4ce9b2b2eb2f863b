//! Jinja's filters of numbers and strings.

use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{Error, Value};

use super::arguments::{self, bind, needed};
use super::budget::Budget;
use super::characters::{self, is_space};
use super::generators::is_generator;
use super::operators::{from_integer, integer, invalid, number};
use super::sequences::Filter;
use super::text::{self, like};
use super::{pretty, printf, python, web, wrapping};

type Outcome = Result<Value, Error>;

pub(super) const FILTERS: [(&str, Filter); 26] = [
    ("abs", absolute),
    ("capitalize", |budget, given| on_text(budget, "capitalize", given, characters::capitalize)),
    ("center", center),
    ("e", escape),
    ("escape", escape),
    ("filesizeformat", web::file_size),
    ("float", float),
    ("forceescape", |budget, given| {
        let [value] = bind("forceescape", [""], given)?;
        Ok(Value::from_safe_string(python::escape(&python::str(budget, &value)?)))
    }),
    ("format", format),
    ("indent", indent),
    ("int", int),
    ("lower", |budget, given| on_text(budget, "lower", given, str::to_lowercase)),
    ("pprint", pretty::pretty_print),
    ("replace", replace),
    ("round", round),
    ("string", |budget, given| on_text(budget, "string", given, str::to_owned)),
    ("striptags", web::strip_tags),
    ("title", |budget, given| {
        let [value] = bind("title", [""], given)?;
        Ok(Value::from(title(&soft(budget, &value)?)))
    }),
    ("trim", trim),
    ("truncate", truncate),
    ("upper", |budget, given| on_text(budget, "upper", given, str::to_uppercase)),
    ("urlencode", web::url_encode),
    ("wordcount", |budget, given| {
        let [value] = bind("wordcount", [""], given)?;
        let text = soft(budget, &value)?;
        budget.work(64 * text.len() as u64)?;
        let is_part = |c: char| c == '_' || characters::is_alphabetic(c) || characters::is_numeric(c);
        Ok(Value::from(text.split(|c: char| !is_part(c)).filter(|word| !word.is_empty()).count()))
    }),
    ("wordwrap", wrapping::word_wrap),
    ("count", length),
    ("length", length),
];

fn length(budget: &Budget, given: &[Value]) -> Outcome {
    let [value] = bind("length", [""], given)?;
    budget.glance(&value)?;
    match (value.as_str(), value.len()) {
        _ if value.is_undefined() => Ok(Value::from(0)),
        (Some(text), _) => Ok(Value::from(text.chars().count())),
        (None, Some(length)) if !is_generator(&value) => Ok(Value::from(length)),
        _ => Err(invalid(format!("a value of type {} has no length", python::type_name(&value)))),
    }
}

/// Any value as a string, counted as something that is looked at character by character.
fn soft(budget: &Budget, value: &Value) -> Result<String, Error> {
    let text = python::str(budget, value)?;
    budget.characters(&text)?;
    Ok(text)
}

fn on_text(budget: &Budget, name: &str, given: &[Value], change: fn(&str) -> String) -> Outcome {
    let [value] = bind(name, [""], given)?;
    Ok(like(&value, change(&soft(budget, &value)?)))
}

fn escape(budget: &Budget, given: &[Value]) -> Outcome {
    let [value] = bind("escape", [""], given)?;
    if value.is_safe() {
        return Ok(value);
    }
    Ok(Value::from_safe_string(python::escape(&soft(budget, &value)?)))
}

fn trim(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, set] = bind("trim", ["", "chars"], given)?;
    let text = soft(budget, &value)?;
    budget.glance(&set)?;
    Ok(like(&value, text::strip("trim", &text, &set, (true, true))?.to_owned()))
}

/// Words begin after white space and opening brackets, and the rest of a word is in lower case.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let separates = |c: char| is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
    for piece in text.split_inclusive(separates) {
        let word = piece.trim_end_matches(separates);
        let mut characters = word.chars();
        titled.extend(characters.next().into_iter().flat_map(char::to_uppercase));
        titled.push_str(&characters.as_str().to_lowercase());
        titled.push_str(piece.get(word.len()..).unwrap_or_default());
    }
    titled
}

fn center(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, width] = bind("center", ["", "width"], given)?;
    let text = soft(budget, &value)?;
    let width = arguments::length("center", &width, 80)?;
    Ok(like(&value, text::pad(budget, &text, "center", width, " ")?))
}

fn replace(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, old, new, count] = bind("replace", ["", "old", "new", "count"], given)?;
    let text = python::str(budget, &value)?;
    let old = python::str(budget, needed("replace", &old)?)?;
    let new = python::str(budget, needed("replace", &new)?)?;
    let count = if count.is_none() { -1 } else { arguments::int("replace", &count, -1)? };
    text::replace(budget, &text, &old, &new, count).map(Value::from)
}

fn indent(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, width, first, blank] = bind("indent", ["", "width", "first", "blank"], given)?;
    let text = arguments::text("indent", &value)?;
    let width = match width.as_str() {
        Some(width) => width.to_owned(),
        None => {
            let width = arguments::length("indent", &width, 4)?;
            budget.string(width)?;
            " ".repeat(width)
        }
    };
    budget.characters(text)?;
    // The last line may be empty, which it is not to Python's idea of lines.
    let text = format!("{text}\n");
    let lines = text::lines(&text, false);
    budget.list(lines.len())?;
    budget.room(text.len().saturating_add(lines.len().saturating_mul(width.len())))?;
    let mut indented = String::new();
    for (index, line) in lines.into_iter().enumerate() {
        if index > 0 {
            indented.push('\n');
        }
        let is_blank = line.is_empty() && !arguments::flag(&blank);
        if if index == 0 { arguments::flag(&first) } else { !is_blank } {
            indented.push_str(&width);
        }
        indented.push_str(line);
    }
    Ok(like(&value, indented))
}

fn truncate(budget: &Budget, given: &[Value]) -> Outcome {
    let names = ["", "length", "killwords", "end", "leeway"];
    let [value, length, kill_words, end, leeway] = bind("truncate", names, given)?;
    let length = arguments::length("truncate", &length, 255)?;
    let leeway = if leeway.is_none() { 5 } else { arguments::int("truncate", &leeway, 5)? };
    let leeway = usize::try_from(leeway).map_err(|_| invalid("truncate: the leeway is negative"))?;
    let end = if end.is_undefined() { "..." } else { arguments::text("truncate", &end)? };
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(invalid("truncate: the length is less than that of the end"));
    };
    // What is short enough may be of any type that has a length.
    if self::length(budget, std::slice::from_ref(&value))?.as_usize() <= Some(length.saturating_add(leeway)) {
        return Ok(value.clone());
    }
    let text = arguments::text("truncate", &value)?;
    budget.characters(text)?;
    let cut = text.char_indices().nth(kept).map_or(text.len(), |(at, _)| at);
    let part = text.get(..cut).unwrap_or_default();
    let part = match part.rsplit_once(' ') {
        Some((words, _)) if !arguments::flag(&kill_words) => words,
        _ => part,
    };
    Ok(like(&value, part.to_owned() + &text::fitting(&value, &Value::UNDEFINED, end)))
}

/// `value % arguments`, with a dict for arguments that have names.
fn format(budget: &Budget, given: &[Value]) -> Outcome {
    let Some((value, given)) = given.split_first() else { return Err(invalid("format needs a value")) };
    let format = python::str(budget, value)?;
    let named = given.last().filter(|last| !last.is_undefined());
    let named = named.and_then(|last| Kwargs::try_from(last.clone()).ok());
    let arguments = match named {
        Some(_) if given.len() > 1 => return Err(invalid("format takes places or names, not both")),
        Some(named) => {
            let entries = named.args().map(|name| Ok((name.to_owned(), named.peek::<Value>(name)?)));
            Value::from_pairs(entries.collect::<Result<Vec<_>, Error>>()?)
        }
        None => Value::from(Tuple::from(given.to_vec())),
    };
    printf::format(budget, &format, &arguments).map(Value::from)
}

fn absolute(_: &Budget, given: &[Value]) -> Outcome {
    let [value] = bind("abs", [""], given)?;
    match (integer(&value), python::float(&value)) {
        (Some(number), _) => from_integer(number.checked_abs()),
        (_, Some(number)) => Ok(Value::from(number.abs())),
        _ => Err(invalid(format!("a value of type {} has no absolute value", python::type_name(&value)))),
    }
}

/// Without the underscores that Python allows between digits.
fn without_underscores(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let is_digit = |at: Option<usize>| {
        at.and_then(|at| bytes.get(at)).is_some_and(|byte: &u8| byte.is_ascii_alphanumeric())
    };
    let are_between = bytes
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'_')
        .all(|(index, _)| is_digit(index.checked_sub(1)) && is_digit(Some(index + 1)));
    are_between.then(|| text.replace('_', ""))
}

/// Python's `int(text, base)`; `None` if it is no number.
fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = without_underscores(text.trim_matches(is_space))?;
    let (sign, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) => (text.get(..1).unwrap_or_default(), digits),
        None => ("", text.as_str()),
    };
    let prefixed = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find_map(|(prefix, radix)| {
        let start = digits.get(..2)?.to_ascii_lowercase();
        (start == prefix && (base == radix || base == 0)).then_some((digits.get(2..)?, radix))
    });
    let (digits, base) = prefixed.unwrap_or((digits, if base == 0 { 10 } else { base }));
    if !digits.bytes().all(|byte| byte.is_ascii_alphanumeric()) || !(2..=36).contains(&base) {
        return None;
    }
    i128::from_str_radix(&format!("{sign}{digits}"), base).ok()
}

pub(super) fn parse_float(text: &str) -> Option<f64> {
    without_underscores(text.trim_matches(is_space))?.parse().ok()
}

fn int(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, default, base] = bind("int", ["", "default", "base"], given)?;
    let default = if default.is_undefined() { Value::from(0) } else { default };
    let from_float = |number: f64| number.is_finite().then_some(number.trunc() as i128);
    if let Some(text) = value.as_str() {
        budget.characters(text)?;
        let base = u32::try_from(arguments::int("int", &base, 10)?).unwrap_or(1);
        let number = parse_int(text, base).or_else(|| parse_float(text).and_then(from_float));
        return number.map_or(Ok(default), |number| from_integer(Some(number)));
    }
    match (integer(&value), python::float(&value)) {
        (Some(number), _) => from_integer(Some(number)),
        (_, Some(number)) if number.is_infinite() => Err(invalid("int: infinity is no integer")),
        (_, Some(number)) => from_float(number).map_or(Ok(default), |number| from_integer(Some(number))),
        _ if value.is_undefined() => Err(invalid("int: the value is undefined")),
        _ => Ok(default),
    }
}

fn float(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, default] = bind("float", ["", "default"], given)?;
    let default = if default.is_undefined() { Value::from(0.0) } else { default };
    if let Some(text) = value.as_str() {
        budget.characters(text)?;
        return Ok(parse_float(text).map_or(default, Value::from));
    }
    match number(&value) {
        Some(number) => Ok(Value::from(number.float())),
        None if value.is_undefined() => Err(invalid("float: the value is undefined")),
        None => Ok(default),
    }
}

fn round(_: &Budget, given: &[Value]) -> Outcome {
    let [value, precision, method] = bind("round", ["", "precision", "method"], given)?;
    let precision = arguments::int("round", &precision, 0)?.clamp(-400, 400) as i32;
    let Some(given) = number(&value) else {
        return Err(invalid(format!("a value of type {} cannot be rounded", python::type_name(&value))));
    };
    let scale = 10f64.powi(precision);
    match method.as_str() {
        Some("ceil") => return Ok(Value::from((given.float() * scale).ceil() / scale)),
        Some("floor") => return Ok(Value::from((given.float() * scale).floor() / scale)),
        Some("common") => {}
        None if method.is_undefined() => {}
        _ => return Err(invalid("round: the method must be 'common', 'ceil' or 'floor'")),
    }
    if value.kind() == ValueKind::Bool || value.is_integer() {
        let number = integer(&value).unwrap_or(0);
        let Some(unit) = u32::try_from(-precision).ok().filter(|zeros| *zeros > 0) else {
            return from_integer(Some(number));
        };
        let Some(unit) = 10i128.checked_pow(unit) else { return Ok(Value::from(0)) };
        // Half way goes to the even one.
        let (below, rest) = (number.div_euclid(unit), number.rem_euclid(unit));
        let twice = rest.saturating_mul(2);
        let is_up = twice > unit || (twice == unit && below % 2 != 0);
        return from_integer(
            below.checked_add(i128::from(is_up)).and_then(|rounded| rounded.checked_mul(unit)),
        );
    }
    let number = given.float();
    let rounded = match usize::try_from(precision) {
        _ if !number.is_finite() => number,
        // The decimal digits decide, as they do in Python.
        Ok(digits) => format!("{number:.digits$}").parse().unwrap_or(number),
        Err(_) => (number * scale).round_ties_even() / scale,
    };
    Ok(Value::from(rounded))
}
