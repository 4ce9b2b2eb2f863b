//! Jinja's filters that make or take apart what browsers read: tags, attributes, queries.

use minijinja::value::ValueKind;
use minijinja::{Error, Value};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::arguments::{self, bind};
use super::budget::Budget;
use super::characters::is_space;
use super::operators::{integer, invalid};
use super::python;

type Outcome = Result<Value, Error>;

/// What Python's `urllib.parse.quote` quotes.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'_').remove(b'.').remove(b'-').remove(b'~').remove(b'/');
/// What its `quote_plus` quotes, but for spaces.
const QUERY: &AsciiSet = &PATH.add(b'/').remove(b' ');

/// Named characters that `striptags` knows. HTML has two thousand, some of which need no semicolon.
const NAMED: [(&str, char); 6] =
    [("amp", '&'), ("lt", '<'), ("gt", '>'), ("quot", '"'), ("apos", '\''), ("nbsp", '\u{a0}')];

/// `urlencode`: a string quoted for a path, a dict or pairs as a query.
pub(super) fn url_encode(budget: &Budget, given: &[Value]) -> Outcome {
    let [value] = bind("urlencode", [""], given)?;
    if value.as_str().is_some() || python::check_iterable(&value).is_err() {
        return quoted(budget, &value, false).map(Value::from);
    }
    let mut query = String::new();
    let mut add = |key: &Value, item: &Value| -> Result<(), Error> {
        if !query.is_empty() {
            query.push('&');
        }
        query.push_str(&quoted(budget, key, true)?);
        query.push('=');
        query.push_str(&quoted(budget, item, true)?);
        budget.room(query.len())
    };
    budget.glance(&value)?;
    for entry in value.try_iter()? {
        budget.visit()?;
        if value.kind() == ValueKind::Map {
            add(&entry, &value.get_item(&entry)?)?;
            continue;
        }
        python::check_iterable(&entry)?;
        budget.glance(&entry)?;
        let mut parts = entry.try_iter()?;
        match (parts.next(), parts.next(), parts.next()) {
            (Some(key), Some(item), None) => add(&key, &item)?,
            _ => return Err(invalid("urlencode: an item is no pair")),
        }
    }
    Ok(Value::from(query))
}

fn quoted(budget: &Budget, value: &Value, for_query: bool) -> Result<String, Error> {
    let text = python::str(budget, value)?;
    budget.characters(&text)?;
    budget.string(text.len().saturating_mul(3))?;
    if for_query {
        // A plus of the text's own is quoted, so each that is here now stands for a space.
        return Ok(utf8_percent_encode(&text, QUERY).to_string().replace(' ', "+"));
    }
    Ok(utf8_percent_encode(&text, PATH).to_string())
}

/// `xmlattr`: a dict as attributes of a tag, without those that are none.
pub(super) fn xml_attributes(budget: &Budget, given: &[Value]) -> Result<String, Error> {
    let [entries, with_space] = bind("xmlattr", ["", "autospace"], given)?;
    if entries.kind() != ValueKind::Map {
        return Err(invalid(format!("xmlattr needs a dict, not a {}", python::type_name(&entries))));
    }
    let with_space = given.len() < 2 || arguments::flag(&with_space);
    let mut written = String::new();
    for key in entries.try_iter()? {
        budget.visit()?;
        let value = entries.get_item(&key)?;
        if value.is_none() || value.is_undefined() {
            continue;
        }
        let name = arguments::text("xmlattr", &key)?;
        budget.characters(name)?;
        if name.contains([' ', '\t', '\n', '\r', '\x0b', '\x0c', '/', '>', '=']) {
            return Err(invalid(format!("xmlattr: a character that no name has in {name:?}")));
        }
        if with_space || !written.is_empty() {
            written.push(' ');
        }
        written.push_str(&escaped(budget, &key)?);
        written.push_str("=\"");
        written.push_str(&escaped(budget, &value)?);
        written.push('"');
        budget.room(written.len())?;
    }
    Ok(written)
}

fn escaped(budget: &Budget, value: &Value) -> Result<String, Error> {
    let text = python::str(budget, value)?;
    if value.is_safe() {
        return Ok(text);
    }
    budget.characters(&text)?;
    budget.string(text.len())?;
    Ok(python::escape(&text))
}

/// `striptags`: text without tags and comments, white space as single spaces, characters for their names.
pub(super) fn strip_tags(budget: &Budget, given: &[Value]) -> Outcome {
    let [value] = bind("striptags", [""], given)?;
    let text = python::str(budget, &value)?;
    budget.characters(&text)?;
    let mut without = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, tag)) = rest.split_once('<') {
        let (skipped, end) = if tag.starts_with("!--") { (3, "-->") } else { (0, ">") };
        let inside = tag.get(skipped..).unwrap_or_default();
        // What is never closed is no tag, and nothing behind it is looked at.
        let Some((_, after)) = inside.split_once(end) else { break };
        without.push_str(before);
        rest = after;
    }
    without.push_str(rest);
    let words: Vec<&str> = without.split(is_space).filter(|word| !word.is_empty()).collect();
    budget.list(words.len())?;
    let text = words.join(" ");
    budget.string(text.len())?;
    unescaped(&text).map(Value::from)
}

