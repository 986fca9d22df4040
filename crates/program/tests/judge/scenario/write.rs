//! A cluster as the text of a scenario.

use std::fmt::{Display, Write as _};

use portolan_intent::services::{DetectLocal, NodePortAddresses};
use portolan_net::Port;
use portolan_state::{Endpoint, EndpointSlice, Node, Service, ServiceType, TrafficPolicy};

use crate::cluster::Cluster;

/// The lines that make this cluster.
pub(crate) fn render(cluster: &Cluster) -> String {
    let mut text = String::new();
    for it in &cluster.nodes {
        node(&mut text, it);
    }
    settings(&mut text, cluster);
    for it in cluster.services.values() {
        service(&mut text, it);
    }
    for it in cluster.slices.values() {
        slice(&mut text, it);
    }
    text
}

fn line(text: &mut String, words: &[String]) {
    let words: Vec<&str> = words.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
    writeln!(text, "{}", words.join(" ")).unwrap();
}

fn part(text: &mut String, words: &[String]) {
    text.push_str("  ");
    line(text, words);
}

fn list<T: Display>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn named<T: Display>(name: &str, values: &[T]) -> String {
    if values.is_empty() { String::new() } else { format!("{name}={}", list(values)) }
}

fn flag(name: &str, is_set: bool) -> String {
    if is_set { name.to_owned() } else { String::new() }
}

fn node(text: &mut String, node: &Node) {
    let zone = node.zone.as_ref().map(|zone| format!("zone={zone}")).unwrap_or_default();
    let (addresses, pods) = (named("addresses", &node.addresses), named("pods", &node.pod_prefixes));
    line(text, &["node".to_owned(), node.name.to_string(), zone, addresses, pods]);
}

fn settings(text: &mut String, cluster: &Cluster) {
    let settings = &cluster.settings;
    let detect = match &settings.detect_local {
        DetectLocal::ClusterPrefixes => "ClusterCIDR".to_owned(),
        DetectLocal::NodePrefixes => "NodeCIDR".to_owned(),
        DetectLocal::Bridge(name) => format!("BridgeInterface:{name}"),
        DetectLocal::InterfacePrefix(prefix) => format!("InterfaceNamePrefix:{prefix}"),
        DetectLocal::Nothing => "none".to_owned(),
    };
    let addresses = match &settings.node_port_addresses {
        NodePortAddresses::All => "all".to_owned(),
        NodePortAddresses::Primary => "primary".to_owned(),
        NodePortAddresses::Within(prefixes) => list(prefixes),
    };
    let words = [
        "settings".to_owned(),
        format!("detectLocal={detect}"),
        format!("nodePortAddresses={addresses}"),
        flag("masqueradeAll", settings.masquerade_all),
        flag("externalIPs", settings.external_ips),
        flag("localhostNodePorts", settings.localhost_node_ports),
    ];
    line(text, &words);
}

fn service(text: &mut String, service: &Service) {
    let service_type = match &service.service_type {
        ServiceType::ClusterIp => "ClusterIP".to_owned(),
        ServiceType::NodePort => "NodePort".to_owned(),
        ServiceType::LoadBalancer => "LoadBalancer".to_owned(),
        ServiceType::ExternalName(name) => format!("ExternalName={name}"),
    };
    let addresses = match (service.headless, service.cluster_addresses.is_empty()) {
        (true, _) => "None".to_owned(),
        (false, true) => String::new(),
        (false, false) => list(&service.cluster_addresses),
    };
    line(text, &["service".to_owned(), service.key.to_string(), service_type, addresses]);
    for port in &service.ports {
        let at_nodes = port.node_port.map(|it| format!("nodePort={it}")).unwrap_or_default();
        let number = format!("{}/{}", port.port, port.protocol);
        part(text, &["port".to_owned(), port.name.to_string(), number, at_nodes]);
    }
    let traffic = &service.traffic;
    let mut say = |word: &str, value: Option<String>| {
        if let Some(value) = value {
            part(text, &[word.to_owned(), value]);
        }
    };
    let local = |policy| (policy == TrafficPolicy::Local).then(|| "Local".to_owned());
    let some = |values: String| Some(values).filter(|text| !text.is_empty());
    say("publishNotReadyAddresses", service.publish_not_ready.then(String::new));
    say("internalTrafficPolicy", local(traffic.internal_policy));
    say("externalTrafficPolicy", local(traffic.external_policy));
    say("sessionAffinity", traffic.affinity.map(|it| it.seconds().to_string()));
    say("externalIPs", some(list(&traffic.external_addresses)));
    say("loadBalancer", some(list(&traffic.load_balancer_addresses)));
    let ranges = traffic.load_balancer_sources.as_ref();
    say("loadBalancerSourceRanges", ranges.map(|it| if it.is_empty() { "none".to_owned() } else { list(it) }));
    say("healthCheckNodePort", traffic.health_check_port.as_ref().map(Port::to_string));
}

fn slice(text: &mut String, slice: &EndpointSlice) {
    let words = [
        "slice".to_owned(),
        slice.key.to_string(),
        "of".to_owned(),
        slice.service.name.to_string(),
        slice.family.to_string(),
        flag("headless", slice.headless),
    ];
    line(text, &words);
    for port in &slice.ports {
        part(text, &["port".to_owned(), port.name.to_string(), format!("{}/{}", port.port, port.protocol)]);
    }
    for it in &slice.endpoints {
        endpoint(text, it);
    }
}

fn endpoint(text: &mut String, endpoint: &Endpoint) {
    let mut words = vec!["endpoint".to_owned(), endpoint.address.to_string()];
    words.extend(endpoint.node.as_ref().map(|node| format!("on {node}")));
    words.push(flag("unready", !endpoint.ready));
    words.push(flag("serving", !endpoint.ready && endpoint.serving));
    words.push(flag("terminating", endpoint.terminating));
    if let Some(hints) = &endpoint.hints {
        words.push(flag("hints", hints.nodes.is_empty() && hints.zones.is_empty()));
        words.extend([named("nodes", &hints.nodes), named("zones", &hints.zones)]);
    }
    part(text, &words);
}
