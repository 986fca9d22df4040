//! Sets.

use std::collections::BTreeSet;
use std::time::Instant;

use portolan_kernel::ipset::IpsetRoom;
use portolan_kernel::netns::in_namespace;
use portolan_net::{Family, Protocol};
use portolan_program::ipset;
use portolan_program::sample::{Sample, Samples};

use crate::world::{SERVERS, address, node_view, output, port, socket, world};
#[test]
fn sets_are_read_back_by_us_and_by_ipset() {
    let Some(world) = world() else { return };
    let mut compiler = ipset::Compiler::new(&node_view(), &Family::ALL);
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
        for number in 1..1_000 {
            let mut at = socket(at);
            at.set_port(1_000 + number);
            list.push(Sample::cluster_ip(Protocol::Tcp, at, "many").expect("a port"));
        }
    }
    compiler.update_services(&samples.put(list));
    in_namespace(&world.node, || {
        let mut room = IpsetRoom::open().expect("the room");
        let begin = Instant::now();
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
