//! The way of a packet where Services are served by IPVS.

use std::net::{IpAddr, SocketAddr};

use portolan_intent::FabricMode;
use portolan_trace::{Choice, End, Ingress, Stage, Trace, compare, render};

use crate::nodes::{Mode, cluster, packet, trace};

fn walked(start: &str, ingress: Ingress, source: &str, destination: &str, port: u16) -> Trace {
    chosen(start, ingress, source, destination, port, Choice::First)
}

fn chosen(start: &str, ingress: Ingress, source: &str, destination: &str, port: u16, choice: Choice) -> Trace {
    trace(&mut cluster(FabricMode::Vxlan, Mode::Ipvs), start, packet(source, destination, port), ingress, choice)
}

fn delivered(trace: &Trace) -> &str {
    let End::Delivered { at } = &trace.end else { panic!("{:#?}", trace.end) };
    at
}

fn refused(trace: &Trace) -> &str {
    let End::Refused { reason, .. } = &trace.end else { panic!("{trace:#?}") };
    reason
}

fn source_at_the_end(trace: &Trace) -> IpAddr {
    trace.hops.last().unwrap().after.source
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_pod_reaches_a_service_on_another_node_through_the_tunnel() {
    let trace = walked("node-1", Ingress::Pod, "10.42.1.5", "10.96.0.10", 80);
    assert_eq!(
        render(&trace, "pod/default/client", "svc/default/far:80"),
        "\
pod/default/client → svc/default/far:80 (10.96.0.10:80)  tcp
 1 node-1  pod eth0         10.42.1.5:41022 → 10.96.0.10:80
 2 node-1  services (ipvs)  dst 10.96.0.10:80 ⇒ 10.42.2.9:8080          Service default/far spec.ports[http], EndpointSlice default/far-x, 1 of 1
 3 node-1  route            10.42.2.0/24 via flannel.1 → 192.168.64.12  Node node-2
 4 node-2  pod eth0         10.42.1.5:41022 → 10.42.2.9:8080            delivered to Pod default/far
   reply                    src 10.42.2.9:8080 ⇒ 10.96.0.10:80          conntrack on node-1
"
    );
}

#[test]
fn a_choice_is_taken_and_the_others_are_named() {
    let endpoints: Vec<SocketAddr> = ["10.42.1.7:8080", "10.42.2.9:8080"].map(|text| text.parse().unwrap()).to_vec();
    for (number, endpoint) in endpoints.iter().enumerate() {
        let trace = chosen("node-1", Ingress::Pod, "10.42.1.5", "10.96.0.11", 80, Choice::Endpoint(*endpoint));
        let hop = trace.hops.iter().find(|hop| hop.stage == Stage::Services).unwrap();
        assert_eq!(hop.after.destination, endpoint.ip());
        assert_eq!(hop.alternatives, endpoints);
        assert_eq!(hop.detail, format!("{} of 2", number + 1));
    }
}

#[test]
fn persistence_is_said() {
    let trace = walked("node-1", Ingress::Pod, "10.42.1.5", "10.96.0.15", 80);
    let hop = trace.hops.iter().find(|hop| hop.stage == Stage::Services).unwrap();
    assert_eq!(hop.detail, "1 of 2, and the client keeps it");
}

#[test]
fn a_pod_that_calls_itself_is_masqueraded() {
    for (source, service, gateway) in
        [("10.42.1.5", "10.96.0.12", "10.42.1.1"), ("fd42:0:0:1::5", "fd96::11", "fd42:0:0:1::1")]
    {
        let trace = walked("node-1", Ingress::Pod, source, service, 80);
        assert_eq!(delivered(&trace), "Pod default/client");
        let hop = trace.hops.iter().find(|hop| hop.stage == Stage::Masquerade).unwrap();
        assert_eq!((hop.by.as_str(), hop.after.source), ("iptables", address(gateway)));
        assert!(hop.origins.iter().any(|origin| origin.to_string().contains("self")), "{hop:?}");
        assert_eq!(trace.reply.len(), 2);
    }
}

#[test]
fn a_node_port_reaches_the_other_node_with_this_nodes_address() {
    let trace = walked("node-1", Ingress::Network, "192.168.99.2", "192.168.64.11", 30_080);
    assert_eq!(delivered(&trace), "Pod default/far");
    assert_eq!(trace.hops.last().unwrap().after.destination_text(), "10.42.2.9:8080");
    // The tunnel device's own address, since that is the link that the packet leaves by.
    assert_eq!(source_at_the_end(&trace), address("10.42.1.0"));
    // On the node of the pod it is the bridge's.
    let trace = walked("node-2", Ingress::Network, "192.168.99.2", "192.168.64.12", 30_080);
    assert_eq!(source_at_the_end(&trace), address("10.42.2.1"));
}

#[test]
fn a_local_node_port_keeps_the_client_and_refuses_where_no_pod_is() {
    let trace = walked("node-2", Ingress::Network, "192.168.99.2", "192.168.64.12", 30_084);
    assert_eq!(delivered(&trace), "Pod default/far");
    assert_eq!(source_at_the_end(&trace), address("192.168.99.2"));
    let trace = walked("node-1", Ingress::Network, "192.168.99.2", "192.168.64.11", 30_084);
    assert_eq!(
        refused(&trace),
        "dropped by Service default/far-local spec.ports[http].nodePort: its policy is Local, and this node has no endpoint \
         that serves"
    );
    // A pod is served all the same.
    let trace = walked("node-1", Ingress::Pod, "10.42.1.5", "192.168.64.11", 30_084);
    assert_eq!(delivered(&trace), "Pod default/far");
}

#[test]
fn a_service_without_endpoints_refuses_and_names_itself() {
    for (start, ingress, source, destination, port) in [
        ("node-1", Ingress::Pod, "10.42.1.5", "10.96.0.13", 80),
        ("node-1", Ingress::Node, "0.0.0.0", "10.96.0.13", 80),
        ("node-2", Ingress::Network, "192.168.99.2", "192.168.64.12", 30_083),
    ] {
        let field = if port == 80 { "" } else { ".nodePort" };
        let wanted = format!(
            "rejected with ICMP port unreachable by Service default/empty spec.ports[http]{field}: it has no endpoints \
             that serve"
        );
        assert_eq!(refused(&walked(start, ingress, source, destination, port)), wanted);
    }
}

#[test]
fn a_port_that_no_service_has_is_refused_and_the_service_is_named() {
    let trace = walked("node-1", Ingress::Pod, "10.42.1.5", "10.96.0.10", 81);
    assert_eq!(
        refused(&trace),
        "rejected with ICMP port unreachable by Service default/far: not a port of the Service"
    );
}

#[test]
fn source_ranges_are_said() {
    let trace = walked("node-1", Ingress::Network, "192.0.2.7", "203.0.113.9", 80);
    assert_eq!(
        refused(&trace),
        "dropped by Service default/ranged status.loadBalancer.ingress: its source ranges do not hold this client"
    );
    let trace = walked("node-1", Ingress::Network, "198.51.100.7", "203.0.113.9", 80);
    assert_eq!(delivered(&trace), "Pod default/near");
}

#[test]
fn a_node_reaches_a_service_from_the_services_own_address() {
    let trace = walked("node-1", Ingress::Node, "0.0.0.0", "10.96.0.10", 80);
    // The dummy link has the address, so the kernel takes it for the source, and the chains replace it.
    assert_eq!(trace.hops[0].after.source, address("10.96.0.10"));
    assert_eq!(delivered(&trace), "Pod default/far");
    assert_eq!(source_at_the_end(&trace), address("10.42.1.0"));
}

#[test]
fn an_endpoint_on_the_node_itself_is_delivered_there() {
    let trace = walked("node-1", Ingress::Pod, "10.42.1.5", "10.96.0.17", 80);
    assert_eq!(delivered(&trace), "node node-1");
    let last = trace.hops.last().unwrap();
    assert_eq!((last.stage, last.after.destination_text()), (Stage::NodeIngress, "192.168.64.11:8080".to_owned()));
}

#[test]
fn what_is_no_service_goes_its_way() {
    let trace = walked("node-1", Ingress::Pod, "10.42.1.5", "192.168.64.11", 22);
    assert_eq!(delivered(&trace), "node node-1");
    let trace = walked("node-1", Ingress::Pod, "10.42.1.5", "198.51.100.7", 443);
    assert_eq!(delivered(&trace), "outside 198.51.100.7");
    assert_eq!(source_at_the_end(&trace), address("192.168.64.11"));
    let trace = walked("node-1", Ingress::Pod, "10.42.1.5", "10.42.2.9", 8080);
    assert_eq!((delivered(&trace), source_at_the_end(&trace)), ("Pod default/far", address("10.42.1.5")));
}

#[test]
fn ipv6_goes_the_same_ways() {
    let trace = walked("node-1", Ingress::Pod, "fd42:0:0:1::5", "fd96::10", 80);
    assert_eq!((delivered(&trace), source_at_the_end(&trace)), ("Pod default/far", address("fd42:0:0:1::5")));
    let trace = walked("node-1", Ingress::Network, "2001:db8::7", "fd64::11", 30_090);
    assert_eq!(delivered(&trace), "Pod default/far");
    assert_eq!(trace.hops.last().unwrap().after.destination_text(), "[fd42:0:0:2::9]:8080");
    assert_ne!(source_at_the_end(&trace), address("2001:db8::7"));
}

#[test]
fn what_is_to_be_seen_is_the_same_as_in_other_modes() {
    for mode in Mode::ALL {
        let mut cluster = cluster(FabricMode::Vxlan, mode);
        let predicted =
            trace(&mut cluster, "node-1", packet("10.42.1.5", "10.96.0.10", 80), Ingress::Pod, Choice::First);
        let wanted = ["node-1", "node-1", "node-2", "node-2"];
        let missing: Vec<String> = compare(&predicted, &[]).into_iter().map(|it| it.node).collect();
        assert_eq!(missing, wanted, "{mode:?}");
    }
}
