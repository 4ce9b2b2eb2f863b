//! Jinja's filters of lists, by Python's rules of order and equality.

use std::collections::HashSet;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, Tuple, ValueKind};
use minijinja::{Error, Value};

use super::arguments::{self, bind, needed};
use super::budget::{Budget, MAX_ITEMS};
use super::generators::{self, is_generator};
use super::namespace::Namespace;
use super::operators::{self, integer, invalid};
use super::{attributes, comparison, python};

type Outcome = Result<Value, Error>;
/// A filter: its arguments begin with the value that it is applied to.
pub(super) type Filter = fn(&Budget, &[Value]) -> Outcome;

pub(super) const FILTERS: [(&str, Filter); 15] = [
    ("batch", batch),
    ("dictsort", dict_sort),
    ("first", first),
    ("groupby", group_by),
    ("items", pairs),
    ("join", join),
    ("last", last),
    ("list", |budget, given| bind("list", [""], given).and_then(|[value]| Ok(items(budget, &value)?.into()))),
    ("max", |budget, given| extreme(budget, "max", given, comparison::greater)),
    ("min", |budget, given| extreme(budget, "min", given, comparison::less)),
    ("reverse", reverse),
    ("slice", slice),
    ("sort", sort),
    ("sum", sum),
    ("unique", unique),
];

/// The items of a value, counted.
pub(super) fn items(budget: &Budget, value: &Value) -> Result<Vec<Value>, Error> {
    python::check_iterable(value)?;
    let length = match value.as_str() {
        Some(text) => text.chars().take(MAX_ITEMS + 1).count(),
        None => value.len().unwrap_or(0),
    };
    budget.list(length)?;
    let mut items = Vec::with_capacity(length.min(MAX_ITEMS));
    for item in value.try_iter()? {
        budget.visit()?;
        items.push(item);
    }
    Ok(items)
}

/// The attribute that a filter is to look at, `a.b.0`; nothing for the value itself.
pub(super) struct Attribute {
    parts: Vec<Value>,
    default: Value,
}

impl Attribute {
    pub(super) fn new(attribute: &Value) -> Self {
        let parts = match attribute.as_str() {
            _ if attribute.is_undefined() || attribute.is_none() => vec![],
            None => vec![attribute.clone()],
            Some(path) => path.split('.').map(Self::part).collect(),
        };
        Self { parts, default: Value::UNDEFINED }
    }

    fn part(name: &str) -> Value {
        let is_number = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
        name.parse::<i64>().ok().filter(|_| is_number).map_or_else(|| Value::from(name), Value::from)
    }

    pub(super) fn of(&self, budget: &Budget, item: &Value) -> Outcome {
        let mut value = item.clone();
        for part in &self.parts {
            budget.visit()?;
            budget.glance(part)?;
            value = attributes::unless_found(value.get_item(part)?, &value, part);
            if value.is_undefined() && !self.default.is_undefined() && !self.default.is_none() {
                value = self.default.clone();
            }
        }
        Ok(value)
    }
}

/// A string in lower case, unless its case counts.
fn folded(budget: &Budget, value: Value, is_case_sensitive: bool) -> Outcome {
    match value.as_str() {
        Some(text) if !is_case_sensitive => {
            budget.string(text.len())?;
            Ok(Value::from(text.to_lowercase()))
        }
        _ => Ok(value),
    }
}

/// Sorts by the first of each pair; what is equal stays in order.
fn sort_pairs(
    budget: &Budget,
    mut pairs: Vec<(Value, Value)>,
    is_reversed: bool,
) -> Result<Vec<(Value, Value)>, Error> {
    // Python reverses before and after, so that what is equal stays in order here too.
    if is_reversed {
        pairs.reverse();
    }
    let less = |a: &Value, b: &Value| comparison::less(budget, a, b).map(|is_less| is_less.is_true());
    let mut pairs = merge_sort(pairs, &less)?;
    if is_reversed {
        pairs.reverse();
    }
    Ok(pairs)
}

