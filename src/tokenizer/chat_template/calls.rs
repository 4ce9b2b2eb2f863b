//! minijinja's filters, tests, methods and functions, with a check of what they are given: that it is what
//! Python would take, and that what they make of it stays within the budget.

use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, State, Value, filters, tests};
use minijinja_contrib::pycompat;

use super::arguments::bind;
use super::budget::Budget;
use super::namespace::Namespaces;
use super::operators::{self, invalid};
use super::{
    attributes, classes, comparison, compiler, cycles, generators, json, python, range, scalars, selections,
    sequences, text, views, web,
};

/// Filters that do not make a list at once.
const GENERATORS: [&str; 9] =
    ["batch", "items", "map", "reject", "rejectattr", "select", "selectattr", "slice", "unique"];

pub(super) fn add_to(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    for (name, filter) in sequences::FILTERS.into_iter().chain(scalars::FILTERS) {
        let budget = Arc::clone(budget);
        environment.add_filter(name, move |given: Rest<Value>, keywords: Kwargs| {
            let given = all_arguments(given, keywords);
            finish(&budget, name, filter(&budget, &given)?)
        });
    }
    macro_rules! guarded {
        ($($name:literal => $filter:path),* $(,)?) => {
            $(add_filter(environment, budget, $name, Value::from_function($filter));)*
        };
    }
    guarded! {
        "attr" => attribute, "d" => filters::default, "default" => filters::default,
        "safe" => filters::safe, "tojson" => json::tojson,
    }
    for (name, filter) in selections::FILTERS {
        let budget = Arc::clone(budget);
        environment.add_filter(name, move |state: &mut State, given: Rest<Value>, keywords: Kwargs| {
            finish(&budget, name, filter(&budget, state, &all_arguments(given, keywords))?)
        });
    }
    // What Jinja does not know.
    for name in ["bool", "chain", "lines", "split", "zip"] {
        environment.remove_filter(name);
    }
    for name in ["endingwith", "int", "safe", "startingwith"] {
        environment.remove_test(name);
    }
    environment.add_test("callable", python::is_callable);
    for (name, known) in [("filter", &compiler::FILTERS[..]), ("test", &compiler::TESTS[..])] {
        environment.add_test(name, move |value: &Value| {
            operators::check_key(value).map(|()| value.as_str().is_some_and(|name| known.contains(&name)))
        });
    }
    let shared = Arc::clone(budget);
    environment.add_filter("xmlattr", move |state: &mut State, given: Rest<Value>, keywords: Kwargs| {
        let written = web::xml_attributes(&shared, &all_arguments(given, keywords))?;
        Ok(match state.auto_escape() {
            AutoEscape::Html => Value::from_safe_string(written),
            _ => Value::from(written),
        })
    });
    for (name, rest) in [("even", 0), ("odd", 1)] {
        let shared = Arc::clone(budget);
        environment.add_test(name, move |value: &Value| {
            let found = operators::modulo(&shared, value, &Value::from(2))?;
            comparison::equal(&shared, &found, &Value::from(rest))
        });
    }
    let shared = Arc::clone(budget);
    environment.add_test("divisibleby", move |given: Rest<Value>, keywords: Kwargs| {
        let [value, divisor] = bind("divisibleby", ["", "num"], &all_arguments(given, keywords))?;
        let found = operators::modulo(&shared, &value, &divisor)?;
        comparison::equal(&shared, &found, &Value::from(0))
    });
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
    type Comparison = fn(&Budget, &Value, &Value) -> Result<Value, Error>;
    let orders: [([&'static str; 3], Comparison); 4] = [
        (["<", "lt", "lessthan"], comparison::less),
        (["<=", "le", "le"], comparison::less_or_equal),
        ([">", "gt", "greaterthan"], comparison::greater),
        ([">=", "ge", "ge"], comparison::greater_or_equal),
    ];
    for (names, order) in orders {
        for name in names {
            let shared = Arc::clone(budget);
            environment.add_test(name, move |a: &Value, b: &Value| order(&shared, a, b));
        }
    }
    add_tests_of_text(environment, budget);

    environment.remove_global("debug");
    environment.add_function("range", |given: Rest<Value>| range::range(&given));
    let shared = Arc::clone(budget);
    environment
        .add_function("dict", move |given: Rest<Value>, keywords: Kwargs| dict(&shared, &given, &keywords));
    let shared = Arc::clone(budget);
    environment.add_function("cycler", move |given: Rest<Value>, keywords: Kwargs| {
        keywords.assert_all_used()?;
        cycles::cycler(&shared, given.0)
    });
    let shared = Arc::clone(budget);
    environment.add_function("joiner", move |given: Rest<Value>, keywords: Kwargs| {
        cycles::joiner(&shared, &all_arguments(given, keywords))
    });
    let shared = Arc::clone(budget);
    let namespaces = Arc::new(Namespaces::default());
    environment.add_function("namespace", move |given: Rest<Value>, keywords: Kwargs| {
        namespaces.make(&shared, &dict(&shared, &given, &keywords)?)
    });
    classes::name_all(environment);
    let shared = Arc::clone(budget);
    environment.set_unknown_method_callback(move |state, value, method, arguments| {
        check_method(&shared, value, arguments)?;
        if let Some(result) = text::call(&shared, value, method, arguments) {
            return result;
        }
        let result = match list_method(&shared, value, method, arguments)? {
            Some(result) => result,
            None => pycompat::unknown_method_callback(state, value, method, arguments)?,
        };
        shared.made(&result)?;
        Ok(result)
    });
}

/// Python's methods of lists, tuples and dicts that minijinja-contrib has not. None of them changes the
/// value: transformers' environment does not allow that.
fn list_method(
    budget: &Budget,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Option<Value>, Error> {
    let is_list = value.kind() == ValueKind::Seq;
    match method {
        "copy" if value.kind() == ValueKind::Map || (is_list && !python::is_tuple(value)) => {
            bind(method, [], arguments).map(|[]| Some(value.clone()))
        }
        "get" if value.kind() == ValueKind::Map => {
            arguments.first().map_or(Ok(()), operators::check_key).map(|()| None)
        }
        "keys" | "values" | "items" if value.kind() == ValueKind::Map => {
            bind(method, [], arguments).map(|[]| views::new(value, method))
        }
        "count" | "index" if is_list || value.downcast_object_ref::<range::Range>().is_some() => {
            let [wanted] = bind(method, [""], arguments)?;
            let mut count = 0;
            for (index, item) in value.try_iter()?.enumerate() {
                if comparison::equal(budget, &item, &wanted)?.is_true() {
                    if method == "index" {
                        return Ok(Some(Value::from(index)));
                    }
                    count += 1;
                }
            }
            if method == "index" { Err(invalid("index: not found")) } else { Ok(Some(Value::from(count))) }
        }
        _ => Ok(None),
    }
}

/// `dict(pairs or another dict, key=value)`
fn dict(budget: &Budget, given: &[Value], keywords: &Kwargs) -> Result<Value, Error> {
    let [from] = bind("dict", [""], given)?;
    budget.walk(&from)?;
    let mut entries = Vec::new();
    if from.kind() == ValueKind::Map {
        for key in from.try_iter()? {
            let item = from.get_item(&key)?;
            entries.push((key, item));
        }
    } else if !from.is_undefined() {
        python::check_iterable(&from)?;
        for pair in from.try_iter()? {
            let pair: Vec<Value> = pair.try_iter()?.collect();
            let [key, item] = pair.as_slice() else { return Err(invalid("dict: an item is no pair")) };
            operators::check_key(key)?;
            entries.push((key.clone(), item.clone()));
        }
    }
    for name in keywords.args() {
        let item: Value = keywords.peek(name)?;
        budget.walk(&item)?;
        entries.push((Value::from(name), item));
    }
    let dict = Value::from_pairs(entries);
    operators::check_keys(&dict).map(|()| dict)
}

/// The filter `attr`: the keys of a dict are no attributes.
fn attribute(value: &Value, name: &str) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Plain => value.get_attr(name),
        _ => Ok(attributes::of(value, name).unwrap_or_default()),
    }
}

/// Tests that look at all of a value.
fn add_tests_of_text(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
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
        "lower" => tests::is_lower,
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
        finish(&budget, name, result)
    });
}

/// Counts what a filter has made.
fn finish(budget: &Budget, name: &str, result: Value) -> Result<Value, Error> {
    budget.made(&result)?;
    if GENERATORS.contains(&name) {
        return Ok(generators::new(result.try_iter()?.collect()));
    }
    Ok(result)
}

fn check_filter(budget: &Budget, name: &str, arguments: &[Value]) -> Result<(), Error> {
    let Some(value) = arguments.first() else { return Ok(()) };
    match name {
        "safe" => look(budget, arguments),
        // What is written is longer than what is looked at.
        "tojson" => budget.walk(value).and_then(|length| budget.work(48 * length as u64)),
        // These look at no more than the value itself.
        _ => Ok(()),
    }
}

/// Counts a look at each character of texts.
fn look(budget: &Budget, values: &[Value]) -> Result<(), Error> {
    values.iter().filter_map(Value::as_str).try_for_each(|text| budget.characters(text))
}

fn check_method(budget: &Budget, value: &Value, arguments: &[Value]) -> Result<(), Error> {
    look(budget, arguments)?;
    let Some(text) = value.as_str() else { return budget.visit() };
    budget.characters(text)
}
