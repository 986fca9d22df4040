//! The addresses of one node's pods.
//!
//! ```text
//!   10.42.1.0/24   .0 network   .1 gateway   .2 ………………… .254   .255 broadcast
//!   fd00:1::/64    ::0 routers  ::1 gateway  ::2 ………………… ::ffff:ffff:ffff:ffff
//!                                            ▲ what is handed out, next-fit
//! ```
//!
//! No list of free addresses exists: the memory follows the addresses in use, whatever the prefix's
//! length. The search goes on behind the address that was handed out last, so a freed address rests
//! until the prefix has been gone through once; neighbours that still remember its old owner (ARP
//! caches, connection tracking, DNS) do not meet a new one there at once.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use portolan_net::Family;

use crate::limits::OWNERS_MAX;

/// Why an owner gets no address. Nothing is taken then, of either family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// No prefix is known yet.
    #[error("this node has no pod prefix yet (Node spec.podCIDRs)")]
    NoPrefix,
    /// Every address of a prefix is taken.
    #[error("no address is free in the pod prefix {prefix}: {in_use} are in use")]
    Exhausted {
        /// The prefix.
        prefix: IpNet,
        /// How many of its addresses are handed out.
        in_use: usize,
    },
}

/// What is wrong with an owner's recorded addresses, or with the node's prefixes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressesProblem<O> {
    /// Another owner has the address; it stays theirs.
    #[error("{address} is recorded for two owners")]
    Taken {
        /// The address.
        address: IpAddr,
        /// Who keeps it.
        owner: O,
    },
    /// The owner's addresses cannot be recorded, because it has others already.
    #[error("the owner has other addresses already")]
    OwnsOthers {
        /// The owner.
        owner: O,
    },
}

/// The addresses of one node's pods: at most one prefix per family, and who owns what.
///
/// No address ever has two owners, and none outside the prefixes is handed out. Addresses that were
/// handed out before the prefixes changed stay with their owners until these release them.
#[derive(Debug, Clone)]
pub struct PodAddresses<O> {
    prefixes: Vec<PodPrefix>,
    owners: BTreeMap<IpAddr, O>,
    addresses: BTreeMap<O, Vec<IpNet>>,
    latest: BTreeMap<Family, IpAddr>,
}

#[derive(Debug, Clone, Copy)]
struct PodPrefix {
    prefix: IpNet,
    /// The first and the last address that may be handed out; none where the prefix is too short
    /// for a pod beside the gateway.
    range: Option<(IpAddr, IpAddr)>,
}

impl<O> Default for PodAddresses<O> {
    fn default() -> Self {
        PodAddresses {
            prefixes: Vec::new(),
            owners: BTreeMap::new(),
            addresses: BTreeMap::new(),
            latest: BTreeMap::new(),
        }
    }
}

impl<O: Ord + Clone> PodAddresses<O> {
    /// Sets the prefixes: of each family the first one counts, as in `spec.podCIDRs`.
    pub fn set_prefixes(&mut self, prefixes: &[IpNet]) {
        self.prefixes = Family::ALL
            .into_iter()
            .filter_map(|family| prefixes.iter().find(|prefix| Family::of_prefix(prefix) == family))
            .map(|prefix| PodPrefix::new(prefix.trunc()))
            .collect();
    }

