//! Two nodes with a router between them, and a pod on each.
//!
//! ```text
//!  pod a ────── node a ─── router ─── node b ────── pod b
//!  10.42.1.2    192.0.2.2   .1  .5    192.0.2.6     10.42.2.2
//!  fd42:0:0:1::2  2001:db8:a::2       2001:db8:b::2  fd42:0:0:2::2
//! ```
//!
//! Each is a network namespace without a name, which goes with the value, also after a crash.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_kernel::udp::UdpRoom;
use portolan_net::{IpNet, Origin};
use portolan_program::udp::{Program, Route, Tunnel, diff};

/// No test waits so long unless something is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const DEVICE: &str = "flannel0";
pub(crate) const PORT: u16 = 8285;
/// The underlay's 1500, less an IPv6 header and a UDP header.
pub(crate) const MTU: u32 = 1452;

pub(crate) struct World {
    pub(crate) nodes: [Namespace; 2],
    pub(crate) pods: [Namespace; 2],
    pub(crate) router: Namespace,
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) fn pod(index: usize, is_v6: bool) -> IpAddr {
    let number = index + 1;
    address(&if is_v6 { format!("fd42:0:0:{number}::2") } else { format!("10.42.{number}.2") })
}

pub(crate) fn node(index: usize, is_v6: bool) -> IpAddr {
    address([["192.0.2.2", "2001:db8:a::2"], ["192.0.2.6", "2001:db8:b::2"]][index][usize::from(is_v6)])
}

pub(crate) fn ip(namespace: &Namespace, commands: &[&str]) {
    in_namespace(namespace, || {
        for command in commands {
            let output = Command::new("ip").args(command.split_whitespace()).output().expect("ip runs");
            assert!(output.status.success(), "ip {command}: {}", String::from_utf8_lossy(&output.stderr));
        }
    })
    .expect("in the namespace");
}

/// A cable from `left` to `right`, whose ends have names and addresses; the right one has the left one as its gateway.
fn cable(left: (&Namespace, &str, [&str; 2]), right: (&Namespace, &str, [&str; 2])) {
    let path = right.0.path();
    let pair = format!("link add {} type veth peer name {} netns {}", left.1, right.1, path.display());
    ip(left.0, &[&pair]);
    for (namespace, name, addresses) in [left, right] {
        let [v4, v6] = addresses;
        ip(
            namespace,
            &[
                &format!("address add {v4} dev {name}"),
                &format!("address add {v6} dev {name} nodad"),
                &format!("link set {name} up"),
            ],
        );
    }
    let gateway = |end: &str| end.split('/').next().unwrap_or_default().to_owned();
    let [v4, v6] = left.2.map(gateway);
    ip(right.0, &[&format!("route add default via {v4}"), &format!("route add default via {v6}")]);
}

