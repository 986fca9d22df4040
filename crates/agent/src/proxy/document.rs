//! A `KubeProxyConfiguration` (kubeproxy.config.k8s.io/v1alpha1) as a flat list of fields.
//!
//! Every field is known by its path, such as `conntrack.maxPerCore`. The section `proxy` of the agent's own
//! file may say the same fields again, and is right where both speak. Whoever reads a field takes it out, so
//! that what is left in the end is what nobody knows.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde_json::Value;

use super::duration;
use crate::config::{ConfigError, read};

/// The version that kube-proxy has had since 1.9 and has still.
const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";

const KIND: &str = "KubeProxyConfiguration";

/// One value that is no mapping, and the file that says it.
#[derive(Debug, Clone, PartialEq)]
struct Field {
    value: Value,
    /// Whether the agent's own file says it, under `proxy`.
    is_own: bool,
}

/// The fields that are not read yet.
#[derive(Debug, Clone, Default)]
pub struct Document {
    /// The `KubeProxyConfiguration`, if there is one.
    file: Option<PathBuf>,
    /// The agent's own file.
    own_file: PathBuf,
    fields: BTreeMap<String, Field>,
}

impl Document {
    /// Nothing said.
    pub fn empty(own_file: &Path) -> Document {
        Document { own_file: own_file.to_path_buf(), ..Document::default() }
    }

    /// Reads a `KubeProxyConfiguration` file. The agent's own file is named in messages about `proxy`.
    pub fn load(path: &Path, own_file: &Path) -> Result<Document, ConfigError> {
        let value: Value = read(path)?;
        let wrong = |field: &str, reason: String| ConfigError::Field {
            path: path.to_path_buf(),
            field: field.to_owned(),
            reason,
        };
        if !value.is_object() {
            return Err(wrong("kind", format!("the file holds no mapping: give a {KIND}")));
        }
        for (field, expected) in [("apiVersion", API_VERSION), ("kind", KIND)] {
            let found = value.get(field).and_then(Value::as_str).unwrap_or_default();
            if found != expected {
                return Err(wrong(field, format!("`{found}` is not what kube-proxy reads: it must be {expected}")));
            }
        }
        let mut document = Document { file: Some(path.to_path_buf()), ..Document::empty(own_file) };
        document.add(&value, false);
        document.fields.remove("apiVersion");
        document.fields.remove("kind");
        Ok(document)
    }

    /// Whether a `KubeProxyConfiguration` was read: its defaults are kube-proxy's then.
    pub fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// Lays the section `proxy` of the agent's own file over what was read.
    pub fn overlay(&mut self, section: &Value) {
        self.add(section, true);
    }

    fn add(&mut self, value: &Value, is_own: bool) {
        let mut found = Vec::new();
        flatten(value, String::new(), &mut found);
        self.fields.extend(found.into_iter().map(|(path, value)| (path, Field { value, is_own })));
    }

    /// An error that names the file and the field.
    pub(super) fn wrong(&self, path: &str, is_own: bool, reason: String) -> ConfigError {
        let file = if is_own { &self.own_file } else { self.file.as_ref().unwrap_or(&self.own_file) };
        let field = if is_own { format!("proxy.{path}") } else { path.to_owned() };
        ConfigError::Field { path: file.clone(), field, reason }
    }

