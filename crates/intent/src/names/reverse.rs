//! Addresses to names: the reverse domains, and the index from addresses to objects.
//!
//! The index is brought up to date from the difference of two snapshots, which the tables' shared
//! structure yields at a cost that follows the change; then each address that an object gained or
//! lost costs one insertion in a tree of all addresses. It only names candidates: a lookup reads
//! the object itself in the snapshot, so a stale index can miss a name but never invent one.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use imbl::{OrdMap, OrdSet};
use portolan_net::ObjectKey;
use portolan_state::{EndpointSlice, Pod, Service, Snapshot};

use super::DomainName;

/// An object that holds an address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holder {
    /// A Service, at `spec.clusterIPs`.
    Service(ObjectKey),
    /// A slice with an endpoint.
    EndpointSlice(ObjectKey),
    /// A pod.
    Pod(ObjectKey),
}

/// Who holds which address. Cloning costs a few reference counts.
#[derive(Debug, Clone, Default)]
pub(super) struct AddressIndex {
    holders: OrdMap<IpAddr, OrdSet<Holder>>,
    services: OrdMap<ObjectKey, Arc<Service>>,
    endpoint_slices: OrdMap<ObjectKey, Arc<EndpointSlice>>,
    pods: OrdMap<ObjectKey, Arc<Pod>>,
}

impl AddressIndex {
    /// Brings the index up to a snapshot. Pods are indexed only where they are asked for.
    pub(super) fn update(&mut self, snapshot: &Snapshot, with_pods: bool) {
        let holders = &mut self.holders;
        follow(holders, &self.services, &snapshot.services, Holder::Service, |service| {
            service.cluster_addresses.iter().copied().collect()
        });
        follow(holders, &self.endpoint_slices, &snapshot.endpoint_slices, Holder::EndpointSlice, |slice| {
            slice.endpoints.iter().map(|endpoint| endpoint.address).collect()
        });
        self.services = snapshot.services.clone();
        self.endpoint_slices = snapshot.endpoint_slices.clone();
        if with_pods {
            follow(holders, &self.pods, &snapshot.pods, Holder::Pod, |pod| pod.addresses.iter().copied().collect());
            self.pods = snapshot.pods.clone();
        }
    }

    /// The objects that held an address when the index was last brought up to date, sorted.
    pub(super) fn holders(&self, address: IpAddr) -> impl Iterator<Item = &Holder> {
        self.holders.get(&address).into_iter().flat_map(OrdSet::iter)
    }
}

fn follow<V: PartialEq>(
    holders: &mut OrdMap<IpAddr, OrdSet<Holder>>,
    old: &OrdMap<ObjectKey, Arc<V>>,
    new: &OrdMap<ObjectKey, Arc<V>>,
    holder: impl Fn(ObjectKey) -> Holder,
    addresses: impl Fn(&V) -> BTreeSet<IpAddr>,
) {
    for difference in old.diff(new) {
        let (key, before, after) = match difference {
            DiffItem::Add(key, value) => (key, BTreeSet::new(), addresses(value)),
            DiffItem::Update { old, new } => (new.0, addresses(old.1), addresses(new.1)),
            DiffItem::Remove(key, value) => (key, addresses(value), BTreeSet::new()),
        };
        let holder = holder(key.clone());
        for address in before.difference(&after) {
            if let Some(set) = holders.get_mut(address) {
                set.remove(&holder);
                if set.is_empty() {
                    holders.remove(address);
                }
            }
        }
        for address in after.difference(&before) {
            holders.entry(*address).or_default().insert(holder.clone());
        }
    }
}

/// The address that a name in `in-addr.arpa` (RFC 1035 §3.5) or `ip6.arpa` (RFC 3596 §2.5) stands
/// for; `None` for other names and for those of whole prefixes.
pub fn address_of(name: &DomainName) -> Option<IpAddr> {
    let labels: Vec<&[u8]> = name.labels().collect();
    match labels.as_slice() {
        [octets @ .., b"in-addr", b"arpa"] if octets.len() == 4 => {
            let mut address = [0u8; 4];
            for (octet, label) in address.iter_mut().rev().zip(octets) {
                let text = std::str::from_utf8(label).ok()?;
                // `01` and `+1` would give one address several names.
                *octet = text.parse().ok().filter(|number: &u8| number.to_string() == text)?;
            }
            Some(Ipv4Addr::from(address).into())
        }
        [nibbles @ .., b"ip6", b"arpa"] if nibbles.len() == 32 => {
            let mut address = 0u128;
            for label in nibbles.iter().rev() {
                let [digit] = label else { return None };
                address = address << 4 | u128::from(char::from(*digit).to_digit(16)?);
            }
            Some(Ipv6Addr::from(address).into())
        }
        _ => None,
    }
}

/// The name of an address in the reverse domains.
pub fn reverse_name(address: IpAddr) -> DomainName {
    let text = match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(address) => {
            let value = u128::from(address);
            let nibbles: Vec<String> = (0..32).map(|index| format!("{:x}", value >> (4 * index) & 0xf)).collect();
            format!("{}.ip6.arpa", nibbles.join("."))
        }
    };
    text.parse().unwrap_or_default()
}
