//! Programs are loaded, read back, repaired, and others' things are left alone.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use portolan_net::Family;
use portolan_program::netlink::{Change, Program};

use super::sample::{add_peer, converge, join, namespace, node, on_node, pod_address, prefix, steps};
use crate::error::KernelError;
use crate::link::Links;
use crate::monitor::{Event, Monitor};
use crate::netlink::Netlink;
use crate::netns::{Namespace, in_namespace};

#[test]
fn what_is_applied_is_observed_and_a_second_time_costs_nothing() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        let desired = node(11, &[12, 13]);
        let report = converge(&mut netlink, &desired);
        assert!(report.applied > 10);
        let changes = steps(&mut netlink, &desired);
        assert_eq!(netlink.apply(&changes).messages, 0);
        // From nothing, as after a restart of the agent.
        assert_eq!(steps(&mut Netlink::open().unwrap(), &desired), []);
    });
}

#[test]
fn a_peer_costs_three_messages() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        let mut desired = node(11, &[12]);
        converge(&mut netlink, &desired);
        for family in Family::ALL {
            add_peer(&mut desired, 13, family);
            assert_eq!(converge(&mut netlink, &desired).messages, 3);
        }
    });
}

#[test]
fn all_that_is_ours_goes_and_what_is_not_stays() {
    on_node(|other| {
        let mut links = Links::current().unwrap();
        links.create_bridge("br-other").unwrap();
        links.set_up("br-other").unwrap();
        links.add_address("br-other", prefix("172.30.0.1/16")).unwrap();
        links.create_veth("veth-other", "x0", other, None).unwrap();
        links.add_route("br-other", prefix("172.31.0.0/16"), Some("172.30.0.9".parse().unwrap())).unwrap();
        let mut netlink = Netlink::open().unwrap();
        let before = netlink.observe().unwrap();
        assert_eq!(before.ours.links, Program::default().links);

        converge(&mut netlink, &node(11, &[12]));
        let changes = steps(&mut netlink, &Program::default());
        assert_eq!(netlink.apply(&changes).failed, []);

        let after = netlink.observe().unwrap();
        assert_eq!(after.others, before.others);
        assert_eq!(Program { sysctls: before.ours.sysctls.clone(), ..after.ours }, before.ours);
    });
}

#[test]
fn an_agent_killed_at_any_step_converges_after_it() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        let (first, second) = (node(11, &[12, 13]), node(11, &[13, 14]));
        for count in 0.. {
            converge(&mut netlink, &first);
            let changes = steps(&mut netlink, &second);
            let is_last = count >= changes.len();
            netlink.apply(&changes[..count.min(changes.len())]);
            converge(&mut netlink, &second);
            if is_last {
                break;
            }
        }
        let empty = Program::default();
        let all = steps(&mut Netlink::open().unwrap(), &empty).len();
        for count in 0..all {
            let changes = steps(&mut netlink, &empty);
            netlink.apply(&changes[..count.min(changes.len())]);
            converge(&mut netlink, &second);
        }
    });
}

#[test]
fn links_of_flannel_are_adopted_where_they_are_the_same() {
    on_node(|_| {
        let desired = node(11, &[12]);
        let mut netlink = Netlink::open().unwrap();
        // As flanneld leaves them: no alias, another hardware address, routes without our protocol.
        converge(&mut netlink, &desired);
        let mut links = Links::current().unwrap();
        links.set_alias("flannel.1", "").unwrap();
        links.set_mac("flannel.1", portolan_net::MacAddress([2, 1, 1, 1, 1, 1])).unwrap();
        let observed = netlink.observe().unwrap();
        assert!(observed.others.link("flannel.1").is_some());
        converge(&mut netlink, &desired);
    });
}

#[test]
fn a_link_of_someone_else_with_our_name_is_left_alone_and_named() {
    on_node(|other| {
        Links::current().unwrap().create_veth("flannel.1", "x1", other, None).unwrap();
        let mut netlink = Netlink::open().unwrap();
        let desired = node(11, &[12]);
        let changes = steps(&mut netlink, &desired);
        let report = netlink.apply(&changes);
        assert!(report.failed.iter().all(|(_, error)| matches!(error, KernelError::Foreign { .. })), "{report:?}");
        // The link itself, its address, and three for the peer.
        assert_eq!(report.failed.len(), 5, "{report:?}");
        let text = report.failed[0].1.to_string();
        assert!(text.contains("flannel.1") && text.contains("`veth`") && text.contains("ip link delete"), "{text}");
        // The other family is not held up.
        let observed = netlink.observe().unwrap();
        assert!(observed.ours.links.contains_key("flannel-v6.1"));
        assert!(observed.others.addresses.iter().all(|(device, _)| device != "flannel.1"));
    });
}

#[test]
fn a_route_of_someone_else_is_not_replaced() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        let mut links = Links::current().unwrap();
        links.add_route("eth0", prefix("10.42.12.0/24"), Some("192.168.64.99".parse().unwrap())).unwrap();
        let changes = steps(&mut netlink, &node(11, &[12]));
        let report = netlink.apply(&changes);
        let failed: Vec<_> = report.failed.iter().map(|(_, error)| error.to_string()).collect();
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert!(failed[0].starts_with("a route to 10.42.12.0/24 that is not ours is in the way"), "{failed:?}");
        assert!(netlink.observe().unwrap().others.routes.iter().any(|it| it.destination == prefix("10.42.12.0/24")));
    });
}

