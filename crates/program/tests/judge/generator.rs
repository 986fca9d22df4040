//! Random clusters: small, full of coincidences, and shrinking to the few objects that matter.
//!
//! Every address, port and name comes from a short list, so that Services contend, endpoints are their own clients,
//! and slices repeat each other. What a Service may say (`scenarios/services/` has a page for each) can all occur.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use portolan_intent::services::{DetectLocal, NodePortAddresses, ProxySettings};
use portolan_net::{Family, IpNet, NodeName, ObjectKey, Port, Protocol};
use portolan_state::{
    AffinityTimeout, Endpoint, EndpointHints, EndpointPort, EndpointSlice, Node, Service, ServicePort, ServiceTraffic,
    ServiceType, TrafficPolicy,
};
use proptest::option::{of as maybe, weighted};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use crate::answer::{From, Question};
use crate::cluster::{BRIDGE, Cluster};

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
const ZONES: [&str; 2] = ["east", "west"];
const NAMES: [&str; 3] = ["http", "dns", "metrics"];
const SERVICES: [(&str, &str); 5] =
    [("default", "cart"), ("default", "shop"), ("kube-system", "dns"), ("shop", "cart"), ("shop", "web")];

/// The most questions about one cluster, spread evenly over all that are sensible.
const QUESTIONS_MAX: usize = 120;

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn port(number: u16) -> Port {
    Port::try_from(number).unwrap()
}

/// One of the nodes that every cluster has.
pub(crate) fn node(number: u8, zone: Option<&str>) -> Node {
    let parse = |text: String| text.parse().unwrap();
    Node {
        name: NodeName::from(format!("node-{number}")),
        addresses: [
            format!("192.168.64.1{number}"),
            format!("2001:db8::1{number}"),
            format!("192.168.65.1{number}"),
            format!("2001:db8:1::1{number}"),
        ]
        .map(|text| address(&text))
        .to_vec(),
        pod_prefixes: vec![parse(format!("10.42.{number}.0/24")), parse(format!("fd42:0:0:{number}::/64"))],
        tunnel: None,
        zone: zone.map(Arc::from),
        leaving: false,
    }
}

fn any_settings() -> impl Strategy<Value = ProxySettings> {
    let detect_local = prop_oneof![
        4 => Just(DetectLocal::ClusterPrefixes),
        1 => Just(DetectLocal::NodePrefixes),
        1 => Just(DetectLocal::Bridge(BRIDGE.to_owned())),
        1 => Just(DetectLocal::InterfacePrefix("cni".to_owned())),
        2 => Just(DetectLocal::Nothing),
    ];
    let prefixes = ["192.168.64.0/24", "192.168.65.0/24", "2001:db8::/64", "10.0.0.0/8"];
    let within = subsequence(prefixes.map(|text| text.parse::<IpNet>().unwrap()).to_vec(), 1..=3);
    let node_port_addresses = prop_oneof![
        3 => Just(NodePortAddresses::All),
        1 => Just(NodePortAddresses::Primary),
        1 => within.prop_map(NodePortAddresses::Within),
    ];
    (weighted(0.2, Just(())), detect_local, node_port_addresses, weighted(0.7, Just(()))).prop_map(
        |(masquerade_all, detect_local, node_port_addresses, external_ips)| ProxySettings {
            masquerade_all: masquerade_all.is_some(),
            detect_local,
            node_port_addresses,
            external_ips: external_ips.is_some(),
            localhost_node_ports: false,
            tcp_be_liberal: false,
        },
    )
}

fn any_nodes() -> impl Strategy<Value = Vec<Node>> {
    maybe(select(ZONES.to_vec())).prop_map(|zone| vec![node(1, zone), node(2, Some("west"))])
}

fn some_of(list: &[&str], most: usize) -> impl Strategy<Value = Vec<IpAddr>> + use<> {
    subsequence(list.iter().map(|text| address(text)).collect::<Vec<_>>(), 0..=most)
}

fn any_traffic() -> impl Strategy<Value = ServiceTraffic> {
    let policy = || select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]);
    let external = some_of(&["203.0.113.1", "203.0.113.2", "192.168.64.11", "2001:db8:e::1", "2001:db8:e::2"], 2);
    let balancer = some_of(&["203.0.113.2", "203.0.113.3", "2001:db8:e::2", "2001:db8:e::3"], 2);
    let ranges = [
        "198.51.100.0/24",
        "192.168.64.0/24",
        "10.42.0.0/16",
        "10.42.1.7/32",
        "0.0.0.0/0",
        "2001:db8::/32",
        "fd42::/48",
    ];
    let ranges = subsequence(ranges.map(|text| text.parse::<IpNet>().unwrap()).to_vec(), 0..=3);
    (
        policy(),
        policy(),
        weighted(0.3, 1u32..20_000),
        external,
        balancer,
        weighted(0.5, ranges),
        maybe(32_000u16..32_002),
    )
        .prop_map(|(internal_policy, external_policy, affinity, external, balancer, ranges, health)| {
            ServiceTraffic {
                internal_policy,
                external_policy,
                affinity: affinity.and_then(AffinityTimeout::new),
                external_addresses: external,
                load_balancer_addresses: balancer,
                load_balancer_sources: ranges,
                health_check_port: health.map(port),
            }
        })
}

