//! Sets of fields, as `metadata.managedFields` writes them (FieldsV1).
//!
//! A path is a list of steps: a field, an element of a list by its keys, or an element of a set by
//! its value. Written: `f:NAME`, `k:{"KEY":VALUE}`, `v:VALUE`; `.` marks a node that is a member
//! itself beside its children.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::schema::{is_atomic_map, list_rule};
use crate::fields::canonical;

/// What every object has and nobody owns (KEP-555, "Managers").
const UNOWNED: &[&str] = &["apiVersion", "kind"];
const UNOWNED_METADATA: &[&str] = &[
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "selfLink",
    "clusterName",
];

/// One step of a path into an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    /// A field of a map.
    Field(String),
    /// An element of a list that is merged by key; the keys and their values as canonical JSON.
    Key(String),
    /// An element of a set, as canonical JSON.
    Element(String),
}

/// A set of paths, as a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FieldSet {
    is_member: bool,
    children: BTreeMap<Step, FieldSet>,
}

impl FieldSet {
    /// The fields that an object sets.
    pub(super) fn of(kind: &str, object: &Value) -> FieldSet {
        let mut set = FieldSet::default();
        let Value::Object(object) = object else { return set };
        for (field, value) in object.iter().filter(|(field, _)| !UNOWNED.contains(&field.as_str())) {
            let child = if let ("metadata", Value::Object(metadata)) = (field.as_str(), value) {
                let owned = metadata.iter().filter(|(field, _)| !UNOWNED_METADATA.contains(&field.as_str()));
                let owned: Map<String, Value> = owned.map(|(field, value)| (field.clone(), value.clone())).collect();
                if owned.is_empty() {
                    continue;
                }
                collect(kind, &Value::Object(owned), &mut vec![field.clone()])
            } else {
                collect(kind, value, &mut vec![field.clone()])
            };
            set.children.insert(Step::Field(field.clone()), child);
        }
        set
    }

    /// Reads FieldsV1; what is not understood is left out.
    pub(super) fn parse(fields: &Value) -> FieldSet {
        let Value::Object(map) = fields else { return FieldSet::default() };
        let mut set = FieldSet { is_member: map.is_empty() || map.contains_key("."), children: BTreeMap::new() };
        let json = |text: &str| serde_json::from_str::<Value>(text).ok().map(|value| canonical(&value));
        for (key, child) in map {
            let step = match key.split_once(':') {
                Some(("f", name)) => Some(Step::Field(name.to_owned())),
                Some(("k", keys)) => json(keys).map(Step::Key),
                Some(("v", value)) => json(value).map(Step::Element),
                _ => None,
            };
            if let Some(step) = step {
                set.children.insert(step, FieldSet::parse(child));
            }
        }
        set
    }

    /// Writes FieldsV1.
    pub(super) fn render(&self) -> Value {
        let mut map = Map::new();
        if self.is_member && !self.children.is_empty() {
            map.insert(".".into(), Value::Object(Map::new()));
        }
        for (step, child) in &self.children {
            let key = match step {
                Step::Field(name) => format!("f:{name}"),
                Step::Key(keys) => format!("k:{keys}"),
                Step::Element(value) => format!("v:{value}"),
            };
            map.insert(key, child.render());
        }
        Value::Object(map)
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.is_member && self.children.is_empty()
    }

    /// All members, parents before children.
    pub(super) fn members(&self) -> Vec<Vec<Step>> {
        fn walk(set: &FieldSet, path: &mut Vec<Step>, members: &mut Vec<Vec<Step>>) {
            if set.is_member {
                members.push(path.clone());
            }
            for (step, child) in &set.children {
                path.push(step.clone());
                walk(child, path, members);
                path.pop();
            }
        }
        let mut members = Vec::new();
        walk(self, &mut Vec::new(), &mut members);
        members
    }

    /// Whether the path itself is a member.
    pub(super) fn contains(&self, path: &[Step]) -> bool {
        self.node(path).is_some_and(|node| node.is_member)
    }

    /// Whether the path or anything below it is a member.
    pub(super) fn touches(&self, path: &[Step]) -> bool {
        self.node(path).is_some()
    }

    pub(super) fn insert(&mut self, path: &[Step]) {
        let mut node = self;
        for step in path {
            node = node.children.entry(step.clone()).or_default();
        }
        node.is_member = true;
    }

