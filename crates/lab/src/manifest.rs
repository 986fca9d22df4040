//! Manifests: YAML with many documents, checked as a whole before anything is created.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{LabError, Result};

mod kinds;
pub use kinds::{Kind, Kinds};

/// One object of a manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Where it stands: file, document and, within a List, item.
    pub origin: String,
    /// How the API calls its kind.
    pub kind: Kind,
    /// Its namespace; empty if its kind has none.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The object.
    pub object: Value,
}

impl Manifest {
    /// Kind, namespace and name.
    pub fn title(&self) -> String {
        if self.namespace.is_empty() {
            format!("{} {}", self.kind.kind, self.name)
        } else {
            format!("{} {}/{}", self.kind.kind, self.namespace, self.name)
        }
    }
}

/// What a set of manifests holds.
#[derive(Debug, Default)]
pub struct Manifests {
    /// The objects, in the order in which they are created.
    pub objects: Vec<Manifest>,
    /// What is legal but probably not meant.
    pub warnings: Vec<String>,
}

/// Reads manifests, each with the name of its file.
///
/// # Errors
/// With the first document that cannot be used: file, document, object and field.
pub fn parse(files: &[(String, String)]) -> Result<Manifests> {
    let mut raw = Vec::new();
    for (file, text) in files {
        raw.extend(documents(file, text)?);
    }
    let kinds = Kinds::with_definitions(raw.iter().map(|(_, object)| object));
    let mut objects = Vec::new();
    let mut seen: BTreeMap<(String, String, String, String), String> = BTreeMap::new();
    for (origin, object) in raw {
        let manifest = identify(&kinds, origin, object)?;
        let key = (
            manifest.kind.group_version.clone(),
            manifest.kind.kind.clone(),
            manifest.namespace.clone(),
            manifest.name.clone(),
        );
        if let Some(first) = seen.insert(key, manifest.origin.clone()) {
            return Err(LabError::usage(
                format!("{}: {} stands already at {first}", manifest.origin, manifest.title()),
                "give one of them another metadata.name, or remove it",
            ));
        }
        objects.push(manifest);
    }
    check_namespaces(&objects)?;
    let warnings = unmatched_selectors(&objects);
    // What others refer to comes first; apart from that the order of the files is kept.
    objects.sort_by_key(|manifest| kinds::creation_order(&manifest.kind.kind));
    Ok(Manifests { objects, warnings })
}

/// The objects of a file with their places; Lists are taken apart.
fn documents(file: &str, text: &str) -> Result<Vec<(String, Value)>> {
    let parsed: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| {
        let place = error.location().map_or_else(String::new, |at| {
            let number = document_of_line(text, at.line());
            format!("document {number}, line {}, column {}: ", at.line(), at.column())
        });
        LabError::usage(
            format!("{file}: {place}{}", first_line(&error.without_snippet().to_string())),
            "correct the YAML at this place",
        )
    })?;
    let mut found = Vec::new();
    let numbered = parsed.into_iter().enumerate().filter(|(_, document)| !document.is_null());
    for (index, document) in numbered {
        let origin = format!("{file}: document {}", index + 1);
        let is_list = document.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
        match document.get("items").and_then(Value::as_array) {
            Some(items) if is_list => {
                let items = items.iter().enumerate();
                found.extend(items.map(|(item, object)| (format!("{origin}, item {}", item + 1), object.clone())));
            }
            _ => found.push((origin, document)),
        }
    }
    Ok(found)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// The number of the document that a line belongs to; both count from 1.
fn document_of_line(text: &str, line: u64) -> usize {
    let before = text.lines().take(usize::try_from(line).unwrap_or(usize::MAX));
    let mut documents = 1;
    let mut has_content = false;
    for line in before {
        if line.trim_end() == "---" || line.starts_with("--- ") {
            documents += usize::from(has_content);
            has_content = true;
        } else {
            has_content |= !line.trim().is_empty() && !line.starts_with('#');
        }
    }
    documents
}

fn identify(kinds: &Kinds, origin: String, object: Value) -> Result<Manifest> {
    if !object.is_object() {
        return Err(LabError::usage(
            format!("{origin}: this is not an object"),
            "a manifest is a mapping with apiVersion, kind and metadata",
        ));
    }
    let text = |field: &str| object.pointer(field).and_then(Value::as_str).filter(|text| !text.is_empty());
    let missing = |field: &str, what: &str| {
        LabError::usage(format!("{origin}: {what}the field {field} is missing"), format!("add {field}, a string"))
    };
    let api_version = text("/apiVersion").ok_or_else(|| missing("apiVersion", ""))?;
    let kind = text("/kind").ok_or_else(|| missing("kind", ""))?;
    let Some(known) = kinds.find(api_version, kind) else {
        return Err(LabError::usage(
            format!("{origin}: kind `{kind}` of `{api_version}` is not known"),
            kinds.suggestion(kind),
        ));
    };
    let name = text("/metadata/name").ok_or_else(|| missing("metadata.name", &format!("{kind}: ")))?.to_owned();
    if !is_name(&name) {
        return Err(LabError::usage(
            format!("{origin}: {kind} {name}: metadata.name `{name}` is not a name"),
            "use lower-case letters, digits, hyphens and dots (RFC 1123)",
        ));
    }
    let namespace = match (known.namespaced, text("/metadata/namespace")) {
        (true, given) => given.unwrap_or("default").to_owned(),
        (false, _) => String::new(),
    };
    Ok(Manifest { origin, kind: known, namespace, name, object })
}

/// RFC 1123 subdomain, as Kubernetes asks of names.
fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// Namespaces that are always there.
const STANDING_NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

fn check_namespaces(objects: &[Manifest]) -> Result<()> {
    let declared: BTreeSet<&str> = objects
        .iter()
        .filter(|manifest| manifest.kind.kind == "Namespace")
        .map(|manifest| manifest.name.as_str())
        .chain(STANDING_NAMESPACES)
        .collect();
    for manifest in objects.iter().filter(|manifest| manifest.kind.namespaced) {
        if !declared.contains(manifest.namespace.as_str()) {
            return Err(LabError::usage(
                format!(
                    "{}: {}: metadata.namespace: there is no namespace `{}`",
                    manifest.origin,
                    manifest.title(),
                    manifest.namespace
                ),
                format!("add a Namespace `{}` to the manifests", manifest.namespace),
            ));
        }
    }
    Ok(())
}

/// Services whose selector matches the labels of no pod that these manifests make.
fn unmatched_selectors(objects: &[Manifest]) -> Vec<String> {
    let pods: Vec<(&str, &Value)> = objects
        .iter()
        .filter_map(|manifest| {
            let labels = match manifest.kind.kind.as_str() {
                "Pod" => "/metadata/labels",
                _ => "/spec/template/metadata/labels",
            };
            Some((manifest.namespace.as_str(), manifest.object.pointer(labels)?))
        })
        .collect();
    let mut warnings = Vec::new();
    for service in objects.iter().filter(|manifest| manifest.kind.kind == "Service") {
        let Some(selector) = service.object.pointer("/spec/selector").and_then(Value::as_object) else { continue };
        let matches = |(namespace, labels): &(&str, &Value)| {
            *namespace == service.namespace && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
        };
        if !selector.is_empty() && !pods.iter().any(matches) {
            let shown: Vec<String> =
                selector.iter().map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect();
            warnings.push(format!(
                "{}: {}: spec.selector `{}` matches no pod of these manifests",
                service.origin,
                service.title(),
                shown.join(",")
            ));
        }
    }
    warnings
}

#[cfg(test)]
mod tests;
