//! minijinja's filters, tests, methods and functions, with a check of what they are given: that it is what
//! Python would take, and that what they make of it stays within the budget.

use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, StringInput, ValueKind};
use minijinja::{Environment, Error, State, Value, filters, functions, tests};
use minijinja_contrib::pycompat;

use super::budget::{Budget, MAX_BYTES, MAX_ITEMS};
use super::operators::invalid;
use super::{comparison, json, printf, python};

/// Filters that do not make a list at once.
const GENERATORS: [&str; 9] =
    ["batch", "items", "map", "reject", "rejectattr", "select", "selectattr", "slice", "unique"];

pub(super) fn add_to(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    macro_rules! guarded {
        ($($name:literal => $filter:path),* $(,)?) => {
            $(add_filter(environment, budget, $name, Value::from_function($filter));)*
        };
    }
    guarded! {
        "abs" => filters::abs, "attr" => filters::attr, "batch" => filters::batch,
        "capitalize" => filters::capitalize, "count" => length, "d" => filters::default,
        "default" => filters::default, "dictsort" => filters::dictsort, "e" => filters::escape,
        "escape" => filters::escape, "first" => filters::first, "float" => filters::float,
        "format" => filters::format, "groupby" => filters::groupby, "indent" => filters::indent,
        "int" => filters::int, "items" => filters::items, "join" => filters::join, "last" => filters::last,
        "length" => length, "list" => filters::list, "lower" => filters::lower,
        "map" => filters::map, "max" => filters::max, "min" => filters::min, "pprint" => filters::pprint,
        "reject" => filters::reject, "rejectattr" => filters::rejectattr, "replace" => filters::replace,
        "reverse" => filters::reverse, "round" => filters::round, "safe" => filters::safe,
        "select" => filters::select, "selectattr" => filters::selectattr, "slice" => filters::slice,
        "sort" => filters::sort, "sum" => filters::sum, "title" => filters::title,
        "tojson" => json::tojson, "trim" => trim, "unique" => filters::unique,
        "upper" => filters::upper,
    }
    // What Jinja does not know.
    for name in ["bool", "chain", "lines", "split", "zip"] {
        environment.remove_filter(name);
    }
    for name in ["endingwith", "int", "safe", "startingwith"] {
        environment.remove_test(name);
    }
    let shared = Arc::clone(budget);
    environment.add_filter("string", move |value: &Value| python::str(&shared, value));

    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("iterable", |value: &Value| python::check_iterable(value).is_ok());
    for name in ["eq", "equalto", "=="] {
        let shared = Arc::clone(budget);
        environment.add_test(name, move |a: &Value, b: &Value| comparison::equal(&shared, a, b));
    }
    for name in ["ne", "!="] {
        let shared = Arc::clone(budget);
        environment.add_test(name, move |a: &Value, b: &Value| comparison::not_equal(&shared, a, b));
    }
    let shared = Arc::clone(budget);
    environment.add_test("in", move |item: &Value, container: &Value| {
        comparison::contains(&shared, container, item)
    });
    add_compared(environment, budget);

    environment.remove_global("debug");
    for (name, function) in [
        ("dict", Value::from_function(functions::dict)),
        ("namespace", Value::from_function(functions::namespace)),
    ] {
        let shared = Arc::clone(budget);
        environment.add_function(name, move |state: &mut State, arguments: Rest<Value>, keywords: Kwargs| {
            let arguments = all_arguments(arguments, keywords);
            for argument in &arguments {
                shared.walk(argument)?;
            }
            function.call(state, &arguments)
        });
    }
    let shared = Arc::clone(budget);
    environment.set_unknown_method_callback(move |state, value, method, arguments| {
        check_method(&shared, value, method, arguments)?;
        let result = match more_methods(value, method, arguments) {
            Some(result) => result,
            None => pycompat::unknown_method_callback(state, value, method, arguments)?,
        };
        shared.made(&result)?;
        Ok(result)
    });
}

/// Python's idea of white space is wider than Rust's.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn trim(state: &State, value: &Value, chars: Option<&str>) -> Result<Value, Error> {
    match (value.as_str(), chars) {
        (Some(text), None) if !value.is_safe() => Ok(text.trim_matches(is_space).into()),
        _ => Ok(filters::trim(StringInput::new(state, value)?, chars.map(Into::into))),
    }
}

fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() { Ok(0) } else { filters::length(value) }
}

