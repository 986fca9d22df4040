//! Flannel's `host-gw` backend: one plain route per prefix of another node.
//!
//! All nodes share one link, so the next hop is the node itself and nothing is added to a packet.

use portolan_intent::NodeView;
use portolan_intent::fabric::FabricIntent;

use crate::netlink::{Program, Route};

pub(super) fn compile(fabric: &FabricIntent, view: &NodeView, program: &mut Program) {
    for (prefix, peer) in &fabric.peers {
        let route = Route {
            destination: *prefix,
            device: view.underlay_interface.clone(),
            gateway: peer.address,
            onlink: false,
            origin: peer.origin.clone(),
        };
        program.routes.insert(*prefix, route);
    }
}
