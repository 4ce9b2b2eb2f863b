//! Python's `range`.

use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectExt as _, ObjectRepr};
use minijinja::{Error, Value};

use super::arguments::{bind, int, needed};
use super::operators::invalid;

/// The longest that Jinja's sandbox allows.
const MAX_RANGE: i128 = 100_000;

/// `start`, and `length` numbers from there, each `step` after the one before.
#[derive(Debug)]
pub(super) struct Range {
    start: i64,
    stop: i64,
    step: i64,
    length: usize,
}

impl Range {
    fn new(start: i64, stop: i64, step: i64) -> Result<Self, Error> {
        let distance = if step > 0 {
            i128::from(stop) - i128::from(start)
        } else {
            i128::from(start) - i128::from(stop)
        };
        let stride = i128::from(step.unsigned_abs()).max(1);
        let length = (distance.max(0) + stride - 1) / stride;
        if step == 0 {
            return Err(invalid("range: the step is zero"));
        }
        if length > MAX_RANGE {
            return Err(invalid(format!("range: {length} numbers, the most is {MAX_RANGE}")));
        }
        Ok(Self { start, stop, step, length: length as usize })
    }

    fn at(&self, index: usize) -> i64 {
        self.start.saturating_add(self.step.saturating_mul(i64::try_from(index).unwrap_or(i64::MAX)))
    }

    /// The numbers at the places `from`, `from + stride` and so on, `count` of them, up to the place `to`.
    pub(super) fn slice(&self, from: i64, to: i64, stride: i64) -> Result<Self, Error> {
        let number = |place: i64| self.start.saturating_add(self.step.saturating_mul(place));
        Self::new(number(from), number(to), self.step.saturating_mul(stride))
    }

    pub(super) fn repr(&self) -> String {
        match self.step {
            1 => format!("range({}, {})", self.start, self.stop),
            step => format!("range({}, {}, {step})", self.start, self.stop),
        }
    }
}

impl Object for Range {
    // Neither a list nor JSON, though it has a length and items.
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str() {
            Some("start") => return Some(Value::from(self.start)),
            Some("stop") => return Some(Value::from(self.stop)),
            Some("step") => return Some(Value::from(self.step)),
            _ => {}
        }
        let index = i64::try_from(key.clone()).ok()?;
        let length = i64::try_from(self.length).ok()?;
        let index = usize::try_from(if index < 0 { index.checked_add(length)? } else { index }).ok()?;
        (index < self.length).then(|| Value::from(self.at(index)))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_enumerator(|this| Box::new((0..this.length).map(|index| Value::from(this.at(index)))))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.length)
    }
}

/// `range(stop)`, `range(start, stop)`, `range(start, stop, step)`
pub(super) fn range(given: &[Value]) -> Result<Value, Error> {
    let [first, second, step] = bind("range", ["", "", ""], given)?;
    let first = int("range", needed("range", &first)?, 0)?;
    let (start, stop) = if second.is_undefined() { (0, first) } else { (first, int("range", &second, 0)?) };
    Range::new(start, stop, int("range", &step, 1)?).map(Value::from_object)
}
