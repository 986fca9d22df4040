//! What the kernel's links, addresses, routes and neighbours must be on this node.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_net::{MacAddress, Origin, Vni};
use portolan_state::AttachmentKey;
use serde::{Deserialize, Serialize};

use crate::layout::LINK_ALIAS_PREFIX;

/// What rtnetlink must hold. Every table is keyed by what the kernel tells its entries apart by.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Links by name: bridges and tunnels.
    pub links: BTreeMap<String, Link>,
    /// Addresses by link and prefix.
    #[serde(with = "crate::pairs")]
    pub addresses: BTreeMap<(String, IpNet), Address>,
    /// Routes of the main table by destination.
    #[serde(with = "crate::pairs")]
    pub routes: BTreeMap<IpNet, Route>,
    /// Permanent neighbours by link and address.
    #[serde(with = "crate::pairs")]
    pub neighbours: BTreeMap<(String, IpAddr), Neighbour>,
    /// Forwarding entries of tunnels by link and hardware address.
    #[serde(with = "crate::pairs")]
    pub forwarding: BTreeMap<(String, MacAddress), Forwarding>,
    /// Pod interfaces.
    #[serde(with = "crate::pairs")]
    pub pods: BTreeMap<AttachmentKey, PodLink>,
    /// Sysctls by path below `/proc/sys`. Paths have slashes, since the names of links may have dots.
    pub sysctls: BTreeMap<String, Sysctl>,
}

/// A link that we make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// Its hardware address, where its kind has one. A bridge gets it when it is made; one that was adopted keeps
    /// its own.
    pub mac: Option<MacAddress>,
    /// MTU in bytes.
    pub mtu: u32,
    /// The mark that it is ours.
    pub alias: String,
    /// Whether it is up.
    pub up: bool,
    /// Why it is there.
    pub origin: Origin,
}

/// The kinds of links that we make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkKind {
    /// An Ethernet bridge.
    Bridge,
    /// A VXLAN tunnel (RFC 7348), whose peers are programmed.
    Vxlan {
        /// The network identifier.
        vni: Vni,
        /// The UDP port of all nodes.
        port: u16,
        /// The node's address that tunnelled packets come from.
        local: IpAddr,
        /// The link that they leave by.
        underlay: String,
        /// Whether packets carry the mark of a group-based policy.
        gbp: bool,
        /// Whether it makes forwarding entries of its own from what comes.
        learning: bool,
    },
    /// A tunnel of IP in IP: IPv4 in IPv4 (RFC 2003) or IPv6 in IPv6 (RFC 2473), by the family of its addresses. One
    /// without a far end sends each packet to its route's next hop.
    Ipip {
        /// The node's address that tunnelled packets come from.
        local: IpAddr,
        /// The far end; none in tunnels that we make.
        remote: Option<IpAddr>,
    },
}

/// An address on one of our links.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The link.
    pub device: String,
    /// The address and the prefix that it makes reachable.
    pub prefix: IpNet,
    /// Why it is there.
    pub origin: Origin,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where it leads.
    pub destination: IpNet,
    /// The link by which packets leave.
    pub device: String,
    /// The next hop; unspecified in a route that was read back and has none.
    pub gateway: IpAddr,
    /// Whether the next hop counts as reachable although no prefix of the link holds it.
    pub onlink: bool,
    /// Why it is there.
    pub origin: Origin,
}

impl Route {
    /// Whether two routes do the same, whatever the reason.
    pub fn same(&self, other: &Route) -> bool {
        (self.destination, &self.device, self.gateway, self.onlink)
            == (other.destination, &other.device, other.gateway, other.onlink)
    }
}

/// A permanent neighbour: the hardware address of a next hop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The link.
    pub device: String,
    /// The next hop.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: MacAddress,
    /// Why it is there.
    pub origin: Origin,
}

/// A forwarding entry of a tunnel: the node behind a hardware address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwarding {
    /// The tunnel.
    pub device: String,
    /// The hardware address.
    pub mac: MacAddress,
    /// The node's address.
    pub remote: IpAddr,
    /// Why it is there.
    pub origin: Origin,
}

/// A pod's interface, and the node's end of it.
///
/// What is read back from the kernel has only what can be seen from the node's side: name, bridge, MTU
/// and hairpin mode of the node's end. The rest is empty then, and [`same_port`](Self::same_port) does
/// not look at it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodLink {
    /// Container and interface.
    pub key: AttachmentKey,
    /// The path of the pod's network namespace.
    pub namespace_path: Arc<str>,
    /// The node's end: a port of the bridge.
    pub host_interface: Arc<str>,
    /// The bridge.
    pub bridge: String,
    /// Whether the bridge sends a pod's packets back to it: a pod that calls its own Service needs it.
    pub hairpin: bool,
    /// MTU of both ends, in bytes.
    pub mtu: u32,
    /// Whether the node's end is up.
    pub up: bool,
    /// The hardware address of the pod's end.
    pub mac: MacAddress,
    /// The pod's addresses.
    pub addresses: Vec<IpNet>,
    /// The pod's default gateways.
    pub gateways: Vec<IpAddr>,
    /// Why it is there.
    pub origin: Origin,
}

impl PodLink {
    /// The alias of the node's end.
    pub fn alias(&self) -> String {
        pod_alias(&self.key)
    }

    /// Whether both are the same as far as it can be seen from the node's side.
    pub fn same_port(&self, other: &PodLink) -> bool {
        (&self.host_interface, &self.bridge, self.hairpin, self.mtu, self.up)
            == (&other.host_interface, &other.bridge, other.hairpin, other.mtu, other.up)
    }
}

/// A sysctl.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sysctl {
    /// Its value.
    pub value: String,
    /// Why it is there.
    pub origin: Origin,
}

/// The alias of the node's end of a pod interface: it says whose it is, also after a crash.
pub fn pod_alias(key: &AttachmentKey) -> String {
    format!("{LINK_ALIAS_PREFIX}pod:{key}")
}

/// The pod interface that an alias names.
pub fn pod_of_alias(alias: &str) -> Option<AttachmentKey> {
    let (container, interface) = alias.strip_prefix(LINK_ALIAS_PREFIX)?.strip_prefix("pod:")?.rsplit_once('/')?;
    Some(AttachmentKey { container: container.into(), interface: interface.into() })
}
