//! Virtual servers, sets and chains together: who is masqueraded, refused and dropped, with both backends of
//! iptables.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use portolan_kernel::ipset::IpsetRoom;
use portolan_kernel::iptables::{Backend, IptablesRoom};
use portolan_kernel::ipvs::IpvsRoom;
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Family, Protocol};
use portolan_program::iptables::chains_for_ipvs;
use portolan_program::sample::{Sample, Samples};
use portolan_program::{ipset, iptables, ipvs};

use crate::world::{NODE, World, address, ask, connect, node_view, port, serve, socket, world};

/// So long is waited for an answer that must not come.
const SILENCE: Duration = Duration::from_secs(2);

/// One family of the world.
struct Names {
    family: Family,
    cluster: &'static str,
    hairpin: &'static str,
    balanced: &'static str,
    kept: &'static str,
    node: &'static str,
    server: &'static str,
    /// The server at the address that the servers' namespace takes for its own: of IPv6 the one that came last.
    own: &'static str,
    elsewhere: &'static str,
    client: &'static str,
    client_prefix: &'static str,
    /// The node's address toward the servers.
    masked: &'static str,
}

const NAMES: [Names; 2] = [
    Names {
        family: Family::V4,
        cluster: "10.96.0.10:80",
        hairpin: "10.96.0.11:80",
        balanced: "198.51.100.1:80",
        kept: "198.51.100.2:80",
        node: "192.0.2.1",
        server: "10.42.2.2:8080",
        own: "10.42.2.2:8080",
        elsewhere: "10.42.2.3:8080",
        client: "192.0.2.5",
        client_prefix: "192.0.2.5/32",
        masked: "10.42.2.1",
    },
    Names {
        family: Family::V6,
        cluster: "[fd96::10]:80",
        hairpin: "[fd96::11]:80",
        balanced: "[2001:db8:9::1]:80",
        kept: "[2001:db8:9::2]:80",
        node: "2001:db8::1",
        server: "[fd42:0:0:2::2]:8080",
        own: "[fd42:0:0:2::3]:8080",
        elsewhere: "[fd42:0:0:2::3]:8080",
        client: "2001:db8::5",
        client_prefix: "2001:db8::5/128",
        masked: "fd42:0:0:2::1",
    },
];

fn samples(names: &Names, protocol: Protocol) -> Vec<Sample> {
    let (server, elsewhere) = (socket(names.server), socket(names.elsewhere));
    let balanced = |at: &str| Sample::load_balancer(protocol, socket(at), "balanced").expect("a port");
    let node_port = |number| Sample::node_port(names.family, protocol, port(number), "node-port");
    let prefix = names.client_prefix.parse().expect("a prefix");
    vec![
        Sample::cluster_ip(protocol, socket(names.cluster), "web").expect("a port").local_backend(server),
        Sample::cluster_ip(protocol, socket(names.hairpin), "self").expect("a port").local_backend(socket(names.own)),
        balanced(names.balanced).local_backend(server).sources(&[prefix]),
        // Only another node has an endpoint of this one.
        balanced(names.kept).local().backend(elsewhere),
        node_port(30_080).local_backend(server),
        node_port(30_081).local_backend(server).local(),
    ]
}

fn load(world: &World, backend: Backend) {
    let mut servers = ipvs::Compiler::new(&node_view(), &Family::ALL);
    let mut sets = ipset::Compiler::new(&node_view(), &Family::ALL);
    servers.set_node_addresses(&NODE.map(address));
    sets.set_node_addresses(&NODE.map(address));
    let list: Vec<Sample> =
        NAMES.iter().flat_map(|names| [Protocol::Tcp, Protocol::Udp].map(|it| samples(names, it))).flatten().collect();
    let updates = Samples::default().put(list);
    servers.update_services(&updates);
    sets.update_services(&updates);
    let chains = chains_for_ipvs(&node_view(), &Family::ALL, &[]);
    in_namespace(&world.node, || {
        let mut room = IptablesRoom::open_with(backend, &Family::ALL).expect("iptables");
        let mut set_room = IpsetRoom::open().expect("sets");
        let mut server_room = IpvsRoom::open().expect("IPVS");
        let changes = ipset::diff(&set_room.observe().expect("observed"), sets.program());
        assert_eq!(set_room.apply(&changes).failed, []);
        let changes = iptables::diff(&room.observe().expect("observed"), &chains);
        assert_eq!(room.apply(&changes).failed, []);
        let changes = ipvs::diff(&server_room.observe().expect("observed"), servers.program());
        assert_eq!(server_room.apply(&changes).failed, []);
        assert_eq!(iptables::diff(&room.observe().expect("observed"), &chains), [], "nothing is left to do");
    })
    .expect("in the namespace");
}

/// What a client learns that must not be served.
fn refused(namespace: &Namespace, to: SocketAddr) -> ErrorKind {
    let outcome = connect(namespace, to, SILENCE);
    outcome.map(|(_, said)| said).expect_err(&format!("nobody serves at {to}")).kind()
}

fn is_silence(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::TimedOut | ErrorKind::WouldBlock)
}

fn judge(world: &World, names: &Names) {
    let at_node = |number| SocketAddr::new(address(names.node), number);
    let masked = address(names.masked);
    let seen = |from: &Namespace, protocol, to: SocketAddr| -> IpAddr { ask(from, protocol, to).0 };
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let cluster = socket(names.cluster);
        assert_eq!(seen(&world.client, protocol, cluster), masked, "who is no pod is masqueraded");
        assert_eq!(seen(&world.node, protocol, cluster), masked, "the node is masqueraded");
        assert_eq!(seen(&world.server, protocol, socket(names.hairpin)), masked, "a pod that reaches itself");
        assert_eq!(seen(&world.client, protocol, at_node(30_080)), masked, "a node port");
        assert_eq!(seen(&world.client, protocol, at_node(30_081)), address(names.client), "a local node port");
        assert_eq!(seen(&world.client, protocol, socket(names.balanced)), masked, "an admitted client");
        assert_eq!(seen(&world.node, protocol, socket(names.kept)), masked, "the node reaches other nodes' endpoints");
    }
    assert!(is_silence(refused(&world.node, socket(names.balanced))), "the node is not among the source ranges");
    assert!(is_silence(refused(&world.server, socket(names.balanced))), "nor is a pod");
    assert!(is_silence(refused(&world.client, socket(names.kept))), "no endpoint of this node for who is outside");
    let other_port = SocketAddr::new(socket(names.cluster).ip(), 9_999);
    assert_eq!(refused(&world.client, other_port), ErrorKind::ConnectionRefused);
}

fn everything_works_with(backend: Backend) {
    let Some(world) = world() else { return };
    serve(&world);
    load(&world, backend);
    NAMES.iter().for_each(|names| judge(&world, names));
}

#[test]
fn chains_of_the_nft_backend_say_who_is_masqueraded_and_who_is_dropped() {
    everything_works_with(Backend::Nft);
}

#[test]
fn chains_of_the_legacy_backend_say_who_is_masqueraded_and_who_is_dropped() {
    everything_works_with(Backend::Legacy);
}
