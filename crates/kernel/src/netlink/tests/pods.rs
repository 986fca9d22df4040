//! Pod interfaces: made, checked, removed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use portolan_net::Family;
use portolan_program::netlink::{Change, PodLink};

use super::sample::{converge, namespace, node, on_node, pod, pod_address, prefix, steps};
use crate::error::KernelError;
use crate::link::Links;
use crate::netlink::{Difference, Netlink};
use crate::netns::{Namespace, in_namespace};

#[test]
fn two_pods_of_one_bridge_talk() {
    on_node(|_| {
        let (a, b) = (namespace().unwrap(), namespace().unwrap());
        let mut netlink = Netlink::open().unwrap();
        let mut desired = node(11, &[]);
        for (number, namespace) in [(7, &a), (8, &b)] {
            let pod = pod(11, number, namespace);
            desired.pods.insert(pod.key.clone(), pod);
        }
        converge(&mut netlink, &desired);
        for pod in desired.pods.values() {
            assert_eq!(netlink.check_pod(pod), Ok(()));
        }
        for family in Family::ALL {
            assert_eq!(exchange(&a, &b, pod_address(11, 8, family)), pod_address(11, 7, family));
        }
    });
}

/// Says something from one namespace to another over TCP, and returns the address that was seen.
fn exchange(from: &Namespace, to: &Namespace, address: std::net::IpAddr) -> std::net::IpAddr {
    let listener = in_namespace(to, || TcpListener::bind(SocketAddr::new(address, 0))).unwrap().unwrap();
    let target = listener.local_addr().unwrap();
    let connect = || TcpStream::connect_timeout(&target, Duration::from_secs(5));
    let mut client = in_namespace(from, connect).unwrap().unwrap();
    client.write_all(b"hello").unwrap();
    drop(client);
    let (mut server, source) = listener.accept().unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    source.ip()
}

#[test]
fn a_check_finds_what_was_changed() {
    on_node(|_| {
        let inside = namespace().unwrap();
        let mut netlink = Netlink::open().unwrap();
        converge(&mut netlink, &node(11, &[]));
        let pod = pod(11, 7, &inside);
        assert_eq!(netlink.apply(&[Change::CreatePod(pod.clone())]).failed, []);
        let remove = in_namespace(&inside, || {
            let mut inside = Netlink::open().unwrap();
            let address = inside.observe().unwrap().ours.addresses.into_values().find(|it| it.prefix.addr().is_ipv4());
            inside.apply(&[Change::RemoveAddress(address.unwrap())])
        });
        assert_eq!(remove.unwrap().applied, 1);
        let found = netlink.check_pod(&pod).unwrap_err();
        let address = prefix("10.42.11.7/24");
        assert!(found.contains(&Difference::NoAddress { interface: "eth0".into(), address }), "{found:?}");
        assert!(found.contains(&Difference::NoDefaultRoute("10.42.11.1".parse().unwrap())), "{found:?}");
        assert_eq!(found.len(), 2, "{found:?}");

        Links::current().unwrap().delete("veth7").unwrap();
        let found = netlink.check_pod(&pod).unwrap_err();
        assert_eq!(
            found,
            [Difference::NoHostInterface("veth7".into()), Difference::NoInterface("eth0".into())],
            "{found:?}"
        );
    });
}

#[test]
fn removing_a_pod_twice_or_without_its_namespace_is_fine() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        let desired = node(11, &[]);
        converge(&mut netlink, &desired);
        let inside = namespace().unwrap();
        let first = pod(11, 7, &inside);
        assert_eq!(netlink.apply(&[Change::CreatePod(first.clone())]).failed, []);
        drop(inside);
        for _ in 0..2 {
            assert_eq!(netlink.apply(&[Change::RemovePod(first.clone())]).failed, []);
        }
        let gone = PodLink { namespace_path: "/run/netns/portolan-test-that-never-was".into(), ..first };
        let failed = netlink.apply(&[Change::CreatePod(gone)]).failed;
        assert!(matches!(failed[0].1, crate::KernelError::NoNamespace { .. }), "{failed:?}");
        assert_eq!(steps(&mut netlink, &desired), []);
    });
}

