//! IPVS in a real kernel: what we write is what `ipvsadm` reads, and packets go where they shall.
//!
//! ```text
//!  client ── 192.0.2.0/24 ── node ── 10.42.2.0/24 ── server
//!  (.5)                   (.1)  (.1)                 (.2, .3)
//! ```
//!
//! and the same with IPv6. Each of the three is a network namespace without a name. Few kernels of build machines
//! have IPVS: `cargo xtask guest` boots one that has.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a test fails by panicking and says what it skips")]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use portolan_kernel::Errno;
use portolan_kernel::ipset::IpsetRoom;
use portolan_kernel::ipvs::IpvsRoom;
use portolan_kernel::link::Links;
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Family, Port, Protocol};
use portolan_program::ipset;
use portolan_program::ipvs::sample::{Sample, Samples, view};
use portolan_program::ipvs::{Compiler, IpvsSettings, Program, Scheduler, Timeouts, diff, render};

/// No test waits so long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

const SERVERS: [&str; 4] = ["10.42.2.2:8080", "10.42.2.3:8080", "[fd42:0:0:2::2]:8080", "[fd42:0:0:2::3]:8080"];

struct World {
    node: Namespace,
    client: Namespace,
    server: Namespace,
}

fn socket(text: &str) -> SocketAddr {
    text.parse().expect("a socket address")
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn port(number: u16) -> Port {
    Port::try_from(number).expect("a port")
}

/// Two IPv4 addresses and two IPv6 ones of each end; the node is the other end's gateway.
fn cable(node: &Namespace, other: &Namespace, name: &str, node_ends: [&str; 2], other_ends: &[&str]) {
    let mut here = Links::open(node).expect("links");
    let mut there = Links::open(other).expect("links");
    here.create_veth(name, "eth0", other, None).expect("a cable");
    for end in node_ends {
        here.add_address(name, end.parse().expect("a prefix")).expect("an address");
    }
    for end in other_ends {
        there.add_address("eth0", end.parse().expect("a prefix")).expect("an address");
    }
    here.set_up(name).expect("up");
    there.set_up("lo").expect("up");
    there.set_up("eth0").expect("up");
    for end in node_ends {
        let gateway: portolan_net::IpNet = end.parse().expect("a prefix");
        let everywhere = if gateway.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        there.add_route("eth0", everywhere.parse().expect("a prefix"), Some(gateway.addr())).expect("a route");
    }
    here.settle(name).expect("settled");
    there.settle("eth0").expect("settled");
}

/// Runs a program; nothing if it is not installed.
fn output(namespace: &Namespace, command: &[&str]) -> Option<String> {
    let (program, arguments) = command.split_first().expect("a program");
    let run = || Command::new(program).args(arguments).output();
    let output = in_namespace(namespace, run).expect("in the namespace");
    let output = match output {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("skipped: {program} is not installed");
            return None;
        }
        other => other.expect("a program that runs"),
    };
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn world() -> Option<World> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return None;
    }
    let new = || Namespace::create_unnamed().expect("a namespace");
    let world = World { node: new(), client: new(), server: new() };
    if let Err(error) = in_namespace(&world.node, IpvsRoom::open).expect("in the namespace") {
        assert_eq!(error.errno(), Some(Errno::ENOENT), "{error}");
        println!(
            "skipped: the kernel has no IPVS; run cargo xtask guest -- {}",
            std::env::args().next().unwrap_or_default()
        );
        return None;
    }
    Links::open(&world.node).expect("links").set_up("lo").expect("up");
    cable(
        &world.node,
        &world.client,
        "client",
        ["192.0.2.1/24", "2001:db8::1/64"],
        &["192.0.2.5/24", "2001:db8::5/64"],
    );
    let servers = ["10.42.2.2/24", "10.42.2.3/24", "fd42:0:0:2::2/64", "fd42:0:0:2::3/64"];
    cable(&world.node, &world.server, "server", ["10.42.2.1/24", "fd42:0:0:2::1/64"], &servers);
    Some(world)
}

/// Who the node is to the compiler.
fn compiler(settings: IpvsSettings) -> Compiler {
    let prefixes = ["10.42.0.0/16", "fd42::/48"].map(|text| text.parse().expect("a prefix"));
    let view = view(&prefixes).expect("a view");
    let mut compiler = Compiler::with_settings(&view, &Family::ALL, settings);
    compiler.set_node_addresses(&["192.0.2.1", "10.42.2.1", "2001:db8::1", "fd42:0:0:2::1"].map(address));
    compiler
}

fn service(protocol: Protocol, at: &str) -> Sample {
    Sample::cluster_ip(protocol, socket(at), "web").expect("a port")
}

