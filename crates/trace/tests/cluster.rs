//! Walks through a cluster of two nodes, compiled from tables: the way of a packet and its reasons.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;

use portolan_intent::services::ServicesCompiler;
use portolan_intent::{FabricMode, NodeView, fabric, masquerade, wiring};
use portolan_net::{Family, MacAddress, NodeName, ObjectKey, Packet, Port, Protocol, Vni};
use portolan_program::netlink::{self, ForeignRoute, Surroundings};
use portolan_program::nftables;
use portolan_state::{
    Attachment, AttachmentKey, Change, Dirty, Endpoint, EndpointPort, EndpointSlice, Node, NodeTunnel, Object, Service,
    ServicePort, ServiceType, Snapshot, Writer,
};
use portolan_trace::{
    Choice, Cluster, End, Ingress, NodePrograms, NodeTrace, Sighting, Stage, Trace, compare, render, trace_node, walk,
};

struct Compiled {
    netlink: netlink::Program,
    nftables: nftables::Program,
    surroundings: Surroundings,
}

struct TestCluster {
    nodes: BTreeMap<NodeName, Compiled>,
}

impl Cluster for TestCluster {
    type Error = Infallible;

    fn node(
        &mut self,
        node: &NodeName,
        packet: Packet,
        ingress: Ingress,
        choice: Choice,
    ) -> Result<NodeTrace, Infallible> {
        let compiled = &self.nodes[node];
        let programs = NodePrograms {
            node,
            netlink: &compiled.netlink,
            nftables: &compiled.nftables,
            iptables: None,
            surroundings: &compiled.surroundings,
        };
        Ok(trace_node(&programs, packet, &ingress, choice))
    }

    fn node_at(&self, address: IpAddr) -> Option<NodeName> {
        self.nodes
            .iter()
            .find(|(_, it)| it.surroundings.addresses.iter().any(|(_, prefix)| prefix.addr() == address))
            .map(|(name, _)| name.clone())
    }

    fn outside_name(&self, address: IpAddr) -> String {
        format!("outside {address}")
    }
}

fn port(number: u16) -> Port {
    Port::try_from(number).unwrap()
}

fn upsert(object: Object) -> Change {
    Change::Upsert(object, Vec::new())
}

fn node(index: u8) -> Change {
    upsert(Object::Node(Node {
        name: format!("node-{index}").into(),
        addresses: vec![IpAddr::from([192, 168, 64, 10 + index])],
        pod_prefixes: vec![format!("10.42.{index}.0/24").parse().unwrap()],
        tunnel: Some(NodeTunnel {
            backend: "vxlan".into(),
            public_addresses: Vec::new(),
            vni: Vni::new(1),
            vtep_mac_v4: Some(MacAddress([2, 0, 0, 0, 0, index])),
            vtep_mac_v6: None,
        }),
        zone: None,
        leaving: false,
    }))
}

fn service(name: &str, address: &str, node_port: Option<u16>) -> Change {
    upsert(Object::Service(Service {
        key: ObjectKey::new("default", name),
        service_type: ServiceType::NodePort,
        cluster_addresses: vec![address.parse().unwrap()],
        headless: false,
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: port(80),
            node_port: node_port.map(port),
        }],
        publish_not_ready: false,
        traffic: portolan_state::ServiceTraffic::default(),
    }))
}

fn slice(service: &str, endpoints: &[(&str, &str)]) -> Change {
    let endpoint = |(address, node): &(&str, &str)| Endpoint {
        address: address.parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        node: Some((*node).into()),
        hostname: None,
        hints: None,
    };
    upsert(Object::EndpointSlice(EndpointSlice {
        key: ObjectKey::new("default", format!("{service}-x")),
        service: ObjectKey::new("default", service),
        family: Family::V4,
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints: endpoints.iter().map(endpoint).collect(),
        headless: false,
    }))
}

fn attachment(pod: &str, address: &str) -> Change {
    upsert(Object::Attachment(Attachment {
        key: AttachmentKey { container: pod.into(), interface: "eth0".into() },
        namespace_path: format!("/run/netns/{pod}").into(),
        pod: Some(ObjectKey::new("default", pod)),
        addresses: vec![format!("{address}/24").parse().unwrap()],
        host_interface: format!("veth{pod}").into(),
        mac: MacAddress([2, 1, 1, 1, 1, 1]),
    }))
}

