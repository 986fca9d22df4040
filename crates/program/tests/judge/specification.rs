//! What a node must answer, from the objects alone: the judge's own reading of the documentation.
//!
//! It follows the API's reference for Service and EndpointSlice, KEP-1669 (terminating endpoints), KEP-2086
//! (internal traffic policy), KEP-2433 and KEP-3015 (hints), and kube-proxy's documented behaviour where those are
//! silent. It shares no code with `intent::services`, is as simple as it can be, and looks at the whole cluster for
//! every question. Whoever changes the meaning of a Service changes it here and there, and the judge compares.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use portolan_intent::services::{DetectLocal, NodePortAddresses, ProxySettings};
use portolan_net::{Family, NodeName, ObjectKey, Port};
use portolan_state::{AffinityTimeout, Endpoint, Service, ServicePort, ServiceType, TrafficPolicy};

use crate::answer::{Answer, From, Question};
use crate::cluster::{BRIDGE, Cluster, families};

/// Who a client is to a node that must tell its pods from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Pod,
    Node,
    Other,
}

/// By which field of a Service a destination is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    ClusterAddress,
    ExternalAddress,
    LoadBalancer,
    NodePort,
}

/// What a node answers to the first packet of a connection.
pub(crate) fn answer(cluster: &Cluster, question: &Question) -> Answer {
    let Some((service, port, by)) = meant(cluster, question) else { return Answer::Untouched };
    let endpoints = endpoints(cluster, service, port, question.family());
    // "If there are no endpoints, connections are refused", for every client and at every address.
    if usable(&endpoints).is_empty() {
        return Answer::Reject;
    }
    // `loadBalancerSourceRanges`: "traffic through the load balancer will be restricted to the specified client
    // IPs". Node ports and cluster addresses are not behind the load balancer.
    if by == By::LoadBalancer && !is_admitted(cluster, service, question) {
        return Answer::Drop;
    }
    let class = class(cluster, question);
    let is_outer = by != By::ClusterAddress;
    let policy = if is_outer { service.traffic.external_policy } else { service.traffic.internal_policy };
    // An external policy is for traffic from outside: the cluster's own clients reach every endpoint.
    let is_local = policy == TrafficPolicy::Local && !(is_outer && class != Class::Other);
    let chosen = if is_local {
        let here = &cluster.node().name;
        usable(&on_node(endpoints, here))
    } else {
        near(&usable(&endpoints), cluster)
    };
    if chosen.is_empty() {
        return Answer::Drop;
    }
    let masquerade = if is_outer {
        policy == TrafficPolicy::Cluster || class == Class::Node
    } else {
        // The cluster's own pods keep their address; who cannot be told from them keeps it as well.
        let settings = &cluster.settings;
        settings.masquerade_all || settings.detect_local != DetectLocal::Nothing && class != Class::Pod
    };
    // An endpoint that reached itself under its own address would answer itself past the node.
    let of = |socket: SocketAddr| (socket, masquerade || socket.ip() == question.source);
    Answer::Forward(chosen.iter().map(|it| of(it.socket)).collect())
}

/// Whether a flow of UDP that a client holds open to a destination may go on at an endpoint; `None` where the
/// destination is no Service's. It ends when the endpoint no longer serves, also when no other one does.
pub(crate) fn keeps_flow(cluster: &Cluster, question: &Question, endpoint: SocketAddr) -> Option<bool> {
    let (service, port, _) = meant(cluster, question)?;
    let endpoints = endpoints(cluster, service, port, question.family());
    Some(endpoints.iter().any(|it| it.socket == endpoint && (it.ready || it.serving)))
}

/// What each load balancer that asks is told: the number of endpoints on this node that its traffic goes to.
pub(crate) fn health_checks(cluster: &Cluster) -> BTreeMap<ObjectKey, (Port, usize)> {
    let mut found = BTreeMap::new();
    for (key, service) in &cluster.services {
        let traffic = &service.traffic;
        let asks = is_proxied(service)
            && service.service_type == ServiceType::LoadBalancer
            && traffic.external_policy == TrafficPolicy::Local;
        let Some(check) = traffic.health_check_port.filter(|_| asks) else { continue };
        let mut addresses = BTreeSet::new();
        for family in families(&service.cluster_addresses) {
            for port in &service.ports {
                let has_outer_address =
                    outer_addresses(&cluster.settings, service).any(|(address, _)| Family::of(address) == family);
                if has_outer_address || port.node_port.is_some() {
                    let here = on_node(endpoints(cluster, service, port, family), &cluster.node().name);
                    addresses.extend(usable(&here).iter().map(|it| it.socket.ip()));
                }
            }
        }
        found.insert(key.clone(), (check, addresses.len()));
    }
    found
}

