//! Nodes and namespaces for the tests.

use portolan_net::{Family, IpNet, MacAddress, Origin, Vni};
use portolan_program::netlink::{
    Address, AttachmentKey, Change, Forwarding, Link, LinkKind, Neighbour, PodLink, Program, Route, Sysctl, diff,
    fabric,
};

use super::super::{Netlink, Report};
use crate::link::Links;
use crate::netns::{Namespace, in_namespace};

/// A namespace of its own, or a reason not to test.
pub(super) fn namespace() -> Option<Namespace> {
    let made = Namespace::create_unnamed();
    if let Err(error) = &made {
        println!("skipped: {error}");
    }
    made.ok()
}

/// Runs a test inside a namespace of its own, whose link `eth0` leads to a second one.
pub(super) fn on_node(test: impl FnOnce(&Namespace) + Send) {
    let (Some(node), Some(other)) = (namespace(), namespace()) else { return };
    join(&node, 11, &other, 12);
    in_namespace(&node, || test(&other)).unwrap();
}

/// Joins two namespaces by a link `eth0` with the underlay's addresses.
pub(super) fn join(a: &Namespace, a_number: u8, b: &Namespace, b_number: u8) {
    let mut links = Links::open(a).unwrap();
    links.create_veth("eth0", "eth0", b, None).unwrap();
    for (mut links, number) in [(links, a_number), (Links::open(b).unwrap(), b_number)] {
        links.add_address("eth0", prefix(&format!("192.168.64.{number}/24"))).unwrap();
        links.add_address("eth0", prefix(&format!("fd00:64::{number}/64"))).unwrap();
        links.set_up("lo").unwrap();
        links.set_up("eth0").unwrap();
    }
    Links::open(a).unwrap().settle("eth0").unwrap();
}

pub(super) fn prefix(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(super) fn vni() -> Vni {
    Vni::new(1).unwrap()
}

fn origin() -> Origin {
    Origin::configuration("test")
}

pub(super) fn mac(number: u8, family: Family) -> MacAddress {
    fabric::vtep_mac(&format!("node-{number}").into(), vni(), family)
}

/// Node `number` (underlay address `.number`, pods in `10.42.number.0/24`) with its peers.
pub(super) fn node(number: u8, peers: &[u8]) -> Program {
    let mut program = Program::default();
    let bridge = Link {
        name: "cni0".into(),
        kind: LinkKind::Bridge,
        mac: Some(MacAddress::local([0, 0, 0, 0, number])),
        mtu: 1430,
        alias: "portolan:bridge".into(),
        up: true,
        origin: origin(),
    };
    program.links.insert("cni0".into(), bridge);
    let mut address = |device: &str, prefix: IpNet| {
        let address = Address { device: device.into(), prefix, origin: origin() };
        program.addresses.insert((device.into(), prefix), address);
    };
    for family in Family::ALL {
        address("cni0", IpNet::new(pod_address(number, 1, family), pod_prefix(number, family).prefix_len()).unwrap());
        address(&fabric::device(vni(), family), pod_prefix(number, family).network().into());
    }
    for family in Family::ALL {
        let name = fabric::device(vni(), family);
        let (local, underlay) = (underlay(number, family), "eth0".into());
        let tunnel = Link {
            name: name.clone(),
            kind: LinkKind::Vxlan { vni: vni(), port: 8472, local, underlay, gbp: false, learning: false },
            mac: Some(mac(number, family)),
            mtu: 1430,
            alias: "portolan:vxlan".into(),
            up: true,
            origin: origin(),
        };
        program.links.insert(name, tunnel);
        for peer in peers {
            add_peer(&mut program, *peer, family);
        }
    }
    for path in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        program.sysctls.insert(path.into(), Sysctl { value: "1".into(), origin: origin() });
    }
    // There where the bridge's netfilter hooks are, and for each namespace of its own.
    for path in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
        if crate::sysctl::read(path).is_ok() {
            program.sysctls.insert(path.into(), Sysctl { value: "1".into(), origin: origin() });
        } else {
            println!("skipped: {path}, which needs br_netfilter");
        }
    }
    let quiet = Sysctl { value: "0".into(), origin: origin() };
    program.sysctls.insert("net/ipv6/conf/cni0/accept_dad".into(), quiet);
    program
}

pub(super) fn add_peer(program: &mut Program, peer: u8, family: Family) {
    let device = fabric::device(vni(), family);
    let destination = pod_prefix(peer, family);
    let gateway = destination.network();
    let route = Route { destination, device: device.clone(), gateway, onlink: true, origin: origin() };
    program.routes.insert(destination, route);
    let mac = mac(peer, family);
    let neighbour = Neighbour { device: device.clone(), address: gateway, mac, origin: origin() };
    program.neighbours.insert((device.clone(), gateway), neighbour);
    let entry = Forwarding { device: device.clone(), mac, remote: underlay(peer, family), origin: origin() };
    program.forwarding.insert((device, mac), entry);
}

pub(super) fn underlay(number: u8, family: Family) -> std::net::IpAddr {
    match family {
        Family::V4 => format!("192.168.64.{number}").parse().unwrap(),
        Family::V6 => format!("fd00:64::{number}").parse().unwrap(),
    }
}

pub(super) fn pod_prefix(number: u8, family: Family) -> IpNet {
    match family {
        Family::V4 => prefix(&format!("10.42.{number}.0/24")),
        Family::V6 => prefix(&format!("fd00:42:0:{number}::/64")),
    }
}

pub(super) fn pod_address(node: u8, pod: u8, family: Family) -> std::net::IpAddr {
    match family {
        Family::V4 => format!("10.42.{node}.{pod}").parse().unwrap(),
        Family::V6 => format!("fd00:42:0:{node}::{pod}").parse().unwrap(),
    }
}

/// A pod of a node, in a namespace.
pub(super) fn pod(node: u8, number: u8, namespace: &Namespace) -> PodLink {
    let address = |family| IpNet::new(pod_address(node, number, family), pod_prefix(node, family).prefix_len());
    PodLink {
        key: AttachmentKey { container: format!("container{number}").into(), interface: "eth0".into() },
        namespace_path: namespace.path().to_str().unwrap().into(),
        host_interface: format!("veth{number}").into(),
        bridge: "cni0".into(),
        hairpin: true,
        mtu: 1430,
        up: true,
        mac: MacAddress::local([10, 42, 0, node, number]),
        addresses: Family::ALL.map(|family| address(family).unwrap()).to_vec(),
        gateways: Family::ALL.map(|family| pod_address(node, 1, family)).to_vec(),
        origin: origin(),
    }
}

/// The steps that are left.
pub(super) fn steps(netlink: &mut Netlink, desired: &Program) -> Vec<Change> {
    let observed = netlink.observe().unwrap();
    diff(desired, &observed.ours, &observed.others)
}

/// Brings the kernel to where it must be, and asserts that it is there.
pub(super) fn converge(netlink: &mut Netlink, desired: &Program) -> Report {
    let changes = steps(netlink, desired);
    let report = netlink.apply(&changes);
    assert_eq!(report.failed, []);
    assert_eq!(steps(netlink, desired), []);
    report
}
