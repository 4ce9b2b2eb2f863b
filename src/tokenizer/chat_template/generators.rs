//! What the filters that make their items one by one return to Python: no list, but something that is gone
//! through once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::Value;
use minijinja::value::{Enumerator, Object, ObjectExt as _, ObjectRepr};

/// Items that whoever goes through them uses up. It has no length, is no JSON, and is true even without items.
#[derive(Debug)]
pub(super) struct Generator {
    items: Vec<Value>,
    /// How many of them are used up.
    place: AtomicUsize,
}

pub(super) fn new(items: Vec<Value>) -> Value {
    Value::from_object(Generator { items, place: AtomicUsize::new(0) })
}

pub(super) fn is_generator(value: &Value) -> bool {
    value.downcast_object_ref::<Generator>().is_some()
}

/// What a generator holds, used up or not; nothing of anything else.
pub(super) fn held(value: &Value) -> &[Value] {
    value.downcast_object_ref::<Generator>().map_or(&[], |generator| &generator.items)
}

impl Generator {
    fn left(&self) -> &[Value] {
        self.items.get(self.place.load(Ordering::Relaxed)..).unwrap_or_default()
    }
}

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_enumerator(|generator| Box::new(Pass { generator }))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }
}

/// One pass through a generator, which goes on where the last one stopped.
struct Pass<'g> {
    generator: &'g Generator,
}

impl Iterator for Pass<'_> {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        let item = self.generator.left().first()?.clone();
        self.generator.place.fetch_add(1, Ordering::Relaxed);
        Some(item)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.generator.left().len();
        (left, Some(left))
    }
}
