//! Nodes, clients, and the network between them.
//!
//! ```text
//!   node-1     node-2     node-3            client-1   server-1
//!    eth0       eth0       eth0               eth0       eth0
//!     │          │          │                  │          │
//!   ──┴── underlay ─────────┴──             ───┴─ outside ┴──
//!         192.168.64.0/24                     192.168.99.0/24
//!                   └────────── router ───────────┘
//! ```
//!
//! Each member is a network namespace; each segment is a bridge in the router's namespace, whose own
//! address on it is everyone's gateway. The router knows no pod or Service prefix: what crosses it
//! must carry addresses of the segments, so a missing masquerade is seen at once.
//! Every lab has the same addresses, since no two labs share a namespace.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use portolan_net::Family;
use serde::{Deserialize, Serialize};

use crate::description::IpFamilies;
use crate::limits::{CLIENTS_MAX, MEMBER_NAME_LENGTH_MAX, NODES_MAX, SEGMENTS_MAX, UNDERLAYS_MAX};
use crate::{LabError, Result};

mod build;
pub(crate) mod namespace;

pub use build::build;

/// The member name of the router.
pub const ROUTER: &str = "router";

/// The interface of nodes and clients.
pub const INTERFACE: &str = "eth0";

/// The port of the server outside the cluster.
pub const OUTSIDE_PORT: u16 = 8080;

/// Nodes, clients and segments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Topology {
    /// The MTU of every segment.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// The L2 segments that the router joins.
    pub segments: Vec<Segment>,
    /// The cluster's nodes.
    pub nodes: Vec<Member>,
    /// Machines outside the cluster.
    #[serde(default)]
    pub clients: Vec<Member>,
    /// Where the addresses of load balancers come from.
    #[serde(default = "default_load_balancers")]
    pub load_balancers: Vec<IpNet>,
}

/// One L2 segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Segment {
    /// Its name, also of the bridge.
    pub name: String,
    /// The router's addresses on it with their prefix lengths.
    pub router: Vec<IpNet>,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// The segment that it is on.
    pub segment: String,
    /// Its addresses, each within a prefix of the segment.
    pub addresses: Vec<IpAddr>,
    /// Whether it runs the echo server and the DNS server of the outside world.
    #[serde(default)]
    pub server: bool,
    /// A node's zone: the label `topology.kubernetes.io/zone` of its Node object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
}

fn default_mtu() -> u32 {
    1500
}

/// Prefixes that look like those of segments, and are none of the standard topology.
fn default_load_balancers() -> Vec<IpNet> {
    vec![
        IpNet::from(ipnet::Ipv4Net::new_assert([192, 168, 70, 0].into(), 24)),
        IpNet::from(ipnet::Ipv6Net::new_assert([0xfd00, 0x70, 0, 0, 0, 0, 0, 0].into(), 112)),
    ]
}

impl Topology {
    /// The topology of the picture above with so many nodes.
    pub fn standard(nodes: usize) -> Topology {
        Topology::segmented(nodes, 1)
    }

    /// The same with the nodes on several segments, `underlay`, `underlay-2` and so on, which the router joins: the
    /// first nodes on the first one, and as many on each as can be.
    pub fn segmented(nodes: usize, underlays: usize) -> Topology {
        let underlays = underlays.clamp(1, UNDERLAYS_MAX);
        let underlay_name =
            |index: usize| if index == 0 { "underlay".to_owned() } else { format!("underlay-{}", index + 1) };
        let underlay_number = |index: usize| 64 + index as u16;
        let underlay_of = |node: usize| node * underlays / nodes.max(underlays);
        let segment = |name: &str, number: u16| Segment {
            name: name.to_owned(),
            router: vec![
                IpNet::from(ipnet::Ipv4Net::new_assert([192, 168, number as u8, 1].into(), 24)),
                IpNet::from(ipnet::Ipv6Net::new_assert([0xfd00, hexadecimal(number), 0, 0, 0, 0, 0, 1].into(), 64)),
            ],
        };
        let member = |name: String, segment: &str, number: u16, host: u16, server: bool| Member {
            name,
            segment: segment.to_owned(),
            addresses: vec![
                IpAddr::from([192, 168, number as u8, host as u8]),
                IpAddr::from([0xfd00, hexadecimal(number), 0, 0, 0, 0, 0, hexadecimal(host)]),
            ],
            server,
            zone: None,
        };
        Topology {
            mtu: default_mtu(),
            segments: (0..underlays)
                .map(|index| segment(&underlay_name(index), underlay_number(index)))
                .chain([segment("outside", 99)])
                .collect(),
            nodes: (0..nodes)
                .map(|node| {
                    let underlay = underlay_of(node);
                    let (segment, host) = (underlay_name(underlay), 11 + node as u16);
                    member(format!("node-{}", node + 1), &segment, underlay_number(underlay), host, false)
                })
                .collect(),
            clients: vec![
                member("client-1".to_owned(), "outside", 99, 2, false),
                member("server-1".to_owned(), "outside", 99, 3, true),
            ],
            load_balancers: default_load_balancers(),
        }
    }

    /// Reads a topology from YAML.
    pub fn parse(file: &str, text: &str) -> Result<Topology> {
        let topology: Topology = serde_saphyr::from_str(text).map_err(|error| {
            LabError::usage(format!("{file}: {}", error.without_snippet()), "docs/user/lab.md shows a topology file")
        })?;
        topology.check().map_err(|what| LabError::usage(format!("{file}: {what}"), "change the file"))?;
        Ok(topology)
    }

