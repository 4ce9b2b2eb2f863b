//! What Python's `dict.keys()`, `dict.values()` and `dict.items()` return.

use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectExt as _, ObjectRepr, Tuple};
use minijinja::{Error, Value};

use super::budget::Budget;
use super::comparison;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Keys,
    Values,
    Items,
}

/// A look at a dict: no list, though it has a length and items.
#[derive(Debug)]
pub(super) struct View {
    dict: Value,
    kind: Kind,
}

/// The view that a method of a dict returns; `None` for the other methods.
pub(super) fn new(dict: &Value, method: &str) -> Option<Value> {
    let kind = match method {
        "keys" => Kind::Keys,
        "values" => Kind::Values,
        "items" => Kind::Items,
        _ => return None,
    };
    Some(Value::from_object(View { dict: dict.clone(), kind }))
}

impl View {
    pub(super) fn type_name(&self) -> &'static str {
        match self.kind {
            Kind::Keys => "dict_keys",
            Kind::Values => "dict_values",
            Kind::Items => "dict_items",
        }
    }

    fn item(&self, key: Value) -> Value {
        let value = || self.dict.get_item(&key).unwrap_or_default();
        match self.kind {
            Kind::Values => value(),
            Kind::Items => Value::from(Tuple::from([key.clone(), value()])),
            Kind::Keys => key,
        }
    }

    /// Keys and items are sets to Python, values are the same only as themselves.
    pub(super) fn equals(&self, budget: &Budget, other: &Self) -> Result<bool, Error> {
        if self.kind == Kind::Values || self.kind != other.kind || self.dict.len() != other.dict.len() {
            return Ok(false);
        }
        for key in self.dict.try_iter()? {
            budget.walk(&key)?;
            let found = other.dict.get_item(&key)?;
            let is_same = match self.kind {
                Kind::Items => comparison::equal(budget, &self.dict.get_item(&key)?, &found)?.is_true(),
                _ => !found.is_undefined(),
            };
            if !is_same {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_enumerator(|this| match this.dict.try_iter() {
            Ok(keys) => Box::new(keys.map(|key| this.item(key))),
            Err(_) => Box::new(std::iter::empty()),
        })
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        self.dict.len()
    }
}
