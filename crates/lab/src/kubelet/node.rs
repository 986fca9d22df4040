//! Registers a node with the API, as a kubelet does when it starts.

use serde_json::{Value, json};

use super::NodeContext;
use crate::client::{Client, ClientError};
use crate::clock;

/// How many pods a node says it takes: kubelet's default.
const PODS_MAX: u32 = 110;

/// Creates the Node object, or brings the one that is there up to date, and says that it is ready.
pub async fn register(client: &Client, node: &NodeContext) -> Result<(), ClientError> {
    let mut object = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {
                "kubernetes.io/hostname": node.name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": architecture(),
            },
        },
    });
    if let Some(zone) = &node.zone {
        object["metadata"]["labels"]["topology.kubernetes.io/zone"] = json!(zone);
    }
    client.apply("/api/v1/nodes", &node.name, &object).await?;
    let status = json!({ "status": status(node) });
    client.merge(&format!("/api/v1/nodes/{}/status", node.name), &status).await.map(drop)
}

fn status(node: &NodeContext) -> Value {
    let now = clock::now();
    let mut addresses: Vec<Value> =
        node.addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    addresses.push(json!({"type": "Hostname", "address": node.name}));
    let resources = json!({"cpu": "1", "memory": "1Gi", "pods": PODS_MAX.to_string()});
    let release =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    json!({
        "addresses": addresses,
        "capacity": resources,
        "allocatable": resources,
        "conditions": [{
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "message": "the lab's kubelet runs",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }],
        "nodeInfo": {
            "architecture": architecture(),
            "operatingSystem": "linux",
            "osImage": "portolan lab",
            "kernelVersion": release,
            "kubeletVersion": concat!("v", env!("CARGO_PKG_VERSION"), "-portolan-lab"),
            "kubeProxyVersion": "",
            "containerRuntimeVersion": concat!("portolan-lab://", env!("CARGO_PKG_VERSION")),
            "bootID": "",
            "machineID": "",
            "systemUUID": "",
        },
    })
}

/// The architecture as Go names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
