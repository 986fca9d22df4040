//! What virtual servers become of Services, and that the past leaves no trace but what shall.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use portolan_intent::services::{
    Backend, Client, Decision, Endpoints, Frontend, FrontendKey, FrontendKind, FrontendUpdate, Masquerade,
    NodePortAddresses, ProxySettings, ServicesIntent,
};
use portolan_intent::{FabricMode, FabricSettings, NodeView, Segment};
use portolan_net::{Family, ObjectKey, ObjectKind, Origin, Packet, Port, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};
use proptest::prelude::*;

use super::*;

const NODE: [&str; 3] = ["192.0.2.1", "10.42.1.1", "2001:db8::1"];

fn view() -> NodeView {
    NodeView {
        node: "node-1".into(),
        fabric: FabricMode::Vxlan,
        fabric_settings: FabricSettings::default(),
        cluster_prefixes: vec!["10.42.0.0/16".parse().unwrap()],
        service_prefixes: vec!["10.96.0.0/16".parse().unwrap()],
        masquerade: true,
        underlay_interface: "eth0".into(),
        underlay_mtu: 1500,
        segment: Segment::default(),
        bridge: "cni0".into(),
        proxy: ProxySettings::default(),
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn node() -> Vec<IpAddr> {
    NODE.map(address).to_vec()
}

fn port(number: u16) -> Port {
    Port::try_from(number).unwrap()
}

fn at(text: &str, number: u16) -> FrontendKey {
    FrontendKey::Address { address: address(text), protocol: Protocol::Tcp, port: port(number) }
}

fn node_port(protocol: Protocol, number: u16) -> FrontendKey {
    FrontendKey::NodePort { family: Family::V4, protocol, port: port(number) }
}

fn backend(text: &str, local: bool) -> Backend {
    let origin = Origin::object(ObjectKind::EndpointSlice, ObjectKey::new("default", "slice"));
    Backend { address: address(text), port: port(8080), local, origin }
}

fn frontend(kind: FrontendKind, policy: TrafficPolicy, backends: Vec<Backend>) -> Frontend {
    Frontend {
        origin: Origin::object(ObjectKind::Service, ObjectKey::new("default", "web")),
        port_name: "http".into(),
        kind,
        policy,
        masquerade: Masquerade::OffCluster,
        affinity: None,
        sources: None,
        endpoints: Arc::new(Endpoints::all(backends)),
    }
}

fn cluster_ip(backends: Vec<Backend>) -> Frontend {
    frontend(FrontendKind::ClusterIp, TrafficPolicy::Cluster, backends)
}

fn put(compiler: &mut Compiler, key: FrontendKey, old: Option<&Frontend>, new: Option<&Frontend>) -> Vec<Change> {
    let shared = |it: Option<&Frontend>| it.cloned().map(Arc::new);
    compiler.update_services(&[FrontendUpdate { key, old: shared(old), new: shared(new) }])
}

fn compiler() -> Compiler {
    let mut compiler = Compiler::new(&view(), &Family::ALL);
    compiler.set_node_addresses(&node());
    compiler
}

fn server(text: &str, number: u16) -> ServerKey {
    ServerKey { protocol: Protocol::Tcp, address: address(text), port: port(number) }
}

#[test]
fn a_cluster_address_is_a_virtual_server_and_on_the_dummy_link() {
    let mut compiler = compiler();
    let web = cluster_ip(vec![backend("10.42.1.2", true), backend("10.42.2.2", false)]);
    let changes = put(&mut compiler, at("10.96.0.10", 80), None, Some(&web));
    let text: Vec<String> = changes.iter().map(render_change).collect();
    assert_eq!(
        text,
        [
            "ipvsadm -A -t 10.96.0.10:80 -s rr",
            "ipvsadm -a -t 10.96.0.10:80 -r 10.42.1.2:8080 -m -w 1",
            "ipvsadm -a -t 10.96.0.10:80 -r 10.42.2.2:8080 -m -w 1",
            "ip address add 10.96.0.10 dev kube-ipvs0",
        ]
    );
}

#[test]
fn node_ports_are_at_the_nodes_addresses_and_not_on_the_dummy_link() {
    let mut compiler = compiler();
    let web = frontend(FrontendKind::NodePort, TrafficPolicy::Cluster, vec![backend("10.42.1.2", true)]);
    put(&mut compiler, node_port(Protocol::Tcp, 30_080), None, Some(&web));
    let program = compiler.program();
    let servers: Vec<ServerKey> = program.servers.keys().copied().collect();
    assert_eq!(servers, [server("10.42.1.1", 30_080), server("192.0.2.1", 30_080)]);
    assert!(program.addresses.is_empty());
    let changes = compiler.set_node_addresses(&[address("192.0.2.1"), address("192.0.2.7"), address("127.0.0.1")]);
    let text: Vec<String> = changes.iter().map(render_change).collect();
    assert_eq!(
        text,
        [
            "ipvsadm -A -t 192.0.2.7:30080 -s rr",
            "ipvsadm -a -t 192.0.2.7:30080 -r 10.42.1.2:8080 -m -w 1",
            "ipvsadm -D -t 10.42.1.1:30080",
        ]
    );
}

#[test]
fn an_address_of_the_node_is_not_put_on_the_dummy_link() {
    let mut compiler = compiler();
    let web = frontend(FrontendKind::ExternalIp, TrafficPolicy::Cluster, vec![backend("10.42.1.2", true)]);
    put(&mut compiler, at("192.0.2.1", 80), None, Some(&web));
    assert!(compiler.program().addresses.is_empty());
    assert_eq!(compiler.set_node_addresses(&[]), [Change::AddAddress(address("192.0.2.1"))]);
    assert_eq!(compiler.set_node_addresses(&node()), [Change::RemoveAddress(address("192.0.2.1"))]);
}

#[test]
fn a_service_address_counts_before_a_node_port_of_the_same_number() {
    let mut compiler = compiler();
    let by_port = frontend(FrontendKind::NodePort, TrafficPolicy::Cluster, vec![backend("10.42.1.2", true)]);
    let by_address = frontend(FrontendKind::ExternalIp, TrafficPolicy::Cluster, vec![backend("10.42.1.3", true)]);
    put(&mut compiler, node_port(Protocol::Tcp, 30_080), None, Some(&by_port));
    put(&mut compiler, at("192.0.2.1", 30_080), None, Some(&by_address));
    let serving = |compiler: &Compiler| -> Vec<IpAddr> {
        let server = &compiler.program().servers[&server("192.0.2.1", 30_080)];
        server.real.iter().filter(|it| it.weight > 0).map(|it| it.key.address).collect()
    };
    assert_eq!(serving(&compiler), [address("10.42.1.3")]);
    put(&mut compiler, at("192.0.2.1", 30_080), Some(&by_address), None);
    assert_eq!(serving(&compiler), [address("10.42.1.2")]);
}

#[test]
fn an_endpoint_that_leaves_keeps_its_connections_until_they_end() {
    let mut compiler = compiler();
    let key = at("10.96.0.10", 80);
    let both = cluster_ip(vec![backend("10.42.1.2", true), backend("10.42.2.2", false)]);
    let one = cluster_ip(vec![backend("10.42.1.2", true)]);
    put(&mut compiler, key, None, Some(&both));
    let text: Vec<String> = put(&mut compiler, key, Some(&both), Some(&one)).iter().map(render_change).collect();
    assert_eq!(text, ["ipvsadm -e -t 10.96.0.10:80 -r 10.42.2.2:8080 -m -w 0"]);
    let leaving: Vec<_> = compiler.leaving().collect();
    let [(from, real)] = leaving[..] else { panic!("{leaving:?}") };
    assert_eq!(compiler.settle(&[(from, real, Some(1))]), []);
    assert_eq!(compiler.settle(&[(from, real, Some(0))]), [Change::RemoveReal(from, real)]);
    assert_eq!(compiler.leaving().count(), 0);
}

#[test]
fn an_endpoint_that_comes_back_gets_connections_again() {
    let mut compiler = compiler();
    let key = at("10.96.0.10", 80);
    let (one, none) = (cluster_ip(vec![backend("10.42.1.2", true)]), cluster_ip(vec![]));
    put(&mut compiler, key, None, Some(&one));
    put(&mut compiler, key, Some(&one), Some(&none));
    let text: Vec<String> = put(&mut compiler, key, Some(&none), Some(&one)).iter().map(render_change).collect();
    assert_eq!(text, ["ipvsadm -e -t 10.96.0.10:80 -r 10.42.1.2:8080 -m -w 1"]);
    assert_eq!(compiler.leaving().count(), 0);
}

#[test]
fn udp_endpoints_leave_at_once_and_so_do_whole_services() {
    let mut compiler = compiler();
    let key = FrontendKey::Address { address: address("10.96.0.10"), protocol: Protocol::Udp, port: port(53) };
    let (one, none) = (cluster_ip(vec![backend("10.42.1.2", true)]), cluster_ip(vec![]));
    put(&mut compiler, key, None, Some(&one));
    let text: Vec<String> = put(&mut compiler, key, Some(&one), Some(&none)).iter().map(render_change).collect();
    assert_eq!(text, ["ipvsadm -d -u 10.96.0.10:53 -r 10.42.1.2:8080"]);
    let tcp = at("10.96.0.11", 80);
    put(&mut compiler, tcp, None, Some(&one));
    put(&mut compiler, tcp, Some(&one), Some(&none));
    put(&mut compiler, tcp, Some(&none), None);
    assert_eq!(compiler.leaving().count(), 0);
}

#[test]
fn a_restart_lets_go_as_gracefully() {
    let both = cluster_ip(vec![backend("10.42.1.2", true), backend("10.42.2.2", false)]);
    let one = cluster_ip(vec![backend("10.42.1.2", true)]);
    let key = at("10.96.0.10", 80);
    let mut before = compiler();
    put(&mut before, key, None, Some(&both));
    let mut after = compiler();
    put(&mut after, key, None, Some(&one));
    after.adopt(before.program());
    let text: Vec<String> = diff(before.program(), after.program()).iter().map(render_change).collect();
    assert_eq!(text, ["ipvsadm -e -t 10.96.0.10:80 -r 10.42.2.2:8080 -m -w 0"]);
}

#[test]
fn what_others_made_stays() {
    let mut settings = IpvsSettings { exclude: vec!["203.0.113.0/24".parse().unwrap()], ..IpvsSettings::default() };
    settings.scheduler = Scheduler::SourceHashing;
    let mut ours = Compiler::with_settings(&view(), &Family::ALL, settings);
    let web = cluster_ip(vec![backend("10.42.1.2", true)]);
    put(&mut ours, at("10.96.0.10", 80), None, Some(&web));
    let mut there = ours.program().clone();
    let real = |forwarding| RealServer {
        key: RealKey { address: address("10.9.9.9"), port: port(80) },
        weight: 1,
        forwarding,
        origin: None,
    };
    let theirs = |forwarding| {
        let model = there.servers[&server("10.96.0.10", 80)].clone();
        Arc::new(VirtualServer { real: vec![real(forwarding)].into(), ..(*model).clone() })
    };
    let (excluded, direct, left_over) =
        (theirs(Forwarding::Masquerade), theirs(Forwarding::Direct), theirs(Forwarding::Masquerade));
    there.servers.insert(server("203.0.113.5", 80), excluded);
    there.servers.insert(server("198.51.100.5", 80), direct);
    there.servers.insert(server("10.96.0.99", 80), left_over);
    assert_eq!(diff(&there, ours.program()), [Change::RemoveServer(server("10.96.0.99", 80))]);
}

#[test]
fn strict_arp_is_two_sysctls() {
    let settings = IpvsSettings { strict_arp: true, ..IpvsSettings::default() };
    let strict = Compiler::with_settings(&view(), &Family::ALL, settings);
    let changes = diff(compiler().program(), strict.program());
    let text: Vec<String> = changes.iter().map(render_change).collect();
    assert_eq!(text, ["sysctl -w net/ipv4/conf/all/arp_announce=2", "sysctl -w net/ipv4/conf/all/arp_ignore=1"]);
}

#[test]
fn settings_reach_the_virtual_servers() {
    let settings = IpvsSettings { scheduler: Scheduler::Maglev, ..IpvsSettings::default() };
    let mut compiler = Compiler::with_settings(&view(), &Family::ALL, settings);
    let mut web = cluster_ip(vec![]);
    web.affinity = AffinityTimeout::new(600);
    put(&mut compiler, at("fd96::10", 80), None, Some(&web));
    assert!(render(compiler.program()).starts_with("-A -t [fd96::10]:80 -s mh -p 600 -b mh-port\n"));
}

#[test]
fn only_addresses_that_are_asked_for_have_node_ports() {
    let [first, second] = ["192.0.2.1", "10.42.1.1"].map(address);
    let addresses = [address("127.0.0.1"), address("fe80::1"), first, second];
    let of = |which| crate::layout::node_port_addresses(&addresses, &which);
    assert_eq!(of(NodePortAddresses::All), BTreeSet::from([first, second]));
    assert_eq!(of(NodePortAddresses::Primary), BTreeSet::from([first]));
    let within = NodePortAddresses::Within(vec!["10.0.0.0/8".parse().unwrap(), "127.0.0.0/8".parse().unwrap()]);
    assert_eq!(of(within), BTreeSet::from([second]));
}

#[test]
fn every_scheduler_has_its_name_back() {
    for scheduler in Scheduler::ALL {
        assert_eq!(scheduler.name().parse(), Ok(scheduler.clone()));
    }
    assert!("twos".parse::<Scheduler>().is_err());
}

fn any_frontend() -> impl Strategy<Value = (FrontendKey, Frontend)> {
    let addresses = prop::sample::select(vec!["10.96.0.1", "10.96.0.2", "192.0.2.1"]);
    let protocol = || prop::sample::select(vec![Protocol::Tcp, Protocol::Udp]);
    let key = prop_oneof![
        (addresses, protocol(), 80u16..82).prop_map(|(text, protocol, number)| FrontendKey::Address {
            address: address(text),
            protocol,
            port: port(number),
        }),
        (protocol(), 80u16..82).prop_map(|(protocol, number)| node_port(protocol, number)),
    ];
    let backends = prop::collection::vec((2u8..5, any::<bool>()), 0..4);
    let policy = prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]);
    (key, backends, policy, any::<bool>()).prop_map(|(key, backends, policy, is_external)| {
        let kind = match key {
            FrontendKey::NodePort { .. } => FrontendKind::NodePort,
            FrontendKey::Address { .. } if is_external => FrontendKind::LoadBalancer,
            FrontendKey::Address { .. } => FrontendKind::ClusterIp,
        };
        let backends =
            backends.into_iter().map(|(last, local)| backend(&format!("10.42.{}.{last}", u8::from(local)), local));
        (key, frontend(kind, policy, backends.collect()))
    })
}

