//! Deployments: one ReplicaSet for each template, and the way from the old to the new.
//!
//! A rolling update keeps two promises: never more than `replicas + maxSurge` pods, never fewer
//! available ones than `replicas - maxUnavailable`.

use serde_json::{Value, json};

use super::{Action, Mirror, conditioned, controlled_by, with_conditions};
use crate::fields::{
    at, canonical, controller_uid, flag, is_terminating, label, name, namespace, number, set, suffix, text, uid,
};
use crate::resources::table_name;

const HASH_LABEL: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";

pub(super) fn reconcile(view: &Mirror, now_seconds: i64, actions: &mut Vec<Action>) {
    for deployment in view.due_deployments().into_iter().filter(|deployment| !is_terminating(deployment)) {
        let is_own = |set: &&Value| {
            table_name(set) == "ReplicaSet"
                && namespace(set) == namespace(deployment)
                && controller_uid(set) == Some(uid(deployment))
                && !is_terminating(set)
        };
        let owned: Vec<&Value> = view.owned_by(uid(deployment)).filter(is_own).collect();
        roll(deployment, &owned, actions);
        status(deployment, &owned, now_seconds, actions);
    }
}

/// The hash that names the ReplicaSet of a template.
fn template_hash(deployment: &Value) -> String {
    suffix(&canonical(at(deployment, "spec.template")), 10)
}

fn replicas(object: &Value) -> i64 {
    number(object, "spec.replicas").unwrap_or(1)
}

fn available(set: &Value) -> i64 {
    number(set, "status.availableReplicas").unwrap_or(0)
}

/// A count or a percentage of the replicas. Surge rounds up and unavailability down, so that a small
/// Deployment still moves.
fn share(value: &Value, replicas: i64, is_rounded_up: bool) -> i64 {
    if let Some(count) = value.as_i64() {
        return count.clamp(0, i64::from(i32::MAX));
    }
    let percent: i64 = value.as_str().and_then(|text| text.strip_suffix('%')?.parse().ok()).unwrap_or(25);
    let product = percent.max(0).saturating_mul(replicas);
    let share = if is_rounded_up { product.saturating_add(99) / 100 } else { product / 100 };
    share.min(i64::from(i32::MAX))
}

fn roll(deployment: &Value, owned: &[&Value], actions: &mut Vec<Action>) {
    let wanted = replicas(deployment);
    let hash = template_hash(deployment);
    let current = owned.iter().copied().find(|set| label(set, HASH_LABEL) == Some(&hash));
    let old: Vec<&Value> = owned.iter().copied().filter(|set| label(set, HASH_LABEL) != Some(&hash)).collect();
    let is_recreate = text(deployment, "spec.strategy.type") == "Recreate";
    let rolling = "spec.strategy.rollingUpdate";
    let surge = share(at(deployment, &format!("{rolling}.maxSurge")), wanted, true);
    let mut unavailable = share(at(deployment, &format!("{rolling}.maxUnavailable")), wanted, false);
    if surge == 0 && unavailable == 0 {
        unavailable = 1;
    }
    let is_paused = flag(deployment, "spec.paused");
    let old_total: i64 = old.iter().map(|set| replicas(set)).sum();

    let now = current.map_or(0, replicas);
    let room = if is_recreate {
        // Pods of the old template must be gone, not only unwanted.
        let still_there: i64 =
            old.iter().map(|set| number(set, "status.replicas").unwrap_or(0).max(replicas(set))).sum();
        if still_there == 0 { wanted } else { 0 }
    } else {
        (wanted + surge - old_total).max(0)
    };
    // Scaling down is immediate; scaling up waits for room.
    let target = wanted.min(now.max(room));
    match current {
        Some(set_now) if now != target => actions.push(scaled(set_now, target)),
        Some(_) => {}
        None if is_paused => {}
        None => actions.push(Action::Create(replica_set(deployment, &hash, target, next_revision(owned)))),
    }
    if is_paused {
        return;
    }
    shrink_old(deployment, &old, current, (wanted, target, unavailable), actions);
    clean_up(deployment, &old, actions);
}

/// Scales old ReplicaSets down as far as the promises allow.
fn shrink_old(
    deployment: &Value,
    old: &[&Value],
    current: Option<&Value>,
    (wanted, target, unavailable): (i64, i64, i64),
    actions: &mut Vec<Action>,
) {
    let is_recreate = text(deployment, "spec.strategy.type") == "Recreate";
    let old_total: i64 = old.iter().map(|set| replicas(set)).sum();
    let new_available = current.map_or(0, |set| available(set).min(replicas(set))).min(target);
    let promised = (wanted - unavailable).max(0);
    let mut budget = if is_recreate { old_total } else { old_total + new_available - promised };
    let old_available: i64 = old.iter().map(|set| available(set).min(replicas(set))).sum();
    let mut spare = if is_recreate { old_total } else { old_available + new_available - promised };
    // Pods that do not answer anyway go first and cost nothing that was promised.
    for set in old {
        let answering = available(set).min(replicas(set));
        let silent_down = (replicas(set) - answering).min(budget).max(0);
        budget -= silent_down;
        let answering_down = answering.min(budget).min(spare).max(0);
        budget -= answering_down;
        spare -= answering_down;
        if silent_down + answering_down > 0 {
            actions.push(scaled(set, replicas(set) - silent_down - answering_down));
        }
    }
}