/// Both servers of the family.
fn served(sample: Sample, is_v4: bool) -> Sample {
    let servers = SERVERS.iter().map(|text| socket(text)).filter(|it| it.is_ipv4() == is_v4);
    servers.fold(sample, Sample::backend)
}

/// Makes the node's kernel hold the program, and asserts that it does.
fn load(world: &World, program: &Program) {
    in_namespace(&world.node, || {
        let mut room = IpvsRoom::open().expect("the room");
        let observed = room.observe().expect("observed");
        assert_eq!(room.apply(&diff(&observed, program)).failed, []);
        assert_eq!(diff(&room.observe().expect("observed"), program), [], "nothing is left to do");
    })
    .expect("in the namespace");
}

/// Serves: each connection and datagram is answered with the client's address and the server's, and a connection
/// then with every line that it sends.
fn serve(world: &World) {
    for at in SERVERS.map(socket) {
        let (listener, udp) = in_namespace(&world.server, || {
            (TcpListener::bind(at).expect("a listener"), UdpSocket::bind(at).expect("a socket"))
        })
        .expect("in the namespace");
        let answer = move |from: SocketAddr| format!("{} {}\n", from.ip(), at.ip());
        // They end with the test's process; sockets keep their namespace wherever their thread is.
        std::thread::spawn(move || {
            while let Ok((mut stream, from)) = listener.accept() {
                std::thread::spawn(move || {
                    let _ = stream.write_all(answer(from).as_bytes());
                    let mut buffer = [0; 64];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        let _ = stream.write_all(&buffer[..length]);
                    }
                });
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(answer(from).as_bytes(), from);
            }
        });
    }
}

fn line(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        text.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn connect(namespace: &Namespace, to: SocketAddr, patience: Duration) -> std::io::Result<(TcpStream, String)> {
    in_namespace(namespace, || {
        let mut stream = TcpStream::connect_timeout(&to, patience)?;
        stream.set_read_timeout(Some(patience))?;
        let said = line(&mut stream)?;
        Ok((stream, said))
    })
    .expect("in the namespace")
}

/// Which client the server saw, and which server it was.
fn ask(namespace: &Namespace, protocol: Protocol, to: SocketAddr) -> (IpAddr, IpAddr) {
    let said = match protocol {
        Protocol::Udp => in_namespace(namespace, || -> std::io::Result<String> {
            let any: IpAddr = if to.is_ipv4() { address("0.0.0.0") } else { address("::") };
            let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send(b"who?")?;
            let mut buffer = [0; 64];
            let length = socket.recv(&mut buffer)?;
            Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
        })
        .expect("in the namespace"),
        _ => connect(namespace, to, PATIENCE).map(|(_, said)| said),
    };
    let said = said.unwrap_or_else(|error| panic!("{to}/{protocol}: {error}"));
    let (client, server) = said.split_once(' ').expect("two words");
    (address(client), address(server))
}

fn everything(samples: &mut Samples, compiler: &mut Compiler) {
    let mut list = Vec::new();
    for (is_v4, at, family) in [(true, "10.96.0.10:80", Family::V4), (false, "[fd96::10]:80", Family::V6)] {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            list.push(served(service(protocol, at), is_v4));
            list.push(served(Sample::node_port(family, protocol, port(30_080), "web"), is_v4));
        }
    }
    list.push(service(Protocol::Tcp, "10.96.0.11:443").affinity(600));
    list.push(service(Protocol::Tcp, "[fd96::11]:443").affinity(600));
    compiler.update_services(&samples.put(list));
}

#[test]
fn what_is_loaded_is_read_back_by_us_and_by_ipvsadm() {
    let Some(world) = world() else { return };
    for scheduler in Scheduler::ALL {
        let timeouts = Timeouts { tcp: Some(777), tcp_fin: None, udp: Some(99) };
        let mut compiler = compiler(IpvsSettings {
            scheduler: scheduler.clone(),
            strict_arp: true,
            timeouts,
            ..IpvsSettings::default()
        });
        everything(&mut Samples::default(), &mut compiler);
        load(&world, compiler.program());
        let Some(saved) = output(&world.node, &["ipvsadm", "-S", "-n"]) else { return };
        let mut saved: Vec<&str> = saved.lines().map(str::trim).collect();
        let rendered = render(compiler.program());
        let mut rendered: Vec<&str> = rendered.lines().filter(|line| !line.starts_with('#')).collect();
        // A real server belongs to the virtual one that it names: their order says nothing.
        saved.sort_unstable();
        rendered.sort_unstable();
        assert_eq!(saved, rendered, "{scheduler:?}");
    }
    let timeouts = output(&world.node, &["ipvsadm", "-L", "--timeout"]).expect("installed");
    assert!(timeouts.contains("777") && timeouts.contains("99"), "{timeouts}");
}

