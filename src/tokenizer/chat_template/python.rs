//! What templates expect of Python: how it writes floats and formats the time.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// The number in `value` if it is a float and not an integer.
pub(super) fn float(value: &Value) -> Option<f64> {
    if value.kind() == ValueKind::Number && !value.is_integer() {
        f64::try_from(value.clone()).ok()
    } else {
        None
    }
}

/// Python's `repr` of a float: the shortest digits that read back as the same number, with an exponent
/// below 1e-4 and from 1e16 on.
pub(super) fn float_repr(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number == 0.0 || (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `strftime_now(format)`: the local time, as Python's `datetime.now().strftime(format)`.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    strftime(format, &jiff::Zoned::now())
}

fn strftime(format: &str, time: &jiff::Zoned) -> Result<String, Error> {
    // Python passes on what it does not know.
    let config = jiff::fmt::strtime::Config::new().lenient(true);
    let mut text = String::new();
    jiff::fmt::strtime::BrokenDownTime::from(time)
        .format_with_config(&config, format, &mut text)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (123_456.789, "123456.789"),
            (f64::INFINITY, "inf"),
        ];
        for (number, expected) in cases {
            assert_eq!(float_repr(number), expected);
        }
    }

    #[test]
    fn the_time_is_formatted_as_python_formats_it() {
        let time: jiff::Zoned = "2024-07-06T08:09:05+02:00[Europe/Berlin]".parse().unwrap_or_else(|_| {
            jiff::civil::date(2024, 7, 6).at(8, 9, 5, 0).to_zoned(jiff::tz::TimeZone::UTC).unwrap()
        });
        assert_eq!(strftime("%d %b %Y", &time).unwrap(), "06 Jul 2024");
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S", &time).unwrap(), "2024-07-06 08:09:05");
        assert_eq!(strftime("%A, %B %-d, %Y %j %%", &time).unwrap(), "Saturday, July 6, 2024 188 %");
    }
}
