//! Flannel's `vxlan` backend (RFC 7348), to the letter: a node of ours and a node of Flannel's can
//! share a cluster.
//!
//! Each family has its own tunnel device, whose address is the base of the node's pod prefix. For each
//! prefix of another node there are one route, one neighbour and one forwarding entry:
//!
//! ```text
//!  10.42.2.7 ─route─▶ via 10.42.2.0 dev flannel.1 onlink
//!            ─neighbour─▶ 10.42.2.0 has 02:…:2a
//!            ─forwarding─▶ 02:…:2a is behind 192.168.64.12
//! ```

use std::net::IpAddr;

use ipnet::IpNet;
use portolan_intent::fabric::Peer;
use portolan_intent::{NodeView, VxlanSettings};
use portolan_net::{Family, MacAddress, NodeName, Origin, Vni};

use super::stable_mac;
use crate::layout::LINK_ALIAS_PREFIX;
use crate::netlink::{Forwarding, Link, LinkKind, Neighbour, Program, Route};

/// The name of a family's tunnel device, as Flannel's.
pub fn device(vni: Vni, family: Family) -> String {
    match family {
        Family::V4 => format!("flannel.{vni}"),
        Family::V6 => format!("flannel-v6.{vni}"),
    }
}

/// The hardware address of a node's tunnel device: what the node publishes as `VtepMAC`.
pub fn vtep_mac(node: &NodeName, vni: Vni, family: Family) -> MacAddress {
    let family: &[u8] = match family {
        Family::V4 => b"4",
        Family::V6 => b"6",
    };
    stable_mac(&[b"vtep", node.as_str().as_bytes(), &vni.get().to_be_bytes(), family])
}

pub(super) fn link(local: IpAddr, mtu: u32, view: &NodeView) -> Link {
    let VxlanSettings { vni, port, gbp, learning, .. } = view.fabric_settings.vxlan;
    let family = Family::of(local);
    Link {
        name: device(vni, family),
        kind: LinkKind::Vxlan { vni, port, local, underlay: view.underlay_interface.clone(), gbp, learning },
        mac: Some(vtep_mac(&view.node, vni, family)),
        mtu,
        alias: format!("{LINK_ALIAS_PREFIX}vxlan"),
        up: true,
        origin: Origin::configuration("fabric"),
    }
}

pub(super) fn compile_peer(prefix: &IpNet, peer: &Peer, mac: MacAddress, view: &NodeView, program: &mut Program) {
    let device = device(view.fabric_settings.vxlan.vni, Family::of_prefix(prefix));
    // Without an address of the family this node has no tunnel of it.
    if !program.links.contains_key(&device) {
        return;
    }
    let (origin, next_hop) = (peer.origin.clone(), base(prefix));
    let route =
        Route { destination: *prefix, device: device.clone(), gateway: next_hop, onlink: true, origin: origin.clone() };
    let neighbour = Neighbour { device: device.clone(), address: next_hop, mac, origin: origin.clone() };
    let forwarding = Forwarding { device: device.clone(), mac, remote: peer.address, origin };
    program.routes.insert(*prefix, route);
    program.neighbours.insert((device.clone(), next_hop), neighbour);
    program.forwarding.insert((device, mac), forwarding);
}

/// The first address of a prefix, which is its name: Flannel's `lease.Subnet.IP`.
pub(super) fn base(prefix: &IpNet) -> IpAddr {
    prefix.network()
}
