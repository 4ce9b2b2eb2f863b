//! What Python knows of characters, and of their cases.

use std::sync::LazyLock;

use regex::Regex;

/// Python's idea of white space is wider than Rust's.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Where `str.splitlines` ends a line.
pub(super) fn ends_line(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// Has an upper and a lower case.
pub(super) fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || title_case_of_digraph(c).is_some()
}

fn title_case_of_digraph(c: char) -> Option<char> {
    match c {
        'Ǆ'..='ǆ' => Some('ǅ'),
        'Ǉ'..='ǉ' => Some('ǈ'),
        'Ǌ'..='ǌ' => Some('ǋ'),
        'Ǳ'..='ǳ' => Some('ǲ'),
        _ => None,
    }
}

/// A character as the first of a word: of those that become several, only the first is in upper case.
pub(super) fn push_title_case(text: &mut String, c: char) {
    if let Some(digraph) = title_case_of_digraph(c) {
        text.push(digraph);
        return;
    }
    let mut upper = c.to_uppercase();
    text.extend(upper.next());
    text.extend(upper.flat_map(char::to_lowercase));
}

/// `str.casefold` of one character: its lower case, the same for all that have one upper case.
pub(super) fn push_folded(text: &mut String, c: char) {
    match c {
        'ı' => text.push(c),
        'ẞ' => text.push_str("ss"),
        // Cherokee had no lower case at first.
        '\u{13a0}'..='\u{13fd}' | '\u{ab70}'..='\u{abbf}' => text.extend(c.to_uppercase()),
        c => text.extend(c.to_uppercase().flat_map(char::to_lowercase)),
    }
}

/// The first character in title case, the others in lower case.
pub(super) fn capitalize(text: &str) -> String {
    let mut capitalized = String::with_capacity(text.len());
    let mut characters = text.chars();
    if let Some(first) = characters.next() {
        push_title_case(&mut capitalized, first);
    }
    capitalized.push_str(&characters.as_str().to_lowercase());
    capitalized
}

/// `str.title`: every run of cased characters is a word.
pub(super) fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        if in_word {
            titled.extend(c.to_lowercase());
        } else {
            push_title_case(&mut titled, c);
        }
        in_word = is_cased(c);
    }
    titled
}

/// Matches a character of one of Unicode's categories.
struct Category(LazyLock<Option<Regex>>);

impl Category {
    fn contains(&self, c: char) -> bool {
        self.0.as_ref().is_some_and(|pattern| pattern.is_match(c.encode_utf8(&mut [0; 4])))
    }
}

static LETTERS: Category = Category(LazyLock::new(|| Regex::new(r"^\p{L}$").ok()));
static DECIMALS: Category = Category(LazyLock::new(|| Regex::new(r"^\p{Nd}$").ok()));
static NUMBERS: Category = Category(LazyLock::new(|| Regex::new(r"^\p{N}$").ok()));
static HIDDEN: Category = Category(LazyLock::new(|| Regex::new(r"^[\p{C}\p{Z}]$").ok()));

pub(super) fn is_alphabetic(c: char) -> bool {
    c.is_ascii_alphabetic() || (!c.is_ascii() && LETTERS.contains(c))
}

pub(super) fn is_decimal(c: char) -> bool {
    c.is_ascii_digit() || (!c.is_ascii() && DECIMALS.contains(c))
}

/// Decimals, and digits above and below the line.
pub(super) fn is_digit(c: char) -> bool {
    is_decimal(c) || matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨')
}

pub(super) fn is_numeric(c: char) -> bool {
    c.is_ascii_digit() || (!c.is_ascii() && NUMBERS.contains(c))
}

/// Python's `str.isprintable` of one character.
pub(super) fn is_printable(c: char) -> bool {
    if c.is_ascii() { !c.is_ascii_control() } else { !HIDDEN.contains(c) }
}

/// `str.isupper` and `str.islower`: a cased character, and none of the other case.
pub(super) fn is_case(text: &str, is: fn(char) -> bool) -> bool {
    let mut cased = text.chars().filter(|c| is_cased(*c)).peekable();
    cased.peek().is_some() && cased.all(is)
}

/// `str.istitle`: upper case where a word begins and nowhere else.
pub(super) fn is_title(text: &str) -> bool {
    let (mut in_word, mut has_words) = (false, false);
    for c in text.chars() {
        let begins = c.is_uppercase() || title_case_of_digraph(c) == Some(c);
        if is_cased(c) && begins == in_word {
            return false;
        }
        in_word = is_cased(c);
        has_words |= in_word;
    }
    has_words
}
