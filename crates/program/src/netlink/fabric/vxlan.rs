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
use portolan_intent::NodeView;
use portolan_intent::fabric::{FabricIntent, Peer};
use portolan_net::{Family, MacAddress, NodeName, ObjectKey, ObjectKind, Origin, Vni};

use super::stable_mac;
use crate::layout::LINK_ALIAS_PREFIX;
use crate::netlink::{Address, Forwarding, Link, LinkKind, Neighbour, Program, Route};

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

pub(super) fn compile(fabric: &FabricIntent, mtu: u32, view: &NodeView, program: &mut Program) {
    for family in Family::ALL {
        // A node without an address of the family can neither send nor receive tunnelled packets of it.
        let local = fabric.local_addresses.iter().copied().find(|address| Family::of(*address) == family);
        let prefix = fabric.local_prefixes.iter().find(|prefix| Family::of_prefix(prefix) == family);
        let (Some(local), Some(prefix)) = (local, prefix) else { continue };
        compile_device(local, base(prefix), mtu, view, program);
        for (prefix, peer) in fabric.peers.iter().filter(|(prefix, _)| Family::of_prefix(prefix) == family) {
            compile_peer(prefix, peer, &device(view.vni, family), program);
        }
    }
}

fn compile_device(local: IpAddr, base: IpAddr, mtu: u32, view: &NodeView, program: &mut Program) {
    let family = Family::of(local);
    let name = device(view.vni, family);
    let kind =
        LinkKind::Vxlan { vni: view.vni, port: view.vxlan_port, local, underlay: view.underlay_interface.clone() };
    let link = Link {
        name: name.clone(),
        kind,
        mac: vtep_mac(&view.node, view.vni, family),
        mtu,
        alias: format!("{LINK_ALIAS_PREFIX}vxlan"),
        up: true,
        origin: Origin::configuration("fabric"),
    };
    let origin = Origin::field(ObjectKind::Node, ObjectKey::cluster(view.node.as_str()), "spec.podCIDRs");
    let prefix = IpNet::from(base);
    program.links.insert(name.clone(), link);
    program.addresses.insert((name.clone(), prefix), Address { device: name, prefix, origin });
}

fn compile_peer(prefix: &IpNet, peer: &Peer, device: &str, program: &mut Program) {
    let Some(mac) = peer.vtep_mac else { return };
    let (device, origin, next_hop) = (device.to_owned(), peer.origin.clone(), base(prefix));
    let route =
        Route { destination: *prefix, device: device.clone(), gateway: next_hop, onlink: true, origin: origin.clone() };
    let neighbour = Neighbour { device: device.clone(), address: next_hop, mac, origin: origin.clone() };
    let forwarding = Forwarding { device: device.clone(), mac, remote: peer.address, origin };
    program.routes.insert(*prefix, route);
    program.neighbours.insert((device.clone(), next_hop), neighbour);
    program.forwarding.insert((device, mac), forwarding);
}

/// The first address of a prefix, which is its name: Flannel's `lease.Subnet.IP`.
fn base(prefix: &IpNet) -> IpAddr {
    prefix.network()
}