    /// The prefixes that count, IPv4 first.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.prefixes.iter().map(|pool| pool.prefix)
    }

    /// Gives an owner one address of each family, with the length of its prefix. An owner that has
    /// addresses keeps them.
    pub fn allocate(&mut self, owner: &O) -> Result<Vec<IpNet>, AllocateError> {
        if let Some(addresses) = self.addresses.get(owner) {
            return Ok(addresses.clone());
        }
        let addresses = self.find_free()?;
        for address in &addresses {
            self.owners.insert(address.addr(), owner.clone());
            self.latest.insert(Family::of_prefix(address), address.addr());
        }
        self.addresses.insert(owner.clone(), addresses.clone());
        Ok(addresses)
    }

    /// Whether an owner without addresses would get some.
    pub fn check_free(&self) -> Result<(), AllocateError> {
        self.find_free().map(|_| ())
    }

    /// Takes an owner's addresses back; none if it has none.
    pub fn release(&mut self, owner: &O) -> Vec<IpNet> {
        let addresses = self.addresses.remove(owner).unwrap_or_default();
        for address in &addresses {
            self.owners.remove(&address.addr());
        }
        addresses
    }

    /// Takes over a record from before a restart: all of its addresses or, with a problem, none.
    /// Records are to be adopted in the order in which they were made, so that the search goes on
    /// behind the newest.
    pub fn adopt(&mut self, owner: &O, addresses: &[IpNet]) -> Result<(), AddressesProblem<O>> {
        match self.addresses.get(owner) {
            Some(had) if had == addresses => return Ok(()),
            Some(_) => return Err(AddressesProblem::OwnsOthers { owner: owner.clone() }),
            None => {}
        }
        for address in addresses {
            if let Some(other) = self.owners.get(&address.addr()) {
                return Err(AddressesProblem::Taken { address: address.addr(), owner: other.clone() });
            }
        }
        for address in addresses {
            self.owners.insert(address.addr(), owner.clone());
            self.latest.insert(Family::of_prefix(address), address.addr());
        }
        self.addresses.insert(owner.clone(), addresses.to_vec());
        Ok(())
    }

    /// Who has an address.
    pub fn owner(&self, address: IpAddr) -> Option<&O> {
        self.owners.get(&address)
    }

    /// An owner's addresses.
    pub fn addresses(&self, owner: &O) -> &[IpNet] {
        self.addresses.get(owner).map_or(&[], Vec::as_slice)
    }

    /// How many addresses of each prefix are in use.
    pub fn in_use(&self) -> Vec<(IpNet, usize)> {
        self.prefixes.iter().map(|pool| (pool.prefix, self.count(pool))).collect()
    }

    /// One free address of each prefix, or why there is none.
    fn find_free(&self) -> Result<Vec<IpNet>, AllocateError> {
        if self.prefixes.is_empty() {
            return Err(AllocateError::NoPrefix);
        }
        self.prefixes
            .iter()
            .map(|pool| {
                let free = self.next_free(pool).filter(|_| self.addresses.len() < OWNERS_MAX);
                let free = free.and_then(|address| IpNet::new(address, pool.prefix.prefix_len()).ok());
                free.ok_or_else(|| AllocateError::Exhausted { prefix: pool.prefix, in_use: self.count(pool) })
            })
            .collect()
    }

    fn count(&self, pool: &PodPrefix) -> usize {
        pool.range.map_or(0, |(first, last)| self.owners.range(first..=last).count())
    }

    /// The next free address behind the newest one of the family, going round once.
    fn next_free(&self, pool: &PodPrefix) -> Option<IpAddr> {
        let (first, last) = pool.range?;
        let family = Family::of_prefix(&pool.prefix);
        let start = self
            .latest
            .get(&family)
            .and_then(|latest| successor(*latest))
            .filter(|start| (first..=last).contains(start))
            .unwrap_or(first);
        self.first_gap(start, last).or_else(|| self.first_gap(first, last))
    }

    /// The first address from `start` to `last` that nobody owns.
    fn first_gap(&self, start: IpAddr, last: IpAddr) -> Option<IpAddr> {
        let mut candidate = start;
        for taken in self.owners.range(start..=last).map(|(address, _)| *address) {
            if taken != candidate {
                break;
            }
            if candidate == last {
                return None;
            }
            candidate = successor(candidate)?;
        }
        Some(candidate)
    }
}

impl PodPrefix {
    fn new(prefix: IpNet) -> PodPrefix {
        let range = match prefix {
            // The network, the gateway and the broadcast address (RFC 919 §7) are not for pods.
            IpNet::V4(net) => {
                let first = u32::from(net.network()).checked_add(2);
                let last = u32::from(net.broadcast()).checked_sub(1);
                first
                    .zip(last)
                    .filter(|(first, last)| first <= last)
                    .map(|(first, last)| (IpAddr::V4(first.into()), IpAddr::V4(last.into())))
            }
            // The first address is the routers' anycast address (RFC 4291 §2.6.1).
            IpNet::V6(net) => {
                let first = u128::from(net.network()).checked_add(2);
                let last = u128::from(net.broadcast());
                first.filter(|first| *first <= last).map(|first| (IpAddr::V6(first.into()), IpAddr::V6(last.into())))
            }
        };
        PodPrefix { prefix, range }
    }
}

