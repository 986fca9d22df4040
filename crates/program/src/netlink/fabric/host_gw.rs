//! Flannel's `host-gw` backend: one plain route per prefix of another node.
//!
//! The other node is on this node's own link, so the next hop is the node itself and nothing is added to a packet.
//! What `DirectRouting` makes of a tunnel's peer is the same.

use ipnet::IpNet;
use portolan_intent::NodeView;
use portolan_intent::fabric::Peer;

use crate::netlink::{Program, Route};

pub(super) fn compile_peer(prefix: &IpNet, peer: &Peer, view: &NodeView, program: &mut Program) {
    let route = Route {
        destination: *prefix,
        device: view.underlay_interface.clone(),
        gateway: peer.address,
        onlink: false,
        origin: peer.origin.clone(),
    };
    program.routes.insert(*prefix, route);
}
