//! The interpreter against what a person expects.

use std::net::{IpAddr, SocketAddr};

use portolan_net::{Family, Packet, Protocol};

use super::super::{Choice, Environment, Hook, Outcome, Program, Rejection, Verdict, compile, interpret};
use super::{address_key, intent, masquerade, node_port_key, view};

fn program() -> Program {
    let backends = &["10.42.1.2", "10.42.2.3", "10.42.3.4"][..];
    let frontends = intent(&[
        (address_key("10.96.0.10", 80), "cart", backends),
        (address_key("10.96.0.11", 80), "idle", &[]),
        (node_port_key(Family::V4, 30_080), "cart", backends),
        (node_port_key(Family::V4, 30_081), "idle", &[]),
        (address_key("fd96::10", 80), "cart", &["fd42:0:0:1::2", "fd42:0:0:2::3"]),
        (node_port_key(Family::V6, 30_080), "cart", &["fd42:0:0:1::2"]),
    ]);
    compile(&frontends, &masquerade(), &[], &[], &view())
}

fn packet(source: &str, destination: &str) -> Packet {
    let socket = |text: &str| text.parse::<SocketAddr>().unwrap();
    let (source, destination) = (socket(source), socket(destination));
    Packet {
        source: source.ip(),
        destination: destination.ip(),
        protocol: Protocol::Tcp,
        source_port: source.port(),
        destination_port: destination.port(),
        mark: 0,
    }
}

fn environment() -> Environment {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    Environment {
        local_addresses: ["127.0.0.1", "192.168.64.11", "10.42.1.1", "::1", "2001:db8::11"].map(address).to_vec(),
        out_interface: Some("flannel.1".into()),
        out_address: Some(address("10.42.1.0")),
        ..Environment::default()
    }
}

fn at(hook: Hook, packet: Packet, choice: Choice) -> Outcome {
    interpret(&program(), packet, hook, &environment(), choice)
}

fn leave(outcome: &Outcome, out_address: &str) -> Outcome {
    let environment = Environment {
        out_address: Some(out_address.parse().unwrap()),
        destination_translated: outcome.destination_translated,
        ..environment()
    };
    interpret(&program(), outcome.packet, Hook::Postrouting, &environment, Choice::First)
}

#[test]
fn a_pod_reaches_a_cluster_ip_under_its_own_address() {
    let outcome = at(Hook::Prerouting, packet("10.42.1.7:41022", "10.96.0.10:80"), Choice::Slot(1));
    assert_eq!(outcome.packet.to_string(), "10.42.1.7:41022 → 10.42.2.3:8080");
    assert_eq!(outcome.packet.mark, 0);
    let sockets: Vec<String> = outcome.alternatives.iter().map(|it| it.socket.to_string()).collect();
    assert_eq!(sockets, ["10.42.1.2:8080", "10.42.2.3:8080", "10.42.3.4:8080"]);
    let origins: Vec<String> =
        outcome.steps.iter().filter_map(|step| Some(step.origin.as_ref()?.to_string())).collect();
    assert_eq!(origins, ["Service default/cart spec.ports[http]", "EndpointSlice default/cart-1"]);
    assert_eq!(outcome.steps[1].what.to_string(), "dst 10.96.0.10:80 ⇒ 10.42.2.3:8080, 2 of 3");
    assert_eq!(leave(&outcome, "10.42.1.0").packet.source.to_string(), "10.42.1.7");
}

#[test]
fn a_preferred_backend_is_chosen_if_it_can_be() {
    let socket = "10.42.3.4:8080".parse().unwrap();
    let outcome = at(Hook::Prerouting, packet("10.42.1.7:1", "10.96.0.10:80"), Choice::Prefer(socket));
    assert_eq!(outcome.packet.destination_text(), "10.42.3.4:8080");
    let outcome =
        at(Hook::Prerouting, packet("10.42.1.7:1", "10.96.0.10:80"), Choice::Prefer("10.9.9.9:1".parse().unwrap()));
    assert_eq!(outcome.packet.destination_text(), "10.42.1.2:8080");
}

#[test]
fn the_node_itself_reaches_a_cluster_ip_under_the_address_of_the_interface() {
    let outcome = at(Hook::Output, packet("192.168.64.11:41022", "10.96.0.10:80"), Choice::Slot(1));
    assert_eq!(outcome.packet.mark, 0x4000);
    let left = leave(&outcome, "10.42.1.0");
    assert_eq!(left.packet.to_string(), "10.42.1.0:41022 → 10.42.2.3:8080");
    assert_eq!(left.packet.mark, 0, "the bit is cleared, so that nobody translates it again");
}

#[test]
fn a_pod_that_reaches_itself_is_masqueraded() {
    let outcome = at(Hook::Prerouting, packet("10.42.1.2:41022", "10.96.0.10:80"), Choice::Slot(0));
    assert_eq!(leave(&outcome, "10.42.1.1").packet.to_string(), "10.42.1.1:41022 → 10.42.1.2:8080");
    let direct = Outcome { destination_translated: false, ..outcome };
    assert_eq!(leave(&direct, "10.42.1.1").packet.source.to_string(), "10.42.1.2", "only through its Service");
}