/// Python's methods that minijinja-contrib has not.
fn more_methods(value: &Value, method: &str, arguments: &[Value]) -> Option<Value> {
    let given = arguments.first().and_then(Value::as_str);
    if method == "copy" && value.kind() == ValueKind::Map && arguments.is_empty() {
        return Some(value.clone());
    }
    let text = value.as_str()?;
    match method {
        "strip" if arguments.is_empty() => return Some(text.trim_matches(is_space).into()),
        "lstrip" if arguments.is_empty() => return Some(text.trim_start_matches(is_space).into()),
        "rstrip" if arguments.is_empty() => return Some(text.trim_end_matches(is_space).into()),
        "split" if arguments.is_empty() => {
            let words = text.split(is_space).filter(|word| !word.is_empty());
            return Some(words.map(Value::from).collect());
        }
        _ => {}
    }
    match (method, given?) {
        ("removeprefix", prefix) => Some(text.strip_prefix(prefix).unwrap_or(text).into()),
        ("removesuffix", suffix) => Some(text.strip_suffix(suffix).unwrap_or(text).into()),
        ("rsplit", separator) if !separator.is_empty() => {
            let times = arguments.get(1).and_then(|times| i64::try_from(times.clone()).ok()).unwrap_or(-1);
            let parts = usize::try_from(times).map_or(usize::MAX, |times| times.saturating_add(1));
            let mut parts: Vec<Value> = text.rsplitn(parts, separator).map(Value::from).collect();
            parts.reverse();
            Some(parts.into())
        }
        ("partition", separator) if !separator.is_empty() => {
            let (before, after) = text.split_once(separator).unwrap_or((text, ""));
            let separator = if before.len() == text.len() { "" } else { separator };
            Some((before, separator, after).into())
        }
        _ => None,
    }
}

/// Tests that compare strings by length or order.
fn add_compared(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    macro_rules! guarded {
        ($($name:literal => $test:path),* $(,)?) => {
            $({
                let (shared, test) = (Arc::clone(budget), Value::from_function($test));
                environment.add_test($name, move |state: &mut State, arguments: Rest<Value>| {
                    for argument in arguments.iter() {
                        shared.walk(argument)?;
                    }
                    test.call(state, &arguments)
                });
            })*
        };
    }
    guarded! {
        "<" => tests::is_lt, "<=" => tests::is_le, ">" => tests::is_gt, ">=" => tests::is_ge,
        "ge" => tests::is_ge, "greaterthan" => tests::is_gt, "gt" => tests::is_gt, "le" => tests::is_le,
        "lessthan" => tests::is_lt, "lower" => tests::is_lower, "lt" => tests::is_lt,
        "sameas" => tests::is_sameas, "upper" => tests::is_upper,
    }
}

fn all_arguments(arguments: Rest<Value>, keywords: Kwargs) -> Vec<Value> {
    let mut arguments = arguments.0;
    if keywords.args().next().is_some() {
        arguments.push(Value::from(keywords));
    }
    arguments
}

fn add_filter(environment: &mut Environment<'_>, budget: &Arc<Budget>, name: &'static str, filter: Value) {
    let budget = Arc::clone(budget);
    environment.add_filter(name, move |state: &mut State, arguments: Rest<Value>, keywords: Kwargs| {
        let arguments = all_arguments(arguments, keywords);
        check_filter(&budget, name, &arguments)?;
        let result = filter.call(state, &arguments)?;
        budget.made(&result)?;
        if GENERATORS.contains(&name) && result.kind() == ValueKind::Seq {
            return Ok(Value::from_object(python::Generator(result.try_iter()?.collect())));
        }
        Ok::<Value, Error>(result)
    });
}

fn check_filter(budget: &Budget, name: &str, arguments: &[Value]) -> Result<(), Error> {
    let Some(value) = arguments.first() else { return Ok(()) };
    let text = value.as_str();
    match name {
        // These look at no more than the value itself.
        "abs" | "attr" | "d" | "default" | "float" | "int" | "round" | "tojson" => return Ok(()),
        "capitalize" | "e" | "escape" | "lower" | "title" | "trim" | "upper" | "safe" => {
            return look(budget, arguments, 4);
        }
        "count" | "length" => return budget.glance(value),
        "replace" => return check_replace(budget, text.unwrap_or_default(), arguments.get(1..)),
        "indent" => {
            let lines = text.map_or(0, |text| text.matches('\n').count() + 1);
            let width = arguments.iter().skip(1).map(largest_number).max().unwrap_or(0);
            return budget.string(lines.saturating_mul(width.max(4)));
        }
        "format" => return check_format(budget, text.unwrap_or_default(), arguments),
        "batch" | "slice"
            if arguments.iter().skip(1).any(|argument| largest_number(argument) > MAX_ITEMS) =>
        {
            return Err(invalid(format!("{name}: more than {MAX_ITEMS} items")));
        }
        _ => {}
    }
    // The others go through the items.
    let takes_none = matches!(name, "map" | "reject" | "rejectattr" | "select" | "selectattr");
    if !(matches!(name, "pprint" | "items") || (takes_none && value.is_none())) {
        python::check_iterable(value)?;
    }
    if text.is_some_and(|text| text.len() > MAX_ITEMS) {
        return Err(invalid(format!("{name}: more than {MAX_ITEMS} characters to go through")));
    }
    match name {
        "first" | "last" => budget.glance(value),
        "list" | "items" | "map" | "reverse" | "batch" | "slice" | "select" | "reject" | "selectattr"
        | "rejectattr" => budget.list(value.len().unwrap_or(0)),
        "join" => {
            let separator = arguments.get(1).map_or(Ok(0), |separator| budget.walk(separator))?;
            let length = budget.walk(value)?;
            budget.string(length.saturating_add(separator.saturating_mul(value.try_iter()?.count())))
        }
        "sum" => {
            // Sums of lists are made one by one.
            let length = budget.walk(value)?;
            budget.list(length.saturating_mul(value.try_iter()?.count()) / 64)
        }
        _ => {
            for argument in arguments {
                budget.walk(argument)?;
            }
            Ok(())
        }
    }
}

