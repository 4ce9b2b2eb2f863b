//! The `wordwrap` filter: lines of a width, broken where Python's `textwrap` breaks them.
//!
//! Source: CPython, `Lib/textwrap.py`.

use minijinja::{Error, Value};

use super::arguments::{self, bind};
use super::budget::Budget;
use super::characters::{is_alphabetic, is_decimal, is_numeric, is_space};
use super::operators::invalid;
use super::text;

/// What is counted for each character, which takes its place four times and is looked up in tables.
const CHARACTER: u64 = 64;

/// A part of a line that is not broken unless it is too long.
#[derive(Clone, Copy)]
struct Chunk {
    start: usize,
    end: usize,
}

impl Chunk {
    fn len(self) -> usize {
        self.end - self.start
    }

    fn of(self, characters: &[char]) -> &[char] {
        characters.get(self.start..self.end).unwrap_or_default()
    }
}

/// Where lines may be broken.
#[derive(Clone, Copy)]
struct Breaks {
    width: usize,
    in_words: bool,
    at_hyphens: bool,
}

/// `wordwrap(width=79, break_long_words=True, wrapstring=None, break_on_hyphens=True)`
pub(super) fn word_wrap(budget: &Budget, given: &[Value]) -> Result<Value, Error> {
    let names = ["", "width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let [value, width, in_words, separator, at_hyphens] = bind("wordwrap", names, given)?;
    let whole = arguments::text("wordwrap", &value)?;
    let width = arguments::int("wordwrap", &width, 79)?;
    let flag = |value: &Value| value.is_undefined() || arguments::flag(value);
    let newline = Value::from("\n");
    let separator = if separator.is_undefined() || separator.is_none() { &newline } else { &separator };
    let between = arguments::text("wordwrap", separator)?;
    budget.work(CHARACTER * whole.len() as u64)?;
    budget.string(whole.len().saturating_mul(4))?;
    let mut wrapped = String::new();
    for (index, line) in text::lines(whole, false).into_iter().enumerate() {
        let Ok(width @ 1..) = usize::try_from(width) else {
            return Err(invalid("wordwrap: the width must be positive"));
        };
        let breaks = Breaks { width, in_words: flag(&in_words), at_hyphens: flag(&at_hyphens) };
        let characters: Vec<char> = line.chars().collect();
        budget.list(characters.len())?;
        let lines = wrap(&characters, breaks);
        budget.list(lines.len())?;
        if index > 0 {
            wrapped.push_str(between);
        }
        for (index, line) in lines.into_iter().enumerate() {
            if index > 0 {
                wrapped.push_str(between);
            }
            let line: String = line.of(&characters).iter().collect();
            wrapped.push_str(&text::fitting(separator, &Value::UNDEFINED, &line));
            budget.room(wrapped.len())?;
        }
    }
    budget.string(wrapped.len())?;
    Ok(text::like(separator, wrapped))
}

/// The lines of a text that has none.
fn wrap(text: &[char], breaks: Breaks) -> Vec<Chunk> {
    let mut chunks = if breaks.at_hyphens { words_and_hyphens(text) } else { words(text) };
    chunks.reverse();
    let is_blank = |chunk: &Chunk| chunk.of(text).iter().all(|c| is_space(*c));
    let mut lines: Vec<Chunk> = Vec::new();
    while let Some(first) = chunks.last().copied() {
        // Lines begin without white space, but for the first.
        if !lines.is_empty() && is_blank(&first) {
            chunks.pop();
            if chunks.is_empty() {
                break;
            }
        }
        let mut line: Vec<Chunk> = Vec::new();
        let mut length = 0;
        while let Some(chunk) = chunks.last().copied().filter(|chunk| length + chunk.len() <= breaks.width) {
            length += chunk.len();
            line.push(chunk);
            chunks.pop();
        }
        if let Some(long) = chunks.last_mut().filter(|chunk| chunk.len() > breaks.width) {
            if breaks.in_words {
                let mut end = breaks.width - length;
                if breaks.at_hyphens {
                    end = hyphen(long.of(text), end).unwrap_or(end);
                }
                line.push(Chunk { start: long.start, end: long.start + end });
                long.start += end;
            } else if line.is_empty() {
                line.extend(chunks.pop());
            }
        }
        // An empty piece of a long word hides the white space before it.
        if line.last().is_some_and(is_blank) {
            line.pop();
        }
        if let (Some(first), Some(last)) = (line.first(), line.last()) {
            lines.push(Chunk { start: first.start, end: last.end });
        }
    }
    lines
}

/// Behind the last hyphen within the first `space` characters of a long word, if something else is before it.
fn hyphen(word: &[char], space: usize) -> Option<usize> {
    let part = word.get(..space)?;
    let at = part.iter().rposition(|c| *c == '-')?;
    part.get(..at)?.iter().any(|c| *c != '-').then_some(at + 1)
}

/// White space where lines are broken; other white space is not.
fn is_break(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\x0b' | '\x0c' | '\r' | ' ')
}

/// Words and the white space between them.
fn words(text: &[char]) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    for (at, c) in text.iter().enumerate() {
        let joins = at.checked_sub(1).and_then(|before| text.get(before));
        match chunks.last_mut() {
            Some(last) if joins.is_some_and(|before| is_break(*before) == is_break(*c)) => last.end = at + 1,
            _ => chunks.push(Chunk { start: at, end: at + 1 }),
        }
    }
    chunks
}

