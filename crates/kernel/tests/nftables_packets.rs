//! Real packets through our tables: a pod, a client outside, a server, and a node between them.
//!
//! ```text
//!  pod ───── 10.42.1.0/24 ─────┐
//!  (10.42.1.2)                 │
//!                            node ───── 10.42.2.0/24 ───── server (10.42.2.2)
//!                              │
//!  client ── 192.0.2.0/24 ─────┘ node's address 192.0.2.1
//!  (192.0.2.5)
//! ```
//!
//! and the same with IPv6. Each of the four is a network namespace without a name.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a test fails by panicking and says what it skips")]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_kernel::nftables::NftablesRoom;
use portolan_net::{Family, Packet, Port, Protocol};
use portolan_program::nftables::sample::{Sample, Traits};
use portolan_program::nftables::{Choice, Environment, Hook, Program, diff, interpret};

/// No test waits so long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(10);

struct World {
    node: Namespace,
    pod: Namespace,
    client: Namespace,
    server: Namespace,
}

fn ip(namespace: &Namespace, commands: &[&str]) {
    in_namespace(namespace, || {
        for command in commands {
            let output = Command::new("ip").args(command.split_whitespace()).output().expect("ip runs");
            assert!(output.status.success(), "ip {command}: {}", String::from_utf8_lossy(&output.stderr));
        }
    })
    .expect("in the namespace");
}

fn cable(node: &Namespace, other: &Namespace, name: &str, node_end: [&str; 2], other_end: [&str; 2]) {
    let path = other.path();
    ip(
        node,
        &[
            &format!("link add {name} type veth peer name eth0 netns {}", path.display()),
            &format!("address add {} dev {name}", node_end[0]),
            &format!("address add {} dev {name} nodad", node_end[1]),
            &format!("link set {name} up"),
        ],
    );
    let gateway = |end: &str| end.split('/').next().unwrap_or_default().to_owned();
    ip(
        other,
        &[
            "link set lo up",
            &format!("address add {} dev eth0", other_end[0]),
            &format!("address add {} dev eth0 nodad", other_end[1]),
            "link set eth0 up",
            &format!("route add default via {}", gateway(node_end[0])),
            &format!("route add default via {}", gateway(node_end[1])),
        ],
    );
}

fn world() -> Option<World> {
    let has_ip = Command::new("ip").arg("-V").output().is_ok();
    if !nix::unistd::geteuid().is_root() || !has_ip {
        println!("skipped: needs root and the ip command");
        return None;
    }
    let new = || Namespace::create_unnamed().expect("a namespace");
    let world = World { node: new(), pod: new(), client: new(), server: new() };
    ip(&world.node, &["link set lo up"]);
    let ends = |v4: &'static str, v6: &'static str| [v4, v6];
    let fixed = [ends("10.42.1.1/24", "fd42:0:0:1::1/64"), ends("10.42.1.2/24", "fd42:0:0:1::2/64")];
    cable(&world.node, &world.pod, "pod", fixed[0], fixed[1]);
    let fixed = [ends("10.42.2.1/24", "fd42:0:0:2::1/64"), ends("10.42.2.2/24", "fd42:0:0:2::2/64")];
    cable(&world.node, &world.server, "server", fixed[0], fixed[1]);
    let fixed = [ends("192.0.2.1/24", "2001:db8::1/64"), ends("192.0.2.5/24", "2001:db8::5/64")];
    cable(&world.node, &world.client, "client", fixed[0], fixed[1]);
    // So that the node itself has a way to Service addresses, which its output hook then translates.
    ip(&world.node, &["route add default via 192.0.2.5", "route add default via 2001:db8::5"]);
    in_namespace(&world.node, || {
        for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{file}"), "1").expect("forwarding");
        }
    })
    .expect("in the namespace");
    Some(world)
}

