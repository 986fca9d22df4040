//! The fabric: which other nodes hold which pod prefixes, and how they are reached.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use portolan_net::{Family, MacAddress, NodeName, ObjectKey, ObjectKind, Origin};
use portolan_state::{Node, ObjectRef, Problem, Snapshot};
use serde::{Deserialize, Serialize};

use crate::{Encapsulation, FabricMode, NodeView};

/// The annotation that says a tunnel's identifier and hardware address.
const BACKEND_DATA: &str = "metadata.annotations[flannel.alpha.coreos.com/backend-data]";

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
    /// How packets get there.
    pub way: Way,
    /// The object that says so.
    pub origin: Origin,
}

/// How packets get to another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// As they are: the node is on this node's own link.
    Direct,
    /// Through the VXLAN tunnel.
    Vxlan {
        /// The hardware address of the node's tunnel device for this family.
        vtep_mac: MacAddress,
    },
    /// Wrapped in another IP header.
    Ipip,
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
            match peer(node, prefix, view) {
                Ok(peer) => {
                    taken.insert(prefix.trunc(), node.name.clone());
                    intent.peers.extend(peer.map(|peer| (prefix.trunc(), peer)));
                }
                Err(found) => problems.push(*found),
            }
        }
    }
    (intent, problems)
}

/// How another node's prefix is reached; `None` where someone else sees to it.
fn peer(node: &Node, prefix: &IpNet, view: &NodeView) -> Result<Option<Peer>, Box<Problem>> {
    if view.fabric == FabricMode::Alloc {
        return Ok(None);
    }
    let family = Family::of_prefix(prefix);
    let mut published = node.tunnel.iter().flat_map(|tunnel| tunnel.public_addresses.iter().copied());
    let published = published.find(|address| Family::of(*address) == family);
    let address = published.or_else(|| node.address(family)).ok_or_else(|| {
        Box::new(problem(
            node,
            "status.addresses",
            format!("no {family} InternalIP, so {prefix} cannot be reached"),
            "add an InternalIP of that family to the node",
        ))
    })?;
    let way = way(node, prefix, address, view)?;
    let origin = Origin::object(ObjectKind::Node, ObjectKey::cluster(node.name.as_str()));
    Ok(Some(Peer { node: node.name.clone(), address, way, origin }))
}

fn way(node: &Node, prefix: &IpNet, address: IpAddr, view: &NodeView) -> Result<Way, Box<Problem>> {
    let is_near = view.segment.has(address);
    if is_near && view.routes_directly() {
        return Ok(Way::Direct);
    }
    match view.encapsulation() {
        Some(Encapsulation::Vxlan) => vxlan(node, prefix, view),
        // Linux takes no IPv6 next hop on a tunnel whose address another link's prefix holds
        // (`ip6_route_check_nh_onlink`), so on this node's own link IPv6 goes as it is.
        Some(Encapsulation::Ipip) if is_near && address.is_ipv6() => Ok(Way::Direct),
        Some(Encapsulation::Ipip) => ipip(node, prefix),
        None => Err(Box::new(beyond(node, prefix, address, view))),
    }
}

fn vxlan(node: &Node, prefix: &IpNet, view: &NodeView) -> Result<Way, Box<Problem>> {
    let tunnel = node.tunnel.as_ref();
    let vtep_mac = tunnel.and_then(|it| match Family::of_prefix(prefix) {
        Family::V4 => it.vtep_mac_v4,
        Family::V6 => it.vtep_mac_v6,
    });
    let vtep_mac = vtep_mac.ok_or_else(|| {
        Box::new(problem(
            node,
            BACKEND_DATA,
            format!("no VtepMAC yet, so {prefix} cannot be reached"),
            "start the agent on that node with the vxlan fabric",
        ))
    })?;
    let own = view.fabric_settings.vxlan.vni;
    match tunnel.and_then(|it| it.vni).filter(|vni| *vni != own) {
        Some(vni) => Err(Box::new(problem(
            node,
            BACKEND_DATA,
            format!("VNI {vni}, and this node's is {own}, so {prefix} cannot be reached"),
            "let all agents have the same vxlan.vni",
        ))),
        None => Ok(Way::Vxlan { vtep_mac }),
    }
}

