//! The ways that a packet can take in the shop, and what a right answer is on each.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Context as _;
use portolan_net::{Family, Protocol};
use serde_json::Value;

use super::lacking;
use crate::client::Client;
use crate::description::{CLUSTER_DOMAIN, Description};
use crate::kubelet::PodRecord;
use crate::probe::Question;
use crate::standing::outside_name;
use crate::target::Target;
use crate::topology::{Member, OUTSIDE_PORT, namespace};
use crate::{Layout, Result};

/// The port of NodePort Service `admin`, whose only pod runs on one node.
const ADMIN_NODE_PORT: u16 = 30_090;

/// One way.
#[derive(Debug, Clone)]
pub struct Path {
    /// Where the request starts.
    pub from: Target,
    /// Where it goes, for people.
    pub to: String,
    /// The request.
    pub question: Question,
    /// What a right answer is.
    pub expected: Expectation,
}

/// What a right answer is.
#[derive(Debug, Clone)]
pub struct Expectation {
    /// Who may answer: pods or machines. With `all`, each of them must.
    pub answers: Vec<String>,
    /// Whether each of them must answer.
    pub all: bool,
    /// The source addresses that the server may see.
    pub sources: Vec<IpAddr>,
}

/// The shop as it runs.
#[derive(Debug)]
pub struct Shop {
    /// Its pods.
    pub pods: Vec<PodRecord>,
    /// The ClusterIPs of its Services.
    services: BTreeMap<String, Vec<IpAddr>>,
    nodes: Vec<Member>,
    /// Every address that a node has, of any interface.
    node_addresses: BTreeMap<String, Vec<IpAddr>>,
    client: String,
    outside: Member,
    families: &'static [Family],
}

impl Shop {
    /// Reads what runs.
    pub async fn read(client: &Client, layout: &Layout, description: &Description) -> Result<Shop> {
        let mut services = BTreeMap::new();
        for service in client.list("/api/v1/namespaces/default/services").await.context("listing Services")? {
            let Some(name) = service.pointer("/metadata/name").and_then(Value::as_str) else { continue };
            let addresses = service.pointer("/spec/clusterIPs").and_then(Value::as_array);
            let addresses = addresses.into_iter().flatten().filter_map(|it| it.as_str()?.parse().ok()).collect();
            services.insert(name.to_owned(), addresses);
        }
        let topology = &description.topology;
        let mut node_addresses = BTreeMap::new();
        for node in &topology.nodes {
            node_addresses.insert(node.name.clone(), addresses_of(layout, &node.name)?);
        }
        let client = topology.clients.iter().find(|client| !client.server);
        Ok(Shop {
            pods: PodRecord::all(layout).into_iter().filter(|pod| pod.namespace == "default").collect(),
            services,
            nodes: topology.nodes.clone(),
            node_addresses,
            client: client.ok_or_else(|| lacking("a client outside the cluster"))?.name.clone(),
            outside: topology.outside_server().ok_or_else(|| lacking("a server outside the cluster"))?.clone(),
            families: description.ip_families.list(),
        })
    }

    /// The pods of a Deployment.
    pub fn pods_of(&self, deployment: &str) -> Vec<&PodRecord> {
        self.pods.iter().filter(|pod| pod.name.starts_with(&format!("{deployment}-"))).collect()
    }

    /// One pod of a Deployment.
    pub fn pod_of(&self, deployment: &str, index: usize) -> Option<&PodRecord> {
        self.pods_of(deployment).get(index).copied()
    }

    /// Every way, in the order in which it is shown.
    pub fn paths(&self) -> Result<Vec<Path>> {
        let mut paths = Vec::new();
        for family in self.families {
            paths.extend(self.by_address(*family)?);
        }
        paths.extend(self.by_name()?);
        Ok(paths)
    }

