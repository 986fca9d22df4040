//! IP in IP in a real kernel: what we write is what `ip` reads, packets pass a router that knows no pod, and every
//! damage is mended.
//!
//! ```text
//!  node 11 ── 192.168.64.0/24 ── router ── 192.168.65.0/24 ── node 12
//!  (.11)                       (.1)  (.1)                     (.12)
//! ```
//!
//! and the same with IPv6. Each of the three is a network namespace without a name. Few kernels of build machines
//! have IP in IP: `cargo xtask guest` boots one that has.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a test fails by panicking and says what it skips")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use portolan_kernel::KernelError;
use portolan_kernel::link::Links;
use portolan_kernel::monitor::Monitor;
use portolan_kernel::netlink::{Netlink, Report};
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Family, IpNet, MacAddress, Origin};
use portolan_program::netlink::{Address, Change, Link, LinkKind, Program, Route, diff, fabric};

/// No test waits so long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// Two nodes on two segments, and the router between them.
struct World {
    nodes: [(Namespace, Program); 2],
    _router: Namespace,
}

fn prefix(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn segment(node: u8) -> u8 {
    if node == 11 { 64 } else { 65 }
}

fn underlay(node: u8, host: u8, family: Family) -> IpNet {
    let segment = segment(node);
    match family {
        Family::V4 => prefix(&format!("192.168.{segment}.{host}/24")),
        Family::V6 => prefix(&format!("fd00:{segment}::{host}/64")),
    }
}

fn pods(node: u8, family: Family) -> IpNet {
    match family {
        Family::V4 => prefix(&format!("10.42.{node}.0/24")),
        Family::V6 => prefix(&format!("fd00:42:0:{node}::/64")),
    }
}

fn pod(node: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => address(&format!("10.42.{node}.1")),
        Family::V6 => address(&format!("fd00:42:0:{node}::1")),
    }
}

/// What a node of the `ipip` fabric holds for one peer.
fn program(node: u8, peer: u8) -> Program {
    let origin = || Origin::configuration("test");
    let mut program = Program::default();
    let mut link = |name: &str, kind, mac| {
        let alias = "portolan:test".to_owned();
        let link = Link { name: name.to_owned(), kind, mac, mtu: 1460, alias, up: true, origin: origin() };
        program.links.insert(name.to_owned(), link);
    };
    link("cni0", LinkKind::Bridge, Some(MacAddress([2, 0, 0, 0, 0, node])));
    for family in Family::ALL {
        let local = underlay(node, node, family).addr();
        link(fabric::ipip_device(family), LinkKind::Ipip { local, remote: None }, None);
    }
    for family in Family::ALL {
        let own = pods(node, family);
        let bridge = IpNet::new(pod(node, family), own.prefix_len()).expect("a prefix");
        let device = fabric::ipip_device(family);
        for (device, prefix) in [("cni0", bridge), (device, own.network().into())] {
            let address = Address { device: device.to_owned(), prefix, origin: origin() };
            program.addresses.insert((device.to_owned(), prefix), address);
        }
        let (destination, gateway) = (pods(peer, family), underlay(peer, peer, family).addr());
        let route = Route { destination, device: device.to_owned(), gateway, onlink: true, origin: origin() };
        program.routes.insert(destination, route);
    }
    program
}

fn shell(commands: &str) -> String {
    let output = Command::new("sh").args(["-ec", commands]).output().expect("a shell");
    assert!(output.status.success(), "{commands}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The two nodes, each as its program says; nothing where the kernel lacks what they need.
fn world() -> Option<World> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return None;
    }
    let make = || Namespace::create_unnamed().expect("a namespace");
    let (router, one, two) = (make(), make(), make());
    for kind in ["ipip", "ip6tnl"] {
        let trial =
            format!("ip link add trial type {kind} local {}", if kind == "ipip" { "192.0.2.1" } else { "fd00::1" });
        let made = in_namespace(&make(), || Command::new("sh").args(["-c", &trial]).output()).expect("a thread");
        if !made.is_ok_and(|output| output.status.success()) {
            println!("skipped: this kernel has no {kind}: run `cargo xtask guest`");
            return None;
        }
    }
    let nodes = [(11, one), (12, two)].map(|(number, namespace)| {
        cable(&router, &namespace, number);
        (namespace, program(number, if number == 11 { 12 } else { 11 }))
    });
    for (namespace, desired) in &nodes {
        let open = || converge(&mut Netlink::open().expect("netlink"), desired);
        in_namespace(namespace, open).expect("in the namespace");
    }
    Some(World { nodes, _router: router })
}

fn cable(router: &Namespace, node: &Namespace, number: u8) {
    let name = format!("to{number}");
    let mut here = Links::open(router).expect("links");
    let mut there = Links::open(node).expect("links");
    here.create_veth(&name, "eth0", node, None).expect("a cable");
    for family in Family::ALL {
        here.add_address(&name, underlay(number, 1, family)).expect("an address");
        there.add_address("eth0", underlay(number, number, family)).expect("an address");
    }
    here.set_up(&name).expect("up");
    there.set_up("lo").expect("up");
    there.set_up("eth0").expect("up");
    for (family, everywhere) in [(Family::V4, "0.0.0.0/0"), (Family::V6, "::/0")] {
        let gateway = underlay(number, 1, family).addr();
        there.add_route("eth0", prefix(everywhere), Some(gateway)).expect("a route");
    }
    here.settle(&name).expect("settled");
    there.settle("eth0").expect("settled");
    for namespace in [router, node] {
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding";
        in_namespace(namespace, || shell(forward)).expect("in the namespace");
    }
}

