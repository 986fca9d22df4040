//! The fabric's modes, what can be set for each, and where the node's own link ends.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use portolan_net::Vni;
use serde::{Deserialize, Serialize};

/// How pods on other nodes are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FabricMode {
    /// Flannel's `vxlan` backend (RFC 7348): a tunnel over any IP network.
    Vxlan,
    /// Flannel's `host-gw` backend: plain routes; all nodes share one link.
    HostGw,
    /// Flannel's `ipip` backend (RFC 2003): the smallest tunnel over any IP network.
    Ipip,
    /// Flannel's `alloc` backend: nodes have their pod prefixes, and someone else connects them.
    Alloc,
}

impl FabricMode {
    /// Every mode, for help texts and tests that run over all of them.
    pub const ALL: [FabricMode; 4] = [FabricMode::Vxlan, FabricMode::HostGw, FabricMode::Ipip, FabricMode::Alloc];

    /// The name, as Flannel's `Backend.Type`.
    pub fn name(self) -> &'static str {
        match self {
            FabricMode::Vxlan => "vxlan",
            FabricMode::HostGw => "host-gw",
            FabricMode::Ipip => "ipip",
            FabricMode::Alloc => "alloc",
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
            expected: "vxlan, host-gw, ipip or alloc",
        })
    }
}

/// A mode that wraps packets for the way to another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encapsulation {
    /// VXLAN (RFC 7348).
    Vxlan,
    /// IP in IP (RFC 2003, RFC 2473).
    Ipip,
}

/// What is set for each of the modes. The mode in use, and what it falls back to, read their own part.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FabricSettings {
    /// Of `vxlan`.
    pub vxlan: VxlanSettings,
    /// Of `ipip`.
    pub ipip: IpipSettings,
    /// Of `host-gw`.
    pub host_gw: HostGwSettings,
}

/// What is set for `vxlan`: Flannel's fields with Flannel's defaults.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VxlanSettings {
    /// The network identifier.
    pub vni: Vni,
    /// The UDP port of all nodes.
    pub port: u16,
    /// Whether packets carry the mark of a group-based policy (draft-smith-vxlan-group-policy).
    pub gbp: bool,
    /// Whether the tunnel learns which node has which hardware address from the packets that come.
    pub learning: bool,
    /// Whether nodes on this node's own link have plain routes.
    pub direct_routing: bool,
    /// The MTU of the way between nodes in bytes, where it is not that of the underlay's link.
    pub mtu: Option<u32>,
}

impl VxlanSettings {
    /// The Linux kernel's default port, which Flannel keeps; the IANA port is 4789.
    pub const DEFAULT_PORT: u16 = 8472;
}

impl Default for VxlanSettings {
    fn default() -> VxlanSettings {
        VxlanSettings {
            vni: Vni::ONE,
            port: VxlanSettings::DEFAULT_PORT,
            gbp: false,
            learning: false,
            direct_routing: false,
            mtu: None,
        }
    }
}

/// What is set for `ipip`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct IpipSettings {
    /// Whether nodes on this node's own link have plain routes.
    pub direct_routing: bool,
}

/// What is set for `host-gw`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostGwSettings {
    /// How nodes beyond this node's own link are reached; not at all by default.
    pub beyond: Option<Encapsulation>,
}

/// The node's own link: the addresses that the node reaches by it without a next hop.
///
/// It is what `ip route get` would say of an address, as far as the main table's routes of others go.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Segment {
    on_link: Vec<IpNet>,
    /// Prefixes within those that lead elsewhere.
    beyond: Vec<IpNet>,
}

impl Segment {
    /// The segment of a link with these prefixes, without those others that lie within.
    pub fn new(mut on_link: Vec<IpNet>, mut beyond: Vec<IpNet>) -> Segment {
        on_link.sort();
        on_link.dedup();
        beyond.retain(|prefix| on_link.iter().any(|wider| wider.contains(prefix)));
        beyond.sort();
        beyond.dedup();
        Segment { on_link, beyond }
    }

    /// Whether an address is on the link: the longest prefix that holds it is.
    pub fn has(&self, address: IpAddr) -> bool {
        let longest = |prefixes: &[IpNet]| {
            prefixes.iter().filter(|prefix| prefix.contains(&address)).map(IpNet::prefix_len).max()
        };
        let near = longest(&self.on_link);
        near.is_some() && near >= longest(&self.beyond)
    }

    /// The prefixes of the link.
    pub fn prefixes(&self) -> &[IpNet] {
        &self.on_link
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_fabric_is_refused_with_the_choices() {
        let error = "geneve".parse::<FabricMode>().unwrap_err();
        assert_eq!(error.to_string(), "`geneve` is not a fabric: use vxlan, host-gw, ipip or alloc");
    }

    #[test]
    fn the_longest_prefix_says_whether_an_address_is_on_the_link() {
        let prefixes = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
        let segment = Segment::new(
            prefixes(&["192.168.64.0/24", "fd00:64::/64", "192.168.64.128/32"]),
            prefixes(&["0.0.0.0/0", "192.168.64.128/25", "10.0.0.0/8"]),
        );
        for (address, expected) in [
            ("192.168.64.12", true),
            ("192.168.64.129", false),
            ("192.168.64.128", true),
            ("192.168.65.12", false),
            ("10.0.0.1", false),
            ("fd00:64::12", true),
            ("fd00:65::12", false),
        ] {
            assert_eq!(segment.has(address.parse().unwrap()), expected, "{address}");
        }
        assert!(!Segment::default().has("192.168.64.12".parse().unwrap()));
    }
}
