//! Real packets through the forwarder of the `udp` fabric, between network namespaces.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a test fails by panicking and says what it skips")]

mod baseline;
mod world;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use baseline::Baseline;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_kernel::process::enter_on_start;
use portolan_kernel::udp::UdpRoom;
use portolan_net::Origin;
use portolan_program::udp::{Change, DropReason, Route, diff};
use world::{DEVICE, MTU, PATIENCE, PORT, World, address, ip, node, pod, until};

/// An environment variable that makes [`child`] forward: the number of its node.
const CHILD: &str = "PORTOLAN_TEST_UDP_NODE";

#[test]
fn tcp_and_udp_pass_both_ways_in_both_families() {
    let Some(world) = World::new() else { return };
    let rooms = [world.start(0), world.start(1)];
    for is_v6 in [false, true] {
        for from in [0, 1] {
            world.tcp(from, is_v6, 8 << 20);
            for bytes in [1, 1000, 1424, 9000, 65_000] {
                world.udp(from, is_v6, bytes);
            }
        }
    }
    for room in &rooms {
        let counters = room.counters();
        assert!(counters.sent_bytes > 32 << 20 && counters.received_bytes > 32 << 20, "{counters:?}");
        assert_eq!((counters.dropped(DropReason::Malformed), counters.dropped(DropReason::UnknownPeer)), (0, 0));
    }
    let [one, other] = rooms.map(|room| room.counters());
    assert_eq!(one.sent_packets, other.received_packets, "{one:?} {other:?}");
    assert_eq!(one.sent_bytes, other.received_bytes, "{one:?} {other:?}");
}

#[test]
fn many_small_datagrams_come_whole_and_in_order() {
    let Some(world) = World::new() else { return };
    let rooms = [world.start(0), world.start(1)];
    for is_v6 in [false, true] {
        // So that all neighbours on the way know each other.
        world.udp(0, is_v6, 10);
        let (one, other) = (world.socket(0, is_v6), world.socket(1, is_v6));
        let to = other.local_addr().expect("an address");
        let mut next = 0u32;
        for _ in 0..20 {
            // As many as the receiver's buffer holds, at once: they meet in the queues and are joined.
            let burst = next..next + 100;
            for number in burst.clone() {
                one.send_to(&[number.to_be_bytes(); 16].concat(), to).expect("sent");
            }
            let mut buffer = [0; 128];
            for number in burst {
                let length = other.recv(&mut buffer).expect("it comes");
                assert_eq!(buffer[..length], [number.to_be_bytes(); 16].concat());
                next += 1;
            }
        }
    }
    for room in &rooms {
        let counters = room.counters();
        assert_eq!(counters.dropped(DropReason::DeviceRefused), 0, "{counters:?}");
    }
}

/// A socket that hears the ICMP messages of a namespace.
fn listen(namespace: &Namespace, is_v6: bool) -> OwnedFd {
    let (family, protocol) =
        if is_v6 { (AddressFamily::Inet6, SockProtocol::IcmpV6) } else { (AddressFamily::Inet, SockProtocol::Icmp) };
    let open = || socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).expect("a raw socket");
    let socket = in_namespace(namespace, open).expect("inside");
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(5, 0)).expect("timeout");
    socket
}

/// The next ICMP error: type, code, and the number in it.
fn hear(socket: &OwnedFd, is_v6: bool) -> (u8, u8, u32) {
    let mut buffer = [0; 2048];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).expect("an ICMP error");
        let message = &buffer[if is_v6 { 0 } else { 20 }..length];
        let is_error = if is_v6 { message[0] < 128 } else { [3, 11].contains(&message[0]) };
        if is_error {
            return (message[0], message[1], u32::from_be_bytes([message[4], message[5], message[6], message[7]]));
        }
    }
}