fn compile(snapshot: &Snapshot, index: u8, fabric: FabricMode) -> Compiled {
    let view = NodeView {
        node: format!("node-{index}").into(),
        fabric,
        vni: Vni::new(1).unwrap(),
        vxlan_port: 8472,
        cluster_prefixes: vec!["10.42.0.0/16".parse().unwrap()],
        service_prefixes: vec!["10.96.0.0/16".parse().unwrap()],
        masquerade: true,
        underlay_interface: "eth0".into(),
        underlay_mtu: 1500,
        bridge: "cni0".into(),
        proxy: portolan_intent::services::ProxySettings::default(),
    };
    let (fabric, problems) = fabric::compile(snapshot, &view);
    assert_eq!(problems, []);
    let mut services = ServicesCompiler::new(view.node.clone(), view.proxy.clone());
    services.update(snapshot, &Dirty::everything(snapshot));
    let route = |destination: &str, gateway: Option<&str>| ForeignRoute {
        destination: destination.parse().unwrap(),
        device: "eth0".into(),
        gateway: gateway.map(|gateway| gateway.parse().unwrap()),
        onlink: false,
        metric: 0,
        protocol: 2,
    };
    Compiled {
        netlink: netlink::compile(&fabric, &wiring::compile(snapshot, &view), &view),
        nftables: nftables::compile(services.intent(), &masquerade::compile(snapshot, &view), &[], &[], &view),
        surroundings: Surroundings {
            addresses: vec![("eth0".into(), format!("192.168.64.{}/24", 10 + index).parse().unwrap())],
            routes: vec![route("192.168.64.0/24", None), route("0.0.0.0/0", Some("192.168.64.1"))],
            links: Vec::new(),
        },
    }
}

/// Two nodes: client (10.42.1.5) and near (10.42.1.7) on the first, far (10.42.2.9) on the second.
fn cluster(fabric: FabricMode) -> TestCluster {
    let mut nodes = BTreeMap::new();
    for index in [1, 2] {
        let mut writer = Writer::new();
        let tables = [
            node(1),
            node(2),
            service("far", "10.96.0.10", Some(30_080)),
            slice("far", &[("10.42.2.9", "node-2")]),
            service("both", "10.96.0.11", None),
            slice("both", &[("10.42.1.7", "node-1"), ("10.42.2.9", "node-2")]),
            service("self", "10.96.0.12", None),
            slice("self", &[("10.42.1.5", "node-1")]),
            service("empty", "10.96.0.13", None),
        ];
        tables.into_iter().for_each(|change| writer.apply(change));
        let local: &[(&str, &str)] =
            if index == 1 { &[("client", "10.42.1.5"), ("near", "10.42.1.7")] } else { &[("far", "10.42.2.9")] };
        local.iter().for_each(|(pod, address)| writer.apply(attachment(pod, address)));
        nodes.insert(NodeName::from(format!("node-{index}")), compile(writer.snapshot(), index, fabric));
    }
    TestCluster { nodes }
}

fn packet(source: &str, destination: &str, number: u16) -> Packet {
    Packet {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol: Protocol::Tcp,
        source_port: 41_022,
        destination_port: number,
        mark: 0,
    }
}

fn trace(cluster: &mut TestCluster, start: &str, packet: Packet, ingress: Ingress, choice: Choice) -> Trace {
    walk(cluster, &start.into(), packet, ingress, choice).unwrap()
}

