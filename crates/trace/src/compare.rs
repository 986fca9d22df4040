//! A prediction held against what was seen of a real packet.

use std::collections::BTreeSet;
use std::net::IpAddr;

use portolan_net::{NodeName, Packet, Protocol};
use serde::{Deserialize, Serialize};

use crate::hop::{End, Stage, Trace};

/// One sighting of the probe on a node's interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    /// On which node.
    pub node: NodeName,
    /// On which interface.
    pub interface: String,
    /// Whether the packet was leaving by it.
    pub outgoing: bool,
    /// The packet as it was there. A tunnel's outer headers are not part of it.
    pub packet: Packet,
    /// When, in microseconds by the kernel's clock: comparable between nodes of one machine only.
    pub microseconds: u64,
}

/// Where prediction and packet part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// On which node.
    pub node: String,
    /// What was predicted.
    pub predicted: String,
    /// What was seen.
    pub seen: String,
}

/// The differences between a predicted trace and the sightings of the packet that it predicts.
///
/// For each node that the packet crosses, what it looked like when it came and when it left must have
/// been seen, in that direction: a packet that came and was then dropped has not left. The kernel
/// chooses source ports of masqueraded packets, so after a masquerade only the source address counts.
pub fn compare(trace: &Trace, sightings: &[Sighting]) -> Vec<Difference> {
    let mut differences = Vec::new();
    for Expected { node, packet, is_masqueraded, passage } in expected(trace) {
        let here: Vec<&Sighting> = sightings.iter().filter(|sighting| sighting.node.as_str() == node).collect();
        let is_way = |sighting: &Sighting| match passage {
            Passage::In => !sighting.outgoing,
            Passage::Out => sighting.outgoing,
            Passage::Any => true,
        };
        if here.iter().any(|sighting| is_way(sighting) && equal(&sighting.packet, &packet, is_masqueraded)) {
            continue;
        }
        let mut seen: Vec<String> = here
            .iter()
            .map(|sighting| {
                let way = if sighting.outgoing { "out of" } else { "in on" };
                format!("{} {way} {}", sighting.packet, sighting.interface)
            })
            .collect();
        // A packet that is not answered is sent again, and seen again.
        let mut known = BTreeSet::new();
        seen.retain(|text| known.insert(text.clone()));
        differences.push(Difference {
            node,
            predicted: format!("{packet}{}", passage.text()),
            seen: if seen.is_empty() { "nothing".to_owned() } else { seen.join("; ") },
        });
    }
    differences.extend(surplus(trace, sightings));
    differences
}

/// A packet that is refused must not be seen beyond the node that refuses it.
fn surplus(trace: &Trace, sightings: &[Sighting]) -> Option<Difference> {
    let End::Refused { node, reason } = &trace.end else { return None };
    let crossed: Vec<&str> = trace.hops.iter().map(|hop| hop.node.as_str()).collect();
    let beyond = sightings.iter().find(|sighting| !crossed.contains(&sighting.node.as_str()))?;
    Some(Difference {
        node: beyond.node.to_string(),
        predicted: format!("nothing: refused on {node}, {reason}"),
        seen: format!("{} on {}", beyond.packet, beyond.interface),
    })
}

/// Which way a packet is to be seen on a node's interfaces.
#[derive(Debug, Clone, Copy)]
enum Passage {
    In,
    Out,
    Any,
}

impl Passage {
    fn text(self) -> &'static str {
        match self {
            Passage::In => " in",
            Passage::Out => " out",
            Passage::Any => "",
        }
    }
}

/// The packet as it must have been seen on a node, and whether its source was masqueraded by then.
struct Expected {
    node: String,
    packet: Packet,
    is_masqueraded: bool,
    passage: Passage,
}

/// Per node, the packet as it came and as it left.
fn expected(trace: &Trace) -> Vec<Expected> {
    let mut expected = Vec::new();
    let mut is_masqueraded = false;
    let mut hops = trace.hops.iter().peekable();
    while let Some(first) = hops.next() {
        // Machines outside the cluster have no agent that could watch.
        if matches!(first.stage, Stage::Outside | Stage::Delivered) {
            continue;
        }
        let mut last = first;
        // A packet that the node itself sends is seen only when it leaves.
        if first.stage != Stage::NodeEgress {
            expected.push(Expected {
                node: first.node.clone(),
                packet: first.before,
                is_masqueraded,
                passage: Passage::In,
            });
        }
        is_masqueraded |= first.stage == Stage::Masquerade;
        while let Some(next) = hops.next_if(|hop| hop.node == first.node) {
            is_masqueraded |= next.stage == Stage::Masquerade;
            last = next;
        }
        let passage = match last.stage {
            Stage::Refused => continue,
            // What is for the node itself goes no further.
            Stage::NodeIngress => Passage::Any,
            _ => Passage::Out,
        };
        expected.push(Expected { node: first.node.clone(), packet: last.after, is_masqueraded, passage });
    }
    expected
}

fn equal(seen: &Packet, predicted: &Packet, any_source_port: bool) -> bool {
    let same_address = |a: IpAddr, b: IpAddr| a == b;
    seen.protocol == predicted.protocol
        && same_address(seen.source, predicted.source)
        && same_address(seen.destination, predicted.destination)
        && (seen.protocol == Protocol::Icmp
            || (seen.destination_port == predicted.destination_port
                && (any_source_port || seen.source_port == predicted.source_port)))
}
