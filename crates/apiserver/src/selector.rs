//! Label and field selectors, as text from a query and as objects from a spec.
//!
//! No text makes the parsers panic; what they do not understand is an error that shows the part.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::fields::{at, items, text};

/// How many requirements one selector may have.
const REQUIREMENTS_MAX: usize = 256;

/// Why a selector cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// A requirement has no form that the API knows.
    #[error(
        "unable to parse requirement {0:?}: write key=value, key!=value, key in (a,b), key notin (a,b), key or !key"
    )]
    Requirement(String),
    /// A label key is not one.
    #[error(
        "{0:?} is not a label key: letters, digits, '-', '_' and '.', at most 63, after an optional DNS prefix and '/'"
    )]
    Key(String),
    /// An operator in a selector object is not one.
    #[error("{0:?} is not a label selector operator: use In, NotIn, Exists or DoesNotExist")]
    Operator(String),
    /// `In` and `NotIn` need values.
    #[error("the requirement on {0:?} needs at least one value")]
    NoValues(String),
    /// There are too many requirements.
    #[error("the selector has more than {REQUIREMENTS_MAX} requirements")]
    TooMany,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    In(String, BTreeSet<String>),
    NotIn(String, BTreeSet<String>),
    Exists(String),
    Absent(String),
}

/// A condition on labels. The empty selector matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
    matches_nothing: bool,
}

impl LabelSelector {
    /// Reads the text of a `labelSelector` query.
    pub fn parse(selector: &str) -> Result<LabelSelector, SelectorError> {
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(selector) {
            let part = part.trim();
            if part.is_empty() {
                if selector.trim().is_empty() {
                    break;
                }
                return Err(SelectorError::Requirement(selector.to_owned()));
            }
            requirements.push(parse_requirement(part)?);
            if requirements.len() > REQUIREMENTS_MAX {
                return Err(SelectorError::TooMany);
            }
        }
        Ok(LabelSelector { requirements, matches_nothing: false })
    }

    /// Reads a selector of a spec: `matchLabels` and `matchExpressions`, or the plain map of a Service.
    ///
    /// No selector at all (null) matches nothing, an empty one everything, as in Kubernetes.
    pub fn from_object(selector: &Value) -> Result<LabelSelector, SelectorError> {
        let Value::Object(map) = selector else {
            return Ok(LabelSelector { requirements: Vec::new(), matches_nothing: true });
        };
        let is_full = at(selector, "matchLabels").is_object() || at(selector, "matchExpressions").is_array();
        let labels = if is_full { at(selector, "matchLabels").as_object() } else { Some(map) };
        let mut requirements = Vec::new();
        for (key, value) in labels.into_iter().flatten() {
            let value = value.as_str().ok_or_else(|| SelectorError::NoValues(key.clone()))?;
            requirements.push(Requirement::In(checked_key(key)?, BTreeSet::from([value.to_owned()])));
        }
        let expressions = if is_full { items(selector, "matchExpressions") } else { &[] };
        for expression in expressions {
            let key = checked_key(text(expression, "key"))?;
            let values: BTreeSet<String> = crate::fields::texts(expression, "values").map(str::to_owned).collect();
            requirements.push(match text(expression, "operator") {
                "In" | "NotIn" if values.is_empty() => return Err(SelectorError::NoValues(key)),
                "In" => Requirement::In(key, values),
                "NotIn" => Requirement::NotIn(key, values),
                "Exists" => Requirement::Exists(key),
                "DoesNotExist" => Requirement::Absent(key),
                other => return Err(SelectorError::Operator(other.to_owned())),
            });
        }
        if requirements.len() > REQUIREMENTS_MAX {
            return Err(SelectorError::TooMany);
        }
        Ok(LabelSelector { requirements, matches_nothing: false })
    }

