//! A small dual-stack node: its program, its text, its steps, and where it sends packets.

use std::collections::BTreeMap;
use std::sync::Arc;

use portolan_intent::fabric::{FabricIntent, Peer, Way};
use portolan_intent::wiring::{PodInterface, WiringIntent};
use portolan_intent::{Encapsulation, FabricMode, FabricSettings, NodeView, Segment};
use portolan_net::{Family, IpNet, MacAddress, ObjectKey, ObjectKind, Origin, Vni};
use proptest::prelude::*;

use super::*;

fn view(fabric: FabricMode) -> NodeView {
    NodeView {
        node: "node-1".into(),
        fabric,
        fabric_settings: FabricSettings::default(),
        cluster_prefixes: vec!["10.42.0.0/16".parse().unwrap(), "fd00:42::/48".parse().unwrap()],
        service_prefixes: vec!["10.96.0.0/16".parse().unwrap()],
        masquerade: true,
        underlay_interface: "eth0".into(),
        underlay_mtu: 1500,
        segment: Segment::default(),
        bridge: "cni0".into(),
        proxy: portolan_intent::services::ProxySettings::default(),
    }
}

fn peer(mode: FabricMode, number: u8, address: &str) -> Peer {
    let node = format!("node-{number}");
    let origin = Origin::object(ObjectKind::Node, ObjectKey::cluster(node.as_str()));
    let way = match mode {
        FabricMode::Vxlan => {
            let vtep_mac = MacAddress::local([0, 0, 0, u8::from(address.contains(':')), number]);
            Way::Vxlan { vtep_mac }
        }
        FabricMode::Ipip => Way::Ipip,
        FabricMode::HostGw | FabricMode::Alloc => Way::Direct,
    };
    Peer { node: node.as_str().into(), address: address.parse().unwrap(), way, origin }
}

fn fabric(mode: FabricMode, peers: &[u8]) -> FabricIntent {
    let mut intent = FabricIntent {
        local_prefixes: vec!["10.42.1.0/24".parse().unwrap(), "fd00:42:0:1::/64".parse().unwrap()],
        local_addresses: vec!["192.168.64.11".parse().unwrap(), "fd00:64::11".parse().unwrap()],
        peers: BTreeMap::new(),
    };
    for number in peers {
        let v4: IpNet = format!("10.42.{number}.0/24").parse().unwrap();
        let v6: IpNet = format!("fd00:42:0:{number}::/64").parse().unwrap();
        intent.peers.insert(v4, peer(mode, *number, &format!("192.168.64.1{number}")));
        intent.peers.insert(v6, peer(mode, *number, &format!("fd00:64::1{number}")));
    }
    intent
}

fn wiring(pods: &[u8]) -> WiringIntent {
    let interface = |number: u8| PodInterface {
        namespace_path: format!("/run/netns/pod-{number}").into(),
        name: "eth0".into(),
        host_interface: format!("veth{number}").into(),
        mac: MacAddress::local([10, 42, 1, 0, number]),
        addresses: vec![
            format!("10.42.1.{number}/24").parse().unwrap(),
            format!("fd00:42:0:1::{number}/64").parse().unwrap(),
        ],
        gateways: vec!["10.42.1.1".parse().unwrap(), "fd00:42:0:1::1".parse().unwrap()],
        mtu: 1430,
        origin: Origin::object(ObjectKind::Pod, ObjectKey::new("default", format!("pod-{number}"))),
    };
    let key = |number: u8| AttachmentKey { container: format!("c{number}").into(), interface: "eth0".into() };
    WiringIntent {
        gateways: vec!["10.42.1.1/24".parse().unwrap(), "fd00:42:0:1::1/64".parse().unwrap()],
        mtu: 1430,
        interfaces: pods.iter().map(|number| (key(*number), Arc::new(interface(*number)))).collect(),
    }
}

fn program(mode: FabricMode, peers: &[u8], pods: &[u8]) -> Program {
    compile(&fabric(mode, peers), &wiring(pods), &view(mode))
}

fn texts(changes: &[Change]) -> Vec<String> {
    changes.iter().map(ToString::to_string).collect()
}

#[test]
fn a_small_node_reads_as_ip_prints_it() {
    let expected = include_str!("small_node.txt");
    assert_eq!(render(&program(FabricMode::Vxlan, &[2], &[7])), expected);
}