/// A node that says that it unwraps something else would drop what is sent to it. One of `host-gw` may fall back to
/// `ipip` as this node does.
fn ipip(node: &Node, prefix: &IpNet) -> Result<Way, Box<Problem>> {
    let [ipip, host_gw] = [FabricMode::Ipip, FabricMode::HostGw].map(FabricMode::name);
    let other = node.tunnel.as_ref().map(|it| it.backend.as_ref()).filter(|it| ![ipip, host_gw].contains(it));
    match other {
        Some(backend) => Err(Box::new(problem(
            node,
            "metadata.annotations[flannel.alpha.coreos.com/backend-type]",
            format!("{backend}, which unwraps no IP in IP, so {prefix} cannot be reached"),
            "start the agent on that node with the ipip fabric",
        ))),
        None => Ok(Way::Ipip),
    }
}

/// The problem of a node that is on another link, and nothing leads there.
fn beyond(node: &Node, prefix: &IpNet, address: IpAddr, view: &NodeView) -> Problem {
    let link = &view.underlay_interface;
    let prefixes = view.segment.prefixes().iter().filter(|it| Family::of_prefix(it) == Family::of(address));
    let prefixes = prefixes.map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let held = if prefixes.is_empty() { "has no prefix of that family".into() } else { format!("holds {prefixes}") };
    problem(
        node,
        "status.addresses",
        format!("{address} is not on the link {link}, which {held}, so a plain route to {prefix} is not possible"),
        "bring the nodes onto one link, or set hostGw.beyond to vxlan or ipip on all of them",
    )
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

    /// The ways to the nodes 2 (on the link of node 1) and 3 (beyond), and the problems.
    fn ways(change: impl FnOnce(&mut NodeView)) -> (Vec<Way>, Vec<String>) {
        let mut writer = Writer::new();
        for change in [
            node("node-1", "192.168.64.11", "10.42.0.0/24", Some([2; 6])),
            node("node-2", "192.168.64.12", "10.42.1.0/24", Some([2; 6])),
            node("node-3", "192.168.65.13", "10.42.2.0/24", Some([2; 6])),
        ] {
            writer.apply(change);
        }
        let mut view = view("node-1");
        change(&mut view);
        let (intent, problems) = compile(writer.snapshot(), &view);
        (intent.peers.values().map(|peer| peer.way).collect(), problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn plain_routes_end_where_the_link_ends() {
        let tunnel = Way::Vxlan { vtep_mac: MacAddress([2; 6]) };
        assert_eq!(ways(|_| {}), (vec![tunnel, tunnel], vec![]));
        assert_eq!(ways(|view| view.fabric_settings.vxlan.direct_routing = true), (vec![Way::Direct, tunnel], vec![]));
        let beyond = |beyond| {
            ways(|view| {
                view.fabric = FabricMode::HostGw;
                view.fabric_settings.host_gw.beyond = beyond;
            })
        };
        assert_eq!(beyond(Some(Encapsulation::Vxlan)), (vec![Way::Direct, tunnel], vec![]));
        let (near, problems) = beyond(None);
        assert_eq!(near, [Way::Direct]);
        assert_eq!(
            problems,
            [
                "Node node-3: status.addresses: 192.168.65.13 is not on the link eth0, which holds 192.168.64.0/24, so a \
              plain route to 10.42.2.0/24 is not possible (bring the nodes onto one link, or set hostGw.beyond to \
              vxlan or ipip on all of them)"
            ]
        );
        assert_eq!(ways(|view| view.fabric = FabricMode::Alloc), (vec![], vec![]));
    }

    #[test]
    fn a_peer_with_another_tunnel_is_a_problem() {
        let (none, problems) = ways(|view| view.fabric = FabricMode::Ipip);
        assert_eq!(none, []);
        assert!(problems[0].contains("vxlan, which unwraps no IP in IP, so 10.42.1.0/24"), "{problems:?}");
        let mut writer = Writer::new();
        let Change::Upsert(Object::Node(mut other), _) = node("node-2", "192.168.64.12", "10.42.1.0/24", Some([2; 6]))
        else {
            unreachable!()
        };
        other.tunnel.as_mut().unwrap().vni = portolan_net::Vni::new(7);
        writer.apply(Change::Upsert(Object::Node(other), Vec::new()));
        let (intent, problems) = compile(writer.snapshot(), &view("node-1"));
        assert!(intent.peers.is_empty());
        assert!(problems[0].to_string().contains("VNI 7, and this node's is 1"), "{}", problems[0]);
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
