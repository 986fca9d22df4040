//! Tables for `kubectl get`: kubectl's own columns for each kind (`meta.k8s.io/v1` Table).
//!
//! A column of priority 1 shows with `-o wide` only. Each row carries the object's metadata, from which
//! kubectl reads names for `-w`, `--show-labels` and `-o name`.

mod age;
mod path;
mod rows;

use serde_json::{Value, json};

use crate::fields::{at, items, name, number, text};

pub use age::human_duration;

/// One column: its name, its OpenAPI type and whether it is for `-o wide`.
#[derive(Debug, Clone, Copy)]
struct Column {
    name: &'static str,
    kind: &'static str,
    is_wide: bool,
}

const fn column(name: &'static str) -> Column {
    Column { name, kind: "string", is_wide: false }
}

const fn count(name: &'static str) -> Column {
    Column { name, kind: "integer", is_wide: false }
}

const fn wide(name: &'static str) -> Column {
    Column { name, kind: "string", is_wide: true }
}

/// A table of objects of one kind. Kinds without columns of their own get name and age.
pub fn render(kind: &str, objects: &[Value], now_seconds: i64) -> Value {
    let (columns, row) = rows::of_kind(kind);
    let definitions: Vec<Value> =
        columns.iter().map(|column| definition(column.name, column.kind, i64::from(column.is_wide), "")).collect();
    let rows = objects.iter().map(|object| (object, row(object, now_seconds)));
    table(&definitions, rows.collect())
}

/// A table of custom objects with the `additionalPrinterColumns` of their definition's version.
pub fn render_custom(printer_columns: &[Value], objects: &[Value], now_seconds: i64) -> Value {
    let mut definitions = vec![definition("Name", "string", 0, "")];
    for column in printer_columns {
        let priority = number(column, "priority").unwrap_or(0);
        definitions.push(definition(text(column, "name"), text(column, "type"), priority, text(column, "description")));
    }
    let has_columns = !printer_columns.is_empty();
    if !has_columns {
        definitions.push(definition("Age", "string", 0, ""));
    }
    let row = |object: &Value| {
        let mut cells = vec![json!(name(object))];
        for column in printer_columns {
            let found = path::find(object, text(column, "jsonPath"));
            cells.push(match (text(column, "type"), found) {
                (_, None) => Value::Null,
                ("date", Some(time)) => json!(age::since(time.as_str().unwrap_or(""), now_seconds)),
                ("string", Some(Value::String(text))) => json!(text),
                ("string", Some(other)) => json!(other.to_string()),
                (_, Some(other)) => other.clone(),
            });
        }
        if !has_columns {
            cells.push(json!(age::of(object, now_seconds)));
        }
        cells
    };
    table(&definitions, objects.iter().map(|object| (object, row(object))).collect())
}

fn definition(column: &str, kind: &str, priority: i64, description: &str) -> Value {
    json!({
        "name": column,
        "type": kind,
        "format": if column == "Name" { "name" } else { "" },
        "description": description,
        "priority": priority,
    })
}

fn table(definitions: &[Value], rows: Vec<(&Value, Vec<Value>)>) -> Value {
    let rows: Vec<Value> = rows
        .into_iter()
        .map(|(object, cells)| {
            let metadata = at(object, "metadata").clone();
            let partial =
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata});
            json!({"cells": cells, "object": partial})
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {},
        "columnDefinitions": definitions,
        "rows": rows,
    })
}

/// The texts joined with commas, or what kubectl shows for nothing.
fn joined(texts: &[String]) -> String {
    if texts.is_empty() { "<none>".into() } else { texts.join(",") }
}

/// A map of labels as a selector's text.
fn labels_text(labels: &Value) -> String {
    let map = labels.as_object().into_iter().flatten();
    let mut pairs: Vec<String> = map.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or(""))).collect();
    pairs.sort();
    joined(&pairs)
}

/// A label selector object as text.
fn selector_text(selector: &Value) -> String {
    let mut parts = Vec::new();
    if at(selector, "matchLabels").as_object().is_some_and(|map| !map.is_empty()) {
        parts.push(labels_text(at(selector, "matchLabels")));
    }
    for expression in items(selector, "matchExpressions") {
        let key = text(expression, "key");
        let values: Vec<&str> = crate::fields::texts(expression, "values").collect();
        parts.push(match text(expression, "operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    joined(&parts)
}

#[cfg(test)]
mod tests;