fn port(number: u16) -> Port {
    Port::try_from(number).expect("a port")
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Two backends on the server, a Service without any, node ports for both.
fn program(world: &World) -> Program {
    let mut sample = Sample::new(&Family::ALL);
    for (family, service, idle, server) in
        [(Family::V4, "10.96.0.10", "10.96.0.11", "10.42.2.2"), (Family::V6, "fd96::10", "fd96::11", "fd42:0:0:2::2")]
    {
        let backends = [SocketAddr::new(address(server), 8080), SocketAddr::new(address(server), 8081)];
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            sample.set_address(address(service), protocol, port(80), "shop", Some(&backends));
            sample.set_address(address(idle), protocol, port(80), "idle", Some(&[]));
            sample.set_node_port(family, protocol, port(30_080), "shop", Some(&backends));
            sample.set_node_port(family, protocol, port(30_081), "idle", Some(&[]));
        }
    }
    let program = sample.compiler().program().clone();
    load(world, &program);
    program
}

/// Brings the node's tables up to a program, as an agent does that starts.
fn load(world: &World, program: &Program) {
    in_namespace(&world.node, || {
        let mut room = NftablesRoom::open().expect("the room");
        let observed = room.observe().expect("observed");
        assert_eq!(room.apply(&diff(program, &observed)).failed, []);
        assert_eq!(diff(program, &room.observe().expect("observed")), []);
    })
    .expect("in the namespace");
}

/// Serves on a namespace's address and port: answers each connection, and each datagram, with the
/// address that it saw and its own port.
fn serve(namespace: &Namespace, at: SocketAddr) {
    let (listener, socket) = in_namespace(namespace, || {
        (TcpListener::bind(at).expect("a listener"), UdpSocket::bind(at).expect("a socket"))
    })
    .expect("in the namespace");
    let answer = move |from: SocketAddr| format!("{} {}", from.ip(), at.port());
    // They end with the test's process; sockets keep their namespace wherever their thread is.
    std::thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            let _ = stream.write_all(answer(from).as_bytes());
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(answer(from).as_bytes(), from);
        }
    });
}

/// Which source the server saw, and which port answered.
fn ask(namespace: &Namespace, protocol: Protocol, to: SocketAddr) -> Result<(IpAddr, u16), ErrorKind> {
    ask_within(namespace, protocol, to, PATIENCE)
}

fn ask_within(
    namespace: &Namespace,
    protocol: Protocol,
    to: SocketAddr,
    patience: Duration,
) -> Result<(IpAddr, u16), ErrorKind> {
    let answer = in_namespace(namespace, || -> std::io::Result<String> {
        if protocol == Protocol::Tcp {
            let mut stream = TcpStream::connect_timeout(&to, patience)?;
            stream.set_read_timeout(Some(patience))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            return Ok(text);
        }
        let any: IpAddr = if to.is_ipv4() { address("0.0.0.0") } else { address("::") };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(patience))?;
        socket.send(b"who?")?;
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    });
    let text = answer.expect("in the namespace").map_err(|error| error.kind())?;
    let (source, port) = text.split_once(' ').expect("two words");
    Ok((address(source), port.parse().expect("a port")))
}

/// What the interpreter says that the server sees.
fn predict(program: &Program, from: &str, to: SocketAddr, protocol: Protocol, first: Hook) -> (IpAddr, Vec<u16>) {
    let local = ["192.0.2.1", "10.42.1.1", "10.42.2.1", "2001:db8::1", "fd42:0:0:1::1", "fd42:0:0:2::1"];
    let toward_server = if to.is_ipv4() { "10.42.2.1" } else { "fd42:0:0:2::1" };
    let mut environment = Environment {
        local_addresses: local.map(address).to_vec(),
        out_address: Some(address(toward_server)),
        ..Environment::default()
    };
    let packet = Packet {
        source: address(from),
        destination: to.ip(),
        protocol,
        source_port: 40_000,
        destination_port: to.port(),
        mark: 0,
    };
    let entered = interpret(program, packet, first, &environment, Choice::First);
    environment.destination_translated = entered.destination_translated;
    let left = interpret(program, entered.packet, Hook::Postrouting, &environment, Choice::First);
    (left.packet.source, entered.alternatives.iter().map(|it| it.socket.port()).collect())
}

