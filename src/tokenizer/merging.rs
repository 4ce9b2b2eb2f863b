//! Data structures for greedy merging: a text as a list of symbols, and the pairs of neighbours in the queue.

use std::cmp::{Ordering, Reverse};

/// The index that means "no symbol".
pub(super) const NONE: u32 = u32::MAX;

/// A text cut into symbols. They form a doubly linked list. A symbol's index is that of its first character.
pub(super) struct Symbols<'a> {
    text: &'a str,
    pub(super) list: Vec<Symbol>,
}

pub(super) struct Symbol {
    start: u32,
    /// The length in bytes; 0 once the symbol has been merged into the one before it.
    bytes: u32,
    before: u32,
    after: u32,
}

impl<'a> Symbols<'a> {
    /// Makes one symbol per character.
    pub(super) fn new(text: &'a str) -> Self {
        let mut list: Vec<Symbol> = text
            .char_indices()
            .zip(0u32..)
            .map(|((start, character), index)| Symbol {
                start: start as u32,
                bytes: character.len_utf8() as u32,
                before: index.checked_sub(1).unwrap_or(NONE),
                after: index + 1,
            })
            .collect();
        if let Some(last) = list.last_mut() {
            last.after = NONE;
        }
        Symbols { text, list }
    }

    /// The joined text of a symbol and the next one, and its length in bytes.
    pub(super) fn joined(&self, left: u32) -> Option<(&'a str, u32)> {
        let symbol = self.list.get(left as usize).filter(|symbol| symbol.bytes > 0)?;
        let bytes = symbol.bytes + self.list.get(symbol.after as usize)?.bytes;
        Some((self.slice(symbol.start, bytes)?, bytes))
    }

    fn slice(&self, start: u32, bytes: u32) -> Option<&'a str> {
        self.text.get(start as usize..start as usize + bytes as usize)
    }

    /// Merges a symbol with the next one. Returns the index of the symbol before it.
    pub(super) fn merge(&mut self, left: u32) -> u32 {
        let Some(symbol) = self.list.get(left as usize) else { return NONE };
        let (before, right) = (symbol.before, symbol.after);
        let Some(merged) = self.list.get_mut(right as usize) else { return NONE };
        let (bytes, after) = (std::mem::take(&mut merged.bytes), merged.after);
        if let Some(symbol) = self.list.get_mut(left as usize) {
            symbol.bytes += bytes;
            symbol.after = after;
        }
        if let Some(next) = self.list.get_mut(after as usize) {
            next.before = left;
        }
        before
    }

    pub(super) fn texts(&self) -> impl Iterator<Item = &'a str> {
        self.list
            .iter()
            .filter(|symbol| symbol.bytes > 0)
            .filter_map(|symbol| self.slice(symbol.start, symbol.bytes))
    }
}

/// Two neighbours that together are a piece. Pairs are ordered by score, then by position from the left.
pub(super) struct Pair {
    pub(super) score: f32,
    pub(super) left: Reverse<u32>,
    /// The length of both together, to detect pairs that have changed since.
    pub(super) bytes: u32,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| self.left.cmp(&other.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Pair {}
