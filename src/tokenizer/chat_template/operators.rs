//! Python's operators, as the filters that [`super::program`] puts in their places.

use std::sync::Arc;

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::budget::Budget;
use super::comparison::{equal, greater, greater_or_equal, is_in, is_not_in, less, less_or_equal, not_equal};
use super::generators::is_generator;
use super::range::Range;
use super::{arguments, attributes, macros, namespace, printf, python, text};

type Outcome = Result<Value, Error>;

/// More than a template has names to unpack to.
const MAX_UNPACKED: usize = 1000;

type Operator = fn(&Budget, &Value, &Value) -> Outcome;

/// The operators of two operands. No template can call them: none of these is a name.
const OPERATORS: [(&str, Operator); 25] = [
    ("+", add),
    ("-", |_, a, b| compute(("-", a, b), i128::checked_sub, |a, b| a - b)),
    ("*", multiply),
    ("/", divide),
    ("//", floor_divide),
    ("%", modulo),
    ("**", power),
    ("~", join),
    ("[]", item),
    ("==", equal),
    ("!=", not_equal),
    ("<", less),
    ("<=", less_or_equal),
    (">", greater),
    (">=", greater_or_equal),
    (":in", is_in),
    (":not_in", is_not_in),
    // Followed by another: with the answer goes the operand that the next one compares.
    ("==…", |budget, a, b| followed(equal(budget, a, b), b)),
    ("!=…", |budget, a, b| followed(not_equal(budget, a, b), b)),
    ("<…", |budget, a, b| followed(less(budget, a, b), b)),
    ("<=…", |budget, a, b| followed(less_or_equal(budget, a, b), b)),
    (">…", |budget, a, b| followed(greater(budget, a, b), b)),
    (">=…", |budget, a, b| followed(greater_or_equal(budget, a, b), b)),
    (":in…", |budget, a, b| followed(is_in(budget, a, b), b)),
    (":not_in…", |budget, a, b| followed(is_not_in(budget, a, b), b)),
];

fn followed(holds: Outcome, operand: &Value) -> Outcome {
    holds.map(|holds| Value::from(Tuple::from([holds, operand.clone()])))
}

pub(super) fn add_to(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    for (name, operator) in OPERATORS {
        let budget = Arc::clone(budget);
        environment.add_filter(name, move |a: &Value, b: &Value| operator(&budget, a, b));
    }
    environment.add_filter(":neg", |value: &Value| {
        compute(("-", &Value::from(0), value), i128::checked_sub, |_, number| -number)
    });
    environment.add_filter(":attr", attributes::get);
    environment.add_filter(":key", |value: Value| check_key(&value).map(|()| value));
    environment.add_filter(":keys", |value: Value| check_keys(&value).map(|()| value));
    environment.add_filter(":unpack", |value: Value| match value.as_str() {
        Some(text) if text.chars().nth(MAX_UNPACKED).is_some() => {
            Err(invalid(format!("more than {MAX_UNPACKED} characters to unpack")))
        }
        Some(text) => Ok(text.chars().map(Value::from).collect()),
        None => Ok(value),
    });
    environment.add_filter(":cycle", |_: Value| Err::<Value, _>(invalid("no items for cycling given")));
    environment.add_filter(":template", |name: &Value| {
        Err::<Value, _>(invalid(format!("there is no other template to load: {:.100}", name.to_string())))
    });
    let shared = Arc::clone(budget);
    environment.add_filter("[:]", move |value: &Value, start: &Value, stop: &Value, step: &Value| {
        slice(&shared, value, [start, stop, step])
    });
    let shared = Arc::clone(budget);
    environment.add_filter(":[:]", move |value: &Value, start: &Value, stop: &Value, step: &Value| {
        let is_sliced = value.as_str().is_some() || is_list(value);
        match is_sliced && [start, stop, step].iter().all(|at| at.is_none() || integer(at).is_some()) {
            true => slice(&shared, value, [start, stop, step]),
            false => Ok(Value::UNDEFINED),
        }
    });
    let shared = Arc::clone(budget);
    environment.add_filter(":walk", move |value: Value| shared.walk(&value).map(|_| value));
    let shared = Arc::clone(budget);
    environment.add_filter(":iter", move |value: Value| {
        shared.glance(&value)?;
        python::check_iterable(&value).map(|()| value)
    });
    let shared = Arc::clone(budget);
    environment
        .add_filter(":merge", move |named: &Value, others: &Value| arguments::merge(&shared, named, others));
    let shared = Arc::clone(budget);
    environment
        .add_filter(":macro", move |body: Value, signature: &Value| macros::new(&shared, body, signature));
    let shared = Arc::clone(budget);
    environment.add_filter(":set", move |value: Value, target: &Value, name: Value| {
        namespace::set(&shared, value, target, name)
    });
}

