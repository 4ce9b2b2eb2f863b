//! Jinja's `cycler` and `joiner`, which remember how often they were asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use minijinja::value::{Object, ObjectRepr, Tuple};
use minijinja::{Error, ErrorKind, State, Value};

use super::arguments::bind;
use super::budget::Budget;
use super::operators::invalid;

/// Items in turn, from the first again after the last.
#[derive(Debug)]
pub(super) struct Cycler {
    items: Vec<Value>,
    place: AtomicUsize,
}

/// Nothing the first time, then a separator.
#[derive(Debug)]
pub(super) struct Joiner {
    separator: Value,
    is_used: AtomicBool,
}

/// `cycler(*items)`
pub(super) fn cycler(budget: &Budget, items: Vec<Value>) -> Result<Value, Error> {
    if items.is_empty() {
        return Err(invalid("cycler needs at least one item"));
    }
    budget.list(items.len())?;
    // Bounds the depth, too, of what is freed with it.
    items.iter().try_for_each(|item| budget.walk(item).map(|_| ()))?;
    Ok(Value::from_object(Cycler { items, place: AtomicUsize::new(0) }))
}

/// `joiner(sep=', ')`
pub(super) fn joiner(budget: &Budget, given: &[Value]) -> Result<Value, Error> {
    let separator = match given {
        [] => Value::from(", "),
        given => bind("joiner", ["sep"], given).map(|[separator]| separator)?,
    };
    budget.walk(&separator)?;
    Ok(Value::from_object(Joiner { separator, is_used: AtomicBool::new(false) }))
}

/// What a cycler or a joiner holds; nothing of anything else.
pub(super) fn held(value: &Value) -> &[Value] {
    if let Some(cycler) = value.downcast_object_ref::<Cycler>() {
        return &cycler.items;
    }
    value.downcast_object_ref::<Joiner>().map_or(&[], |joiner| std::slice::from_ref(&joiner.separator))
}

impl Cycler {
    fn current(&self) -> Value {
        self.items.get(self.place.load(Ordering::Relaxed)).cloned().unwrap_or_default()
    }
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "current" => Some(self.current()),
            "items" => Some(Value::from(Tuple::from(self.items.clone()))),
            "pos" => Some(Value::from(self.place.load(Ordering::Relaxed))),
            _ => None,
        }
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        method: &str,
        given: &[Value],
    ) -> Result<Value, Error> {
        match method {
            "next" => {
                let [] = bind(method, [], given)?;
                let current = self.current();
                let next = (self.place.load(Ordering::Relaxed) + 1) % self.items.len();
                self.place.store(next, Ordering::Relaxed);
                Ok(current)
            }
            "reset" => {
                let [] = bind(method, [], given)?;
                self.place.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

impl Object for Joiner {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "sep" => Some(self.separator.clone()),
            "used" => Some(Value::from(self.is_used.load(Ordering::Relaxed))),
            _ => None,
        }
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, given: &[Value]) -> Result<Value, Error> {
        let [] = bind("a joiner", [], given)?;
        Ok(if self.is_used.swap(true, Ordering::Relaxed) { self.separator.clone() } else { Value::from("") })
    }
}