/// A sort of our own by the first of each pair, as a comparison may fail and need not be an order (of numbers
/// that are none).
pub(super) fn merge_sort(
    mut pairs: Vec<(Value, Value)>,
    less: &impl Fn(&Value, &Value) -> Result<bool, Error>,
) -> Result<Vec<(Value, Value)>, Error> {
    if pairs.len() < 2 {
        return Ok(pairs);
    }
    let right = merge_sort(pairs.split_off(pairs.len() / 2), less)?;
    let left = merge_sort(pairs, less)?;
    let mut merged = Vec::with_capacity(left.len() + right.len());
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    while let (Some((a, _)), Some((b, _))) = (left.peek(), right.peek()) {
        merged.extend(if less(b, a)? { right.next() } else { left.next() });
    }
    merged.extend(left);
    merged.extend(right);
    Ok(merged)
}

fn seconds(pairs: Vec<(Value, Value)>) -> Value {
    pairs.into_iter().map(|(_, item)| item).collect()
}

fn sort(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, reverse, case, attribute] =
        bind("sort", ["", "reverse", "case_sensitive", "attribute"], given)?;
    let items = items(budget, &value)?;
    let case = arguments::flag(&case);
    // Several attributes, one after another.
    let attributes: Option<Vec<Attribute>> = match attribute.as_str() {
        Some(names) => {
            budget.list(names.matches(',').count().saturating_add(1).saturating_mul(items.len()))?;
            Some(names.split(',').map(|name| Attribute::new(&Value::from(name))).collect())
        }
        None if attribute.is_undefined() || attribute.is_none() => None,
        None => Some(vec![Attribute::new(&attribute)]),
    };
    let mut pairs = Vec::with_capacity(items.len());
    for item in items {
        let key = match &attributes {
            None => folded(budget, item.clone(), case)?,
            Some(attributes) => {
                let keys =
                    attributes.iter().map(|attribute| folded(budget, attribute.of(budget, &item)?, case));
                Value::from(keys.collect::<Result<Vec<Value>, Error>>()?)
            }
        };
        pairs.push((key, item));
    }
    Ok(seconds(sort_pairs(budget, pairs, arguments::flag(&reverse))?))
}

fn dict_sort(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, case, by, reverse] = bind("dictsort", ["", "case_sensitive", "by", "reverse"], given)?;
    if value.kind() != ValueKind::Map {
        return Err(invalid(format!("dictsort needs a dict, not a {}", python::type_name(&value))));
    }
    let by_value = match by.as_str() {
        None if by.is_undefined() => false,
        Some("key") => false,
        Some("value") => true,
        _ => return Err(invalid("dictsort: by must be 'key' or 'value'")),
    };
    let mut pairs = Vec::new();
    for key in items(budget, &value)? {
        let item = value.get_item(&key)?;
        let sorted_by = if by_value { item.clone() } else { key.clone() };
        let entry = Value::from(Tuple::from([key, item]));
        pairs.push((folded(budget, sorted_by, arguments::flag(&case))?, entry));
    }
    Ok(seconds(sort_pairs(budget, pairs, arguments::flag(&reverse))?))
}

/// `items`, named for what it makes.
fn pairs(budget: &Budget, given: &[Value]) -> Outcome {
    let [value] = bind("items", [""], given)?;
    if !value.is_undefined() && value.kind() != ValueKind::Map {
        return Err(invalid(format!("items needs a dict, not a {}", python::type_name(&value))));
    }
    let pair = |key: Value| value.get_item(&key).map(|item| Value::from(Tuple::from([key, item])));
    Ok(Value::from(items(budget, &value)?.into_iter().map(pair).collect::<Result<Vec<Value>, Error>>()?))
}

/// A group of `groupby`: a tuple whose items have names too.
#[derive(Debug)]
pub(super) struct Group {
    grouper: Value,
    list: Value,
}

impl Object for Group {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match (key.as_str(), key.as_usize()) {
            (Some("grouper"), _) | (None, Some(0)) => Some(self.grouper.clone()),
            (Some("list"), _) | (None, Some(1)) => Some(self.list.clone()),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(2)
    }
}