/// Words, white space, dashes between words, and the parts of words with hyphens.
fn words_and_hyphens(text: &[char]) -> Vec<Chunk> {
    // Where the run of hyphens ends that a place is in.
    let mut ends = vec![0; text.len()];
    for (at, c) in text.iter().enumerate().rev() {
        let next = ends.get(at + 1).copied().filter(|end| *end > 0).unwrap_or(at + 1);
        if let Some(end) = ends.get_mut(at).filter(|_| *c == '-') {
            *end = next;
        }
    }
    let look = |at: Option<usize>| at.and_then(|at| text.get(at)).copied();
    let is_word = |c: char| c == '_' || is_alphabetic(c) || is_numeric(c);
    let is_letter = |c: Option<char>| c.is_some_and(|c| is_word(c) && !is_decimal(c));
    let is_punctuated = |c: Option<char>| c.is_some_and(|c| is_word(c) || "!\"'&.,?".contains(c));
    // Two hyphens or more between words.
    let dash = |at: usize| {
        let end = ends.get(at).copied().filter(|end| *end >= at + 2)?;
        let is_between = is_punctuated(look(at.checked_sub(1))) && look(Some(end)).is_some_and(is_word);
        is_between.then_some(end)
    };
    // A hyphen that a word may be broken behind.
    let breaks_behind = |at: usize| {
        let before = |count: usize| look(at.checked_sub(count));
        let follows_letters = is_letter(before(1)) && is_letter(before(2));
        let follows_initial = is_punctuated(before(1)) && before(2) == Some('-') && is_letter(before(3));
        let next = if look(Some(at + 2)) == Some('-') { at + 3 } else { at + 2 };
        (follows_letters || follows_initial) && is_letter(look(Some(at + 1))) && is_letter(look(Some(next)))
    };
    let mut chunks = Vec::new();
    let mut start = 0;
    while let Some(first) = look(Some(start)) {
        let end = if is_break(first) {
            text.iter().skip(start).position(|c| !is_break(*c)).map_or(text.len(), |count| start + count)
        } else if let Some(end) = dash(start) {
            end
        } else {
            let mut end = start + 1;
            loop {
                match look(Some(end)) {
                    None => break end,
                    Some(c) if is_break(c) => break end,
                    Some('-') if breaks_behind(end) => break end + 1,
                    Some('-') if dash(end).is_some() => break end,
                    Some(_) => end += 1,
                }
            }
        };
        chunks.push(Chunk { start, end });
        start = end;
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breaks_lines_where_python_breaks_them() {
        let cases = [
            ("hello world foo", 10, "hello|world foo"),
            ("  lead  trail  ", 6, "  lead|trail"),
            ("well-known thing", 8, "well-|known|thing"),
            ("abc--def", 4, "abc|--|def"),
            ("abcdefghij", 4, "abcd|efgh|ij"),
            ("a\n\nb c", 1, "a||b|c"),
            ("", 5, ""),
        ];
        for (text, width, expected) in cases {
            let given = [text.into(), width.into(), true.into(), "|".into()];
            assert_eq!(word_wrap(&Budget::default(), &given).unwrap(), expected.into(), "{text}");
        }
        let whole = ["abcdefghij kl".into(), 4.into(), false.into(), "|".into(), false.into()];
        assert_eq!(word_wrap(&Budget::default(), &whole).unwrap(), "abcdefghij|kl".into());
        assert!(word_wrap(&Budget::default(), &["a".into(), 0.into()]).is_err());
    }
}