    /// The same with the addresses of some families only.
    #[must_use]
    pub fn of_families(mut self, families: IpFamilies) -> Topology {
        for segment in &mut self.segments {
            segment.router.retain(|prefix| families.has(Family::of_prefix(prefix)));
        }
        self.load_balancers.retain(|prefix| families.has(Family::of_prefix(prefix)));
        for member in self.nodes.iter_mut().chain(&mut self.clients) {
            member.addresses.retain(|address| families.has(Family::of(*address)));
        }
        self
    }

    /// Nodes, then clients.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.nodes.iter().chain(&self.clients)
    }

    /// The segment with this name.
    pub fn segment(&self, name: &str) -> Option<&Segment> {
        self.segments.iter().find(|segment| segment.name == name)
    }

    /// The machine that plays the server outside the cluster.
    pub fn outside_server(&self) -> Option<&Member> {
        self.clients.iter().find(|client| client.server)
    }

    /// The names of all namespaces' members, the router's first.
    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        std::iter::once(ROUTER).chain(self.members().map(|member| member.name.as_str()))
    }

    /// Whether the parts fit together; the text says what does not.
    pub fn check(&self) -> Result<(), String> {
        if self.nodes.is_empty() || self.nodes.len() > NODES_MAX {
            return Err(format!("a lab has 1 to {NODES_MAX} nodes, not {}", self.nodes.len()));
        }
        if self.clients.len() > CLIENTS_MAX {
            return Err(format!("a lab has at most {CLIENTS_MAX} clients, not {}", self.clients.len()));
        }
        if self.segments.len() > SEGMENTS_MAX {
            return Err(format!("a lab has at most {SEGMENTS_MAX} segments, not {}", self.segments.len()));
        }
        if !(1280..=9000).contains(&self.mtu) {
            return Err(format!("mtu: {} is not between 1280 (RFC 8200 §5) and 9000", self.mtu));
        }
        let mut names = BTreeSet::from([ROUTER]);
        let mut addresses: BTreeSet<IpAddr> = BTreeSet::new();
        let mut prefixes: Vec<(&str, &IpNet)> = Vec::new();
        for segment in &self.segments {
            check_name(&segment.name)?;
            if !names.insert(&segment.name) {
                return Err(format!("the name `{}` is given twice", segment.name));
            }
            for prefix in &segment.router {
                if let Some((other, taken)) = prefixes.iter().find(|(_, taken)| overlap(taken, prefix)) {
                    return Err(format!(
                        "segment `{}`: router {prefix} overlaps with {taken} of `{other}`",
                        segment.name
                    ));
                }
                prefixes.push((&segment.name, prefix));
            }
            addresses.extend(segment.router.iter().map(IpNet::addr));
        }
        for (index, pool) in self.load_balancers.iter().enumerate() {
            if let Some((segment, prefix)) = prefixes.iter().find(|(_, prefix)| overlap(prefix, pool)) {
                return Err(format!("loadBalancers: {pool} overlaps with {prefix} of segment `{segment}`"));
            }
            if let Some(other) = self.load_balancers[..index].iter().find(|other| overlap(other, pool)) {
                return Err(format!("loadBalancers: {pool} overlaps with {other}"));
            }
        }
        for member in self.members() {
            check_name(&member.name)?;
            if !names.insert(&member.name) {
                return Err(format!("the name `{}` is given twice", member.name));
            }
            if member.name.starts_with("pod-") {
                return Err(format!("the name `{}` is kept for pods", member.name));
            }
            let Some(segment) = self.segment(&member.segment) else {
                return Err(format!("{}: there is no segment `{}`", member.name, member.segment));
            };
            if let Some(zone) = member.zone.as_deref().filter(|zone| !is_zone(zone)) {
                return Err(format!(
                    "{}: zone `{zone}` is no label's value: letters, digits, '-', '_' and '.' between them, at most 63",
                    member.name
                ));
            }
            if member.addresses.is_empty() {
                return Err(format!("{}: it has no address", member.name));
            }
            for address in &member.addresses {
                if !segment.router.iter().any(|prefix| prefix.contains(address)) {
                    return Err(format!("{}: {address} is not within segment `{}`", member.name, segment.name));
                }
                if !addresses.insert(*address) {
                    return Err(format!("{}: {address} is taken by another machine", member.name));
                }
            }
        }
        Ok(())
    }
}

/// The number whose hexadecimal digits read like this decimal number: 64 becomes 0x64, so that the
/// addresses of both families look alike.
fn hexadecimal(decimal: u16) -> u16 {
    u16::from_str_radix(&decimal.to_string(), 16).unwrap_or(decimal)
}

/// Whether a text may be the value of a label.
fn is_zone(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let is_outer = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    text.len() <= 63 && text.bytes().all(is_inner) && is_outer(text.bytes().next()) && is_outer(text.bytes().last())
}

/// Whether two prefixes share an address.
pub(crate) fn overlap(left: &IpNet, right: &IpNet) -> bool {
    left.contains(&right.network()) || right.contains(&left.network())
}

fn check_name(name: &str) -> Result<(), String> {
    // The router's interfaces are named so, beside its `lo`; a hyphen in front looks like an option.
    let fits = !name.is_empty()
        && name != "lo"
        && !name.starts_with('-')
        && name.len() <= MEMBER_NAME_LENGTH_MAX
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if fits {
        return Ok(());
    }
    Err(format!(
        "`{name}` is not a name: lower-case letters, digits and inner hyphens, not `lo`, at most {MEMBER_NAME_LENGTH_MAX}"
    ))
}

#[cfg(test)]
mod tests;