fn group_by(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, attribute, default, case] =
        bind("groupby", ["", "attribute", "default", "case_sensitive"], given)?;
    let mut attribute = Attribute::new(needed("groupby", &attribute)?);
    attribute.default = default;
    let mut pairs = Vec::new();
    for item in items(budget, &value)? {
        let key = folded(budget, attribute.of(budget, &item)?, arguments::flag(&case))?;
        pairs.push((key, item));
    }
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (key, item) in sort_pairs(budget, pairs, false)? {
        match groups.last_mut() {
            Some((last, items)) if comparison::equal(budget, last, &key)?.is_true() => items.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let mut named = Vec::with_capacity(groups.len());
    for (_, items) in groups {
        // In the case of the first.
        let grouper = items.first().map_or(Ok(Value::UNDEFINED), |item| attribute.of(budget, item))?;
        named.push(Value::from_object(Group { grouper, list: Value::from(items) }));
    }
    Ok(Value::from(named))
}

fn extreme(
    budget: &Budget,
    name: &str,
    given: &[Value],
    is_better: fn(&Budget, &Value, &Value) -> Outcome,
) -> Outcome {
    let [value, case, attribute] = bind(name, ["", "case_sensitive", "attribute"], given)?;
    let attribute = Attribute::new(&attribute);
    let mut best: Option<(Value, Value)> = None;
    for item in items(budget, &value)? {
        let key = folded(budget, attribute.of(budget, &item)?, arguments::flag(&case))?;
        match &best {
            Some((best, _)) if !is_better(budget, &key, best)?.is_true() => {}
            _ => best = Some((key, item)),
        }
    }
    Ok(best.map_or(Value::UNDEFINED, |(_, item)| item))
}

/// `map(attribute=…, default=…)`
pub(super) fn map_attribute(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, attribute, default] = bind("map", ["", "attribute", "default"], given)?;
    let mut attribute = Attribute::new(needed("map", &attribute)?);
    attribute.default = default;
    let mapped = items(budget, &value)?.into_iter().map(|item| attribute.of(budget, &item));
    Ok(Value::from(mapped.collect::<Result<Vec<Value>, Error>>()?))
}

fn sum(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, attribute, start] = bind("sum", ["", "attribute", "start"], given)?;
    let attribute = Attribute::new(&attribute);
    let mut sum = if start.is_undefined() { Value::from(0) } else { start };
    if sum.as_str().is_some() {
        return Err(invalid("sum: strings cannot be summed"));
    }
    for item in items(budget, &value)? {
        sum = operators::add(budget, &sum, &attribute.of(budget, &item)?)?;
    }
    Ok(sum)
}

fn unique(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, case, attribute] = bind("unique", ["", "case_sensitive", "attribute"], given)?;
    let attribute = Attribute::new(&attribute);
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for item in items(budget, &value)? {
        let key = folded(budget, attribute.of(budget, &item)?, arguments::flag(&case))?;
        budget.string(budget.walk(&key)?)?;
        let mut name = String::new();
        write_name(&mut name, &key)?;
        if seen.insert(name) {
            found.push(item);
        }
    }
    Ok(Value::from(found))
}

/// A name that is the same for equal values, and for no others; lists and dicts have none.
fn write_name(name: &mut String, value: &Value) -> Result<(), Error> {
    let unknown = || invalid(format!("a {} cannot be looked up", python::type_name(value)));
    match (value.as_str(), value.kind()) {
        (Some(text), _) => name.extend(["s", &text.len().to_string(), ":", text]),
        (_, ValueKind::Bool | ValueKind::Number) => {
            let number = match (integer(value), python::float(value)) {
                (Some(number), _) => number.to_string(),
                // A float that is whole equals the integer.
                (_, Some(number)) if number.fract() == 0.0 && number.abs() < 1e38 => {
                    (number as i128).to_string()
                }
                _ => python::float_repr(python::float(value).unwrap_or(f64::NAN)),
            };
            name.extend(["n", &number, ";"]);
        }
        (_, ValueKind::None) => name.push('N'),
        (_, ValueKind::Undefined) => name.push('U'),
        (_, ValueKind::Plain) => {
            let namespace = value.downcast_object_ref::<Namespace>().ok_or_else(unknown)?;
            name.extend(["o", &namespace.index().to_string(), ";"]);
        }
        _ if python::is_tuple(value) => {
            name.push('(');
            for item in value.try_iter()? {
                write_name(name, &item)?;
            }
            name.push(')');
        }
        _ => return Err(unknown()),
    }
    Ok(())
}

