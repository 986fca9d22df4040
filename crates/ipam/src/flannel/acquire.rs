//! Which subnet a node takes: a decision over one look at the store, and the transaction that makes it so.
//!
//! ```text
//!   own by claim ─▶ own by address ─▶ previous subnet ─▶ one of the first 100 free     the first that works
//! ```
//!
//! Every taking is one transaction that holds only if nothing that it was decided on has changed: the
//! network config, the lease's key, and the claims (see [`super::layout`]). Whoever loses a race looks
//! again and decides again. So no two nodes of ours ever hold subnets that overlap:
//!
//! - Under one config all subnets have one length, so two overlap only where they are equal, and then
//!   they need the same claim.
//! - Under a new config a node has seen, at or after the config's revision, all that was taken before;
//!   what somebody decided by the old one no longer holds.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_net::Family;
use portolan_store::{Compare, KeyRange, LeaseId, Operation, Revision, Transaction};

use super::attributes::Attributes;
use super::config::NetworkConfig;
use super::key::{Subnet, overlap};
use super::layout::{Claim, Claimant, Layout, Record, View};
use crate::limits::FREE_SUBNETS_CONSIDERED_MAX;

/// The node that asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Me {
    /// Its name and run.
    pub claimant: Claimant,
    /// What its lease is to say.
    pub attributes: Attributes,
    /// The subnet that it had, from `subnet.env`.
    pub previous: Option<Subnet>,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Take this subnet: one transaction.
    Take(Box<Take>),
    /// Give up leases of one's own that cannot be kept, and decide again.
    Delete(Deletion),
    /// Nothing can be done.
    Refuse(Refusal),
}

/// A subnet to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Take {
    /// The subnet.
    pub subnet: Subnet,
    /// Why this one.
    pub reason: TakeReason,
    /// Whether it is a reservation: it stays without a lease.
    pub is_reservation: bool,
    /// The revision of the lease's key; `None` while it must not exist.
    pub record: Option<Revision>,
    /// For each prefix the revision of its claim; `None` while it must not exist.
    pub claims: Vec<(IpNet, Option<Revision>)>,
    /// The revision of the network config.
    pub config: Revision,
    /// Another node's lease that names the same public address.
    pub shared: Option<SharedAddress>,
}

/// Why a subnet was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakeReason {
    /// The node has claimed it.
    Claimed,
    /// The lease names the node's public address.
    PublicAddress,
    /// The lease names another address, and the node's own hardware address or key.
    SameDevice,
    /// The node had it before, and nobody has it now.
    Previous,
    /// It was free.
    Free,
}

/// Another node's lease with this node's public address: two nodes behind one address, or the address
/// was another node's until a short while ago.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the public address {address} is also in the lease of node {node} ({subnet}): other nodes can reach only one of \
     the two there; give each node a public address of its own (--public-ip). If node {node} is gone, its lease ends \
     within a day, or delete the key {subnet}"
)]
pub struct SharedAddress {
    /// The address.
    pub address: IpAddr,
    /// The other node.
    pub node: Arc<str>,
    /// The other node's subnet.
    pub subnet: Subnet,
}

/// Leases of one's own that do not fit the network config, or are one too many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deletion {
    /// The subnet.
    pub subnet: Subnet,
    /// The revision of the lease's key, if it exists.
    pub record: Option<Revision>,
    /// The claims and their revisions.
    pub claims: Vec<(IpNet, Revision)>,
}

/// Why no subnet can be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No subnet is free.
    #[error(
        "no subnet of length {subnet_length} is free in {network} between {first} and {last}: {leases} leases are \
         there; remove those of nodes that are gone, or enlarge the network"
    )]
    Exhausted {
        /// The network.
        network: IpNet,
        /// The subnets' length.
        subnet_length: u8,
        /// The first subnet of the pool.
        first: IpNet,
        /// The last subnet of the pool.
        last: IpNet,
        /// How many leases there are.
        leases: usize,
    },
    /// There is no network config.
    #[error("the network config {key} does not exist: write it, for example {{\"Network\": \"10.5.0.0/16\"}}")]
    NoConfig {
        /// Its key.
        key: String,
    },
}

/// Whether what a node holds is still as it left it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It is.
    Intact,
    /// The lease's key is gone, or says something else of this node, while the claims stand: write it again.
    Rewrite,
    /// The claims are gone: the lease ended, or somebody removed them.
    Gone,
    /// A newer run of this node's agent, or another node of the same name, has taken over.
    Superseded {
        /// Who.
        by: Claimant,
    },
    /// Somebody who makes no claims writes the same key: flanneld on a node with the same public address.
    Contested {
        /// What the other wrote.
        attributes: Option<Box<Attributes>>,
    },
}

