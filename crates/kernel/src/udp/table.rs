//! The routing table: which prefix is behind which peer, who the peers are, and how much the path to each carries.
//!
//! A table never changes: a new one takes its place. Threads look for a new one with one atomic read a batch, and go on
//! with the one that they hold. What was learnt of a path goes on from table to table.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use portolan_program::udp::Route;

/// How long it is believed that a path carries no more than it did. Then a larger packet is tried again; if the kernel
/// knows that the path is still narrow (`net.ipv4.route.mtu_expires`, ten minutes), it says so at once.
const NARROW_MS: u64 = 60_000;

/// Another node.
#[derive(Debug)]
pub(super) struct Peer {
    /// Where it is.
    pub(super) address: SocketAddr,
    /// The largest packet that the path carries inside, and until when that is believed. 0: nothing is known.
    inside_max: AtomicU32,
    until_ms: AtomicU64,
}

impl Peer {
    fn new(address: SocketAddr) -> Peer {
        Peer { address, inside_max: AtomicU32::new(0), until_ms: AtomicU64::new(0) }
    }

    /// The largest packet that the path is known to carry, if it is known.
    pub(super) fn inside_max(&self, now_ms: u64) -> Option<u32> {
        match self.inside_max.load(Ordering::Relaxed) {
            0 => None,
            bytes => (now_ms < self.until_ms.load(Ordering::Relaxed)).then_some(bytes),
        }
    }

    /// Remembers what the path carries.
    pub(super) fn narrow(&self, bytes: u32, now_ms: u64) {
        self.until_ms.store(now_ms + NARROW_MS, Ordering::Relaxed);
        self.inside_max.store(bytes.max(1), Ordering::Relaxed);
    }
}

/// Bytes of IP and UDP headers around a packet.
pub(super) fn overhead(peer: &SocketAddr) -> u32 {
    if peer.is_ipv4() { 28 } else { 48 }
}

/// Addresses from `begin` on, up to where the next range begins. IPv4 lies below 2^32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    begin: u128,
    peer: Option<u32>,
}

/// A routing table.
#[derive(Debug, Default)]
pub(super) struct Table {
    v4: Vec<Range>,
    v6: Vec<Range>,
    peers: Vec<Arc<Peer>>,
    by_address: HashMap<SocketAddr, u32>,
}

impl Table {
    /// Builds the table of some routes, which come in order of their prefixes. Peers that were known are taken over from
    /// the table before.
    pub(super) fn build<'a>(routes: impl IntoIterator<Item = (&'a IpNet, &'a Route)>, before: &Table) -> Table {
        let mut table = Table::default();
        let mut prefixes: [Vec<(u128, u128, u32)>; 2] = [Vec::new(), Vec::new()];
        for (prefix, route) in routes {
            let peer = table.add_peer(normal(route.peer), before);
            let (first, last) = (number(prefix.network()), number(prefix.broadcast()));
            prefixes[usize::from(prefix.addr().is_ipv6())].push((first, last, peer));
        }
        let [v4, v6] = prefixes.map(|prefixes| flatten(&prefixes));
        Table { v4, v6, ..table }
    }

    fn add_peer(&mut self, address: SocketAddr, before: &Table) -> u32 {
        if let Some(index) = self.by_address.get(&address) {
            return *index;
        }
        let known = before.by_address.get(&address).and_then(|index| before.peers.get(*index as usize));
        let index = self.peers.len() as u32;
        self.peers.push(known.cloned().unwrap_or_else(|| Arc::new(Peer::new(address))));
        self.by_address.insert(address, index);
        index
    }

    /// The peer that a destination is behind: the longest prefix decides.
    pub(super) fn lookup(&self, destination: IpAddr) -> Option<u32> {
        let ranges = if destination.is_ipv4() { &self.v4 } else { &self.v6 };
        let address = number(destination);
        let after = ranges.partition_point(|range| range.begin <= address);
        ranges.get(after.checked_sub(1)?)?.peer
    }

    /// A peer.
    pub(super) fn peer(&self, index: u32) -> Option<&Arc<Peer>> {
        self.peers.get(index as usize)
    }

    /// All peers.
    pub(super) fn peers(&self) -> &[Arc<Peer>] {
        &self.peers
    }

    /// Whether datagrams from there are accepted.
    pub(super) fn knows(&self, source: SocketAddr) -> bool {
        self.by_address.contains_key(&normal(source))
    }
}

/// Without scope and flow label, which say nothing of who it is.
fn normal(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port())
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

/// Turns prefixes, sorted by their first address and then by length, into ranges that do not overlap. Two prefixes
/// overlap only if one holds the other: those that are open are a stack.
fn flatten(prefixes: &[(u128, u128, u32)]) -> Vec<Range> {
    let mut ranges = BTreeMap::new();
    let mut open: Vec<(u128, u32)> = Vec::new();
    let close = |open: &mut Vec<(u128, u32)>, ranges: &mut BTreeMap<u128, Option<u32>>, until: Option<u128>| {
        while let Some((last, _)) = open.last().copied() {
            if until.is_some_and(|until| last >= until) {
                return;
            }
            open.pop();
            if let Some(next) = last.checked_add(1) {
                // What opens here later has the last word.
                ranges.insert(next, open.last().map(|(_, peer)| *peer));
            }
        }
    };
    for (first, last, peer) in prefixes {
        close(&mut open, &mut ranges, Some(*first));
        ranges.insert(*first, Some(*peer));
        open.push((*last, *peer));
    }
    close(&mut open, &mut ranges, None);
    ranges.into_iter().map(|(begin, peer)| Range { begin, peer }).collect()
}

