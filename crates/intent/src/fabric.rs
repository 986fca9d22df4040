//! The fabric: which other nodes hold which pod prefixes, and how they are reached.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use portolan_net::{Family, MacAddress, NodeName, ObjectKey, ObjectKind, Origin};
use portolan_state::{Node, ObjectRef, Problem, Snapshot};
use serde::{Deserialize, Serialize};

use crate::{FabricMode, NodeView};

/// What the node must know of the cluster's other nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FabricIntent {
    /// This node's own pod prefixes.
    pub local_prefixes: Vec<IpNet>,
    /// This node's addresses on the underlay.
    pub local_addresses: Vec<IpAddr>,
    /// One entry per prefix of another node that can be reached now.
    pub peers: BTreeMap<IpNet, Peer>,
}

/// Another node's pod prefix, and the way to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The node that holds the prefix.
    pub node: NodeName,
    /// Its address on the underlay: the next hop, or the tunnel's far end.
    pub address: IpAddr,
    /// The hardware address of its tunnel device for this family; only a VXLAN fabric has one.
    pub vtep_mac: Option<MacAddress>,
    /// The object that says so.
    pub origin: Origin,
}

/// The fabric as this node must see it, and what keeps other nodes out of it.
///
/// Of two nodes that hold overlapping prefixes, the one whose name sorts first keeps its own; this
/// node's prefixes always win here, since traffic to them must never leave it.
pub fn compile(snapshot: &Snapshot, view: &NodeView) -> (FabricIntent, Vec<Problem>) {
    let mut intent = FabricIntent::default();
    let mut problems = Vec::new();
    if let Some(own) = snapshot.nodes.get(&view.node) {
        intent.local_prefixes.clone_from(&own.pod_prefixes);
        intent.local_addresses.clone_from(&own.addresses);
        problems.extend(outside_cluster(own, view));
    }
    let mut taken: BTreeMap<IpNet, NodeName> =
        intent.local_prefixes.iter().map(|prefix| (prefix.trunc(), view.node.clone())).collect();
    for node in snapshot.nodes.values().filter(|node| node.name != view.node) {
        for prefix in &node.pod_prefixes {
            if let Some((other, holder)) = overlapping(&taken, prefix) {
                problems.push(problem(
                    node,
                    "spec.podCIDRs",
                    format!("{prefix} overlaps {other} of Node {holder}"),
                    "give every node a pod prefix of its own",
                ));
                continue;
            }
            match way_to(node, prefix, view) {
                Ok(peer) => {
                    taken.insert(prefix.trunc(), node.name.clone());
                    intent.peers.insert(prefix.trunc(), peer);
                }
                Err(found) => problems.push(*found),
            }
        }
    }
    (intent, problems)
}

fn way_to(node: &Node, prefix: &IpNet, view: &NodeView) -> Result<Peer, Box<Problem>> {
    let family = Family::of_prefix(prefix);
    let tunnel = node.tunnel.as_ref();
    let published = tunnel.and_then(|it| it.public_addresses.iter().copied().find(|it| Family::of(*it) == family));
    let address = published.or_else(|| node.address(family)).ok_or_else(|| {
        Box::new(problem(
            node,
            "status.addresses",
            format!("no {family} InternalIP, so {prefix} cannot be reached"),
            "add an InternalIP of that family to the node",
        ))
    })?;
    let vtep_mac = match view.fabric {
        FabricMode::HostGw => None,
        FabricMode::Vxlan => {
            let mac = tunnel.and_then(|it| match family {
                Family::V4 => it.vtep_mac_v4,
                Family::V6 => it.vtep_mac_v6,
            });
            Some(mac.ok_or_else(|| {
                Box::new(problem(
                    node,
                    "metadata.annotations[flannel.alpha.coreos.com/backend-data]",
                    format!("no VtepMAC yet, so {prefix} cannot be reached"),
                    "start the agent on that node with the vxlan fabric",
                ))
            })?)
        }
    };
    let origin = Origin::object(ObjectKind::Node, ObjectKey::cluster(node.name.as_str()));
    Ok(Peer { node: node.name.clone(), address, vtep_mac, origin })
}

