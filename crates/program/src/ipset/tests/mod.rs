//! Which sets a frontend is in, and that the past leaves no trace.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use portolan_intent::services::{FrontendUpdate, ServicesIntent};
use portolan_net::{Family, Packet, Port, Protocol};
use proptest::prelude::*;

use super::*;
use crate::layout::IpSetName;
use crate::sample::{Sample, Samples, view};

const NODE: [&str; 3] = ["192.0.2.1", "10.42.1.1", "2001:db8::1"];

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn node() -> Vec<IpAddr> {
    NODE.iter().map(|text| text.parse().unwrap()).collect()
}

fn compiler() -> Compiler {
    let mut compiler = Compiler::new(&view(&[]).unwrap(), &Family::ALL);
    compiler.set_node_addresses(&node());
    compiler
}

fn changes_of(samples: impl IntoIterator<Item = Sample>) -> Vec<String> {
    let changes = compiler().update_services(&Samples::default().put(samples));
    changes.iter().map(render_change).collect()
}

#[test]
fn a_cluster_address_and_its_own_endpoint() {
    let web = Sample::cluster_ip(Protocol::Tcp, socket("10.96.0.10:80"), "web").unwrap();
    let web = web.local_backend(socket("10.42.1.2:8080")).backend(socket("10.42.2.2:8080"));
    assert_eq!(
        changes_of([web]),
        [
            "ipset add KUBE-LOOP-BACK 10.42.1.2,tcp:8080,10.42.1.2",
            "ipset add KUBE-CLUSTER-IP 10.96.0.10,tcp:80",
            "ipset add KUBE-IPVS-IPS 10.96.0.10",
        ]
    );
}

#[test]
fn a_load_balancer_with_source_ranges() {
    let web = Sample::load_balancer(Protocol::Tcp, socket("[2001:db8:1::1]:443"), "web").unwrap();
    let sources = ["::/0", "2001:db8:1::1/128"].map(|text| text.parse().unwrap());
    let web = web.local().backend(socket("[fd42::2]:8080")).sources(&sources);
    assert_eq!(
        changes_of([web]),
        [
            "ipset add KUBE-6-LOAD-BALANCER 2001:db8:1::1,tcp:443",
            "ipset add KUBE-6-LOAD-BALANCER-LOCAL 2001:db8:1::1,tcp:443",
            "ipset add KUBE-6-LOAD-BALANCER-FW 2001:db8:1::1,tcp:443",
            "ipset add KUBE-6-LOAD-BALANCER-SOURCE-IP 2001:db8:1::1,tcp:443,2001:db8:1::1",
            "ipset add KUBE-6-LOAD-BALANCER-SOURCE-CID 2001:db8:1::1,tcp:443,::/1",
            "ipset add KUBE-6-LOAD-BALANCER-SOURCE-CID 2001:db8:1::1,tcp:443,8000::/1",
            "ipset add KUBE-6-IPVS-IPS 2001:db8:1::1",
            "ipset add KUBE-6-NO-LOCAL-OUTSIDE 2001:db8:1::1,tcp:443",
        ]
    );
}

#[test]
fn node_ports_of_tcp_are_ports_and_those_of_sctp_have_addresses() {
    let port = Port::try_from(30_080u16).unwrap();
    let sample = |protocol| Sample::node_port(Family::V4, protocol, port, "web");
    let sample = |protocol| sample(protocol).local_backend(socket("10.42.1.2:8080")).local();
    assert_eq!(
        changes_of([sample(Protocol::Tcp), sample(Protocol::Sctp)]),
        [
            "ipset add KUBE-LOOP-BACK 10.42.1.2,tcp:8080,10.42.1.2",
            "ipset add KUBE-LOOP-BACK 10.42.1.2,sctp:8080,10.42.1.2",
            "ipset add KUBE-NODE-PORT-TCP 30080",
            "ipset add KUBE-NODE-PORT-LOCAL-TCP 30080",
            "ipset add KUBE-NODE-PORT-SCTP-HASH 10.42.1.1,sctp:30080",
            "ipset add KUBE-NODE-PORT-SCTP-HASH 192.0.2.1,sctp:30080",
            "ipset add KUBE-NODE-PORT-LOCAL-SCTP-HASH 10.42.1.1,sctp:30080",
            "ipset add KUBE-NODE-PORT-LOCAL-SCTP-HASH 192.0.2.1,sctp:30080",
        ]
    );
}

#[test]
fn health_checks_are_let_in_in_both_families() {
    let ports = BTreeSet::from([Port::try_from(32_000u16).unwrap()]);
    let mut compiler = compiler();
    let text: Vec<String> = compiler.set_health_ports(&ports).iter().map(render_change).collect();
    assert_eq!(text, ["ipset add KUBE-HEALTH-CHECK-NODE-PORT 32000", "ipset add KUBE-6-HEALTH-CHECK-NODE-PORT 32000"]);
    let text: Vec<String> = compiler.set_health_ports(&BTreeSet::new()).iter().map(render_change).collect();
    assert_eq!(text.len(), 2, "{text:?}");
}

#[test]
fn names_fit_the_kernel_and_are_told_apart() {
    let mut names = BTreeSet::new();
    for family in Family::ALL {
        for name in IpSetName::ALL {
            let text = name.name(family);
            assert!(text.len() <= 31, "{text}");
            assert!(names.insert(text), "{text}");
            assert_eq!(IpSetName::from_name(text), Some((name, family)));
        }
    }
}

