//! Packets go where `Frontend::decide` says, for every client, setting and Service.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use portolan_intent::NodeView;
use portolan_intent::services::{Client, Decision, DetectLocal, Frontend, FrontendKey, NodePortAddresses};
use portolan_net::{Family, Packet};
use proptest::prelude::*;

use super::super::{Environment, Program, Step, Target, Verdict, compile, interpret, parse, render};
use super::{Plan, any_plan, any_view, intent_of, node_addresses};

/// A client of each class, as the settings tell it.
fn source(client: Client, family: Family) -> IpAddr {
    match (client, family) {
        (Client::Pod, Family::V4) => "10.42.1.2",
        (Client::Pod, Family::V6) => "fd42:0:0:1::2",
        (Client::Node, Family::V4) => "192.168.0.1",
        (Client::Node, Family::V6) => "fd00::1",
        (Client::Outside, Family::V4) => "172.16.5.5",
        (Client::Outside, Family::V6) => "2001:db8::5",
    }
    .parse()
    .unwrap()
}

fn environment(client: Client) -> Environment {
    let in_interface = match client {
        Client::Pod => Some("veth1234".to_owned()),
        Client::Node => None,
        Client::Outside => Some("eth0".to_owned()),
    };
    Environment { in_interface, local_addresses: node_addresses(), ..Environment::default() }
}

/// How the settings see a client: pods come by the interface `veth1234` here, or by the bridge.
fn seen(client: Client, view: &NodeView) -> Client {
    match (&view.proxy.detect_local, client) {
        (DetectLocal::Nothing, Client::Pod) => Client::Outside,
        (_, other) => other,
    }
}

fn check(program: &Program, key: FrontendKey, frontend: &Frontend, client: Client, view: &NodeView) {
    let family = key.family();
    let destination = match key {
        FrontendKey::Address { address, .. } => address,
        FrontendKey::NodePort { .. } => source(Client::Node, family),
    };
    let mut environment = environment(client);
    if client == Client::Pod && view.proxy.detect_local == DetectLocal::Bridge("cni0".to_owned()) {
        environment.in_interface = Some("cni0".to_owned());
    }
    let packet = Packet {
        source: source(client, family),
        destination,
        protocol: key.protocol(),
        source_port: 40_000,
        destination_port: key.port().get(),
        mark: 0,
    };
    let outcome = interpret(program, &packet, &environment);
    let context = || format!("{key} {client:?} {frontend:#?}\n{outcome:#?}\n{}", render(program));
    assert!(outcome.not_understood.is_empty() && !outcome.truncated, "{}", context());
    match frontend.decide(seen(client, view), packet.source) {
        Decision::Reject => assert_eq!(outcome.verdict(), Some(Verdict::Reject), "{}", context()),
        Decision::Drop => assert_eq!(outcome.verdict(), Some(Verdict::Drop), "{}", context()),
        Decision::Forward { backends, masquerade } => {
            assert_eq!(outcome.verdict(), Some(Verdict::Accept), "{}", context());
            let expected: BTreeSet<SocketAddr> =
                backends.iter().map(portolan_intent::services::Backend::socket).collect();
            assert_eq!(outcome.backends(), expected, "{}", context());
            for branch in &outcome.branches {
                let hairpin = branch.backend.is_some_and(|socket| socket.ip() == packet.source);
                assert_eq!(branch.masqueraded, masquerade || hairpin, "{branch:?} {}", context());
                assert!(branch.steps.iter().any(|step| step.comment.is_some()));
            }
        }
    }
}

fn check_all(plans: &[Plan], view: &NodeView) {
    let intent = intent_of(plans, view);
    let program = compile(&intent, &BTreeSet::new(), &node_addresses(), view);
    let read = parse(&render(&program)).unwrap();
    for (key, frontend) in &intent {
        // The second prefix of `Within` has no IPv6 address of the node: node ports do not answer there.
        let unanswered = matches!(key, FrontendKey::NodePort { family: Family::V6, .. })
            && matches!(view.proxy.node_port_addresses, NodePortAddresses::Within(_));
        if !unanswered {
            for client in Client::ALL {
                check(&program, *key, frontend, client, view);
                check(&read, *key, frontend, client, view);
            }
        }
    }
}

