//! Reading and writing fields of objects that are kept as JSON.
//!
//! It promises that a missing or mistyped field reads as "nothing there", so that the pure parts
//! never panic on what a client sent, and that times go to and from RFC 3339 without a clock.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

static NOTHING: Value = Value::Null;

/// The characters that Kubernetes uses for generated suffixes: no vowels, so no words.
const SUFFIX_ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// The value at a dotted path of field names, or null.
pub(crate) fn at<'a>(value: &'a Value, path: &str) -> &'a Value {
    path.split('.').try_fold(value, |value, field| value.get(field)).unwrap_or(&NOTHING)
}

/// The text at a path, or the empty string.
pub(crate) fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    at(value, path).as_str().unwrap_or("")
}

/// The whole number at a path.
pub(crate) fn number(value: &Value, path: &str) -> Option<i64> {
    at(value, path).as_i64()
}

/// The truth value at a path; absent is false.
pub(crate) fn flag(value: &Value, path: &str) -> bool {
    at(value, path).as_bool().unwrap_or(false)
}

/// The elements of the list at a path; absent is empty.
pub(crate) fn items<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    at(value, path).as_array().map_or(&[], Vec::as_slice)
}

/// The texts in the list at a path.
pub(crate) fn texts<'a>(value: &'a Value, path: &str) -> impl Iterator<Item = &'a str> {
    items(value, path).iter().filter_map(Value::as_str)
}

/// Sets the value at a dotted path and makes the objects on the way.
pub(crate) fn set(value: &mut Value, path: &str, new: Value) {
    let mut value = value;
    for field in path.split('.') {
        if !value.is_object() {
            *value = Value::Object(Map::new());
        }
        let Value::Object(map) = value else { return };
        value = map.entry(field).or_insert(Value::Null);
    }
    *value = new;
}

/// Sets the value at a path unless there is one already.
pub(crate) fn set_default(value: &mut Value, path: &str, new: impl Into<Value>) {
    if at(value, path).is_null() {
        set(value, path, new.into());
    }
}

/// Takes the field at a path out of its object.
pub(crate) fn remove(value: &mut Value, path: &str) {
    let (parent, field) = path.rsplit_once('.').unwrap_or(("", path));
    let parent = if parent.is_empty() {
        Some(value)
    } else {
        parent.split('.').try_fold(value, |value, field| value.get_mut(field))
    };
    if let Some(Value::Object(map)) = parent {
        map.shift_remove(field);
    }
}

/// `metadata.name`.
pub(crate) fn name(object: &Value) -> &str {
    text(object, "metadata.name")
}

/// `metadata.namespace`; empty for cluster-scoped objects.
pub(crate) fn namespace(object: &Value) -> &str {
    text(object, "metadata.namespace")
}

/// `metadata.uid`.
pub(crate) fn uid(object: &Value) -> &str {
    text(object, "metadata.uid")
}

/// The value of one label. Its key may hold dots, so a dotted path cannot name it.
pub(crate) fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    at(object, "metadata.labels").get(key).and_then(Value::as_str)
}

/// Whether somebody asked to delete the object.
pub(crate) fn is_terminating(object: &Value) -> bool {
    !at(object, "metadata.deletionTimestamp").is_null()
}

/// The uid of the owner that controls the object.
pub(crate) fn controller_uid(object: &Value) -> Option<&str> {
    let mut owners = items(object, "metadata.ownerReferences").iter();
    owners.find(|owner| flag(owner, "controller")).map(|owner| text(owner, "uid"))
}

/// The condition of one type in `status.conditions`.
pub(crate) fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    items(object, "status.conditions").iter().find(|condition| text(condition, "type") == kind)
}

/// Whether the condition of that type is `True`.
pub(crate) fn condition_holds(object: &Value, kind: &str) -> bool {
    condition(object, kind).is_some_and(|condition| text(condition, "status") == "True")
}

