//! Whether a packet is in a set, as the match `-m set` has it.

use portolan_net::{Packet, Port};
use serde::{Deserialize, Serialize};

use super::{Entry, IpSet};

/// The source or the destination: `src` and `dst`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// `src`.
    Source,
    /// `dst`.
    Destination,
}

/// The entry of a set that a packet is in, where each part of an entry stands for the given end of it.
pub fn contains(set: &IpSet, packet: &Packet, ends: &[End]) -> Option<Entry> {
    let address = |end: End| if end == End::Source { packet.source } else { packet.destination };
    let port =
        |end: End| Port::try_from(if end == End::Source { packet.source_port } else { packet.destination_port }).ok();
    let protocol = packet.protocol;
    set.entries.keys().copied().find(|entry| match (entry, ends) {
        (Entry::Ip(it), [at, ..]) => *it == address(*at),
        (Entry::Port(it), [at, ..]) => Some(*it) == port(*at),
        (Entry::IpPort(it, of, number), [at, port_at, ..]) => {
            (*it, *of, Some(*number)) == (address(*at), protocol, port(*port_at))
        }
        (Entry::IpPortIp(it, of, number, second), [at, port_at, second_at, ..]) => {
            (*it, *of, Some(*number), *second) == (address(*at), protocol, port(*port_at), address(*second_at))
        }
        (Entry::IpPortNet(it, of, number, prefix), [at, port_at, prefix_at, ..]) => {
            (*it, *of, Some(*number)) == (address(*at), protocol, port(*port_at))
                && prefix.contains(&address(*prefix_at))
        }
        _ => false,
    })
}