fn any_step() -> impl Strategy<Value = (FrontendKey, Option<Frontend>)> {
    (any_frontend(), any::<bool>()).prop_map(|((key, frontend), is_there)| (key, is_there.then_some(frontend)))
}

/// The program without the real servers that only leave.
fn settled(program: &Program) -> Program {
    let mut program = program.clone();
    let without = |server: &VirtualServer| VirtualServer {
        real: server.real.iter().filter(|it| it.weight > 0).cloned().collect(),
        ..server.clone()
    };
    program.servers = program.servers.iter().map(|(key, server)| (*key, Arc::new(without(server)))).collect();
    program
}

/// What a kernel holds after changes.
fn applied(mut program: Program, changes: &[Change]) -> Program {
    let edit = |program: &mut Program, key: &ServerKey, edit: &dyn Fn(&mut Vec<RealServer>)| {
        let mut server = (*program.servers[key]).clone();
        let mut real = server.real.to_vec();
        edit(&mut real);
        real.sort_by_key(|it| it.key);
        server.real = real.into();
        program.servers.insert(*key, Arc::new(server));
    };
    for change in changes {
        match change {
            Change::AddServer(key, server) => {
                assert!(!program.servers.contains_key(key), "{key} is there already");
                let bare = VirtualServer { real: Vec::new().into(), ..(**server).clone() };
                program.servers.insert(*key, Arc::new(bare));
            }
            Change::SetServer(key, server) => {
                let real = program.servers[key].real.clone();
                program.servers.insert(*key, Arc::new(VirtualServer { real, ..(**server).clone() }));
            }
            Change::AddReal(key, new) => edit(&mut program, key, &|real| {
                assert!(real.iter().all(|it| it.key != new.key), "{new:?} is there already");
                real.push(new.clone());
            }),
            Change::SetReal(key, new) => edit(&mut program, key, &|real| {
                let old = real.iter_mut().find(|it| it.key == new.key).expect("it is there");
                *old = new.clone();
            }),
            Change::RemoveReal(key, gone) => edit(&mut program, key, &|real| real.retain(|it| it.key != *gone)),
            Change::RemoveServer(key) => assert!(program.servers.remove(key).is_some()),
            Change::AddAddress(address) => assert!(program.addresses.insert(*address)),
            Change::RemoveAddress(address) => assert!(program.addresses.remove(address)),
            Change::SetSysctl(path, value) => drop(program.sysctls.insert(path.clone(), value.clone())),
            Change::CreateDevice => program.device = true,
            Change::DeleteDevice => (program.device, program.addresses) = (false, BTreeSet::new()),
            Change::SetTimeouts(timeouts) => program.timeouts = *timeouts,
        }
    }
    program
}