#[test]
fn a_sender_is_told_when_hops_run_out_and_where_no_route_leads() {
    let Some(world) = World::new() else { return };
    let rooms = [world.start(0), world.start(1)];
    for (is_v6, exceeded, unreachable) in [(false, (11, 0, 0), (3, 0, 0)), (true, (3, 0, 0), (1, 0, 0))] {
        let heard = listen(&world.pods[0], is_v6);
        let socket = world.socket(0, is_v6);
        // The node takes the first hop, and the tunnel would take the second.
        if is_v6 {
            setsockopt(&socket, sockopt::Ipv6Ttl, &2).expect("hop limit");
        } else {
            socket.set_ttl(2).expect("ttl");
        }
        socket.send_to(b"far", SocketAddr::new(pod(1, is_v6), 33_434)).expect("sent");
        assert_eq!(hear(&heard, is_v6), exceeded);
        let other = world.socket(0, is_v6);
        let nowhere = address(if is_v6 { "fd42:0:0:9::9" } else { "10.42.9.9" });
        other.send_to(b"lost", SocketAddr::new(nowhere, 9)).expect("sent");
        assert_eq!(hear(&heard, is_v6), unreachable);
    }
    // An answer is counted after it was sent.
    until("four answers are counted", || rooms[0].counters().answers == 4);
    let counters = rooms[0].counters();
    assert_eq!((counters.dropped(DropReason::TimeExceeded), counters.dropped(DropReason::NoRoute)), (2, 2));
}

#[test]
fn a_narrow_path_is_found_and_senders_follow_it() {
    let Some(world) = World::new() else { return };
    let rooms = [world.start(0), world.start(1)];
    world.narrow(1300);
    for is_v6 in [false, true] {
        let heard = listen(&world.pods[0], is_v6);
        world.tcp(0, is_v6, 4 << 20);
        let inside = 1300 - if is_v6 { 48 } else { 28 };
        let peer = SocketAddr::new(node(1, is_v6), PORT);
        let known = rooms[0].narrow_paths();
        assert!(known.contains(&(peer, inside)), "{known:?}");
        // No IPv6 sender needs to send less than 1280: the tunnel's own packets are divided instead (RFC 2473 §7.1).
        let expected = if is_v6 { (2, 0, 1280) } else { (3, 4, inside) };
        assert_eq!(hear(&heard, is_v6), expected);
        world.tcp(1, is_v6, 4 << 20);
        for bytes in [1180, 1400, 30_000] {
            world.udp(0, is_v6, bytes);
            world.udp(1, is_v6, bytes);
        }
    }
    assert!(rooms[0].counters().dropped(DropReason::TooBig) > 0);
}

#[test]
fn a_packet_that_may_be_divided_is_divided_for_a_narrow_path() {
    let Some(world) = World::new() else { return };
    let rooms = [world.start(0), world.start(1)];
    world.narrow(1000);
    let (one, other) = (world.socket(0, false), world.socket(1, false));
    // IP_PMTUDISC_DONT: "don't fragment" is not set.
    let off: libc::c_int = libc::IP_PMTUDISC_DONT;
    // SAFETY: the pointer and the length are those of `off`.
    let outcome = unsafe {
        let length = size_of_val(&off) as libc::socklen_t;
        libc::setsockopt(one.as_raw_fd(), libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, (&raw const off).cast(), length)
    };
    assert_eq!(outcome, 0);
    let mut buffer = vec![0; 2000];
    let heard = (0..5).any(|_| {
        one.send_to(&[9; 1400], other.local_addr().expect("an address")).expect("sent");
        other.recv(&mut buffer).is_ok_and(|length| length == 1400)
    });
    assert!(heard, "{:?} {:?}", rooms[0].counters(), rooms[0].narrow_paths());
    assert_eq!(rooms[0].counters().dropped(DropReason::TooBig), 0);
}

