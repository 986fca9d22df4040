//! The part of kubectl's JSONPath that printer columns use: `.a.b`, `[0]`, `['a.b']`, `[?(@.a=="b")]`.

use serde_json::Value;

/// The value at a path; nothing if there is none or the path is of another form.
pub(super) fn find<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
    let mut value = object;
    let mut rest = path.trim().trim_start_matches('{').trim_end_matches('}').trim_start_matches('$');
    while !rest.is_empty() {
        if let Some(inside) = rest.strip_prefix('[') {
            let (step, after) = inside.split_once(']')?;
            value = bracket(value, step)?;
            rest = after;
        } else {
            rest = rest.strip_prefix('.').unwrap_or(rest);
            let (field, after) = field(rest);
            if field.is_empty() {
                return None;
            }
            value = value.get(&field)?;
            rest = after;
        }
    }
    Some(value)
}

/// A field's name up to the next dot or bracket; a backslash keeps a dot in it.
fn field(path: &str) -> (String, &str) {
    let mut name = String::new();
    let mut characters = path.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '\\' => name.extend(characters.next().map(|(_, escaped)| escaped)),
            '.' | '[' => return (name, &path[index..]),
            other => name.push(other),
        }
    }
    (name, "")
}

fn bracket<'a>(value: &'a Value, step: &str) -> Option<&'a Value> {
    if let Ok(index) = step.parse::<usize>() {
        return value.get(index);
    }
    if let Some(condition) = step.strip_prefix("?(").and_then(|it| it.strip_suffix(')')) {
        let (left, right) = condition.split_once("==")?;
        let left = left.trim().strip_prefix('@')?;
        let right = right.trim().trim_matches(['"', '\'']);
        return value.as_array()?.iter().find(|element| match find(element, left) {
            Some(Value::String(text)) => text == right,
            // A number or a truth value is compared by its spelling.
            Some(other) => format!("{other}").as_str() == right,
            None => false,
        });
    }
    if step == "*" {
        return value.get(0);
    }
    value.get(step.trim_matches(['"', '\'']))
}