fn outside_cluster(node: &Node, view: &NodeView) -> Vec<Problem> {
    let is_outside = |prefix: &&IpNet| !view.cluster_prefixes.iter().any(|cluster| cluster.contains(*prefix));
    let outside = node.pod_prefixes.iter().filter(is_outside);
    outside
        .map(|prefix| {
            problem(
                node,
                "spec.podCIDRs",
                format!("{prefix} lies outside the cluster's pod prefixes"),
                "set the agent's clusterPrefixes to the cluster's --cluster-cidr",
            )
        })
        .collect()
}

/// The prefix among these, which do not overlap each other, that overlaps one more. Two prefixes overlap
/// only if one holds the other, so that only the neighbours in order can: a cluster of 5,000 nodes must
/// not cost 25 million comparisons.
fn overlapping<'a>(taken: &'a BTreeMap<IpNet, NodeName>, prefix: &IpNet) -> Option<(&'a IpNet, &'a NodeName)> {
    let prefix = prefix.trunc();
    let before = taken.range(..=prefix).next_back();
    let after = taken.range(prefix..).next();
    before.into_iter().chain(after).find(|(other, _)| other.contains(&prefix) || prefix.contains(*other))
}

fn problem(node: &Node, field: &str, reason: String, hint: &str) -> Problem {
    Problem {
        object: ObjectRef::Node(node.name.clone()),
        field: field.into(),
        reason: reason.into(),
        hint: hint.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::view;
    use portolan_state::{Change, NodeTunnel, Object, Writer};

    fn node(name: &str, address: &str, prefix: &str, mac: Option<[u8; 6]>) -> Change {
        let node = Node {
            name: name.into(),
            addresses: vec![address.parse().unwrap()],
            pod_prefixes: vec![prefix.parse().unwrap()],
            tunnel: mac.map(|mac| NodeTunnel {
                backend: "vxlan".into(),
                public_addresses: Vec::new(),
                vni: None,
                vtep_mac_v4: Some(MacAddress(mac)),
                vtep_mac_v6: None,
            }),
            zone: None,
            leaving: false,
        };
        Change::Upsert(Object::Node(node), Vec::new())
    }

    fn compile_nodes(fabric: FabricMode, nodes: Vec<Change>) -> (FabricIntent, Vec<Problem>) {
        let mut writer = Writer::new();
        nodes.into_iter().for_each(|change| writer.apply(change));
        compile(writer.snapshot(), &NodeView { fabric, ..view("node-1") })
    }

    #[test]
    fn host_gw_needs_an_address_and_vxlan_a_hardware_address_too() {
        let nodes = || {
            vec![
                node("node-1", "192.168.64.11", "10.42.0.0/24", Some([2; 6])),
                node("node-2", "192.168.64.12", "10.42.1.0/24", None),
            ]
        };
        let (intent, problems) = compile_nodes(FabricMode::HostGw, nodes());
        assert_eq!(intent.peers.len(), 1);
        assert_eq!(problems, []);
        let (intent, problems) = compile_nodes(FabricMode::Vxlan, nodes());
        assert_eq!(intent.peers.len(), 0);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].to_string().contains("no VtepMAC yet"), "{}", problems[0]);
    }

    proptest::proptest! {
        #[test]
        fn an_overlap_is_found_wherever_it_is(addresses: Vec<u16>, lengths: Vec<u8>) {
            let prefix = |(address, length): (&u16, &u8)| -> IpNet {
                IpNet::new(std::net::Ipv4Addr::from(u32::from(*address) << 16).into(), length % 17).unwrap().trunc()
            };
            let mut taken = BTreeMap::new();
            for prefix in addresses.iter().zip(&lengths).map(prefix) {
                let expected = taken.keys().any(|other: &IpNet| other.contains(&prefix) || prefix.contains(other));
                proptest::prop_assert_eq!(overlapping(&taken, &prefix).is_some(), expected);
                if !expected {
                    taken.insert(prefix, NodeName::from("a"));
                }
            }
        }
    }

    #[test]
    fn overlapping_prefixes_are_a_problem_of_the_later_node_and_nothing_else_stops() {
        let (intent, problems) = compile_nodes(
            FabricMode::HostGw,
            vec![
                node("node-1", "192.168.64.11", "10.42.0.0/24", None),
                node("node-2", "192.168.64.12", "10.42.0.0/16", None),
                node("node-3", "192.168.64.13", "10.42.2.0/24", None),
            ],
        );
        assert_eq!(intent.peers.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.42.2.0/24"]);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].to_string().contains("overlaps 10.42.0.0/24 of Node node-1"), "{}", problems[0]);
    }
}