#[test]
fn what_no_peer_sent_is_dropped_and_counted() {
    let Some(world) = World::new() else { return };
    let rooms = [world.start(0), world.start(1)];
    let target = world.socket(0, false);
    target.set_nonblocking(true).expect("nonblocking");
    let port = target.local_addr().expect("an address").port();
    // A packet from pod b to pod a, as node b would send it, without a UDP checksum.
    let mut packet = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 42, 2, 2, 10, 42, 1, 2];
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([0x30, 0x39, (port >> 8) as u8, port as u8, 0, 12, 0, 0]);
    packet.extend(b"evil");
    let send = |from: &Namespace, local: SocketAddr| {
        in_namespace(from, || {
            let socket = UdpSocket::bind(local).expect("bind");
            socket.send_to(&packet, SocketAddr::new(node(0, false), PORT)).expect("sent");
        })
        .expect("inside");
    };
    // Another address, and the peer's address with another port.
    send(&world.router, SocketAddr::new(address("192.0.2.1"), PORT));
    send(&world.nodes[1], SocketAddr::new(node(1, false), PORT + 1));
    until("both are counted", || rooms[0].counters().dropped(DropReason::UnknownPeer) == 2);
    let mut buffer = [0; 64];
    assert!(target.recv(&mut buffer).is_err(), "a forged packet came through");
    // The same from the peer's own port, in whose place we send, comes through.
    let [first, second] = rooms;
    drop(second);
    send(&world.nodes[1], SocketAddr::new(node(1, false), PORT));
    until("the peer's is delivered", || target.recv(&mut buffer).is_ok());
    assert_eq!(&buffer[..4], b"evil");
    assert_eq!(first.counters().dropped(DropReason::UnknownPeer), 2);
}