    /// What is traced: FROM and TO.
    pub fn traces(&self) -> Vec<(String, String)> {
        let Some(frontend) = self.pod_of("frontend", 0) else { return Vec::new() };
        let pod = format!("pod/{}", frontend.name);
        let outside = self.outside.addresses.first().map(|address| socket(*address, OUTSIDE_PORT));
        let mut traces = vec![(pod.clone(), "svc/cart:7070".to_owned())];
        traces.extend(outside.map(|outside| (pod, outside)));
        traces.push((format!("client/{}", self.client), format!("svc/admin:{ADMIN_NODE_PORT}")));
        traces
    }

    fn by_address(&self, family: Family) -> Result<Vec<Path>> {
        let frontend = self.pod_of("frontend", 0).ok_or_else(|| lacking("a Deployment frontend"))?;
        let source = address(&frontend.addresses, family)?;
        let on_node = &self.node_addresses[&frontend.node];
        let (neighbour, remote) = self.neighbours(frontend)?;
        let local = match family {
            Family::V4 => IpAddr::from([127, 0, 0, 1]),
            Family::V6 => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        };
        let cart = self.service("cart", family)?;
        let carts = names(&self.pods_of("cart"));
        let admin = self.pod_of("admin", 0).ok_or_else(|| lacking("a Deployment admin"))?;
        let admin_service = self.service("admin", family)?;
        let outside = address(&self.outside.addresses, family)?;
        let from = pod(frontend);
        let one = |pod: &PodRecord| vec![pod.name.clone()];
        let mut paths = vec![
            way(&from, "its other container", local, 9090, one(frontend), vec![local]),
            way(
                &from,
                "a pod on the same node",
                address(&neighbour.addresses, family)?,
                port(neighbour),
                one(neighbour),
                vec![source],
            ),
            way(
                &from,
                "a pod on another node",
                address(&remote.addresses, family)?,
                port(remote),
                one(remote),
                vec![source],
            ),
            way(&from, "ClusterIP of cart", cart, 7070, carts.clone(), vec![source]),
            datagrams(way(&from, "ClusterIP of cart", cart, 7070, carts.clone(), vec![source])),
            // The pod is asked by itself: the node's address stands in between, or the answer would
            // go to the pod from itself.
            way(
                &pod(admin),
                "itself through ClusterIP",
                admin_service,
                80,
                one(admin),
                self.node_addresses[&admin.node].clone(),
            ),
            way(
                &from,
                "server outside",
                outside,
                OUTSIDE_PORT,
                vec![self.outside.name.clone()],
                self.underlay(&frontend.node, family),
            ),
        ];
        let node = Target::Node(frontend.node.clone());
        paths.extend([
            way(&node, "a pod on this node", source, 8080, one(frontend), on_node.clone()),
            way(
                &node,
                "a pod on another node",
                address(&remote.addresses, family)?,
                port(remote),
                one(remote),
                on_node.clone(),
            ),
            way(&node, "ClusterIP of cart", cart, 7070, carts, on_node.clone()),
        ]);
        let client = Target::Client(self.client.clone());
        let other = self.nodes.iter().find(|node| node.name != admin.node).ok_or_else(|| lacking("two nodes"))?;
        let its_node = self.nodes.iter().find(|node| node.name == admin.node).ok_or_else(|| lacking("its nodes"))?;
        for (node, what) in [(its_node, "NodePort, node with the pod"), (other, "NodePort, node without it")] {
            let to = address(&node.addresses, family)?;
            paths.push(way(&client, what, to, ADMIN_NODE_PORT, one(admin), self.node_addresses[&node.name].clone()));
        }
        Ok(paths)
    }