fn scaled(replica_set: &Value, replicas: i64) -> Action {
    let mut set_now = replica_set.clone();
    set(&mut set_now, "spec.replicas", json!(replicas));
    Action::Update(set_now)
}

fn revision(object: &Value) -> i64 {
    let annotation = at(object, "metadata.annotations").get(REVISION).and_then(Value::as_str);
    annotation.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn next_revision(owned: &[&Value]) -> i64 {
    owned.iter().map(|set| revision(set)).max().unwrap_or(0) + 1
}

fn replica_set(deployment: &Value, hash: &str, replicas: i64, revision: i64) -> Value {
    let mut template = at(deployment, "spec.template").clone();
    let mut selector = at(deployment, "spec.selector").clone();
    let mut labels = at(&template, "metadata.labels").clone();
    if !labels.is_object() {
        labels = json!({});
    }
    labels[HASH_LABEL] = json!(hash);
    set(&mut template, "metadata.labels", labels.clone());
    let mut match_labels = at(&selector, "matchLabels").clone();
    if !match_labels.is_object() {
        match_labels = json!({});
    }
    match_labels[HASH_LABEL] = json!(hash);
    set(&mut selector, "matchLabels", match_labels);
    json!({
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": format!("{}-{hash}", name(deployment)),
            "namespace": namespace(deployment),
            "labels": labels,
            "annotations": {REVISION: revision.to_string()},
            "ownerReferences": controlled_by(deployment),
        },
        "spec": {
            "replicas": replicas,
            "minReadySeconds": number(deployment, "spec.minReadySeconds").unwrap_or(0),
            "selector": selector,
            "template": template,
        },
    })
}

/// Old ReplicaSets stay for `kubectl rollout undo`, as many as the history limit says.
fn clean_up(deployment: &Value, old: &[&Value], actions: &mut Vec<Action>) {
    let limit = usize::try_from(number(deployment, "spec.revisionHistoryLimit").unwrap_or(10)).unwrap_or(10);
    let is_empty = |set: &&&Value| replicas(set) == 0 && number(set, "status.replicas").unwrap_or(0) == 0;
    let mut empty: Vec<&Value> = old.iter().filter(is_empty).copied().collect();
    empty.sort_by_key(|set| std::cmp::Reverse(revision(set)));
    actions.extend(empty.into_iter().skip(limit).map(Action::delete));
}

fn status(deployment: &Value, owned: &[&Value], now_seconds: i64, actions: &mut Vec<Action>) {
    let hash = template_hash(deployment);
    let current = owned.iter().find(|set| label(set, HASH_LABEL) == Some(&hash));
    let sum = |field: &str| -> i64 { owned.iter().map(|set| number(set, field).unwrap_or(0)).sum() };
    let wanted = replicas(deployment);
    let (total, ready, available) =
        (sum("status.replicas"), sum("status.readyReplicas"), sum("status.availableReplicas"));
    let updated = current.map_or(0, |set| number(set, "status.replicas").unwrap_or(0));
    let rolling = at(deployment, "spec.strategy.rollingUpdate.maxUnavailable");
    let is_recreate = text(deployment, "spec.strategy.type") == "Recreate";
    let tolerated = if is_recreate { 0 } else { share(rolling, wanted, false) };

    let is_available = available >= wanted - tolerated;
    let (reason, message) = if is_available {
        ("MinimumReplicasAvailable", "Deployment has minimum availability.")
    } else {
        ("MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
    };
    let mut conditions = vec![conditioned(deployment, "Available", is_available, reason, message, now_seconds)];
    if let Some(set) = current {
        let is_complete = updated == wanted && total == wanted && available >= wanted;
        let (reason, verb) = if is_complete {
            ("NewReplicaSetAvailable", "successfully progressed")
        } else {
            ("ReplicaSetUpdated", "is progressing")
        };
        let message = format!("ReplicaSet \"{}\" {verb}{}", name(set), if is_complete { "." } else { "" })
            .replace("successfully", "has successfully");
        conditions.push(conditioned(deployment, "Progressing", true, reason, &message, now_seconds));
    }
    let mut new = json!({
        "observedGeneration": number(deployment, "metadata.generation").unwrap_or(1),
        "conditions": with_conditions(deployment, conditions),
    });
    // Zero counts are left out, as kube-apiserver does; kubectl reads an absent count as zero.
    let counts = [
        ("replicas", total),
        ("updatedReplicas", updated),
        ("readyReplicas", ready),
        ("availableReplicas", available),
        ("unavailableReplicas", (wanted.max(total) - available).max(0)),
    ];
    for (field, count) in counts.into_iter().filter(|(_, count)| *count != 0) {
        set(&mut new, field, json!(count));
    }
    if *at(deployment, "status") != new {
        let mut updated = deployment.clone();
        set(&mut updated, "status", new);
        actions.push(Action::UpdateStatus(updated));
    }
}