/// Decides. `view` must hold the config that `config` was parsed from.
pub fn decide(layout: &Layout, config: &NetworkConfig, view: &View, me: &Me, seed: u64) -> Decision {
    let Some((_, config_revision)) = view.config else {
        return Decision::Refuse(Refusal::NoConfig { key: layout.config() });
    };
    let chooser = Chooser { config, view, me, config_revision };
    let owned = chooser.claimed();
    if let Some(deletion) = chooser.superfluous(&owned) {
        return Decision::Delete(deletion);
    }
    let found = owned
        .iter()
        .find_map(|subnet| chooser.take_claimed(*subnet))
        .or_else(|| chooser.take_recorded(TakeReason::PublicAddress))
        .or_else(|| chooser.take_recorded(TakeReason::SameDevice))
        .or_else(|| chooser.take_previous());
    match found {
        Some(take) => Decision::Take(Box::new(take)),
        None => chooser.choose_free(seed),
    }
}

/// Judges a held subnet by a newer look at the store.
pub fn stand(view: &View, me: &Me, take: &Take, lease: LeaseId) -> Standing {
    let claims: Vec<Option<&Claim>> = take.subnet.prefixes().map(|prefix| view.claims.get(&prefix)).collect();
    let mut claimants = claims.iter().flatten().filter_map(|claim| claim.claimant.as_ref());
    if let Some(by) = claimants.find(|it| it.node == me.claimant.node && it.instance != me.claimant.instance) {
        return Standing::Superseded { by: by.clone() };
    }
    let is_held = |claim: &Claim| claim.lease == lease && claim.claimant.as_ref() == Some(&me.claimant);
    if !claims.iter().all(|claim| claim.is_some_and(is_held)) {
        return Standing::Gone;
    }
    let Some(record) = view.records.iter().find(|record| record.subnet.as_ref() == Ok(&take.subnet)) else {
        return Standing::Rewrite;
    };
    match &record.attributes {
        Ok(attributes) if *attributes == me.attributes => {
            let wanted = if take.is_reservation { 0 } else { lease };
            // flanneld renews by a new lease; that of a flanneld with our very data is an older run of this node.
            if record.lease == wanted || record.lease == 0 { Standing::Intact } else { Standing::Rewrite }
        }
        other => Standing::Contested { attributes: other.as_ref().ok().cloned().map(Box::new) },
    }
}

struct Chooser<'decision> {
    config: &'decision NetworkConfig,
    view: &'decision View,
    me: &'decision Me,
    config_revision: Revision,
}

