//! Every kind of damage, in both families: it is heard, and mended so that packets pass again.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use portolan_net::Family;
use portolan_program::netlink::{LinkKind, Program, fabric};

use super::sample::{converge, join, mac, namespace, node, on_node, pod_address, pod_prefix, steps, underlay, vni};
use crate::link::Links;
use crate::monitor::Monitor;
use crate::netlink::Netlink;
use crate::netns::{Namespace, in_namespace};

/// No wait is so long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(10);

/// What somebody does to a node, as a shell's commands.
fn shell(commands: &str) {
    let output = Command::new("sh").args(["-ec", commands]).output().unwrap();
    assert!(output.status.success(), "{commands}: {}", String::from_utf8_lossy(&output.stderr));
}

/// All that can happen to the tunnel of a family, and to the entries of the peer 12 on it.
fn damages(family: Family) -> Vec<String> {
    let device = fabric::device(vni(), family);
    let ip = match family {
        Family::V4 => "ip -4",
        Family::V6 => "ip -6",
    };
    let (prefix, mac) = (pod_prefix(12, family), mac(12, family));
    let (hop, own) = (prefix.network(), pod_prefix(11, family).network());
    let (wrong, wrong_mac) = (underlay(99, family), "02:00:00:00:00:99");
    vec![
        format!("ip link del {device}"),
        format!("ip link set {device} down"),
        format!("ip link set {device} down; ip link set {device} up"),
        format!("ip link set {device} address {wrong_mac}"),
        format!("ip link set {device} mtu 1300"),
        format!("ip link set {device} alias ''"),
        format!("{ip} addr del {own} dev {device}"),
        format!("{ip} addr flush dev {device}"),
        format!("{ip} route del {prefix}"),
        format!("{ip} route flush proto 144"),
        format!("{ip} route replace {prefix} via {wrong} dev eth0 proto 144"),
        format!("{ip} route replace {prefix} dev eth0 proto 144"),
        format!("{ip} neigh del {hop} dev {device}"),
        format!("{ip} neigh flush dev {device} nud permanent"),
        format!("{ip} neigh replace {hop} lladdr {wrong_mac} dev {device} nud permanent"),
        format!("{ip} neigh replace {hop} lladdr {wrong_mac} dev {device} nud reachable"),
        format!("bridge fdb del {mac} dev {device}"),
        format!("bridge fdb replace {mac} dev {device} dst {wrong} self permanent"),
        format!("bridge fdb replace {mac} dev {device} dst {wrong} self static"),
        format!("bridge fdb add {wrong_mac} dev {device} dst {wrong} self permanent"),
    ]
}

/// The nodes 11 and 12 and what each must hold.
fn pair() -> Option<[(Namespace, Program); 2]> {
    let (a, b) = (namespace()?, namespace()?);
    join(&a, 11, &b, 12);
    let nodes = [(a, node(11, &[12])), (b, node(12, &[11]))];
    for (namespace, desired) in &nodes {
        in_namespace(namespace, || converge(&mut Netlink::open().unwrap(), desired)).unwrap();
    }
    Some(nodes)
}

/// Sends a datagram from one node's bridge to the other's, again and again until it arrives: the underlay may have to
/// find its neighbours anew.
fn pass(from: &Namespace, to: &Namespace, family: Family) {
    let bind = |namespace, number| {
        let address = SocketAddr::new(pod_address(number, 1, family), 0);
        in_namespace(namespace, || UdpSocket::bind(address)).unwrap().unwrap()
    };
    let (sender, receiver) = (bind(from, 11), bind(to, 12));
    receiver.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let begun = std::time::Instant::now();
    loop {
        // An error of the datagram before is told by the next one.
        let _ = sender.send_to(b"after the damage", receiver.local_addr().unwrap());
        if receiver.recv(&mut [0; 20]).is_ok() {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "nothing passes in {family}");
    }
}

/// Waits until something is heard, and hears all of it.
fn hear(monitor: &mut Monitor) -> bool {
    let begun = std::time::Instant::now();
    while begun.elapsed() < PATIENCE {
        if monitor.next_event().is_some() {
            while monitor.next_event().is_some() {}
            return true;
        }
        monitor.wait(100);
    }
    false
}

fn quiet(monitor: &mut Monitor) {
    loop {
        monitor.wait(200);
        if monitor.next_event().is_none() {
            return;
        }
    }
}

#[test]
fn every_damage_of_a_tunnel_is_heard_and_mended() {
    let Some([(a, desired), (b, _)]) = pair() else { return };
    in_namespace(&a, || {
        let mut netlink = Netlink::open().unwrap();
        let mut monitor = Monitor::open().unwrap();
        monitor.ignore_port(netlink.port());
        for family in Family::ALL {
            for damage in damages(family) {
                quiet(&mut monitor);
                shell(&damage);
                assert!(hear(&mut monitor), "nobody tells of `{damage}`");
                assert_ne!(steps(&mut netlink, &desired), [], "`{damage}` is not seen");
                converge(&mut netlink, &desired);
                Family::ALL.into_iter().for_each(|family| pass(&a, &b, family));
            }
        }
    })
    .unwrap();
}

