//! Many nodes over one store, in any order: no two of ours ever hold subnets that overlap.
//!
//! A node holds a subnet from the answer to its transaction until its lease could have ended, counted from
//! when it asked. Each request is a step of its own, and between two of them anything may happen: requests
//! and answers are lost or come late, nodes crash, restart, change their address, share one; the store ends
//! leases late; the operator changes the network, writes reservations, removes keys; flanneld's come and
//! go, with flanneld's rules. `PORTOLAN_INTERLEAVINGS` says how many runs; without it there are fewer.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::sync::Arc;

use portolan_ipam::flannel::{
    Attributes, Claimant, Decision, Layout, Me, NetworkConfig, NetworkSource, Standing, Subnet, Take, Tunnel, View,
    decide, parse_network_config, stand,
};
use portolan_store::{Compare, LeaseId, Operation, Transaction};

use crate::model::Model;

const TIME_TO_LIVE: u64 = 100;
const STEPS: usize = 120;
const INTERLEAVINGS: u64 = 2_000;

const CONFIGS: [&str; 5] = [
    r#"{"Network":"10.5.0.0/26","SubnetLen":28}"#,
    r#"{"Network":"10.5.0.0/26","SubnetLen":29}"#,
    r#"{"Network":"10.5.0.0/26","SubnetLen":28,"EnableIPv6":true,"IPv6Network":"fd00::/120","IPv6SubnetLen":122}"#,
    r#"{"Network":"10.5.0.0/26","SubnetLen":29,"EnableIPv6":true,"IPv6Network":"fd00::/120","IPv6SubnetLen":123}"#,
    r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/120","IPv6SubnetLen":122}"#,
];

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    fn address(&mut self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 0, u8::try_from(self.below(6)).unwrap() + 1)
    }
}

/// The network config of a view. The texts are few, and reading one takes longer than a step.
fn config_of(view: &View) -> Option<Rc<NetworkConfig>> {
    thread_local! {
        static READ: RefCell<HashMap<Arc<[u8]>, Rc<NetworkConfig>>> = RefCell::default();
    }
    let (text, _) = view.config.as_ref()?;
    let read = |text: &[u8]| {
        let text = std::str::from_utf8(text).unwrap();
        Rc::new(parse_network_config(text, NetworkSource::Leases).unwrap().config)
    };
    Some(READ.with_borrow_mut(|all| Rc::clone(all.entry(Arc::clone(text)).or_insert_with(|| read(text)))))
}

#[derive(Debug, Clone)]
enum State {
    Down,
    Idle,
    Looked(Box<View>),
    Granted { take: Take, lease: LeaseId, until: u64 },
    Holding { take: Take, lease: LeaseId, until: u64 },
}

#[derive(Debug)]
struct Node {
    me: Me,
    runs: u64,
    state: State,
}

/// flanneld, by its rules: no claims, no comparison on updates, identity by address.
struct Flanneld {
    address: Ipv4Addr,
    view: Option<View>,
}

/// A request that its sender has given up on, and that may still arrive.
enum Late {
    Run(Transaction),
    KeepAlive(LeaseId),
    Revoke(LeaseId),
}

struct World {
    random: Random,
    layout: Layout,
    store: Model,
    now: u64,
    nodes: Vec<Node>,
    flannelds: Vec<Flanneld>,
    late: Vec<Late>,
    holdings: u64,
}