impl World {
    pub(crate) fn new() -> Option<World> {
        if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
            println!("skipped: needs root and /dev/net/tun");
            return None;
        }
        let new = || Namespace::create_unnamed().expect("a namespace");
        let world = World { nodes: [new(), new()], pods: [new(), new()], router: new() };
        for namespace in world.nodes.iter().chain(&world.pods).chain([&world.router]) {
            ip(namespace, &["link set lo up"]);
            in_namespace(namespace, || {
                // Routers ask for neighbours from their link-local addresses, which are to be usable at once.
                for file in ["all/accept_dad", "default/accept_dad"] {
                    std::fs::write(format!("/proc/sys/net/ipv6/conf/{file}"), "0").expect("no detection of duplicates");
                }
            })
            .expect("in the namespace");
        }
        for namespace in world.nodes.iter().chain([&world.router]) {
            in_namespace(namespace, || {
                for file in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                    std::fs::write(format!("/proc/sys/net/{file}"), "1").expect("forwarding");
                }
            })
            .expect("in the namespace");
        }
        let [a, b] = &world.nodes;
        cable(
            (&world.router, "left", ["192.0.2.1/30", "2001:db8:a::1/64"]),
            (a, "eth0", ["192.0.2.2/30", "2001:db8:a::2/64"]),
        );
        cable(
            (&world.router, "right", ["192.0.2.5/30", "2001:db8:b::1/64"]),
            (b, "eth0", ["192.0.2.6/30", "2001:db8:b::2/64"]),
        );
        for (index, (node, pod)) in world.nodes.iter().zip(&world.pods).enumerate() {
            let number = index + 1;
            let [gateway, own] =
                [1, 2].map(|host| (format!("10.42.{number}.{host}/24"), format!("fd42:0:0:{number}::{host}/64")));
            cable((node, "pod", [&gateway.0, &gateway.1]), (pod, "eth0", [&own.0, &own.1]));
            ip(node, &[&format!("link set pod mtu {MTU}")]);
            ip(pod, &[&format!("link set eth0 mtu {MTU}")]);
        }
        Some(world)
    }

    /// What a node's forwarder must do.
    pub(crate) fn program(index: usize) -> Program {
        let origin = || Origin::configuration("fabric");
        let other = 1 - index;
        let number = other + 1;
        let route = |prefix: String, is_v6| {
            let peer = SocketAddr::new(node(other, is_v6), PORT);
            (prefix.parse::<IpNet>().expect("a prefix"), Route { peer, origin: origin() })
        };
        let routes = [route(format!("10.42.{number}.0/24"), false), route(format!("fd42:0:0:{number}::/64"), true)];
        let tunnel = Tunnel {
            device: DEVICE.into(),
            local: vec![node(index, false), node(index, true)],
            port: PORT.try_into().expect("a port"),
            mtu: MTU,
            origin: origin(),
        };
        Program { tunnel: Some(tunnel), routes: routes.into_iter().collect() }
    }

    /// Starts a node's forwarder, and does what the room `netlink` does for it.
    pub(crate) fn start(&self, index: usize) -> UdpRoom {
        let mut room = UdpRoom::new();
        self.apply(index, &mut room);
        self.dress(index);
        room
    }

    /// Makes a node's forwarder do what it must.
    pub(crate) fn apply(&self, index: usize, room: &mut UdpRoom) {
        let desired = World::program(index);
        in_namespace(&self.nodes[index], || {
            let changes = diff(&room.observe(), &desired);
            assert_eq!(room.apply(&changes).failed, []);
            assert_eq!(diff(&room.observe(), &desired), []);
        })
        .expect("in the namespace");
    }

    /// What the room `netlink` does for the device.
    pub(crate) fn dress(&self, index: usize) {
        let number = index + 1;
        ip(
            &self.nodes[index],
            &[
                &format!("link set {DEVICE} mtu {MTU} up"),
                &format!("address add 10.42.{number}.0/32 dev {DEVICE}"),
                &format!("address add fd42:0:0:{number}::/128 dev {DEVICE} nodad"),
                &format!("route add 10.42.0.0/16 dev {DEVICE}"),
                &format!("route add fd42::/32 dev {DEVICE}"),
            ],
        );
    }

    /// Makes the path from the router to node b narrower.
    pub(crate) fn narrow(&self, mtu: u32) {
        ip(&self.router, &[&format!("link set right mtu {mtu}")]);
        ip(&self.nodes[1], &[&format!("link set eth0 mtu {mtu}")]);
    }

    /// Sends bytes from one pod to the other over TCP, and back; all of them must come.
    pub(crate) fn tcp(&self, from: usize, is_v6: bool, bytes: usize) {
        let to = 1 - from;
        let server = SocketAddr::new(pod(to, is_v6), 0);
        let listener = in_namespace(&self.pods[to], || TcpListener::bind(server).expect("bind")).expect("inside");
        let at = listener.local_addr().expect("an address");
        let byte = |index: usize| (index.wrapping_mul(2_654_435_761) >> 13) as u8;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().expect("accept");
                let mut copy = stream.try_clone().expect("clone");
                let _ = std::io::copy(&mut stream, &mut copy);
            });
            let connect = || TcpStream::connect_timeout(&at, PATIENCE).expect("connect");
            let mut stream = in_namespace(&self.pods[from], connect).expect("inside");
            stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
            stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
            let mut writer = stream.try_clone().expect("clone");
            scope.spawn(move || {
                let all: Vec<u8> = (0..bytes).map(byte).collect();
                writer.write_all(&all).expect("write");
                writer.shutdown(std::net::Shutdown::Write).expect("shutdown");
            });
            let mut back = Vec::new();
            stream.read_to_end(&mut back).expect("read");
            assert_eq!(back.len(), bytes);
            assert!(back.iter().enumerate().all(|(index, it)| *it == byte(index)), "bytes changed on the way");
        });
    }

    /// A UDP socket of a pod.
    pub(crate) fn socket(&self, index: usize, is_v6: bool) -> UdpSocket {
        let bind = || UdpSocket::bind(SocketAddr::new(pod(index, is_v6), 0)).expect("bind");
        let socket = in_namespace(&self.pods[index], bind).expect("inside");
        socket.set_read_timeout(Some(Duration::from_millis(500))).expect("timeout");
        socket
    }

    /// Sends a datagram from one pod to the other until it comes. How often it was sent.
    pub(crate) fn udp(&self, from: usize, is_v6: bool, bytes: usize) -> usize {
        let (one, other) = (self.socket(from, is_v6), self.socket(1 - from, is_v6));
        let to = other.local_addr().expect("an address");
        let datagram: Vec<u8> = (0..bytes).map(|index| index as u8).collect();
        let mut buffer = vec![0; 1 << 16];
        for attempt in 1..=5 {
            // What the kernel knows of the path may make it refuse one.
            let _ = one.send_to(&datagram, to);
            if let Ok(length) = other.recv(&mut buffer) {
                assert_eq!(buffer[..length], datagram);
                return attempt;
            }
        }
        panic!("a datagram of {bytes} bytes never came");
    }
}

/// Waits until something is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(2));
    }
}