#[test]
fn a_pod_reaches_a_service_on_another_node_through_the_tunnel() {
    let trace = trace(
        &mut cluster(FabricMode::Vxlan),
        "node-1",
        packet("10.42.1.5", "10.96.0.10", 80),
        Ingress::Pod,
        Choice::First,
    );
    assert_eq!(
        render(&trace, "pod/default/client", "svc/default/far:80"),
        "\
pod/default/client → svc/default/far:80 (10.96.0.10:80)  tcp
 1 node-1  pod eth0             10.42.1.5:41022 → 10.96.0.10:80
 2 node-1  services (nftables)  dst 10.96.0.10:80 ⇒ 10.42.2.9:8080          Service default/far spec.ports[http], EndpointSlice default/far-x, 1 of 1
 3 node-1  route                10.42.2.0/24 via flannel.1 → 192.168.64.12  Node node-2
 4 node-2  pod eth0             10.42.1.5:41022 → 10.42.2.9:8080            delivered to Pod default/far
   reply                        src 10.42.2.9:8080 ⇒ 10.96.0.10:80          conntrack on node-1
"    );
}

#[test]
fn host_gw_goes_by_the_other_nodes_address() {
    let trace = trace(
        &mut cluster(FabricMode::HostGw),
        "node-1",
        packet("10.42.1.5", "10.42.2.9", 8080),
        Ingress::Pod,
        Choice::First,
    );
    let route = trace.hops.iter().find(|hop| hop.stage == Stage::Route).unwrap();
    assert_eq!(route.detail, "10.42.2.0/24 via 192.168.64.12 dev eth0");
    assert_eq!(trace.end, End::Delivered { at: "Pod default/far".into() });
    assert!(trace.reply.is_empty(), "nothing is rewritten between pods");
}

#[test]
fn a_choice_is_taken_and_the_others_are_named() {
    let mut cluster = cluster(FabricMode::Vxlan);
    for endpoint in ["10.42.1.7:8080", "10.42.2.9:8080"] {
        let endpoint = endpoint.parse().unwrap();
        let sent = packet("10.42.1.5", "10.96.0.11", 80);
        let trace = trace(&mut cluster, "node-1", sent, Ingress::Pod, Choice::Endpoint(endpoint));
        let hop = trace.hops.iter().find(|hop| hop.stage == Stage::Services).unwrap();
        assert_eq!(hop.after.destination, endpoint.ip());
        assert_eq!(hop.alternatives.len(), 2);
    }
}

#[test]
fn a_pod_that_calls_itself_is_masqueraded() {
    let sent = packet("10.42.1.5", "10.96.0.12", 80);
    let trace = trace(&mut cluster(FabricMode::Vxlan), "node-1", sent, Ingress::Pod, Choice::First);
    assert_eq!(trace.end, End::Delivered { at: "Pod default/client".into() });
    let hop = trace.hops.iter().find(|hop| hop.stage == Stage::Masquerade).unwrap();
    assert_eq!(hop.after.source, "10.42.1.1".parse::<IpAddr>().unwrap());
    assert_eq!(trace.reply.len(), 2);
}

#[test]
fn a_node_port_reaches_the_other_node_with_this_nodes_address() {
    let sent = packet("192.168.99.2", "192.168.64.11", 30_080);
    let trace = trace(&mut cluster(FabricMode::Vxlan), "node-1", sent, Ingress::Network, Choice::First);
    assert_eq!(trace.end, End::Delivered { at: "Pod default/far".into() });
    let last = trace.hops.last().unwrap();
    // The tunnel device's own address, since that is the link that the packet leaves by.
    assert_eq!(last.after.source, "10.42.1.0".parse::<IpAddr>().unwrap());
    assert_eq!(last.after.destination_text(), "10.42.2.9:8080");
}

#[test]
fn a_pod_leaves_the_cluster_with_its_nodes_address() {
    let sent = packet("10.42.1.5", "198.51.100.7", 443);
    let trace = trace(&mut cluster(FabricMode::Vxlan), "node-1", sent, Ingress::Pod, Choice::First);
    assert_eq!(trace.end, End::Delivered { at: "outside 198.51.100.7".into() });
    assert_eq!(trace.hops.last().unwrap().after.source, "192.168.64.11".parse::<IpAddr>().unwrap());
}

#[test]
fn a_node_chooses_its_source_and_reaches_a_service() {
    let sent = packet("0.0.0.0", "10.96.0.10", 80);
    let trace = trace(&mut cluster(FabricMode::Vxlan), "node-1", sent, Ingress::Node, Choice::First);
    assert_eq!(trace.hops[0].after.source, "192.168.64.11".parse::<IpAddr>().unwrap());
    assert_eq!(trace.end, End::Delivered { at: "Pod default/far".into() });
}

#[test]
fn a_service_without_endpoints_refuses_and_names_itself() {
    let sent = packet("10.42.1.5", "10.96.0.13", 80);
    let trace = trace(&mut cluster(FabricMode::Vxlan), "node-1", sent, Ingress::Pod, Choice::First);
    let End::Refused { reason, .. } = &trace.end else { panic!("{:?}", trace.end) };
    assert!(reason.contains("Service default/empty"), "{reason}");
}

#[test]
fn a_pod_that_is_gone_is_said_to_be() {
    let sent = packet("10.42.1.5", "10.42.2.77", 80);
    let trace = trace(&mut cluster(FabricMode::Vxlan), "node-1", sent, Ingress::Pod, Choice::First);
    let End::Refused { reason, node } = &trace.end else { panic!("{:?}", trace.end) };
    assert_eq!(node.as_str(), "node-2");
    assert!(reason.contains("no pod of this node holds 10.42.2.77"), "{reason}");
}

#[test]
fn sightings_are_held_against_the_prediction() {
    let sent = packet("10.42.1.5", "10.96.0.10", 80);
    let trace = trace(&mut cluster(FabricMode::Vxlan), "node-1", sent, Ingress::Pod, Choice::First);
    let sighting = |node: &str, packet: Packet, outgoing: bool| Sighting {
        node: node.into(),
        interface: "any".into(),
        outgoing,
        packet,
        microseconds: 0,
    };
    let translated = packet("10.42.1.5", "10.42.2.9", 8080);
    let right = [
        sighting("node-1", sent, false),
        sighting("node-1", translated, true),
        sighting("node-2", translated, false),
        sighting("node-2", translated, true),
    ];
    assert_eq!(compare(&trace, &right), []);
    // It came to the node of the pod, and never to the pod.
    let differences = compare(&trace, &right[..3]);
    assert_eq!(differences.len(), 1, "{differences:?}");
    assert!(differences[0].predicted.ends_with(" out"), "{differences:?}");
    assert!(differences[0].seen.contains(" in on any"), "{differences:?}");

    let elsewhere = packet("10.42.1.5", "10.42.2.8", 8080);
    let wrong = [sighting("node-1", sent, false), sighting("node-1", elsewhere, true)];
    let differences = compare(&trace, &wrong);
    assert_eq!(differences.len(), 3, "{differences:?}");
    assert_eq!(differences[1].seen, "nothing");
}