/// Ports as an API server lets them be: no port and protocol twice, and names where there are several.
fn any_ports() -> impl Strategy<Value = Vec<ServicePort>> {
    let one = (select(vec![80u16, 81, 443]), select(PROTOCOLS.to_vec()), maybe(30_000u16..30_004), any::<bool>());
    prop::collection::vec(one, 1..=3).prop_map(|list| {
        let mut distinct: BTreeMap<(u16, Protocol), (Option<u16>, bool)> = BTreeMap::new();
        for (number, protocol, node_port, is_named) in list {
            distinct.insert((number, protocol), (node_port, is_named));
        }
        let several = distinct.len() > 1;
        let mut ports = Vec::new();
        for (name, ((number, protocol), (node_port, is_named))) in NAMES.into_iter().zip(distinct) {
            let name = if several || is_named { name } else { "" };
            let node_port = node_port.map(port);
            ports.push(ServicePort { name: name.into(), protocol, port: port(number), node_port });
        }
        ports
    })
}

fn any_service(key: ObjectKey) -> impl Strategy<Value = Service> {
    let service_type = prop_oneof![
        3 => Just(ServiceType::ClusterIp),
        3 => Just(ServiceType::NodePort),
        4 => Just(ServiceType::LoadBalancer),
        1 => Just(ServiceType::ExternalName("example.org".into())),
    ];
    let addresses = (maybe(1u8..7), maybe(1u8..7)).prop_map(|(v4, v6)| {
        let v4 = v4.map(|last| address(&format!("10.96.0.{last}")));
        v4.into_iter().chain(v6.map(|last| address(&format!("fd96::{last}")))).collect::<Vec<_>>()
    });
    (service_type, addresses, weighted(0.05, Just(())), any_ports(), weighted(0.1, Just(())), any_traffic()).prop_map(
        move |(service_type, cluster_addresses, headless, mut ports, publish_not_ready, traffic)| {
            let headless = headless.is_some();
            // As an API server keeps it: only these types have node ports.
            if !matches!(service_type, ServiceType::NodePort | ServiceType::LoadBalancer) {
                ports.iter_mut().for_each(|port| port.node_port = None);
            }
            let is_name = matches!(service_type, ServiceType::ExternalName(_));
            Service {
                key: key.clone(),
                service_type,
                cluster_addresses: if headless || is_name { Vec::new() } else { cluster_addresses },
                headless,
                ports,
                publish_not_ready: publish_not_ready.is_some(),
                traffic,
            }
        },
    )
}

fn any_endpoint(family: Family) -> impl Strategy<Value = Endpoint> {
    let addresses = match family {
        Family::V4 => ["10.42.1.2", "10.42.1.3", "10.42.2.2", "10.42.2.3", "192.168.64.12"],
        Family::V6 => ["fd42:0:0:1::2", "fd42:0:0:1::3", "fd42:0:0:2::2", "fd42:0:0:2::3", "2001:db8::12"],
    };
    let conditions = prop_oneof![
        5 => Just((true, true, false)),
        1 => Just((true, true, true)),
        1 => Just((false, false, false)),
        1 => Just((false, true, false)),
        3 => Just((false, true, true)),
        1 => Just((false, false, true)),
    ];
    let nodes = subsequence(vec![NodeName::from("node-1"), NodeName::from("node-2")], 0..=2);
    let hints = (nodes, subsequence(ZONES.to_vec(), 0..=2)).prop_map(|(nodes, zones)| {
        Box::new(EndpointHints { nodes, zones: zones.into_iter().map(Arc::from).collect() })
    });
    (select(addresses.to_vec()), conditions, weighted(0.1, Just(())), weighted(0.5, hints)).prop_map(
        move |(text, (ready, serving, terminating), nowhere, hints)| {
            let is_here = text.starts_with("10.42.1.") || text.starts_with("fd42:0:0:1:");
            let node = if is_here { "node-1" } else { "node-2" };
            Endpoint {
                address: address(text),
                ready,
                serving,
                terminating,
                node: nowhere.is_none().then(|| node.into()),
                hostname: None,
                hints,
            }
        },
    )
}

fn any_slice(key: ObjectKey, service: ObjectKey) -> impl Strategy<Value = EndpointSlice> {
    let one_port =
        (select(vec!["", "http", "dns", "metrics"]), select(PROTOCOLS.to_vec()), select(vec![8080u16, 8081]));
    // Most slices have every name, so that most Services find their port.
    let ports = prop_oneof![
        9 => select(vec![8080u16, 8081]).prop_map(|number| {
            let of = |name: &'static str| PROTOCOLS.map(move |protocol| (name, protocol, number));
            ["", "http", "dns", "metrics"].into_iter().flat_map(of).collect::<Vec<_>>()
        }),
        1 => prop::collection::vec(one_port, 0..3),
    ];
    select(Family::ALL.to_vec()).prop_flat_map(move |family| {
        let (key, service) = (key.clone(), service.clone());
        (ports.clone(), prop::collection::vec(any_endpoint(family), 0..6), weighted(0.05, Just(()))).prop_map(
            move |(ports, endpoints, headless)| EndpointSlice {
                key: key.clone(),
                service: service.clone(),
                family,
                ports: ports
                    .into_iter()
                    .map(|(name, protocol, number)| EndpointPort { name: name.into(), protocol, port: port(number) })
                    .collect(),
                endpoints,
                headless: headless.is_some(),
            },
        )
    })
}

