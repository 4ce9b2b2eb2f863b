//! Jinja's filters that apply another filter, a test or a look at an attribute to each item.

use minijinja::value::Kwargs;
use minijinja::{Error, State, Value};

use super::budget::Budget;
use super::operators::invalid;
use super::sequences::{Attribute, items, map_attribute};

type Outcome = Result<Value, Error>;
type Selection = fn(&Budget, &mut State<'_, '_>, &[Value]) -> Outcome;

pub(super) const FILTERS: [(&str, Selection); 5] = [
    ("map", map),
    ("reject", |budget, state, given| choose(budget, state, given, None, false)),
    ("rejectattr", |budget, state, given| choose_by_attribute(budget, state, "rejectattr", given, false)),
    ("select", |budget, state, given| choose(budget, state, given, None, true)),
    ("selectattr", |budget, state, given| choose_by_attribute(budget, state, "selectattr", given, true)),
];

/// `map(filter, *arguments)` and `map(attribute=…, default=…)`
fn map(budget: &Budget, state: &mut State<'_, '_>, given: &[Value]) -> Outcome {
    if is_nothing(given) {
        return Ok(Value::from(Vec::<Value>::new()));
    }
    let [value, filter, arguments @ ..] = given else {
        return Err(invalid("map needs a filter or an attribute"));
    };
    let Some(filter) = filter.as_str() else { return map_attribute(budget, given) };
    let mut mapped = Vec::new();
    for item in items(budget, value)? {
        mapped.push(state.apply_filter(filter, &with_item(item, arguments))?);
    }
    Ok(Value::from(mapped))
}

fn choose_by_attribute(
    budget: &Budget,
    state: &mut State<'_, '_>,
    callee: &str,
    given: &[Value],
    wanted: bool,
) -> Outcome {
    if is_nothing(given) {
        return Ok(Value::from(Vec::<Value>::new()));
    }
    let [value, attribute, arguments @ ..] = given else {
        return Err(invalid(format!("{callee} needs the name of an attribute")));
    };
    if Kwargs::try_from(attribute.clone()).is_ok() && !attribute.is_undefined() {
        return Err(invalid(format!("{callee} takes the name of an attribute as its first argument")));
    }
    let attribute = Attribute::new(attribute);
    choose(budget, state, &with_item(value.clone(), arguments), Some(&attribute), wanted)
}

/// The items for which a test holds, or does not: of the item itself, or of an attribute. Without the name of
/// a test it is whether they are true.
fn choose(
    budget: &Budget,
    state: &mut State<'_, '_>,
    given: &[Value],
    attribute: Option<&Attribute>,
    wanted: bool,
) -> Outcome {
    let (value, arguments) = match given {
        [value, arguments @ ..] if !is_nothing(given) => (value, arguments),
        _ => return Ok(Value::from(Vec::<Value>::new())),
    };
    let (test, arguments) = match arguments {
        [test, arguments @ ..] if test.is_undefined() || Kwargs::try_from(test.clone()).is_err() => {
            let name = test.as_str().ok_or_else(|| invalid("the name of a test must be a string"))?;
            (Some(name), arguments)
        }
        _ => (None, &[][..]),
    };
    let mut chosen = Vec::new();
    for item in items(budget, value)? {
        let tested = match attribute {
            Some(attribute) => attribute.of(budget, &item)?,
            None => item.clone(),
        };
        let holds = match test {
            Some(test) => state.perform_test(test, &with_item(tested, arguments))?,
            None => tested.is_true(),
        };
        if holds == wanted {
            chosen.push(item);
        }
    }
    Ok(Value::from(chosen))
}

/// Whether there is nothing to go through; Jinja then looks neither at the other arguments nor at whether it
/// could be gone through at all.
fn is_nothing(given: &[Value]) -> bool {
    given.first().is_none_or(|value| !value.is_true())
}

fn with_item(item: Value, arguments: &[Value]) -> Vec<Value> {
    std::iter::once(item).chain(arguments.iter().cloned()).collect()
}