/// Refuses what Python cannot look up.
pub(super) fn check_key(value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq if python::is_tuple(value) => value.try_iter()?.try_for_each(|item| check_key(&item)),
        ValueKind::Seq | ValueKind::Map => Err(invalid("a list or a dict cannot be a key of a dict")),
        // Python takes it for itself, whatever it holds.
        _ if is_generator(value) => Err(invalid("a generator as a key of a dict is not supported")),
        _ => Ok(()),
    }
}

/// Refuses a dict in which two keys are one to Python: `true` is 1 and `false` is 0.
pub(super) fn check_keys(dict: &Value) -> Result<(), Error> {
    let has = |wanted: i64| -> Result<bool, Error> {
        Ok(dict.try_iter()?.any(|key| key.kind() == ValueKind::Number && key == Value::from(wanted)))
    };
    for key in dict.try_iter()?.filter(|key| key.kind() == ValueKind::Bool) {
        if has(i64::from(key.is_true()))? {
            return Err(invalid("true and 1, or false and 0, are one key of a dict"));
        }
    }
    Ok(())
}

pub(super) fn invalid(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

pub(super) fn unsupported(operator: &str, a: &Value, b: &Value) -> Error {
    let (a, b) = (python::type_name(a), python::type_name(b));
    invalid(format!("unsupported operand types for {operator}: {a} and {b}"))
}

/// A number; Python's booleans are numbers too.
pub(super) enum Number {
    Int(i128),
    Float(f64),
}

impl Number {
    pub(super) fn float(&self) -> f64 {
        match self {
            Self::Int(number) => *number as f64,
            Self::Float(number) => *number,
        }
    }
}

pub(super) fn number(value: &Value) -> Option<Number> {
    match value.kind() {
        ValueKind::Bool => Some(Number::Int(i128::from(value.is_true()))),
        ValueKind::Number => match python::float(value) {
            Some(number) => Some(Number::Float(number)),
            None => i128::try_from(value.clone()).ok().map(Number::Int),
        },
        _ => None,
    }
}

pub(super) fn integer(value: &Value) -> Option<i128> {
    match number(value) {
        Some(Number::Int(number)) => Some(number),
        _ => None,
    }
}

pub(super) fn from_integer(number: Option<i128>) -> Outcome {
    let number = number.ok_or_else(|| invalid("integers beyond 128 bits are not supported"))?;
    Ok(i64::try_from(number).map_or_else(|_| Value::from(number), Value::from))
}

/// Computes with integers if both are, with floats if one is one.
fn compute(
    (operator, a, b): (&str, &Value, &Value),
    integers: fn(i128, i128) -> Option<i128>,
    floats: fn(f64, f64) -> f64,
) -> Outcome {
    match (number(a), number(b)) {
        (Some(Number::Int(a)), Some(Number::Int(b))) => from_integer(integers(a, b)),
        (Some(a), Some(b)) => Ok(Value::from(floats(a.float(), b.float()))),
        _ => Err(unsupported(operator, a, b)),
    }
}

pub(super) fn is_list(value: &Value) -> bool {
    value.kind() == ValueKind::Seq
}

/// A list or a tuple of `items`, as `model` is one.
fn same_kind(model: &Value, items: Vec<Value>) -> Value {
    if python::is_tuple(model) { Value::from(Tuple::from(items)) } else { Value::from(items) }
}

pub(super) fn add(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    if let (Some(left), Some(right)) = (a.as_str(), b.as_str()) {
        budget.string(left.len().saturating_add(right.len()))?;
        if !a.is_safe() && !b.is_safe() {
            return Ok(Value::from([left, right].concat()));
        }
        // What is added to a string from the filter `safe` is escaped, as markupsafe does it.
        let text = |value: &Value, text: &str| -> Result<String, Error> {
            budget.string(text.len().saturating_mul(5))?;
            Ok(if value.is_safe() { text.to_owned() } else { python::escape(text) })
        };
        return Ok(Value::from_safe_string(text(a, left)? + &text(b, right)?));
    }
    if is_list(a) && is_list(b) && python::is_tuple(a) == python::is_tuple(b) {
        let items = a.len().unwrap_or(0).saturating_add(b.len().unwrap_or(0));
        budget.list(items)?;
        return Ok(same_kind(a, a.try_iter()?.chain(b.try_iter()?).collect()));
    }
    compute(("+", a, b), i128::checked_add, |a, b| a + b)
}

fn multiply(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    let (repeated, count) = if a.as_str().is_some() || is_list(a) { (a, b) } else { (b, a) };
    if repeated.as_str().is_none() && !is_list(repeated) {
        return compute(("*", a, b), i128::checked_mul, |a, b| a * b);
    }
    let Some(count) = integer(count) else { return Err(unsupported("*", a, b)) };
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    if let Some(text) = repeated.as_str() {
        budget.string(text.len().saturating_mul(count))?;
        return Ok(text::like(repeated, text.repeat(if text.is_empty() { 0 } else { count })));
    }
    let items: Vec<Value> = repeated.try_iter()?.collect();
    budget.list(items.len().saturating_mul(count))?;
    let count = if items.is_empty() { 0 } else { count };
    Ok(same_kind(repeated, std::iter::repeat_n(items, count).flatten().collect()))
}

/// A number by one that is not zero.
fn check_divisor(operator: &str, divisor: &Value) -> Result<(), Error> {
    if matches!(number(divisor), Some(Number::Int(0))) || python::float(divisor) == Some(0.0) {
        return Err(invalid(format!("{operator}: division by zero")));
    }
    Ok(())
}

/// `a / b`, a float.
fn divide(_: &Budget, a: &Value, b: &Value) -> Outcome {
    let (Some(dividend), Some(divisor)) = (number(a), number(b)) else {
        return Err(unsupported("/", a, b));
    };
    check_divisor("/", b)?;
    Ok(Value::from(dividend.float() / divisor.float()))
}

/// `a // b`, towards minus infinity.
fn floor_divide(_: &Budget, a: &Value, b: &Value) -> Outcome {
    check_divisor("//", b)?;
    compute(
        ("//", a, b),
        |a, b| {
            let quotient = a.checked_div(b)?;
            let is_exact = quotient.checked_mul(b)? == a;
            if is_exact || (a < 0) == (b < 0) { Some(quotient) } else { quotient.checked_sub(1) }
        },
        |a, b| {
            // As Python rounds: the quotient of what the remainder leaves is whole but for its last bits.
            let quotient = (a - float_remainder(a, b)) / b;
            if quotient == 0.0 { 0f64.copysign(a / b) } else { quotient.round() }
        },
    )
}

/// The remainder has the sign of the divisor.
fn float_remainder(a: f64, b: f64) -> f64 {
    let rest = a % b;
    if rest == 0.0 {
        0f64.copysign(b)
    } else if (rest < 0.0) != (b < 0.0) {
        rest + b
    } else {
        rest
    }
}

fn power(_: &Budget, a: &Value, b: &Value) -> Outcome {
    if let (Some(base), Some(exponent @ 0..)) = (integer(a), integer(b)) {
        // Of numbers below two, any power is small.
        let exponent = if base.unsigned_abs() < 2 { exponent % 2 + 2 } else { exponent };
        return from_integer(u32::try_from(exponent).ok().and_then(|exponent| match (base, b) {
            (_, b) if integer(b) == Some(0) => Some(1),
            _ => base.checked_pow(exponent),
        }));
    }
    let (Some(base), Some(exponent)) = (number(a), number(b)) else { return Err(unsupported("**", a, b)) };
    let (base, exponent) = (base.float(), exponent.float());
    let result = base.powf(exponent);
    let is_too_large = result.is_infinite() && base.is_finite() && exponent.is_finite();
    if is_too_large || (result.is_nan() && !base.is_nan() && !exponent.is_nan()) {
        return Err(invalid(format!("{base} ** {exponent} is not a real number in range")));
    }
    Ok(Value::from(result))
}

pub(super) fn modulo(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    if let Some(format) = a.as_str() {
        return printf::format_like(budget, a, format, b);
    }
    check_divisor("%", b)?;
    compute(
        ("%", a, b),
        |a, b| {
            let rest = a.checked_rem(b).unwrap_or(0);
            Some(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest })
        },
        float_remainder,
    )
}