#[test]
fn a_name_that_is_taken_in_the_pod_is_an_error_of_its_own_and_leaves_nothing() {
    on_node(|other| {
        let mut netlink = Netlink::open().unwrap();
        let desired = node(11, &[]);
        converge(&mut netlink, &desired);
        // The other end of the underlay is named `eth0` there.
        let failed = netlink.apply(&[Change::CreatePod(pod(11, 7, other))]).failed;
        assert!(matches!(failed[0].1, KernelError::InterfaceTaken { .. }), "{failed:?}");
        assert_eq!(steps(&mut netlink, &desired), []);
    });
}

#[test]
fn what_a_crash_left_half_made_is_replaced() {
    on_node(|_| {
        let inside = namespace().unwrap();
        let mut netlink = Netlink::open().unwrap();
        converge(&mut netlink, &node(11, &[]));
        let pod = pod(11, 7, &inside);
        let mut links = Links::current().unwrap();
        // Until its last request is done, a pair has no alias.
        links.create_veth("veth7", "eth0", &inside, Some(1430)).unwrap();
        links.set_master("veth7", "cni0").unwrap();
        let mut desired = node(11, &[]);
        desired.pods.insert(pod.key.clone(), pod.clone());
        converge(&mut netlink, &desired);
        assert_eq!(netlink.check_pod(&pod), Ok(()));
        // Someone else's link of that name is not touched.
        links.delete("veth7").unwrap();
        links.create_bridge("veth7").unwrap();
        let failed = netlink.apply(&[Change::CreatePod(pod)]).failed;
        assert!(matches!(failed[0].1, KernelError::Foreign { .. }), "{failed:?}");
        assert!(links.exists("veth7"));
    });
}

#[test]
fn pods_find_their_bridge_again() {
    on_node(|_| {
        let inside = namespace().unwrap();
        let mut netlink = Netlink::open().unwrap();
        let mut desired = node(11, &[]);
        let pod = pod(11, 7, &inside);
        desired.pods.insert(pod.key.clone(), pod.clone());
        converge(&mut netlink, &desired);
        Links::current().unwrap().delete("cni0").unwrap();
        assert!(netlink.check_pod(&pod).is_err());
        converge(&mut netlink, &desired);
        assert_eq!(netlink.check_pod(&pod), Ok(()));
    });
}

/// Says how long it takes; asserts nothing about time, which a busy machine stretches.
#[test]
fn wiring_a_pod_is_timed() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        converge(&mut netlink, &node(11, &[]));
        let mut times = Vec::new();
        for number in 2..52 {
            let inside = namespace().unwrap();
            let change = [Change::CreatePod(pod(11, number, &inside))];
            let start = Instant::now();
            let report = netlink.apply(&change);
            times.push(start.elapsed());
            assert_eq!(report.failed, []);
            // The pair, its near end as a port (2), its last settings, two to settle; the far end's batch is
            // sent from inside.
            assert_eq!(report.messages, 6);
        }
        times.sort();
        println!("wiring a pod: median {:?}, slowest {:?}", times[25], times[49]);
    });
}

#[test]
fn the_first_packet_of_a_new_pod_arrives() {
    on_node(|_| {
        let mut netlink = Netlink::open().unwrap();
        converge(&mut netlink, &node(11, &[]));
        let mut namespaces = Vec::new();
        let mut late = Vec::new();
        for number in 2..32 {
            let family = Family::ALL[usize::from(number % 2)];
            let inside = namespace().unwrap();
            let receiver = UdpSocket::bind(SocketAddr::new(pod_address(11, 1, family), 0)).unwrap();
            receiver.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            let target = receiver.local_addr().unwrap();
            assert_eq!(netlink.apply(&[Change::CreatePod(pod(11, number, &inside))]).failed, []);
            let start = Instant::now();
            let send = || {
                let sender = UdpSocket::bind(SocketAddr::new(pod_address(11, number, family), 0))?;
                sender.send_to(b"first", target)
            };
            in_namespace(&inside, send).unwrap().unwrap();
            let outcome = receiver.recv(&mut [0; 10]);
            if start.elapsed() > Duration::from_millis(500) || outcome.is_err() {
                late.push((number, family, start.elapsed()));
            }
            namespaces.push(inside);
        }
        assert_eq!(late, []);
    });
}