/// Who the client is. A process of the node is the node; pods are told as `detectLocalMode` says.
pub(crate) fn class(cluster: &Cluster, question: &Question) -> Class {
    let is_pod = match &cluster.settings.detect_local {
        DetectLocal::ClusterPrefixes => Cluster::cluster_prefixes().iter().any(|it| it.contains(&question.source)),
        DetectLocal::NodePrefixes => cluster.node().pod_prefixes.iter().any(|it| it.contains(&question.source)),
        DetectLocal::Bridge(name) => question.from == From::Pod && name == BRIDGE,
        DetectLocal::InterfacePrefix(prefix) => question.from == From::Pod && BRIDGE.starts_with(prefix.as_str()),
        DetectLocal::Nothing => false,
    };
    match question.from {
        From::Node => Class::Node,
        From::Pod | From::Outside if is_pod => Class::Pod,
        From::Pod | From::Outside => Class::Other,
    }
}

/// The addresses at which node ports answer.
pub(crate) fn answers_at_node_ports(cluster: &Cluster, address: IpAddr) -> bool {
    let node = cluster.node();
    // Loopback addresses are a peculiarity of the iptables mode, which its own test knows.
    if address.is_loopback() {
        return false;
    }
    match &cluster.settings.node_port_addresses {
        NodePortAddresses::All => cluster.local_addresses().contains(&address),
        NodePortAddresses::Primary => node.address(Family::of(address)) == Some(address),
        NodePortAddresses::Within(prefixes) => {
            node.addresses.contains(&address) && prefixes.iter().any(|prefix| prefix.contains(&address))
        }
    }
}

/// The Service port that a destination means, and why. Services are asked by name: the first that wants the
/// destination has it. A node port gives way to an address.
fn meant<'a>(cluster: &'a Cluster, question: &Question) -> Option<(&'a Service, &'a ServicePort, By)> {
    for service in cluster.services.values() {
        for port in &service.ports {
            if port.port == question.port
                && port.protocol == question.protocol
                && let Some(by) = by_address(cluster, service, question.destination)
            {
                return Some((service, port, by));
            }
        }
    }
    if !answers_at_node_ports(cluster, question.destination) {
        return None;
    }
    for service in cluster.services.values() {
        for port in &service.ports {
            if port.node_port == Some(question.port)
                && port.protocol == question.protocol
                && is_proxied(service)
                && families(&service.cluster_addresses).contains(&question.family())
            {
                return Some((service, port, By::NodePort));
            }
        }
    }
    None
}

fn by_address(cluster: &Cluster, service: &Service, address: IpAddr) -> Option<By> {
    // What a Service is not given a cluster address of, it does not serve: two families, two proxies.
    if !is_proxied(service) || !families(&service.cluster_addresses).contains(&Family::of(address)) {
        return None;
    }
    if service.cluster_addresses.contains(&address) {
        return Some(By::ClusterAddress);
    }
    outer_addresses(&cluster.settings, service).find(|(outer, _)| *outer == address).map(|(_, by)| by)
}

fn outer_addresses<'a>(settings: &ProxySettings, service: &'a Service) -> impl Iterator<Item = (IpAddr, By)> + use<'a> {
    let traffic = &service.traffic;
    let external = if settings.external_ips { &traffic.external_addresses[..] } else { &[] };
    let is_balanced = service.service_type == ServiceType::LoadBalancer;
    let balancer = if is_balanced { &traffic.load_balancer_addresses[..] } else { &[] };
    let external = external.iter().map(|it| (*it, By::ExternalAddress));
    external.chain(balancer.iter().map(|it| (*it, By::LoadBalancer)))
}

/// Headless Services and names of other hosts are for the DNS alone.
fn is_proxied(service: &Service) -> bool {
    !service.headless && !matches!(service.service_type, ServiceType::ExternalName(_))
}