/// The table that is in force.
#[derive(Debug, Default)]
pub(super) struct Shared {
    generation: AtomicU64,
    table: Mutex<Arc<Table>>,
}

impl Shared {
    /// Puts a table in force.
    pub(super) fn set(&self, table: Arc<Table>) {
        *self.table.lock().unwrap_or_else(PoisonError::into_inner) = table;
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// The table that is in force.
    pub(super) fn get(&self) -> Arc<Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One thread's hold on the table.
#[derive(Debug)]
pub(super) struct Held {
    shared: Arc<Shared>,
    generation: u64,
    table: Arc<Table>,
}

impl Held {
    pub(super) fn new(shared: Arc<Shared>) -> Held {
        let generation = shared.generation.load(Ordering::Acquire);
        let table = shared.get();
        Held { shared, generation, table }
    }

    /// The table in force. The lock is taken only when it was replaced since.
    pub(super) fn current(&mut self) -> &Arc<Table> {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.generation = generation;
            self.table = self.shared.get();
        }
        &self.table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_net::Origin;
    use portolan_program::udp::{Inward, Outward, Program, Tunnel, inward, outward};
    use proptest::prelude::*;

    fn program(routes: &[(String, u8)]) -> Program {
        let origin = || Origin::configuration("fabric");
        let route = |(prefix, peer): &(String, u8)| {
            let peer = SocketAddr::new([192, 0, 2, *peer].into(), 8285);
            (prefix.parse::<IpNet>().unwrap().trunc(), Route { peer, origin: origin() })
        };
        let tunnel = Tunnel {
            device: "flannel0".into(),
            local: vec![[192, 0, 2, 1].into()],
            port: 8285.try_into().unwrap(),
            mtu: 1472,
            origin: origin(),
        };
        Program { tunnel: Some(tunnel), routes: routes.iter().map(route).collect() }
    }

    proptest! {
        #[test]
        fn it_says_what_the_room_says(
            prefixes in proptest::collection::vec((any::<u32>(), 0u8..33, any::<bool>(), 1u8..9), 0..40),
            asked: Vec<u32>,
        ) {
            let text = |(bits, length, is_v6, peer): &(u32, u8, bool, u8)| {
                // Few bits are used, so that prefixes hold each other.
                let bits = bits & 0xf0f0_0f0f;
                let address = std::net::Ipv4Addr::from(bits);
                match is_v6 {
                    false => (format!("{address}/{length}"), *peer),
                    true => (format!("{}/{}", std::net::Ipv6Addr::from(u128::from(bits) << 96), length * 4), *peer),
                }
            };
            let program = program(&prefixes.iter().map(text).collect::<Vec<_>>());
            let table = Table::build(&program.routes, &Table::default());
            let near = prefixes.iter().map(|(bits, ..)| bits & 0xf0f0_0f0f);
            let near: Vec<u32> = near.flat_map(|bits| [bits, bits ^ 1, bits.wrapping_sub(1)]).collect();
            for bits in asked.into_iter().chain(near) {
                let v6 = std::net::Ipv6Addr::from(u128::from(bits) << 96);
                for address in [IpAddr::from(std::net::Ipv4Addr::from(bits)), IpAddr::from(v6)] {
                    if address.is_multicast() {
                        continue;
                    }
                    let expected = match outward(&program, address, 64, 100, false) {
                        Outward::Sent { peer, .. } => Some(peer),
                        Outward::Dropped(..) => None,
                    };
                    let found = table.lookup(address).and_then(|peer| table.peer(peer)).map(|peer| peer.address);
                    prop_assert_eq!(found, expected, "{}", address);
                }
            }
            for peer in 0..10 {
                let source = SocketAddr::new([192, 0, 2, peer].into(), 8285);
                prop_assert_eq!(table.knows(source), inward(&program, source) == Inward::Delivered);
            }
        }
    }

    #[test]
    fn what_is_known_of_a_path_outlives_the_table_and_not_its_time() {
        let routes = program(&[("10.42.1.0/24".into(), 2)]).routes;
        let first = Table::build(&routes, &Table::default());
        first.peers()[0].narrow(1300, 1000);
        let second = Table::build(&program(&[("10.42.7.0/24".into(), 3), ("10.42.1.0/24".into(), 2)]).routes, &first);
        let peer = second.lookup([10, 42, 1, 1].into()).and_then(|peer| second.peer(peer)).unwrap();
        assert_eq!(peer.inside_max(2000), Some(1300));
        assert_eq!(peer.inside_max(1000 + NARROW_MS), None);
        let other = second.lookup([10, 42, 7, 1].into()).and_then(|peer| second.peer(peer)).unwrap();
        assert_eq!(other.inside_max(2000), None);
    }
}