#[test]
fn what_others_delete_is_heard_and_repaired() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        let desired = node(11, &[12]);
        converge(&mut netlink, &desired);
        let mut monitor = Monitor::open().unwrap();
        monitor.ignore_port(netlink.port());
        settle(&mut monitor);
        let mut stranger = Netlink::open().unwrap();
        let route = desired.routes.values().next().unwrap().clone();
        assert_eq!(stranger.apply(&[Change::RemoveRoute(route)]).applied, 1);
        assert_eq!(next(&mut monitor), Some(Event::Route));
        assert_eq!(heard(&mut monitor), []);
        assert_eq!(converge(&mut netlink, &desired).messages, 1);
        // Our own repair makes no noise.
        assert_eq!(heard(&mut monitor), []);

        Links::current().unwrap().delete("flannel.1").unwrap();
        let mut events = Vec::new();
        while let Some(event) = monitor.next_event() {
            events.push(event);
        }
        assert!(events.contains(&Event::Link("flannel.1".into())), "{events:?}");
        assert_eq!(steps(&mut netlink, &desired).len(), 5);
        converge(&mut netlink, &desired);
    });
}

/// The first event that is not of an address: the kernel's own IPv6 addresses settle some time after their links.
fn next(monitor: &mut Monitor) -> Option<Event> {
    use nix::poll::{PollFd, PollFlags, poll};
    loop {
        poll(&mut [PollFd::new(monitor.fd(), PollFlags::POLLIN)], 2000_u16).unwrap();
        match monitor.next_event() {
            Some(Event::Address) => {}
            event => return event,
        }
    }
}

/// Lets the kernel finish what new links bring with them: it is quiet when nothing was heard for a while.
fn settle(monitor: &mut Monitor) {
    use nix::poll::{PollFd, PollFlags, poll};
    while poll(&mut [PollFd::new(monitor.fd(), PollFlags::POLLIN)], 300_u16).unwrap() > 0 {
        while monitor.next_event().is_some() {}
    }
}

/// All events that wait, without those of addresses.
fn heard(monitor: &mut Monitor) -> Vec<Event> {
    std::iter::from_fn(|| monitor.next_event()).filter(|event| *event != Event::Address).collect()
}

#[test]
fn a_tunnel_carries_datagrams_of_both_families() {
    let (Some(a), Some(b)) = (namespace(), namespace()) else { return };
    join(&a, 11, &b, 12);
    for (namespace, number, peer) in [(&a, 11, 12), (&b, 12, 11)] {
        in_namespace(namespace, || converge(&mut Netlink::open().unwrap(), &node(number, &[peer]))).unwrap();
    }
    for family in Family::ALL {
        // The bridge's addresses stand for pods.
        let (from, to) = (pod_address(11, 1, family), pod_address(12, 1, family));
        let receiver = socket(&b, SocketAddr::new(to, 0));
        let sender = socket(&a, SocketAddr::new(from, 0));
        let mut capture = in_namespace(&b, crate::capture::Capture::open).unwrap().unwrap();
        sender.send_to(b"through the tunnel", receiver.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 100];
        let (length, source) = receiver.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"through the tunnel");
        assert_eq!(source.ip(), from);
        check_capture(&mut capture, from);
    }
}

/// The packet is seen twice: inside its tunnel on the underlay, and out of it on the tunnel's device.
fn check_capture(capture: &mut crate::capture::Capture, from: std::net::IpAddr) {
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut seen = Vec::new();
    while let Some(captured) = capture.next_until(deadline).unwrap() {
        let Ok(frame) = portolan_net::parse_ethernet(&captured.bytes) else { continue };
        if frame.packet.source == from && frame.payload == b"through the tunnel" {
            assert!(captured.interface.starts_with("flannel"), "{}", captured.interface);
            assert!(captured.time > Duration::from_secs(1_000_000_000));
            assert!(seen.contains(&"eth0".to_owned()), "{seen:?}");
            return;
        }
        seen.push(captured.interface);
    }
    panic!("not seen on the tunnel, but on {seen:?}");
}

fn socket(namespace: &Namespace, address: SocketAddr) -> UdpSocket {
    let socket = in_namespace(namespace, || UdpSocket::bind(address)).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

#[test]
fn a_node_changes_from_tunnels_to_plain_routes_and_back() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        let tunnels = node(11, &[12]);
        let mut plain = node(11, &[]);
        plain.links.retain(|name, _| name == "cni0");
        plain.addresses.retain(|(device, _), _| device == "cni0");
        for (destination, route) in &tunnels.routes {
            let mut route = route.clone();
            route.device = "eth0".into();
            route.gateway = if route.gateway.is_ipv4() { "192.168.64.12" } else { "fd00:64::12" }.parse().unwrap();
            route.onlink = false;
            plain.routes.insert(*destination, route);
        }
        for _ in 0..2 {
            converge(&mut netlink, &tunnels);
            converge(&mut netlink, &plain);
        }
    });
}
