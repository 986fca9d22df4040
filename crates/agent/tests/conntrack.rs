//! Real UDP flows through a node whose rules change: those that are stale are cut, the others keep their
//! endpoint.
//!
//! ```text
//!  client ── 10.42.1.0/24 ── node ── 10.42.2.0/24 ── server, which is two endpoints
//!  (10.42.1.2)             (10.42.1.1)              (10.42.2.2, 10.42.2.3)
//! ```
//!
//! and the same with IPv6. Each of the three is a network namespace without a name. The rules are written by
//! hand, so that this tests what follows them and not them.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a test fails by panicking and says what it skips")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use portolan_agent::metrics::Metrics;
use portolan_agent::proxy::{NodePortPlaces, Tracker, reconcile};
use portolan_intent::services::{ProxySettings, ServicesCompiler, ServicesIntent};
use portolan_kernel::conntrack::{Conntrack, Entry};
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Family, NodeName, ObjectKey, Port, Protocol};
use portolan_state::{
    Change, Endpoint, EndpointPort, EndpointSlice, Object, Service, ServicePort, ServiceTraffic, ServiceType, Writer,
};

/// No answer takes so long unless there is none.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long to listen for an answer that must not come.
const SILENCE: Duration = Duration::from_millis(300);

const NODE_PORT: u16 = 30_053;

/// The addresses of a family.
struct Plan {
    family: Family,
    node: [&'static str; 2],
    client: &'static str,
    endpoints: [&'static str; 2],
    length: u8,
    service_prefix: &'static str,
    dns: &'static str,
    other: &'static str,
    late: &'static str,
}

const V4: Plan = Plan {
    family: Family::V4,
    node: ["10.42.1.1", "10.42.2.1"],
    client: "10.42.1.2",
    endpoints: ["10.42.2.2", "10.42.2.3"],
    length: 24,
    service_prefix: "10.96.0.0/16",
    dns: "10.96.0.10",
    other: "10.96.0.20",
    late: "10.96.0.30",
};

const V6: Plan = Plan {
    family: Family::V6,
    node: ["fd42:0:0:1::1", "fd42:0:0:2::1"],
    client: "fd42:0:0:1::2",
    endpoints: ["fd42:0:0:2::2", "fd42:0:0:2::3"],
    length: 64,
    service_prefix: "fd96::/64",
    dns: "fd96::10",
    other: "fd96::20",
    late: "fd96::30",
};

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn at(text: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address(text), port)
}

fn port(number: u16) -> Port {
    Port::try_from(number).expect("a port")
}

fn ip(namespace: &Namespace, commands: &[String]) {
    in_namespace(namespace, || {
        for command in commands {
            let output = Command::new("ip").args(command.split_whitespace()).output().expect("ip runs");
            assert!(output.status.success(), "ip {command}: {}", String::from_utf8_lossy(&output.stderr));
        }
    })
    .expect("in the namespace");
}

fn forwarding(namespace: &Namespace, value: &str) {
    in_namespace(namespace, || {
        for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{file}"), value).expect("forwarding");
        }
    })
    .expect("in the namespace");
}

struct World {
    node: Namespace,
    client: Namespace,
    _server: Namespace,
}

fn world(plan: &Plan) -> Option<World> {
    let new = || Namespace::create_unnamed().ok();
    let has = |program: &str| Command::new(program).arg("-V").stdout(Stdio::null()).status().is_ok();
    let (Some(node), Some(client), Some(server)) = (new(), new(), new()) else {
        println!("skipped: needs CAP_SYS_ADMIN");
        return None;
    };
    if !has("nft") || !has("ip") {
        println!("skipped: needs the commands nft and ip");
        return None;
    }
    let length = plan.length;
    for (name, end, other, others) in
        [("client", 0, &client, vec![plan.client]), ("server", 1, &server, plan.endpoints.to_vec())]
    {
        let nodad = if plan.family == Family::V6 { " nodad" } else { "" };
        let path = other.path();
        ip(
            &node,
            &[
                format!("link add {name} type veth peer name eth0 netns {}", path.display()),
                format!("address add {}/{length} dev {name}{nodad}", plan.node[end]),
                format!("link set {name} up"),
            ],
        );
        let mut commands: Vec<String> =
            others.iter().map(|it| format!("address add {it}/{length} dev eth0{nodad}")).collect();
        commands.push("link set eth0 up".to_owned());
        commands.push(format!("route add default via {}", plan.node[end]));
        ip(other, &commands);
    }
    forwarding(&node, "1");
    // What no rule translates goes there, and nobody answers.
    forwarding(&server, "0");
    ip(&node, &[format!("route add {} via {}", plan.service_prefix, plan.endpoints[0])]);
    for endpoint in plan.endpoints {
        let socket = in_namespace(&server, || UdpSocket::bind(at(endpoint, 5353)).expect("a socket"));
        let socket = socket.expect("in the namespace");
        // It ends with the test's process; a socket keeps its namespace wherever its thread is.
        std::thread::spawn(move || {
            let mut buffer = [0; 16];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(endpoint.as_bytes(), from);
            }
        });
    }
    Some(World { node, client, _server: server })
}