    fn by_name(&self) -> Result<Vec<Path>> {
        let frontend = self.pod_of("frontend", 0).ok_or_else(|| lacking("a Deployment frontend"))?;
        let catalogs = self.pods_of("catalog");
        let from = pod(frontend);
        let named = |what: &str, host: &str, port: u16, answers: Vec<String>, all: bool, sources: Vec<IpAddr>| Path {
            from: from.clone(),
            to: format!("{what} {host}:{port}"),
            question: Question { host: host.to_owned(), port, protocol: Protocol::Tcp, each: all },
            expected: Expectation { answers, all, sources },
        };
        let own = frontend.addresses.clone();
        let server = outside_name(&self.outside.name);
        let long = format!("cart.default.svc.{CLUSTER_DOMAIN}");
        let node = self.families.iter().flat_map(|family| self.underlay(&frontend.node, *family)).collect();
        Ok(vec![
            named("Service", "cart", 7070, names(&self.pods_of("cart")), false, own.clone()),
            named("Service", &long, 7070, names(&self.pods_of("cart")), false, own.clone()),
            named("headless", "catalog-peers", 3550, names(&catalogs), true, own),
            named("outside", &server, OUTSIDE_PORT, vec![self.outside.name.clone()], false, node),
        ])
    }

    /// A pod on the same node as this one, and one on another.
    fn neighbours(&self, pod: &PodRecord) -> Result<(&PodRecord, &PodRecord)> {
        let others = || self.pods.iter().filter(|other| other.name != pod.name && other.containers.len() == 1);
        let neighbour = others().find(|other| other.node == pod.node).ok_or_else(|| lacking("two pods on one node"))?;
        let remote = others().find(|other| other.node != pod.node).ok_or_else(|| lacking("pods on two nodes"))?;
        Ok((neighbour, remote))
    }

    fn service(&self, name: &str, family: Family) -> Result<IpAddr> {
        let addresses = self.services.get(name).ok_or_else(|| lacking(&format!("a Service {name}")))?;
        address(addresses, family)
    }

    /// The addresses of a node on its segment.
    fn underlay(&self, node: &str, family: Family) -> Vec<IpAddr> {
        let node = self.nodes.iter().find(|known| known.name == node);
        let addresses = node.map(|node| node.addresses.clone()).unwrap_or_default();
        addresses.into_iter().filter(|address| Family::of(*address) == family).collect()
    }
}

fn way(from: &Target, what: &str, to: IpAddr, port: u16, answers: Vec<String>, sources: Vec<IpAddr>) -> Path {
    Path {
        from: from.clone(),
        to: format!("{what} {}", socket(to, port)),
        question: Question { host: to.to_string(), port, protocol: Protocol::Tcp, each: false },
        expected: Expectation { answers, all: false, sources },
    }
}

fn datagrams(mut path: Path) -> Path {
    path.to.push_str(" (UDP)");
    path.question.protocol = Protocol::Udp;
    path
}

fn socket(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

fn pod(record: &PodRecord) -> Target {
    Target::Pod { namespace: record.namespace.clone(), name: record.name.clone() }
}

fn names(pods: &[&PodRecord]) -> Vec<String> {
    pods.iter().map(|pod| pod.name.clone()).collect()
}

fn port(pod: &PodRecord) -> u16 {
    pod.containers.iter().find_map(|container| container.ports.first().copied()).unwrap_or_default()
}

fn address(addresses: &[IpAddr], family: Family) -> Result<IpAddr> {
    let found = addresses.iter().copied().find(|address| Family::of(*address) == family);
    found.ok_or_else(|| lacking(&format!("an {family} address of each pod and Service")))
}

/// Every address of every interface of a node, as the kernel lists them there.
fn addresses_of(layout: &Layout, node: &str) -> Result<Vec<IpAddr>> {
    let path = namespace::path(&layout.namespace(node));
    let listed = namespace::within(&path, || {
        let interfaces = nix::ifaddrs::getifaddrs().context("listing a node's addresses")?;
        let storages = interfaces.filter_map(|interface| interface.address);
        let plain = |storage: nix::sys::socket::SockaddrStorage| {
            let v4 = storage.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
            v4.or_else(|| storage.as_sockaddr_in6().map(|it| IpAddr::V6(it.ip())))
        };
        Ok(storages.filter_map(plain).filter(|address| !address.is_loopback()).collect())
    })?;
    Ok(listed)
}
