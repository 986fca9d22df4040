//! Real packets through kube-proxy's chains as we write them, and what the interpreter said of them.
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
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use portolan_kernel::iptables::{Backend, IptablesRoom};
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Family, Packet, Port, Protocol};
use portolan_program::iptables::sample::{FrontendKey, Sample, Wanted, view};
use portolan_program::iptables::{Environment, Outcome, Program, Verdict, diff, interpret};

/// No test waits so long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a packet that is dropped is waited for.
const SILENCE: Duration = Duration::from_millis(300);

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

/// Joins the node with another namespace; `v4` and `v6` are the network's prefixes, the node is their first host.
fn cable(node: &Namespace, other: &Namespace, name: &str, host: u8, v4: &str, v6: &str) {
    let path = other.path();
    ip(
        node,
        &[
            &format!("link add {name} type veth peer name eth0 netns {}", path.display()),
            &format!("address add {v4}1/24 dev {name}"),
            &format!("address add {v6}1/64 dev {name} nodad"),
            &format!("link set {name} up"),
        ],
    );
    ip(
        other,
        &[
            "link set lo up",
            &format!("address add {v4}{host}/24 dev eth0"),
            &format!("address add {v6}{host}/64 dev eth0 nodad"),
            "link set eth0 up",
            &format!("route add default via {v4}1"),
            &format!("route add default via {v6}1"),
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
    cable(&world.node, &world.pod, "pod", 2, "10.42.1.", "fd42:0:0:1::");
    cable(&world.node, &world.server, "server", 2, "10.42.2.", "fd42:0:0:2::");
    cable(&world.node, &world.client, "client", 5, "192.0.2.", "2001:db8::");
    // So that the node itself has a way to Service addresses, which its output hook then translates.
    ip(&world.node, &["route add default via 192.0.2.5", "route add default via 2001:db8::5"]);
    in_namespace(&world.node, || {
        for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/all/route_localnet"] {
            std::fs::write(format!("/proc/sys/net/{file}"), "1").expect("written");
        }
    })
    .expect("in the namespace");
    Some(world)
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn port(number: u16) -> Port {
    Port::try_from(number).expect("a port")
}

/// Services: `shop` with two endpoints on the server and a node port; `idle` without any; `sticky` with affinity;
/// `own` whose only endpoint is the pod; `guarded`, a load balancer for some sources only.
fn program() -> Program {
    let mut view = view().expect("a view");
    view.proxy.localhost_node_ports = true;
    let mut sample = Sample::new(&view, &Family::ALL);
    for family in Family::ALL {
        let pick = |v4: &str, v6: &str| address(if family == Family::V4 { v4 } else { v6 });
        let server = pick("10.42.2.2", "fd42:0:0:2::2");
        let pod = [SocketAddr::new(pick("10.42.1.2", "fd42:0:0:1::2"), 8080)];
        let backends = [SocketAddr::new(server, 8080), SocketAddr::new(server, 8081)];
        let at = |v4, v6| FrontendKey::Address { address: pick(v4, v6), protocol: Protocol::Tcp, port: port(80) };
        let node_port = |number| FrontendKey::NodePort { family, protocol: Protocol::Tcp, port: port(number) };
        let shop = Wanted { name: "shop", backends: &backends, ..Wanted::default() };
        let idle = Wanted { name: "idle", ..Wanted::default() };
        sample.set(at("10.96.0.10", "fd96::10"), Some(&shop));
        sample.set(node_port(30_080), Some(&shop));
        sample.set(at("10.96.0.11", "fd96::11"), Some(&idle));
        sample.set(node_port(30_081), Some(&idle));
        let sticky = Wanted { name: "sticky", backends: &backends, affinity: true, ..Wanted::default() };
        sample.set(at("10.96.0.12", "fd96::12"), Some(&sticky));
        sample.set(at("10.96.0.13", "fd96::13"), Some(&Wanted { name: "own", backends: &pod, ..Wanted::default() }));
        let sources = [if family == Family::V4 { "192.0.2.0/24" } else { "2001:db8::/64" }.parse().expect("a prefix")];
        let external = Some(Sample::LOAD_BALANCER);
        let guarded = Wanted { name: "guarded", sources: Some(&sources), external, ..shop };
        sample.set(at("203.0.113.1", "2001:db8:2::1"), Some(&guarded));
    }
    sample.compiler().program().clone()
}

/// Serves on a namespace's address and port: answers each connection with the address that it saw and its own port.
fn serve(namespace: &Namespace, at: SocketAddr) {
    let listener = in_namespace(namespace, || TcpListener::bind(at).expect("a listener")).expect("in the namespace");
    // It ends with the test's process; a socket keeps its namespace wherever its thread is.
    std::thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            let _ = stream.write_all(format!("{} {}", from.ip(), at.port()).as_bytes());
        }
    });
}