/// The rules: where packets to an address and port go.
fn set_rules(world: &World, rules: &[(SocketAddr, SocketAddr)]) {
    let mut text = "table inet test\ndelete table inet test\ntable inet test {\n".to_owned();
    text.push_str(" chain prerouting {\n  type nat hook prerouting priority dstnat;\n");
    for (from, to) in rules {
        let family = if from.is_ipv4() { "ip" } else { "ip6" };
        let _ = writeln!(text, "  {family} daddr {} udp dport {} dnat {family} to {to}", from.ip(), from.port());
    }
    text.push_str(" }\n}\n");
    in_namespace(&world.node, || {
        let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft runs");
        nft.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("written");
        assert!(nft.wait().expect("nft ends").success(), "{text}");
    })
    .expect("in the namespace");
}

/// A client that always sends from one port, to one destination.
struct Client {
    socket: UdpSocket,
    source: SocketAddr,
}

impl Client {
    fn new(world: &World, plan: &Plan, source_port: u16, destination: SocketAddr) -> Client {
        let source = at(plan.client, source_port);
        let socket = in_namespace(&world.client, || UdpSocket::bind(source).expect("a socket"));
        let socket = socket.expect("in the namespace");
        socket.connect(destination).expect("a way there");
        Client { socket, source }
    }

    /// Who answers.
    fn ask(&self, patience: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(patience)).expect("a timeout");
        self.socket.send(b"who").expect("sent");
        let mut buffer = [0; 64];
        let length = self.socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    fn answer(&self) -> String {
        self.ask(PATIENCE).expect("an answer")
    }

    /// The kernel's number of its flow.
    fn flow(&self, world: &World, family: Family) -> Option<u32> {
        in_namespace(&world.node, || {
            let mut table = Conntrack::open().expect("a socket");
            let mine = |entry: &Entry| entry.original.source == self.source;
            let found = table.select_udp(family, mine).expect("the flows");
            assert!(found.len() < 2, "{found:?}");
            found.first().map(|entry| entry.id)
        })
        .expect("in the namespace")
    }
}

/// The intent of Services, each with an address, perhaps a node port, and its endpoints.
fn intent(plan: &Plan, services: &[(&str, &str, Option<u16>, &[&str])]) -> ServicesIntent {
    let mut writer = Writer::new();
    for (name, address_text, node_port, endpoints) in services {
        let key = ObjectKey::new("default", *name);
        let service_type = if node_port.is_some() { ServiceType::NodePort } else { ServiceType::ClusterIp };
        let (protocol, number) = (Protocol::Udp, port(5353));
        let service_port = ServicePort { name: "dns".into(), protocol, port: port(53), node_port: node_port.map(port) };
        let service = Service {
            key: key.clone(),
            service_type,
            cluster_addresses: vec![address(address_text)],
            headless: false,
            ports: vec![service_port],
            publish_not_ready: false,
            traffic: ServiceTraffic::default(),
        };
        writer.apply(Change::Upsert(Object::Service(service), Vec::new()));
        let endpoint = |text: &&str| Endpoint {
            address: address(text),
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            hostname: None,
            hints: None,
        };
        let slice = EndpointSlice {
            key: key.clone(),
            service: key,
            family: plan.family,
            ports: vec![EndpointPort { name: "dns".into(), protocol, port: number }],
            endpoints: endpoints.iter().map(endpoint).collect(),
            headless: false,
        };
        writer.apply(Change::Upsert(Object::EndpointSlice(slice), Vec::new()));
    }
    let (snapshot, dirty) = writer.take();
    let mut compiler = ServicesCompiler::new(NodeName::from("node-1"), ProxySettings::default());
    compiler.update(&snapshot, &dirty);
    compiler.intent().clone()
}

