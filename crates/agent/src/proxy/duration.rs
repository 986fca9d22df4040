//! Durations as Go writes them (`time.ParseDuration`): `1h30m`, `250ms`, `1.5h`, `0`.

use std::time::Duration;

/// Nanoseconds of each unit.
const UNITS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Digits after a point that can make a difference: a nanosecond of an hour has thirteen.
const FRACTION_DIGITS_MAX: usize = 13;

/// Reads a duration that is not negative; `None` for anything else, and beyond what Go holds (292 years).
pub(super) fn parse(text: &str) -> Option<Duration> {
    let text = text.strip_prefix('+').unwrap_or(text);
    if text == "0" {
        return Some(Duration::ZERO);
    }
    if text.is_empty() {
        return None;
    }
    let mut rest = text;
    let mut sum: u128 = 0;
    while !rest.is_empty() {
        let number_length = rest.find(|it: char| !it.is_ascii_digit() && it != '.').unwrap_or(rest.len());
        let (number, unit_and_rest) = rest.split_at(number_length);
        let unit_length =
            unit_and_rest.find(|it: char| it.is_ascii_digit() || it == '.').unwrap_or(unit_and_rest.len());
        let (unit, after) = unit_and_rest.split_at(unit_length);
        let nanoseconds =
            UNITS.iter().find(|(name, _)| *name == unit).map(|(_, nanoseconds)| u128::from(*nanoseconds))?;
        sum = sum.checked_add(scaled(number, nanoseconds)?)?;
        rest = after;
    }
    i64::try_from(sum).ok().and_then(|sum| u64::try_from(sum).ok()).map(Duration::from_nanos)
}

/// A decimal number of units, in nanoseconds.
fn scaled(number: &str, unit: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    if !fraction.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let (mut part, mut parts) = (0, 1);
    for digit in fraction.bytes().take(FRACTION_DIGITS_MAX) {
        part = part * 10 + u128::from(digit - b'0');
        parts *= 10;
    }
    // What is less than a nanosecond is dropped.
    whole.checked_mul(unit)?.checked_add(part * unit / parts)
}

/// Writes a duration as Go does (`Duration.String`), for whole milliseconds.
pub(super) fn render(duration: Duration) -> String {
    let (seconds, milliseconds) = (duration.as_secs(), duration.subsec_millis());
    if seconds == 0 {
        return if milliseconds == 0 { "0s".to_owned() } else { format!("{milliseconds}ms") };
    }
    let mut last = (seconds % 60).to_string();
    if milliseconds > 0 {
        last.push_str(format!(".{milliseconds:03}").trim_end_matches('0'));
    }
    match (seconds / 3600, seconds / 60 % 60) {
        (0, 0) => format!("{last}s"),
        (0, minutes) => format!("{minutes}m{last}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{last}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_go_reads_is_read() {
        let milliseconds = |text| parse(text).map(|it| it.as_millis());
        for (text, expected) in [
            ("0", Some(0)),
            ("0s", Some(0)),
            ("24h0m0s", Some(86_400_000)),
            ("1h30m", Some(5_400_000)),
            ("1.5h", Some(5_400_000)),
            (".5s", Some(500)),
            ("1.s", Some(1000)),
            ("250ms", Some(250)),
            ("1500us", Some(1)),
            ("+30s", Some(30_000)),
            ("-1s", None),
            ("30", None),
            ("", None),
            ("s", None),
            (".s", None),
            ("1d", None),
            ("1s ", None),
            ("1.2.3s", None),
            ("9999999999999h", None),
        ] {
            assert_eq!(milliseconds(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_written_reads_as_gos() {
        let text = |milliseconds| render(Duration::from_millis(milliseconds));
        assert_eq!([text(0), text(250), text(30_000)], ["0s", "250ms", "30s"]);
        assert_eq!([text(86_400_000), text(90_500), text(3_600_000)], ["24h0m0s", "1m30.5s", "1h0m0s"]);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,20}") {
            let _ = parse(&text);
        }

        #[test]
        fn what_is_written_is_read(milliseconds in 0u64..1 << 43) {
            let duration = Duration::from_millis(milliseconds);
            prop_assert_eq!(parse(&render(duration)), Some(duration));
        }
    }
}