fn is_admitted(cluster: &Cluster, service: &Service, question: &Question) -> bool {
    let Some(ranges) = &service.traffic.load_balancer_sources else { return true };
    let within = |address: &IpAddr| ranges.iter().any(|range| range.contains(address));
    // A packet from the node to an address that is bound there may have that address as its source.
    let is_own = question.source == question.destination && cluster.node().addresses.iter().any(within);
    within(&question.source) || is_own
}

/// One endpoint of a port.
#[derive(Debug, Clone)]
struct Candidate {
    socket: SocketAddr,
    node: Option<NodeName>,
    ready: bool,
    serving: bool,
    terminating: bool,
    nodes: Vec<NodeName>,
    zones: Vec<String>,
}

/// All endpoints of a port in one family, each address and port once: "clients must handle duplicates". Of two that
/// differ the ready one counts, else the one of the first slice.
fn endpoints(cluster: &Cluster, service: &Service, port: &ServicePort, family: Family) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = Vec::new();
    for slice in cluster.slices.values() {
        if slice.service != service.key || slice.family != family || slice.headless {
            continue;
        }
        for slice_port in slice.ports.iter().filter(|it| it.name == port.name && it.protocol == port.protocol) {
            for endpoint in &slice.endpoints {
                let new = candidate(endpoint, slice_port.port, service.publish_not_ready);
                match found.iter_mut().find(|it| it.socket == new.socket) {
                    Some(old) if new.ready && !old.ready => *old = new,
                    Some(_) => {}
                    None => found.push(new),
                }
            }
        }
    }
    found
}

fn candidate(endpoint: &Endpoint, port: Port, publish_not_ready: bool) -> Candidate {
    let hints = endpoint.hints.as_deref();
    Candidate {
        socket: SocketAddr::new(endpoint.address, port.get()),
        node: endpoint.node.clone(),
        ready: endpoint.ready || publish_not_ready,
        serving: endpoint.serving,
        terminating: endpoint.terminating,
        nodes: hints.map(|hints| hints.nodes.clone()).unwrap_or_default(),
        zones: hints.map(|hints| hints.zones.iter().map(ToString::to_string).collect()).unwrap_or_default(),
    }
}

fn on_node(endpoints: Vec<Candidate>, node: &NodeName) -> Vec<Candidate> {
    endpoints.into_iter().filter(|it| it.node.as_ref() == Some(node)).collect()
}

/// The ready ones; without any, those that still serve while they terminate (KEP-1669).
fn usable(endpoints: &[Candidate]) -> Vec<Candidate> {
    let ready: Vec<Candidate> = endpoints.iter().filter(|it| it.ready).cloned().collect();
    if !ready.is_empty() {
        return ready;
    }
    endpoints.iter().filter(|it| it.serving && it.terminating).cloned().collect()
}

/// Those that hints keep for this node or zone. Hints count where every endpoint that is ready has them, and at
/// least one is for here; endpoints that only drain have lost theirs.
fn near(usable: &[Candidate], cluster: &Cluster) -> Vec<Candidate> {
    let node = cluster.node();
    let are_ready = usable.iter().all(|it| it.ready);
    let for_node: Vec<Candidate> = usable.iter().filter(|it| it.nodes.contains(&node.name)).cloned().collect();
    if are_ready && usable.iter().all(|it| !it.nodes.is_empty()) && !for_node.is_empty() {
        return for_node;
    }
    let zone = node.zone.as_deref();
    let is_for_zone = |it: &&Candidate| it.zones.iter().any(|name| Some(name.as_str()) == zone);
    let for_zone: Vec<Candidate> = usable.iter().filter(is_for_zone).cloned().collect();
    if are_ready && usable.iter().all(|it| !it.zones.is_empty()) && !for_zone.is_empty() {
        return for_zone;
    }
    usable.to_vec()
}

/// How long a client is sent to the endpoint that it was sent to before, in seconds.
pub(crate) fn affinity(cluster: &Cluster, question: &Question) -> Option<u32> {
    meant(cluster, question).and_then(|(service, ..)| service.traffic.affinity).map(AffinityTimeout::seconds)
}

/// Whether a destination is a cluster address of a Service, and no port that anybody serves.
pub(crate) fn is_unserved_port(cluster: &Cluster, question: &Question) -> bool {
    let has_it = |service: &Service| is_proxied(service) && service.cluster_addresses.contains(&question.destination);
    meant(cluster, question).is_none() && cluster.services.values().any(has_it)
}
