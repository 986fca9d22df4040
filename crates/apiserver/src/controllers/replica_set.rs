//! ReplicaSets: as many pods as they ask for.
//!
//! A pod's name is `<set>-<5 characters>`. The characters come from the set, its resource version and
//! the pods that it has: the same view gives the same names, so that a pass over a stale view cannot
//! make more pods than were missing, and a pod that was deleted does not come back under its name.

use serde_json::{Value, json};

use super::{Action, Mirror, controlled_by};
use crate::fields::{
    at, condition, condition_holds, controller_uid, generated_name, is_terminating, name, namespace, number,
    parse_time, set, suffix, text, uid,
};
use crate::resources::table_name;
use crate::selector::LabelSelector;

/// How many pods of one set are made or deleted in one pass.
const CHANGES_MAX: usize = 500;

pub(super) fn reconcile(view: &Mirror, seed: u64, now_seconds: i64, actions: &mut Vec<Action>) {
    for replica_set in view.due_replica_sets().into_iter().filter(|set| !is_terminating(set)) {
        let own = uid(replica_set);
        let is_own = |pod: &&Value| {
            table_name(pod) == "Pod" && namespace(pod) == namespace(replica_set) && controller_uid(pod) == Some(own)
        };
        let all: Vec<&Value> = view.owned_by(own).filter(is_own).collect();
        let is_finished = |pod: &Value| matches!(text(pod, "status.phase"), "Failed" | "Succeeded");
        let active: Vec<&Value> = all.iter().copied().filter(|pod| !is_terminating(pod) && !is_finished(pod)).collect();
        let wanted = usize::try_from(number(replica_set, "spec.replicas").unwrap_or(1)).unwrap_or(0);
        if active.len() < wanted {
            create(view, replica_set, &all, (wanted - active.len()).min(CHANGES_MAX), seed, actions);
        } else {
            let surplus = (active.len() - wanted).min(CHANGES_MAX);
            actions.extend(dispensable(&active).into_iter().take(surplus).map(Action::delete));
        }
        status(replica_set, &active, now_seconds, actions);
    }
}

fn create(view: &Mirror, replica_set: &Value, all: &[&Value], missing: usize, seed: u64, actions: &mut Vec<Action>) {
    let uids: Vec<&str> = all.iter().map(|pod| uid(pod)).collect();
    let version = text(replica_set, "metadata.resourceVersion");
    let base = format!("{seed}/{}/{version}/{}", uid(replica_set), uids.join(","));
    // Five of 27 characters collide rarely: twice as many tries as pods are plenty.
    let names = (0..missing * 2 + 8)
        .map(|try_number| generated_name(name(replica_set), &suffix(&format!("{base}/{try_number}"), 5)));
    let mut made = std::collections::BTreeSet::new();
    for pod_name in names {
        if made.len() == missing {
            break;
        }
        if view.get("Pod", namespace(replica_set), &pod_name).is_none() && made.insert(pod_name.clone()) {
            actions.push(Action::Create(pod(replica_set, &pod_name)));
        }
    }
}

fn pod(replica_set: &Value, pod_name: &str) -> Value {
    let template = at(replica_set, "spec.template");
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name,
            "generateName": format!("{}-", name(replica_set)),
            "namespace": namespace(replica_set),
            "ownerReferences": controlled_by(replica_set),
        },
        "spec": at(template, "spec").clone(),
    });
    for field in ["metadata.labels", "metadata.annotations"] {
        if at(template, field).is_object() {
            set(&mut pod, field, at(template, field).clone());
        }
    }
    pod
}

/// The pods in the order in which they can be done without: those without a node, those that are not
/// ready, those with the most company on their node, the newest.
fn dispensable<'a>(active: &[&'a Value]) -> Vec<&'a Value> {
    let company =
        |pod: &Value| active.iter().filter(|other| text(other, "spec.nodeName") == text(pod, "spec.nodeName")).count();
    let mut pods = active.to_vec();
    pods.sort_by_cached_key(|pod| {
        (
            !text(pod, "spec.nodeName").is_empty(),
            condition_holds(pod, "Ready"),
            std::cmp::Reverse(company(pod)),
            std::cmp::Reverse(parse_time(text(pod, "metadata.creationTimestamp"))),
            name(pod).to_owned(),
        )
    });
    pods
}

fn status(replica_set: &Value, active: &[&Value], now_seconds: i64, actions: &mut Vec<Action>) {
    let min_ready_seconds = number(replica_set, "spec.minReadySeconds").unwrap_or(0);
    let is_available = |pod: &Value| {
        let since = condition(pod, "Ready").and_then(|ready| parse_time(text(ready, "lastTransitionTime")));
        min_ready_seconds == 0 || since.is_some_and(|since| since.saturating_add(min_ready_seconds) <= now_seconds)
    };
    let ready: Vec<&&Value> = active.iter().filter(|pod| condition_holds(pod, "Ready")).collect();
    let template = at(replica_set, "spec.template.metadata.labels");
    let is_full = LabelSelector::from_object(&json!({"matchLabels": template})).unwrap_or_default();
    let labelled = active.iter().filter(|pod| is_full.matches(at(pod, "metadata.labels"))).count();
    let mut new = json!({
        "observedGeneration": number(replica_set, "metadata.generation").unwrap_or(1),
        "replicas": active.len(),
    });
    let available = ready.iter().filter(|pod| is_available(pod)).count();
    for (field, count) in
        [("fullyLabeledReplicas", labelled), ("readyReplicas", ready.len()), ("availableReplicas", available)]
    {
        if count != 0 {
            set(&mut new, field, json!(count));
        }
    }
    if *at(replica_set, "status") != new {
        let mut updated = replica_set.clone();
        set(&mut updated, "status", new);
        actions.push(Action::UpdateStatus(updated));
    }
}
