//! A small cluster as objects, seen from its first node, and what lies around that node.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use portolan_intent::services::{FrontendUpdate, ProxySettings, ServicesCompiler};
use portolan_intent::{FabricMode, FabricSettings, NodeView, Segment};
use portolan_net::{Family, IpNet, NodeName, ObjectKey, ObjectKind, Port};
use portolan_state::{Change, EndpointSlice, Node, Object, Service, Writer};

use crate::scenario;

/// The bridge that this node's pods are on.
pub(crate) const BRIDGE: &str = "cni0";

/// The link that all others are behind.
pub(crate) const UPLINK: &str = "eth0";

/// Nodes, Services and slices of endpoints, and how this node serves them.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Cluster {
    /// All nodes, this one first.
    pub(crate) nodes: Vec<Node>,
    pub(crate) settings: ProxySettings,
    pub(crate) services: BTreeMap<ObjectKey, Service>,
    pub(crate) slices: BTreeMap<ObjectKey, EndpointSlice>,
}

/// As the text of a scenario: what a failed test prints is ready to be kept.
impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{}", scenario::render(self))
    }
}

impl Cluster {
    /// A cluster of these nodes without Services.
    pub(crate) fn new(nodes: Vec<Node>) -> Cluster {
        let (services, slices) = (BTreeMap::new(), BTreeMap::new());
        Cluster { nodes, settings: ProxySettings::default(), services, slices }
    }

    /// The node that the answers are of.
    pub(crate) fn node(&self) -> &Node {
        &self.nodes[0]
    }

    /// The prefixes of all pods.
    pub(crate) fn cluster_prefixes() -> Vec<IpNet> {
        ["10.42.0.0/16", "fd42::/48"].map(|text| text.parse().unwrap()).to_vec()
    }

    /// The prefixes of all cluster addresses.
    pub(crate) fn service_prefixes() -> Vec<IpNet> {
        ["10.96.0.0/16", "fd96::/112"].map(|text| text.parse().unwrap()).to_vec()
    }

    /// The bridge's own addresses: the first ones of the node's pod prefixes.
    pub(crate) fn bridge_addresses(&self) -> Vec<IpAddr> {
        self.node().pod_prefixes.iter().filter_map(|prefix| prefix.hosts().next()).collect()
    }

    /// Every address that is this node's own in the eyes of its kernel.
    pub(crate) fn local_addresses(&self) -> Vec<IpAddr> {
        let loopback = ["127.0.0.1", "::1"].map(|text| text.parse().unwrap());
        self.node().addresses.iter().copied().chain(self.bridge_addresses()).chain(loopback).collect()
    }

    /// What the rooms are told of this node.
    pub(crate) fn view(&self) -> NodeView {
        NodeView {
            node: self.node().name.clone(),
            fabric: FabricMode::Vxlan,
            fabric_settings: FabricSettings::default(),
            cluster_prefixes: Cluster::cluster_prefixes(),
            service_prefixes: Cluster::service_prefixes(),
            masquerade: false,
            underlay_interface: UPLINK.to_owned(),
            underlay_mtu: 1500,
            segment: Segment::default(),
            bridge: BRIDGE.to_owned(),
            proxy: self.settings.clone(),
        }
    }
}

/// Follows a cluster through its states, as an agent does.
pub(crate) struct Follower {
    writer: Writer,
    pub(crate) compiler: ServicesCompiler,
}

impl Follower {
    /// Has seen nothing yet. Settings are those of an agent's start.
    pub(crate) fn new(node: NodeName, settings: ProxySettings) -> Follower {
        Follower { writer: Writer::new(), compiler: ServicesCompiler::new(node, settings) }
    }

    /// Brings the intent up to the cluster, and returns what is different.
    pub(crate) fn follow(&mut self, cluster: &Cluster) -> Vec<FrontendUpdate> {
        let all = |objects: Vec<Object>| objects.into_iter().map(|object| (object, Vec::new())).collect();
        let nodes = cluster.nodes.iter().cloned().map(Object::Node).collect();
        let services = cluster.services.values().cloned().map(Object::Service).collect();
        let slices = cluster.slices.values().cloned().map(Object::EndpointSlice).collect();
        self.writer.apply(Change::Replace(ObjectKind::Node, all(nodes), Vec::new()));
        self.writer.apply(Change::Replace(ObjectKind::Service, all(services), Vec::new()));
        self.writer.apply(Change::Replace(ObjectKind::EndpointSlice, all(slices), Vec::new()));
        let (snapshot, dirty) = self.writer.take();
        self.compiler.update(&snapshot, &dirty)
    }

    /// The ports at which load balancers ask this node.
    pub(crate) fn health_ports(&self) -> BTreeSet<Port> {
        self.compiler.health_checks().values().map(|check| check.port).collect()
    }
}

/// The families of these addresses.
pub(crate) fn families(addresses: &[IpAddr]) -> BTreeSet<Family> {
    addresses.iter().map(|address| Family::of(*address)).collect()
}