#[test]
fn a_program_survives_json() {
    let program = program(FabricMode::Vxlan, &[2, 3], &[7, 8]);
    let text = serde_json::to_string(&program).unwrap();
    assert_eq!(serde_json::from_str::<Program>(&text).unwrap(), program);
}

#[test]
fn one_peer_of_one_family_costs_three_steps() {
    let mut one = fabric(FabricMode::Vxlan, &[2, 3]);
    one.peers.retain(|prefix, peer| peer.node.as_str() == "node-2" || prefix.addr().is_ipv4());
    let desired = compile(&one, &wiring(&[]), &view(FabricMode::Vxlan));
    let observed = program(FabricMode::Vxlan, &[2], &[]);
    let added = diff(&desired, &observed, &Surroundings::default());
    assert_eq!(
        texts(&added),
        [
            "ip neigh replace 10.42.3.0 lladdr 02:00:00:00:00:03 dev flannel.1 nud permanent",
            "bridge fdb replace 02:00:00:00:00:03 dev flannel.1 dst 192.168.64.13 self permanent",
            "ip route add 10.42.3.0/24 via 10.42.3.0 dev flannel.1 proto 144 onlink",
        ]
    );
    let removed = diff(&observed, &desired, &Surroundings::default());
    assert_eq!(
        texts(&removed),
        [
            "ip route del 10.42.3.0/24 via 10.42.3.0 dev flannel.1 proto 144 onlink",
            "ip neigh del 10.42.3.0 dev flannel.1",
            "bridge fdb del 02:00:00:00:00:03 dev flannel.1 dst 192.168.64.13",
        ]
    );
}

#[test]
fn host_gw_is_one_route_per_prefix() {
    let program = program(FabricMode::HostGw, &[2], &[]);
    let changes =
        diff(&program, &super::Program { routes: BTreeMap::new(), ..program.clone() }, &Surroundings::default());
    assert_eq!(
        texts(&changes),
        [
            "ip route add 10.42.2.0/24 via 192.168.64.12 dev eth0 proto 144",
            "ip -6 route add fd00:42:0:2::/64 via fd00:64::12 dev eth0 proto 144",
        ]
    );
    assert_eq!(program.links.keys().collect::<Vec<_>>(), ["cni0"]);
}

#[test]
fn ipip_is_one_route_per_prefix_and_one_device_per_family() {
    let program = program(FabricMode::Ipip, &[2], &[]);
    let changes = diff(&program, &super::Program::default(), &Surroundings::default());
    let text = texts(&changes);
    let fabric: Vec<&str> = text.iter().map(String::as_str).filter(|line| line.contains("ipip")).collect();
    assert_eq!(
        fabric,
        [
            "ip link add flannel-v6.ipip mtu 1430 up type ip6tnl mode ip6ip6 encaplimit none remote any local fd00:64::11",
            "ip link add flannel.ipip mtu 1430 up type ipip remote any local 192.168.64.11",
            "ip addr add fd00:42:0:1::/128 dev flannel-v6.ipip nodad proto 144",
            "ip addr add 10.42.1.0/32 dev flannel.ipip proto 144",
            "ip route add 10.42.2.0/24 via 192.168.64.12 dev flannel.ipip proto 144 onlink",
            "ip -6 route add fd00:42:0:2::/64 via fd00:64::12 dev flannel-v6.ipip proto 144 onlink",
        ]
    );
    assert!(
        render(&program).contains("flannel.ipip: mtu 1430 up # configuration fabric\n    link/ipip 192.168.64.11\n")
    );
    let way = super::route(&program, &Surroundings::default(), "10.42.2.9".parse().unwrap());
    let RouteDecision::Via { device, kind, .. } = way else { panic!("{way:?}") };
    assert_eq!((device.as_str(), kind), ("flannel.ipip", ViaKind::Ipip { remote: "192.168.64.12".parse().unwrap() }));
}

#[test]
fn alloc_is_the_bridge_alone() {
    let program = compile(
        &FabricIntent { peers: BTreeMap::new(), ..fabric(FabricMode::Alloc, &[]) },
        &wiring(&[7]),
        &view(FabricMode::Alloc),
    );
    assert_eq!(program.links.keys().collect::<Vec<_>>(), ["cni0"]);
    assert!(program.routes.is_empty() && program.neighbours.is_empty() && program.forwarding.is_empty());
    assert_eq!(program.pods.len(), 1);
}

