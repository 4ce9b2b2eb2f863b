//! The arguments of a call, by Python's rules of names and places.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, Value};

use super::budget::Budget;
use super::operators::{integer, invalid};
use super::python;

/// The arguments for the parameters `names`; undefined where none is given.
pub(super) fn bind<const N: usize>(
    callee: &str,
    names: [&str; N],
    given: &[Value],
) -> Result<[Value; N], Error> {
    let keywords = given.last().filter(|last| !last.is_undefined());
    let keywords = keywords.and_then(|last| Kwargs::try_from(last.clone()).ok());
    let count = given.len() - usize::from(keywords.is_some());
    if count > N {
        return Err(invalid(format!("{callee} takes at most {N} arguments, {count} are given")));
    }
    let mut bound = std::array::from_fn(|index| match given.get(index) {
        Some(value) if index < count => value.clone(),
        _ => Value::UNDEFINED,
    });
    for name in keywords.iter().flat_map(Kwargs::args) {
        let place = names.iter().position(|known| *known == name && !name.is_empty());
        match place.and_then(|place| bound.get_mut(place)).filter(|_| place >= Some(count)) {
            Some(slot) => *slot = keywords.as_ref().map_or(Ok(Value::UNDEFINED), |all| all.peek(name))?,
            None => return Err(invalid(format!("{callee} takes no argument {name:?} here"))),
        }
    }
    Ok(bound)
}

/// One set of keyword arguments of those written out and those of a dict, which share no name.
pub(super) fn merge(budget: &Budget, named: &Value, others: &Value) -> Result<Value, Error> {
    if others.kind() != ValueKind::Map {
        return Err(invalid(format!("a {} is no dict of arguments", python::type_name(others))));
    }
    let mut all = Vec::new();
    for (map, is_named) in [(named, true), (others, false)] {
        budget.list(map.len().unwrap_or(0))?;
        for key in map.try_iter()? {
            budget.visit()?;
            let Some(name) = key.as_str() else {
                return Err(invalid("the name of an argument is no string"));
            };
            budget.string(name.len())?;
            if !is_named && named.as_object().is_some_and(|named| named.get_value(&key).is_some()) {
                return Err(invalid(format!("the argument {name:?} is given twice")));
            }
            all.push((name.to_owned(), map.get_item(&key)?));
        }
    }
    Ok(Value::from(Kwargs::from_iter(all)))
}

/// An argument that must be there.
pub(super) fn needed<'v>(callee: &str, value: &'v Value) -> Result<&'v Value, Error> {
    if value.is_undefined() { Err(invalid(format!("{callee} needs another argument"))) } else { Ok(value) }
}

/// An argument that must be a string.
pub(super) fn text<'v>(callee: &str, value: &'v Value) -> Result<&'v str, Error> {
    value.as_str().ok_or_else(|| invalid(format!("{callee} needs a string here")))
}

/// An integer, or `default` where none is given.
pub(super) fn int(callee: &str, value: &Value, default: i64) -> Result<i64, Error> {
    if value.is_undefined() {
        return Ok(default);
    }
    let number = integer(value).ok_or_else(|| invalid(format!("{callee} needs an integer here")))?;
    Ok(i64::try_from(number).unwrap_or(if number < 0 { i64::MIN } else { i64::MAX }))
}

/// A length: an integer, where a negative one counts as none.
pub(super) fn length(callee: &str, value: &Value, default: usize) -> Result<usize, Error> {
    let number = int(callee, value, i64::try_from(default).unwrap_or(i64::MAX))?;
    Ok(usize::try_from(number.max(0)).unwrap_or(usize::MAX))
}

/// Whether a flag is set.
pub(super) fn flag(value: &Value) -> bool {
    value.is_true()
}
