//! The leases of other nodes, from a snapshot and the events after it.
//!
//! - A value that cannot be used is a problem with a text, and no lease; the rest goes on.
//! - Of leases that overlap, the one that was created first counts; the others are problems until it is
//!   gone.
//! - A renewal that changes nothing is no change.
//! - What lies before the snapshot is ignored, so a watch that is behind shows no lease that is gone.
//!
//! The content follows from the keys in the store alone: a table that took events equals one that was
//! filled from a snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use portolan_net::Family;
use portolan_store::{Event, EventKind, KeyValue, Revision};

use super::attributes::{Attributes, Tunnel};
use super::key::Subnet;
use super::layout::{Layout, Record};
use crate::limits::LEASE_PROBLEMS_MAX;

/// A node's subnet and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The subnet.
    pub subnet: Subnet,
    /// What the node wrote.
    pub attributes: Attributes,
    /// How packets get there.
    pub tunnel: Tunnel,
    /// Whether it does not end.
    pub is_reservation: bool,
}

/// What is different.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A lease that was not there.
    Added(Arc<Lease>),
    /// A lease that is another now.
    Changed(Arc<Lease>),
    /// A lease that is gone.
    Removed(Subnet),
}

/// A key that is no usable lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseProblem {
    /// The last part of the key.
    pub name: Arc<str>,
    /// What is wrong.
    pub text: String,
    /// What to do.
    pub hint: &'static str,
}

const HINT_KEY: &str = "remove the key; leases are written by the nodes themselves";
const HINT_VALUE: &str = "restart the network daemon on that node so that it writes its lease anew, or remove the key \
                          if the node is gone";
const HINT_OVERLAP: &str = "remove the lease of the node that is gone or misconfigured; a node that loses its lease \
                            takes another subnet when its agent restarts";
const HINT_OWN: &str = "it lies in this node's own subnet: remove it, or restart the agent here to take another subnet";