#[test]
fn what_is_near_has_a_plain_route_beside_the_tunnel() {
    let mut view = view(FabricMode::HostGw);
    view.fabric_settings.host_gw.beyond = Some(Encapsulation::Vxlan);
    let mut intent = fabric(FabricMode::HostGw, &[2]);
    intent.peers.extend(fabric(FabricMode::Vxlan, &[3]).peers);
    let program = compile(&intent, &wiring(&[]), &view);
    let devices: Vec<&str> = program.routes.values().map(|route| route.device.as_str()).collect();
    assert_eq!(devices, ["eth0", "flannel.1", "eth0", "flannel-v6.1"]);
    assert_eq!((program.neighbours.len(), program.forwarding.len()), (2, 2));
    // A node that comes onto the link: its route is replaced, what was its tunnel's goes.
    intent.peers.extend(fabric(FabricMode::HostGw, &[3]).peers);
    let after = compile(&intent, &wiring(&[]), &view);
    let text = texts(&diff(&after, &program, &Surroundings::default()));
    assert_eq!(text[0], "ip -6 neigh del fd00:42:0:3:: dev flannel-v6.1");
    assert!(
        text.contains(&"ip route replace 10.42.3.0/24 via 192.168.64.13 dev eth0 proto 144".to_owned()),
        "{text:?}"
    );
    assert_eq!(text.len(), 6, "{text:?}");
}

#[test]
fn what_is_set_for_a_tunnel_reads_as_ip_prints_it() {
    let mut view = view(FabricMode::Vxlan);
    (view.fabric_settings.vxlan.gbp, view.fabric_settings.vxlan.learning) = (true, true);
    let desired = compile(&fabric(FabricMode::Vxlan, &[2]), &wiring(&[]), &view);
    assert!(render(&desired).contains("vxlan id 1 local 192.168.64.11 dev eth0 dstport 8472 learning gbp\n"));
    let changes = diff(&desired, &program(FabricMode::Vxlan, &[2], &[]), &Surroundings::default());
    assert!(matches!(changes[0], Change::RemoveLink(_)), "{changes:?}");
}

#[test]
fn a_tunnel_with_another_port_is_made_anew_with_all_that_hangs_on_it() {
    let desired = program(FabricMode::Vxlan, &[2], &[]);
    let mut other = view(FabricMode::Vxlan);
    other.fabric_settings.vxlan.port = 4789;
    let observed = compile(&fabric(FabricMode::Vxlan, &[2]), &wiring(&[]), &other);
    let changes = diff(&desired, &observed, &Surroundings::default());
    let text = texts(&changes).join("\n");
    assert_eq!(changes.len(), 2 * (1 + 1 + 1 + 3), "{text}");
    assert!(text.starts_with("ip link del flannel-v6.1\nip link del flannel.1\n"), "{text}");
    assert!(!text.contains("cni0"), "{text}");
}

#[test]
fn what_others_made_that_is_equal_is_adopted() {
    let desired = program(FabricMode::Vxlan, &[2], &[]);
    let route = desired.routes.values().next().unwrap();
    let others = Surroundings {
        addresses: vec![("cni0".into(), "10.42.1.1/24".parse().unwrap())],
        routes: vec![ForeignRoute {
            destination: route.destination,
            device: route.device.clone(),
            gateway: Some(route.gateway),
            onlink: true,
            metric: 0,
            protocol: 3,
        }],
        links: Vec::new(),
    };
    let mut observed = desired.clone();
    observed.routes.remove(&route.destination);
    observed.addresses.remove(&("cni0".into(), "10.42.1.1/24".parse().unwrap()));
    assert_eq!(diff(&desired, &observed, &others), [Change::ReplaceRoute(route.clone())]);
}

#[test]
fn the_hardware_address_of_a_tunnel_is_stable_and_its_own() {
    let one = Vni::new(1).unwrap();
    let mac = fabric::vtep_mac(&"node-1".into(), one, Family::V4);
    // Published in the cluster and held by other nodes: a change of the hash is a change of the contract.
    assert_eq!(mac.to_string(), "02:8b:a0:b5:98:2d");
    assert_ne!(mac, fabric::vtep_mac(&"node-2".into(), one, Family::V4));
    assert_ne!(mac, fabric::vtep_mac(&"node-1".into(), one, Family::V6));
    assert_ne!(mac, fabric::vtep_mac(&"node-1".into(), Vni::new(2).unwrap(), Family::V4));
}