fn attributes(address: Ipv4Addr) -> Attributes {
    Attributes::new(Some(address), None, &Tunnel::HostGateway)
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random(seed);
        let layout = Layout::new("/coreos.com/network");
        let mut store = Model::default();
        store.put(&layout.config(), CONFIGS[usize::try_from(random.below(5)).unwrap()], 0);
        let node = |index: u64, random: &mut Random| Node {
            me: Me {
                claimant: Claimant { node: format!("node-{index}").into(), instance: "0".into() },
                attributes: attributes(random.address()),
                previous: None,
            },
            runs: 0,
            state: State::Idle,
        };
        let nodes = (0..4).map(|index| node(index, &mut random)).collect();
        let flannelds = (0..random.below(3)).map(|_| Flanneld { address: random.address(), view: None }).collect();
        World { random, layout, store, now: 0, nodes, flannelds, late: Vec::new(), holdings: 0 }
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..70 => {
                let index = usize::try_from(self.random.below(4)).unwrap();
                let state = std::mem::replace(&mut self.nodes[index].state, State::Down);
                self.nodes[index].state = self.act(index, state);
            }
            70..78 if !self.flannelds.is_empty() => self.flanneld(),
            70..84 => {
                self.now += self.random.below(TIME_TO_LIVE / 2);
                if self.random.percent(70) {
                    self.store.expire(self.now);
                }
            }
            84..90 => self.arrive_late(),
            90..94 => self.disturb(),
            _ => self.operate(),
        }
        self.check();
    }

    fn look(&mut self) -> View {
        let answer = self.store.run(&self.layout.read()).unwrap();
        self.layout.view(&answer)
    }

    fn act(&mut self, index: usize, state: State) -> State {
        match state {
            State::Down => {
                let node = &mut self.nodes[index];
                node.runs += 1;
                node.me.claimant.instance = node.runs.to_string().into();
                State::Idle
            }
            State::Idle => State::Looked(Box::new(self.look())),
            State::Looked(view) => self.decide(index, &view),
            State::Granted { take, lease, until } => self.take(index, take, lease, until),
            State::Holding { take, lease, until } => self.hold(index, take, lease, until),
        }
    }

    fn decide(&mut self, index: usize, view: &View) -> State {
        let Some(config) = config_of(view) else { return State::Idle };
        match decide(&self.layout, &config, view, &self.nodes[index].me, self.random.next()) {
            Decision::Take(take) => {
                let lease = self.store.grant(self.now, TIME_TO_LIVE);
                if self.random.percent(10) {
                    return State::Idle;
                }
                State::Granted { take: *take, lease, until: self.now + TIME_TO_LIVE }
            }
            Decision::Delete(deletion) => {
                let transaction = deletion.transaction(&self.layout);
                let _ = self.send(transaction);
                State::Idle
            }
            Decision::Refuse(_) => State::Idle,
        }
    }

    /// `None` where no answer comes, whether or not the request arrived.
    fn send(&mut self, transaction: Transaction) -> Option<bool> {
        match self.random.below(10) {
            0 => {
                self.late.push(Late::Run(transaction));
                None
            }
            1 => {
                let _ = self.store.run(&transaction);
                None
            }
            _ => Some(self.store.run(&transaction).is_some_and(|it| it.succeeded)),
        }
    }

    fn take(&mut self, index: usize, take: Take, lease: LeaseId, until: u64) -> State {
        let transaction = take.transaction(&self.layout, &self.nodes[index].me, lease);
        match self.send(transaction) {
            Some(true) => {
                self.holdings += 1;
                self.nodes[index].me.previous = Some(take.subnet);
                State::Holding { take, lease, until }
            }
            Some(false) => {
                self.store.revoke(lease);
                State::Idle
            }
            None => {
                self.late.push(Late::Revoke(lease));
                State::Idle
            }
        }
    }

    fn hold(&mut self, index: usize, take: Take, lease: LeaseId, until: u64) -> State {
        if self.random.percent(40) {
            let view = self.look();
            return match stand(&view, &self.nodes[index].me, &take, lease) {
                Standing::Intact | Standing::Contested { .. } => State::Holding { take, lease, until },
                Standing::Rewrite => State::Looked(Box::new(view)),
                Standing::Gone => State::Idle,
                Standing::Superseded { by } => panic!("{by:?} has the name of node {index}"),
            };
        }
        match self.random.below(10) {
            0 => self.late.push(Late::KeepAlive(lease)),
            1 => {
                let _ = self.store.keep_alive(lease, self.now, TIME_TO_LIVE);
            }
            _ if self.store.keep_alive(lease, self.now, TIME_TO_LIVE) => {
                return State::Holding { take, lease, until: self.now + TIME_TO_LIVE };
            }
            _ => return State::Idle,
        }
        State::Holding { take, lease, until }
    }

    fn arrive_late(&mut self) {
        if self.late.is_empty() {
            return;
        }
        let index = self.random.below(self.late.len() as u64);
        match self.late.swap_remove(usize::try_from(index).unwrap()) {
            Late::Run(transaction) => drop(self.store.run(&transaction)),
            Late::KeepAlive(lease) => drop(self.store.keep_alive(lease, self.now, TIME_TO_LIVE)),
            Late::Revoke(lease) => self.store.revoke(lease),
        }
    }

    /// A node crashes, loses its file, or gets another address.
    fn disturb(&mut self) {
        let address = self.random.address();
        let index = usize::try_from(self.random.below(4)).unwrap();
        let what = self.random.below(3);
        let node = &mut self.nodes[index];
        node.state = State::Down;
        match what {
            0 => node.me.previous = None,
            1 => node.me.attributes = attributes(address),
            _ => {}
        }
    }

    fn operate(&mut self) {
        let address = self.random.address();
        let low = u8::try_from(self.random.below(8)).unwrap() * 8;
        match self.random.below(6) {
            0 => {
                let config = CONFIGS[usize::try_from(self.random.below(5)).unwrap()];
                self.store.put(&self.layout.config(), config, 0);
            }
            1 => {
                let length = 28 + self.random.below(2);
                let key = format!("/coreos.com/network/subnets/10.5.0.{low}-{length}");
                self.store.put(&key, &attributes(address).render(), 0);
            }
            2 => self.store.put("/coreos.com/network/subnets/not-a-subnet", "{", 0),
            _ => {
                let range = self.layout.subnets();
                let keys: Vec<Vec<u8>> = self.store.keys.keys().filter(|it| range.contains(it)).cloned().collect();
                if !keys.is_empty() {
                    let index = self.random.below(keys.len() as u64);
                    let key = String::from_utf8(keys[usize::try_from(index).unwrap()].clone()).unwrap();
                    self.store.delete(&key);
                }
            }
        }
    }

    fn flanneld(&mut self) {
        let index = self.random.below(self.flannelds.len() as u64);
        let index = usize::try_from(index).unwrap();
        let address = self.flannelds[index].address;
        let Some(view) = self.flannelds[index].view.take() else {
            self.flannelds[index].view = Some(self.look());
            return;
        };
        let Some(config) = config_of(&view) else { return };
        let lease = self.store.grant(self.now, TIME_TO_LIVE);
        let value = attributes(address).render();
        let own = view.records.iter().find(|it| it.attributes.as_ref().is_ok_and(|it| it.public_v4 == Some(address)));
        if let Some(subnet) = own.and_then(|it| it.subnet.as_ref().ok()) {
            let key = self.layout.subnet(subnet);
            if config.fits(subnet) {
                self.store.put(&key, &value, lease);
            } else {
                self.store.delete(&key);
            }
            return;
        }
        let taken: Vec<_> = view
            .records
            .iter()
            .filter_map(portolan_ipam::flannel::Record::covers)
            .flat_map(|it| it.prefixes())
            .collect();
        let pools = [config.v4, config.v6];
        let mut chosen = Vec::new();
        for pool in pools.iter().flatten() {
            let free = pool.free(&taken, 100);
            if free.is_empty() {
                return;
            }
            chosen.push(free[usize::try_from(self.random.below(free.len() as u64)).unwrap()]);
        }
        let key = self.layout.subnet(&Subnet::from_prefixes(&chosen).unwrap());
        let put = Operation::Put { key: key.clone().into(), value: value.into(), lease };
        let _ = self.store.run(&Transaction::default().when(Compare::absent(key)).then(put));
    }

    fn check(&self) {
        let held: Vec<(usize, &Subnet)> = self
            .nodes
            .iter()
            .enumerate()
            .filter_map(|(index, node)| match &node.state {
                State::Holding { take, until, .. } if self.now < *until => Some((index, &take.subnet)),
                _ => None,
            })
            .collect();
        for (position, (one, mine)) in held.iter().enumerate() {
            for (other, theirs) in &held[position + 1..] {
                assert!(!mine.overlaps(theirs), "node-{one} holds {mine} while node-{other} holds {theirs}");
            }
        }
    }
}

