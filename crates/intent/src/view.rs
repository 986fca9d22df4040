//! Who this node is: the part of its configuration that decides intent.

use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;
use portolan_net::{Family, NodeName, Vni};
use serde::{Deserialize, Serialize};

use crate::services::ProxySettings;

/// How pods on other nodes are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FabricMode {
    /// Flannel's `vxlan` backend (RFC 7348): a tunnel over any IP network.
    Vxlan,
    /// Flannel's `host-gw` backend: plain routes; all nodes share one link.
    HostGw,
}

impl FabricMode {
    /// Every mode, for help texts and tests that run over all of them.
    pub const ALL: [FabricMode; 2] = [FabricMode::Vxlan, FabricMode::HostGw];

    /// The name, as Flannel's `Backend.Type`.
    pub fn name(self) -> &'static str {
        match self {
            FabricMode::Vxlan => "vxlan",
            FabricMode::HostGw => "host-gw",
        }
    }
}

impl fmt::Display for FabricMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that is no value of a setting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{value}` is not a {setting}: use {expected}")]
pub struct ViewError {
    /// The setting.
    pub setting: &'static str,
    /// What was given.
    pub value: String,
    /// What may be given.
    pub expected: &'static str,
}

impl FromStr for FabricMode {
    type Err = ViewError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        FabricMode::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| ViewError {
            setting: "fabric",
            value: text.to_owned(),
            expected: "vxlan or host-gw",
        })
    }
}

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// The node's name in the cluster.
    pub node: NodeName,
    /// How pods on other nodes are reached.
    pub fabric: FabricMode,
    /// The network identifier of the VXLAN fabric.
    pub vni: Vni,
    /// UDP port of the VXLAN fabric. Flannel on Linux uses the kernel's default, 8472.
    pub vxlan_port: u16,
    /// The prefixes that hold all pods of the cluster (`--cluster-cidr`), at most one per family.
    pub cluster_prefixes: Vec<IpNet>,
    /// The prefixes that hold all ClusterIPs.
    pub service_prefixes: Vec<IpNet>,
    /// Whether traffic of pods to outside the cluster leaves with the node's address.
    pub masquerade: bool,
    /// The name of the link that leads to the other nodes, and its MTU in bytes.
    pub underlay_interface: String,
    /// MTU of the underlay link, in bytes.
    pub underlay_mtu: u32,
    /// The name of the bridge that joins the node's pods.
    pub bridge: String,
    /// How Services are served.
    pub proxy: ProxySettings,
}

impl NodeView {
    /// The families of the cluster: those that it has prefixes of.
    pub fn families(&self) -> Vec<Family> {
        let has = |family: Family| {
            self.cluster_prefixes.iter().chain(&self.service_prefixes).any(|it| Family::of_prefix(it) == family)
        };
        Family::ALL.into_iter().filter(|family| has(*family)).collect()
    }

    /// The MTU of pods in bytes: the underlay's, less what the fabric adds.
    ///
    /// VXLAN adds an inner Ethernet header (14), VXLAN (8), UDP (8), and an outer IP header of
    /// 20 bytes for IPv4 or 40 for IPv6 (RFC 7348 §4.3). The larger overhead that the node's
    /// addresses can meet is subtracted, since one link carries both families.
    pub fn pod_mtu(&self, underlay_is_ipv6_too: bool) -> u32 {
        let overhead = match self.fabric {
            FabricMode::HostGw => 0,
            FabricMode::Vxlan if underlay_is_ipv6_too => 70,
            FabricMode::Vxlan => 50,
        };
        self.underlay_mtu.saturating_sub(overhead)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A view that tests change where it matters.
    pub(crate) fn view(node: &str) -> NodeView {
        NodeView {
            node: node.into(),
            fabric: FabricMode::Vxlan,
            vni: Vni::new(1).unwrap(),
            vxlan_port: 8472,
            cluster_prefixes: vec!["10.42.0.0/16".parse().unwrap()],
            service_prefixes: vec!["10.96.0.0/16".parse().unwrap()],
            masquerade: true,
            underlay_interface: "eth0".into(),
            underlay_mtu: 1500,
            bridge: "cni0".into(),
            proxy: ProxySettings::default(),
        }
    }

    #[test]
    fn the_mtu_leaves_room_for_the_tunnel() {
        assert_eq!(view("a").pod_mtu(false), 1450);
        assert_eq!(view("a").pod_mtu(true), 1430);
        assert_eq!(NodeView { fabric: FabricMode::HostGw, ..view("a") }.pod_mtu(true), 1500);
    }

    #[test]
    fn an_unknown_fabric_is_refused_with_the_choices() {
        let error = "geneve".parse::<FabricMode>().unwrap_err();
        assert_eq!(error.to_string(), "`geneve` is not a fabric: use vxlan or host-gw");
    }
}
