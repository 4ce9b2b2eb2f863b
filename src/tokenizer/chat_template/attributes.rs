//! Methods of Python's own values as attributes, which a template may name without calling them. They go before
//! the keys of a dict in `value.name`, and after them in `value['name']`.

use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr, ValueKind};
use minijinja::{Error, State, Value};

use super::python;
use super::range::Range;

type Outcome = Result<Value, Error>;

const OF_DICTS: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
/// What the sandbox does not give out, as it would change the dict: undefined, even if there is such a key.
const OF_DICTS_UNSAFE: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
const OF_LISTS: [&str; 3] = ["copy", "count", "index"];
const OF_TUPLES_AND_RANGES: [&str; 2] = ["count", "index"];
const OF_STRINGS: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];

/// Whether [`of`] knows an attribute of this name.
pub(super) fn is_known(name: &str) -> bool {
    let all = [&OF_DICTS[..], &OF_DICTS_UNSAFE, &OF_LISTS, &OF_STRINGS];
    all.iter().any(|names| names.contains(&name))
}

/// `value.name`
pub(super) fn get(value: &Value, name: &str) -> Outcome {
    of(value, name).map_or_else(|| value.get_attr(name), Ok)
}

/// `value[key]`: what was found at the key or, if nothing was, the attribute of that name.
pub(super) fn unless_found(found: Value, value: &Value, key: &Value) -> Value {
    match key.as_str() {
        Some(name) if found.is_undefined() => of(value, name).unwrap_or(found),
        _ => found,
    }
}

/// The attribute of this name that Python's type of the value has.
pub(super) fn of(value: &Value, name: &str) -> Option<Value> {
    let names: &[&'static str] = match value.kind() {
        ValueKind::String => &OF_STRINGS,
        ValueKind::Map if OF_DICTS_UNSAFE.contains(&name) => return Some(Value::UNDEFINED),
        ValueKind::Map => &OF_DICTS,
        ValueKind::Seq if !python::is_tuple(value) => &OF_LISTS,
        ValueKind::Seq => &OF_TUPLES_AND_RANGES,
        _ => {
            value.downcast_object_ref::<Range>()?;
            &OF_TUPLES_AND_RANGES
        }
    };
    let name = names.iter().find(|known| **known == name)?;
    Some(Value::from_object(Method { of: value.clone(), name }))
}

/// What a method holds; nothing of anything else.
pub(super) fn held(value: &Value) -> &[Value] {
    value.downcast_object_ref::<Method>().map_or(&[], |method| std::slice::from_ref(&method.of))
}

/// A method that was named and not called.
#[derive(Debug)]
pub(super) struct Method {
    of: Value,
    name: &'static str,
}

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, given: &[Value]) -> Outcome {
        self.of.call_method(state, self.name, given)
    }
}
