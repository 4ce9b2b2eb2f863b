//! What templates expect of Python: its `str` and `repr`, and its clock.

use std::fmt::Write as _;

use minijinja::value::ValueKind;
use minijinja::{Error, Value};

use super::attributes::Method;
use super::budget::{Budget, MAX_NESTING};
use super::characters::is_printable;
use super::classes::Class;
use super::cycles::Cycler;
use super::generators::is_generator;
use super::macros::is_macro;
use super::namespace::Namespace;
use super::operators::invalid;
use super::range::Range;
use super::sequences::Group;
use super::views::View;

/// Longest format of a time: what it writes is at most some tens of times as long.
const MAX_TIME_FORMAT: usize = 1000;

/// The number in `value` if it is a float and not an integer.
pub(super) fn float(value: &Value) -> Option<f64> {
    if value.kind() == ValueKind::Number && !value.is_integer() {
        f64::try_from(value.clone()).ok()
    } else {
        None
    }
}

/// Python's name of a value's type.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "undefined",
        ValueKind::None => "NoneType",
        ValueKind::Bool => "bool",
        ValueKind::Number if value.is_integer() => "int",
        ValueKind::Number => "float",
        ValueKind::String => "str",
        ValueKind::Map => "dict",
        _ if is_tuple(value) => "tuple",
        _ if value.downcast_object_ref::<Range>().is_some() => "range",
        ValueKind::Seq => "list",
        ValueKind::Iterable => value.downcast_object_ref::<View>().map_or("generator", View::type_name),
        _ if value.downcast_object_ref::<Method>().is_some() => "builtin_function_or_method",
        _ => "object",
    }
}

/// A tuple, or a group of `groupby`, which is one with names.
pub(super) fn is_tuple(value: &Value) -> bool {
    value.is_tuple() || value.downcast_object_ref::<Group>().is_some()
}

/// What can be called. Undefined is asked for an attribute that tells so, and seems to have it.
pub(super) fn is_callable(value: &Value) -> bool {
    let is_data =
        value.downcast_object_ref::<Namespace>().is_some() || value.downcast_object_ref::<Cycler>().is_some();
    value.is_undefined() || (value.kind() == ValueKind::Plain && !is_data)
}

/// Refuses what Python does not iterate over; minijinja takes None for an empty list.
pub(super) fn check_iterable(value: &Value) -> Result<(), Error> {
    if value.is_none() || value.try_iter().is_err() {
        return Err(invalid(format!("a value of type {} is not iterable", type_name(value))));
    }
    Ok(())
}

/// Python's `str(value)`.
pub(super) fn str(budget: &Budget, value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => {
            budget.work(text.len() as u64)?;
            Ok(text.to_owned())
        }
        None if value.is_undefined() => Ok(String::new()),
        None => repr(budget, value),
    }
}

/// Python's `repr(value)`.
pub(super) fn repr(budget: &Budget, value: &Value) -> Result<String, Error> {
    // The walk bounds the depth too.
    let length = budget.walk(value)?;
    budget.string(length)?;
    budget.work(16 * length as u64)?;
    let mut text = String::new();
    write_repr(&mut Writing { budget, around: vec![] }, &mut text, value)?;
    budget.string(text.len())?;
    Ok(text)
}

/// What is being written: the budget, and the namespaces around the value, from the outside in.
struct Writing<'b> {
    budget: &'b Budget,
    around: Vec<usize>,
}

