//! What travels over the administration socket, besides tables: questions and answers as JSON.

use std::net::IpAddr;

use portolan_intent::NodeView;
pub use portolan_intent::services::FrontendKey;
use portolan_net::{NodeName, Packet, Protocol};
pub use portolan_state::{Pod, Service};
use portolan_trace::{Choice, Ingress, Sighting};
use serde::{Deserialize, Serialize};

/// `GET /node`: who this agent is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInformation {
    /// The node's name.
    pub name: NodeName,
    /// Its view, once it is in sync.
    pub view: Option<NodeView>,
    /// Addresses that its kernel holds on any link but the loopback one.
    pub addresses: Vec<IpAddr>,
    /// Whether every table was listed in full and the kernel holds the result.
    pub ready: bool,
    /// Writes to the tables so far that changed something.
    pub revision: u64,
}

/// `POST /trace`: what happens to this packet here?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceQuestion {
    /// The packet.
    pub packet: Packet,
    /// How it comes.
    pub ingress: Ingress,
    /// Which endpoint to take of several.
    pub choice: Choice,
}

/// `POST /observe`: report packets that look like the probe, one line each, until the time is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObserveQuestion {
    /// The probe's protocol.
    pub protocol: Protocol,
    /// Destination ports that it may have along its way; empty for any.
    pub destination_ports: Vec<u16>,
    /// Its source port, by which it is found when something unforeseen changes its destination.
    pub source_port: u16,
    /// The payload of a UDP or ICMP probe. TCP probes are recognised by their sequence number.
    pub cookie: String,
    /// How long to look, in milliseconds; bounded by the agent.
    pub milliseconds: u64,
}

/// One line of the answer to [`ObserveQuestion`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// What was seen where.
    pub sighting: Sighting,
    /// The sequence number of a TCP probe: equal all along its way.
    pub tcp_sequence: Option<u32>,
}

/// `POST /probe`: send one real packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeQuestion {
    /// From a pod of this node, or from the node itself.
    pub from: Ingress,
    /// The packet; for a pod its source address says which.
    pub packet: Packet,
    /// The payload of a UDP or ICMP probe.
    pub cookie: String,
}

/// What became of a probe, as its sender saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeAnswer {
    /// It was answered.
    Answered {
        /// After how long.
        microseconds: u64,
    },
    /// It was refused: connection refused, host unreachable.
    Refused {
        /// In the kernel's words.
        reason: String,
    },
    /// Nothing came back in time.
    Silence,
}