#[test]
fn packets_go_where_the_kernel_sends_them() {
    let program = program(FabricMode::Vxlan, &[2], &[7]);
    let others = Surroundings {
        addresses: vec![("eth0".into(), "192.168.64.11/24".parse().unwrap())],
        routes: vec![ForeignRoute {
            destination: "0.0.0.0/0".parse().unwrap(),
            device: "eth0".into(),
            gateway: Some("192.168.64.1".parse().unwrap()),
            onlink: false,
            metric: 0,
            protocol: 3,
        }],
        links: Vec::new(),
    };
    let way = |program: &Program, to: &str| super::route(program, &others, to.parse().unwrap());
    let kind = |decision: RouteDecision| match decision {
        RouteDecision::Via { kind, .. } => kind,
        other => panic!("{other:?}"),
    };
    let key = program.pods.keys().next().cloned();
    assert_eq!(kind(way(&program, "10.42.1.7")), ViaKind::Bridge { pod: key.clone() });
    assert_eq!(kind(way(&program, "fd00:42:0:1::7")), ViaKind::Bridge { pod: key });
    assert_eq!(kind(way(&program, "10.42.1.9")), ViaKind::Bridge { pod: None });
    assert_eq!(kind(way(&program, "10.42.2.9")), ViaKind::Vxlan { remote: "192.168.64.12".parse().unwrap() });
    assert_eq!(kind(way(&program, "fd00:42:0:2::9")), ViaKind::Vxlan { remote: "fd00:64::12".parse().unwrap() });
    assert_eq!(kind(way(&program, "192.168.64.12")), ViaKind::Link);
    assert_eq!(kind(way(&program, "8.8.8.8")), ViaKind::Link);
    assert!(matches!(way(&program, "10.42.1.1"), RouteDecision::Local { device, .. } if device == "cni0"));
    assert!(matches!(way(&program, "2001:db8::1"), RouteDecision::Unreachable { .. }));

    let mut broken = program.clone();
    broken.forwarding.clear();
    let RouteDecision::Unreachable { reason } = way(&broken, "10.42.2.9") else { panic!("it has no way") };
    assert_eq!(reason.to_string(), "no forwarding entry for 02:00:00:00:00:02 on flannel.1");
    broken.neighbours.clear();
    let RouteDecision::Unreachable { reason } = way(&broken, "10.42.2.9") else { panic!("it has no way") };
    assert_eq!(reason.to_string(), "no neighbour entry for 10.42.2.0 on flannel.1");
}

#[test]
fn an_alias_names_its_pod() {
    let key = AttachmentKey { container: "abc".into(), interface: "eth0".into() };
    assert_eq!(pod_of_alias(&pod_alias(&key)), Some(key));
    assert_eq!(pod_of_alias("portolan:bridge"), None);
    assert_eq!(pod_of_alias("something else"), None);
}

proptest! {
    #[test]
    fn a_program_differs_from_itself_in_nothing(
        peers in proptest::collection::btree_set(2u8..9, 0..5),
        pods in proptest::collection::btree_set(2u8..9, 0..5),
        mode in proptest::sample::select(&FabricMode::ALL[..]),
    ) {
        let program = program(mode, &peers.into_iter().collect::<Vec<_>>(), &pods.into_iter().collect::<Vec<_>>());
        prop_assert_eq!(diff(&program, &program, &Surroundings::default()), []);
    }

    #[test]
    fn steps_come_in_phases(
        before in proptest::collection::btree_set(2u8..9, 0..5),
        after in proptest::collection::btree_set(2u8..9, 0..5),
        was in proptest::sample::select(&FabricMode::ALL[..]),
        is in proptest::sample::select(&FabricMode::ALL[..]),
    ) {
        let before: Vec<u8> = before.into_iter().collect();
        let after: Vec<u8> = after.into_iter().collect();
        let changes = diff(
            &program(is, &after, &after),
            &program(was, &before, &before),
            &Surroundings::default(),
        );
        let phases: Vec<Phase> = changes.iter().map(Change::phase).collect();
        prop_assert!(phases.is_sorted(), "{phases:?}");
    }
}