#[test]
fn a_client_outside_reaches_a_node_port_and_is_masqueraded() {
    let outcome = at(Hook::Prerouting, packet("203.0.113.5:5000", "192.168.64.11:30080"), Choice::Slot(2));
    assert_eq!(outcome.packet.destination_text(), "10.42.3.4:8080");
    assert_eq!(leave(&outcome, "10.42.1.0").packet.source.to_string(), "10.42.1.0");
    let from_pod = at(Hook::Prerouting, packet("10.42.1.7:5000", "192.168.64.11:30080"), Choice::First);
    assert_eq!(from_pod.packet.mark, 0x4000, "always, whoever asks");
}

#[test]
fn node_ports_answer_neither_at_loopback_nor_elsewhere() {
    for destination in ["127.0.0.1:30080", "192.168.64.99:30080"] {
        let outcome = at(Hook::Output, packet("192.168.64.11:1", destination), Choice::First);
        assert_eq!(outcome.packet.destination_text(), destination);
    }
}

#[test]
fn a_service_without_endpoints_refuses_at_once() {
    for hook in [Hook::Forward, Hook::Output, Hook::Input] {
        let outcome = at(hook, packet("10.42.1.7:1", "10.96.0.11:80"), Choice::First);
        assert_eq!(outcome.verdict, Verdict::Reject(Rejection::TcpReset), "{hook:?}");
        assert_eq!(outcome.steps[0].origin.as_ref().unwrap().key.to_string(), "default/idle");
    }
    let outcome = at(Hook::Input, packet("203.0.113.5:1", "192.168.64.11:30081"), Choice::First);
    assert_eq!(outcome.verdict, Verdict::Reject(Rejection::TcpReset));
    let mut datagram = packet("10.42.1.7:1", "10.96.0.11:80");
    datagram.protocol = Protocol::Udp;
    let refused = at(Hook::Forward, datagram, Choice::First);
    assert_eq!(refused.verdict, Verdict::Reject(Rejection::PortUnreachable), "another protocol is another port");
}

#[test]
fn a_port_that_a_service_does_not_serve_is_refused_in_its_name() {
    for hook in [Hook::Forward, Hook::Output] {
        let outcome = at(hook, packet("10.42.1.7:1", "10.96.0.10:81"), Choice::First);
        assert_eq!(outcome.verdict, Verdict::Reject(Rejection::TcpReset), "{hook:?}");
        assert_eq!(outcome.steps[0].origin.as_ref().unwrap().to_string(), "Service default/cart spec.clusterIPs");
        let nobody = at(hook, packet("10.42.1.7:1", "10.96.0.99:80"), Choice::First);
        assert_eq!(nobody.verdict, Verdict::Accept, "an address of no Service is none of ours");
    }
}

#[test]
fn a_pod_leaves_the_cluster_under_the_address_of_the_node() {
    let outside = at(Hook::Postrouting, packet("10.42.1.7:1", "203.0.113.5:443"), Choice::First);
    assert_eq!(outside.packet.source.to_string(), "10.42.1.0");
    for (source, destination) in
        [("10.42.1.7:1", "10.42.9.9:443"), ("10.42.1.7:1", "224.0.0.251:5353"), ("192.168.64.11:1", "203.0.113.5:443")]
    {
        let outcome = at(Hook::Postrouting, packet(source, destination), Choice::First);
        assert_eq!(outcome.packet, packet(source, destination), "{source} → {destination} stays as it is");
    }
}

#[test]
fn a_marked_packet_is_translated_once() {
    let mut marked = packet("10.42.1.7:1", "203.0.113.5:443");
    marked.mark = 0x4000;
    let outcome = at(Hook::Postrouting, marked, Choice::First);
    assert_eq!(outcome.packet.source.to_string(), "10.42.1.0");
    assert_eq!(outcome.packet.mark, 0);
    let masqueraded = outcome.steps.iter().filter(|step| step.what.to_string().starts_with("src")).count();
    assert_eq!(masqueraded, 1);
}

#[test]
fn packets_of_a_known_connection_pass_the_nat_chains_by() {
    let environment = Environment { established: true, ..environment() };
    let original = packet("10.42.1.7:1", "10.96.0.10:80");
    let outcome = interpret(&program(), original, Hook::Prerouting, &environment, Choice::First);
    assert_eq!(outcome.packet, original);
}

#[test]
fn ipv6_goes_the_same_ways() {
    let outcome = at(Hook::Prerouting, packet("[fd42:0:0:1::7]:1", "[fd96::10]:80"), Choice::Slot(1));
    assert_eq!(outcome.packet.to_string(), "[fd42:0:0:1::7]:1 → [fd42:0:0:2::3]:8080");
    let outcome = at(Hook::Prerouting, packet("[2001:db8::5]:1", "[2001:db8::11]:30080"), Choice::First);
    assert_eq!(outcome.packet.destination_text(), "[fd42:0:0:1::2]:8080");
    assert_eq!(leave(&outcome, "fd42:0:0:1::1").packet.source.to_string(), "fd42:0:0:1::1");
    let looped = at(Hook::Output, packet("[::1]:1", "[::1]:30080"), Choice::First);
    assert_eq!(looped.packet.destination_text(), "[::1]:30080");
}

#[test]
fn without_an_address_to_leave_with_the_packet_is_dropped() {
    let environment = Environment { out_address: None, ..environment() };
    let original = packet("10.42.1.7:1", "203.0.113.5:443");
    let outcome = interpret(&program(), original, Hook::Postrouting, &environment, Choice::First);
    assert_eq!(outcome.verdict, Verdict::Drop);
}
