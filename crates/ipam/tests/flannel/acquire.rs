//! Which subnet is taken, case by case.

use std::net::Ipv4Addr;

use portolan_ipam::flannel::{
    Attributes, Claimant, Decision, Layout, Me, NetworkConfig, NetworkSource, Refusal, Standing, Subnet, Take,
    TakeReason, Tunnel, View, VxlanData, decide, parse_network_config, stand,
};
use portolan_net::MacAddress;
use portolan_store::LeaseId;

use crate::model::Model;

const SMALL: &str = r#"{"Network":"10.5.0.0/24","SubnetLen":26}"#;
const DUAL: &str =
    r#"{"Network":"10.5.0.0/24","SubnetLen":26,"EnableIPv6":true,"IPv6Network":"fd00::/62","IPv6SubnetLen":64}"#;

struct Setting {
    layout: Layout,
    store: Model,
    config: NetworkConfig,
}

fn setting(config: &str) -> Setting {
    let layout = Layout::new("/coreos.com/network/");
    let mut store = Model::default();
    store.put(&layout.config(), config, 0);
    Setting { layout, store, config: parse_network_config(config, NetworkSource::Leases).unwrap().config }
}

fn node(number: u8) -> Me {
    let data = VxlanData { vni: Some(1), vtep_mac: MacAddress::local([0, 0, 0, 0, number]) };
    let tunnel = Tunnel::Vxlan { v4: Some(data), v6: Some(data) };
    Me {
        claimant: Claimant { node: format!("node-{number}").into(), instance: "1".into() },
        attributes: Attributes::new(Some(Ipv4Addr::new(192, 168, 0, number)), None, &tunnel),
        previous: None,
    }
}

fn subnet(text: &str) -> Subnet {
    text.parse().unwrap()
}

impl Setting {
    fn view(&mut self) -> View {
        let answer = self.store.run(&self.layout.read()).unwrap();
        self.layout.view(&answer)
    }

    fn decide(&mut self, me: &Me, seed: u64) -> Decision {
        let view = self.view();
        decide(&self.layout, &self.config, &view, me, seed)
    }

    fn choose(&mut self, me: &Me) -> Take {
        match self.decide(me, 0) {
            Decision::Take(take) => *take,
            other => panic!("{other:?}"),
        }
    }

    fn run(&mut self, take: &Take, me: &Me) -> Option<LeaseId> {
        let lease = self.store.grant(0, 100);
        let done = self.store.run(&take.transaction(&self.layout, me, lease)).unwrap();
        done.succeeded.then_some(lease)
    }

    fn acquire(&mut self, me: &Me) -> (Take, LeaseId) {
        let take = self.choose(me);
        let lease = self.run(&take, me).unwrap();
        (take, lease)
    }

    fn put(&mut self, name: &str, me: &Me, lease: LeaseId) {
        let key = format!("/coreos.com/network/subnets/{name}");
        self.store.put(&key, &me.attributes.render(), lease);
    }
}

#[test]
fn a_new_node_takes_one_of_the_free_by_seed() {
    let mut it = setting(SMALL);
    let mut seen: Vec<Subnet> = (0..3)
        .map(|seed| match it.decide(&node(1), seed) {
            Decision::Take(take) => take.subnet,
            other => panic!("{other:?}"),
        })
        .collect();
    seen.sort();
    assert_eq!(seen, ["10.5.0.64-26", "10.5.0.128-26", "10.5.0.192-26"].map(subnet));
    let (take, lease) = it.acquire(&node(1));
    assert_eq!(take.reason, TakeReason::Free);
    let view = it.view();
    assert_eq!(view.records.len(), 1);
    assert_eq!((view.records[0].lease, view.claims.len()), (lease, 1));
    assert_eq!(stand(&view, &node(1), &take, lease), Standing::Intact);
}

#[test]
fn a_full_network_says_so() {
    let mut it = setting(SMALL);
    (1..=3).for_each(|number| drop(it.acquire(&node(number))));
    let Decision::Refuse(refusal) = it.decide(&node(4), 0) else { panic!() };
    assert!(matches!(refusal, Refusal::Exhausted { leases: 3, .. }));
    assert!(refusal.to_string().contains("no subnet of length 26 is free in 10.5.0.0/24"), "{refusal}");
    it.store.delete("/coreos.com/network/config");
    assert!(matches!(it.decide(&node(4), 0), Decision::Refuse(Refusal::NoConfig { .. })));
}

