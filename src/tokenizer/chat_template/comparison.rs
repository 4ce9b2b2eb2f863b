//! Python's comparisons: `==`, the orders, and `in`.

use std::cmp::Ordering;

use minijinja::value::ValueKind;
use minijinja::{Error, Value, tests};

use super::budget::{Budget, MAX_NESTING};
use super::generators::is_generator;
use super::operators::{invalid, number, unsupported};
use super::views::View;
use super::{operators, python};

type Outcome = Result<Value, Error>;
/// Which results of a comparison an operator takes for true.
type Holds = fn(Ordering) -> bool;

const LESS: (&str, Holds) = ("<", Ordering::is_lt);
const LESS_OR_EQUAL: (&str, Holds) = ("<=", Ordering::is_le);
const GREATER: (&str, Holds) = (">", Ordering::is_gt);
const GREATER_OR_EQUAL: (&str, Holds) = (">=", Ordering::is_ge);

pub(super) fn equal(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    are_equal(budget, a, b, 0).map(Value::from)
}

pub(super) fn not_equal(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    are_equal(budget, a, b, 0).map(|equal| Value::from(!equal))
}

pub(super) fn less(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    compare(budget, LESS, a, b, 0).map(Value::from)
}

pub(super) fn less_or_equal(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    compare(budget, LESS_OR_EQUAL, a, b, 0).map(Value::from)
}

pub(super) fn greater(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    compare(budget, GREATER, a, b, 0).map(Value::from)
}

pub(super) fn greater_or_equal(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    compare(budget, GREATER_OR_EQUAL, a, b, 0).map(Value::from)
}

pub(super) fn is_in(budget: &Budget, item: &Value, container: &Value) -> Outcome {
    contains(budget, container, item).map(Value::from)
}

pub(super) fn is_not_in(budget: &Budget, item: &Value, container: &Value) -> Outcome {
    contains(budget, container, item).map(|contains| Value::from(!contains))
}

/// Whether two values are the same to Python: numbers by value, lists and tuples item by item, but no list
/// like a tuple.
fn are_equal(budget: &Budget, a: &Value, b: &Value, depth: usize) -> Result<bool, Error> {
    count(budget, a, b, depth)?;
    if number(a).is_some() && number(b).is_some() {
        return Ok(!is_nan(a) && !is_nan(b) && plain(a) == plain(b));
    }
    match (a.kind(), b.kind()) {
        (ValueKind::Seq, ValueKind::Seq) => {
            if python::is_tuple(a) != python::is_tuple(b) || a.len() != b.len() {
                return Ok(false);
            }
            for (a, b) in a.try_iter()?.zip(b.try_iter()?) {
                if !are_equal(budget, &a, &b, depth + 1)? {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        (ValueKind::Map, ValueKind::Map) => {
            if a.len() != b.len() {
                return Ok(false);
            }
            for key in a.try_iter()? {
                let other = b.get_item(&key)?;
                if other.is_undefined() || !are_equal(budget, &a.get_item(&key)?, &other, depth + 1)? {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        (ValueKind::Iterable, ValueKind::Iterable) => {
            if is_generator(a) || is_generator(b) {
                return Ok(tests::is_sameas(a, b));
            }
            if let (Some(a), Some(b)) = (a.downcast_object_ref::<View>(), b.downcast_object_ref::<View>()) {
                return a.equals(budget, b);
            }
            Ok(a == b)
        }
        (ValueKind::Plain, ValueKind::Plain) => Ok(tests::is_sameas(a, b)),
        (a_kind, b_kind) => Ok(a_kind == b_kind && a == b),
    }
}

/// Python's order of numbers, of strings, of lists and of tuples; there is none between any of these and
/// another.
fn compare(
    budget: &Budget,
    (operator, holds): (&str, Holds),
    a: &Value,
    b: &Value,
    depth: usize,
) -> Result<bool, Error> {
    count(budget, a, b, depth)?;
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok(holds(a.cmp(b)));
    }
    if number(a).is_some() && number(b).is_some() {
        return Ok(!is_nan(a) && !is_nan(b) && holds(plain(a).cmp(&plain(b))));
    }
    let are_lists = a.kind() == ValueKind::Seq && b.kind() == ValueKind::Seq;
    if !are_lists || python::is_tuple(a) != python::is_tuple(b) {
        return Err(unsupported(operator, a, b));
    }
    // The first items that differ decide, and must have an order.
    for (a, b) in a.try_iter()?.zip(b.try_iter()?) {
        if !are_equal(budget, &a, &b, depth + 1)? {
            return compare(budget, (operator, holds), &a, &b, depth + 1);
        }
    }
    Ok(holds(a.len().cmp(&b.len())))
}

/// Counts a look at two values: strings of different lengths differ at once.
fn count(budget: &Budget, a: &Value, b: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_NESTING {
        return Err(invalid(format!("values nested deeper than {MAX_NESTING} levels")));
    }
    match (a.as_str(), b.as_str()) {
        (Some(a), Some(b)) => budget.work(a.len().min(b.len()) as u64),
        _ => budget.visit(),
    }
}

/// A boolean as the number that it is to Python.
fn plain(value: &Value) -> Value {
    match value.kind() {
        ValueKind::Bool => Value::from(i64::from(value.is_true())),
        _ => value.clone(),
    }
}

/// Not a number: not even equal to itself.
fn is_nan(value: &Value) -> bool {
    python::float(value).is_some_and(f64::is_nan)
}

pub(super) fn contains(budget: &Budget, container: &Value, item: &Value) -> Result<bool, Error> {
    if let Some(text) = container.as_str() {
        let Some(part) = item.as_str() else { return Err(unsupported("in", item, container)) };
        budget.work(4 * text.len() as u64)?;
        return Ok(text.contains(part));
    }
    match container.kind() {
        ValueKind::Undefined => Ok(false),
        ValueKind::Map => {
            budget.walk(item)?;
            operators::check_key(item)?;
            Ok(!container.get_item(item)?.is_undefined())
        }
        ValueKind::Seq | ValueKind::Iterable => {
            for other in container.try_iter()? {
                if are_equal(budget, &other, item, 0)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        _ => Err(unsupported("in", item, container)),
    }
}