fn write_repr(writing: &mut Writing<'_>, text: &mut String, value: &Value) -> Result<(), Error> {
    if let Some(namespace) = value.downcast_object_ref::<Namespace>() {
        return write_namespace(writing, text, namespace);
    }
    let view = value.downcast_object_ref::<View>().map(View::type_name);
    if let Some(name) = view {
        text.extend([name, "("]);
    }
    let (open, close) = match value.kind() {
        ValueKind::String if value.is_safe() => {
            text.push_str("Markup(");
            write_quoted(text, value.as_str().unwrap_or_default());
            text.push(')');
            return Ok(());
        }
        ValueKind::String => {
            write_quoted(text, value.as_str().unwrap_or_default());
            return Ok(());
        }
        ValueKind::Map => ("{", "}"),
        _ if is_generator(value) => return Err(address(value)),
        ValueKind::Iterable if value.downcast_object_ref::<Range>().is_none() => ("[", "]"),
        ValueKind::Seq if !is_tuple(value) => ("[", "]"),
        ValueKind::Seq if value.len() == Some(1) => ("(", ",)"),
        ValueKind::Seq => ("(", ")"),
        _ => {
            if let Some(range) = value.downcast_object_ref::<Range>() {
                text.push_str(&range.repr());
                return Ok(());
            }
            match float(value) {
                Some(number) => text.push_str(&float_repr(number)),
                None if value.is_undefined() => text.push_str("Undefined"),
                None if let Some(class) = value.downcast_object_ref::<Class>() => {
                    text.push_str(&class.repr())
                }
                None if value.kind() == ValueKind::Plain && !is_macro(value) => return Err(address(value)),
                None => text.push_str(&value.to_string()),
            }
            return Ok(());
        }
    };
    text.push_str(open);
    for (index, item) in value.try_iter()?.enumerate() {
        if index > 0 {
            text.push_str(", ");
        }
        write_repr(writing, text, &item)?;
        if value.kind() == ValueKind::Map {
            text.push_str(": ");
            write_repr(writing, text, &value.get_item(&item)?)?;
        }
    }
    text.push_str(close);
    if view.is_some() {
        text.push(')');
    }
    Ok(())
}

/// A prompt that Jinja would write an address of its memory into is a mistake in the template.
fn address(value: &Value) -> Error {
    invalid(match type_name(value) {
        "generator" => {
            "a generator is written as its address in memory; the filter list makes a list of it".into()
        }
        "builtin_function_or_method" => {
            "a method is written as its address in memory; it is not called".to_owned()
        }
        name => format!("a value of type {name} is written as its address in memory"),
    })
}

/// A namespace may be in itself, where its attributes are left out.
fn write_namespace(writing: &mut Writing<'_>, text: &mut String, namespace: &Namespace) -> Result<(), Error> {
    if writing.around.contains(&namespace.index()) {
        text.push_str("<Namespace {...}>");
        return Ok(());
    }
    if writing.around.len() > MAX_NESTING {
        return Err(invalid(format!("namespaces nested deeper than {MAX_NESTING} levels")));
    }
    writing.around.push(namespace.index());
    text.push_str("<Namespace {");
    for (index, (name, value)) in namespace.entries().iter().enumerate() {
        if index > 0 {
            text.push_str(", ");
        }
        let length = writing.budget.walk(name)?.saturating_add(writing.budget.walk(value)?);
        writing.budget.room(text.len().saturating_add(length))?;
        writing.budget.work(16 * length as u64)?;
        write_repr(writing, text, name)?;
        text.push_str(": ");
        write_repr(writing, text, value)?;
    }
    text.push_str("}>");
    writing.around.pop();
    Ok(())
}

/// Python's `ascii`: a `repr` with escapes for all characters beyond ASCII.
pub(super) fn ascii(repr: &str) -> String {
    let mut text = String::with_capacity(repr.len());
    for c in repr.chars() {
        if c.is_ascii() { text.push(c) } else { write_escape(&mut text, c) }
    }
    text
}

fn write_escape(text: &mut String, c: char) {
    let code = u32::from(c);
    let _ = match code {
        0..=0xff => write!(text, "\\x{code:02x}"),
        0x100..=0xffff => write!(text, "\\u{code:04x}"),
        _ => write!(text, "\\U{code:08x}"),
    };
}

/// Python's `repr` of a string.
pub(super) fn quoted(string: &str) -> String {
    let mut text = String::new();
    write_quoted(&mut text, string);
    text
}

fn write_quoted(text: &mut String, string: &str) {
    let quote = if string.contains('\'') && !string.contains('"') { '"' } else { '\'' };
    text.push(quote);
    for c in string.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            c if c == quote => text.extend(['\\', c]),
            c if is_printable(c) => text.push(c),
            c => write_escape(text, c),
        }
    }
    text.push(quote);
}

