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
use portolan_program::nftables::sample::Sample;
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
    in_namespace(&world.node, || {
        let mut room = NftablesRoom::open().expect("the room");
        assert_eq!(room.apply(&diff(&program, &Program::default())).failed, []);
    })
    .expect("in the namespace");
    program
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
    let answer = in_namespace(namespace, || -> std::io::Result<String> {
        if protocol == Protocol::Tcp {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            return Ok(text);
        }
        let any: IpAddr = if to.is_ipv4() { address("0.0.0.0") } else { address("::") };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(PATIENCE))?;
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
