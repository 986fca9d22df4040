//! The values that a trace is made of. They travel as JSON between the agent and the command line.

use std::net::{IpAddr, SocketAddr};

use portolan_net::{NodeName, Origin, Packet};
use serde::{Deserialize, Serialize};

/// How a packet comes to a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ingress {
    /// A pod of this node sends it; its source address says which.
    Pod,
    /// The node itself sends it. An unspecified source address is filled in by the node's routes.
    Node,
    /// It comes from another machine: over the underlay, or out of a tunnel.
    Network,
}

/// Where a packet leaves a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// It reached a pod of this node.
    Pod {
        /// The pod, or the attachment.
        origin: Option<Origin>,
        /// The veth's end on the node.
        interface: String,
    },
    /// It reached the node itself.
    Node,
    /// It goes to another machine at this address of the underlay.
    Underlay {
        /// The next machine: the tunnel's far end or the next hop.
        next: IpAddr,
        /// The device that it leaves by.
        device: String,
        /// Whether the packet is wrapped for the way.
        tunnelled: bool,
    },
    /// It ends here, answered with a refusal or not.
    Refused {
        /// How: `rejected`, `dropped`, `no route`, ….
        how: String,
        /// Why, and what to do.
        reason: String,
        /// The object that caused it.
        origin: Option<Origin>,
    },
}

/// What looked at the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The sending pod.
    PodEgress,
    /// The sending node.
    NodeEgress,
    /// The sending machine outside the cluster.
    Outside,
    /// Service addresses are replaced by endpoints'.
    Services,
    /// A next hop is chosen.
    Route,
    /// The source address is replaced by the node's.
    Masquerade,
    /// The receiving pod.
    PodIngress,
    /// The receiving node.
    NodeIngress,
    /// A machine outside the cluster receives it.
    Delivered,
    /// It is refused.
    Refused,
}

/// One line of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// Where: a node, or the name of a machine outside the cluster.
    pub node: String,
    /// What looked at the packet.
    pub stage: Stage,
    /// The mode or device: `nftables`, `cni0`, `flannel.1`.
    pub by: String,
    /// The packet as it came.
    pub before: Packet,
    /// The packet as it went on.
    pub after: Packet,
    /// What was decided, in words.
    pub detail: String,
    /// The objects that caused it.
    pub origins: Vec<Origin>,
    /// All endpoints that could have been chosen, if this hop chose one.
    pub alternatives: Vec<SocketAddr>,
}

/// One node's share of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeTrace {
    /// What happened, in order.
    pub hops: Vec<Hop>,
    /// The packet as it leaves.
    pub packet: Packet,
    /// Where it leaves.
    pub exit: Exit,
}

/// Which of several endpoints a prediction takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// The first one.
    #[default]
    First,
    /// This one, if it is among them: what a real packet was seen to take.
    Endpoint(SocketAddr),
}

/// How a trace ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// The packet arrived: at this pod, node or outside address.
    Delivered {
        /// Who received it.
        at: String,
    },
    /// It did not.
    Refused {
        /// On which node.
        node: NodeName,
        /// Why, and what to do.
        reason: String,
    },
}

/// A packet's whole way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The packet as it was sent.
    pub sent: Packet,
    /// The hops.
    pub hops: Vec<Hop>,
    /// How it ended.
    pub end: End,
    /// What the answer's addresses become on the way back, in order.
    pub reply: Vec<Hop>,
}
