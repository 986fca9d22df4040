//! The cluster: two nodes, their pods, and Services of every kind.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::IpAddr;

use portolan_intent::services::{ServicesCompiler, ServicesIntent};
use portolan_intent::{FabricMode, FabricSettings, NodeView, Segment, fabric, masquerade, wiring};
use portolan_net::{Family, MacAddress, NodeName, ObjectKey, Packet, Port, Protocol, Vni};
use portolan_program::netlink::{self, ForeignRoute, Surroundings};
use portolan_program::{ipset, iptables, ipvs, ipvs_mode, nftables};
use portolan_state::{
    AffinityTimeout, Attachment, AttachmentKey, Change, Dirty, Endpoint, EndpointPort, EndpointSlice, Node, NodeTunnel,
    Object, Service, ServicePort, ServiceTraffic, ServiceType, Snapshot, TrafficPolicy, Writer,
};
use portolan_trace::{Choice, Cluster, Ingress, NodePrograms, NodeTrace, ServicesPrograms, Trace, trace_node, walk};

/// How Services are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Nftables,
    Iptables,
    Ipvs,
}

impl Mode {
    pub(crate) const ALL: [Mode; 3] = [Mode::Nftables, Mode::Iptables, Mode::Ipvs];
}

enum Served {
    Nftables,
    Iptables(iptables::Program),
    Ipvs { chains: iptables::Program, sets: ipset::Program, servers: ipvs::Program },
}

pub(crate) struct Compiled {
    pub(crate) intent: ServicesIntent,
    netlink: netlink::Program,
    nftables: nftables::Program,
    served: Served,
    surroundings: Surroundings,
}