/// Which source the server saw, and which port answered.
fn ask(namespace: &Namespace, to: SocketAddr, patience: Duration) -> Result<(IpAddr, u16), ErrorKind> {
    let answer = in_namespace(namespace, || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, patience)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    let text = answer.expect("in the namespace").map_err(|error| error.kind())?;
    let (source, port) = text.split_once(' ').expect("two words");
    Ok((address(source), port.parse().expect("a port")))
}

/// What the interpreter says.
fn predict(program: &Program, from: &str, to: SocketAddr, by: Option<&str>) -> Outcome {
    let local = ["192.0.2.1", "10.42.1.1", "10.42.2.1", "2001:db8::1", "fd42:0:0:1::1", "fd42:0:0:2::1"];
    let environment = Environment {
        in_interface: by.map(str::to_owned),
        local_addresses: local.map(address).to_vec(),
        ..Environment::default()
    };
    let packet = Packet {
        source: address(from),
        destination: to.ip(),
        protocol: Protocol::Tcp,
        source_port: 40_000,
        destination_port: to.port(),
        mark: 0,
    };
    interpret(program, &packet, &environment)
}

/// A world with the program in its node, for each backend.
fn with_each_backend(work: impl Fn(&World, &Program)) {
    for backend in Backend::ALL {
        let Some(world) = world() else { return };
        let desired = program();
        let loaded = in_namespace(&world.node, || {
            let mut room = IptablesRoom::open_with(backend, &Family::ALL)?;
            let observed = room.observe()?;
            assert_eq!(room.apply(&diff(&observed, &desired)).failed, []);
            room.observe()
        });
        match loaded.expect("in the namespace") {
            // What is read back is interpreted, not what was written.
            Ok(observed) => work(&world, &observed),
            Err(error) => println!("skipped: {error}"),
        }
    }
}