#[test]
fn services_answer_and_the_interpreter_knew_it() {
    let Some(world) = world() else { return };
    let program = program(&world);
    for server in ["10.42.2.2", "fd42:0:0:2::2"] {
        serve(&world.server, SocketAddr::new(address(server), 8080));
        serve(&world.server, SocketAddr::new(address(server), 8081));
    }
    for (from, source, to, first) in [
        (&world.pod, "10.42.1.2", "10.96.0.10:80", Hook::Prerouting),
        (&world.pod, "10.42.1.2", "192.0.2.1:30080", Hook::Prerouting),
        (&world.client, "192.0.2.5", "192.0.2.1:30080", Hook::Prerouting),
        (&world.client, "192.0.2.5", "10.96.0.10:80", Hook::Prerouting),
        (&world.node, "192.0.2.1", "10.96.0.10:80", Hook::Output),
        (&world.node, "192.0.2.1", "192.0.2.1:30080", Hook::Output),
        (&world.pod, "fd42:0:0:1::2", "[fd96::10]:80", Hook::Prerouting),
        (&world.client, "2001:db8::5", "[2001:db8::1]:30080", Hook::Prerouting),
        (&world.node, "2001:db8::1", "[fd96::10]:80", Hook::Output),
    ] {
        let to: SocketAddr = to.parse().expect("a socket");
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let (expected, ports) = predict(&program, source, to, protocol, first);
            assert_eq!(ports, [8080, 8081]);
            let mut answered = BTreeSet::new();
            for _ in 0..24 {
                let (seen, port) = ask(from, protocol, to).unwrap_or_else(|error| panic!("{source} → {to}: {error}"));
                assert_eq!(seen, expected, "{source} → {to} {protocol}");
                answered.insert(port);
            }
            // That one of two is never chosen in 24 times happens once in eight million runs.
            assert_eq!(answered.into_iter().collect::<Vec<_>>(), ports, "{source} → {to} {protocol}");
        }
    }
}

#[test]
fn services_without_endpoints_refuse_at_once() {
    let Some(world) = world() else { return };
    program(&world);
    for (from, to) in [
        (&world.pod, "10.96.0.11:80"),
        (&world.node, "10.96.0.11:80"),
        (&world.client, "192.0.2.1:30081"),
        (&world.pod, "[fd96::11]:80"),
        (&world.node, "[fd96::11]:80"),
        (&world.client, "[2001:db8::1]:30081"),
        // Ports that a Service does not serve.
        (&world.pod, "10.96.0.10:81"),
        (&world.node, "[fd96::10]:81"),
    ] {
        let to: SocketAddr = to.parse().expect("a socket");
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let start = Instant::now();
            // A packet that is refused at the output hook fails the very call that sends it.
            let from_here = std::ptr::eq(from, &raw const world.node) && protocol == Protocol::Udp;
            let refused = if from_here { ErrorKind::PermissionDenied } else { ErrorKind::ConnectionRefused };
            assert_eq!(ask(from, protocol, to), Err(refused), "{to} {protocol}");
            assert!(start.elapsed() < PATIENCE / 2, "{to} {protocol} is refused, not forgotten");
        }
    }
}

