//! What the node holds that is not ours: read, reckoned with, and left alone.

use std::net::IpAddr;

use ipnet::IpNet;
use portolan_net::MacAddress;
use serde::{Deserialize, Serialize};

use super::{Address, LinkKind, Route};

/// Links, addresses and routes of others.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Surroundings {
    /// Addresses by link, also those that others put on our links.
    pub addresses: Vec<(String, IpNet)>,
    /// Routes of the main table.
    pub routes: Vec<ForeignRoute>,
    /// Links.
    pub links: Vec<ForeignLink>,
}

impl Surroundings {
    /// The link of a name.
    pub fn link(&self, name: &str) -> Option<&ForeignLink> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Whether someone else already put this address on this link.
    pub(super) fn has_address(&self, address: &Address) -> bool {
        self.addresses.iter().any(|(device, prefix)| *device == address.device && *prefix == address.prefix)
    }

    /// Whether someone else already made a route that does the same.
    pub(super) fn has_route(&self, route: &Route) -> bool {
        self.routes.iter().any(|other| {
            other.destination == route.destination
                && other.device == route.device
                && other.gateway == Some(route.gateway)
                && other.onlink == route.onlink
        })
    }
}

/// A route of someone else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignRoute {
    /// Where it leads.
    pub destination: IpNet,
    /// The link by which packets leave: of the first next hop where there are several.
    pub device: String,
    /// The next hop; `None` where the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Whether the next hop counts as reachable although no prefix of the link holds it.
    pub onlink: bool,
    /// Of equal destinations, the lower one is taken.
    pub metric: u32,
    /// `proto`, as `ip route` prints it in numbers.
    pub protocol: u8,
}

/// A link of someone else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignLink {
    /// Its name.
    pub name: String,
    /// The kernel's name of its kind: `veth`, `bridge`; empty for hardware and the loopback.
    pub kind: String,
    /// What it is in detail, where it is a kind that we make too.
    pub detail: Option<LinkKind>,
    /// Its hardware address.
    pub mac: Option<MacAddress>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
}
