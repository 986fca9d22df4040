//! Which address, port or prefix an object gets.
//!
//! Allocation is deterministic and has no memory of its own: what is taken is what the other objects hold.
//! ClusterIPs are the lowest free address, beginning with the second: the first is left to the API
//! server's own Service, as in Kubernetes. NodePorts begin at a place that the Service's name and port
//! give, so that a port which just became free is rarely given to another Service at once, and go on
//! to the next free one. podCIDRs are the lowest free subnet.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{NodePrefixLengths, Objects};
use crate::fields::{at, items, name, namespace, number, text, texts};

/// Namespace and name of a Service.
type Holder = (String, String);

/// Which Service holds which address and node port: an index of all Services, kept as they change.
///
/// Two Services may hold one thing, if they came from elsewhere; each lets go for itself.
#[derive(Debug, Clone, Default)]
pub struct Holders {
    addresses: BTreeMap<IpAddr, BTreeSet<Holder>>,
    runs: Runs,
    ports: BTreeMap<(u16, String), BTreeSet<Holder>>,
}

/// Addresses that are held without a gap between them: the first and the last of each run. The next free
/// one is found by one look, whatever their number.
#[derive(Debug, Clone, Default)]
struct Runs(BTreeMap<IpAddr, IpAddr>);

impl Runs {
    /// The run that an address is in.
    fn around(&self, address: &IpAddr) -> Option<(IpAddr, IpAddr)> {
        let (first, last) = self.0.range(..=address).next_back()?;
        (last >= address && first.is_ipv4() == address.is_ipv4()).then_some((*first, *last))
    }

    fn insert(&mut self, address: IpAddr) {
        if self.around(&address).is_some() {
            return;
        }
        let before = previous(&address).and_then(|it| self.around(&it));
        let after = next(&address).and_then(|it| self.0.remove(&it));
        self.0.insert(before.map_or(address, |run| run.0), after.unwrap_or(address));
    }

    fn remove(&mut self, address: &IpAddr) {
        let Some((first, last)) = self.around(address) else { return };
        self.0.remove(&first);
        if let Some(before) = previous(address).filter(|_| first < *address) {
            self.0.insert(first, before);
        }
        if let Some(after) = next(address).filter(|_| *address < last) {
            self.0.insert(after, last);
        }
    }
}

fn next(address: &IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => u32::from(*address).checked_add(1).map(|bits| Ipv4Addr::from(bits).into()),
        IpAddr::V6(address) => u128::from(*address).checked_add(1).map(|bits| Ipv6Addr::from(bits).into()),
    }
}

fn previous(address: &IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => u32::from(*address).checked_sub(1).map(|bits| Ipv4Addr::from(bits).into()),
        IpAddr::V6(address) => u128::from(*address).checked_sub(1).map(|bits| Ipv6Addr::from(bits).into()),
    }
}

impl Holders {
    /// The index of some Services.
    pub fn of<'a>(services: impl IntoIterator<Item = &'a Value>) -> Holders {
        let mut holders = Holders::default();
        for service in services {
            holders.add(service);
        }
        holders
    }

    /// A Service is there, and holds what it says.
    pub fn add(&mut self, service: &Value) {
        let holder = || (namespace(service).to_owned(), name(service).to_owned());
        for address in service_addresses(service) {
            self.addresses.entry(address).or_default().insert(holder());
            self.runs.insert(address);
        }
        for port in service_ports(service) {
            self.ports.entry(port).or_default().insert(holder());
        }
    }

    /// A Service is gone, or about to be another.
    pub fn remove(&mut self, service: &Value) {
        let holder = (namespace(service).to_owned(), name(service).to_owned());
        for address in service_addresses(service) {
            let_go(&mut self.addresses, &address, &holder);
            if !self.addresses.contains_key(&address) {
                self.runs.remove(&address);
            }
        }
        for port in service_ports(service) {
            let_go(&mut self.ports, &port, &holder);
        }
    }
}

fn let_go<K: Ord>(held: &mut BTreeMap<K, BTreeSet<Holder>>, key: &K, holder: &Holder) {
    if let Some(holders) = held.get_mut(key) {
        holders.remove(holder);
        if holders.is_empty() {
            held.remove(key);
        }
    }
}