#[test]
fn no_two_nodes_ever_hold_one_subnet() {
    let given = std::env::var("PORTOLAN_INTERLEAVINGS").ok().and_then(|it| it.parse().ok());
    let interleavings = given.unwrap_or(INTERLEAVINGS);
    let mut holdings = 0;
    for seed in 0..interleavings {
        let outcome = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            (0..STEPS).for_each(|_| world.step());
            world.holdings
        });
        holdings += outcome.unwrap_or_else(|_| panic!("by seed {seed}"));
    }
    println!("{interleavings} interleavings of {STEPS} steps: subnets were taken {holdings} times");
    // A simulation in which nothing happens would prove nothing.
    assert!(holdings > interleavings, "subnets were taken {holdings} times only");
}

/// Left alone, every node that can have a subnet gets one and keeps it over restarts.
#[test]
fn what_is_left_alone_settles() {
    for seed in 0..200 {
        let mut world = World::new(seed);
        world.flannelds.clear();
        (0..STEPS).for_each(|_| world.step());
        // The disturbances end: everything that was on its way arrives, and what is not renewed ends.
        while !world.late.is_empty() {
            world.arrive_late();
        }
        world.store.put(&world.layout.config(), r#"{"Network":"10.6.0.0/16"}"#, 0);
        world.now += 2 * TIME_TO_LIVE;
        world.store.expire(world.now);
        for (index, node) in (1u8..).zip(&mut world.nodes) {
            node.me.attributes = attributes(Ipv4Addr::new(192, 168, 7, index));
            node.state = State::Idle;
        }
        let mut subnets = Vec::new();
        for index in 0..world.nodes.len() {
            let mut held = None;
            for _ in 0..20 {
                let view = world.look();
                let Decision::Take(take) = world.decide_now(index, &view) else { continue };
                let lease = world.store.grant(world.now, TIME_TO_LIVE);
                let done = world.store.run(&take.transaction(&world.layout, &world.nodes[index].me, lease));
                if done.is_some_and(|it| it.succeeded) {
                    held = Some(take.subnet);
                    break;
                }
            }
            let held = held.unwrap_or_else(|| panic!("node-{index} gets nothing, seed {seed}"));
            let view = world.look();
            let Decision::Take(again) = world.decide_now(index, &view) else { panic!("seed {seed}") };
            assert_eq!(again.subnet, held, "the subnet is kept, seed {seed}");
            subnets.push(held);
        }
        subnets.sort();
        subnets.dedup();
        assert_eq!(subnets.len(), 4);
    }
}

impl World {
    fn decide_now(&mut self, index: usize, view: &View) -> Decision {
        let config = config_of(view).unwrap();
        let decision = decide(&self.layout, &config, view, &self.nodes[index].me, self.random.next());
        if let Decision::Delete(deletion) = &decision {
            assert!(self.store.run(&deletion.transaction(&self.layout)).unwrap().succeeded);
        }
        decision
    }
}