#[test]
fn a_set_of_another_kind_is_made_anew() {
    let desired = compiler().program().clone();
    let mut there = desired.clone();
    let key = SetKey { family: Family::V4, name: IpSetName::ClusterIp };
    there.sets.get_mut(&key).unwrap().kind = SetKind::HashIp;
    assert_eq!(diff(&there, &desired), [Change::Clear(key), Change::Create(key, SetKind::HashIpPort)]);
    assert_eq!(diff(&desired, &Program::default()).len(), 2 * IpSetName::ALL.len());
}

#[test]
fn a_packet_is_in_the_set_of_its_destination() {
    let web = Sample::cluster_ip(Protocol::Udp, socket("10.96.0.10:53"), "dns").unwrap();
    let mut compiler = compiler();
    compiler.update_services(&Samples::default().put([web]));
    let set = &compiler.program().sets[&SetKey { family: Family::V4, name: IpSetName::ClusterIp }];
    let packet = |protocol| Packet {
        source: "10.42.1.2".parse().unwrap(),
        destination: "10.96.0.10".parse().unwrap(),
        protocol,
        source_port: 40_000,
        destination_port: 53,
        mark: 0,
    };
    assert!(contains(set, &packet(Protocol::Udp), &[End::Destination, End::Destination]).is_some());
    assert!(contains(set, &packet(Protocol::Tcp), &[End::Destination, End::Destination]).is_none());
    assert!(contains(set, &packet(Protocol::Udp), &[End::Source, End::Destination]).is_none());
}

fn any_sample() -> impl Strategy<Value = Sample> {
    let address = prop::sample::select(vec!["10.96.0.1:80", "10.96.0.2:80", "192.0.2.1:80", "[fd96::1]:80"]);
    let backends = prop::collection::vec((2u8..5, any::<bool>()), 0..3);
    let shape = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (address, backends, shape).prop_map(|(at, backends, (is_node_port, is_udp, is_local, has_sources))| {
        let protocol = if is_udp { Protocol::Udp } else { Protocol::Tcp };
        let at = socket(at);
        let family = Family::of(at.ip());
        let mut sample = match (is_node_port, has_sources) {
            (true, _) => Sample::node_port(family, protocol, Port::try_from(30_080u16).unwrap(), "web"),
            (false, true) => {
                Sample::load_balancer(protocol, at, "web").unwrap().sources(&["10.0.0.0/8".parse().unwrap()])
            }
            (false, false) => Sample::cluster_ip(protocol, at, "web").unwrap(),
        };
        for (last, local) in backends {
            let address =
                if family == Family::V4 { format!("10.42.1.{last}:8080") } else { format!("[fd42::{last}]:8080") };
            sample = if local { sample.local_backend(socket(&address)) } else { sample.backend(socket(&address)) };
        }
        if is_local { sample.local() } else { sample }
    })
}

fn applied(mut program: Program, changes: &[Change]) -> Program {
    for change in changes {
        match change {
            Change::Create(key, kind) => {
                let set = IpSet { kind: kind.clone(), entries: imbl::OrdMap::new() };
                assert!(program.sets.insert(*key, set).is_none());
            }
            Change::Add(key, entry) => {
                assert!(program.sets.get_mut(key).unwrap().entries.insert(*entry, None).is_none(), "{entry:?} twice");
            }
            Change::Remove(key, entry) => {
                assert!(program.sets.get_mut(key).unwrap().entries.remove(entry).is_some(), "{entry:?} is not there");
            }
            Change::Flush(key) => program.sets.get_mut(key).unwrap().entries.clear(),
            Change::Clear(key) | Change::Destroy(key) => assert!(program.sets.remove(key).is_some()),
        }
    }
    program
}

proptest! {
    #[test]
    fn incremental_equals_from_scratch(
        batches in prop::collection::vec(prop::collection::vec((any_sample(), any::<bool>()), 1..4), 1..20), moves: bool
    ) {
        let mut incremental = compiler();
        let mut samples = Samples::default();
        let mut kernel = applied(Program::default(), &diff(&Program::default(), incremental.program()));
        let mut addresses = node();
        for (round, batch) in batches.into_iter().enumerate() {
            let mut updates: Vec<FrontendUpdate> = Vec::new();
            for (sample, is_there) in batch {
                updates.extend(if is_there { samples.put([sample]) } else { samples.remove(sample.key()) });
            }
            kernel = applied(kernel, &incremental.update_services(&updates));
            if moves && round % 2 == 1 {
                addresses.rotate_left(1);
                kernel = applied(kernel, &incremental.set_node_addresses(&addresses[..2]));
            } else {
                kernel = applied(kernel, &incremental.set_node_addresses(&addresses));
            }
            prop_assert_eq!(diff(&kernel, incremental.program()), Vec::new());
            let intent: ServicesIntent = samples.iter().map(|(key, frontend)| (*key, Arc::clone(frontend))).collect();
            let seen = if moves && round % 2 == 1 { &addresses[..2] } else { &addresses[..] };
            let scratch = compile(&intent, &BTreeSet::new(), seen, &view(&[]).unwrap());
            prop_assert_eq!(diff(incremental.program(), &scratch), Vec::new());
        }
    }
}