#[test]
fn pods_leave_the_cluster_under_the_address_of_the_node() {
    let Some(world) = world() else { return };
    program(&world);
    for (server, node, inside, pod) in [
        ("192.0.2.5:7000", "192.0.2.1", "10.42.2.2:7000", "10.42.1.2"),
        ("[2001:db8::5]:7000", "2001:db8::1", "[fd42:0:0:2::2]:7000", "fd42:0:0:1::2"),
    ] {
        let (server, inside): (SocketAddr, SocketAddr) = (server.parse().expect("one"), inside.parse().expect("one"));
        serve(&world.client, server);
        serve(&world.server, inside);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            assert_eq!(ask(&world.pod, protocol, server), Ok((address(node), 7000)), "{protocol} to outside");
            assert_eq!(ask(&world.pod, protocol, inside), Ok((address(pod), 7000)), "{protocol} to another pod");
        }
    }
}

/// How long nothing must come for a packet to count as dropped.
const SILENCE: Duration = Duration::from_millis(300);

fn socket(text: &str) -> SocketAddr {
    text.parse().expect("a socket")
}

/// Where the frontends of a test are, by family: the pod is the node's own endpoint, the server another node's.
struct Places {
    family: Family,
    pod: SocketAddr,
    server: SocketAddr,
    load_balancer: SocketAddr,
    node_port: SocketAddr,
    client: IpAddr,
    node_to_server: IpAddr,
}

fn places() -> [Places; 2] {
    [
        Places {
            family: Family::V4,
            pod: socket("10.42.1.2:8080"),
            server: socket("10.42.2.2:8081"),
            load_balancer: socket("203.0.113.80:80"),
            node_port: socket("192.0.2.1:30443"),
            client: address("192.0.2.5"),
            node_to_server: address("10.42.2.1"),
        },
        Places {
            family: Family::V6,
            pod: socket("[fd42:0:0:1::2]:8080"),
            server: socket("[fd42:0:0:2::2]:8081"),
            load_balancer: socket("[2001:db8:80::1]:80"),
            node_port: socket("[2001:db8::1]:30443"),
            client: address("2001:db8::5"),
            node_to_server: address("fd42:0:0:2::1"),
        },
    ]
}

#[test]
fn clients_outside_get_endpoints_of_this_node_under_their_own_address() {
    let Some(world) = world() else { return };
    let local = Traits { is_external: true, is_local: true, ..Traits::default() };
    let mut sample = Sample::new(&Family::ALL);
    for it in places() {
        serve(&world.pod, it.pod);
        serve(&world.server, it.server);
        let both = [it.pod, it.server];
        sample.set_address_with(it.load_balancer, "gate", Some(&both), &local);
        sample.set_node_port_with(it.family, port(30_443), "gate", Some(&both), &local);
    }
    load(&world, sample.compiler().program());
    for it in places() {
        for to in [it.load_balancer, it.node_port] {
            let mut ports = [(); 3].map(|()| BTreeSet::new());
            for _ in 0..24 {
                let (seen, port) = ask(&world.client, Protocol::Tcp, to).expect("an answer");
                assert_eq!(seen, it.client, "{to}: an endpoint of this node sees the client");
                ports[0].insert(port);
                let (seen, port) = ask(&world.node, Protocol::Tcp, to).expect("an answer");
                assert!(port == 8080 || seen == it.node_to_server, "{to}: masqueraded, not {seen}");
                ports[1].insert(port);
                let (seen, port) = ask(&world.pod, Protocol::Tcp, to).expect("an answer");
                assert!(port == 8080 || seen == it.pod.ip(), "{to}: a pod keeps its address, not {seen}");
                ports[2].insert(port);
            }
            let both = BTreeSet::from([8080, 8081]);
            assert_eq!(ports, [BTreeSet::from([8080]), both.clone(), both], "{to}");
        }
    }
    for it in places() {
        let remote = [it.server];
        sample.set_address_with(it.load_balancer, "gate", Some(&remote), &local);
        sample.set_node_port_with(it.family, port(30_443), "gate", Some(&remote), &local);
    }
    load(&world, sample.compiler().program());
    for it in places() {
        for to in [it.load_balancer, it.node_port] {
            let dropped = ask_within(&world.client, Protocol::Tcp, to, SILENCE);
            assert_eq!(dropped, Err(ErrorKind::TimedOut), "{to}: nobody here, but somebody elsewhere");
            assert!(ask(&world.pod, Protocol::Tcp, to).is_ok(), "{to}: pods go there");
        }
    }
}

