//! The part of a proxy's configuration that decides intent, under the names of `KubeProxyConfiguration`.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// How this node serves Services.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxySettings {
    /// `masqueradeAll`: every client of a cluster address leaves with the node's address.
    pub masquerade_all: bool,
    /// `detectLocalMode` and `detectLocal`: which clients are pods.
    pub detect_local: DetectLocal,
    /// `nodePortAddresses`.
    pub node_port_addresses: NodePortAddresses,
    /// Whether `spec.externalIPs` is honoured. Whoever may write a Service can take over any address with it
    /// (CVE-2020-8554), so it is not by default.
    pub external_ips: bool,
    /// `localhostNodePorts`: node ports answer at 127.0.0.1 too, in the iptables mode.
    pub localhost_node_ports: bool,
    /// `conntrack.tcpBeLiberal`: the node's connection tracking takes no packet for invalid that lies outside of its
    /// window, so that none need be dropped, which `iptables` does otherwise.
    pub tcp_be_liberal: bool,
}

impl Default for ProxySettings {
    fn default() -> ProxySettings {
        ProxySettings {
            masquerade_all: false,
            detect_local: DetectLocal::ClusterPrefixes,
            node_port_addresses: NodePortAddresses::All,
            external_ips: false,
            localhost_node_ports: false,
            tcp_be_liberal: false,
        }
    }
}

/// How pods are told from other clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DetectLocal {
    /// `ClusterCIDR`: their address is in one of the cluster's pod prefixes.
    ClusterPrefixes,
    /// `NodeCIDR`: their address is in this node's pod prefix.
    NodePrefixes,
    /// `BridgeInterface`: they come in by this link.
    Bridge(String),
    /// `InterfaceNamePrefix`: they come in by a link whose name starts so.
    InterfacePrefix(String),
    /// They are not told.
    Nothing,
}

/// At which of the node's addresses node ports answer. Loopback addresses never count here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodePortAddresses {
    /// At every one.
    All,
    /// At the first of each family (`primary`).
    Primary,
    /// At those within these prefixes.
    Within(Vec<IpNet>),
}
