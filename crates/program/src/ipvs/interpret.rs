//! What IPVS would do to a packet.

use std::net::{IpAddr, SocketAddr};

use portolan_net::{Origin, Packet, Port};
use serde::{Deserialize, Serialize};

use super::{Program, ServerKey};

/// What becomes of the first packet of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is no business of IPVS.
    Pass,
    /// It goes to one of the alternatives.
    Forward,
    /// There is no real server for it: ICMP port unreachable.
    Reject,
}

/// One of the real servers that IPVS could choose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    /// Address and port.
    pub socket: SocketAddr,
    /// Its share.
    pub weight: u32,
    /// What causes it.
    pub origin: Option<Origin>,
}

/// What IPVS would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// What becomes of the packet.
    pub verdict: Verdict,
    /// All real servers that could be chosen.
    pub alternatives: Vec<Alternative>,
    /// Whether a client is sent to the same one for some time (persistence).
    pub keeps_endpoint: bool,
    /// The object behind the virtual server.
    pub origin: Option<Origin>,
}

/// What IPVS would do to the first packet of a connection, where it enters the node or leaves a process of it.
/// `local_addresses` are the node's own besides those of the dummy link.
pub fn interpret(program: &Program, packet: &Packet, local_addresses: &[IpAddr]) -> Outcome {
    let pass = Outcome { verdict: Verdict::Pass, alternatives: Vec::new(), keeps_endpoint: false, origin: None };
    let Ok(port) = Port::try_from(packet.destination_port) else { return pass };
    let key = ServerKey { protocol: packet.protocol, address: packet.destination, port };
    // IPVS sees what is for this node.
    let is_here = program.addresses.contains(&key.address) || local_addresses.contains(&key.address);
    let Some(server) = program.servers.get(&key).filter(|_| is_here) else { return pass };
    let alternatives: Vec<Alternative> = server
        .real
        .iter()
        .filter(|it| it.weight > 0)
        .map(|it| Alternative { socket: it.key.socket(), weight: it.weight, origin: it.origin.clone() })
        .collect();
    let verdict = if alternatives.is_empty() { Verdict::Reject } else { Verdict::Forward };
    let keeps_endpoint = server.persistence_seconds.is_some();
    Outcome { verdict, alternatives, keeps_endpoint, origin: server.origin.clone() }
}