/// The next address of the same family.
fn successor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => u32::from(address).checked_add(1).map(|next| IpAddr::V4(next.into())),
        IpAddr::V6(address) => u128::from(address).checked_add(1).map(|next| IpAddr::V6(next.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pool(prefixes: &[&str]) -> PodAddresses<u32> {
        let mut pool = PodAddresses::default();
        pool.set_prefixes(&prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect::<Vec<_>>());
        pool
    }

    fn texts(addresses: &[IpNet]) -> Vec<String> {
        addresses.iter().map(IpNet::to_string).collect()
    }

    #[test]
    fn one_address_of_each_family_behind_the_gateway() {
        let mut pool = pool(&["fd00:42:1::/64", "10.42.1.0/24"]);
        assert_eq!(texts(&pool.allocate(&1).unwrap()), ["10.42.1.2/24", "fd00:42:1::2/64"]);
        assert_eq!(texts(&pool.allocate(&2).unwrap()), ["10.42.1.3/24", "fd00:42:1::3/64"]);
        assert_eq!(pool.allocate(&1).unwrap(), pool.addresses(&1));
        assert_eq!(pool.owner("fd00:42:1::3".parse().unwrap()), Some(&2));
    }

    #[test]
    fn a_freed_address_rests_until_the_prefix_has_been_gone_through() {
        let mut pool = pool(&["10.0.0.0/29"]);
        for owner in 2..=4 {
            pool.allocate(&owner).unwrap();
        }
        pool.release(&3);
        let order: Vec<String> = (5..8).flat_map(|owner| texts(&pool.allocate(&owner).unwrap())).collect();
        assert_eq!(order, ["10.0.0.5/29", "10.0.0.6/29", "10.0.0.3/29"]);
        let error = pool.allocate(&9).unwrap_err();
        assert_eq!(error.to_string(), "no address is free in the pod prefix 10.0.0.0/29: 5 are in use");
        assert_eq!(pool.check_free(), Err(error));
    }

    #[test]
    fn nothing_is_taken_of_one_family_if_the_other_has_nothing() {
        let mut pool = pool(&["10.0.0.0/24", "fd00::/127"]);
        assert!(matches!(pool.allocate(&1), Err(AllocateError::Exhausted { in_use: 0, .. })));
        assert_eq!(pool.in_use().iter().map(|(_, count)| count).sum::<usize>(), 0);
    }

    #[test]
    fn prefixes_without_room_for_a_pod_hand_out_nothing() {
        for prefix in ["10.0.0.0/32", "10.0.0.0/31", "255.255.255.254/31", "fd00::/128", "fd00::/127"] {
            assert!(pool(&[prefix]).allocate(&1).is_err(), "{prefix}");
        }
        assert_eq!(texts(&pool(&["10.0.0.0/30"]).allocate(&1).unwrap()), ["10.0.0.2/30"]);
        assert_eq!(texts(&pool(&["0.0.0.0/0"]).allocate(&1).unwrap()), ["0.0.0.2/0"]);
        assert_eq!(texts(&pool(&["::/0"]).allocate(&1).unwrap()), ["::2/0"]);
        assert_eq!(PodAddresses::<u32>::default().allocate(&1), Err(AllocateError::NoPrefix));
    }

    #[test]
    fn a_restart_goes_on_behind_the_newest_record() {
        let mut before = pool(&["10.0.0.0/24"]);
        let records: Vec<Vec<IpNet>> = (0..3).map(|owner| before.allocate(&owner).unwrap()).collect();
        let mut after = PodAddresses::default();
        for (owner, addresses) in records.iter().enumerate().skip(1) {
            after.adopt(&owner, addresses).unwrap();
        }
        // Prefixes are learned from the cluster, after the records are read.
        after.set_prefixes(&["10.0.0.0/24".parse().unwrap()]);
        assert_eq!(texts(&after.allocate(&9).unwrap()), ["10.0.0.5/24"]);
    }

    #[test]
    fn a_record_of_a_taken_address_is_not_adopted_by_half() {
        let mut pool = pool(&["10.0.0.0/24"]);
        pool.allocate(&1).unwrap();
        let record: Vec<IpNet> = vec!["10.0.0.9/24".parse().unwrap(), "10.0.0.2/24".parse().unwrap()];
        let taken = AddressesProblem::Taken { address: "10.0.0.2".parse().unwrap(), owner: 1 };
        assert_eq!(pool.adopt(&2, &record), Err(taken));
        assert_eq!(pool.owner("10.0.0.9".parse().unwrap()), None);
        assert_eq!(pool.adopt(&1, &record), Err(AddressesProblem::OwnsOthers { owner: 1 }));
    }

    #[test]
    fn a_full_node_and_a_new_prefix() {
        let mut pool = pool(&["10.0.0.0/24"]);
        pool.allocate(&1).unwrap();
        pool.set_prefixes(&["10.0.1.0/24".parse().unwrap()]);
        assert_eq!(texts(pool.addresses(&1)), ["10.0.0.2/24"]);
        assert_eq!(texts(&pool.allocate(&2).unwrap()), ["10.0.1.2/24"]);
    }

    #[test]
    fn the_number_of_owners_is_bounded() {
        let mut pool = pool(&["fd00::/64"]);
        for owner in 0..OWNERS_MAX as u32 {
            pool.allocate(&owner).unwrap();
        }
        assert!(matches!(pool.allocate(&u32::MAX), Err(AllocateError::Exhausted { .. })));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Allocate(u32),
        Release(u32),
        Restart,
        Prefixes(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0u32..24).prop_map(Step::Allocate),
            3 => (0u32..24).prop_map(Step::Release),
            1 => Just(Step::Restart),
            1 => (0usize..3).prop_map(Step::Prefixes),
        ];
        proptest::collection::vec(step, 0..120)
    }

    const PREFIXES: [&[&str]; 3] = [&["10.0.0.0/28"], &["10.0.0.0/28", "fd00::/124"], &["10.0.0.8/29", "fd00::/64"]];

    proptest! {
        /// Whatever happens, in whatever order: no address has two owners, every new one lies in its
        /// prefix and is neither network, gateway nor broadcast, and a release gives all back.
        #[test]
        fn no_two_owners_and_never_outside(steps in steps()) {
            let mut pool = pool(PREFIXES[0]);
            for step in steps {
                match step {
                    Step::Allocate(owner) => {
                        let had = !pool.addresses(&owner).is_empty();
                        let before: usize = pool.in_use().iter().map(|(_, count)| count).sum();
                        match pool.allocate(&owner) {
                            Ok(addresses) if !had => for address in addresses {
                                let prefix = pool.prefixes().find(|prefix| prefix.contains(&address.addr())).unwrap();
                                prop_assert_eq!(address.prefix_len(), prefix.prefix_len());
                                prop_assert_ne!(address.addr(), prefix.network());
                                prop_assert_ne!(Some(address.addr()), successor(prefix.network()));
                                prop_assert!(address.addr().is_ipv6() || address.addr() != prefix.broadcast());
                            },
                            Ok(_) => {}
                            Err(_) => prop_assert_eq!(pool.in_use().iter().map(|(_, count)| count).sum::<usize>(), before),
                        }
                    }
                    Step::Release(owner) => for address in pool.release(&owner) {
                        prop_assert_eq!(pool.owner(address.addr()), None);
                    },
                    Step::Restart => {
                        let mut again = PodAddresses::default();
                        again.set_prefixes(&pool.prefixes().collect::<Vec<_>>());
                        for (owner, addresses) in &pool.addresses {
                            prop_assert_eq!(again.adopt(owner, addresses), Ok(()));
                        }
                        pool = again;
                    }
                    Step::Prefixes(index) => {
                        pool.set_prefixes(&PREFIXES[index].iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>());
                    }
                }
                let held: usize = pool.addresses.values().map(Vec::len).sum();
                prop_assert_eq!(held, pool.owners.len());
                for (owner, addresses) in &pool.addresses {
                    for address in addresses {
                        prop_assert_eq!(pool.owner(address.addr()), Some(owner));
                    }
                }
            }
        }
    }
}
