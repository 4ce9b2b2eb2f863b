//! Python's `format(value, spec)` of strings and numbers. minijinja writes the digits.

use minijinja::formatting::{FormatStyle, format as format_values};
use minijinja::value::ValueKind;
use minijinja::{Error, Value};

use super::budget::Budget;
use super::operators::{self, invalid};
use super::printf::MAX_WIDTH;
use super::python;

/// How a field is written: `[[fill]align][sign][z][#][0][width][grouping][.precision][type]`.
struct Spec<'s> {
    fill: char,
    align: Option<char>,
    /// Sign, `z` and `#`.
    flags: &'s str,
    width: usize,
    grouping: &'s str,
    precision: Option<usize>,
    kind: Option<char>,
}

impl<'s> Spec<'s> {
    fn parse(spec: &'s str, pads_left: bool) -> Option<Self> {
        let is_align = |c: char| "<>=^".contains(c);
        let mut characters = spec.chars();
        let (first, second) = (characters.next(), characters.next());
        let (fill, align, rest) = match (first, second) {
            (Some(fill), Some(align)) if is_align(align) => (Some(fill), Some(align), characters.as_str()),
            (Some(align), _) if is_align(align) => (None, Some(align), spec.get(1..)?),
            _ => (None, None, spec),
        };
        let after = rest.strip_prefix(['+', '-', ' ']).unwrap_or(rest);
        let after = after.strip_prefix('z').unwrap_or(after);
        let after = after.strip_prefix('#').unwrap_or(after);
        let flags = rest.get(..rest.len() - after.len())?;
        let has_zero = fill.is_none() && after.starts_with('0');
        let fill = fill.unwrap_or(if has_zero { '0' } else { ' ' });
        let align = align.or((has_zero && pads_left).then_some('='));
        let number = |text: &'s str| {
            let rest = text.trim_start_matches(|c: char| c.is_ascii_digit());
            (text.get(..text.len() - rest.len()).unwrap_or_default(), rest)
        };
        let (width, rest) = number(after);
        let width = if width.is_empty() { 0 } else { width.parse().unwrap_or(usize::MAX) };
        let after = rest.strip_prefix([',', '_']).unwrap_or(rest);
        let grouping = rest.get(..rest.len() - after.len())?;
        let (precision, rest) = match after.strip_prefix('.').map(number) {
            Some(("", _)) => return None,
            Some((digits, rest)) => (Some(digits.parse().unwrap_or(usize::MAX)), rest),
            None => (None, after),
        };
        let mut kinds = rest.chars();
        let kind = kinds.next();
        kinds.next().is_none().then_some(Self { fill, align, flags, width, grouping, precision, kind })
    }
}

/// Python's `format(value, spec)`, where `spec` says something.
pub(super) fn format(budget: &Budget, value: &Value, spec: &str) -> Result<String, Error> {
    let value = match value.kind() {
        ValueKind::Bool => &Value::from(i64::from(value.is_true())),
        ValueKind::String | ValueKind::Number => value,
        _ => {
            let kind = python::type_name(value);
            return Err(invalid(format!("format: a value of type {kind} can only be put in as it is")));
        }
    };
    let refused = || invalid(format!("format: {spec:.100?} says nothing of a {}", python::type_name(value)));
    let spec = Spec::parse(spec, value.as_str().is_none()).ok_or_else(refused)?;
    if spec.width > MAX_WIDTH || spec.precision.is_some_and(|precision| precision > MAX_WIDTH) {
        return Err(invalid(format!("format: a width beyond {MAX_WIDTH} is not supported")));
    }
    let formatted = match value.as_str() {
        Some(text) => {
            let is_number = spec.align == Some('=') || !spec.flags.is_empty() || !spec.grouping.is_empty();
            if is_number || !matches!(spec.kind, None | Some('s')) {
                return Err(refused());
            }
            budget.characters(text)?;
            let end = spec.precision.and_then(|count| text.char_indices().nth(count));
            padded(&spec, text.get(..end.map_or(text.len(), |(at, _)| at)).unwrap_or_default(), '<')
        }
        None => format_number(&spec, value)?.ok_or_else(refused)?,
    };
    budget.string(formatted.len())?;
    Ok(formatted)
}