/// The node ports of a Service, with that of its health check.
fn service_ports(service: &Value) -> Vec<(u16, String)> {
    let number_at = |object: &Value, field: &str| number(object, field).and_then(|port| u16::try_from(port).ok());
    let ports = items(service, "spec.ports").iter();
    let ports = ports.filter_map(|port| Some((number_at(port, "nodePort")?, protocol(port).to_owned())));
    let health = number_at(service, "spec.healthCheckNodePort").filter(|port| *port > 0);
    ports.chain(health.map(|port| (port, "TCP".to_owned()))).collect()
}

/// What all Services but one hold, and what that one was given meanwhile.
#[derive(Debug)]
pub(super) struct Taken<'a> {
    holders: &'a Holders,
    own: Holder,
    ports: BTreeMap<(u16, String), String>,
}

impl<'a> Taken<'a> {
    /// What all Services but one hold.
    pub(super) fn by_others(holders: &'a Holders, own: (&str, &str)) -> Taken<'a> {
        Taken { holders, own: (own.0.to_owned(), own.1.to_owned()), ports: BTreeMap::new() }
    }

    fn other(&self, holders: &BTreeSet<Holder>) -> Option<String> {
        holders.iter().find(|holder| **holder != self.own).map(|(namespace, name)| format!("{namespace}/{name}"))
    }

    /// Who holds an address.
    pub(super) fn address_holder(&self, address: &IpAddr) -> Option<String> {
        self.holders.addresses.get(address).and_then(|holders| self.other(holders))
    }

    /// Who holds a node port.
    pub(super) fn port_holder(&self, port: u16, protocol: &str) -> Option<String> {
        let key = (port, protocol.to_owned());
        self.ports.get(&key).cloned().or_else(|| self.holders.ports.get(&key).and_then(|holders| self.other(holders)))
    }

    pub(super) fn take_port(&mut self, port: u16, protocol: &str, holder: &str) {
        self.ports.insert((port, protocol.to_owned()), holder.to_owned());
    }

    /// The lowest address of a prefix that nobody holds, from the second host on.
    pub(super) fn free_address(&self, prefix: &IpNet) -> Option<IpAddr> {
        // The first address after the network's own is left out.
        let first = next(&next(&prefix.network())?)?;
        let free = match self.holders.runs.around(&first) {
            Some((_, last)) => next(&last)?,
            None => first,
        };
        // The last address of an IPv4 prefix is for broadcasts.
        let is_broadcast = free.is_ipv4() && free == prefix.broadcast();
        (prefix.contains(&free) && !is_broadcast).then_some(free)
    }

    /// A free node port; the search begins where the seed says.
    pub(super) fn free_port(&self, range: &RangeInclusive<u16>, protocol: &str, seed: &str) -> Option<u16> {
        let count = u64::from(range.end().checked_sub(*range.start())?) + 1;
        let digest = Sha256::digest(seed.as_bytes());
        let start = digest.iter().take(8).fold(0u64, |sum, byte| sum << 8 | u64::from(*byte)) % count;
        (0..count)
            .filter_map(|step| u16::try_from(u64::from(*range.start()) + (start + step) % count).ok())
            .find(|port| self.port_holder(*port, protocol).is_none())
    }
}

/// Whether a Service or a Node holds an address, a port or a prefix that it did not hold before.
pub(crate) fn takes_more(old: Option<&Value>, new: &Value) -> bool {
    let addresses = |object: &Value| service_addresses(object).into_iter().collect::<BTreeSet<_>>();
    let ports = |object: &Value| service_ports(object).into_iter().collect::<BTreeSet<_>>();
    let prefixes = |object: &Value| pod_prefixes(object).into_iter().collect::<BTreeSet<_>>();
    let nothing = Value::Null;
    let old = old.unwrap_or(&nothing);
    !addresses(new).is_subset(&addresses(old))
        || !ports(new).is_subset(&ports(old))
        || !prefixes(new).is_subset(&prefixes(old))
}

/// The protocol of a port; TCP unless it says otherwise.
pub(super) fn protocol(port: &Value) -> &str {
    at(port, "protocol").as_str().unwrap_or("TCP")
}

/// The ClusterIPs of a Service.
pub(super) fn service_addresses(service: &Value) -> Vec<IpAddr> {
    let mut addresses: BTreeSet<IpAddr> = texts(service, "spec.clusterIPs").filter_map(|it| it.parse().ok()).collect();
    addresses.extend(text(service, "spec.clusterIP").parse::<IpAddr>());
    addresses.into_iter().collect()
}

/// The podCIDRs for a node that has none: one of each of the cluster's prefixes.
///
/// The error is the prefix that has no free subnet left.
pub fn node_prefixes(nodes: &Objects, cluster: &[IpNet], lengths: NodePrefixLengths) -> Result<Vec<IpNet>, IpNet> {
    let taken: Vec<IpNet> = nodes.values().flat_map(pod_prefixes).collect();
    cluster.iter().map(|prefix| free_subnet(prefix, lengths, &taken).ok_or(*prefix)).collect()
}

/// The podCIDRs of a node that can be read.
pub(super) fn pod_prefixes(node: &Value) -> Vec<IpNet> {
    let mut prefixes: BTreeSet<IpNet> = texts(node, "spec.podCIDRs").filter_map(|it| it.parse().ok()).collect();
    prefixes.extend(text(node, "spec.podCIDR").parse::<IpNet>());
    prefixes.into_iter().collect()
}

/// Whether two prefixes share an address.
pub(crate) fn overlaps(left: &IpNet, right: &IpNet) -> bool {
    left.contains(&right.network()) || right.contains(&left.network())
}

fn free_subnet(prefix: &IpNet, lengths: NodePrefixLengths, taken: &[IpNet]) -> Option<IpNet> {
    // A subnet of the wanted size is taken wholly or not at all unless somebody chose another size by
    // hand; the exact ones are looked up, only the others are compared one by one.
    let length = lengths.of(prefix).max(prefix.prefix_len());
    let exact: HashSet<IpNet> = taken.iter().filter(|it| it.prefix_len() == length).map(IpNet::trunc).collect();
    let others: Vec<&IpNet> = taken.iter().filter(|it| it.prefix_len() != length).collect();
    subnets(prefix, length).find(|it| !exact.contains(it) && !others.iter().any(|other| overlaps(other, it)))
}

fn subnets(prefix: &IpNet, length: u8) -> Box<dyn Iterator<Item = IpNet>> {
    match prefix {
        IpNet::V4(prefix) => {
            let (first, last) = (u32::from(prefix.network()), u32::from(prefix.broadcast()));
            let step = 1usize.checked_shl(32 - u32::from(length)).unwrap_or(usize::MAX);
            let nets = (first..=last).step_by(step);
            Box::new(nets.filter_map(move |bits| Ipv4Net::new(bits.into(), length).ok().map(IpNet::V4)))
        }
        IpNet::V6(prefix) => {
            let (first, last) = (u128::from(prefix.network()), u128::from(prefix.broadcast()));
            let step = 1u128.checked_shl(128 - u32::from(length)).unwrap_or(u128::MAX);
            let nets = std::iter::successors(Some(first), move |at| at.checked_add(step).filter(|next| *next <= last));
            Box::new(nets.filter_map(move |bits| Ipv6Net::new(bits.into(), length).ok().map(IpNet::V6)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_know_what_is_held(steps in proptest::collection::vec((any::<bool>(), 0..24u8, any::<bool>()), 0..80)) {
            let mut runs = Runs::default();
            let mut held = BTreeSet::new();
            for (is_v4, last, is_added) in steps {
                let address: IpAddr =
                    if is_v4 { [255, 255, 255, 255 - last].into() } else { [0, 0, 0, 0, 0, 0, 0, u16::from(last)].into() };
                if is_added {
                    runs.insert(address);
                    held.insert(address);
                } else {
                    runs.remove(&address);
                    held.remove(&address);
                }
            }
            let mut found = BTreeSet::new();
            for (first, last) in &runs.0 {
                prop_assert!(previous(first).is_none_or(|it| runs.around(&it).is_none()), "two runs touch");
                let all = std::iter::successors(Some(*first), next).take_while(|it| it <= last);
                found.extend(all);
            }
            prop_assert_eq!(found, held);
        }
    }
}