#[test]
fn others_virtual_servers_survive_and_ours_are_cleaned() {
    let Some(world) = world() else { return };
    let foreign = ["-A -t 203.0.113.1:80 -s rr", "-a -t 203.0.113.1:80 -r 10.9.9.9:80 -g -w 1", "-A -f 7 -s rr"];
    for command in foreign {
        let words: Vec<&str> = std::iter::once("ipvsadm").chain(command.split(' ')).collect();
        if output(&world.node, &words).is_none() {
            return;
        }
    }
    let mut compiler = compiler(IpvsSettings::default());
    everything(&mut Samples::default(), &mut compiler);
    load(&world, compiler.program());
    in_namespace(&world.node, || {
        let mut room = IpvsRoom::open().expect("the room");
        assert_eq!(room.clean(&[]).expect("observed").failed, []);
        let left = room.observe().expect("observed");
        assert!(!left.device && left.addresses.is_empty());
    })
    .expect("in the namespace");
    let saved = output(&world.node, &["ipvsadm", "-S", "-n"]).expect("installed");
    let left: BTreeSet<&str> = saved.lines().map(str::trim).collect();
    assert_eq!(left, BTreeSet::from(foreign));
}

#[test]
fn packets_reach_the_endpoints_from_everywhere() {
    let Some(world) = world() else { return };
    serve(&world);
    let mut compiler = compiler(IpvsSettings::default());
    everything(&mut Samples::default(), &mut compiler);
    load(&world, compiler.program());
    for (at, node_port, client) in
        [("10.96.0.10:80", "192.0.2.1:30080", "192.0.2.5"), ("[fd96::10]:80", "[2001:db8::1]:30080", "2001:db8::5")]
    {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for to in [at, node_port].map(socket) {
                let answers: Vec<_> = (0..2).map(|_| ask(&world.client, protocol, to)).collect();
                let servers: BTreeSet<IpAddr> = answers.iter().map(|(_, server)| *server).collect();
                assert_eq!(servers.len(), 2, "round robin at {to}: {answers:?}");
                assert!(answers.iter().all(|(from, _)| *from == address(client)), "{answers:?}");
                ask(&world.node, protocol, to);
            }
        }
    }
}

#[test]
fn a_client_keeps_its_endpoint_where_it_shall() {
    let Some(world) = world() else { return };
    serve(&world);
    let mut compiler = compiler(IpvsSettings::default());
    let list = [("10.96.0.10:80", true), ("[fd96::10]:80", false)];
    let list = list.map(|(at, is_v4)| served(service(Protocol::Tcp, at), is_v4).affinity(60));
    compiler.update_services(&Samples::default().put(list));
    load(&world, compiler.program());
    for at in ["10.96.0.10:80", "[fd96::10]:80"].map(socket) {
        let servers: BTreeSet<IpAddr> = (0..6).map(|_| ask(&world.client, Protocol::Tcp, at).1).collect();
        assert_eq!(servers.len(), 1, "{at}: {servers:?}");
    }
}

#[test]
fn a_service_without_endpoints_refuses() {
    let Some(world) = world() else { return };
    let mut compiler = compiler(IpvsSettings::default());
    compiler.update_services(&Samples::default().put([service(Protocol::Tcp, "10.96.0.10:80")]));
    load(&world, compiler.program());
    for namespace in [&world.client, &world.node] {
        let error = connect(namespace, socket("10.96.0.10:80"), PATIENCE).expect_err("nobody serves");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    }
}

