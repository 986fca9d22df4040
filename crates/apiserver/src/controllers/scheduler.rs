//! The scheduler: it spreads the pods of one owner over the nodes, then all pods.
//!
//! It honours readiness, `unschedulable`, taints and `nodeSelector`. It knows no resources, affinity
//! or priorities: nodes of the lab have no sizes. A pod that fits nowhere says so in its `PodScheduled`
//! condition, in kube-scheduler's words.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{Action, Mirror, conditioned, with_conditions};
use crate::fields::{
    at, condition, condition_holds, controller_uid, flag, is_terminating, items, name, set, text, uid,
};
use crate::selector::LabelSelector;

pub(super) fn reconcile(view: &Mirror, now_seconds: i64, actions: &mut Vec<Action>) {
    for pod in view.due_pods().into_iter().filter(|pod| !is_terminating(pod)) {
        // A pod that could not be scheduled before has a place now.
        let was_refused = condition(pod, "PodScheduled").is_some_and(|old| text(old, "status") == "False");
        if was_refused && !text(pod, "spec.nodeName").is_empty() {
            actions.push(with_scheduled(pod, true, "", "", now_seconds));
        }
    }
    let is_waiting = |pod: &&Value| !is_terminating(pod) && items(pod, "spec.schedulingGates").is_empty();
    let mut waiting: Vec<&Value> = view.due_unplaced_pods().into_iter().filter(is_waiting).collect();
    if waiting.is_empty() {
        return;
    }
    let mut load: BTreeMap<String, usize> = BTreeMap::new();
    let mut siblings: BTreeMap<(String, String), usize> = BTreeMap::new();
    for pod in view.all("Pod").filter(|pod| !is_terminating(pod)) {
        let node = text(pod, "spec.nodeName");
        if !node.is_empty() && !matches!(text(pod, "status.phase"), "Failed" | "Succeeded") {
            *load.entry(node.to_owned()).or_default() += 1;
            *siblings.entry((owner(pod), node.to_owned())).or_default() += 1;
        }
    }
    // The oldest pod first; of equal age by name, so that every pass agrees.
    waiting.sort_by_cached_key(|pod| (text(pod, "metadata.creationTimestamp").to_owned(), name(pod).to_owned()));
    for pod in waiting {
        let mut refusals: BTreeMap<&str, usize> = BTreeMap::new();
        let fitting = view.all("Node").filter(|node| match refusal(pod, node) {
            Some(reason) => {
                *refusals.entry(reason).or_default() += 1;
                false
            }
            None => true,
        });
        let best = fitting.map(name).min_by_key(|node| {
            let key = (owner(pod), (*node).to_owned());
            (siblings.get(&key).copied().unwrap_or(0), load.get(*node).copied().unwrap_or(0), *node)
        });
        let best = best.map(str::to_owned);
        if let Some(node) = best {
            *load.entry(node.clone()).or_default() += 1;
            *siblings.entry((owner(pod), node.clone())).or_default() += 1;
            let mut bound = pod.clone();
            set(&mut bound, "spec.nodeName", json!(node));
            actions.push(Action::Update(bound));
        } else {
            let reasons: Vec<String> = refusals.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            let total = view.all("Node").count();
            let message = match reasons.as_slice() {
                [] => "no nodes available to schedule pods".to_owned(),
                reasons => format!("0/{total} nodes are available: {}.", reasons.join(", ")),
            };
            let old = condition(pod, "PodScheduled");
            if old.is_none_or(|old| text(old, "message") != message || text(old, "status") != "False") {
                actions.push(with_scheduled(pod, false, "Unschedulable", &message, now_seconds));
            }
        }
    }
}

fn with_scheduled(pod: &Value, is_scheduled: bool, reason: &str, message: &str, now_seconds: i64) -> Action {
    let new = conditioned(pod, "PodScheduled", is_scheduled, reason, message, now_seconds);
    let mut updated = pod.clone();
    set(&mut updated, "status.conditions", with_conditions(pod, vec![new]));
    Action::UpdateStatus(updated)
}

/// Pods of one controller are spread together; a pod without one is alone.
fn owner(pod: &Value) -> String {
    controller_uid(pod).unwrap_or_else(|| uid(pod)).to_owned()
}

/// Why a pod may not run on a node.
fn refusal(pod: &Value, node: &Value) -> Option<&'static str> {
    if is_terminating(node) || !condition_holds(node, "Ready") {
        return Some("node(s) were not ready");
    }
    if flag(node, "spec.unschedulable") {
        return Some("node(s) were unschedulable");
    }
    let selector = at(pod, "spec.nodeSelector");
    let is_selected = match LabelSelector::from_object(selector) {
        _ if selector.is_null() => true,
        Ok(selector) => selector.matches(at(node, "metadata.labels")),
        Err(_) => false,
    };
    if !is_selected {
        return Some("node(s) didn't match Pod's node affinity/selector");
    }
    let is_tolerated =
        |taint: &Value| items(pod, "spec.tolerations").iter().any(|toleration| tolerates(toleration, taint));
    let mut taints = items(node, "spec.taints").iter().filter(|taint| text(taint, "effect") != "PreferNoSchedule");
    if taints.any(|taint| !is_tolerated(taint)) {
        return Some("node(s) had untolerated taint(s)");
    }
    None
}

fn tolerates(toleration: &Value, taint: &Value) -> bool {
    let effect = text(toleration, "effect");
    let key = text(toleration, "key");
    let is_existence = text(toleration, "operator") == "Exists";
    (effect.is_empty() || effect == text(taint, "effect"))
        && (key == text(taint, "key") || (key.is_empty() && is_existence))
        && (is_existence || text(toleration, "value") == text(taint, "value"))
}