    /// Takes a field out and reads it.
    fn take<T>(
        &mut self,
        path: &str,
        expected: impl fmt::Display,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(field) = self.fields.remove(path) else { return Ok(None) };
        match read(&field.value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.wrong(path, field.is_own, format!("`{}` is not {expected}", Shown(&field.value)))),
        }
    }

    /// A text. The empty one stands for none, as it does for kube-proxy.
    pub(super) fn text(&mut self, path: &str) -> Result<Option<String>, ConfigError> {
        let text = self.take(path, "a text", |value| value.as_str().map(str::to_owned))?;
        Ok(text.filter(|text| !text.is_empty()))
    }

    /// A text that means something. The empty one stands for none.
    pub(super) fn parsed<T: FromStr>(&mut self, path: &str, expected: &str) -> Result<Option<T>, ConfigError> {
        self.chosen(path, expected, |text| text.parse().ok())
    }

    /// The same, by a function.
    pub(super) fn chosen<T>(
        &mut self,
        path: &str,
        expected: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let value = self.take(path, expected, |value| match value.as_str()? {
            "" => Some(None),
            text => read(text).map(Some),
        })?;
        Ok(value.flatten())
    }

    /// Yes or no.
    pub(super) fn flag(&mut self, path: &str) -> Result<Option<bool>, ConfigError> {
        self.take(path, "true or false", Value::as_bool)
    }

    /// A whole number within bounds.
    pub(super) fn number(&mut self, path: &str, least: u32, most: u32) -> Result<Option<u32>, ConfigError> {
        self.take(path, format_args!("a number from {least} to {most}"), |value| {
            value.as_u64().and_then(|it| u32::try_from(it).ok()).filter(|it| (least..=most).contains(it))
        })
    }

    /// A duration as Go writes it.
    pub(super) fn duration(&mut self, path: &str) -> Result<Option<Duration>, ConfigError> {
        self.take(path, "a duration such as 30s, 1m or 2h22m", |value| duration::parse(value.as_str()?))
    }

    /// A list of texts that each mean something.
    pub(super) fn list<T>(
        &mut self,
        path: &str,
        expected: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ConfigError> {
        self.take(path, format_args!("a list of {expected}"), |value| {
            value.as_array()?.iter().map(|item| item.as_str().and_then(&read)).collect()
        })
    }

    /// What nobody took, with whether the agent's own file says it.
    pub(super) fn rest(self) -> impl Iterator<Item = (String, Value, bool)> {
        self.fields.into_iter().map(|(path, field)| (path, field.value, field.is_own))
    }
}

/// All values that are no mappings, with their paths. Null is as good as absent.
fn flatten(value: &Value, path: String, found: &mut Vec<(String, Value)>) {
    match value {
        Value::Null => {}
        Value::Object(fields) => {
            for (name, value) in fields {
                let inner = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                flatten(value, inner, found);
            }
        }
        _ => found.push((path, value.clone())),
    }
}

/// A value as a person wrote it, shortened.
pub(super) struct Shown<'a>(pub(super) &'a Value);

/// Characters of a wrong value that a message repeats.
const SHOWN_MAX: usize = 60;

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.as_str().map_or_else(|| self.0.to_string(), str::to_owned);
        match text.char_indices().nth(SHOWN_MAX) {
            Some((end, _)) => write!(f, "{}…", text.get(..end).unwrap_or_default()),
            None => f.write_str(&text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn document(value: &Value) -> Document {
        let mut document = Document::empty(Path::new("agent.yaml"));
        document.overlay(value);
        document
    }

    #[test]
    fn a_field_is_taken_once_and_what_is_left_is_known_by_its_path() {
        let mut document =
            document(&json!({"iptables": {"masqueradeBit": 14, "masqueradeBits": 3, "masqueradeAll": null}}));
        assert_eq!(document.number("iptables.masqueradeBit", 0, 31).unwrap(), Some(14));
        assert_eq!(document.flag("iptables.masqueradeAll").unwrap(), None);
        let rest: Vec<String> = document.rest().map(|(path, _, _)| path).collect();
        assert_eq!(rest, ["iptables.masqueradeBits"]);
    }

    #[test]
    fn a_wrong_value_is_said_with_its_file_and_field() {
        let mut document = document(&json!({"iptables": {"masqueradeBit": 32}, "ipvs": {"syncPeriod": "soon"}}));
        let error = document.number("iptables.masqueradeBit", 0, 31).unwrap_err().to_string();
        assert!(
            error.contains("agent.yaml: proxy.iptables.masqueradeBit: `32` is not a number from 0 to 31"),
            "{error}"
        );
        let error = document.duration("ipvs.syncPeriod").unwrap_err().to_string();
        assert!(error.contains("proxy.ipvs.syncPeriod: `soon` is not a duration"), "{error}");
    }
}
