//! Following a packet from node to node.

use std::net::IpAddr;

use portolan_net::{NodeName, Packet};

use crate::hop::{Choice, End, Exit, Hop, Ingress, NodeTrace, Stage, Trace};

/// Nodes that a packet may cross before the walk calls it a loop.
pub const HOPS_MAX: usize = 16;

/// What the walk asks of the cluster.
pub trait Cluster {
    /// Why a node does not answer.
    type Error: std::error::Error;

    /// One node's share.
    fn node(
        &mut self,
        node: &NodeName,
        packet: Packet,
        ingress: Ingress,
        choice: Choice,
    ) -> Result<NodeTrace, Self::Error>;

    /// The node that holds an address of the underlay, if any does.
    fn node_at(&self, address: IpAddr) -> Option<NodeName>;

    /// What people call a machine that is no node.
    fn outside_name(&self, address: IpAddr) -> String;
}

/// Why a walk cannot be finished.
#[derive(Debug, thiserror::Error)]
pub enum WalkError<E: std::error::Error + 'static> {
    /// A node did not answer.
    #[error("node {node} did not answer")]
    Node {
        /// Which.
        node: NodeName,
        /// Why.
        #[source]
        source: E,
    },
    /// The packet went round in circles.
    #[error("the packet crossed {HOPS_MAX} nodes without arriving: the routes of {0} and the nodes before form a loop")]
    Loop(NodeName),
}

/// Follows a packet from where it is sent until it arrives or is refused.
pub fn walk<C: Cluster>(
    cluster: &mut C,
    start: &NodeName,
    packet: Packet,
    ingress: Ingress,
    choice: Choice,
) -> Result<Trace, WalkError<C::Error>> {
    let sent = packet;
    let mut hops: Vec<Hop> = Vec::new();
    let mut here = (start.clone(), packet, ingress);
    for _ in 0..HOPS_MAX {
        let (node, packet, ingress) = here;
        let share = cluster
            .node(&node, packet, ingress, choice)
            .map_err(|source| WalkError::Node { node: node.clone(), source })?;
        hops.extend(share.hops);
        let end = match share.exit {
            Exit::Pod { origin, interface } => {
                End::Delivered { at: origin.map_or(interface, |origin| origin.to_string()) }
            }
            Exit::Node => End::Delivered { at: format!("node {node}") },
            Exit::Refused { reason, .. } => End::Refused { node, reason },
            Exit::Underlay { next, .. } => {
                if let Some(following) = cluster.node_at(next) {
                    here = (following, share.packet, Ingress::Network);
                    continue;
                }
                // A next hop that is no node is a router; the packet's own destination may still be a node.
                if let Some(following) = cluster.node_at(share.packet.destination) {
                    here = (following, share.packet, Ingress::Network);
                    continue;
                }
                let name = cluster.outside_name(share.packet.destination);
                hops.push(arrival(&name, share.packet));
                End::Delivered { at: name }
            }
        };
        let reply = reply_of(&hops);
        return Ok(Trace { sent, hops, end, reply });
    }
    Err(WalkError::Loop(here.0))
}

fn arrival(name: &str, packet: Packet) -> Hop {
    Hop {
        node: name.to_owned(),
        stage: Stage::Delivered,
        by: String::new(),
        before: packet,
        after: packet,
        detail: "delivered".to_owned(),
        origins: Vec::new(),
        alternatives: Vec::new(),
    }
}

/// The answer meets the rewrites of the way out in reverse order, undone by connection tracking on
/// the nodes that made them.
fn reply_of(hops: &[Hop]) -> Vec<Hop> {
    let rewrites = hops.iter().rev().filter(|hop| {
        (hop.before.source, hop.before.source_port) != (hop.after.source, hop.after.source_port)
            || (hop.before.destination, hop.before.destination_port)
                != (hop.after.destination, hop.after.destination_port)
    });
    rewrites
        .map(|hop| Hop {
            node: hop.node.clone(),
            stage: hop.stage,
            by: "conntrack".to_owned(),
            before: hop.after.reply(),
            after: hop.before.reply(),
            detail: format!("conntrack on {}", hop.node),
            origins: hop.origins.clone(),
            alternatives: Vec::new(),
        })
        .collect()
}