fn steps(netlink: &mut Netlink, desired: &Program) -> Vec<Change> {
    let observed = netlink.observe().expect("observed");
    diff(desired, &observed.ours, &observed.others)
}

fn converge(netlink: &mut Netlink, desired: &Program) -> Report {
    let changes = steps(netlink, desired);
    let report = netlink.apply(&changes);
    assert_eq!(report.failed, []);
    assert_eq!(steps(netlink, desired), []);
    report
}

/// Sends a datagram from one node's bridge to the other's, again and again until it arrives whole.
fn pass(world: &World, family: Family, length: usize) {
    let bind = |index: usize, number| {
        let bind = || UdpSocket::bind(SocketAddr::new(pod(number, family), 0));
        in_namespace(&world.nodes[index].0, bind).expect("in the namespace").expect("a socket")
    };
    let (sender, receiver) = (bind(0, 11), bind(1, 12));
    receiver.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    let (sent, mut buffer) = (vec![7; length], vec![0; 65_536]);
    let begun = Instant::now();
    loop {
        // An error of the datagram before is told by the next one.
        let _ = sender.send_to(&sent, receiver.local_addr().expect("an address"));
        if let Ok((received, from)) = receiver.recv_from(&mut buffer) {
            assert_eq!((received, from.ip()), (length, pod(11, family)));
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{length} bytes of {family} do not pass");
    }
}

#[test]
fn datagrams_of_both_families_pass_a_router_that_knows_no_pod() {
    let Some(world) = world() else { return };
    for family in Family::ALL {
        pass(&world, family, 100);
        // The largest datagrams of UDP, in fragments.
        pass(&world, family, 65_507 - 20);
    }
    let (node, desired) = &world.nodes[0];
    in_namespace(node, || {
        let shown = shell("ip -d link show flannel.ipip");
        assert!(shown.contains("mtu 1460") && shown.contains("ipip"), "{shown}");
        assert!(shown.contains("remote any local 192.168.64.11"), "{shown}");
        let shown = shell("ip -d link show flannel-v6.ipip");
        assert!(shown.contains("ip6ip6 remote any local fd00:64::11") && shown.contains("encaplimit none"), "{shown}");
        let shown = shell("ip route show 10.42.12.0/24");
        assert!(shown.starts_with("10.42.12.0/24 via 192.168.65.12 dev flannel.ipip proto 144 onlink"), "{shown}");
        let mut netlink = Netlink::open().expect("netlink");
        assert_eq!(netlink.apply(&steps(&mut Netlink::open().expect("netlink"), desired)).messages, 0);
        let changes = steps(&mut netlink, &Program::default());
        assert_eq!(netlink.apply(&changes).failed, []);
        assert!(!shell("ip link").contains("flannel"));
    })
    .expect("in the namespace");
}

#[test]
fn every_damage_is_heard_and_mended() {
    let Some(world) = world() else { return };
    let (node, desired) = &world.nodes[0];
    in_namespace(node, || {
        let mut netlink = Netlink::open().expect("netlink");
        let mut monitor = Monitor::open().expect("a monitor");
        monitor.ignore_port(netlink.port());
        for family in Family::ALL {
            let (device, peer) = (fabric::ipip_device(family), pods(12, family));
            let (ip, kind) = match family {
                Family::V4 => ("ip -4", "ipip"),
                Family::V6 => ("ip -6", "ip6tnl"),
            };
            let wrong = underlay(12, 99, family).addr();
            let own = pods(11, family).network();
            for damage in [
                format!("ip link del {device}"),
                format!("ip link set {device} down"),
                format!("ip link set {device} mtu 1400"),
                format!("ip link set {device} alias ''"),
                format!("ip link set {device} type {kind} local {}", underlay(11, 99, family).addr()),
                format!("{ip} addr del {own} dev {device}"),
                format!("{ip} route del {peer}"),
                format!("{ip} route flush proto 144"),
                format!("{ip} route replace {peer} via {wrong} dev {device} onlink proto 144"),
            ] {
                while monitor.next_event().is_some() {}
                shell(&damage);
                let begun = Instant::now();
                while monitor.next_event().is_none() {
                    assert!(begun.elapsed() < PATIENCE, "nobody tells of `{damage}`");
                    monitor.wait(100);
                }
                assert_ne!(steps(&mut netlink, desired), [], "`{damage}` is not seen");
                converge(&mut netlink, desired);
                pass(&world, family, 100);
            }
        }
    })
    .expect("in the namespace");
}

#[test]
fn a_tunnel_of_flannel_is_adopted_and_another_one_with_its_ends_is_named() {
    let Some(world) = world() else { return };
    let (node, desired) = &world.nodes[0];
    in_namespace(node, || {
        let mut netlink = Netlink::open().expect("netlink");
        // As flanneld leaves it.
        shell("ip link del flannel.ipip; ip link add flannel.ipip type ipip local 192.168.64.11 nopmtudisc");
        let before = shell("ip -o link show flannel.ipip");
        converge(&mut netlink, desired);
        let index = |text: &str| text.split(':').next().map(str::to_owned);
        assert_eq!(index(&shell("ip -o link show flannel.ipip")), index(&before));
        shell("ip link del flannel.ipip; ip link add other type ipip local 192.168.64.11");
        let changes = steps(&mut netlink, desired);
        let report = netlink.apply(&changes);
        // The link, its address, and the peer's route.
        assert_eq!(report.failed.len(), 3, "{report:?}");
        assert!(matches!(&report.failed[0].1, KernelError::Foreign { name, .. } if name == "other"), "{report:?}");
    })
    .expect("in the namespace");
    pass(&world, Family::V6, 100);
}
