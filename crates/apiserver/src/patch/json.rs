//! JSON merge patch (RFC 7396) and JSON patch (RFC 6902).

use serde_json::{Map, Value};

use super::PatchError;

/// How many operations one JSON patch may have, as in kube-apiserver.
const OPERATIONS_MAX: usize = 10_000;

/// Applies a merge patch: objects are merged, null removes, anything else replaces (RFC 7396 §2).
pub fn json_merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (field, change) in patch {
        if change.is_null() {
            target.shift_remove(field);
        } else {
            json_merge(target.entry(field.clone()).or_insert(Value::Null), change);
        }
    }
}

/// Applies the operations of a JSON patch in order, all or none of them (RFC 6902 §5).
pub fn json_patch(target: &mut Value, patch: &Value) -> Result<(), PatchError> {
    let operations = patch.as_array().ok_or_else(|| malformed("a JSON patch is a list of operations"))?;
    if operations.len() > OPERATIONS_MAX {
        return Err(malformed(&format!(
            "it has {} operations, at most {OPERATIONS_MAX} are allowed",
            operations.len()
        )));
    }
    let mut result = target.clone();
    for (index, operation) in operations.iter().enumerate() {
        run(&mut result, index, operation)?;
    }
    *target = result;
    Ok(())
}

fn run(target: &mut Value, index: usize, operation: &Value) -> Result<(), PatchError> {
    let member = |name: &str| {
        let text = operation.get(name).and_then(Value::as_str);
        text.ok_or_else(|| malformed(&format!("operation {index} has no text in {name:?}")))
    };
    let value = || operation.get("value").ok_or_else(|| malformed(&format!("operation {index} has no \"value\"")));
    let nowhere = |pointer: &str| PatchError::NoSuchPlace { operation: index, pointer: pointer.to_owned() };
    let path = member("path")?;
    match member("op")? {
        "add" => add(target, path, value()?.clone()).ok_or_else(|| nowhere(path)),
        "remove" => take(target, path).map(drop).ok_or_else(|| nowhere(path)),
        "replace" => {
            let new = value()?.clone();
            *target.pointer_mut(path).ok_or_else(|| nowhere(path))? = new;
            Ok(())
        }
        "copy" => {
            let from = member("from")?;
            let copied = target.pointer(from).cloned().ok_or_else(|| nowhere(from))?;
            add(target, path, copied).ok_or_else(|| nowhere(path))
        }
        "move" => {
            let from = member("from")?;
            if path.strip_prefix(from).is_some_and(|rest| rest.starts_with('/')) {
                return Err(malformed(&format!("operation {index} moves {from:?} into itself")));
            }
            let moved = take(target, from).ok_or_else(|| nowhere(from))?;
            add(target, path, moved).ok_or_else(|| nowhere(path))
        }
        "test" => {
            let found = target.pointer(path).unwrap_or(&Value::Null);
            if same(found, value()?) {
                Ok(())
            } else {
                Err(PatchError::TestFailed { operation: index, pointer: path.to_owned() })
            }
        }
        other => Err(malformed(&format!("operation {index} is {other:?}, which RFC 6902 does not know"))),
    }
}

/// Numbers are equal by value, whatever their spelling (RFC 6902 §4.6).
fn same(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => left == right || left.as_f64() == right.as_f64(),
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(left, right)| same(left, right))
        }
        (Value::Object(left), Value::Object(right)) => {
            left.len() == right.len()
                && left.iter().all(|(field, value)| right.get(field).is_some_and(|other| same(value, other)))
        }
        _ => left == right,
    }
}

fn add(target: &mut Value, pointer: &str, value: Value) -> Option<()> {
    if pointer.is_empty() {
        *target = value;
        return Some(());
    }
    let (parent, last) = pointer.rsplit_once('/')?;
    match target.pointer_mut(parent)? {
        Value::Object(map) => drop(map.insert(unescape(last), value)),
        Value::Array(list) if last == "-" => list.push(value),
        Value::Array(list) => {
            let position = position(last).filter(|position| *position <= list.len())?;
            list.insert(position, value);
        }
        _ => return None,
    }
    Some(())
}

