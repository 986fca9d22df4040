//! From what the user typed to a packet and its sender.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::anyhow;
use portolan_agent::api::{FrontendKey, Pod};
use portolan_agent::table::Table;
use portolan_net::{Family, NodeName, ObjectKey, Packet, Protocol};
use portolan_trace::Ingress;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{AgentCluster, Sender, Sent, TraceArguments};
use crate::agents::Agents;
use crate::output::Failure;
use crate::target::Target;

/// A row of the table `services`, as far as it matters here.
#[derive(Debug, Deserialize)]
struct ServiceRow {
    namespace: String,
    name: String,
    port: String,
    frontend: FrontendKey,
}

/// A destination: addresses that stand for it, its port, and the protocol if it has one of its own.
struct Destination {
    text: String,
    addresses: Vec<IpAddr>,
    port: Option<u16>,
    protocol: Option<Protocol>,
}

/// The senders' and receivers' addresses, ports and protocol, from the command line and the agents' tables.
pub(super) async fn resolve(
    agents: &Agents,
    cluster: &AgentCluster,
    arguments: &TraceArguments,
) -> Result<Sent, Failure> {
    let pods: Vec<Pod> = items(agents, "pods").await?;
    let (from_text, sender, sources) = sender(cluster, &pods, &arguments.from)?;
    let is_outside = matches!(sender, Sender::Outside(_));
    let destination = match &arguments.to {
        Target::Service(key, port) => service(agents, cluster, key, port.as_deref(), is_outside).await?,
        Target::Url { host, port } => match host.parse::<IpAddr>() {
            Ok(address) => {
                Destination { text: host.clone(), addresses: vec![address], port: Some(*port), protocol: None }
            }
            Err(_) => service(agents, cluster, &service_named(host)?, Some(&port.to_string()), is_outside).await?,
        },
        other => machine(cluster, &pods, other)?,
    };
    let protocol = arguments.protocol.or(destination.protocol).unwrap_or(Protocol::Tcp);
    let family = common_family(&sources, &destination, arguments)?;
    let address_of = |addresses: &[IpAddr]| addresses.iter().copied().find(|it| Family::of(*it) == family);
    let unspecified: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let port = destination.port.or(arguments.port);
    if protocol.has_ports() && port.is_none() {
        return Err(Failure::Usage(anyhow!("{} has no port: say which with --port", destination.text)));
    }
    let packet = Packet {
        source: address_of(&sources).unwrap_or(unspecified),
        destination: address_of(&destination.addresses).unwrap_or(unspecified),
        protocol,
        source_port: source_port(),
        destination_port: port.unwrap_or(0),
        mark: 0,
    };
    Ok(Sent { from_text, to_text: destination.text, sender, packet })
}

/// A port from the ephemeral range (RFC 6335 §6) that differs from one trace to the next.
fn source_port() -> u16 {
    let nanoseconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |elapsed| elapsed.subsec_nanos());
    49_152 + u16::try_from((nanoseconds / 1000) % 16_384).unwrap_or(0)
}

fn common_family(sources: &[IpAddr], destination: &Destination, arguments: &TraceArguments) -> Result<Family, Failure> {
    let has = |addresses: &[IpAddr], family| addresses.iter().any(|address| Family::of(*address) == family);
    let order = if arguments.ipv6 { [Family::V6, Family::V4] } else { [Family::V4, Family::V6] };
    order
        .into_iter()
        .find(|family| has(&destination.addresses, *family) && (sources.is_empty() || has(sources, *family)))
        .ok_or_else(|| {
            Failure::No(anyhow!(
                "the two ends have no IP family in common: {sources:?} and {:?}",
                destination.addresses
            ))
        })
}

fn sender(cluster: &AgentCluster, pods: &[Pod], from: &Target) -> Result<(String, Sender, Vec<IpAddr>), Failure> {
    match from {
        Target::Pod(key) => {
            let pod = find_pod(pods, key)?;
            let node = pod
                .node
                .clone()
                .ok_or_else(|| Failure::No(anyhow!("pod {} runs on no node yet: see kubectl describe pod", pod.key)))?;
            let ingress = if pod.host_network { Ingress::Node } else { Ingress::Pod };
            Ok((format!("pod/{}", pod.key), Sender::Agent(node, ingress), pod.addresses.clone()))
        }
        Target::Node(name) => {
            let node = NodeName::from(name.as_str());
            if !cluster.nodes.contains_key(&node) {
                return Err(Failure::Usage(anyhow!("node {name} is not known here")));
            }
            // The node's routes choose the source address.
            Ok((format!("node/{name}"), Sender::Agent(node, Ingress::Node), Vec::new()))
        }
        Target::Client(name) => {
            let addresses: Vec<IpAddr> =
                cluster.outside.iter().filter(|(_, it)| *it == name).map(|(address, _)| *address).collect();
            if addresses.is_empty() {
                return Err(Failure::Usage(anyhow!("no machine outside the cluster is called {name}")));
            }
            Ok((format!("client/{name}"), Sender::Outside(name.clone()), addresses))
        }
        Target::Address(address, _) => {
            if let Some(pod) = pods.iter().find(|pod| pod.addresses.contains(address) && !pod.host_network) {
                return sender(cluster, pods, &Target::Pod(pod.key.clone()));
            }
            Err(Failure::Usage(anyhow!("{address} is no pod's address: FROM is a pod, a node or a client")))
        }
        Target::Service(..) | Target::Url { .. } => {
            Err(Failure::Usage(anyhow!("a Service sends nothing: FROM is a pod, a node or a client")))
        }
    }
}

