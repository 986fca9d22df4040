//! podCIDRs: each node gets the lowest free subnet of each of the cluster's prefixes.

use serde_json::json;

use super::{Action, ControllersConfig, Mirror};
use crate::admission::{Objects, node_prefixes};
use crate::fields::{is_terminating, items, set, text};

pub(super) fn reconcile(view: &Mirror, config: &ControllersConfig, actions: &mut Vec<Action>) {
    if config.cluster_prefixes.is_empty() || !view.has_due_nodes() {
        return;
    }
    let Some(known) = view.table("Node") else { return };
    let is_bare = |node: &serde_json::Value| {
        text(node, "spec.podCIDR").is_empty() && items(node, "spec.podCIDRs").is_empty() && !is_terminating(node)
    };
    if !known.values().any(is_bare) {
        return;
    }
    let mut nodes: Objects = known.clone();
    for (key, node) in known.iter().filter(|(_, node)| is_bare(node)) {
        // A full range leaves the node without; its agent reports that it waits for a podCIDR.
        let Ok(prefixes) = node_prefixes(&nodes, &config.cluster_prefixes, config.node_prefix_lengths) else { return };
        let mut node = node.clone();
        set(&mut node, "spec.podCIDR", json!(prefixes[0]));
        set(&mut node, "spec.podCIDRs", json!(prefixes));
        nodes.insert(key.clone(), node.clone());
        actions.push(Action::Update(node));
    }
}
