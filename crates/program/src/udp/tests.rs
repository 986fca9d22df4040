//! The room's own tests.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use portolan_intent::fabric::{FabricIntent, Peer, Way};
use portolan_net::{ObjectKey, ObjectKind, Origin, Port};
use proptest::prelude::*;

use super::*;

fn peer(name: &str, address: &str) -> Peer {
    Peer {
        node: name.into(),
        address: address.parse().unwrap(),
        way: Way::Direct,
        origin: Origin::object(ObjectKind::Node, ObjectKey::cluster(name)),
    }
}

fn fabric(local: &[&str], peers: &[(&str, &str, &str)]) -> FabricIntent {
    FabricIntent {
        local_prefixes: vec!["10.42.0.0/24".parse().unwrap()],
        local_addresses: local.iter().map(|it| it.parse().unwrap()).collect(),
        peers: peers.iter().map(|(prefix, name, at)| (prefix.parse().unwrap(), peer(name, at))).collect(),
    }
}

fn settings() -> Settings {
    Settings { device: "flannel0".into(), port: Port::try_from(FLANNEL_PORT).unwrap(), underlay_mtu: 1500 }
}

fn dual() -> Program {
    let peers = [
        ("10.42.1.0/24", "node-2", "192.168.64.12"),
        ("10.42.0.0/16", "node-3", "192.168.64.13"),
        ("fd42:0:0:1::/64", "node-2", "2001:db8::12"),
    ];
    compile(&fabric(&["192.168.64.11", "2001:db8::11"], &peers), &settings())
}

#[test]
fn it_renders_as_a_person_would_say_it() {
    assert_eq!(
        render(&dual()),
        "tunnel flannel0 local 192.168.64.11 2001:db8::11 port 8285 mtu 1452\n\
         10.42.0.0/16 encap udp to 192.168.64.13:8285\n\
         10.42.1.0/24 encap udp to 192.168.64.12:8285\n\
         fd42:0:0:1::/64 encap udp to [2001:db8::12]:8285\n"
    );
    assert_eq!(render_change(&Change::RemoveRoute("10.42.1.0/24".parse().unwrap())), "route del 10.42.1.0/24");
}

#[test]
fn a_peer_of_a_family_that_this_node_has_no_address_of_has_no_route() {
    let peers = [("10.42.1.0/24", "node-2", "192.168.64.12"), ("fd42:0:0:1::/64", "node-2", "2001:db8::12")];
    let program = compile(&fabric(&["192.168.64.11"], &peers), &settings());
    assert_eq!(program.routes.len(), 1);
    assert_eq!(program.tunnel.as_ref().unwrap().mtu, 1472);
    assert_eq!(compile(&fabric(&[], &peers), &settings()), Program::default());
}

#[test]
fn the_longest_prefix_wins_and_what_cannot_go_on_is_answered() {
    let program = dual();
    let at = |text: &str| -> IpAddr { text.parse().unwrap() };
    let to = |text: &str, hops, length, may| match outward(&program, at(text), hops, length, may) {
        Outward::Sent { peer, fragmented, .. } => Ok((peer.to_string(), fragmented)),
        Outward::Dropped(reason, answer) => Err((reason, answer)),
    };
    assert_eq!(to("10.42.1.9", 64, 1452, false), Ok(("192.168.64.12:8285".into(), false)));
    assert_eq!(to("10.42.2.9", 64, 1453, true), Ok(("192.168.64.13:8285".into(), true)));
    assert_eq!(to("10.42.2.9", 64, 1453, false), Err((DropReason::TooBig, Some(Answer::TooBig(1452)))));
    assert_eq!(to("fd42:0:0:1::9", 64, 1453, true), Err((DropReason::TooBig, Some(Answer::TooBig(1452)))));
    assert_eq!(to("10.42.1.9", 1, 100, false), Err((DropReason::TimeExceeded, Some(Answer::TimeExceeded))));
    assert_eq!(to("10.43.1.9", 64, 100, false), Err((DropReason::NoRoute, Some(Answer::NoRoute))));
    assert_eq!(to("ff02::2", 255, 100, false), Err((DropReason::NotUnicast, None)));
}

#[test]
fn only_peers_are_heard_by_address_and_port() {
    let program = dual();
    let from = |text: &str| inward(&program, text.parse::<SocketAddr>().unwrap());
    assert_eq!(from("192.168.64.12:8285"), Inward::Delivered);
    assert_eq!(from("[2001:db8::12]:8285"), Inward::Delivered);
    for stranger in ["192.168.64.12:8286", "192.168.64.99:8285", "[2001:db8::13]:8285"] {
        assert_eq!(from(stranger), Inward::Dropped(DropReason::UnknownPeer), "{stranger}");
    }
}

#[test]
fn a_changed_mtu_keeps_the_tunnel_and_a_changed_port_does_not() {
    let observed = dual();
    let with = |change: &dyn Fn(&mut Tunnel)| {
        let mut desired = observed.clone();
        desired.tunnel.iter_mut().for_each(change);
        diff(&observed, &desired)
    };
    assert!(matches!(with(&|it| it.mtu = 1300)[..], [Change::Update(_)]));
    assert!(matches!(with(&|it| it.port = Port::try_from(9999).unwrap())[..], [Change::Stop, Change::Start(_)]));
    assert_eq!(with(&|_| {}), []);
}

/// Applies changes to a program, as the forwarder does.
fn applied(mut program: Program, changes: Vec<Change>) -> Program {
    for change in changes {
        match change {
            Change::Stop => program.tunnel = None,
            Change::Start(tunnel) | Change::Update(tunnel) => program.tunnel = Some(tunnel),
            Change::SetRoute(prefix, route) => {
                program.routes.insert(prefix, route);
            }
            Change::RemoveRoute(prefix) => {
                program.routes.remove(&prefix);
            }
        }
    }
    program
}

fn programs() -> impl Strategy<Value = Program> {
    let peers = proptest::collection::btree_map(0u8..12, 1u8..5, 0..8);
    (peers, any::<bool>(), 1400u32..1403).prop_map(|(peers, has_address, underlay_mtu)| {
        let peers: BTreeMap<IpNet, Peer> = peers
            .into_iter()
            .map(|(subnet, node)| {
                let prefix = format!("10.42.{subnet}.0/24").parse().unwrap();
                (prefix, peer(&format!("node-{node}"), &format!("192.168.64.{node}")))
            })
            .collect();
        let local: &[&str] = if has_address { &["192.168.64.11"] } else { &[] };
        compile(&FabricIntent { peers, ..fabric(local, &[]) }, &Settings { underlay_mtu, ..settings() })
    })
}

proptest! {
    #[test]
    fn the_changes_lead_to_what_is_desired(observed in programs(), desired in programs()) {
        let changes = diff(&observed, &desired);
        prop_assert_eq!(applied(observed, changes), desired.clone());
        prop_assert_eq!(diff(&desired, &desired), []);
    }
}