#[test]
fn services_answer_and_the_interpreter_knew_it() {
    with_each_backend(|world, program| {
        for server in ["10.42.2.2", "fd42:0:0:2::2"] {
            serve(&world.server, SocketAddr::new(address(server), 8080));
            serve(&world.server, SocketAddr::new(address(server), 8081));
        }
        for pod in ["10.42.1.2", "fd42:0:0:1::2"] {
            serve(&world.pod, SocketAddr::new(address(pod), 8080));
        }
        let (pod, client, node) = (&world.pod, &world.client, &world.node);
        for (from, source, by, to) in [
            (pod, "10.42.1.2", Some("pod"), "10.96.0.10:80"),
            (pod, "10.42.1.2", Some("pod"), "192.0.2.1:30080"),
            (pod, "10.42.1.2", Some("pod"), "10.96.0.13:80"),
            (client, "192.0.2.5", Some("client"), "192.0.2.1:30080"),
            (client, "192.0.2.5", Some("client"), "10.96.0.10:80"),
            (client, "192.0.2.5", Some("client"), "203.0.113.1:80"),
            (node, "192.0.2.1", None, "10.96.0.10:80"),
            (node, "192.0.2.1", None, "192.0.2.1:30080"),
            (node, "127.0.0.1", None, "127.0.0.1:30080"),
            (pod, "fd42:0:0:1::2", Some("pod"), "[fd96::10]:80"),
            (pod, "fd42:0:0:1::2", Some("pod"), "[fd96::13]:80"),
            (client, "2001:db8::5", Some("client"), "[2001:db8::1]:30080"),
            (client, "2001:db8::5", Some("client"), "[2001:db8:2::1]:80"),
            (node, "2001:db8::1", None, "[fd96::10]:80"),
        ] {
            let to: SocketAddr = to.parse().expect("a socket");
            let outcome = predict(program, source, to, by);
            assert_eq!(outcome.verdict(), Some(Verdict::Accept), "{source} → {to}");
            let ports: Vec<u16> = outcome.backends().iter().map(SocketAddr::port).collect();
            let mut answered = BTreeSet::new();
            for _ in 0..24 {
                let (seen, port) = ask(from, to, PATIENCE).unwrap_or_else(|error| panic!("{source} → {to}: {error}"));
                let masqueraded = seen != address(source);
                assert_eq!(Some(masqueraded), outcome.is_masqueraded(), "{source} → {to}: the server saw {seen}");
                answered.insert(port);
            }
            // That one of two is never chosen in 24 times happens once in eight million runs.
            assert_eq!(answered.into_iter().collect::<Vec<_>>(), ports, "{source} → {to}");
        }
    });
}

#[test]
fn what_nobody_serves_is_refused_and_what_nobody_may_is_lost() {
    with_each_backend(|world, program| {
        let (pod, client, node) = (&world.pod, &world.client, &world.node);
        for (from, source, by, to) in [
            (pod, "10.42.1.2", Some("pod"), "10.96.0.11:80"),
            (node, "192.0.2.1", None, "10.96.0.11:80"),
            (client, "192.0.2.5", Some("client"), "192.0.2.1:30081"),
            (pod, "fd42:0:0:1::2", Some("pod"), "[fd96::11]:80"),
            (node, "2001:db8::1", None, "[fd96::11]:80"),
            (client, "2001:db8::5", Some("client"), "[2001:db8::1]:30081"),
        ] {
            let to: SocketAddr = to.parse().expect("a socket");
            assert_eq!(predict(program, source, to, by).verdict(), Some(Verdict::Reject), "{source} → {to}");
            let start = Instant::now();
            assert_eq!(ask(from, to, PATIENCE), Err(ErrorKind::ConnectionRefused), "{source} → {to}");
            assert!(start.elapsed() < PATIENCE / 2, "{to} is refused, not forgotten");
        }
        for (source, to) in [("10.42.1.2", "203.0.113.1:80"), ("fd42:0:0:1::2", "[2001:db8:2::1]:80")] {
            let to: SocketAddr = to.parse().expect("a socket");
            assert_eq!(predict(program, source, to, Some("pod")).verdict(), Some(Verdict::Drop), "{source} → {to}");
            assert_eq!(ask(pod, to, SILENCE), Err(ErrorKind::TimedOut), "{source} → {to}");
        }
    });
}

#[test]
fn a_client_keeps_its_endpoint() {
    with_each_backend(|world, _| {
        for server in ["10.42.2.2", "fd42:0:0:2::2"] {
            serve(&world.server, SocketAddr::new(address(server), 8080));
            serve(&world.server, SocketAddr::new(address(server), 8081));
        }
        for to in ["10.96.0.12:80", "[fd96::12]:80"] {
            let to: SocketAddr = to.parse().expect("a socket");
            let ports: BTreeSet<u16> = (0..12).map(|_| ask(&world.pod, to, PATIENCE).expect("an answer").1).collect();
            assert_eq!(ports.len(), 1, "{to}: {ports:?}");
        }
    });
}