/// HTML's `&amp;`, `&#38;` and `&#x26;` as the characters that they stand for.
fn unescaped(text: &str) -> Result<String, Error> {
    let mut unescaped = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('&') {
        unescaped.push_str(before);
        if let Some(number) = after.strip_prefix('#') {
            let (digits, radix) = match number.strip_prefix(['x', 'X']) {
                Some(digits) => (digits, 16),
                None => (number, 10),
            };
            let tail = digits.trim_start_matches(|c: char| c.is_digit(radix));
            let digits = digits.get(..digits.len() - tail.len()).unwrap_or_default();
            if digits.is_empty() {
                unescaped.push('&');
                rest = after;
                continue;
            }
            rest = tail.strip_prefix(';').unwrap_or(tail);
            let significant = digits.trim_start_matches('0');
            let code = match significant.len() {
                0 => 0,
                1..=7 => u32::from_str_radix(significant, radix).unwrap_or(u32::MAX),
                _ => u32::MAX,
            };
            push_numbered(&mut unescaped, code)?;
            continue;
        }
        let name = after.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
        let named = NAMED.iter().find(|(known, _)| *known == name);
        match (named, after.get(name.len()..).and_then(|tail| tail.strip_prefix(';'))) {
            (Some((_, character)), Some(tail)) => {
                unescaped.push(*character);
                rest = tail;
            }
            _ if name.is_empty() => {
                unescaped.push('&');
                rest = after;
            }
            _ => return Err(invalid(format!("striptags: the character &{name:.20} is not supported"))),
        }
    }
    unescaped.push_str(rest);
    Ok(unescaped)
}

/// A character by its number, as HTML reads numbers that stand for none.
fn push_numbered(text: &mut String, code: u32) -> Result<(), Error> {
    match code {
        0 | 0xd800..=0xdfff | 0x11_0000.. => text.push('\u{fffd}'),
        0x0d => text.push('\r'),
        0x80..=0x9f => return Err(invalid("striptags: &#128; to &#159; are not supported")),
        0x01..=0x08 | 0x0b | 0x0e..=0x1f | 0x7f | 0xfdd0..=0xfdef => {}
        code if code & 0xfffe == 0xfffe => {}
        code => text.extend(char::from_u32(code)),
    }
    Ok(())
}

/// `filesizeformat`: a number of bytes for people, with one digit behind the point.
pub(super) fn file_size(budget: &Budget, given: &[Value]) -> Outcome {
    let [value, binary] = bind("filesizeformat", ["", "binary"], given)?;
    let bytes = match (value.as_str(), integer(&value), python::float(&value)) {
        (Some(text), ..) => {
            budget.characters(text)?;
            super::scalars::parse_float(text)
        }
        (_, Some(number), _) => Some(number as f64),
        (.., number) => number,
    };
    let kind = python::type_name(&value);
    let bytes = bytes.ok_or_else(|| invalid(format!("filesizeformat: this {kind} is no number")))?;
    let is_binary = arguments::flag(&binary);
    let base: u128 = if is_binary { 1024 } else { 1000 };
    if bytes == 1.0 {
        return Ok(Value::from("1 Byte"));
    }
    if bytes < base as f64 {
        if bytes.is_infinite() {
            return Err(invalid("filesizeformat: infinity is no integer"));
        }
        return Ok(Value::from(format!("{:.0} Bytes", bytes.trunc() + 0.0)));
    }
    // The last unit takes what is beyond it.
    let (mut unit, mut prefix) = (base * base, 'K');
    for larger in "MGTPEZY".chars() {
        if (bytes as u128) < unit && !bytes.is_nan() {
            break;
        }
        unit *= base;
        prefix = larger;
    }
    let number = base as f64 * bytes / unit as f64;
    let number = if number.is_finite() { format!("{number:.1}") } else { python::float_repr(number) };
    let prefix = if is_binary || prefix != 'K' { prefix } else { 'k' };
    Ok(Value::from(format!("{number} {prefix}{}", if is_binary { "iB" } else { "B" })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let cases = [
            (1.0, "1 Byte"),
            (999.9, "999 Bytes"),
            (1e3, "1.0 kB"),
            (1.5e6, "1.5 MB"),
            (1e30, "1000000.0 YB"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(file_size(&Budget::default(), &[bytes.into()]).unwrap(), expected.into());
        }
        let binary = file_size(&Budget::default(), &[2048.into(), true.into()]).unwrap();
        assert_eq!(binary, "2.0 KiB".into());
    }

    #[test]
    fn tags_go_and_characters_are_read() {
        let strip = |text: &str| strip_tags(&Budget::default(), &[text.into()]);
        assert_eq!(strip("<p>a  &amp;&#x26;</p> <!-- > -->b < c").unwrap(), "a && b < c".into());
        assert!(strip("&hearts;").is_err());
    }
}
