//! Strategic merge patch: a merge patch that knows the keys of lists, with directives.
//!
//! The directives are those of kubectl: `$patch: replace | delete | merge`, `$retainKeys`,
//! `$deleteFromPrimitiveList/FIELD` and `$setElementOrder/FIELD`.

use serde_json::{Map, Value};

use super::PatchError;
use super::schema::{BUILT_IN_KINDS, list_rule};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ELEMENT_ORDER: &str = "$setElementOrder/";

/// Applies a strategic merge patch to an object of a built-in kind.
pub fn strategic_merge(kind: &str, target: &mut Value, patch: &Value) -> Result<(), PatchError> {
    if !BUILT_IN_KINDS.contains(&kind) {
        return Err(PatchError::NotSupported(kind.to_owned()));
    }
    let (Value::Object(old), Value::Object(patch)) = (&*target, patch) else {
        return Err(PatchError::Malformed("a strategic merge patch is an object".into()));
    };
    let mut merge = Merge { kind, path: Vec::new() };
    *target = Value::Object(merge.map(old.clone(), patch)?);
    Ok(())
}

struct Merge<'a> {
    kind: &'a str,
    path: Vec<String>,
}

impl Merge<'_> {
    fn map(
        &mut self,
        mut target: Map<String, Value>,
        patch: &Map<String, Value>,
    ) -> Result<Map<String, Value>, PatchError> {
        match patch.get(PATCH).map(|directive| directive.as_str().unwrap_or("")) {
            Some("replace") => target.clear(),
            Some("delete") => return Ok(Map::new()),
            None | Some("merge") => {}
            Some(_) => return Err(self.malformed("$patch is replace, delete or merge")),
        }
        if let Some(retained) = patch.get(RETAIN_KEYS) {
            let retained = retained.as_array().ok_or_else(|| self.malformed("$retainKeys is a list of field names"))?;
            target.retain(|field, _| retained.iter().any(|kept| kept == field));
        }
        for (directive, gone) in patch {
            let Some(field) = directive.strip_prefix(DELETE_FROM) else { continue };
            let gone = gone.as_array().ok_or_else(|| self.malformed("$deleteFromPrimitiveList is a list"))?;
            if let Some(Value::Array(list)) = target.get_mut(field) {
                list.retain(|value| !gone.contains(value));
            }
        }
        for (field, change) in patch.iter().filter(|(field, _)| !field.starts_with('$')) {
            if change.is_null() {
                target.shift_remove(field);
                continue;
            }
            self.path.push(field.clone());
            let old = target.get_mut(field).map(Value::take);
            let new = self.value(old, change)?;
            self.path.pop();
            target.insert(field.clone(), new);
        }
        for (directive, order) in patch {
            let Some(field) = directive.strip_prefix(ELEMENT_ORDER) else { continue };
            let order = order.as_array().ok_or_else(|| self.malformed("$setElementOrder is a list"))?;
            self.path.push(field.to_owned());
            let key = list_rule(self.kind, &self.path).map_or("", |rule| rule.patch_key);
            self.path.pop();
            if let Some(Value::Array(list)) = target.get_mut(field) {
                *list = reorder(std::mem::take(list), order, key);
            }
        }
        Ok(target)
    }

    fn value(&mut self, old: Option<Value>, change: &Value) -> Result<Value, PatchError> {
        match change {
            Value::Object(patch) => {
                let old = if let Some(Value::Object(old)) = old { old } else { Map::new() };
                Ok(Value::Object(self.map(old, patch)?))
            }
            Value::Array(patch) => {
                let old = if let Some(Value::Array(old)) = old { old } else { Vec::new() };
                Ok(Value::Array(self.list(old, patch)?))
            }
            plain => Ok(plain.clone()),
        }
    }

    fn list(&mut self, mut target: Vec<Value>, patch: &[Value]) -> Result<Vec<Value>, PatchError> {
        let rule = list_rule(self.kind, &self.path);
        if rule.is_some_and(|rule| rule.is_set) {
            for value in patch {
                if !target.contains(value) {
                    target.push(value.clone());
                }
            }
            return Ok(target);
        }
        let Some(key) = rule.map(|rule| rule.patch_key).filter(|key| !key.is_empty()) else {
            return patch.iter().map(|value| self.value(None, value)).collect();
        };
        if patch.iter().any(|element| element.get(PATCH).is_some_and(|it| it == "replace")) {
            target.clear();
        }
        for element in patch {
            let directive = element.get(PATCH).and_then(Value::as_str).unwrap_or("merge");
            if directive == "replace" && element.get(key).is_none() {
                continue;
            }
            let wanted = element
                .get(key)
                .ok_or_else(|| PatchError::NoMergeKey { field: self.path.join("."), key: key.to_owned() })?;
            match directive {
                "delete" => target.retain(|old| old.get(key) != Some(wanted)),
                _ => match position(&target, element, key) {
                    Some(position) => target[position] = self.value(Some(target[position].take()), element)?,
                    None => target.push(self.value(None, element)?),
                },
            }
        }
        Ok(target)
    }

    fn malformed(&self, why: &str) -> PatchError {
        PatchError::Malformed(format!("{}: {why}", self.path.join(".")))
    }
}

