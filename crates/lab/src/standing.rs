//! What every lab has besides the user's manifests: files of the roles, and the cluster's DNS.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Context as _;
use portolan_net::Family;
use serde_json::{Value, json};

use crate::Layout;
use crate::client::{Client, ClientError};
use crate::description::{CLUSTER_DOMAIN, Description};
use crate::topology::INTERFACE;

/// How many DNS servers the cluster has.
const DNS_REPLICAS: usize = 2;

/// The port of DNS.
const DNS_PORT: u16 = 53;

/// Writes the files that agents and DNS servers are started with.
pub(crate) fn write_files(layout: &Layout, description: &Description) -> anyhow::Result<()> {
    for node in &description.topology.nodes {
        let directory = layout.node(&node.name);
        let state = directory.join("state");
        fs::create_dir_all(&state).with_context(|| format!("creating {}", state.display()))?;
        write(&directory.join("agent.yaml"), &agent(layout, description, &node.name))?;
    }
    fs::create_dir_all(layout.pods()).context("creating the pods' directory")?;
    write(&layout.cluster_dns(), &cluster_dns(layout, description))?;
    write(&layout.outside_dns(), &outside_dns(description))
}

/// JSON is YAML (YAML 1.2 §1.2), so one writer does for both.
fn write(path: &Path, value: &Value) -> anyhow::Result<()> {
    let text = serde_json::to_vec_pretty(value).context("writing a configuration")?;
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

fn agent(layout: &Layout, description: &Description, node: &str) -> Value {
    let directory = layout.node(node);
    let mut agent = json!({
        "node": node,
        "kubernetes": {"socket": description.api(layout)},
        "fabric": description.fabric,
        "services": description.services,
        "clusterPrefixes": description.cluster_prefixes,
        "servicePrefixes": description.service_prefixes,
        "masquerade": true,
        "underlayInterface": INTERFACE,
        "bridge": "cni0",
        "stateDirectory": directory.join("state"),
        "runtimeDirectory": directory,
    });
    if let Some(fields) = agent.as_object_mut() {
        fields.extend(description.fabric_options.clone());
    }
    agent
}

fn cluster_dns(layout: &Layout, description: &Description) -> Value {
    let upstream = description.topology.outside_server().map(|server| server.addresses.as_slice()).unwrap_or_default();
    let forward: Vec<SocketAddr> = upstream.iter().map(|address| SocketAddr::new(*address, DNS_PORT)).collect();
    json!({
        "kubernetes": {"socket": description.api(layout)},
        "server": {"zone": CLUSTER_DOMAIN, "listen": listen(description), "forward": forward},
    })
}

/// The names of the world outside: every client by name.
fn outside_dns(description: &Description) -> Value {
    let hosts: Vec<(String, IpAddr)> = description
        .topology
        .clients
        .iter()
        .flat_map(|client| client.addresses.iter().map(|address| (outside_name(&client.name), *address)))
        .collect();
    json!({
        "server": {"zone": "lab.invalid", "listen": listen(description), "forward": [], "hosts": hosts},
    })
}

/// The DNS name of a machine outside the cluster (RFC 6761 §6.2 keeps `test` for this).
pub(crate) fn outside_name(client: &str) -> String {
    let stem = client.trim_end_matches(|letter: char| letter.is_ascii_digit()).trim_end_matches('-');
    if client.ends_with("-1") { format!("{stem}.outside.test") } else { format!("{client}.outside.test") }
}

/// The wildcard of IPv6 takes IPv4 too (RFC 3493 §5.3), so with both families one address is enough,
/// and a second one would be refused as taken.
fn listen(description: &Description) -> Vec<SocketAddr> {
    let any: IpAddr = if description.ip_families.has(Family::V6) { [0u16; 8].into() } else { [0u8; 4].into() };
    vec![SocketAddr::new(any, DNS_PORT)]
}

/// Creates the cluster's DNS Service and its servers.
pub(crate) async fn create_dns(client: &Client, layout: &Layout, description: &Description) -> Result<(), ClientError> {
    let addresses = description.dns_addresses();
    let families: Vec<String> = description.ip_families.list().iter().map(ToString::to_string).collect();
    let policy = if families.len() > 1 { "RequireDualStack" } else { "SingleStack" };
    let labels = json!({"k8s-app": "kube-dns"});
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": labels},
        "spec": {
            "clusterIP": addresses.first(),
            "clusterIPs": addresses,
            "ipFamilies": families,
            "ipFamilyPolicy": policy,
            "selector": labels,
            "ports": [
                {"name": "dns", "protocol": "UDP", "port": DNS_PORT, "targetPort": DNS_PORT},
                {"name": "dns-tcp", "protocol": "TCP", "port": DNS_PORT, "targetPort": DNS_PORT},
            ],
        },
    });
    let run = format!("portolan dns --config {}", layout.cluster_dns().display());
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "portolan-dns", "namespace": "kube-system", "labels": labels},
        "spec": {
            "replicas": DNS_REPLICAS,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels, "annotations": {"portolan.dev/run": run}},
                "spec": {
                    "dnsPolicy": "Default",
                    "containers": [{
                        "name": "dns",
                        "image": "portolan",
                        "ports": [
                            {"name": "dns", "containerPort": DNS_PORT, "protocol": "UDP"},
                            {"name": "dns-tcp", "containerPort": DNS_PORT, "protocol": "TCP"},
                        ],
                    }],
                },
            },
        },
    });
    client.apply("/api/v1/namespaces/kube-system/services", "kube-dns", &service).await?;
    client.apply("/apis/apps/v1/namespaces/kube-system/deployments", "portolan-dns", &deployment).await.map(drop)
}

/// Creates the namespaces that are always there, if the API server did not.
pub(crate) async fn create_namespaces(client: &Client) -> Result<(), ClientError> {
    for name in ["default", "kube-system"] {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        match client.create("/api/v1/namespaces", &object).await {
            Err(error) if !error.is(http::StatusCode::CONFLICT) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::outside_name;

    #[test]
    fn the_first_machine_of_a_kind_needs_no_number() {
        assert_eq!(outside_name("server-1"), "server.outside.test");
        assert_eq!(outside_name("server-2"), "server-2.outside.test");
        assert_eq!(outside_name("registry"), "registry.outside.test");
    }
}
