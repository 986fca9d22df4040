//! Server-side apply (KEP-555): each manager owns the fields that it sets.
//!
//! Applying merges the manager's object into the live one, takes away what the manager applied before
//! and applies no more (unless another manager owns it too), and refuses to change what another
//! manager owns unless it is forced. Other writes are recorded with `record_update`, so that they own
//! what they change.

use std::fmt;

use serde_json::{Value, json};

use super::field_set::{FieldSet, Step, cut, element_key, lookup, render_path};
use super::schema::{is_atomic_map, list_rule};
use crate::fields::{items, remove, set, text};

/// One field that another manager owns with another value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The manager that owns the field.
    pub manager: String,
    /// The API version through which that manager wrote it.
    pub api_version: String,
    /// The field, as `.spec.replicas`.
    pub field: String,
}

/// An apply that would change fields of other managers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ApplyConflict {
    /// Each field with the manager that owns it.
    pub conflicts: Vec<Conflict>,
}

impl fmt::Display for ApplyConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.conflicts.len() == 1 { "" } else { "s" };
        write!(f, "Apply failed with {} conflict{plural}:", self.conflicts.len())?;
        for conflict in &self.conflicts {
            write!(f, " conflict with {:?} using {}: {};", conflict.manager, conflict.api_version, conflict.field)?;
        }
        f.write_str(" apply with force to take these fields over, or stop applying them")
    }
}

/// One entry of `metadata.managedFields`.
struct Manager {
    /// The entry without its fields.
    entry: Value,
    fields: FieldSet,
}

impl Manager {
    fn is(&self, name: &str, operation: &str) -> bool {
        text(&self.entry, "manager") == name
            && text(&self.entry, "operation") == operation
            && text(&self.entry, "subresource").is_empty()
    }
}

/// Merges what a manager applies into the live object, or makes the object.
///
/// The result carries the new `managedFields`; defaulting, validation and identity are the caller's.
pub fn server_side_apply(
    kind: &str,
    live: Option<&Value>,
    applied: &Value,
    manager: &str,
    force: bool,
    now_rfc3339: &str,
) -> Result<Value, ApplyConflict> {
    let mut applied = applied.clone();
    for field in ["managedFields", "resourceVersion", "uid", "generation", "creationTimestamp"] {
        remove(&mut applied, &format!("metadata.{field}"));
    }
    drop_nulls(&mut applied);
    let wanted = FieldSet::of(kind, &applied);
    let Some(live) = live else {
        write_managers(&mut applied, Vec::new(), Some((manager, "Apply", wanted, now_rfc3339)));
        return Ok(applied);
    };
    let mut managers = read_managers(live);
    let position = managers.iter().position(|other| other.is(manager, "Apply"));
    let previous = position.map(|position| managers.remove(position));

    let mut conflicts = Vec::new();
    for path in wanted.members() {
        // Elements of lists may be there for several managers; only their fields can differ.
        let (old, new) = (lookup(live, &path), lookup(&applied, &path));
        // An empty map merges into whatever is there.
        let is_merged = old.is_some_and(Value::is_object) && new.is_some_and(|new| *new == json!({}));
        if !matches!(path.last(), Some(Step::Field(_))) || old == new || is_merged {
            continue;
        }
        for other in managers.iter_mut().filter(|other| other.fields.contains(&path)) {
            if force {
                other.fields.remove(&path);
            } else {
                conflicts.push(Conflict {
                    manager: text(&other.entry, "manager").to_owned(),
                    api_version: text(&other.entry, "apiVersion").to_owned(),
                    field: render_path(&path),
                });
            }
        }
    }
    if !conflicts.is_empty() {
        return Err(ApplyConflict { conflicts });
    }

    let mut result = live.clone();
    merge(kind, &mut result, &applied, &mut Vec::new());
    if let Some(previous) = &previous {
        for path in previous.fields.members() {
            let is_kept = wanted.touches(&path) || managers.iter().any(|other| other.fields.touches(&path));
            if !is_kept {
                prune(&mut result, &path, &wanted, &managers);
            }
        }
    }
    // An apply that changes nothing writes nothing: the same time, hence the same revision.
    let is_same = previous.as_ref().is_some_and(|previous| previous.fields == wanted) && result == *live;
    if is_same {
        return Ok(live.clone());
    }
    write_managers(&mut result, managers, Some((manager, "Apply", wanted, now_rfc3339)));
    Ok(result)
}