impl Chooser<'_> {
    fn is_mine(&self, claim: &Claim) -> bool {
        claim.claimant.as_ref().is_some_and(|claimant| claimant.node == self.me.claimant.node)
    }

    /// Whether somebody else has claimed a part of the subnet.
    fn claimed_by_another(&self, subnet: &Subnet) -> Option<&Claim> {
        let theirs = self.view.claims.iter().filter(|(_, claim)| !self.is_mine(claim));
        theirs.into_iter().find(|(prefix, _)| subnet.prefixes().any(|mine| overlap(mine, **prefix))).map(|it| it.1)
    }

    fn record(&self, subnet: &Subnet) -> Option<&Record> {
        self.view.records.iter().find(|record| record.subnet.as_ref() == Ok(subnet))
    }

    /// The subnets that this node has claimed whole, the previous one first.
    fn claimed(&self) -> Vec<Subnet> {
        let mine: BTreeSet<IpNet> =
            self.view.claims.iter().filter(|(_, claim)| self.is_mine(claim)).map(|(prefix, _)| *prefix).collect();
        let is_mine = |subnet: &Subnet| subnet.prefixes().all(|prefix| mine.contains(&prefix));
        let records = self.view.records.iter().filter_map(|record| record.subnet.clone().ok());
        // A claim whose lease's key was removed by somebody else: the pair is known from the previous subnet, or is
        // all that was claimed.
        let rest = Subnet::from_prefixes(&mine.iter().copied().collect::<Vec<_>>());
        let mut found: Vec<Subnet> = Vec::new();
        for subnet in self.me.previous.into_iter().chain(records).chain(rest).filter(is_mine) {
            // One that shares a prefix with an earlier one is that one's.
            if !found.iter().any(|earlier| earlier.overlaps(&subnet)) {
                found.push(subnet);
            }
        }
        found
    }

    /// What this node has claimed and cannot use: of another length, or one more than it needs. A claim
    /// without its pair is given up, too.
    fn superfluous(&self, owned: &[Subnet]) -> Option<Deletion> {
        let kept = owned.iter().find(|subnet| self.config.fits(subnet) && !self.is_contested(subnet));
        if let Some(extra) = owned.iter().find(|subnet| Some(*subnet) != kept) {
            return Some(self.deletion(*extra));
        }
        let stray = self.view.claims.iter().find(|(prefix, claim)| {
            self.is_mine(claim) && !owned.iter().any(|subnet| subnet.prefixes().any(|it| it == **prefix))
        })?;
        let subnet = Subnet::from_prefixes(&[*stray.0])?;
        Some(Deletion { subnet, record: None, claims: vec![(*stray.0, stray.1.revision)] })
    }

    /// Whether somebody who knows no claims, flanneld, now has a claimed subnet: its key was removed, and
    /// written anew by another.
    fn is_contested(&self, subnet: &Subnet) -> bool {
        let Some(record) = self.record(subnet) else { return self.is_taken(subnet) };
        let is_mine = |attributes: &Attributes| {
            attributes.shares_public_address(&self.me.attributes).is_some()
                || attributes.is_same_device(&self.me.attributes)
        };
        let claims = subnet.prefixes().filter_map(|prefix| self.view.claims.get(&prefix));
        // Written together with the claim, or bound to the same lease: then the claimant wrote it.
        let is_together = claims
            .into_iter()
            .any(|claim| claim.revision == record.revision || (claim.lease == record.lease && record.lease != 0));
        !is_together && !record.attributes.as_ref().is_ok_and(is_mine)
    }

    /// Whether a record other than the subnet's own covers a part of it.
    fn is_taken(&self, subnet: &Subnet) -> bool {
        let others = self.view.records.iter().filter(|record| record.subnet.as_ref() != Ok(subnet));
        others.filter_map(Record::covers).any(|covered| covered.overlaps(subnet))
    }

    fn deletion(&self, subnet: Subnet) -> Deletion {
        // A reservation is the operator's, and a contested lease another's: they stay, whatever becomes of the claim.
        let is_mine = |record: &&Record| record.lease != 0 && !self.is_contested(&subnet);
        let record = self.record(&subnet).filter(is_mine).map(|record| record.revision);
        let claim = |prefix: IpNet| {
            self.view.claims.get(&prefix).filter(|claim| self.is_mine(claim)).map(|claim| (prefix, claim.revision))
        };
        Deletion { subnet, record, claims: subnet.prefixes().filter_map(claim).collect() }
    }

    fn take(&self, subnet: Subnet, reason: TakeReason) -> Take {
        let record = self.record(&subnet);
        let claim = |prefix| (prefix, self.view.claims.get(&prefix).map(|claim| claim.revision));
        Take {
            subnet,
            reason,
            is_reservation: record.is_some_and(|record| record.lease == 0),
            record: record.map(|record| record.revision),
            claims: subnet.prefixes().map(claim).collect(),
            config: self.config_revision,
            shared: self.shared_address(&subnet),
        }
    }

    fn take_claimed(&self, subnet: Subnet) -> Option<Take> {
        self.config.fits(&subnet).then(|| self.take(subnet, TakeReason::Claimed))
    }

    /// A lease without a claim that is this node's: from when flanneld ran here, or a reservation.
    fn take_recorded(&self, reason: TakeReason) -> Option<Take> {
        let mine = self.view.records.iter().find_map(|record| {
            let (subnet, attributes) = (record.subnet.as_ref().ok()?, record.attributes.as_ref().ok()?);
            let is_mine = match reason {
                TakeReason::PublicAddress => attributes.shares_public_address(&self.me.attributes).is_some(),
                _ => attributes.is_same_device(&self.me.attributes),
            };
            let is_free = self.claimed_by_another(subnet).is_none();
            (is_mine && is_free && self.config.fits(subnet)).then_some(*subnet)
        })?;
        Some(self.take(mine, reason))
    }

    fn take_previous(&self) -> Option<Take> {
        let previous = self.me.previous.filter(|subnet| self.config.fits(subnet))?;
        let is_free = self.record(&previous).is_none() && !self.is_taken(&previous);
        (is_free && self.claimed_by_another(&previous).is_none()).then(|| self.take(previous, TakeReason::Previous))
    }

    fn choose_free(&self, seed: u64) -> Decision {
        // flanneld deletes every lease of its address that does not fit; a reservation stays here.
        let misfit = self.view.records.iter().find_map(|record| {
            let (subnet, attributes) = (record.subnet.as_ref().ok()?, record.attributes.as_ref().ok()?);
            let is_mine = attributes.shares_public_address(&self.me.attributes).is_some();
            let is_free = record.lease != 0 && self.claimed_by_another(subnet).is_none();
            (is_mine && is_free && !self.config.fits(subnet)).then_some(*subnet)
        });
        if let Some(subnet) = misfit {
            return Decision::Delete(self.deletion(subnet));
        }
        let covered = self.view.records.iter().filter_map(Record::covers).flat_map(|subnet| subnet.prefixes());
        let taken: Vec<IpNet> = covered.chain(self.view.claims.keys().copied()).collect();
        let mut chosen = Vec::new();
        for (family, draw) in Family::ALL.into_iter().zip([seed, mix(seed)]) {
            let Some(pool) = self.config.pool(family) else { continue };
            let free = pool.free(&taken, FREE_SUBNETS_CONSIDERED_MAX);
            // The remainder of a 64-bit number by at most 100 is even enough.
            let index = usize::try_from(draw % u64::try_from(free.len().max(1)).unwrap_or(1)).unwrap_or(0);
            match free.get(index) {
                Some(prefix) => chosen.push(*prefix),
                None => {
                    return Decision::Refuse(Refusal::Exhausted {
                        network: pool.network,
                        subnet_length: pool.subnet_length,
                        first: pool.first,
                        last: pool.last,
                        leases: self.view.records.len(),
                    });
                }
            }
        }
        match Subnet::from_prefixes(&chosen) {
            Some(subnet) => Decision::Take(Box::new(self.take(subnet, TakeReason::Free))),
            None => Decision::Refuse(Refusal::NoConfig { key: String::new() }),
        }
    }

    fn shared_address(&self, subnet: &Subnet) -> Option<SharedAddress> {
        self.view.records.iter().find_map(|record| {
            let (theirs, attributes) = (record.subnet.as_ref().ok()?, record.attributes.as_ref().ok()?);
            let address = attributes.shares_public_address(&self.me.attributes).filter(|_| theirs != subnet)?;
            let node = self.claimed_by_another(theirs)?.claimant.as_ref()?.node.clone();
            Some(SharedAddress { address, node, subnet: *theirs })
        })
    }
}