proptest! {
    #[test]
    fn packets_go_where_the_intent_says(view in any_view(), plans in prop::collection::vec(any_plan(), 1..4)) {
        check_all(&plans, &view);
    }
}

fn connect(program: &Program, from: &str, to: &str, in_interface: Option<&str>) -> (Option<Verdict>, usize) {
    let (source, to): (IpAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
    let packet = Packet {
        source,
        destination: to.ip(),
        protocol: portolan_net::Protocol::Tcp,
        source_port: 40_000,
        destination_port: to.port(),
        mark: 0,
    };
    let environment = Environment {
        in_interface: in_interface.map(str::to_owned),
        local_addresses: node_addresses(),
        ..Environment::default()
    };
    let outcome = interpret(program, &packet, &environment);
    (outcome.verdict(), outcome.backends().len())
}

fn node_port_program(localhost: bool, endpoints: Vec<(u8, bool)>) -> Program {
    use portolan_net::Protocol;
    use portolan_state::TrafficPolicy;
    let mut view = super::view();
    view.proxy.localhost_node_ports = localhost;
    let plan = Plan {
        name: "cart",
        protocol: Protocol::Tcp,
        internal: TrafficPolicy::Cluster,
        external: TrafficPolicy::Cluster,
        affinity: true,
        node_port: true,
        external_ip: false,
        load_balancer: false,
        sources: None,
        endpoints,
    };
    compile(&intent_of(&[plan], &view), &BTreeSet::new(), &node_addresses(), &view)
}

#[test]
fn node_ports_answer_at_localhost_only_if_asked_to() {
    let accepted = |backends| (Some(Verdict::Accept), backends);
    for (localhost, backends) in [(true, 1), (false, 0)] {
        let program = node_port_program(localhost, vec![(2, true)]);
        assert_eq!(connect(&program, "127.0.0.1", "127.0.0.1:30001", None), accepted(backends));
        assert_eq!(connect(&program, "::1", "[::1]:30001", None), accepted(0));
        assert_eq!(connect(&program, "172.16.0.9", "192.168.0.1:30001", Some("eth0")), accepted(1));
    }
    let idle = node_port_program(false, Vec::new());
    assert_eq!(connect(&idle, "127.0.0.1", "127.0.0.1:30001", None), accepted(0), "nothing of ours is there");
    assert_eq!(connect(&idle, "172.16.0.9", "192.168.0.1:30001", Some("eth0")), (Some(Verdict::Reject), 0));
}

#[test]
fn neighbours_cannot_reach_what_listens_at_localhost() {
    let program = node_port_program(true, vec![(2, true)]);
    assert_eq!(connect(&program, "192.168.0.9", "127.0.0.1:8080", Some("eth0")), (Some(Verdict::Drop), 0));
}

#[test]
fn a_client_keeps_its_endpoint() {
    let program = node_port_program(false, vec![(2, true), (3, true), (4, false)]);
    let packet = Packet {
        source: "10.42.1.9".parse().unwrap(),
        destination: "10.96.0.1".parse().unwrap(),
        protocol: portolan_net::Protocol::Tcp,
        source_port: 40_000,
        destination_port: 80,
        mark: 0,
    };
    let mut environment = environment(Client::Pod);
    let all = interpret(&program, &packet, &environment);
    assert_eq!(all.backends().len(), 3);
    let second = all.branches.iter().find(|it| it.backend.is_some_and(|it| it.ip() == IpAddr::from([10, 42, 1, 3])));
    let translated = |step: &&Step| matches!(step.target, Target::Dnat { .. });
    let chain = second.unwrap().steps.iter().find(translated).unwrap().chain.clone();
    environment.recent.insert(chain);
    let kept = interpret(&program, &packet, &environment);
    assert_eq!(kept.backends(), ["10.42.1.3:8080".parse().unwrap()].into());
}