/// Counts a look at texts, `times` over.
fn look(budget: &Budget, values: &[Value], times: u64) -> Result<(), Error> {
    for text in values.iter().filter_map(Value::as_str) {
        budget.work(times * text.len() as u64)?;
    }
    Ok(())
}

/// The number that a value is, or the largest among the values of keyword arguments.
fn largest_number(value: &Value) -> usize {
    match value.kind() {
        ValueKind::Number => {
            usize::try_from(i128::try_from(value.clone()).unwrap_or(0).max(0)).unwrap_or(usize::MAX)
        }
        ValueKind::String => value.as_str().map_or(0, str::len),
        ValueKind::Map => {
            let values = value.try_iter().into_iter().flatten();
            values
                .filter_map(|key| value.get_item(&key).ok())
                .map(|item| largest_number(&item))
                .max()
                .unwrap_or(0)
        }
        _ => 0,
    }
}

fn check_replace(budget: &Budget, text: &str, arguments: Option<&[Value]>) -> Result<(), Error> {
    let [old, new, ..] = arguments.unwrap_or_default() else { return Ok(()) };
    let (old, new) = (old.as_str().unwrap_or_default(), new.as_str().unwrap_or_default());
    budget.work(4 * text.len() as u64)?;
    let grown = new.len().saturating_sub(old.len());
    budget.string(text.len().saturating_add(text.matches(old).count().saturating_mul(grown)))
}

/// Each field of a format may write each argument, as wide as it likes.
fn check_format(budget: &Budget, format: &str, arguments: &[Value]) -> Result<(), Error> {
    let mut numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty());
    if numbers.any(|number| number.parse().unwrap_or(usize::MAX) > printf::MAX_WIDTH) {
        return Err(invalid(format!("format: a width beyond {} is not supported", printf::MAX_WIDTH)));
    }
    let mut length = printf::MAX_WIDTH;
    for argument in arguments {
        length = length.saturating_add(budget.walk(argument)?).saturating_add(largest_number(argument));
    }
    let fields = format.matches(['{', '%']).count();
    if fields.saturating_mul(length) > 4 * MAX_BYTES {
        return Err(invalid("format: the result may be too long"));
    }
    Ok(())
}

fn check_method(budget: &Budget, value: &Value, method: &str, arguments: &[Value]) -> Result<(), Error> {
    let Some(text) = value.as_str() else {
        return if method == "count" { budget.walk(value).map(|_| ()) } else { Ok(()) };
    };
    budget.work(4 * text.len() as u64)?;
    look(budget, arguments, 1)?;
    match method {
        "replace" => check_replace(budget, text, Some(arguments)),
        "split" | "rsplit" | "splitlines" => {
            let separator = arguments.first().and_then(Value::as_str).filter(|_| method != "splitlines");
            budget.list(match separator {
                Some("") => return Err(invalid("split: the separator is empty")),
                Some(separator) => text.matches(separator).count() + 1,
                None => {
                    text.split(is_space).filter(|word| !word.is_empty()).count() + text.matches('\n').count()
                }
            })
        }
        "join" => {
            let Some(items) = arguments.first() else { return Ok(()) };
            python::check_iterable(items)?;
            for (index, item) in items.try_iter()?.enumerate() {
                if item.as_str().is_none() {
                    let kind = python::type_name(&item);
                    return Err(invalid(format!("join: item {index} is of type {kind} and no string")));
                }
            }
            let separators = text.len().saturating_mul(items.try_iter()?.count());
            budget.string(budget.walk(items)?.saturating_add(separators))
        }
        "format" => check_format(budget, text, arguments),
        _ => Ok(()),
    }
}
