//! Python's methods of strings. Each looks at a string a few times at most, whatever it is asked for.

use std::collections::BTreeSet;

use minijinja::value::Tuple;
use minijinja::{Error, Value};

use super::arguments::{self, bind, needed};
use super::budget::Budget;
use super::characters::{self, is_space};
use super::operators::{integer, invalid};
use super::{python, str_format};

type Outcome = Result<Value, Error>;

/// A string that is as safe as `model`, which is what a method makes of a string from the filter `safe`.
pub(super) fn like(model: &Value, text: String) -> Value {
    if model.is_safe() { Value::from_safe_string(text) } else { Value::from(text) }
}

/// An argument of a method of `model`: a safe string escapes what is put into it.
pub(super) fn fitting(model: &Value, value: &Value, text: &str) -> String {
    if model.is_safe() && !value.is_safe() { python::escape(text) } else { text.to_owned() }
}

/// Calls a method of the string `value`; `None` if it is none of these.
pub(super) fn call(budget: &Budget, value: &Value, method: &str, given: &[Value]) -> Option<Outcome> {
    Some(known(budget, value, value.as_str()?, method, given).transpose()?.and_then(|result| {
        budget.made(&result)?;
        Ok(result)
    }))
}

fn known(
    budget: &Budget,
    value: &Value,
    text: &str,
    method: &str,
    given: &[Value],
) -> Result<Option<Value>, Error> {
    let made = |text: String| Ok(Some(like(value, text)));
    let all = |is: fn(char) -> bool| {
        // Most of these look a character up in tables.
        budget.work(64 * text.len() as u64)?;
        Ok(Some(Value::from(!text.is_empty() && text.chars().all(is))))
    };
    let none = || bind(method, [], given).map(|[]| ());
    match method {
        "upper" => none().and_then(|()| made(text.to_uppercase())),
        "lower" => none().and_then(|()| made(text.to_lowercase())),
        "title" => none().and_then(|()| made(characters::title(text))),
        "capitalize" => none().and_then(|()| made(characters::capitalize(text))),
        "swapcase" => none().and_then(|()| {
            made(text.chars().fold(String::new(), |mut swapped, c| {
                match c.is_uppercase() {
                    true => swapped.extend(c.to_lowercase()),
                    false => swapped.extend(c.to_uppercase()),
                }
                swapped
            }))
        }),
        "casefold" => none().and_then(|()| {
            let mut folded = String::with_capacity(text.len());
            text.chars().for_each(|c| characters::push_folded(&mut folded, c));
            made(folded)
        }),
        "format" | "format_map" => str_format::format(budget, value, text, method, given).map(Some),
        "strip" | "lstrip" | "rstrip" => {
            let [set] = bind(method, [""], given)?;
            let ends = (method != "rstrip", method != "lstrip");
            made(strip(method, text, &set, ends)?.to_owned())
        }
        "split" | "rsplit" => split(budget, value, text, method, given).map(Some),
        "splitlines" => {
            let [keep] = bind(method, ["keepends"], given)?;
            let lines = lines(text, arguments::flag(&keep));
            budget.list(lines.len())?;
            Ok(Some(lines.into_iter().map(|line| like(value, line.to_owned())).collect()))
        }
        "partition" | "rpartition" => {
            let [separator] = bind(method, [""], given)?;
            let separator = arguments::text(method, &separator)?;
            if separator.is_empty() {
                return Err(invalid(format!("{method}: the separator is empty")));
            }
            let (first, second, third) =
                match (method, text.split_once(separator), text.rsplit_once(separator)) {
                    ("partition", Some((before, after)), _) | ("rpartition", _, Some((before, after))) => {
                        (before, separator, after)
                    }
                    ("partition", ..) => (text, "", ""),
                    _ => ("", "", text),
                };
            let parts = [first, second, third].map(|part| like(value, part.to_owned()));
            Ok(Some(Value::from(Tuple::from(parts.to_vec()))))
        }
        "replace" => {
            let [old, new, count] = bind(method, ["", "", "count"], given)?;
            let (old_text, new_text) = (arguments::text(method, &old)?, arguments::text(method, &new)?);
            let new_text = fitting(value, &new, new_text);
            let count = arguments::int(method, &count, -1)?;
            replace(budget, text, &fitting(value, &old, old_text), &new_text, count)
                .map(|replaced| Some(like(value, replaced)))
        }
        "startswith" | "endswith" => {
            let [parts, start, end] = bind(method, ["", "", ""], given)?;
            let part = window(budget, text, &start, &end)?.map_or("", |(part, _)| part);
            let is_past = window(budget, text, &start, &end)?.is_none();
            let is = |wanted: &str| match method {
                "startswith" => part.starts_with(wanted),
                _ => part.ends_with(wanted),
            };
            if let Some(wanted) = parts.as_str() {
                return Ok(Some(Value::from(!is_past && is(wanted))));
            }
            if !parts.is_tuple() {
                return Err(invalid(format!("{method} needs a string or a tuple of strings")));
            }
            let mut found = false;
            for wanted in parts.try_iter()? {
                budget.visit()?;
                found |= !is_past && is(arguments::text(method, &wanted)?);
            }
            Ok(Some(Value::from(found)))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => search(budget, text, method, given).map(Some),
        "join" => {
            let [items] = bind(method, [""], given)?;
            join(budget, value, needed(method, &items)?).map(Some)
        }
        "removeprefix" | "removesuffix" => {
            let [part] = bind(method, [""], given)?;
            let part = arguments::text(method, &part)?;
            let rest = match method {
                "removeprefix" => text.strip_prefix(part),
                _ => text.strip_suffix(part),
            };
            made(rest.unwrap_or(text).to_owned())
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = bind(method, ["", ""], given)?;
            let fill = if fill.is_undefined() { " " } else { arguments::text(method, &fill)? };
            let width = arguments::length(method, needed(method, &width)?, 0)?;
            pad(budget, text, method, width, fill).map(|padded| Some(like(value, padded)))
        }
        "zfill" => {
            let [width] = bind(method, [""], given)?;
            let width = arguments::length(method, needed(method, &width)?, 0)?;
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            let sign = text.get(..text.len() - digits.len()).unwrap_or_default();
            let width = width.saturating_sub(sign.len());
            made(format!("{sign}{}", pad(budget, digits, "rjust", width, "0")?))
        }
        "expandtabs" => {
            let [size] = bind(method, ["tabsize"], given)?;
            expand_tabs(budget, text, arguments::length(method, &size, 8)?)
                .map(|text| Some(like(value, text)))
        }
        "isalnum" => all(|c| characters::is_alphabetic(c) || characters::is_numeric(c)),
        "isalpha" => all(characters::is_alphabetic),
        "isascii" => Ok(Some(Value::from(text.is_ascii()))),
        "isdecimal" => all(characters::is_decimal),
        "isdigit" => all(characters::is_digit),
        "isnumeric" => all(characters::is_numeric),
        "isspace" => all(is_space),
        "isprintable" => Ok(Some(Value::from(text.chars().all(characters::is_printable)))),
        "islower" => Ok(Some(Value::from(characters::is_case(text, char::is_lowercase)))),
        "isupper" => Ok(Some(Value::from(characters::is_case(text, char::is_uppercase)))),
        "istitle" => Ok(Some(Value::from(characters::is_title(text)))),
        "isidentifier" => Ok(Some(Value::from(
            text.chars().next().is_some_and(|c| c == '_' || characters::is_alphabetic(c))
                && text
                    .chars()
                    .all(|c| c == '_' || characters::is_alphabetic(c) || characters::is_decimal(c)),
        ))),
        _ => Ok(None),
    }
}

/// Without the characters of `set` at the ends; without white space if there is no set.
pub(super) fn strip<'t>(
    callee: &str,
    text: &'t str,
    set: &Value,
    (start, end): (bool, bool),
) -> Result<&'t str, Error> {
    // A set, so that many characters cost no more than a few.
    let set: Option<BTreeSet<char>> = match set.is_undefined() || set.is_none() {
        true => None,
        false => Some(arguments::text(callee, set)?.chars().collect()),
    };
    let goes = |c: char| set.as_ref().map_or_else(|| is_space(c), |set| set.contains(&c));
    let text = if start { text.trim_start_matches(goes) } else { text };
    Ok(if end { text.trim_end_matches(goes) } else { text })
}

