//! What goes when its owner or its namespace goes.
//!
//! An object goes when all its owners are gone. Owners are known by uid: a new object of the same name
//! is another owner. Foreground deletion and orphaning work through the owner's finalizers, as in
//! Kubernetes. A terminating Namespace loses its objects, then its finalizer.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Action, Mirror};
use crate::fields::{at, is_terminating, items, name, namespace, set, text, texts, uid};
use crate::resources::table_name;

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

pub(super) fn reconcile(view: &Mirror, actions: &mut Vec<Action>) {
    let mut seen: BTreeSet<(String, String, String)> = BTreeSet::new();
    let mut delete = |object: &Value, actions: &mut Vec<Action>| {
        let key = (table_name(object), namespace(object).to_owned(), name(object).to_owned());
        if !is_terminating(object) && seen.insert(key) {
            actions.push(Action::delete(object));
        }
    };
    for object in view.due_owned() {
        let references = items(object, "metadata.ownerReferences");
        // An owner of a kind that nobody watches here cannot be missed.
        let is_gone = |reference: &Value| view.knows(&table_name(reference)) && !view.has_uid(text(reference, "uid"));
        if !references.is_empty() && references.iter().all(is_gone) {
            delete(object, actions);
        }
    }
    for owner in view.due_owners().into_iter().filter(|owner| is_terminating(owner)) {
        let owner_uid = uid(owner);
        let below: Vec<&Value> = view.owned_by(owner_uid).collect();
        let finalizers: Vec<&str> = texts(owner, "metadata.finalizers").collect();
        if finalizers.contains(&ORPHAN) {
            actions.extend(below.iter().map(|object| orphaned(object, owner_uid)));
            if below.is_empty() {
                actions.push(without_finalizer(owner, ORPHAN));
            }
        } else if finalizers.contains(&FOREGROUND) {
            for object in &below {
                delete(object, actions);
            }
            if below.is_empty() {
                actions.push(without_finalizer(owner, FOREGROUND));
            }
        }
    }
    for ended in view.due_namespaces().into_iter().filter(|object| is_terminating(object)) {
        let mut is_empty = true;
        for object in view.in_namespace(name(ended)) {
            is_empty = false;
            delete(object, actions);
        }
        if is_empty && !items(ended, "spec.finalizers").is_empty() {
            let mut done = ended.clone();
            set(&mut done, "spec.finalizers", json!([]));
            actions.push(Action::Update(done));
        }
    }
}

fn orphaned(object: &Value, owner_uid: &str) -> Action {
    let mut object = object.clone();
    let kept = items(&object, "metadata.ownerReferences").iter();
    let kept: Vec<Value> = kept.filter(|reference| text(reference, "uid") != owner_uid).cloned().collect();
    set(&mut object, "metadata.ownerReferences", Value::Array(kept));
    Action::Update(object)
}

fn without_finalizer(object: &Value, finalizer: &str) -> Action {
    let mut object = object.clone();
    let kept: Vec<Value> =
        items(&object, "metadata.finalizers").iter().filter(|it| *it != finalizer).cloned().collect();
    debug_assert!(at(&object, "metadata.finalizers").is_array());
    set(&mut object, "metadata.finalizers", Value::Array(kept));
    Action::Update(object)
}
