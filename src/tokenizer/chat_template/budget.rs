//! What one rendering may use. A template comes with a model, so whatever it does must end soon, in little
//! memory.

use std::sync::atomic::{AtomicU64, Ordering};

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use super::{attributes, cycles, generators};

/// Longest string, and longest prompt, in bytes.
pub(super) const MAX_BYTES: usize = 32 << 20;
/// Longest list that a template makes.
pub(super) const MAX_ITEMS: usize = 1_000_000;
/// Deepest nesting of lists and dicts.
pub(super) const MAX_NESTING: usize = 150;

/// Bytes of all that a template makes, be it kept or not.
const MAX_MEMORY: u64 = 512 << 20;
/// Bytes that it looks at or copies: about two seconds.
const MAX_WORK: u64 = 1 << 30;
/// What visiting one value counts, in bytes: a visit takes about as long as a look at so many.
const VISIT: u64 = 256;
/// What is counted for a character that is looked at on its own, and for a part of a text that is found.
const CHARACTER: u64 = 8;
const MATCH: u64 = 32;
/// Memory of one item of a list.
const ITEM: usize = 32;

/// Counts what a rendering uses.
#[derive(Debug, Default)]
pub(super) struct Budget {
    memory: AtomicU64,
    work: AtomicU64,
}

impl Budget {
    /// Counts a string of `bytes` bytes that is about to be made.
    pub(super) fn string(&self, bytes: usize) -> Result<(), Error> {
        self.room(bytes)?;
        self.memory(bytes)
    }

    /// Checks the length of a string that is being made, which is counted when it is there.
    pub(super) fn room(&self, bytes: usize) -> Result<(), Error> {
        if bytes > MAX_BYTES {
            return Err(exceeded(format!("a string of {bytes} bytes, the most is {MAX_BYTES}")));
        }
        Ok(())
    }

    /// Counts a list of `items` items that is about to be made.
    pub(super) fn list(&self, items: usize) -> Result<(), Error> {
        if items > MAX_ITEMS {
            return Err(exceeded(format!("a list of {items} items, the most is {MAX_ITEMS}")));
        }
        self.memory(items.saturating_mul(ITEM))
    }

    /// Counts text that is written: the buffer it goes to may have grown to twice its length.
    pub(super) fn written(&self, bytes: usize) -> Result<(), Error> {
        self.memory(bytes.saturating_mul(2))
    }

    fn memory(&self, bytes: usize) -> Result<(), Error> {
        let bytes = bytes as u64;
        let before = self.memory.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > MAX_MEMORY {
            return Err(exceeded(format!("more than {MAX_MEMORY} bytes of strings and lists in all")));
        }
        self.work(bytes)
    }

    /// Counts a look at `bytes` bytes.
    pub(super) fn work(&self, bytes: u64) -> Result<(), Error> {
        let before = self.work.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > MAX_WORK {
            return Err(exceeded("more work than any prompt needs".to_owned()));
        }
        Ok(())
    }

    /// Counts a look at each character of a text: what is done with one takes as long as a copy of so many
    /// bytes.
    pub(super) fn characters(&self, text: &str) -> Result<(), Error> {
        self.work(CHARACTER * text.len() as u64)
    }

    /// Counts places in a text where something is found.
    pub(super) fn matches(&self, count: usize) -> Result<(), Error> {
        self.work(MATCH.saturating_mul(count as u64))
    }

    /// Counts a visit of a value that has no length of its own.
    pub(super) fn visit(&self) -> Result<(), Error> {
        self.work(VISIT)
    }

    /// Counts a look at a value without what is in it.
    pub(super) fn glance(&self, value: &Value) -> Result<(), Error> {
        match value.as_str() {
            Some(text) => self.work(text.len() as u64),
            None => self.visit(),
        }
    }

    /// Counts a look at a value and all that is in it, and how long it would be as text, roughly.
    pub(super) fn walk(&self, value: &Value) -> Result<usize, Error> {
        self.walk_at(value, 0)
    }

    fn walk_at(&self, value: &Value, depth: usize) -> Result<usize, Error> {
        if depth > MAX_NESTING {
            return Err(exceeded(format!("values nested deeper than {MAX_NESTING} levels")));
        }
        self.glance(value)?;
        let mut length = value.as_str().map_or(8, str::len);
        for held in [attributes::held, cycles::held, generators::held] {
            for item in held(value) {
                length = length.saturating_add(self.walk_at(item, depth + 1)?);
            }
        }
        let kind = value.kind();
        let is_gone_through = matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map);
        if is_gone_through && !generators::is_generator(value) {
            for item in value.try_iter()? {
                length = length.saturating_add(self.walk_at(&item, depth + 1)?);
                if kind == ValueKind::Map {
                    length = length.saturating_add(self.walk_at(&value.get_item(&item)?, depth + 1)?);
                }
            }
        }
        Ok(length)
    }

    /// Counts what a filter, a method or a function has made.
    pub(super) fn made(&self, value: &Value) -> Result<(), Error> {
        match value.as_str() {
            Some(text) => self.string(text.len()),
            None if value.kind() == ValueKind::Seq => self.list(value.len().unwrap_or(0)),
            None => Ok(()),
        }
    }
}

fn exceeded(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("the template makes or does too much: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_is_counted_together() {
        let budget = Budget::default();
        assert!(budget.string(MAX_BYTES + 1).is_err());
        assert!(budget.list(MAX_ITEMS + 1).is_err());
        for _ in 0..MAX_MEMORY / MAX_BYTES as u64 {
            budget.string(MAX_BYTES).unwrap();
        }
        assert!(budget.string(1).unwrap_err().to_string().contains("in all"));
    }

    #[test]
    fn values_that_hold_the_same_value_often_are_counted_as_often() {
        let budget = Budget::default();
        let mut value = Value::from("four");
        for _ in 0..10 {
            value = Value::from(vec![value.clone(), value]);
        }
        assert!(budget.walk(&value).unwrap() >= 4 << 10);
        for _ in 0..50 {
            value = Value::from(vec![value.clone(), value]);
        }
        assert!(budget.walk(&value).is_err());
    }

    #[test]
    fn deep_values_are_refused() {
        let nested = |levels| (0..levels).fold(Value::from(1), |value, _| Value::from(vec![value]));
        assert!(Budget::default().walk(&nested(MAX_NESTING)).is_ok());
        assert!(Budget::default().walk(&nested(MAX_NESTING + 1)).is_err());
    }
}