/// markupsafe's `escape`.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&#39;"),
            '"' => escaped.push_str("&#34;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Python's `repr` of a float: the shortest digits that read back as the same number, with an exponent
/// below 1e-4 and from 1e16 on.
pub(super) fn float_repr(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number == 0.0 || (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `strftime_now(format)`: the local time, as Python's `datetime.now().strftime(format)`.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    strftime(format, &jiff::Zoned::now())
}

fn strftime(format: &str, time: &jiff::Zoned) -> Result<String, Error> {
    if format.len() > MAX_TIME_FORMAT {
        return Err(invalid(format!("strftime_now: the format is longer than {MAX_TIME_FORMAT} bytes")));
    }
    let broken_down = jiff::fmt::strtime::BrokenDownTime::from(time);
    let mut text = String::new();
    let mut rest = format;
    while let Some((before, after)) = rest.split_once('%') {
        text.push_str(before);
        let letter = after.trim_start_matches(['-', '_', '0', '^', '#']);
        let length = letter.chars().next().map_or(0, char::len_utf8);
        let directive = after.get(..after.len() - letter.len() + length).unwrap_or_default();
        rest = letter.get(length..).unwrap_or_default();
        let known = letter.starts_with(|c| "YymdHIMSpAaBbhjekluwnFTDRtCUWVGgs".contains(c));
        let directive = match directive {
            // Microseconds, which `%f` means to Python alone.
            "f" => {
                let _ = write!(text, "{:06}", time.subsec_nanosecond() / 1000);
                continue;
            }
            // As the C locale writes them; and Python's `now()` knows no time zone.
            "c" => "%a %b %e %H:%M:%S %Y",
            "x" => "%m/%d/%y",
            "X" => "%H:%M:%S",
            "%" => "%%",
            "z" | "Z" => "",
            _ if known => &format!("%{directive}"),
            _ => return Err(invalid(format!("strftime_now: the directive %{directive} is not supported"))),
        };
        broken_down
            .format(directive, &mut text)
            .map_err(|error| invalid(format!("strftime_now: {error}")))?;
    }
    text.push_str(rest);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (123_456.789, "123456.789"),
            (f64::INFINITY, "inf"),
        ];
        for (number, expected) in cases {
            assert_eq!(float_repr(number), expected);
        }
    }

    #[test]
    fn values_are_written_as_python_writes_them() {
        let budget = Budget::default();
        let list = Value::from(vec![Value::from("it's"), Value::from("\"'\u{1}é\u{200b}"), Value::from(())]);
        assert_eq!(str(&budget, &list).unwrap(), r#"["it's", '"\'\x01é\u200b', None]"#);
        let map = Value::from_pairs([("a", Value::from(1.0)), ("b", Value::from(true))]);
        assert_eq!(str(&budget, &map).unwrap(), "{'a': 1.0, 'b': True}");
        assert_eq!(str(&budget, &Value::from((1,))).unwrap(), "(1,)");
        assert_eq!(str(&budget, &Value::UNDEFINED).unwrap(), "");
    }

    #[test]
    fn the_time_is_formatted_as_python_formats_it() {
        let time = jiff::civil::date(2024, 7, 6).at(8, 9, 5, 0).to_zoned(jiff::tz::TimeZone::UTC).unwrap();
        let cases = [
            ("%d %b %Y", "06 Jul 2024"),
            ("%Y-%m-%d %H:%M:%S", "2024-07-06 08:09:05"),
            ("%A, %B %-d, %Y %j %%", "Saturday, July 6, 2024 188 %"),
            ("%I:%M %p|%y|%e|%F %T|%f", "08:09 AM|24| 6|2024-07-06 08:09:05|000000"),
            ("%c|%x|%X|%Z", "Sat Jul  6 08:09:05 2024|07/06/24|08:09:05|"),
            ("no directive", "no directive"),
        ];
        for (format, expected) in cases {
            assert_eq!(strftime(format, &time).unwrap(), expected, "{format}");
        }
        for refused in ["%Q", "%", "%é", &"x".repeat(2000)] {
            assert!(strftime(refused, &time).is_err(), "{refused}");
        }
    }
}
