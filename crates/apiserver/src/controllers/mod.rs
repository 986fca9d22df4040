//! The small controllers that make a cluster out of objects.
//!
//! One pass, `Controllers::reconcile`, looks at all objects and says what to write. It is level
//! triggered: it depends on what is, not on what happened, so it may run late, twice, or on a view
//! that misses the newest writes. Names of new objects come from what they are made from, so a pass
//! over a stale view asks for a name that is taken, and the write fails instead of doubling.
//!
//! ```text
//!   Deployment ─▶ ReplicaSet ─▶ Pod ─▶ node (scheduler)
//!   Service + Pod ─▶ EndpointSlice, Endpoints        hand-written Endpoints ─▶ EndpointSlice
//!   Node ─▶ podCIDRs                                  owner or namespace gone ─▶ delete
//!   Event that is an hour old ─▶ delete
//! ```
//!
//! A pass looks at what changed and at whom that concerns, which the `Mirror` notes as it takes changes;
//! its result is that of a pass over everything. Whoever runs the passes applies each change to the
//! `Mirror` at once, and calls `mark_all_dirty` when a write failed.

mod deployment;
mod endpoint_slice;
mod endpoints;
mod expiry;
mod garbage;
mod mirror;
mod node_ipam;
mod replica_set;
mod scheduler;

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::admission::NodePrefixLengths;
use crate::fields::{condition, format_time, name, namespace, set, text, uid};
use crate::resources::table_name;

pub use mirror::Mirror;

/// A write that a controller asks for. `Update` and `UpdateStatus` carry the resource version that
/// the controller saw, so a conflict means that the next pass will think again.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make an object.
    Create(Value),
    /// Replace an object, its status apart.
    Update(Value),
    /// Replace the status of an object.
    UpdateStatus(Value),
    /// Delete an object if it still has this uid.
    Delete {
        /// The kind, as the mirror names it.
        kind: String,
        /// The namespace; empty for cluster-scoped objects.
        namespace: String,
        /// The name.
        name: String,
        /// The uid of the object that is meant, not of a later one of the same name.
        uid: String,
    },
}

impl Action {
    /// The uid of the object that it changes.
    fn uid(&self) -> Option<&str> {
        match self {
            Action::Create(_) => None,
            Action::Update(object) | Action::UpdateStatus(object) => Some(uid(object)),
            Action::Delete { uid, .. } => Some(uid),
        }
    }

    fn delete(object: &Value) -> Action {
        Action::Delete {
            kind: table_name(object),
            namespace: namespace(object).to_owned(),
            name: name(object).to_owned(),
            uid: uid(object).to_owned(),
        }
    }
}

/// What the controllers need to know about the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ControllersConfig {
    /// The ranges of pod addresses, from which nodes get their podCIDRs. Empty: nodes bring their own.
    pub cluster_prefixes: Vec<IpNet>,
    /// How long a node's prefixes are.
    pub node_prefix_lengths: NodePrefixLengths,
    /// Goes into generated names, so that two clusters have different ones.
    pub seed: u64,
}

/// The controllers.
#[derive(Debug, Clone, Default)]
pub struct Controllers {
    config: ControllersConfig,
}

impl Controllers {
    /// Controllers of one cluster.
    pub fn new(config: ControllersConfig) -> Controllers {
        Controllers { config }
    }

    /// One pass: what must be written so that the cluster comes closer to what its objects ask for.
    ///
    /// It looks at what changed since the last `take_dirty`. When nothing is to be done for a view with
    /// everything marked, the cluster is settled.
    pub fn reconcile(&self, view: &Mirror, now_seconds: i64) -> Vec<Action> {
        let mut actions = Vec::new();
        node_ipam::reconcile(view, &self.config, &mut actions);
        deployment::reconcile(view, now_seconds, &mut actions);
        replica_set::reconcile(view, self.config.seed, now_seconds, &mut actions);
        scheduler::reconcile(view, now_seconds, &mut actions);
        let services = view.due_services();
        endpoint_slice::reconcile(view, &services, &mut actions);
        endpoints::reconcile(view, &services, &mut actions);
        expiry::reconcile(view, now_seconds, &mut actions);
        // What another controller writes in this pass is not taken away under it; the next pass looks again.
        let touched: BTreeSet<String> = actions.iter().filter_map(Action::uid).map(str::to_owned).collect();
        let mut collected = Vec::new();
        garbage::reconcile(view, &mut collected);
        actions.extend(collected.into_iter().filter(|action| !action.uid().is_some_and(|uid| touched.contains(uid))));
        actions
    }
}

/// An owner reference that makes the owner the controller of what carries it.
fn controlled_by(owner: &Value) -> Value {
    json!([{
        "apiVersion": text(owner, "apiVersion"),
        "kind": text(owner, "kind"),
        "name": name(owner),
        "uid": uid(owner),
        "controller": true,
        "blockOwnerDeletion": true,
    }])
}

/// A condition; the time of its transition is kept while its status stays.
fn conditioned(object: &Value, kind: &str, status: bool, reason: &str, message: &str, now_seconds: i64) -> Value {
    let status = if status { "True" } else { "False" };
    let old = condition(object, kind);
    let now = format_time(now_seconds);
    let since = old.filter(|old| text(old, "status") == status).map_or("", |old| text(old, "lastTransitionTime"));
    let mut new = json!({"type": kind, "status": status});
    set(&mut new, "lastTransitionTime", json!(if since.is_empty() { &now } else { since }));
    set(&mut new, "reason", json!(reason));
    set(&mut new, "message", json!(message));
    if text(object, "kind") == "Deployment" {
        let is_same = old.is_some_and(|old| text(old, "status") == status && text(old, "reason") == reason);
        let updated = old.filter(|_| is_same).map_or("", |old| text(old, "lastUpdateTime"));
        set(&mut new, "lastUpdateTime", json!(if updated.is_empty() { &now } else { updated }));
    }
    new
}

/// The conditions of an object with some put in the place of those of their type.
fn with_conditions(object: &Value, new: Vec<Value>) -> Value {
    let mut conditions = crate::fields::items(object, "status.conditions").to_vec();
    for condition in new {
        match conditions.iter_mut().find(|old| text(old, "type") == text(&condition, "type")) {
            Some(old) => *old = condition,
            None => conditions.push(condition),
        }
    }
    Value::Array(conditions)
}

#[cfg(test)]
mod tests;