fn join(budget: &Budget, a: &Value, b: &Value) -> Outcome {
    let (a, b) = (python::str(budget, a)?, python::str(budget, b)?);
    budget.string(a.len().saturating_add(b.len()))?;
    Ok(Value::from([a, b].concat()))
}

/// `value[key]`, undefined if there is none.
pub(super) fn item(budget: &Budget, value: &Value, key: &Value) -> Outcome {
    budget.glance(value)?;
    budget.walk(key)?;
    // Neither generators nor what dicts list can be looked up in, nor is a generator a key of ours.
    if is_generator(key) {
        return Ok(Value::UNDEFINED);
    }
    if value.kind() == ValueKind::Iterable && value.downcast_object_ref::<Range>().is_none() {
        return Ok(Value::UNDEFINED);
    }
    // To Python a boolean is an index; a float is none, and no key of a list.
    let is_list = !matches!(value.kind(), ValueKind::Map | ValueKind::Undefined);
    if is_list && python::float(key).is_some() {
        return Ok(Value::UNDEFINED);
    }
    let found = match (is_list, key.kind()) {
        (true, ValueKind::Bool) => value.get_item(&Value::from(i64::from(key.is_true())))?,
        _ => value.get_item(key)?,
    };
    let found = attributes::unless_found(found, value, key);
    Ok(match found.as_str() {
        Some(text) if value.is_safe() => text::like(value, text.to_owned()),
        _ => found,
    })
}