/// All keys below `subnets/` but one's own.
#[derive(Debug, Clone)]
pub struct Table {
    layout: Layout,
    own: Option<Subnet>,
    revision: Revision,
    entries: BTreeMap<Arc<str>, Entry>,
    /// Usable leases by what they cover.
    index: BTreeMap<(Family, u128, u8), BTreeSet<Arc<str>>>,
    /// How many prefixes there are of each length: usually one length per family.
    lengths: BTreeMap<(Family, u8), usize>,
    /// Usable leases that do not count, with the one that does; itself for one's own.
    shadowed: BTreeMap<Arc<str>, Shadow>,
    /// Keys that are no usable leases.
    unusable: BTreeSet<Arc<str>>,
    problems_version: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Shadow {
    Own,
    By(Arc<str>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Usable { lease: Arc<Lease>, created: Revision },
    Unusable { text: String, hint: &'static str },
}

impl Entry {
    fn lease(&self) -> Option<(&Arc<Lease>, Revision)> {
        match self {
            Entry::Usable { lease, created } => Some((lease, *created)),
            Entry::Unusable { .. } => None,
        }
    }
}

impl Table {
    /// An empty table.
    pub fn new(layout: Layout) -> Table {
        Table {
            layout,
            own: None,
            revision: 0,
            entries: BTreeMap::new(),
            index: BTreeMap::new(),
            lengths: BTreeMap::new(),
            shadowed: BTreeMap::new(),
            unusable: BTreeSet::new(),
            problems_version: 0,
        }
    }

    /// Says which subnet is one's own: it is no row, and what overlaps it does not count.
    pub fn set_own(&mut self, own: Option<Subnet>) -> Vec<Change> {
        if self.own == own {
            return Vec::new();
        }
        let before = self.visible();
        self.own = own;
        self.shadowed = self.find_shadowed();
        self.problems_version += 1;
        difference(&before, &self.visible())
    }

    /// Replaces everything by what the store holds at a revision. The changes are the real ones.
    pub fn replace<'item>(
        &mut self,
        revision: Revision,
        items: impl IntoIterator<Item = &'item KeyValue>,
    ) -> Vec<Change> {
        let before = self.visible();
        self.entries.clear();
        self.index.clear();
        self.lengths.clear();
        self.unusable.clear();
        self.problems_version += 1;
        self.revision = revision;
        for item in items {
            if let Some(record) = self.layout.record(item) {
                self.insert(record);
            }
        }
        self.shadowed = self.find_shadowed();
        difference(&before, &self.visible())
    }

    /// Takes in the changes of one revision. Those that the table has seen are passed over.
    pub fn apply(&mut self, revision: Revision, events: &[Event]) -> Vec<Change> {
        if revision <= self.revision {
            return Vec::new();
        }
        self.revision = revision;
        let mut before: BTreeMap<Arc<str>, Option<Arc<Lease>>> = BTreeMap::new();
        let mut has_overlap = false;
        for event in events {
            let Some(name) = self.layout.record_name(&event.current.key) else { continue };
            before.entry(Arc::clone(&name)).or_insert_with(|| self.visible_lease(&name));
            has_overlap |= self.overlaps_any(&name);
            self.remove(&name);
            if event.kind == EventKind::Put
                && let Some(record) = self.layout.record(&event.current)
            {
                self.insert(record);
                has_overlap |= self.overlaps_any(&name);
            }
        }
        if has_overlap {
            // Seldom, and a fault of somebody's: then who counts is worked out anew.
            let shadowed = self.find_shadowed();
            let moved: Vec<Arc<str>> = self.shadowed.keys().chain(shadowed.keys()).cloned().collect();
            for name in moved {
                let lease = self.visible_lease(&name);
                before.entry(name).or_insert(lease);
            }
            self.shadowed = shadowed;
            self.problems_version += 1;
        }
        before.iter().filter_map(|(name, before)| change(before.as_ref(), self.visible_lease(name).as_ref())).collect()
    }

    /// Says that nothing has changed up to this revision.
    pub fn mark(&mut self, revision: Revision) {
        self.revision = self.revision.max(revision);
    }

    /// A number that is another whenever the problems are.
    pub fn problems_version(&self) -> u64 {
        self.problems_version
    }

    /// The revision up to which the table is complete.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The leases that count, in the order of their keys.
    pub fn leases(&self) -> impl Iterator<Item = &Arc<Lease>> {
        let usable = self.entries.iter().filter_map(|(name, entry)| Some((name, entry.lease()?.0)));
        usable.filter(|(name, _)| !self.shadowed.contains_key(*name)).map(|(_, lease)| lease)
    }

    /// The keys that are no leases, in order, and why.
    pub fn problems(&self) -> Vec<LeaseProblem> {
        let names: BTreeSet<&Arc<str>> = self.unusable.iter().chain(self.shadowed.keys()).collect();
        let rows = names.into_iter().filter_map(|name| {
            let entry = self.entries.get(name)?;
            let (text, hint) = match (entry, self.shadowed.get(name)) {
                (Entry::Unusable { text, hint }, _) => (text.clone(), *hint),
                (Entry::Usable { lease, .. }, Some(Shadow::Own)) => {
                    // One's own key is no problem.
                    let own = self.own.filter(|own| *own != lease.subnet)?;
                    (format!("the lease overlaps this node's own subnet {own}, and is not used"), HINT_OWN)
                }
                (Entry::Usable { .. }, Some(Shadow::By(winner))) => {
                    (format!("the lease overlaps {winner}, which is older, and is not used"), HINT_OVERLAP)
                }
                (Entry::Usable { .. }, None) => return None,
            };
            Some(LeaseProblem { name: Arc::clone(name), text, hint })
        });
        let mut rows: Vec<LeaseProblem> = rows.collect();
        if rows.len() > LEASE_PROBLEMS_MAX {
            let left_out = rows.len() - LEASE_PROBLEMS_MAX;
            rows.truncate(LEASE_PROBLEMS_MAX);
            let text = format!("{left_out} more keys are no usable leases");
            rows.push(LeaseProblem { name: "…".into(), text, hint: HINT_VALUE });
        }
        rows
    }

    fn insert(&mut self, record: Record) {
        let name = Arc::clone(&record.name);
        let created = record.created;
        let entry = match usable(record) {
            Ok(lease) => {
                for prefix in lease.subnet.prefixes() {
                    let (family, start, length) = place(prefix);
                    self.index.entry((family, start, length)).or_default().insert(Arc::clone(&name));
                    *self.lengths.entry((family, length)).or_default() += 1;
                }
                Entry::Usable { lease: Arc::new(lease), created }
            }
            Err((text, hint)) => {
                self.problems_version += 1;
                self.unusable.insert(Arc::clone(&name));
                Entry::Unusable { text, hint }
            }
        };
        self.entries.insert(name, entry);
    }

    fn remove(&mut self, name: &Arc<str>) {
        self.shadowed.remove(name);
        if self.unusable.remove(name) {
            self.problems_version += 1;
        }
        let Some(Entry::Usable { lease, .. }) = self.entries.remove(name) else { return };
        for prefix in lease.subnet.prefixes() {
            let (family, start, length) = place(prefix);
            if let Some(names) = self.index.get_mut(&(family, start, length)) {
                names.remove(name);
                if names.is_empty() {
                    self.index.remove(&(family, start, length));
                }
            }
            if let Some(count) = self.lengths.get_mut(&(family, length)) {
                *count -= 1;
                if *count == 0 {
                    self.lengths.remove(&(family, length));
                }
            }
        }
    }

    /// Whether a usable lease shares an address with another, or with one's own subnet.
    fn overlaps_any(&self, name: &Arc<str>) -> bool {
        let Some((lease, _)) = self.entries.get(name).and_then(Entry::lease) else { return false };
        if self.own.is_some_and(|own| own.overlaps(&lease.subnet)) {
            return true;
        }
        lease.subnet.prefixes().any(|prefix| self.covering(prefix).any(|other| other != name))
    }

    /// The names of the leases that share an address with a prefix: those that contain it, and those that
    /// it contains.
    fn covering(&self, prefix: IpNet) -> impl Iterator<Item = &Arc<str>> {
        let (family, start, length) = place(prefix);
        let end = last(family, start, length);
        let inside = self.index.range((family, start, 0)..=(family, end, u8::MAX)).flat_map(|(_, names)| names);
        let shorter = self.lengths.range((family, 0)..(family, length)).filter_map(move |((_, shorter), _)| {
            let base = start & !mask(family, *shorter);
            // At the same start it is among those inside.
            if base == start { None } else { self.index.get(&(family, base, *shorter)) }
        });
        inside.chain(shorter.flatten())
    }

    /// Who does not count: in the order of creation, each lease that overlaps one that counts.
    fn find_shadowed(&self) -> BTreeMap<Arc<str>, Shadow> {
        let leases = self.entries.iter().filter_map(|(name, entry)| Some((name, entry.lease()?)));
        let mut suspects: Vec<_> = leases.filter(|(name, _)| self.overlaps_any(name)).collect();
        suspects.sort_by_key(|(name, (_, created))| (*created, *name));
        let mut shadowed: BTreeMap<Arc<str>, Shadow> = BTreeMap::new();
        let mut counting: BTreeSet<&Arc<str>> = BTreeSet::new();
        for (name, (lease, _)) in suspects {
            let shadow = if self.own.is_some_and(|own| own.overlaps(&lease.subnet)) {
                Some(Shadow::Own)
            } else {
                let mut others = lease.subnet.prefixes().flat_map(|prefix| self.covering(prefix));
                others.find(|other| counting.contains(other)).map(|other| Shadow::By(Arc::clone(other)))
            };
            match shadow {
                Some(shadow) => {
                    shadowed.insert(Arc::clone(name), shadow);
                }
                None => {
                    counting.insert(name);
                }
            }
        }
        shadowed
    }

    fn visible_lease(&self, name: &Arc<str>) -> Option<Arc<Lease>> {
        let (lease, _) = self.entries.get(name)?.lease()?;
        (!self.shadowed.contains_key(name)).then(|| Arc::clone(lease))
    }

    fn visible(&self) -> BTreeMap<Subnet, Arc<Lease>> {
        self.leases().map(|lease| (lease.subnet, Arc::clone(lease))).collect()
    }
}

fn usable(record: Record) -> Result<Lease, (String, &'static str)> {
    let subnet = record.subnet.map_err(|error| (error.to_string(), HINT_KEY))?;
    let attributes = record.attributes.map_err(|error| (error.to_string(), HINT_VALUE))?;
    let tunnel = attributes.tunnel(&subnet).map_err(|error| (error.to_string(), HINT_VALUE))?;
    Ok(Lease { subnet, attributes, tunnel, is_reservation: record.lease == 0 })
}

fn difference(before: &BTreeMap<Subnet, Arc<Lease>>, after: &BTreeMap<Subnet, Arc<Lease>>) -> Vec<Change> {
    let subnets: BTreeSet<&Subnet> = before.keys().chain(after.keys()).collect();
    subnets.into_iter().filter_map(|subnet| change(before.get(subnet), after.get(subnet))).collect()
}

fn change(before: Option<&Arc<Lease>>, after: Option<&Arc<Lease>>) -> Option<Change> {
    match (before, after) {
        (None, None) => None,
        (None, Some(after)) => Some(Change::Added(Arc::clone(after))),
        (Some(before), None) => Some(Change::Removed(before.subnet)),
        (Some(before), Some(after)) => (before != after).then(|| Change::Changed(Arc::clone(after))),
    }
}

fn place(prefix: IpNet) -> (Family, u128, u8) {
    match prefix {
        IpNet::V4(v4) => (Family::V4, u128::from(u32::from(v4.network())), v4.prefix_len()),
        IpNet::V6(v6) => (Family::V6, u128::from(v6.network()), v6.prefix_len()),
    }
}

/// The bits behind a prefix.
fn mask(family: Family, length: u8) -> u128 {
    let bits = u32::from(family.bits().saturating_sub(length));
    u128::MAX.checked_shr(128 - bits).unwrap_or(0)
}

fn last(family: Family, start: u128, length: u8) -> u128 {
    start | mask(family, length)
}