fn split(budget: &Budget, value: &Value, text: &str, method: &str, given: &[Value]) -> Outcome {
    let [separator, times] = bind(method, ["sep", "maxsplit"], given)?;
    let parts = usize::try_from(arguments::int(method, &times, -1)?);
    let parts = parts.map_or(usize::MAX, |times| times.saturating_add(1));
    let from_end = method == "rsplit";
    let mut found: Vec<&str> = Vec::new();
    if separator.is_undefined() || separator.is_none() {
        let mut rest = text;
        loop {
            rest = if from_end { rest.trim_end_matches(is_space) } else { rest.trim_start_matches(is_space) };
            let cut = match (from_end, found.len() + 1 < parts) {
                (_, false) => None,
                (false, true) => rest.split_once(is_space),
                (true, true) => rest.rsplit_once(is_space).map(|(before, last)| (last, before)),
            };
            match cut {
                Some((word, others)) => {
                    found.push(word);
                    rest = others;
                }
                None => break,
            }
        }
        if !rest.is_empty() {
            found.push(rest);
        }
    } else {
        let separator = arguments::text(method, &separator)?;
        match (from_end, separator.is_empty()) {
            (_, true) => return Err(invalid(format!("{method}: the separator is empty"))),
            (true, _) => found.extend(text.rsplitn(parts, separator)),
            (false, _) => found.extend(text.splitn(parts, separator)),
        }
    }
    if from_end {
        found.reverse();
    }
    budget.list(found.len())?;
    Ok(found.into_iter().map(|part| like(value, part.to_owned())).collect())
}