/// `value[start:stop:step]`
fn slice(budget: &Budget, value: &Value, bounds: [&Value; 3]) -> Outcome {
    let items: Vec<Value> = match value.as_str() {
        Some(text) => {
            budget.work(16 * text.len() as u64)?;
            vec![]
        }
        None if value.downcast_object_ref::<Range>().is_some() => vec![],
        None if is_list(value) => {
            budget.list(value.len().unwrap_or(0))?;
            value.try_iter()?.collect()
        }
        None => {
            return Err(invalid(format!("a value of type {} cannot be sliced", python::type_name(value))));
        }
    };
    let length = value.as_str().map_or(value.len().unwrap_or(0), |text| text.chars().count());
    let length = i128::try_from(length).unwrap_or(i128::MAX);
    let bound = |value: &Value| match integer(value) {
        _ if value.is_none() => Ok(None),
        Some(number) => Ok(Some(number)),
        None => Err(invalid("slice indices must be integers or None")),
    };
    let step = bound(bounds[2])?.unwrap_or(1);
    if step == 0 {
        return Err(invalid("slice step cannot be zero"));
    }
    // The first place and the one before the first, for steps backwards.
    let (lowest, highest) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |bound: Option<i128>, default: i128| match bound {
        None => default,
        Some(at) if at < 0 => at.saturating_add(length).max(lowest),
        Some(at) => at.min(highest),
    };
    let (first, last) = if step > 0 { (lowest, highest) } else { (highest, lowest) };
    let (start, stop) = (clamp(bound(bounds[0])?, first), clamp(bound(bounds[1])?, last));
    if let Some(range) = value.downcast_object_ref::<Range>() {
        let place = |at: i128| i64::try_from(at).unwrap_or(i64::MAX);
        return range.slice(place(start), place(stop), place(step)).map(Value::from_object);
    }
    let distance = if step > 0 { stop - start } else { start - stop };
    let stride = step.unsigned_abs();
    let count = usize::try_from((distance.max(0).unsigned_abs()).div_ceil(stride)).unwrap_or(0);
    let stride = usize::try_from(stride).unwrap_or(usize::MAX);
    // Where the lowest place of the slice is; it is turned round for steps backwards.
    let offset = stride.saturating_mul(count.saturating_sub(1));
    let start = usize::try_from(start.max(0)).unwrap_or(0);
    let from = if step > 0 { start } else { start.saturating_sub(offset) };
    if let Some(text) = value.as_str() {
        let part = text.chars().skip(from).step_by(stride).take(count);
        budget.string(text.len().min(count.saturating_mul(4)))?;
        let part: String =
            if step > 0 { part.collect() } else { part.collect::<Vec<_>>().iter().rev().collect() };
        return Ok(text::like(value, part));
    }
    let mut part: Vec<Value> = items.into_iter().skip(from).step_by(stride).take(count).collect();
    if step < 0 {
        part.reverse();
    }
    Ok(same_kind(value, part))
}