/// Services with their slices, each at most once.
fn any_objects() -> impl Strategy<Value = (BTreeMap<ObjectKey, Service>, BTreeMap<ObjectKey, EndpointSlice>)> {
    let one = select(SERVICES.to_vec()).prop_flat_map(|(namespace, name)| {
        let key = ObjectKey::new(namespace, name);
        let slice = (1u8..6).prop_flat_map({
            let key = key.clone();
            move |number| any_slice(ObjectKey::new(namespace, format!("{name}-{number}")), key.clone())
        });
        (weighted(0.95, any_service(key)), prop::collection::vec(slice, 0..6))
    });
    prop::collection::vec(one, 0..5).prop_map(|list| {
        let (services, slices): (Vec<_>, Vec<_>) = list.into_iter().unzip();
        let services = services.into_iter().flatten().map(|it| (it.key.clone(), it)).collect();
        let slices = slices.into_iter().flatten().map(|it| (it.key.clone(), it)).collect();
        (services, slices)
    })
}

/// Any cluster, and what it becomes later: the same nodes under the same settings with other objects.
pub(crate) fn any_cluster() -> impl Strategy<Value = (Cluster, Cluster)> {
    (any_nodes(), any_settings(), any_objects(), any_objects(), any_nodes()).prop_map(
        |(nodes, settings, first, second, later_nodes)| {
            let of = |nodes, (services, slices)| Cluster { nodes, settings: settings.clone(), services, slices };
            (of(nodes, first), of(later_nodes, second))
        },
    )
}

/// Everything that is worth asking of a cluster, or an even part of it where it is a lot.
pub(crate) fn questions(cluster: &Cluster) -> Vec<Question> {
    let mut destinations: Vec<(IpAddr, Port, Protocol)> = Vec::new();
    for service in cluster.services.values() {
        let traffic = &service.traffic;
        let addresses = service.cluster_addresses.iter();
        let addresses: Vec<IpAddr> =
            addresses.chain(&traffic.external_addresses).chain(&traffic.load_balancer_addresses).copied().collect();
        for of_service in &service.ports {
            destinations.extend(addresses.iter().map(|address| (*address, of_service.port, of_service.protocol)));
            if let Some(node_port) = of_service.node_port {
                let at_node = cluster.node().addresses.iter().map(|address| (*address, node_port, of_service.protocol));
                destinations.extend(at_node);
                let is_everywhere = cluster.settings.node_port_addresses == NodePortAddresses::All;
                let bridge = cluster.bridge_addresses().into_iter().filter(|_| is_everywhere);
                destinations.extend(bridge.map(|address| (address, node_port, of_service.protocol)));
            }
        }
    }
    // Ports that nobody asked for, at an address of a Service and at another node.
    let first = cluster.services.values().find_map(|service| Some((service, service.ports.first()?)));
    if let Some((service, of_service)) = first {
        destinations.extend(service.cluster_addresses.iter().map(|address| (*address, port(9999), Protocol::Tcp)));
        let node_port = of_service.node_port.unwrap_or(of_service.port);
        destinations.push((address("192.168.64.12"), node_port, of_service.protocol));
    }
    destinations.sort_unstable();
    destinations.dedup();
    let all: Vec<Question> = destinations
        .into_iter()
        .flat_map(|(destination, port, protocol)| {
            let of = move |(from, source)| Question { from, source, destination, port, protocol };
            clients(Family::of(destination)).into_iter().map(of)
        })
        .collect();
    // Spread by a step that has no factor in common with the number of clients.
    let step = (all.len().div_ceil(QUESTIONS_MAX) | 1).max(1);
    let step = if step.is_multiple_of(5) { step + 2 } else { step };
    all.into_iter().step_by(step).collect()
}

/// Who asks: an endpoint of this node, another pod, a pod of another node, the node, and two outside.
fn clients(family: Family) -> Vec<(From, IpAddr)> {
    let list = match family {
        Family::V4 => ["10.42.1.2", "10.42.1.7", "10.42.2.7", "192.168.64.11", "198.51.100.7"],
        Family::V6 => ["fd42:0:0:1::2", "fd42:0:0:1::7", "fd42:0:0:2::7", "2001:db8::11", "2001:db9::7"],
    };
    let ways = [From::Pod, From::Pod, From::Outside, From::Node, From::Outside];
    ways.into_iter().zip(list.map(address)).collect()
}