#[test]
fn load_balancers_admit_the_ranges_that_are_named_and_drop_others() {
    let Some(world) = world() else { return };
    let mut sample = Sample::new(&Family::ALL);
    let ranges = ["192.0.2.0/25", "10.42.2.0/24", "2001:db8::/64"].map(|text| text.parse().expect("a prefix"));
    let limited = Traits { is_external: true, sources: Some(ranges.to_vec()), ..Traits::default() };
    for it in places() {
        serve(&world.server, it.server);
        sample.set_address_with(it.load_balancer, "gate", Some(&[it.server]), &limited);
        sample.set_node_port(it.family, Protocol::Tcp, port(30_443), "gate", Some(&[it.server]));
    }
    load(&world, sample.compiler().program());
    for it in places() {
        assert_eq!(ask(&world.client, Protocol::Tcp, it.load_balancer), Ok((it.node_to_server, 8081)));
        let dropped = ask_within(&world.pod, Protocol::Tcp, it.load_balancer, SILENCE);
        assert_eq!(dropped, Err(ErrorKind::TimedOut), "{}: not admitted", it.load_balancer);
        assert!(ask(&world.pod, Protocol::Tcp, it.node_port).is_ok(), "node ports are not bound by it");
    }
}

/// The port that answers, the same each time.
fn kept(from: &Namespace, protocol: Protocol, to: SocketAddr) -> u16 {
    let ports: BTreeSet<u16> = (0..16).map(|_| ask(from, protocol, to).expect("an answer").1).collect();
    assert_eq!(ports.len(), 1, "{to} {protocol}: {ports:?}");
    ports.into_iter().next().unwrap_or_default()
}

