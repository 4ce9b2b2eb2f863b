//! Jinja's `namespace`, whose attributes a template may set.
//!
//! What namespaces hold lies in one list and goes with it. Held by each other instead, namespaces in a circle
//! would never be freed, and a long chain of them would be freed one within the other, beyond the stack.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use minijinja::value::{Object, ObjectRepr};
use minijinja::{Error, Value};

use super::budget::Budget;
use super::operators::invalid;

/// Memory of an attribute, or of a namespace without any.
const MEMORY: usize = 256;

/// What all namespaces of one rendering hold.
#[derive(Default)]
pub(super) struct Namespaces(Mutex<Vec<Attributes>>);

/// In the order in which they were set first.
#[derive(Default)]
struct Attributes {
    entries: Vec<(Value, Value)>,
    places: BTreeMap<Arc<str>, usize>,
}

impl Attributes {
    fn set(&mut self, key: Value, value: Value) {
        let place = key.as_str().and_then(|name| self.places.get(name));
        if let Some(entry) = place.and_then(|place| self.entries.get_mut(*place)) {
            entry.1 = value;
            return;
        }
        if let Some(name) = key.as_str() {
            self.places.insert(name.into(), self.entries.len());
        }
        self.entries.push((key, value));
    }
}

impl Namespaces {
    fn with<T>(&self, index: usize, look: impl FnOnce(&mut Attributes) -> T) -> Option<T> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get_mut(index).map(look)
    }

    /// A namespace with the entries of a dict.
    pub(super) fn make(self: &Arc<Self>, budget: &Budget, entries: &Value) -> Result<Value, Error> {
        let mut attributes = Attributes::default();
        budget.string(MEMORY)?;
        for key in entries.try_iter()? {
            budget.string(MEMORY)?;
            let value = entries.get_item(&key)?;
            attributes.set(key, value);
        }
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(attributes);
        Ok(Value::from_object(Namespace { index: all.len() - 1, all: Arc::downgrade(self) }))
    }
}

/// One of [`Namespaces`].
#[derive(Debug)]
pub(super) struct Namespace {
    index: usize,
    all: Weak<Namespaces>,
}

impl std::fmt::Debug for Namespaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Namespaces")
    }
}

impl Namespace {
    fn with<T>(&self, look: impl FnOnce(&mut Attributes) -> T) -> Option<T> {
        self.all.upgrade()?.with(self.index, look)
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Names and values, in order.
    pub(super) fn entries(&self) -> Vec<(Value, Value)> {
        self.with(|attributes| attributes.entries.clone()).unwrap_or_default()
    }
}

impl Object for Namespace {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        // To the sandbox, a name with an underscore in front is private.
        let name = key.as_str().filter(|name| !name.starts_with('_'))?;
        self.with(|attributes| {
            let place = attributes.places.get(name)?;
            attributes.entries.get(*place).map(|(_, value)| value.clone())
        })?
    }
}

/// `{% set target.name = value %}`
pub(super) fn set(budget: &Budget, value: Value, target: &Value, name: Value) -> Result<Value, Error> {
    let Some(namespace) = target.downcast_object_ref::<Namespace>() else {
        return Err(invalid("an attribute can only be set of a namespace"));
    };
    budget.walk(&value)?;
    budget.string(MEMORY)?;
    namespace.with(|attributes| attributes.set(name, value));
    Ok(Value::UNDEFINED)
}
