//! Where the kernel would send a packet: longest prefix first, then next hop, neighbour, tunnel.
//!
//! It reads the main table as the kernel does on a node without policy routing (rules other than the
//! default ones are not reckoned with).

use std::net::IpAddr;

use ipnet::IpNet;
use portolan_net::{MacAddress, Origin};
use serde::{Deserialize, Serialize};

use super::{AttachmentKey, LinkKind, PodLink, Program, Surroundings};

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouteDecision {
    /// It is for the node itself.
    Local {
        /// The address.
        address: IpAddr,
        /// The link that holds it.
        device: String,
    },
    /// It leaves by a link.
    Via {
        /// The link.
        device: String,
        /// The next hop; `None` where the destination is on the link.
        gateway: Option<IpAddr>,
        /// What kind of way that is.
        kind: ViaKind,
        /// Why the route is there; `None` where it is not ours.
        origin: Option<Origin>,
    },
    /// It is dropped.
    Unreachable {
        /// Why.
        reason: Unreachable,
    },
}

/// The kind of way that a packet takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ViaKind {
    /// To a pod of this node.
    Bridge {
        /// The pod interface that holds the destination; `None` where no pod of ours does.
        pod: Option<AttachmentKey>,
    },
    /// Through a VXLAN tunnel.
    Vxlan {
        /// The node at the far end.
        remote: IpAddr,
    },
    /// Through a tunnel of IP in IP.
    Ipip {
        /// The node at the far end.
        remote: IpAddr,
    },
    /// Over a link that is not ours.
    Link,
}

/// Why a packet goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Unreachable {
    /// No route holds the destination.
    #[error("no route to {0}")]
    NoRoute(IpAddr),
    /// The next hop's hardware address is unknown, and a tunnel asks nobody.
    #[error("no neighbour entry for {address} on {device}")]
    NoNeighbour {
        /// The tunnel.
        device: String,
        /// The next hop.
        address: IpAddr,
    },
    /// The node behind a hardware address is unknown.
    #[error("no forwarding entry for {mac} on {device}")]
    NoForwarding {
        /// The tunnel.
        device: String,
        /// The next hop's hardware address.
        mac: MacAddress,
    },
}

/// A candidate of the lookup.
struct Candidate<'a> {
    prefix: IpNet,
    metric: u32,
    device: &'a str,
    gateway: Option<IpAddr>,
    origin: Option<&'a Origin>,
}

/// Where the node would send a packet to this destination.
pub fn route(program: &Program, surroundings: &Surroundings, destination: IpAddr) -> RouteDecision {
    if let Some(device) = holder(program, surroundings, destination) {
        return RouteDecision::Local { address: destination, device: device.to_owned() };
    }
    let best = candidates(program, surroundings)
        .filter(|candidate| candidate.prefix.contains(&destination))
        .min_by_key(|candidate| (std::cmp::Reverse(candidate.prefix.prefix_len()), candidate.metric));
    let Some(best) = best else {
        return RouteDecision::Unreachable { reason: Unreachable::NoRoute(destination) };
    };
    match way(program, &best, destination) {
        Ok(kind) => RouteDecision::Via {
            device: best.device.to_owned(),
            gateway: best.gateway,
            kind,
            origin: best.origin.cloned(),
        },
        Err(reason) => RouteDecision::Unreachable { reason },
    }
}

impl Program {
    /// The pod interface that holds an address.
    pub fn pod_of(&self, address: IpAddr) -> Option<&PodLink> {
        self.pods.values().find(|pod| pod.addresses.iter().any(|prefix| prefix.addr() == address))
    }
}

fn holder<'a>(program: &'a Program, surroundings: &'a Surroundings, address: IpAddr) -> Option<&'a str> {
    if address.is_loopback() {
        return Some("lo");
    }
    let ours = program.addresses.values().map(|it| (it.device.as_str(), it.prefix));
    let others = surroundings.addresses.iter().map(|(device, prefix)| (device.as_str(), *prefix));
    ours.chain(others).find(|(_, prefix)| prefix.addr() == address).map(|(device, _)| device)
}

fn candidates<'a>(program: &'a Program, surroundings: &'a Surroundings) -> impl Iterator<Item = Candidate<'a>> {
    let ours = program.routes.values().map(|route| Candidate {
        prefix: route.destination,
        metric: 0,
        device: route.device.as_str(),
        gateway: Some(route.gateway),
        origin: Some(&route.origin),
    });
    // An address makes its prefix reachable on its link. The kernel adds that route itself.
    let connected =
        program.addresses.values().filter(|it| it.prefix.prefix_len() < it.prefix.max_prefix_len()).map(|it| {
            Candidate {
                prefix: it.prefix.trunc(),
                metric: 0,
                device: it.device.as_str(),
                gateway: None,
                origin: Some(&it.origin),
            }
        });
    let others = surroundings.routes.iter().map(|route| Candidate {
        prefix: route.destination,
        metric: route.metric,
        device: route.device.as_str(),
        gateway: route.gateway,
        origin: None,
    });
    let connected_others = surroundings.addresses.iter().map(|(device, prefix)| Candidate {
        prefix: prefix.trunc(),
        metric: 0,
        device: device.as_str(),
        gateway: None,
        origin: None,
    });
    ours.chain(connected).chain(others).chain(connected_others)
}

fn way(program: &Program, best: &Candidate<'_>, destination: IpAddr) -> Result<ViaKind, Unreachable> {
    let next_hop = best.gateway.unwrap_or(destination);
    match program.links.get(best.device).map(|link| &link.kind) {
        None => Ok(ViaKind::Link),
        Some(LinkKind::Bridge) => Ok(ViaKind::Bridge { pod: program.pod_of(next_hop).map(|pod| pod.key.clone()) }),
        Some(LinkKind::Ipip { remote, .. }) => Ok(ViaKind::Ipip { remote: remote.unwrap_or(next_hop) }),
        Some(LinkKind::Vxlan { .. }) => {
            let device = best.device.to_owned();
            let neighbour = program
                .neighbours
                .get(&(device.clone(), next_hop))
                .ok_or_else(|| Unreachable::NoNeighbour { device: device.clone(), address: next_hop })?;
            program
                .forwarding
                .get(&(device.clone(), neighbour.mac))
                .map(|entry| ViaKind::Vxlan { remote: entry.remote })
                .ok_or(Unreachable::NoForwarding { device, mac: neighbour.mac })
        }
    }
}