#[test]
fn a_client_keeps_its_endpoint_until_that_goes_away() {
    let Some(world) = world() else { return };
    let keeping = Traits { affinity_seconds: Some(100), ..Traits::default() };
    let other = Traits { affinity_seconds: Some(200), ..Traits::default() };
    let mut sample = Sample::new(&Family::ALL);
    load(&world, sample.compiler().program());
    for (server, service, node_port) in
        [("10.42.2.2", "10.96.0.10:80", "192.0.2.1:30080"), ("fd42:0:0:2::2", "[fd96::10]:80", "[2001:db8::1]:30080")]
    {
        let (service, node_port) = (socket(service), socket(node_port));
        let all: Vec<SocketAddr> = (8080..8084).map(|number| SocketAddr::new(address(server), number)).collect();
        let number = port(30_080);
        let family = Family::of(service.ip());
        all.iter().for_each(|at| serve(&world.server, *at));
        // One family as an agent does it that runs, the other as one that starts and compares.
        let mut set = |backends: &[SocketAddr]| {
            let mut changes = sample.set_address_with(service, "sessions", Some(backends), &keeping);
            changes.extend(sample.set_node_port_with(family, number, "sessions", Some(backends), &other));
            if family == Family::V4 {
                in_namespace(&world.node, || {
                    let mut room = NftablesRoom::open().expect("the room");
                    assert_eq!(room.apply(&changes).failed, []);
                })
                .expect("in the namespace");
            }
            load(&world, sample.compiler().program());
            sample.compiler().program().clone()
        };
        set(&all);
        let clients = [&world.pod, &world.client, &world.node];
        let first: Vec<u16> = clients.iter().map(|from| kept(from, Protocol::Tcp, service)).collect();
        let at_node: Vec<u16> = clients.iter().map(|from| kept(from, Protocol::Tcp, node_port)).collect();
        // The pod's endpoints go, those of the others may.
        let gone = [first[0], at_node[0]];
        let fewer: Vec<SocketAddr> = all.iter().copied().filter(|at| !gone.contains(&at.port())).collect();
        let program = set(&fewer);
        for ((frontend, before), (from, first, at_node)) in [service, node_port].into_iter().flat_map(|to| {
            clients.iter().zip(first.iter().zip(&at_node)).map(move |(from, (first, at_node))| {
                ((to, if to == service { *first } else { *at_node }), (*from, *first, *at_node))
            })
        }) {
            let start = Instant::now();
            let next = ask(from, Protocol::Tcp, frontend).expect("an answer").1;
            // Where the agent says so, the client is forgotten at once; else its first packet is lost, and TCP
            // sends it again after a second (RFC 6298 §2.1).
            let is_told = family == Family::V4;
            assert!(!is_told || start.elapsed() < Duration::from_millis(900), "{:?}", start.elapsed());
            let now = kept(from, Protocol::Tcp, frontend);
            assert_eq!(now, next, "{frontend}");
            assert!(!gone.contains(&now), "{frontend}: {now} is gone ({first}, {at_node})");
            assert!(gone.contains(&before) || now == before, "{frontend}: {before} lives, and yet it is {now}");
        }
        let now = kept(&world.pod, Protocol::Tcp, service);
        set(&all);
        assert_eq!(kept(&world.pod, Protocol::Tcp, service), now, "who comes back changes nothing");
        // The interpreter, told what the kernel remembers, says the same.
        let environment =
            Environment { remembered: Some(SocketAddr::new(address(server), now)), ..Environment::default() };
        let packet = Packet {
            source: address(if service.is_ipv4() { "10.42.1.2" } else { "fd42:0:0:1::2" }),
            destination: service.ip(),
            protocol: Protocol::Tcp,
            source_port: 40_000,
            destination_port: 80,
            mark: 0,
        };
        let outcome = interpret(&program, packet, Hook::Prerouting, &environment, Choice::First);
        assert!(outcome.keeps_endpoint);
        assert_eq!(outcome.packet.destination_port, now);
        timeouts_are_each_frontends_own(&world, family);
    }
}

/// What the kernel remembers, as `nft` prints it.
fn timeouts_are_each_frontends_own(world: &World, family: Family) {
    let family = if family == Family::V4 { "ip" } else { "ip6" };
    for (map, timeout) in [("affinity-clients", "timeout 1m40s"), ("nodeport-affinity-clients", "timeout 3m20s")] {
        let arguments = ["list", "map", family, "portolan-services", map];
        let output = in_namespace(&world.node, || Command::new("nft").args(arguments).output());
        let Ok(output) = output.expect("in the namespace") else {
            println!("skipped: nft is not installed");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let learned: Vec<&str> = text.split(',').filter(|element| element.contains("expires")).collect();
        assert_eq!(learned.len(), 3, "three clients: {text}");
        assert!(learned.iter().all(|element| element.contains(timeout)), "{text}");
    }
}

#[test]
fn a_client_is_forgotten_when_its_time_is_over() {
    let Some(world) = world() else { return };
    let keeping = Traits { affinity_seconds: Some(1), ..Traits::default() };
    let mut sample = Sample::new(&[Family::V4]);
    let backends = [socket("10.42.2.2:8080"), socket("10.42.2.2:8081")];
    backends.iter().for_each(|at| serve(&world.server, *at));
    let service = socket("10.96.0.10:80");
    sample.set_address_with(service, "sessions", Some(&backends), &keeping);
    load(&world, sample.compiler().program());
    let mut answered = BTreeSet::new();
    let start = Instant::now();
    while answered.len() < 2 {
        assert!(start.elapsed() < PATIENCE * 3, "always {answered:?}");
        answered.insert(ask(&world.pod, Protocol::Tcp, service).expect("an answer").1);
        // Each connection renews the time, so it must pass without one.
        std::thread::sleep(Duration::from_millis(1_200));
    }
}
