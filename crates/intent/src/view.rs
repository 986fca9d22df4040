//! Who this node is: the part of its configuration that decides intent.

use ipnet::IpNet;
use portolan_net::{Family, NodeName};
use serde::{Deserialize, Serialize};

use crate::services::ProxySettings;
use crate::{Encapsulation, FabricMode, FabricSettings, Segment};

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// The node's name in the cluster.
    pub node: NodeName,
    /// How pods on other nodes are reached.
    pub fabric: FabricMode,
    /// What is set for each of the modes.
    pub fabric_settings: FabricSettings,
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
    /// Who shares that link with this node; empty where the fabric does not ask.
    pub segment: Segment,
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

    /// How packets to nodes that no plain route reaches are wrapped, if they are.
    pub fn encapsulation(&self) -> Option<Encapsulation> {
        match self.fabric {
            FabricMode::Vxlan => Some(Encapsulation::Vxlan),
            FabricMode::Ipip => Some(Encapsulation::Ipip),
            FabricMode::HostGw => self.fabric_settings.host_gw.beyond,
            FabricMode::Alloc => None,
        }
    }

    /// Whether nodes on this node's own link are reached without encapsulation.
    pub fn routes_directly(&self) -> bool {
        match self.fabric {
            FabricMode::Vxlan => self.fabric_settings.vxlan.direct_routing,
            FabricMode::Ipip => self.fabric_settings.ipip.direct_routing,
            FabricMode::HostGw => true,
            FabricMode::Alloc => false,
        }
    }

    /// The MTU of pods in bytes: the underlay's, less what the fabric adds. It is the same for all peers,
    /// also for those that a plain route reaches, since a pod's link has one.
    ///
    /// VXLAN adds an inner Ethernet header (14), VXLAN (8), UDP (8), and an outer IP header of
    /// 20 bytes for IPv4 or 40 for IPv6 (RFC 7348 §4.3); IP in IP adds the outer header alone (RFC 2003 §3.1,
    /// RFC 2473 §3). The larger overhead that the node's addresses can meet is subtracted, since one link
    /// carries both families.
    pub fn pod_mtu(&self, underlay_is_ipv6_too: bool) -> u32 {
        let outer = if underlay_is_ipv6_too { 40 } else { 20 };
        match self.encapsulation() {
            None => self.underlay_mtu,
            Some(Encapsulation::Ipip) => self.underlay_mtu.saturating_sub(outer),
            Some(Encapsulation::Vxlan) => {
                let underlay = self.fabric_settings.vxlan.mtu.unwrap_or(self.underlay_mtu);
                underlay.saturating_sub(outer + 30)
            }
        }
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
            fabric_settings: FabricSettings::default(),
            cluster_prefixes: vec!["10.42.0.0/16".parse().unwrap()],
            service_prefixes: vec!["10.96.0.0/16".parse().unwrap()],
            masquerade: true,
            underlay_interface: "eth0".into(),
            underlay_mtu: 1500,
            segment: Segment::new(vec!["192.168.64.0/24".parse().unwrap()], Vec::new()),
            bridge: "cni0".into(),
            proxy: ProxySettings::default(),
        }
    }

    #[test]
    fn the_mtu_leaves_room_for_the_tunnel() {
        assert_eq!(view("a").pod_mtu(false), 1450);
        assert_eq!(view("a").pod_mtu(true), 1430);
        let of = |fabric| NodeView { fabric, ..view("a") };
        assert_eq!(of(FabricMode::HostGw).pod_mtu(true), 1500);
        assert_eq!(of(FabricMode::Alloc).pod_mtu(true), 1500);
        assert_eq!(of(FabricMode::Ipip).pod_mtu(false), 1480);
        assert_eq!(of(FabricMode::Ipip).pod_mtu(true), 1460);
        let mut mixed = of(FabricMode::HostGw);
        mixed.fabric_settings.host_gw.beyond = Some(Encapsulation::Vxlan);
        assert_eq!(mixed.pod_mtu(false), 1450);
        mixed.fabric_settings.vxlan.mtu = Some(9000);
        assert_eq!(mixed.pod_mtu(false), 8950);
    }
}