fn take(target: &mut Value, pointer: &str) -> Option<Value> {
    if pointer.is_empty() {
        return Some(std::mem::take(target));
    }
    let (parent, last) = pointer.rsplit_once('/')?;
    match target.pointer_mut(parent)? {
        Value::Object(map) => map.shift_remove(&unescape(last)),
        Value::Array(list) => {
            let position = position(last).filter(|position| *position < list.len())?;
            Some(list.remove(position))
        }
        _ => None,
    }
}

/// An array index has no sign and no leading zero (RFC 6901 §4).
fn position(token: &str) -> Option<usize> {
    let plain = token.bytes().all(|byte| byte.is_ascii_digit()) && (token == "0" || !token.starts_with('0'));
    if plain { token.parse().ok() } else { None }
}

fn unescape(token: &str) -> String {
    token.replace("~1", "/").replace("~0", "~")
}

fn malformed(why: &str) -> PatchError {
    PatchError::Malformed(why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn the_cases_of_rfc_7396_appendix_a() {
        let cases = [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ];
        for (mut target, patch, expected) in cases {
            json_merge(&mut target, &patch);
            assert_eq!(target, expected, "{patch}");
        }
    }

    #[test]
    fn the_operations_of_rfc_6902() {
        let mut object = json!({"a": {"b": [1, 2]}, "x/y": 1});
        let patch = json!([
            {"op": "test", "path": "/x~1y", "value": 1.0},
            {"op": "add", "path": "/a/b/-", "value": 4},
            {"op": "add", "path": "/a/b/2", "value": 3},
            {"op": "remove", "path": "/x~1y"},
            {"op": "copy", "from": "/a/b/0", "path": "/first"},
            {"op": "move", "from": "/a/b", "path": "/list"},
            {"op": "replace", "path": "/a", "value": 7},
        ]);
        json_patch(&mut object, &patch).unwrap();
        assert_eq!(object, json!({"a": 7, "first": 1, "list": [1, 2, 3, 4]}));
    }

    #[test]
    fn a_failing_operation_undoes_those_before_it() {
        let mut object = json!({"a": 1});
        let patch = json!([{"op": "replace", "path": "/a", "value": 2}, {"op": "test", "path": "/a", "value": 1}]);
        let error = json_patch(&mut object, &patch).unwrap_err();
        assert_eq!(error, PatchError::TestFailed { operation: 1, pointer: "/a".into() });
        assert_eq!(object, json!({"a": 1}));
        let into_itself = json!([{"op": "move", "from": "/a", "path": "/a/b"}]);
        assert!(matches!(json_patch(&mut object, &into_itself), Err(PatchError::Malformed(_))));
        assert!(json_patch(&mut object, &json!([{"op": "remove", "path": "/no"}])).is_err());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from)
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c]{1,2}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// The merge patch that leads from one value to the other.
    fn difference(from: &Value, to: &Value) -> Value {
        let (Value::Object(old), Value::Object(new)) = (from, to) else { return to.clone() };
        let gone = old.keys().filter(|field| !new.contains_key(*field)).map(|field| (field.clone(), Value::Null));
        let kept = new.iter().filter(|(field, value)| old.get(*field) != Some(*value));
        let kept = kept
            .map(|(field, value)| (field.clone(), old.get(field).map_or(value.clone(), |old| difference(old, value))));
        Value::Object(gone.chain(kept).collect())
    }

    proptest! {
        #[test]
        fn the_difference_of_two_values_leads_from_one_to_the_other(from in any_json(), to in any_json()) {
            let mut target = from.clone();
            json_merge(&mut target, &difference(&from, &to));
            prop_assert_eq!(target, to);
        }

        #[test]
        fn what_was_added_can_be_removed(object in any_json(), value in any_json()) {
            let mut target = object.clone();
            if target.is_object() {
                json_patch(&mut target, &json!([{"op": "add", "path": "/new", "value": value}])).unwrap();
                json_patch(&mut target, &json!([{"op": "remove", "path": "/new"}])).unwrap();
            }
            prop_assert_eq!(target, object);
        }

        #[test]
        fn no_pointer_makes_it_panic(mut object in any_json(), pointer in "[a-c/~0-9-]{0,8}") {
            for op in ["add", "remove", "replace", "test"] {
                let _ = json_patch(&mut object, &json!([{"op": op, "path": pointer, "value": 1}]));
            }
        }
    }
}