pub(crate) struct TestCluster {
    pub(crate) nodes: BTreeMap<NodeName, Compiled>,
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
        let services = match &compiled.served {
            Served::Nftables => ServicesPrograms::Nftables,
            Served::Iptables(program) => ServicesPrograms::Iptables(program),
            Served::Ipvs { chains, sets, servers } => {
                ServicesPrograms::Ipvs(ipvs_mode::Programs { chains, sets, servers })
            }
        };
        let programs = NodePrograms {
            node,
            netlink: &compiled.netlink,
            nftables: &compiled.nftables,
            services,
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

/// The addresses of a node by number: 192.168.64.11 and fd64::11 are the first one's.
fn addresses(index: u8) -> Vec<IpAddr> {
    [format!("192.168.64.{}", 10 + index), format!("fd64::{}", 10 + index)].map(|text| text.parse().unwrap()).to_vec()
}

fn node(index: u8) -> Change {
    upsert(Object::Node(Node {
        name: format!("node-{index}").into(),
        addresses: addresses(index),
        pod_prefixes: [format!("10.42.{index}.0/24"), format!("fd42:0:0:{index}::/64")]
            .map(|text| text.parse().unwrap())
            .to_vec(),
        tunnel: Some(NodeTunnel {
            backend: "vxlan".into(),
            public_addresses: Vec::new(),
            vni: Vni::new(1),
            vtep_mac_v4: Some(MacAddress([2, 0, 0, 0, 0, index])),
            vtep_mac_v6: Some(MacAddress([2, 0, 0, 0, 6, index])),
        }),
        zone: None,
        leaving: false,
    }))
}

fn service(name: &str, address: &str, node_port: Option<u16>, traffic: ServiceTraffic) -> Change {
    upsert(Object::Service(Service {
        key: ObjectKey::new("default", name),
        service_type: if traffic.load_balancer_addresses.is_empty() {
            ServiceType::NodePort
        } else {
            ServiceType::LoadBalancer
        },
        cluster_addresses: vec![address.parse().unwrap()],
        headless: false,
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: port(80),
            node_port: node_port.map(port),
        }],
        publish_not_ready: false,
        traffic,
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
    let endpoints: Vec<Endpoint> = endpoints.iter().map(endpoint).collect();
    upsert(Object::EndpointSlice(EndpointSlice {
        key: ObjectKey::new("default", format!("{service}-x")),
        service: ObjectKey::new("default", service),
        family: endpoints.first().map_or(Family::V4, |first| Family::of(first.address)),
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints,
        headless: false,
    }))
}

fn attachment(pod: &str, address: &str, address_v6: &str) -> Change {
    upsert(Object::Attachment(Attachment {
        key: AttachmentKey { container: pod.into(), interface: "eth0".into() },
        namespace_path: format!("/run/netns/{pod}").into(),
        pod: Some(ObjectKey::new("default", pod)),
        addresses: [format!("{address}/24"), format!("{address_v6}/64")].map(|text| text.parse().unwrap()).to_vec(),
        host_interface: format!("veth{pod}").into(),
        mac: MacAddress([2, 1, 1, 1, 1, 1]),
    }))
}

fn surroundings(index: u8) -> Surroundings {
    let route = |destination: &str, gateway: Option<&str>| ForeignRoute {
        destination: destination.parse().unwrap(),
        device: "eth0".into(),
        gateway: gateway.map(|gateway| gateway.parse().unwrap()),
        onlink: false,
        metric: 0,
        protocol: 2,
    };
    let prefixes = [format!("192.168.64.{}/24", 10 + index), format!("fd64::{}/64", 10 + index)];
    Surroundings {
        addresses: prefixes.map(|prefix| ("eth0".into(), prefix.parse().unwrap())).to_vec(),
        routes: vec![
            route("192.168.64.0/24", None),
            route("0.0.0.0/0", Some("192.168.64.1")),
            route("fd64::/64", None),
            route("::/0", Some("fd64::1")),
        ],
        links: Vec::new(),
    }
}

fn compile(snapshot: &Snapshot, index: u8, fabric: FabricMode, mode: Mode) -> Compiled {
    let view = NodeView {
        node: format!("node-{index}").into(),
        fabric,
        fabric_settings: FabricSettings::default(),
        cluster_prefixes: ["10.42.0.0/16", "fd42::/48"].map(|prefix| prefix.parse().unwrap()).to_vec(),
        service_prefixes: ["10.96.0.0/16", "fd96::/112"].map(|prefix| prefix.parse().unwrap()).to_vec(),
        masquerade: true,
        underlay_interface: "eth0".into(),
        underlay_mtu: 1500,
        segment: Segment::new(
            ["192.168.64.0/24", "fd64::/64"].map(|prefix| prefix.parse().unwrap()).to_vec(),
            Vec::new(),
        ),
        bridge: "cni0".into(),
        proxy: portolan_intent::services::ProxySettings::default(),
    };
    let (fabric, problems) = fabric::compile(snapshot, &view);
    assert_eq!(problems, []);
    let mut services = ServicesCompiler::new(view.node.clone(), view.proxy.clone());
    services.update(snapshot, &Dirty::everything(snapshot));
    let intent = services.intent().clone();
    let nothing = ServicesIntent::new();
    let by_nftables = if mode == Mode::Nftables { &intent } else { &nothing };
    let prefixes = snapshot.nodes[&view.node].pod_prefixes.clone();
    let (own, health) = (addresses(index), BTreeSet::new());
    let served = match mode {
        Mode::Nftables => Served::Nftables,
        Mode::Iptables => Served::Iptables(iptables::compile(&intent, &health, &own, &view)),
        Mode::Ipvs => Served::Ipvs {
            chains: iptables::chains_for_ipvs(&view, &Family::ALL, &prefixes),
            sets: ipset::compile(&intent, &health, &own, &view),
            servers: ipvs::compile(&intent, &health, &own, &view),
        },
    };
    Compiled {
        netlink: netlink::compile(&fabric, &wiring::compile(snapshot, &view), &view),
        nftables: nftables::compile(by_nftables, &masquerade::compile(snapshot, &view), &own, &prefixes, &view),
        served,
        surroundings: surroundings(index),
        intent,
    }
}

/// Two nodes: client (10.42.1.5) and near (10.42.1.7) on the first, far (10.42.2.9) on the second.
pub(crate) fn cluster(fabric: FabricMode, mode: Mode) -> TestCluster {
    let plain = ServiceTraffic::default;
    let local = || ServiceTraffic { external_policy: TrafficPolicy::Local, ..plain() };
    let sticky = ServiceTraffic { affinity: Some(AffinityTimeout::DEFAULT), ..plain() };
    let ranged = ServiceTraffic {
        load_balancer_addresses: vec!["203.0.113.9".parse().unwrap()],
        load_balancer_sources: Some(vec!["198.51.100.0/24".parse().unwrap()]),
        ..plain()
    };
    let mut nodes = BTreeMap::new();
    for index in [1, 2] {
        let mut writer = Writer::new();
        let tables = [
            node(1),
            node(2),
            service("far", "10.96.0.10", Some(30_080), plain()),
            slice("far", &[("10.42.2.9", "node-2")]),
            service("both", "10.96.0.11", None, plain()),
            slice("both", &[("10.42.1.7", "node-1"), ("10.42.2.9", "node-2")]),
            service("self", "10.96.0.12", None, plain()),
            slice("self", &[("10.42.1.5", "node-1")]),
            service("empty", "10.96.0.13", Some(30_083), plain()),
            service("far-local", "10.96.0.14", Some(30_084), local()),
            slice("far-local", &[("10.42.2.9", "node-2")]),
            service("sticky", "10.96.0.15", None, sticky.clone()),
            slice("sticky", &[("10.42.1.7", "node-1"), ("10.42.2.9", "node-2")]),
            service("ranged", "10.96.0.16", None, ranged.clone()),
            slice("ranged", &[("10.42.1.7", "node-1")]),
            service("host", "10.96.0.17", None, plain()),
            slice("host", &[("192.168.64.11", "node-1")]),
            service("six", "fd96::10", Some(30_090), plain()),
            slice("six", &[("fd42:0:0:2::9", "node-2")]),
            service("six-self", "fd96::11", None, plain()),
            slice("six-self", &[("fd42:0:0:1::5", "node-1")]),
        ];
        tables.into_iter().for_each(|change| writer.apply(change));
        let local: &[(&str, &str, &str)] = if index == 1 {
            &[("client", "10.42.1.5", "fd42:0:0:1::5"), ("near", "10.42.1.7", "fd42:0:0:1::7")]
        } else {
            &[("far", "10.42.2.9", "fd42:0:0:2::9")]
        };
        local.iter().for_each(|(pod, address, address_v6)| writer.apply(attachment(pod, address, address_v6)));
        nodes.insert(NodeName::from(format!("node-{index}")), compile(writer.snapshot(), index, fabric, mode));
    }
    TestCluster { nodes }
}

pub(crate) fn packet(source: &str, destination: &str, number: u16) -> Packet {
    Packet {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol: Protocol::Tcp,
        source_port: 41_022,
        destination_port: number,
        mark: 0,
    }
}

pub(crate) fn trace(cluster: &mut TestCluster, start: &str, packet: Packet, ingress: Ingress, choice: Choice) -> Trace {
    walk(cluster, &start.into(), packet, ingress, choice).unwrap()
}