    /// Takes a path out, and the parents that hold nothing more.
    pub(super) fn remove(&mut self, path: &[Step]) {
        match path {
            [] => self.is_member = false,
            [step, rest @ ..] => {
                if let Some(child) = self.children.get_mut(step) {
                    child.remove(rest);
                    if child.is_empty() {
                        self.children.remove(step);
                    }
                }
            }
        }
    }

    fn node(&self, path: &[Step]) -> Option<&FieldSet> {
        path.iter().try_fold(self, |node, step| node.children.get(step))
    }
}

fn collect(kind: &str, value: &Value, path: &mut Vec<String>) -> FieldSet {
    let leaf = FieldSet { is_member: true, children: BTreeMap::new() };
    match value {
        Value::Object(map) if !map.is_empty() && !is_atomic_map(kind, path) => {
            let mut set = FieldSet::default();
            for (field, value) in map {
                path.push(field.clone());
                set.children.insert(Step::Field(field.clone()), collect(kind, value, path));
                path.pop();
            }
            set
        }
        Value::Array(list) if !list.is_empty() => {
            let Some(rule) = list_rule(kind, path) else { return leaf };
            let mut set = FieldSet::default();
            for element in list {
                if rule.is_set {
                    set.children.insert(Step::Element(canonical(element)), leaf.clone());
                } else if rule.apply_keys.is_empty() {
                    return leaf;
                } else {
                    let mut child = collect(kind, element, path);
                    child.is_member = true;
                    set.children.insert(Step::Key(element_key(element, rule.apply_keys)), child);
                }
            }
            set
        }
        _ => leaf,
    }
}

/// The keys of an element as canonical JSON. A port without a protocol is a TCP port.
pub(super) fn element_key(element: &Value, keys: &[&str]) -> String {
    let key = |name: &str| match element.get(name) {
        None if name == "protocol" => Value::from("TCP"),
        found => found.cloned().unwrap_or_default(),
    };
    canonical(&Value::Object(keys.iter().map(|name| ((*name).to_owned(), key(name))).collect()))
}

/// The value at a path.
pub(super) fn lookup<'a>(object: &'a Value, path: &[Step]) -> Option<&'a Value> {
    path.iter().try_fold(object, |value, step| match step {
        Step::Field(name) => value.get(name),
        Step::Key(_) | Step::Element(_) => {
            let list = value.as_array()?;
            list.get(element_position(list, step)?)
        }
    })
}

/// Takes the value at a path out of an object. The keys of a list's element stay with the element.
pub(super) fn cut(object: &mut Value, path: &[Step]) {
    let Some((last, parent)) = path.split_last() else { return };
    if let (Step::Field(name), Some(Step::Key(keys))) = (last, parent.last())
        && keys.contains(&format!("\"{name}\":"))
    {
        return;
    }
    let parent = parent.iter().try_fold(object, |value, step| match step {
        Step::Field(name) => value.get_mut(name),
        Step::Key(_) | Step::Element(_) => {
            let list = value.as_array_mut()?;
            let position = element_position(list, step)?;
            list.get_mut(position)
        }
    });
    match (parent, last) {
        (Some(Value::Object(map)), Step::Field(name)) => drop(map.shift_remove(name)),
        (Some(Value::Array(list)), step) => {
            if let Some(position) = element_position(list, step) {
                list.remove(position);
            }
        }
        _ => {}
    }
}

fn element_position(list: &[Value], step: &Step) -> Option<usize> {
    match step {
        Step::Field(_) => None,
        Step::Element(wanted) => list.iter().position(|element| canonical(element) == *wanted),
        Step::Key(wanted) => {
            let keys: Map<String, Value> = serde_json::from_str(wanted).ok()?;
            let names: Vec<&str> = keys.keys().map(String::as_str).collect();
            list.iter().position(|element| element_key(element, &names) == *wanted)
        }
    }
}

/// A path as Kubernetes writes it in a conflict: `.spec.containers[name="a"].image`.
pub(super) fn render_path(path: &[Step]) -> String {
    let mut text = String::new();
    for step in path {
        match step {
            Step::Field(name) => {
                text.push('.');
                text.push_str(name);
            }
            Step::Element(value) => {
                let _ = write!(text, "[={value}]");
            }
            Step::Key(keys) => {
                let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let keys: Vec<String> = keys.iter().map(|(name, value)| format!("{name}={value}")).collect();
                let _ = write!(text, "[{}]", keys.join(","));
            }
        }
    }
    text
}
