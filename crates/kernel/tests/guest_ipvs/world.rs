//! Three namespaces, what serves in one of them, and who asks.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use portolan_kernel::Errno;
use portolan_kernel::ipvs::IpvsRoom;
use portolan_kernel::link::Links;
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Port, Protocol};
use portolan_program::sample::{NodeView, Sample, view};

/// No test waits so long unless something is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const SERVERS: [&str; 4] =
    ["10.42.2.2:8080", "10.42.2.3:8080", "[fd42:0:0:2::2]:8080", "[fd42:0:0:2::3]:8080"];

pub(crate) struct World {
    pub(crate) node: Namespace,
    pub(crate) client: Namespace,
    pub(crate) server: Namespace,
}

pub(crate) fn socket(text: &str) -> SocketAddr {
    text.parse().expect("a socket address")
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn port(number: u16) -> Port {
    Port::try_from(number).expect("a port")
}

/// Two IPv4 addresses and two IPv6 ones of each end; the node is the other end's gateway.
pub(crate) fn cable(node: &Namespace, other: &Namespace, name: &str, node_ends: [&str; 2], other_ends: &[&str]) {
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
pub(crate) fn output(namespace: &Namespace, command: &[&str]) -> Option<String> {
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

pub(crate) fn world() -> Option<World> {
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

/// The node's own addresses.
pub(crate) const NODE: [&str; 4] = ["192.0.2.1", "10.42.2.1", "2001:db8::1", "fd42:0:0:2::1"];

/// Who the node is to compilers.
pub(crate) fn node_view() -> NodeView {
    let prefixes = ["10.42.0.0/16", "fd42::/48"].map(|text| text.parse().expect("a prefix"));
    view(&prefixes).expect("a view")
}

pub(crate) fn service(protocol: Protocol, at: &str) -> Sample {
    Sample::cluster_ip(protocol, socket(at), "web").expect("a port")
}

/// Both servers of the family.
pub(crate) fn served(sample: Sample, is_v4: bool) -> Sample {
    let servers = SERVERS.iter().map(|text| socket(text)).filter(|it| it.is_ipv4() == is_v4);
    servers.fold(sample, Sample::backend)
}

/// Serves: each connection and datagram is answered with the client's address and the server's, and a connection
/// then with every line that it sends.
pub(crate) fn serve(world: &World) {
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

pub(crate) fn line(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        text.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

pub(crate) fn connect(
    namespace: &Namespace,
    to: SocketAddr,
    patience: Duration,
) -> std::io::Result<(TcpStream, String)> {
    in_namespace(namespace, || {
        let mut stream = TcpStream::connect_timeout(&to, patience)?;
        stream.set_read_timeout(Some(patience))?;
        let said = line(&mut stream)?;
        Ok((stream, said))
    })
    .expect("in the namespace")
}

/// Which client the server saw, and which server it was.
pub(crate) fn ask(namespace: &Namespace, protocol: Protocol, to: SocketAddr) -> (IpAddr, IpAddr) {
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
