//! Flannel's `ipip` backend (RFC 2003): one tunnel device for all peers, and one route per prefix of another node.
//!
//! ```text
//!  10.42.2.7 ─route─▶ via 192.168.65.12 dev flannel.ipip onlink
//! ```
//!
//! The device has no far end of its own, so that the next hop of a packet's route is where it is sent to. IPv6 has a
//! device of its own, `flannel-v6.ipip`, which wraps IPv6 in IPv6 (RFC 2473); Flannel has none.

use std::net::IpAddr;

use ipnet::IpNet;
use portolan_intent::fabric::Peer;
use portolan_net::{Family, Origin};

use crate::layout::LINK_ALIAS_PREFIX;
use crate::netlink::{Link, LinkKind, Program, Route};

/// The name of a family's tunnel device; that of IPv4 is Flannel's.
pub fn ipip_device(family: Family) -> &'static str {
    match family {
        Family::V4 => "flannel.ipip",
        Family::V6 => "flannel-v6.ipip",
    }
}

pub(super) fn link(local: IpAddr, mtu: u32) -> Link {
    Link {
        name: ipip_device(Family::of(local)).to_owned(),
        kind: LinkKind::Ipip { local, remote: None },
        mac: None,
        mtu,
        alias: format!("{LINK_ALIAS_PREFIX}ipip"),
        up: true,
        origin: Origin::configuration("fabric"),
    }
}

pub(super) fn compile_peer(prefix: &IpNet, peer: &Peer, program: &mut Program) {
    let device = ipip_device(Family::of_prefix(prefix));
    // Without an address of the family this node has no tunnel of it.
    if !program.links.contains_key(device) {
        return;
    }
    let route = Route {
        destination: *prefix,
        device: device.to_owned(),
        gateway: peer.address,
        onlink: true,
        origin: peer.origin.clone(),
    };
    program.routes.insert(*prefix, route);
}