impl Take {
    /// The transaction that takes the subnet, with a lease that has been granted.
    pub fn transaction(&self, layout: &Layout, me: &Me, lease: LeaseId) -> Transaction {
        let key = layout.subnet(&self.subnet);
        let mut transaction = Transaction::default()
            .when(Compare::unchanged(layout.config(), self.config))
            .when(expected(key.clone(), self.record));
        // A reservation has no lease and gets none: flanneld gives it one, and it ends with the node.
        let record_lease = if self.is_reservation { 0 } else { lease };
        let value = me.attributes.render().into_bytes();
        transaction = transaction.then(Operation::Put { key: key.into(), value, lease: record_lease });
        for (prefix, revision) in &self.claims {
            let key = layout.claim(*prefix);
            let value = me.claimant.render().into_bytes();
            transaction = transaction.when(expected(key.clone(), *revision)).then(Operation::Put {
                key: key.into(),
                value,
                lease,
            });
        }
        transaction
    }
}

impl Deletion {
    /// The transaction that gives the subnet up.
    pub fn transaction(&self, layout: &Layout) -> Transaction {
        let mut transaction = Transaction::default();
        let record = self.record.map(|revision| (layout.subnet(&self.subnet), revision));
        let claims = self.claims.iter().map(|(prefix, revision)| (layout.claim(*prefix), *revision));
        for (key, revision) in record.into_iter().chain(claims) {
            transaction =
                transaction.when(Compare::unchanged(key.clone(), revision)).then(Operation::Delete(KeyRange::key(key)));
        }
        transaction
    }
}

/// A second draw from one seed that does not follow the first: SplitMix64's finish (Steele, Lea and
/// Flood, 2014).
fn mix(seed: u64) -> u64 {
    let mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The key is as it was seen.
fn expected(key: String, revision: Option<Revision>) -> Compare {
    match revision {
        Some(revision) => Compare::unchanged(key, revision),
        None => Compare::absent(key),
    }
}