/// Records that a write other than an apply changed fields: the manager owns them from now on.
///
/// `live` is the object before the write, or nothing for a create.
pub fn record_update(kind: &str, live: Option<&Value>, updated: &mut Value, manager: &str, now_rfc3339: &str) {
    let nothing = Value::Null;
    let before = live.unwrap_or(&nothing);
    let mut managers = read_managers(before);
    let after_fields = FieldSet::of(kind, updated);
    let changed: Vec<_> =
        after_fields.members().into_iter().filter(|path| lookup(before, path) != lookup(updated, path)).collect();
    let gone: Vec<_> =
        FieldSet::of(kind, before).members().into_iter().filter(|path| lookup(updated, path).is_none()).collect();
    if changed.is_empty() && gone.is_empty() && live.is_some() {
        write_managers(updated, managers, None);
        return;
    }
    let position = managers.iter().position(|other| other.is(manager, "Update"));
    let mut own = position.map(|position| managers.remove(position).fields).unwrap_or_default();
    for other in &mut managers {
        for path in gone.iter().chain(&changed) {
            // An element that changed inside still stands for its other owners.
            if matches!(path.last(), Some(Step::Field(_))) || lookup(updated, path).is_none() {
                other.fields.remove(path);
            }
        }
    }
    for path in &gone {
        own.remove(path);
    }
    for path in &changed {
        own.insert(path);
    }
    write_managers(updated, managers, Some((manager, "Update", own, now_rfc3339)));
}

fn read_managers(object: &Value) -> Vec<Manager> {
    let entries = items(object, "metadata.managedFields").iter();
    entries
        .map(|entry| {
            let fields = FieldSet::parse(entry.get("fieldsV1").unwrap_or(&Value::Null));
            let mut entry = entry.clone();
            remove(&mut entry, "fieldsV1");
            Manager { entry, fields }
        })
        .collect()
}

fn write_managers(object: &mut Value, managers: Vec<Manager>, own: Option<(&str, &str, FieldSet, &str)>) {
    let mut entries: Vec<Value> = Vec::new();
    if let Some((manager, operation, fields, now)) = own
        && !fields.is_empty()
    {
        entries.push(json!({
            "manager": manager,
            "operation": operation,
            "apiVersion": text(object, "apiVersion"),
            "time": now,
            "fieldsType": "FieldsV1",
            "fieldsV1": fields.render(),
        }));
    }
    for manager in managers.into_iter().filter(|manager| !manager.fields.is_empty()) {
        let mut entry = manager.entry;
        set(&mut entry, "fieldsV1", manager.fields.render());
        entries.push(entry);
    }
    entries.sort_by_cached_key(|entry| (text(entry, "operation").to_owned(), text(entry, "manager").to_owned()));
    if entries.is_empty() {
        remove(object, "metadata.managedFields");
    } else {
        set(object, "metadata.managedFields", Value::Array(entries));
    }
}

/// A field that is applied as null is a field that is not applied.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

fn merge(kind: &str, live: &mut Value, applied: &Value, path: &mut Vec<String>) {
    match (live, applied) {
        (Value::Object(live), Value::Object(applied)) if !is_atomic_map(kind, path) => {
            for (field, value) in applied {
                path.push(field.clone());
                merge(kind, live.entry(field.clone()).or_insert(Value::Null), value, path);
                path.pop();
            }
        }
        (Value::Array(live), Value::Array(applied)) => match list_rule(kind, path) {
            Some(rule) if rule.is_set => {
                live.extend(applied.iter().filter(|value| !live.contains(value)).cloned().collect::<Vec<_>>());
            }
            Some(rule) if !rule.apply_keys.is_empty() => {
                for element in applied {
                    let key = element_key(element, rule.apply_keys);
                    match live.iter_mut().find(|old| element_key(old, rule.apply_keys) == key) {
                        Some(old) => merge(kind, old, element, path),
                        None => live.push(element.clone()),
                    }
                }
            }
            _ => live.clone_from(applied),
        },
        (live, applied) => *live = applied.clone(),
    }
}

/// Takes a field away, and the maps and lists around it that are empty then and nobody's.
fn prune(object: &mut Value, path: &[Step], wanted: &FieldSet, others: &[Manager]) {
    cut(object, path);
    let mut parent = path;
    while let [above @ .., _] = parent {
        parent = above;
        let is_empty = match lookup(object, parent) {
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(list)) => list.is_empty(),
            _ => false,
        };
        let is_owned = wanted.touches(parent) || others.iter().any(|other| other.fields.touches(parent));
        if parent.len() < 2 || !is_empty || is_owned {
            return;
        }
        cut(object, parent);
    }
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