#[test]
fn of_two_that_race_one_wins() {
    let mut it = setting(SMALL);
    let (one, other) = (it.choose(&node(1)), it.choose(&node(2)));
    assert_eq!(one.subnet, other.subnet);
    assert!(it.run(&one, &node(1)).is_some());
    assert!(it.run(&other, &node(2)).is_none());
    assert_ne!(it.choose(&node(2)).subnet, one.subnet);
}

#[test]
fn in_dual_stack_one_prefix_cannot_be_taken_with_two_others() {
    let mut it = setting(DUAL);
    let one = it.choose(&node(1));
    // The same IPv4 prefix and another IPv6 prefix: two keys to flanneld, one claim too many here.
    let others = (0..60).filter_map(|seed| match it.decide(&node(2), seed) {
        Decision::Take(take) => Some(*take),
        _ => None,
    });
    let is_half = |take: &Take| take.subnet.v4() == one.subnet.v4() && take.subnet.v6() != one.subnet.v6();
    let other = others.into_iter().find(is_half).unwrap();
    assert!(it.run(&one, &node(1)).is_some());
    assert!(it.run(&other, &node(2)).is_none());
}

#[test]
fn what_was_decided_by_an_old_config_does_not_hold() {
    let mut it = setting(SMALL);
    let take = it.choose(&node(1));
    it.store.put("/coreos.com/network/config", r#"{"Network":"10.5.0.0/24","SubnetLen":28}"#, 0);
    assert!(it.run(&take, &node(1)).is_none());
}

#[test]
fn flannelds_lease_of_the_same_address_is_taken_over() {
    let mut it = setting(SMALL);
    let mut old = node(1);
    old.attributes = Attributes::new(old.attributes.public_v4, None, &Tunnel::HostGateway);
    let lease = it.store.grant(0, 100);
    it.put("10.5.0.128-26", &old, lease);
    let (take, own) = it.acquire(&node(1));
    assert_eq!(
        (take.subnet, take.reason, take.is_reservation),
        (subnet("10.5.0.128-26"), TakeReason::PublicAddress, false)
    );
    // The old lease may end: the subnet is no longer bound to it.
    it.store.revoke(lease);
    let view = it.view();
    assert_eq!(stand(&view, &node(1), &take, own), Standing::Intact);
}

#[test]
fn a_reservation_stays_one() {
    let mut it = setting(SMALL);
    it.put("10.5.0.192-26", &node(1), 0);
    let (take, lease) = it.acquire(&node(1));
    assert!(take.is_reservation && take.subnet == subnet("10.5.0.192-26"));
    it.store.revoke(lease);
    let view = it.view();
    assert_eq!((view.records[0].lease, view.claims.len()), (0, 0));
    // Nobody else takes it, and its node gets it again.
    assert_ne!(it.choose(&node(2)).subnet, take.subnet);
    assert_eq!(it.choose(&node(1)).subnet, take.subnet);
}

#[test]
fn a_reservation_that_does_not_fit_is_left_alone() {
    let mut it = setting(SMALL);
    it.put("10.5.0.192-28", &node(1), 0);
    let take = it.choose(&node(1));
    assert!(take.subnet == subnet("10.5.0.64-26") && !take.is_reservation);
    assert!(it.run(&take, &node(1)).is_some());
    assert_eq!(it.view().records.len(), 2);
}

#[test]
fn leases_that_do_not_fit_are_deleted_ones_own_only() {
    let mut it = setting(SMALL);
    let lease = it.store.grant(0, 100);
    it.put("10.5.0.64-28", &node(1), lease);
    it.put("10.5.0.128-28", &node(2), lease);
    let Decision::Delete(deletion) = it.decide(&node(1), 0) else { panic!() };
    assert_eq!(deletion.subnet, subnet("10.5.0.64-28"));
    assert!(it.store.run(&deletion.transaction(&it.layout)).unwrap().succeeded);
    // The other's is still in the way.
    let (take, _) = it.acquire(&node(1));
    assert_eq!(take.subnet, subnet("10.5.0.64-26"));
    // One's own by claim, after the network changed.
    it.config = parse_network_config(r#"{"Network":"10.6.0.0/16"}"#, NetworkSource::Leases).unwrap().config;
    let Decision::Delete(deletion) = it.decide(&node(1), 0) else { panic!() };
    assert_eq!((deletion.subnet, deletion.claims.len()), (take.subnet, 1));
    assert!(it.store.run(&deletion.transaction(&it.layout)).unwrap().succeeded);
    assert!(it.view().claims.is_empty());
}

#[test]
fn a_node_keeps_its_subnet_when_its_address_changes() {
    let mut it = setting(SMALL);
    let (take, lease) = it.acquire(&node(1));
    let mut moved = node(1);
    moved.attributes = node(9).attributes;
    moved.claimant.instance = "2".into();
    let again = it.choose(&moved);
    assert_eq!((again.subnet, again.reason), (take.subnet, TakeReason::Claimed));
    // Without a claim, from a time when flanneld ran here, the hardware address tells.
    it.store.revoke(lease);
    let lease = it.store.grant(0, 100);
    it.put("10.5.0.192-26", &node(1), lease);
    let mut moved = node(1);
    moved.attributes.public_v4 = Some(Ipv4Addr::new(192, 168, 0, 77));
    assert_eq!(it.choose(&moved).reason, TakeReason::SameDevice);
    // And where nothing is left of it, the file does.
    it.store.revoke(lease);
    moved.previous = Some(subnet("10.5.0.192-26"));
    let again = it.choose(&moved);
    assert_eq!((again.subnet, again.reason), (subnet("10.5.0.192-26"), TakeReason::Previous));
    it.put("10.5.0.192-28", &node(3), 0);
    assert_eq!(it.choose(&moved).reason, TakeReason::Free);
}

#[test]
fn two_nodes_behind_one_address_get_two_subnets_and_are_told() {
    let mut it = setting(SMALL);
    let (first, _) = it.acquire(&node(1));
    let mut twin = node(2);
    twin.attributes.public_v4 = node(1).attributes.public_v4;
    let take = it.choose(&twin);
    assert_ne!(take.subnet, first.subnet);
    let shared = take.shared.clone().unwrap();
    assert_eq!((&*shared.node, shared.subnet), ("node-1", first.subnet));
    assert!(shared.to_string().contains("192.168.0.1 is also in the lease of node node-1 (10.5.0.64-26)"), "{shared}");
    assert!(it.run(&take, &twin).is_some());
    // Neither takes the other's lease away, however often they restart.
    assert_eq!(it.choose(&node(1)).subnet, first.subnet);
    assert_eq!(it.choose(&twin).subnet, take.subnet);
}

#[test]
fn a_held_subnet_is_judged() {
    let mut it = setting(SMALL);
    let me = node(1);
    let (take, lease) = it.acquire(&me);
    let key = it.layout.subnet(&take.subnet);
    // flanneld of a twin behind the same address.
    let mut twin = node(2);
    twin.attributes.public_v4 = me.attributes.public_v4;
    let other = it.store.grant(0, 100);
    it.put(&take.subnet.to_string(), &twin, other);
    let Standing::Contested { attributes: Some(attributes) } = stand(&it.view(), &me, &take, lease) else { panic!() };
    assert_eq!(*attributes, twin.attributes);
    // Somebody removes the key: the claim stands, and it is written again.
    it.store.delete(&key);
    assert_eq!(stand(&it.view(), &me, &take, lease), Standing::Rewrite);
    let again = it.choose(&me);
    assert_eq!((again.subnet, again.record), (take.subnet, None));
    // Another node, of flanneld, takes the place before: then it is not stolen back.
    it.put(&take.subnet.to_string(), &node(7), other);
    let Decision::Delete(deletion) = it.decide(&me, 0) else { panic!() };
    assert!(deletion.record.is_none() && deletion.claims.len() == 1);
    assert!(it.store.run(&deletion.transaction(&it.layout)).unwrap().succeeded);
    assert_ne!(it.choose(&me).subnet, take.subnet);
    assert_eq!(stand(&it.view(), &me, &take, lease), Standing::Gone);
    // A newer run of the same node.
    let mut newer = me.clone();
    newer.claimant.instance = "2".into();
    let (taken, lease) = it.acquire(&newer);
    assert_eq!(stand(&it.view(), &me, &taken, lease), Standing::Superseded { by: newer.claimant });
}