/// Follows a change of the intent, and cuts what is stale by then. Returns how many flows that were.
fn follow(world: &World, tracker: &mut Tracker, old: &ServicesIntent, new: &ServicesIntent) -> usize {
    for key in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
        if old.get(key) != new.get(key) {
            tracker.follow(key, old.get(key), new.get(key));
        }
    }
    let Some(judge) = tracker.take(new) else { return 0 };
    in_namespace(&world.node, || {
        let mut table = Conntrack::open().expect("a socket");
        reconcile(&mut table, &judge, &NodePortPlaces::default(), &Metrics::new()).expect("reconciled")
    })
    .expect("in the namespace")
}

fn flows_follow_their_endpoints(plan: &Plan) {
    let Some(world) = world(plan) else { return };
    let [one, two] = plan.endpoints;
    let (dns, other, late) = (at(plan.dns, 53), at(plan.other, 53), at(plan.late, 53));
    let node_port = at(plan.node[0], NODE_PORT);
    let rules = |endpoint: &str| [(dns, at(endpoint, 5353)), (node_port, at(endpoint, 5353)), (other, at(one, 5353))];
    let new = |port, destination| Client::new(&world, plan, port, destination);
    let [by_address, by_node_port, kept, early] =
        [new(40_001, dns), new(40_002, node_port), new(40_003, other), new(40_004, late)];

    // A start cuts nothing that is right, and nothing that is not ours.
    set_rules(&world, &rules(one));
    let first = intent(plan, &[("dns", plan.dns, Some(NODE_PORT), &[one]), ("other", plan.other, None, &[one])]);
    for client in [&by_address, &by_node_port, &kept] {
        assert_eq!(client.answer(), one);
    }
    assert_eq!(early.ask(SILENCE), None);
    let flow = |client: &Client| client.flow(&world, plan.family);
    let before = [flow(&by_address), flow(&by_node_port), flow(&kept), flow(&early)];
    assert!(before.iter().all(Option::is_some), "{before:?}");
    let prefixes = || vec![plan.service_prefix.parse().expect("a prefix")];
    let mut tracker = Tracker::new(prefixes());
    assert_eq!(follow(&world, &mut tracker, &ServicesIntent::new(), &first), 0);
    assert_eq!([flow(&by_address), flow(&by_node_port), flow(&kept), flow(&early)], before);

    // The endpoint is replaced, and a Service comes whose client has been sending already.
    let services: [(&str, &str, Option<u16>, &[&str]); 3] = [
        ("dns", plan.dns, Some(NODE_PORT), &[two]),
        ("other", plan.other, None, &[one]),
        ("late", plan.late, None, &[one]),
    ];
    let second = intent(plan, &services);
    let mut with_late = rules(two).to_vec();
    with_late.push((late, at(one, 5353)));
    set_rules(&world, &with_late);
    assert_eq!(by_address.answer(), one, "rules alone do not move a flow");
    assert_eq!(early.ask(SILENCE), None, "nor do they translate it");
    assert_eq!(follow(&world, &mut tracker, &first, &second), 3);
    assert_eq!([by_address.answer(), by_node_port.answer(), early.answer()], [two, two, one]);
    assert_eq!(kept.answer(), one);
    assert_eq!(flow(&kept), before[2], "the same flow");

    // No endpoint is left, and a Service goes away.
    set_rules(&world, &[]);
    let third = intent(plan, &[("dns", plan.dns, Some(NODE_PORT), &[]), ("late", plan.late, None, &[one])]);
    let late_flow = flow(&early);
    assert_eq!(follow(&world, &mut tracker, &second, &third), 3);
    assert_eq!([flow(&by_address), flow(&by_node_port), flow(&kept)], [None; 3]);
    assert_eq!(flow(&early), late_flow);

    // A restart finds out what went away meanwhile, and leaves the rest.
    set_rules(&world, &with_late);
    assert_eq!([kept.answer(), by_address.answer()], [one, two]);
    let fourth = intent(plan, &[("dns", plan.dns, None, &[two]), ("late", plan.late, None, &[one])]);
    let stay = [flow(&by_address), flow(&early)];
    assert_eq!(follow(&world, &mut Tracker::new(prefixes()), &ServicesIntent::new(), &fourth), 1);
    assert_eq!(flow(&kept), None);
    assert_eq!([flow(&by_address), flow(&early)], stay);

    let count = in_namespace(&world.node, || Conntrack::open().expect("a socket").count().expect("a count"));
    assert!(count.expect("in the namespace").entries >= 2);
}

#[test]
fn ipv4_flows_follow_their_endpoints() {
    flows_follow_their_endpoints(&V4);
}

#[test]
fn ipv6_flows_follow_their_endpoints() {
    flows_follow_their_endpoints(&V6);
}