    /// Whether an object with these `metadata.labels` is selected.
    pub fn matches(&self, labels: &Value) -> bool {
        let value = |key: &str| labels.get(key).and_then(Value::as_str);
        !self.matches_nothing
            && self.requirements.iter().all(|requirement| match requirement {
                Requirement::In(key, values) => value(key).is_some_and(|value| values.contains(value)),
                // An absent label is not among the values: `!=` and `notin` select it.
                Requirement::NotIn(key, values) => value(key).is_none_or(|value| !values.contains(value)),
                Requirement::Exists(key) => value(key).is_some(),
                Requirement::Absent(key) => value(key).is_none(),
            })
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty() && !self.matches_nothing
    }
}

fn parse_requirement(part: &str) -> Result<Requirement, SelectorError> {
    let bad = || SelectorError::Requirement(part.to_owned());
    if let Some(open) = part.find('(') {
        let inside = part[open + 1..].strip_suffix(')').ok_or_else(bad)?;
        let mut words = part[..open].split_whitespace();
        let (Some(key), Some(operator), None) = (words.next(), words.next(), words.next()) else { return Err(bad()) };
        if inside.contains(['(', ')']) {
            return Err(bad());
        }
        let key = checked_key(key)?;
        let values = inside.split(',').map(|value| checked_value(value, part)).collect::<Result<_, _>>()?;
        return match operator {
            "in" => Ok(Requirement::In(key, values)),
            "notin" => Ok(Requirement::NotIn(key, values)),
            _ => Err(bad()),
        };
    }
    if let Some((key, value)) = part.split_once("!=") {
        return Ok(Requirement::NotIn(checked_key(key)?, BTreeSet::from([checked_value(value, part)?])));
    }
    if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Ok(Requirement::In(checked_key(key)?, BTreeSet::from([checked_value(value, part)?])));
    }
    match part.strip_prefix('!') {
        Some(key) => Ok(Requirement::Absent(checked_key(key)?)),
        None => Ok(Requirement::Exists(checked_key(part)?)),
    }
}

fn checked_key(key: &str) -> Result<String, SelectorError> {
    let key = key.trim();
    if crate::admission::is_label_key(key) { Ok(key.to_owned()) } else { Err(SelectorError::Key(key.to_owned())) }
}

fn checked_value(value: &str, part: &str) -> Result<String, SelectorError> {
    let value = value.trim();
    if crate::admission::is_label_value(value) {
        Ok(value.to_owned())
    } else {
        Err(SelectorError::Requirement(part.to_owned()))
    }
}

fn split_outside_parentheses(selector: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0usize);
    for (index, character) in selector.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&selector[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&selector[start..]);
    parts
}

/// A condition on fields: `path=value` and `path!=value`, all of which must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FieldSelector {
    requirements: Vec<(String, bool, String)>,
}

impl FieldSelector {
    /// Reads the text of a `fieldSelector` query. A backslash escapes `,`, `=` and itself.
    pub fn parse(selector: &str) -> Result<FieldSelector, SelectorError> {
        let mut requirements = Vec::new();
        for part in split_unescaped(selector) {
            if part.is_empty() {
                continue;
            }
            let bad = || SelectorError::Requirement(part.to_owned());
            let operator = part.find("!=").map(|at| (at, 2, false));
            let equal = part.find("==").map(|at| (at, 2, true)).or_else(|| part.find('=').map(|at| (at, 1, true)));
            let first = [operator, equal].into_iter().flatten().min_by_key(|found| found.0);
            let (position, width, is_equal) = first.ok_or_else(bad)?;
            let path = part[..position].trim();
            if path.is_empty() {
                return Err(bad());
            }
            requirements.push((path.to_owned(), is_equal, unescape(&part[position + width..])));
            if requirements.len() > REQUIREMENTS_MAX {
                return Err(SelectorError::TooMany);
            }
        }
        Ok(FieldSelector { requirements })
    }

    /// Whether the object's fields are as asked. An absent field is the empty text.
    pub fn matches(&self, object: &Value) -> bool {
        self.requirements.iter().all(|(path, is_equal, wanted)| {
            let found = match at(object, path) {
                Value::String(text) => text.clone(),
                Value::Null => String::new(),
                other => other.to_string(),
            };
            (found == *wanted) == *is_equal
        })
    }