/// The element that a patch element speaks of.
///
/// The merge key of ports is the number alone, though a number may be there for TCP and for UDP: of
/// several, the protocol decides, and another protocol under another name is another port.
fn position(list: &[Value], element: &Value, key: &str) -> Option<usize> {
    let protocol = |value: &Value| value.get("protocol").and_then(Value::as_str).unwrap_or("TCP").to_owned();
    let found: Vec<usize> = (0..list.len()).filter(|index| list[*index].get(key) == element.get(key)).collect();
    let same_protocol = found.iter().copied().find(|index| protocol(&list[*index]) == protocol(element));
    if same_protocol.is_some() || found.is_empty() {
        return same_protocol;
    }
    let first = &list[found[0]];
    let is_another = element.get("protocol").is_some()
        && (found.len() > 1 || element.get("name").is_some_and(|name| first.get("name") != Some(name)));
    if is_another { None } else { found.first().copied() }
}

/// Orders the elements that `order` names; the others stay behind the element they stood behind.
fn reorder(list: Vec<Value>, order: &[Value], key: &str) -> Vec<Value> {
    let identity =
        |value: &Value| if key.is_empty() { value.clone() } else { value.get(key).cloned().unwrap_or(Value::Null) };
    let mut groups: Vec<Vec<Value>> = vec![Vec::new()];
    for value in list {
        let is_named = order.iter().any(|named| identity(named) == identity(&value));
        match groups.last_mut() {
            Some(group) if !is_named => group.push(value),
            _ => groups.push(vec![value]),
        }
    }
    let mut result = groups.remove(0);
    for named in order {
        while let Some(at) =
            groups.iter().position(|group| group.first().is_some_and(|first| identity(first) == identity(named)))
        {
            result.append(&mut groups.remove(at));
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn merged(kind: &str, target: &Value, patch: &Value) -> Value {
        let mut result = target.clone();
        strategic_merge(kind, &mut result, patch).unwrap();
        result
    }

    #[test]
    fn containers_merge_by_name_and_their_lists_by_their_own_keys() {
        let target = json!({"spec": {"template": {"spec": {"containers": [
            {"name": "a", "image": "a:1", "env": [{"name": "X", "value": "1"}], "args": ["one"]},
            {"name": "b", "image": "b:1"},
        ]}}}});
        let patch = json!({"spec": {"template": {"spec": {"containers": [
            {"name": "a", "image": "a:2", "env": [{"name": "Y", "value": "2"}], "args": ["two"]},
            {"name": "b", "$patch": "delete"},
            {"name": "c", "image": "c:1"},
        ]}}}});
        let expected = json!({"spec": {"template": {"spec": {"containers": [
            {"name": "a", "image": "a:2", "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}], "args": ["two"]},
            {"name": "c", "image": "c:1"},
        ]}}}});
        assert_eq!(merged("Deployment", &target, &patch), expected);
    }

    #[test]
    fn ports_with_one_number_and_two_protocols_stay_two() {
        let target = json!({"spec": {"ports": [
            {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]}});
        let patch = json!({"spec": {"ports": [{"port": 53, "protocol": "TCP", "targetPort": 5353}]}});
        let result = merged("Service", &target, &patch);
        assert_eq!(result["spec"]["ports"][0], target["spec"]["ports"][0]);
        assert_eq!(result["spec"]["ports"][1]["targetPort"], 5353);
        let one = json!({"spec": {"ports": [{"name": "dns", "port": 53, "protocol": "UDP"}]}});
        let second = json!({"spec": {"ports": [{"name": "dns-tcp", "port": 53, "protocol": "TCP"}]}});
        assert_eq!(merged("Service", &one, &second)["spec"]["ports"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn directives_replace_delete_retain_and_order() {
        let target = json!({
            "metadata": {"labels": {"a": "1"}, "finalizers": ["x", "y"]},
            "spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}},
                     "template": {"spec": {"tolerations": [{"key": "k"}], "volumes": [{"name": "one"}, {"name": "two"}]}}},
        });
        let patch = json!({
            "metadata": {"labels": {"$patch": "replace", "b": "2"}, "$deleteFromPrimitiveList/finalizers": ["x"]},
            "spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"},
                     "template": {"spec": {"tolerations": [{"key": "l"}],
                        "$setElementOrder/volumes": [{"name": "three"}, {"name": "one"}], "volumes": [{"name": "three"}]}}},
        });
        let expected = json!({
            "metadata": {"labels": {"b": "2"}, "finalizers": ["y"]},
            "spec": {"strategy": {"type": "Recreate"},
                     "template": {"spec": {"tolerations": [{"key": "l"}],
                        "volumes": [{"name": "three"}, {"name": "one"}, {"name": "two"}]}}},
        });
        assert_eq!(merged("Deployment", &target, &patch), expected);
        let cleared = merged(
            "Deployment",
            &target,
            &json!({"spec": {"template": {"spec": {"volumes": [{"$patch": "replace"}]}}}}),
        );
        assert_eq!(cleared["spec"]["template"]["spec"]["volumes"], json!([]));
    }

    #[test]
    fn bad_patches_say_why_and_change_nothing() {
        let mut target = json!({"spec": {"containers": [{"name": "a"}]}});
        let error =
            strategic_merge("Pod", &mut target, &json!({"spec": {"containers": [{"image": "x"}]}})).unwrap_err();
        assert_eq!(error, PatchError::NoMergeKey { field: "spec.containers".into(), key: "name".into() });
        assert!(strategic_merge("Pod", &mut target, &json!({"spec": {"$patch": "explode"}})).is_err());
        assert!(strategic_merge("Widget", &mut target, &json!({})).is_err());
        assert_eq!(target, json!({"spec": {"containers": [{"name": "a"}]}}));
    }
}