#[test]
fn a_parent_that_goes_and_comes_back_finds_all_its_peers() {
    let Some([(a, desired), (b, other)]) = pair() else { return };
    in_namespace(&a, || {
        let mut netlink = Netlink::open().unwrap();
        let again = "ip addr replace 192.168.64.11/24 dev eth0; ip addr replace fd00:64::11/64 dev eth0 nodad";
        for damage in [
            format!("ip link set eth0 down; ip link set eth0 up; {again}"),
            format!("ip addr flush dev eth0 scope global; {again}"),
        ] {
            shell(&damage);
            converge(&mut netlink, &desired);
            Family::ALL.into_iter().for_each(|family| pass(&a, &b, family));
        }
        // The kernel takes a tunnel with its parent.
        Links::current().unwrap().delete("eth0").unwrap();
        join(&a, 11, &b, 12);
        in_namespace(&b, || converge(&mut Netlink::open().unwrap(), &other)).unwrap();
        assert!(steps(&mut netlink, &desired).len() >= 2 * (1 + 1 + 3));
        converge(&mut netlink, &desired);
        Family::ALL.into_iter().for_each(|family| pass(&a, &b, family));
    })
    .unwrap();
}

#[test]
fn a_parent_with_another_address_gets_another_tunnel() {
    let Some([(a, mut desired), (b, mut other)]) = pair() else { return };
    for family in Family::ALL {
        let device = fabric::device(vni(), family);
        if let Some(LinkKind::Vxlan { local, .. }) = desired.links.get_mut(&device).map(|link| &mut link.kind) {
            *local = underlay(21, family);
        }
        for entry in other.forwarding.values_mut().filter(|entry| entry.device == device) {
            entry.remote = underlay(21, family);
        }
    }
    in_namespace(&a, || {
        shell("ip addr flush dev eth0 scope global");
        shell("ip addr add 192.168.64.21/24 dev eth0; ip addr add fd00:64::21/64 dev eth0 nodad");
        converge(&mut Netlink::open().unwrap(), &desired);
    })
    .unwrap();
    in_namespace(&b, || {
        // Only the entries that name the node's address change.
        assert_eq!(converge(&mut Netlink::open().unwrap(), &other).messages, 2);
    })
    .unwrap();
    Family::ALL.into_iter().for_each(|family| pass(&a, &b, family));
}

#[test]
fn plain_routes_are_mended_too() {
    on_node(|_| {
        let mut desired = node(11, &[]);
        desired.links.retain(|name, _| name == "cni0");
        desired.addresses.retain(|(device, _), _| device == "cni0");
        for family in Family::ALL {
            for (destination, mut route) in node(11, &[12, 13]).routes {
                if Family::of_prefix(&destination) == family {
                    let number = if destination == pod_prefix(12, family) { 12 } else { 13 };
                    (route.device, route.gateway) = ("eth0".into(), underlay(number, family));
                    route.onlink = false;
                    desired.routes.insert(destination, route);
                }
            }
        }
        let mut netlink = Netlink::open().unwrap();
        let mut monitor = Monitor::open().unwrap();
        monitor.ignore_port(netlink.port());
        converge(&mut netlink, &desired);
        let again = "ip addr replace fd00:64::11/64 dev eth0 nodad";
        for damage in [
            "ip route del 10.42.12.0/24",
            "ip -6 route del fd00:42:0:12::/64",
            "ip route flush proto 144",
            "ip -6 route flush proto 144",
            "ip route replace 10.42.13.0/24 via 192.168.64.99 proto 144",
            "ip -6 route replace fd00:42:0:13::/64 via fd00:64::99 proto 144",
            &format!("ip link set eth0 down; ip link set eth0 up; {again}"),
        ] {
            quiet(&mut monitor);
            shell(damage);
            assert!(hear(&mut monitor), "nobody tells of `{damage}`");
            assert_ne!(steps(&mut netlink, &desired), [], "`{damage}` is not seen");
            converge(&mut netlink, &desired);
        }
    });
}

#[test]
fn what_is_set_for_a_tunnel_is_read_back_and_a_change_makes_it_anew() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        let plain = node(11, &[12]);
        converge(&mut netlink, &plain);
        let mut desired = plain.clone();
        for link in desired.links.values_mut() {
            link.mtu = 1400;
            if let LinkKind::Vxlan { port, gbp, learning, .. } = &mut link.kind {
                (*port, *gbp, *learning) = (4789, true, true);
            }
        }
        converge(&mut netlink, &desired);
        let shown = Command::new("ip").args(["-d", "link", "show", "flannel.1"]).output().unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        for word in ["mtu 1400", "vxlan id 1", "dstport 4789", " gbp", &mac(11, Family::V4).to_string()] {
            assert!(shown.contains(word), "{word}: {shown}");
        }
        assert!(!shown.contains("nolearning"), "{shown}");
        // What somebody switches on a tunnel that stands is seen.
        converge(&mut netlink, &plain);
        shell("ip link set flannel.1 type vxlan learning");
        assert_eq!(steps(&mut netlink, &plain).len(), 1 + 5);
        converge(&mut netlink, &plain);
        assert_eq!(netlink.observe().unwrap().ours.links["flannel.1"].mac, Some(mac(11, Family::V4)));
    });
}