proptest! {
    #[test]
    fn incremental_equals_from_scratch(steps in prop::collection::vec(any_step(), 1..30)) {
        let mut incremental = compiler();
        let mut intent = ServicesIntent::new();
        let mut kernel = incremental.program().clone();
        for (key, new) in steps {
            let new = new.map(Arc::new);
            let old = match &new {
                Some(new) => intent.insert(key, new.clone()),
                None => intent.remove(&key),
            };
            let changes = incremental.update_services(&[FrontendUpdate { key, old, new }]);
            kernel = applied(kernel, &changes);
            prop_assert_eq!(diff(&kernel, incremental.program()), Vec::new(), "the changes lead to the program");
            let scratch = compile(&intent, &BTreeSet::new(), &node(), &view());
            prop_assert_eq!(diff(&settled(incremental.program()), &scratch), Vec::new());
            prop_assert_eq!(diff(&scratch, &settled(incremental.program())), Vec::new());
            let leaving: Vec<_> = incremental.leaving().collect();
            let without_weight: Vec<_> = incremental.program().servers.iter()
                .flat_map(|(key, server)| server.real.iter().filter(|it| it.weight == 0).map(|it| (*key, it.key)))
                .collect();
            prop_assert_eq!(leaving, without_weight);
        }
    }

    #[test]
    fn any_program_becomes_any_other(
        first in prop::collection::vec(any_frontend(), 0..6), second in prop::collection::vec(any_frontend(), 0..6)
    ) {
        let build = |list: Vec<(FrontendKey, Frontend)>| {
            let intent: ServicesIntent = list.into_iter().map(|(key, frontend)| (key, Arc::new(frontend))).collect();
            compile(&intent, &BTreeSet::new(), &node(), &view())
        };
        let (first, second) = (build(first), build(second));
        for (from, to) in [(&first, &second), (&Program::default(), &second), (&first, &Program::default())] {
            let result = applied(from.clone(), &diff(from, to));
            prop_assert_eq!(diff(&result, to), Vec::new());
        }
    }

    /// A virtual server has one list for everybody, so only who is chosen from is compared where nobody is refused.
    #[test]
    fn the_endpoints_are_those_of_the_decision((key, frontend) in any_frontend()) {
        let mut compiler = compiler();
        put(&mut compiler, key, None, Some(&frontend));
        let destination = match key {
            FrontendKey::Address { address, .. } => address,
            FrontendKey::NodePort { .. } => address("192.0.2.1"),
        };
        let packet = Packet {
            source: address("198.51.100.9"), destination, protocol: key.protocol(),
            source_port: 40_000, destination_port: key.port().get(), mark: 0,
        };
        let outcome = interpret(compiler.program(), &packet, &node());
        let sockets: Vec<_> = outcome.alternatives.iter().map(|it| it.socket).collect();
        match frontend.decide(Client::Outside, packet.source) {
            Decision::Reject => prop_assert_eq!(outcome.verdict, Verdict::Reject),
            Decision::Drop => {}
            Decision::Forward { backends, .. } => {
                prop_assert_eq!(outcome.verdict, Verdict::Forward);
                prop_assert_eq!(sockets, backends.iter().map(Backend::socket).collect::<Vec<_>>());
            }
        }
    }
}