#[test]
fn a_new_table_loses_nothing() {
    let Some(world) = World::new() else { return };
    let mut rooms = [world.start(0), world.start(1)];
    let (one, other) = (world.socket(0, false), world.socket(1, false));
    let to = other.local_addr().expect("an address");
    let (is_done, received) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut sent = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 64];
            while !is_done.load(Ordering::Relaxed) {
                if other.recv(&mut buffer).is_ok() {
                    received.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        for round in 0..500u32 {
            let prefix = format!("10.42.{}.0/24", 3 + round % 200).parse().expect("a prefix");
            let route = Route { peer: "192.0.2.9:8285".parse().expect("a peer"), origin: Origin::configuration("x") };
            let change = if round % 3 == 0 { Change::RemoveRoute(prefix) } else { Change::SetRoute(prefix, route) };
            for room in &mut rooms {
                assert_eq!(room.apply(std::slice::from_ref(&change)).failed, []);
            }
            for _ in 0..10 {
                one.send_to(b"count me", to).expect("sent");
                sent += 1;
            }
            // The receiver's buffer is not what is tested.
            until("it is received", || sent - received.load(Ordering::Relaxed) < 100);
        }
        until("all are received", || received.load(Ordering::Relaxed) == sent);
        is_done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_node_of_ours_and_a_plain_one_understand_each_other() {
    let Some(world) = World::new() else { return };
    let room = world.start(0);
    let local = SocketAddr::new(node(1, false), PORT);
    let ways = vec![(Ipv4Addr::new(10, 42, 1, 0), 24, SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 2), PORT))];
    let open = || Baseline::open(DEVICE, local, ways).expect("a plain forwarder");
    let mut plain = in_namespace(&world.nodes[1], open).expect("inside");
    world.dress(1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| plain.run(&stop).expect("it forwards"));
        for from in [0, 1] {
            world.tcp(from, false, 4 << 20);
            for bytes in [1, 1424, 20_000] {
                world.udp(from, false, bytes);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(room.counters().dropped(DropReason::Malformed), 0);
}

/// Not a test by itself: the process that is killed.
#[test]
fn child() {
    let Some(index) = std::env::var(CHILD).ok().and_then(|index| index.parse::<usize>().ok()) else { return };
    let mut room = UdpRoom::new();
    let changes = diff(&room.observe(), &World::program(index));
    assert_eq!(room.apply(&changes).failed, []);
    std::thread::sleep(PATIENCE * 10);
}

fn start_child(world: &World, index: usize) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.args(["--exact", "child", "--nocapture"]).env(CHILD, index.to_string()).stdout(Stdio::null());
    enter_on_start(&mut command, &world.nodes[index]).expect("it enters");
    command.spawn().expect("it starts")
}

#[test]
fn a_killed_forwarder_leaves_its_device_and_starts_again_on_it() {
    let Some(world) = World::new() else { return };
    let _other = world.start(1);
    let mut child = start_child(&world, 0);
    let has_device = || {
        let show = || Command::new("ip").args(["link", "show", DEVICE]).output().expect("ip runs").status.success();
        in_namespace(&world.nodes[0], show).expect("inside")
    };
    until("the device is there", has_device);
    world.dress(0);
    world.tcp(0, false, 1 << 20);
    let (one, other) = (world.socket(0, false), world.socket(1, false));
    let to = other.local_addr().expect("an address");
    child.kill().expect("killed");
    child.wait().expect("gone");
    assert!(has_device());
    // Nothing leaves by the default route meanwhile.
    let _ = one.send_to(b"nobody forwards this", to);
    let mut child = start_child(&world, 0);
    let begin = Instant::now();
    let mut buffer = [0; 64];
    while other.recv(&mut buffer).is_err() {
        assert!(begin.elapsed() < PATIENCE, "it does not forward again");
        one.send_to(b"again", to).expect("sent");
    }
    assert_eq!(&buffer[..5], b"again");
    world.tcp(1, true, 1 << 20);
    child.kill().expect("killed");
    child.wait().expect("gone");
}

#[test]
fn a_deleted_device_is_noticed_and_made_again() {
    let Some(world) = World::new() else { return };
    let mut room = world.start(0);
    let _other = world.start(1);
    world.udp(0, false, 100);
    let before = room.counters();
    ip(&world.nodes[0], &[&format!("link delete {DEVICE}")]);
    until("it is noticed", || room.observe().tunnel.is_none());
    world.apply(0, &mut room);
    world.dress(0);
    world.udp(1, false, 100);
    assert!(room.counters().sent_packets >= before.sent_packets, "counters go on");
    in_namespace(&world.nodes[0], || room.clean(DEVICE)).expect("inside").expect("cleaned");
    ip(&world.nodes[0], &[&format!("link add {DEVICE} type veth peer name other")]);
    let tunnel = World::program(0).tunnel.expect("a tunnel");
    let failed = in_namespace(&world.nodes[0], || room.apply(&[Change::Start(tunnel)]).failed).expect("inside");
    let text = failed.first().map(|(_, error)| error.to_string()).unwrap_or_default();
    assert!(text.contains("ip link delete"), "{text}");
}

#[test]
fn a_port_that_is_taken_is_said_so() {
    let Some(world) = World::new() else { return };
    let local = SocketAddr::new(node(0, false), PORT);
    let held = in_namespace(&world.nodes[0], || UdpSocket::bind(local).expect("bind")).expect("inside");
    let tunnel = World::program(0).tunnel.expect("a tunnel");
    let mut room = UdpRoom::new();
    let mut start =
        |tunnel| in_namespace(&world.nodes[0], || room.apply(&[Change::Start(tunnel)]).failed).expect("inside");
    let failed = start(tunnel.clone());
    assert!(failed[0].1.to_string().contains("another program has the port"), "{failed:?}");
    drop(held);
    assert_eq!(start(tunnel), []);
}

#[test]
fn a_smaller_mtu_counts_at_once() {
    let Some(world) = World::new() else { return };
    let mut rooms = [world.start(0), world.start(1)];
    let heard = listen(&world.pods[0], false);
    let mut desired = World::program(0);
    desired.tunnel.iter_mut().for_each(|tunnel| tunnel.mtu = MTU - 100);
    let changes = diff(&rooms[0].observe(), &desired);
    assert_eq!(rooms[0].apply(&changes).failed, []);
    assert_eq!(diff(&rooms[0].observe(), &desired), []);
    world.tcp(0, false, 1 << 20);
    assert_eq!(hear(&heard, false), (3, 4, MTU - 100));
}