/// Python's lines, with or without what ends them.
pub(super) fn lines(text: &str, keep: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, end)) = rest.char_indices().find(|(_, c)| characters::ends_line(*c)) {
        let after = rest.get(at..).unwrap_or_default();
        let length = if after.starts_with("\r\n") { 2 } else { end.len_utf8() };
        lines.push(rest.get(..if keep { at + length } else { at }).unwrap_or_default());
        rest = rest.get(at + length..).unwrap_or_default();
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// `count` times at most, if that is not negative.
pub(super) fn replace(
    budget: &Budget,
    text: &str,
    old: &str,
    new: &str,
    count: i64,
) -> Result<String, Error> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    budget.characters(text)?;
    let times = text.matches(old).take(count).count();
    budget.matches(times)?;
    let grown = new.len().saturating_sub(old.len());
    budget.room(text.len().saturating_add(times.saturating_mul(grown)))?;
    Ok(text.replacen(old, new, times))
}

/// The part of a string that `start` and `end` name, and where it begins; `None` if it begins behind the end.
fn window<'t>(
    budget: &Budget,
    text: &'t str,
    start: &Value,
    end: &Value,
) -> Result<Option<(&'t str, usize)>, Error> {
    let is_given = |value: &Value| !value.is_undefined() && !value.is_none();
    if !is_given(start) && !is_given(end) {
        return Ok(Some((text, 0)));
    }
    budget.characters(text)?;
    let length = i128::try_from(text.chars().count()).unwrap_or(i128::MAX);
    let place = |value: &Value, default: i128| -> Result<i128, Error> {
        if !is_given(value) {
            return Ok(default);
        }
        let at = integer(value).ok_or_else(|| invalid("slice indices must be integers or None"))?;
        Ok(if at < 0 { at.saturating_add(length).max(0) } else { at })
    };
    let (start, end) = (place(start, 0)?, place(end, length)?.min(length));
    if start > length || start > end {
        return Ok(None);
    }
    let offset = |at: i128| {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        text.char_indices().nth(at).map_or(text.len(), |(offset, _)| offset)
    };
    let part = text.get(offset(start)..offset(end)).unwrap_or_default();
    Ok(Some((part, usize::try_from(start).unwrap_or(0))))
}

fn search(budget: &Budget, text: &str, method: &str, given: &[Value]) -> Outcome {
    let [part, start, end] = bind(method, ["", "", ""], given)?;
    let part = arguments::text(method, &part)?;
    let Some((text, first)) = window(budget, text, &start, &end)? else {
        return match method {
            "count" => Ok(Value::from(0)),
            "index" | "rindex" => Err(invalid(format!("{method}: not found"))),
            _ => Ok(Value::from(-1)),
        };
    };
    let found = match method {
        "count" => {
            let count = text.matches(part).count();
            budget.matches(count)?;
            return Ok(Value::from(count));
        }
        "find" | "index" => text.find(part),
        _ => text.rfind(part),
    };
    match found {
        Some(at) => Ok(Value::from(first + text.get(..at).unwrap_or_default().chars().count())),
        None if method.ends_with("index") => Err(invalid(format!("{method}: not found"))),
        None => Ok(Value::from(-1)),
    }
}

fn join(budget: &Budget, value: &Value, items: &Value) -> Outcome {
    python::check_iterable(items)?;
    let separator = value.as_str().unwrap_or_default();
    let mut joined = String::new();
    for (index, item) in items.try_iter()?.enumerate() {
        budget.visit()?;
        let Some(text) = item.as_str() else {
            let kind = python::type_name(&item);
            return Err(invalid(format!("join: item {index} is of type {kind} and no string")));
        };
        if index > 0 {
            joined.push_str(separator);
        }
        joined.push_str(&fitting(value, &item, text));
        budget.room(joined.len())?;
    }
    Ok(like(value, joined))
}

/// `width` characters at least, with `fill` where `method` puts it.
pub(super) fn pad(
    budget: &Budget,
    text: &str,
    method: &str,
    width: usize,
    fill: &str,
) -> Result<String, Error> {
    let mut characters = fill.chars();
    let (Some(_), None) = (characters.next(), characters.next()) else {
        return Err(invalid(format!("{method}: the fill must be one character")));
    };
    let missing = width.saturating_sub(text.chars().count());
    budget.room(text.len().saturating_add(missing.saturating_mul(fill.len())))?;
    let left = match method {
        "rjust" => missing,
        // As Python rounds.
        "center" => missing / 2 + (missing & width & 1),
        _ => 0,
    };
    Ok([&fill.repeat(left), text, &fill.repeat(missing - left)].concat())
}

fn expand_tabs(budget: &Budget, text: &str, size: usize) -> Result<String, Error> {
    let tabs = text.matches('\t').count();
    budget.room(text.len().saturating_add(tabs.saturating_mul(size)))?;
    let mut expanded = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' => {
                let spaces = if size == 0 { 0 } else { size - column % size };
                expanded.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            c => {
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
                expanded.push(c);
            }
        }
    }
    Ok(expanded)
}
