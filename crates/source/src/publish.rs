//! What a node's agent writes to its own Node object.
//!
//! The annotations are Flannel's, under its keys, so that its nodes and ours can share a cluster.
//! Both writes read first, and write only what differs: an agent that restarts changes nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use portolan_net::{Family, MacAddress, NodeName, Vni};
use portolan_state::NodeTunnel;
use serde_json::{Value, json};

use crate::backoff::Backoff;
use crate::convert::{
    ANNOTATION_BACKEND_DATA, ANNOTATION_BACKEND_TYPE, ANNOTATION_BACKEND_V6_DATA, ANNOTATION_MANAGER,
    ANNOTATION_PUBLIC_IP, ANNOTATION_PUBLIC_IPV6,
};
use crate::limits::WRITE_ATTEMPTS_MAX;
use crate::{SourceError, explain};

/// What a write came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The object was changed.
    Written,
    /// The object said so already.
    Unchanged,
}

/// Publishes the node's end of the fabric in its annotations, as Flannel does.
pub async fn publish_node_tunnel(
    client: &Client,
    node: &NodeName,
    tunnel: &NodeTunnel,
    seed: u64,
) -> Result<Published, SourceError> {
    let wanted = tunnel_annotations(tunnel);
    let action = format!("publish the tunnel of Node {node}");
    let nodes: Api<v1::Node> = Api::all(client.clone());
    retry(&action, seed, || annotate(&nodes, node, &wanted)).await
}

async fn annotate(
    nodes: &Api<v1::Node>,
    node: &NodeName,
    wanted: &BTreeMap<&'static str, Option<String>>,
) -> Result<Published, kube::Error> {
    let current = nodes.get(node.as_str()).await?.metadata.annotations.unwrap_or_default();
    let patch = difference(&current, wanted);
    if patch.is_empty() {
        return Ok(Published::Unchanged);
    }
    let patch = json!({"metadata": {"annotations": patch}});
    nodes.patch(node.as_str(), &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(Published::Written)
}

/// Says in the node's status that its network works, so that the scheduler uses the node.
///
/// Cloud providers set the condition `NetworkUnavailable` on new nodes and wait for this.
pub async fn set_network_unavailable_false(
    client: &Client,
    node: &NodeName,
    seed: u64,
) -> Result<Published, SourceError> {
    let action = format!("set condition NetworkUnavailable of Node {node}");
    let nodes: Api<v1::Node> = Api::all(client.clone());
    retry(&action, seed, || set_condition(&nodes, node)).await
}

async fn set_condition(nodes: &Api<v1::Node>, node: &NodeName) -> Result<Published, kube::Error> {
    let status = nodes.get(node.as_str()).await?.status.unwrap_or_default();
    let mut conditions = status.conditions.unwrap_or_default().into_iter();
    if conditions.any(|condition| condition.type_ == "NetworkUnavailable" && condition.status == "False") {
        return Ok(Published::Unchanged);
    }
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    // Conditions are a list with `type` as its key: a strategic merge leaves the others alone.
    let patch = json!({"status": {"conditions": [{
        "type": "NetworkUnavailable",
        "status": "False",
        "reason": "PortolanIsUp",
        "message": "Portolan is running on this node",
        "lastTransitionTime": now,
        "lastHeartbeatTime": now,
    }]}});
    nodes.patch_status(node.as_str(), &PatchParams::default(), &Patch::Strategic(patch)).await?;
    Ok(Published::Written)
}

/// The annotations of a Node object that say this of its tunnel; `None` for one that must not be there.
pub fn tunnel_annotations(tunnel: &NodeTunnel) -> BTreeMap<&'static str, Option<String>> {
    let public = |family| {
        let mut addresses = tunnel.public_addresses.iter();
        addresses.find(|address| Family::of(**address) == family).map(IpAddr::to_string)
    };
    let data = |mac: Option<MacAddress>| {
        // Flannel's own key order; its readers decode JSON and do not care.
        mac.map(|mac| json!({"VNI": tunnel.vni.map_or(0, Vni::get), "VtepMAC": mac.to_string()}).to_string())
    };
    BTreeMap::from([
        (ANNOTATION_BACKEND_TYPE, Some(tunnel.backend.to_string())),
        // Flannel writes "null" for a backend without data, and reads its absence as an error.
        (ANNOTATION_BACKEND_DATA, Some(data(tunnel.vtep_mac_v4).unwrap_or_else(|| "null".to_owned()))),
        (ANNOTATION_BACKEND_V6_DATA, data(tunnel.vtep_mac_v6)),
        (ANNOTATION_PUBLIC_IP, public(Family::V4)),
        (ANNOTATION_PUBLIC_IPV6, public(Family::V6)),
        (ANNOTATION_MANAGER, Some("true".to_owned())),
    ])
}

/// The merge patch from what is to what must be (RFC 7396: null removes).
fn difference(
    current: &BTreeMap<String, String>,
    wanted: &BTreeMap<&'static str, Option<String>>,
) -> serde_json::Map<String, Value> {
    let differs = wanted.iter().filter(|(key, value)| current.get(**key) != value.as_ref());
    differs.map(|(key, value)| ((*key).to_owned(), json!(value))).collect()
}

/// Tries until it succeeds, the error is one that trying again does not mend, or the bound is met.
async fn retry<T, F>(action: &str, seed: u64, attempt: impl Fn() -> F) -> Result<T, SourceError>
where
    F: Future<Output = Result<T, kube::Error>>,
{
    let mut backoff = Backoff::new(seed);
    let mut attempts = 0;
    loop {
        attempts += 1;
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let code = explain::code_of(&error);
        let lasting = matches!(code, Some(400..=499)) && !matches!(code, Some(404 | 409 | 429));
        if lasting || attempts == WRITE_ATTEMPTS_MAX {
            let hint = match code {
                Some(403) => "allow this account to get and patch nodes and nodes/status",
                Some(404) => "register the node with the cluster first",
                Some(_) => "look at the server's log",
                None => "look whether the server runs and can be reached from here",
            };
            let (action, hint) = (action.to_owned(), hint.to_owned());
            return Err(SourceError::Write { action, reason: explain::chain(&error), hint, source: Box::new(error) });
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
}