/// A number as `spec` says; `None` if it says nothing of such numbers.
fn format_number(spec: &Spec<'_>, value: &Value) -> Result<Option<String>, Error> {
    let is_float = python::float(value).is_some();
    let is_whole = !is_float && matches!(spec.kind, None | Some('b' | 'c' | 'd' | 'n' | 'o' | 'x' | 'X'));
    let is_real = is_float || matches!(spec.kind, Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%'));
    let is_grouped = !spec.grouping.is_empty();
    let fits = match spec.kind {
        Some('n') => !is_grouped,
        Some('b' | 'o' | 'x' | 'X') => !is_float && spec.grouping != ",",
        Some('c') => !is_float && !is_grouped && spec.flags.is_empty(),
        Some('d') => !is_float,
        None => true,
        _ => is_real && spec.kind != Some('s'),
    };
    if !fits || (is_whole && (spec.precision.is_some() || spec.flags.contains('z'))) {
        return Ok(None);
    }
    if spec.flags.contains('z') || (spec.flags.contains('#') && (is_float || is_real)) {
        return Err(invalid("format: z, and # with a float, are not supported"));
    }
    if let (None, Some(precision), Some(number)) = (spec.kind, spec.precision, python::float(value)) {
        let kind = match digits_of_exponent(number, precision.max(1)) {
            Some(digits) => Some(('e', digits)),
            None if number == 0.0 => Some(('f', 1)),
            None => None,
        };
        if let Some((kind, precision)) = kind {
            let spec = Spec { kind: Some(kind), precision: Some(precision), ..*spec };
            return format_number(&spec, value);
        }
    }
    let is_percentage = spec.kind == Some('%');
    let (value, kind) = match spec.kind {
        Some('%') => {
            (Value::from(operators::number(value).map_or(f64::NAN, |number| number.float()) * 100.0), "f")
        }
        Some('n') => (value.clone(), if is_float { "g" } else { "d" }),
        Some(kind) if is_real && !is_float => {
            let value = operators::number(value).map_or(f64::NAN, |number| number.float());
            return format_number(&Spec { kind: Some(kind), ..*spec }, &Value::from(value));
        }
        Some(kind) => (value.clone(), &*kind.to_string()),
        None => (value.clone(), ""),
    };
    // Zeros in front are in groups too.
    let zeros = match (is_grouped, spec.fill, spec.align) {
        (true, '0', Some('=')) => format!("0{}", spec.width.saturating_sub(usize::from(is_percentage))),
        _ => String::new(),
    };
    let precision = spec.precision.map_or_else(String::new, |precision| format!(".{precision}"));
    let inner = format!("{{:{}{zeros}{}{precision}{kind}}}", spec.flags, spec.grouping);
    let mut number = format_values(FormatStyle::StrFormat, &inner, &[value])?;
    if is_percentage {
        number.push('%');
    }
    Ok(Some(padded(spec, &number, '>')))
}

/// How many digits follow the point of a float that has an exponent only because the type is left out: its
/// last significant digit of `precision` is that of the ones, and a digit behind the point is not to be made up.
fn digits_of_exponent(number: f64, precision: usize) -> Option<usize> {
    let scientific = format!("{:.*e}", precision - 1, number);
    let (mantissa, exponent) = scientific.split_once('e')?;
    let has_exponent = usize::try_from(exponent.parse::<i32>().ok()?).ok()? + 1 == precision;
    let digits = mantissa.split_once('.').map_or("", |(_, digits)| digits).trim_end_matches('0');
    has_exponent.then_some(digits.len())
}

/// `text` in the width of `spec`; between the sign or base of a number and its digits, where it says so.
fn padded(spec: &Spec<'_>, text: &str, align: char) -> String {
    let missing = spec.width.saturating_sub(text.chars().count());
    let fill = |count: usize| spec.fill.to_string().repeat(count);
    match spec.align.unwrap_or(align) {
        '<' => text.to_owned() + &fill(missing),
        '^' => [&fill(missing / 2), text, &fill(missing - missing / 2)].concat(),
        '=' => {
            let digits = text.strip_prefix(['+', '-', ' ']).unwrap_or(text);
            let has_base = spec.flags.contains('#') && matches!(spec.kind, Some('b' | 'o' | 'x' | 'X'));
            let digits = if has_base { digits.get(2..).unwrap_or_default() } else { digits };
            let sign = text.get(..text.len() - digits.len()).unwrap_or_default();
            [sign, &fill(missing), digits].concat()
        }
        _ => fill(missing) + text,
    }
}