fn join(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, separator, attribute] = bind("join", ["", "d", "attribute"], given)?;
    let attribute = Attribute::new(&attribute);
    let separator = python::str(budget, &separator)?;
    python::check_iterable(&value)?;
    budget.glance(&value)?;
    let mut joined = String::new();
    for (index, item) in value.try_iter()?.enumerate() {
        budget.visit()?;
        if index > 0 {
            joined.push_str(&separator);
        }
        joined.push_str(&python::str(budget, &attribute.of(budget, &item)?)?);
        budget.room(joined.len())?;
    }
    Ok(Value::from(joined))
}

/// The lists that `batch` and `slice` make are themselves in a list.
fn batch(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, count, fill] = bind("batch", ["", "linecount", "fill_with"], given)?;
    let count = arguments::length("batch", needed("batch", &count)?, 0)?;
    let (mut batches, mut batch) = (Vec::new(), Vec::new());
    for item in items(budget, &value)? {
        if batch.len() == count {
            batches.push(Value::from(std::mem::take(&mut batch)));
        }
        batch.push(item);
    }
    if !batch.is_empty() {
        if !fill.is_undefined() && !fill.is_none() {
            budget.list(count)?;
            batch.resize(count.max(batch.len()), fill);
        }
        batches.push(Value::from(batch));
    }
    Ok(Value::from(batches))
}

fn slice(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, count, fill] = bind("slice", ["", "slices", "fill_with"], given)?;
    let count = arguments::int("slice", needed("slice", &count)?, 0)?;
    if count == 0 {
        return Err(invalid("slice: there must be at least one"));
    }
    let count = usize::try_from(count).unwrap_or(0);
    budget.list(count)?;
    let items = items(budget, &value)?;
    let (length, longer) = (items.len() / count.max(1), items.len() % count.max(1));
    let mut rest = items.into_iter();
    let mut slices = Vec::with_capacity(count);
    for index in 0..count {
        let mut part: Vec<Value> = rest.by_ref().take(length + usize::from(index < longer)).collect();
        if index >= longer && !fill.is_undefined() && !fill.is_none() {
            part.push(fill.clone());
        }
        slices.push(Value::from(part));
    }
    Ok(Value::from(slices))
}

fn first(budget: &Budget, given: &[Value]) -> Outcome {
    let [value] = bind("first", [""], given)?;
    python::check_iterable(&value)?;
    budget.visit()?;
    Ok(value.try_iter()?.next().unwrap_or(Value::UNDEFINED))
}

fn last(budget: &Budget, given: &[Value]) -> Outcome {
    let [value] = bind("last", [""], given)?;
    if is_generator(&value) {
        return Err(invalid("last: a generator has no end to begin at"));
    }
    python::check_iterable(&value)?;
    match value.as_str() {
        Some(text) => Ok(text.chars().next_back().map_or(Value::UNDEFINED, Value::from)),
        None => Ok(items(budget, &value)?.pop().unwrap_or(Value::UNDEFINED)),
    }
}

fn reverse(budget: &Budget, given: &[Value]) -> Outcome {
    let [value] = bind("reverse", [""], given)?;
    if let Some(text) = value.as_str() {
        budget.characters(text)?;
        return Ok(super::text::like(&value, text.chars().rev().collect()));
    }
    let mut reversed = items(budget, &value)?;
    reversed.reverse();
    // Python reverses a generator by making a list of it, anything else on the way.
    Ok(if is_generator(&value) { Value::from(reversed) } else { generators::new(reversed) })
}
