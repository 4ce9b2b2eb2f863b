//! Python's `format % arguments`: minijinja's formatting of single values, under Python's rules about which
//! values those are.

use minijinja::formatting::{FormatStyle, format as format_values};
use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, Value};

use super::budget::{Budget, MAX_BYTES};
use super::operators::invalid;
use super::python;
use super::range::Range;

/// Largest width or precision.
pub(super) const MAX_WIDTH: usize = 10_000;

/// `model % arguments`, where `format` is the text of `model`: a safe one escapes what it is given.
pub(super) fn format_like(
    budget: &Budget,
    model: &Value,
    format: &str,
    arguments: &Value,
) -> Result<Value, Error> {
    if !model.is_safe() {
        return self::format(budget, format, arguments).map(Value::from);
    }
    let escaped = |value: &Value| -> Result<Value, Error> {
        match value.kind() {
            ValueKind::Number | ValueKind::Bool => Ok(value.clone()),
            _ if value.is_safe() => Ok(value.clone()),
            _ => Ok(Value::from(python::escape(&python::str(budget, value)?))),
        }
    };
    let may_be_left = is_mapping(arguments);
    let arguments = if python::is_tuple(arguments) {
        let items = arguments.try_iter()?.map(|item| escaped(&item));
        Value::from(Tuple::from(items.collect::<Result<Vec<_>, Error>>()?))
    } else if arguments.kind() == ValueKind::Map {
        let entries =
            arguments.try_iter()?.map(|key| Ok((key.clone(), escaped(&arguments.get_item(&key)?)?)));
        Value::from_pairs(entries.collect::<Result<Vec<_>, Error>>()?)
    } else {
        escaped(arguments)?
    };
    format_all(budget, format, &arguments, may_be_left).map(Value::from_safe_string)
}

/// `format % arguments`
pub(super) fn format(budget: &Budget, format: &str, arguments: &Value) -> Result<String, Error> {
    format_all(budget, format, arguments, is_mapping(arguments))
}

/// Python takes whatever has items for a mapping here, which need not be used up, but for strings and tuples.
fn is_mapping(arguments: &Value) -> bool {
    let has_items = matches!(arguments.kind(), ValueKind::Map | ValueKind::Seq | ValueKind::Undefined)
        || arguments.downcast_object_ref::<Range>().is_some();
    has_items && !python::is_tuple(arguments)
}

fn format_all(budget: &Budget, format: &str, arguments: &Value, may_be_left: bool) -> Result<String, Error> {
    let given: Vec<Value> =
        if python::is_tuple(arguments) { arguments.try_iter()?.collect() } else { vec![arguments.clone()] };
    let mut given = given.into_iter();
    let mut result = String::new();
    let mut rest = format;
    while let Some((text, after)) = rest.split_once('%') {
        result.push_str(text);
        let mut keyed = None;
        let mut after = after;
        if let Some((key, behind)) = after.strip_prefix('(').and_then(|after| after.split_once(')')) {
            if arguments.kind() != ValueKind::Map {
                return Err(invalid("%: a key needs a dict on the right"));
            }
            let value = arguments.get_item(&Value::from(key))?;
            if value.is_undefined() {
                return Err(invalid(format!("%: there is no key {key:?}")));
            }
            (keyed, after) = (Some(value), behind);
        }
        let flags = after.trim_start_matches(['-', '+', ' ', '#', '0', '.', '*']);
        let kind = after.trim_start_matches(|c: char| c.is_ascii_digit() || "-+ #.*".contains(c));
        let kind = kind.trim_start_matches(['h', 'l', 'L']);
        let Some(conversion) = kind.chars().next() else { return Err(invalid("%: incomplete format")) };
        let spec = after.get(..after.len() - kind.len()).unwrap_or_default();
        rest = kind.get(conversion.len_utf8()..).unwrap_or_default();
        if spec.contains('*') || flags.is_empty() {
            return Err(invalid("%: a width of * is not supported"));
        }
        let is_wide = |number: &str| number.parse::<usize>().unwrap_or(MAX_WIDTH + 1) > MAX_WIDTH;
        if spec.split(|c: char| !c.is_ascii_digit()).any(|number| !number.is_empty() && is_wide(number)) {
            return Err(invalid(format!("%: a width beyond {MAX_WIDTH} is not supported")));
        }
        if conversion == '%' {
            result.push('%');
            continue;
        }
        let Some(value) = keyed.or_else(|| given.next()) else {
            return Err(invalid("%: not enough arguments for the format"));
        };
        let (conversion, value) = match conversion {
            's' => ('s', Value::from(python::str(budget, &value)?)),
            'r' => ('s', Value::from(python::repr(budget, &value)?)),
            'i' | 'u' => ('d', value),
            _ => (conversion, value),
        };
        let text = if spec.is_empty() && conversion == 's' {
            value.as_str().unwrap_or_default().to_owned()
        } else {
            format_values(FormatStyle::Printf, &format!("%{spec}{conversion}"), &[value])?
        };
        budget.string(text.len())?;
        result.push_str(&text);
        if result.len() > MAX_BYTES {
            return Err(invalid(format!("%: the result is longer than {MAX_BYTES} bytes")));
        }
    }
    result.push_str(rest);
    if given.next().is_some() && !may_be_left {
        return Err(invalid("%: not all arguments were used by the format"));
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(items: Vec<Value>) -> Value {
        Value::from(Tuple::from(items))
    }

    #[test]
    fn formats_as_python_does() {
        let map = Value::from_pairs([("name", "x"), ("other", "y")]);
        let cases = [
            ("%s and %r", tuple(vec!["a'b".into(), "c\n".into()]), "a'b and 'c\\n'"),
            ("%d|%5d|%-5d|%05d|%+i", tuple((0..5).map(Value::from).collect()), "0|    1|2    |00003|+4"),
            (
                "%.2f %5.1f %e %g",
                tuple([1.005, 2.25, 1500.0, 0.0001].map(Value::from).to_vec()),
                "1.00   2.2 1.500000e+03 0.0001",
            ),
            ("%x %X %o %c%%", tuple(vec![255.into(), 255.into(), 8.into(), "é".into()]), "ff FF 10 é%"),
            ("%(name)s-%(name)4s", map, "x-   x"),
            ("%s", Value::from(vec![Value::from(1), Value::from(())]), "[1, None]"),
        ];
        for (text, arguments, expected) in cases {
            assert_eq!(format(&Budget::default(), text, &arguments).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn refuses_what_python_refuses() {
        let cases = [
            ("%s %s", Value::from("a")),
            ("none", Value::from("a")),
            ("%d", Value::from("a")),
            ("%(name)s", Value::from("a")),
            ("%", Value::from("a")),
            ("%9999999999d", Value::from(1)),
        ];
        for (text, arguments) in cases {
            assert!(format(&Budget::default(), text, &arguments).is_err(), "{text}");
        }
    }
}