/// JSON with sorted keys: equal values have equal text, whatever order a client wrote them in.
pub(crate) fn canonical(value: &Value) -> String {
    fn sorted(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                let mut keys: Vec<_> = map.keys().collect();
                keys.sort();
                Value::Object(keys.into_iter().map(|key| (key.clone(), sorted(&map[key]))).collect())
            }
            Value::Array(list) => Value::Array(list.iter().map(sorted).collect()),
            other => other.clone(),
        }
    }
    sorted(value).to_string()
}

/// A suffix for a generated name: the same seed gives the same suffix.
pub(crate) fn suffix(seed: &str, length: usize) -> String {
    let digest = Sha256::digest(seed.as_bytes());
    digest
        .iter()
        .take(length)
        .map(|byte| char::from(SUFFIX_ALPHABET[usize::from(*byte) % SUFFIX_ALPHABET.len()]))
        .collect()
}

/// A name that fits in 63 characters together with its suffix.
pub(crate) fn generated_name(base: &str, suffix: &str) -> String {
    let kept: String = base.chars().take(62usize.saturating_sub(suffix.len())).collect();
    format!("{}-{suffix}", kept.trim_end_matches(['-', '.']))
}

/// Seconds since 1970 of an RFC 3339 time; the fraction is dropped.
pub(crate) fn parse_time(text: &str) -> Option<i64> {
    let digits = |range: std::ops::Range<usize>| text.get(range)?.parse::<i64>().ok();
    let (year, month, day) = (digits(0..4)?, digits(5..7)?, digits(8..10)?);
    let (hour, minute, second) = (digits(11..13)?, digits(14..16)?, digits(17..19)?);
    let rest = text.get(19..)?.trim_start_matches(|c: char| c == '.' || c.is_ascii_digit());
    let offset = match rest.as_bytes() {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), ..] => {
            let (hours, minutes) = rest.get(1..)?.split_once(':')?;
            if hours.len() != 2 || minutes.len() != 2 {
                return None;
            }
            let seconds = hours.parse::<i64>().ok()? * 3600 + minutes.parse::<i64>().ok()? * 60;
            if *sign == b'-' { -seconds } else { seconds }
        }
        _ => return None,
    };
    // Days from the civil date, with the year beginning in March so that a leap day comes last.
    let shifted_year = if month <= 2 { year - 1 } else { year };
    let era = shifted_year.div_euclid(400);
    let year_of_era = shifted_year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second - offset)
}

/// RFC 3339 in UTC with whole seconds, as Kubernetes writes `metav1.Time`.
pub(crate) fn format_time(seconds: i64) -> String {
    let days = seconds.div_euclid(86_400) + 719_468;
    let rest = seconds.rem_euclid(86_400);
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_have_the_values_that_the_field_knows() {
        assert_eq!(parse_time("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(parse_time("2024-02-29T12:30:45Z"), Some(1_709_209_845));
        assert_eq!(parse_time("2024-02-29T14:30:45.123456+02:00"), Some(1_709_209_845));
        assert_eq!(format_time(1_709_209_845), "2024-02-29T12:30:45Z");
        assert_eq!(parse_time("yesterday"), None);
        assert_eq!(parse_time("2024-02-29T12:30:45+9223372036854775807:00"), None);
    }

    #[test]
    fn a_suffix_depends_on_the_seed_alone() {
        assert_eq!(suffix("a", 5), suffix("a", 5));
        assert_ne!(suffix("a", 5), suffix("b", 5));
        assert_eq!(generated_name(&"x".repeat(80), "12345").len(), 63);
    }

    proptest! {
        #[test]
        fn a_time_survives_the_round_trip(seconds in 0i64..253_402_300_799) {
            prop_assert_eq!(parse_time(&format_time(seconds)), Some(seconds));
        }

        #[test]
        fn no_text_makes_the_time_parser_panic(text in "\\PC{0,40}") {
            let _ = parse_time(&text);
        }
    }
}