fn machine(cluster: &AgentCluster, pods: &[Pod], to: &Target) -> Result<Destination, Failure> {
    let plain = |text: String, addresses: Vec<IpAddr>, port| Destination { text, addresses, port, protocol: None };
    match to {
        Target::Pod(key) => {
            let pod = find_pod(pods, key)?;
            Ok(plain(format!("pod/{}", pod.key), pod.addresses.clone(), None))
        }
        Target::Node(name) => {
            let node = cluster.nodes.get(&NodeName::from(name.as_str()));
            let node = node.ok_or_else(|| Failure::Usage(anyhow!("node {name} is not known here")))?;
            Ok(plain(format!("node/{name}"), node.addresses.clone(), None))
        }
        Target::Client(name) => {
            let named = cluster.outside.iter().filter(|(_, it)| *it == name).map(|(address, _)| *address).collect();
            Ok(plain(format!("client/{name}"), named, None))
        }
        Target::Address(address, port) => Ok(plain(address.to_string(), vec![*address], *port)),
        Target::Service(..) | Target::Url { .. } => {
            Err(Failure::Internal(anyhow!("a Service was taken for a machine")))
        }
    }
}

/// The pod of this name, or the first whose name begins so: pods of a Deployment have random endings.
fn find_pod<'a>(pods: &'a [Pod], key: &ObjectKey) -> Result<&'a Pod, Failure> {
    let in_namespace = || pods.iter().filter(|pod| pod.key.namespace == key.namespace);
    in_namespace()
        .find(|pod| pod.key.name == key.name)
        .or_else(|| in_namespace().find(|pod| pod.key.name.starts_with(&*key.name)))
        .ok_or_else(|| Failure::No(anyhow!("no pod {key}, nor one whose name begins so: see kubectl get pods -A")))
}

async fn service(
    agents: &Agents,
    cluster: &AgentCluster,
    key: &ObjectKey,
    port: Option<&str>,
    is_outside: bool,
) -> Result<Destination, Failure> {
    let rows: Vec<ServiceRow> = items(agents, "services").await?;
    let mut rows: Vec<ServiceRow> =
        rows.into_iter().filter(|row| *row.namespace == *key.namespace && *row.name == *key.name).collect();
    if rows.is_empty() {
        return Err(Failure::No(anyhow!(
            "Service {key} has no address: it does not exist, is headless or is an ExternalName; trace to a pod"
        )));
    }
    rows.retain(|row| matches!(row.frontend, FrontendKey::NodePort { .. }) == is_outside);
    if rows.is_empty() {
        return Err(Failure::No(anyhow!("Service {key} has no node port, so nothing outside the cluster reaches it")));
    }
    if let Some(wanted) = port {
        let known = rows.iter().map(|row| format!("{} ({})", row.frontend.port(), row.port)).collect::<Vec<_>>();
        rows.retain(|row| row.port == wanted || row.frontend.port().to_string() == wanted);
        if rows.is_empty() {
            return Err(Failure::Usage(anyhow!("Service {key} has no port {wanted}; it has: {}", known.join(", "))));
        }
    }
    let Some(first) = rows.first() else {
        return Err(Failure::Internal(anyhow!("the ports of Service {key} went away")));
    };
    let (number, protocol) = (first.frontend.port(), first.frontend.protocol());
    let mut addresses = Vec::new();
    for row in rows.iter().filter(|row| (row.frontend.port(), row.frontend.protocol()) == (number, protocol)) {
        match row.frontend {
            FrontendKey::Address { address, .. } => addresses.push(address),
            // Any node will do: the first one's underlay address.
            FrontendKey::NodePort { .. } => {
                addresses.extend(cluster.nodes.values().next().into_iter().flat_map(|node| node.addresses.clone()));
            }
        }
    }
    Ok(Destination {
        text: format!("svc/{key}:{number}"),
        addresses,
        port: Some(number.get()),
        protocol: Some(protocol),
    })
}

/// `NAME[.NAMESPACE[.svc[.ZONE]]]`, as a pod's search path completes it.
fn service_named(host: &str) -> Result<ObjectKey, Failure> {
    let labels: Vec<&str> = host.trim_end_matches('.').split('.').collect();
    match labels.as_slice() {
        [name] => Ok(ObjectKey::new("default", *name)),
        [name, namespace] | [name, namespace, "svc", ..] => Ok(ObjectKey::new(*namespace, *name)),
        _ => Err(Failure::No(anyhow!("{host} is not a Service's name: NAME[.NAMESPACE[.svc[.ZONE]]]"))),
    }
}

/// A table's rows as values, gathered from all agents.
async fn items<T: DeserializeOwned>(agents: &Agents, table: &str) -> Result<Vec<T>, Failure> {
    let mut seen = std::collections::BTreeSet::new();
    let mut items = Vec::new();
    for (node, client) in agents.all() {
        let answer: Table = client
            .get(&format!("/tables/{table}"))
            .await
            .map_err(|error| Failure::Environment(anyhow!("{node}: {error}")))?;
        for item in answer.items {
            if seen.insert(item.to_string()) {
                items.push(serde_json::from_value(item).map_err(|error| Failure::Internal(error.into()))?);
            }
        }
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_services_name_is_completed_like_a_pods_search_path() {
        let key = |host| service_named(host).map_err(|_| ());
        assert_eq!(key("cart"), Ok(ObjectKey::new("default", "cart")));
        assert_eq!(key("cart.shop"), Ok(ObjectKey::new("shop", "cart")));
        assert_eq!(key("cart.shop.svc.cluster.local."), Ok(ObjectKey::new("shop", "cart")));
        assert_eq!(key("www.example.org"), Err(()));
    }
}