    /// The value that a path must have, if the selector fixes one: `metadata.name` makes a list a lookup.
    pub fn required(&self, path: &str) -> Option<&str> {
        self.requirements.iter().find(|it| it.0 == path && it.1).map(|it| it.2.as_str())
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty()
    }
}

fn split_unescaped(selector: &str) -> Vec<&str> {
    let (mut parts, mut start, mut is_escaped) = (Vec::new(), 0, false);
    for (index, character) in selector.char_indices() {
        if character == ',' && !is_escaped {
            parts.push(&selector[start..index]);
            start = index + 1;
        }
        is_escaped = character == '\\' && !is_escaped;
    }
    parts.push(&selector[start..]);
    parts
}

fn unescape(value: &str) -> String {
    let mut result = String::with_capacity(value.len());
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        result.push(if character == '\\' { characters.next().unwrap_or('\\') } else { character });
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn the_forms_of_kubectl() {
        let labels = json!({"app": "web", "tier": "front", "example.com/x": ""});
        for (selector, expected) in [
            ("", true),
            ("app=web", true),
            ("app == web , tier!=back", true),
            ("app in (db, web),!gone", true),
            ("app notin (web)", false),
            ("gone notin (web),gone!=x", true),
            ("example.com/x", true),
            ("example.com/x=", true),
            ("gone", false),
        ] {
            assert_eq!(LabelSelector::parse(selector).unwrap().matches(&labels), expected, "{selector}");
        }
        for selector in ["a b", "a in b", "a in (b", ",", "=x", "a==b=c", "a in (b) c", "!"] {
            assert!(LabelSelector::parse(selector).is_err(), "{selector}");
        }
    }

    #[test]
    fn the_objects_of_specs() {
        let selector = json!({"matchLabels": {"app": "web"}, "matchExpressions": [
            {"key": "tier", "operator": "In", "values": ["front", "middle"]},
            {"key": "gone", "operator": "DoesNotExist"}]});
        let selector = LabelSelector::from_object(&selector).unwrap();
        assert!(selector.matches(&json!({"app": "web", "tier": "front"})));
        assert!(!selector.matches(&json!({"app": "web"})));
        assert!(LabelSelector::from_object(&json!({"app": "web"})).unwrap().matches(&json!({"app": "web"})));
        assert!(LabelSelector::from_object(&json!({})).unwrap().matches(&Value::Null));
        assert!(!LabelSelector::from_object(&Value::Null).unwrap().matches(&json!({"app": "web"})));
        let unknown = json!({"matchExpressions": [{"key": "a", "operator": "Like", "values": ["b"]}]});
        assert_eq!(LabelSelector::from_object(&unknown), Err(SelectorError::Operator("Like".into())));
    }

    #[test]
    fn fields_by_path_with_escapes() {
        let pod = json!({"metadata": {"name": "a,b"}, "spec": {"nodeName": "n1"}, "status": {"phase": "Running"}, "count": 3});
        for (selector, expected) in [
            ("spec.nodeName=n1,status.phase!=Pending", true),
            ("metadata.name=a\\,b", true),
            ("metadata.namespace=", true),
            ("count==3", true),
            ("spec.nodeName!=n1", false),
        ] {
            assert_eq!(FieldSelector::parse(selector).unwrap().matches(&pod), expected, "{selector}");
        }
        assert!(FieldSelector::parse("spec.nodeName").is_err());
        assert_eq!(FieldSelector::parse("metadata.name=x").unwrap().required("metadata.name"), Some("x"));
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC{0,60}", close in "[a-z!=(), \\\\in]{0,40}") {
            for text in [text, close] {
                let _ = LabelSelector::parse(&text).map(|selector| selector.matches(&json!({"a": "b"})));
                let _ = FieldSelector::parse(&text).map(|selector| selector.matches(&json!({"a": "b"})));
            }
        }
    }
}
