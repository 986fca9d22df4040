//! JSON as Go's `encoding/json` reads and writes it, as far as Flannel's values go.
//!
//! Reading: field names match whatever their case, the last of several wins, `null` leaves a field as it
//! was. Writing: no spaces, and `<`, `>`, `&`, U+2028 and U+2029 are escaped.

use serde_json::{Map, Value};

/// A JSON object whose fields are taken one by one; what is left over is unknown.
pub(super) struct Fields {
    fields: Map<String, Value>,
}

/// A field has another type than it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WrongType {
    pub(super) field: &'static str,
    pub(super) wanted: &'static str,
    pub(super) found: String,
}

impl Fields {
    pub(super) fn new(fields: Map<String, Value>) -> Fields {
        Fields { fields }
    }

    /// Takes a field out, unless it is absent or `null`.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        let names: Vec<String> = self.fields.keys().filter(|key| key.eq_ignore_ascii_case(name)).cloned().collect();
        let taken = names.iter().filter_map(|key| self.fields.shift_remove(key));
        taken.filter(|value| !value.is_null()).last()
    }

    pub(super) fn text(&mut self, field: &'static str) -> Result<Option<String>, WrongType> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(WrongType { field, wanted: "a text", found: shorten(&other) }),
        }
    }

    pub(super) fn boolean(&mut self, field: &'static str) -> Result<Option<bool>, WrongType> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(WrongType { field, wanted: "true or false", found: shorten(&other) }),
        }
    }

    pub(super) fn number(&mut self, field: &'static str) -> Result<Option<i64>, WrongType> {
        match self.take(field) {
            None => Ok(None),
            Some(value) => match value.as_i64() {
                Some(number) => Ok(Some(number)),
                None => Err(WrongType { field, wanted: "a whole number", found: shorten(&value) }),
            },
        }
    }

    /// The names that nobody took, sorted.
    pub(super) fn unknown(self) -> Vec<String> {
        let mut names: Vec<String> = self.fields.into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    }
}

/// As much of a value as fits a message.
pub(super) fn shorten(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The text of a value, byte for byte as Go writes it.
pub(super) fn compact(value: &Value) -> String {
    let text = value.to_string();
    let mut escaped = String::with_capacity(text.len());
    // Outside of strings none of these occur in JSON.
    for character in text.chars() {
        match character {
            '<' => escaped.push_str("\\u003c"),
            '>' => escaped.push_str("\\u003e"),
            '&' => escaped.push_str("\\u0026"),
            '\u{2028}' => escaped.push_str("\\u2028"),
            '\u{2029}' => escaped.push_str("\\u2029"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        let Value::Object(map) = value else { panic!("not an object") };
        Fields::new(map)
    }

    #[test]
    fn names_match_in_any_case_and_the_last_wins() {
        let mut it = fields(json!({"vni": 1, "VNI": 2, "Port": null, "other": true}));
        assert_eq!(it.number("VNI"), Ok(Some(2)));
        assert_eq!(it.number("Port"), Ok(None));
        assert_eq!(it.unknown(), ["other"]);
    }

    #[test]
    fn a_wrong_type_says_what_was_found() {
        let mut it = fields(json!({"Port": "8472", "GBP": 1, "Mode": [1]}));
        assert_eq!(it.number("Port").unwrap_err().found, "\"8472\"");
        assert_eq!(it.boolean("GBP").unwrap_err().wanted, "true or false");
        assert_eq!(it.text("Mode").unwrap_err().field, "Mode");
    }

    #[test]
    fn text_is_escaped_as_go_does() {
        assert_eq!(compact(&json!({"a": "<b>&\u{2028}\n\u{1}é"})), r#"{"a":"\u003cb\u003e\u0026\u2028\n\u0001é"}"#);
    }
}