#[test]
fn an_open_connection_survives_its_endpoints_removal() {
    let Some(world) = world() else { return };
    serve(&world);
    let to = socket("10.96.0.10:80");
    let mut compiler = compiler(IpvsSettings::default());
    let mut samples = Samples::default();
    compiler.update_services(&samples.put([served(service(Protocol::Tcp, "10.96.0.10:80"), true)]));
    load(&world, compiler.program());
    let (mut open, said) = connect(&world.client, to, PATIENCE).expect("a connection");
    let server = address(said.split_once(' ').expect("two words").1);
    let rest = SERVERS.map(socket).into_iter().find(|it| it.is_ipv4() && it.ip() != server).expect("another");
    let changes = compiler.update_services(&samples.put([service(Protocol::Tcp, "10.96.0.10:80").backend(rest)]));
    in_namespace(&world.node, || {
        let mut room = IpvsRoom::open().expect("the room");
        assert_eq!(room.apply(&changes).failed, []);
        let counted = room.connections(compiler.leaving()).expect("counted");
        assert_eq!(counted.iter().map(|(.., count)| *count).collect::<Vec<_>>(), [Some(1)]);
        assert_eq!(compiler.settle(&counted), []);
    })
    .expect("in the namespace");
    // The old connection goes on, new ones meet the other endpoint.
    open.write_all(b"still here\n").expect("sent");
    assert_eq!(line(&mut open).expect("an echo"), "still here");
    for _ in 0..3 {
        assert_eq!(ask(&world.client, Protocol::Tcp, to).1, rest.ip());
    }
    // Its last connection is gone: so is it.
    let gone: Vec<_> = compiler.leaving().map(|(server, real)| (server, real, Some(0))).collect();
    let changes = compiler.settle(&gone);
    assert_eq!(changes.len(), 1);
    in_namespace(&world.node, || {
        let mut room = IpvsRoom::open().expect("the room");
        assert_eq!(room.apply(&changes).failed, []);
        assert_eq!(diff(&room.observe().expect("observed"), compiler.program()), []);
    })
    .expect("in the namespace");
}

#[test]
fn sets_are_read_back_by_us_and_by_ipset() {
    let Some(world) = world() else { return };
    let prefixes = ["10.42.0.0/16", "fd42::/48"].map(|text| text.parse().expect("a prefix"));
    let view = view(&prefixes).expect("a view");
    let mut compiler = ipset::Compiler::new(&view, &Family::ALL);
    compiler.set_node_addresses(&["192.0.2.1", "2001:db8::1"].map(address));
    compiler.set_health_ports(&BTreeSet::from([port(32_000)]));
    let mut samples = Samples::default();
    let mut list = Vec::new();
    for (is_v4, at, family) in [(true, "198.51.100.7:80", Family::V4), (false, "[2001:db8:7::1]:80", Family::V6)] {
        let own = SERVERS.map(socket).into_iter().find(|it| it.is_ipv4() == is_v4).expect("one");
        let sources = ["10.0.0.0/8", "0.0.0.0/0", "198.51.100.7/32", "fd00::/8", "::/0", "2001:db8::/48"];
        let sources = sources.map(|text| text.parse().expect("a prefix"));
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let balanced = Sample::load_balancer(protocol, socket(at), "web").expect("a port");
            list.push(balanced.local().sources(&sources).local_backend(own));
            list.push(Sample::node_port(family, protocol, port(30_080), "web").local().backend(own));
        }
        // Long enough to come in many parts.
        for number in 1..3_000 {
            let mut at = socket(at);
            at.set_port(1_000 + number);
            list.push(Sample::cluster_ip(Protocol::Tcp, at, "many").expect("a port"));
        }
    }
    compiler.update_services(&samples.put(list));
    in_namespace(&world.node, || {
        let mut room = IpsetRoom::open().expect("the room");
        let begin = std::time::Instant::now();
        let changes = ipset::diff(&room.observe().expect("observed"), compiler.program());
        let report = room.apply(&changes);
        println!("{} messages in {:?}", report.messages, begin.elapsed());
        assert_eq!(report.failed, []);
        assert_eq!(ipset::diff(&room.observe().expect("observed"), compiler.program()), []);
    })
    .expect("in the namespace");
    let Some(saved) = output(&world.node, &["ipset", "save"]) else { return };
    let saved: BTreeSet<String> = saved.lines().filter(|line| line.starts_with("add")).map(str::to_owned).collect();
    let rendered = ipset::render(compiler.program());
    let rendered: BTreeSet<String> =
        rendered.lines().filter(|line| line.starts_with("add")).map(str::to_owned).collect();
    let difference: Vec<&String> = saved.symmetric_difference(&rendered).collect();
    assert!(difference.is_empty(), "{difference:?}");
    // What changes is changed, what is others' stays.
    assert!(output(&world.node, &["ipset", "create", "OTHERS", "hash:net"]).is_some());
    let changes = compiler.update_services(
        &samples.remove(Sample::load_balancer(Protocol::Tcp, socket("198.51.100.7:80"), "web").expect("a port").key()),
    );
    in_namespace(&world.node, || {
        let mut room = IpsetRoom::open().expect("the room");
        assert_eq!(room.apply(&changes).failed, []);
        assert_eq!(ipset::diff(&room.observe().expect("observed"), compiler.program()), []);
        assert_eq!(room.clean().expect("observed").failed, []);
        assert!(room.observe().expect("observed").sets.is_empty());
    })
    .expect("in the namespace");
    assert_eq!(output(&world.node, &["ipset", "list", "-n"]).expect("installed").trim(), "OTHERS");
}
