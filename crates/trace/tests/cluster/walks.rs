//! The way of a packet and its reasons, where Services are served by nftables.

use std::net::IpAddr;

use portolan_intent::FabricMode;
use portolan_net::Packet;
use portolan_trace::{Choice, End, Ingress, Sighting, Stage, compare, render};

use crate::nodes::{Mode, cluster, packet, trace};

#[test]
fn a_pod_reaches_a_service_on_another_node_through_the_tunnel() {
    let trace = trace(
        &mut cluster(FabricMode::Vxlan, Mode::Nftables),
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
        &mut cluster(FabricMode::HostGw, Mode::Nftables),
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
    let mut cluster = cluster(FabricMode::Vxlan, Mode::Nftables);
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
    let trace = trace(&mut cluster(FabricMode::Vxlan, Mode::Nftables), "node-1", sent, Ingress::Pod, Choice::First);
    assert_eq!(trace.end, End::Delivered { at: "Pod default/client".into() });
    let hop = trace.hops.iter().find(|hop| hop.stage == Stage::Masquerade).unwrap();
    assert_eq!(hop.after.source, "10.42.1.1".parse::<IpAddr>().unwrap());
    assert_eq!(trace.reply.len(), 2);
}

#[test]
fn a_node_port_reaches_the_other_node_with_this_nodes_address() {
    let sent = packet("192.168.99.2", "192.168.64.11", 30_080);
    let trace = trace(&mut cluster(FabricMode::Vxlan, Mode::Nftables), "node-1", sent, Ingress::Network, Choice::First);
    assert_eq!(trace.end, End::Delivered { at: "Pod default/far".into() });
    let last = trace.hops.last().unwrap();
    // The tunnel device's own address, since that is the link that the packet leaves by.
    assert_eq!(last.after.source, "10.42.1.0".parse::<IpAddr>().unwrap());
    assert_eq!(last.after.destination_text(), "10.42.2.9:8080");
}

#[test]
fn a_pod_leaves_the_cluster_with_its_nodes_address() {
    let sent = packet("10.42.1.5", "198.51.100.7", 443);
    let trace = trace(&mut cluster(FabricMode::Vxlan, Mode::Nftables), "node-1", sent, Ingress::Pod, Choice::First);
    assert_eq!(trace.end, End::Delivered { at: "outside 198.51.100.7".into() });
    assert_eq!(trace.hops.last().unwrap().after.source, "192.168.64.11".parse::<IpAddr>().unwrap());
}

#[test]
fn a_node_chooses_its_source_and_reaches_a_service() {
    let sent = packet("0.0.0.0", "10.96.0.10", 80);
    let trace = trace(&mut cluster(FabricMode::Vxlan, Mode::Nftables), "node-1", sent, Ingress::Node, Choice::First);
    assert_eq!(trace.hops[0].after.source, "192.168.64.11".parse::<IpAddr>().unwrap());
    assert_eq!(trace.end, End::Delivered { at: "Pod default/far".into() });
}

#[test]
fn a_service_without_endpoints_refuses_and_names_itself() {
    let sent = packet("10.42.1.5", "10.96.0.13", 80);
    let trace = trace(&mut cluster(FabricMode::Vxlan, Mode::Nftables), "node-1", sent, Ingress::Pod, Choice::First);
    let End::Refused { reason, .. } = &trace.end else { panic!("{:?}", trace.end) };
    assert!(reason.contains("Service default/empty"), "{reason}");
}

#[test]
fn a_pod_that_is_gone_is_said_to_be() {
    let sent = packet("10.42.1.5", "10.42.2.77", 80);
    let trace = trace(&mut cluster(FabricMode::Vxlan, Mode::Nftables), "node-1", sent, Ingress::Pod, Choice::First);
    let End::Refused { reason, node } = &trace.end else { panic!("{:?}", trace.end) };
    assert_eq!(node.as_str(), "node-2");
    assert!(reason.contains("no pod of this node holds 10.42.2.77"), "{reason}");
}

#[test]
fn sightings_are_held_against_the_prediction() {
    let sent = packet("10.42.1.5", "10.96.0.10", 80);
    let trace = trace(&mut cluster(FabricMode::Vxlan, Mode::Nftables), "node-1", sent, Ingress::Pod, Choice::First);
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
