//! What to change in the kernel, so that it holds what it should.

use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use super::{Change, Element, Key, Name, Phase, Program, Table, TableKey};

/// The changes from what was observed to what is desired, in the order in which they are made.
///
/// Only the tables of this room are looked at. A set whose type is not the desired one, or a base
/// chain that hangs elsewhere, cannot be changed in place: then the whole table is replaced, in one
/// transaction, so that no packet meets a node without it.
pub fn diff(desired: &Program, observed: &Program) -> Vec<Change> {
    let mut changes = Vec::new();
    diff_each(desired, observed, |change| changes.push(change));
    changes
}

/// The same changes in the same order, one by one: a whole cluster's are more than need be in memory.
pub fn diff_each(desired: &Program, observed: &Program, mut visit: impl FnMut(Change)) {
    let nothing = Table::default();
    let mut differences = Differences::default();
    for key in observed.tables.keys().filter(|key| !desired.tables.contains_key(key)) {
        differences.plain.push(Change::DeleteTable(*key));
    }
    for (key, table) in &desired.tables {
        let seen = observed.tables.get(key);
        if seen.is_some_and(|seen| !is_compatible(table, seen)) {
            differences.plain.push(Change::DeleteTable(*key));
        }
        let seen = seen.filter(|seen| is_compatible(table, seen));
        if seen.is_none() {
            differences.plain.push(Change::CreateTable(*key));
        }
        differences.add_table(*key, table, seen.unwrap_or(&nothing));
    }
    let Differences { mut plain, sets } = differences;
    plain.sort_by_key(Change::phase);
    let mut plain = plain.into_iter().peekable();
    for phase in Phase::ALL {
        while let Some(change) = plain.next_if(|change| change.phase() == phase) {
            visit(change);
        }
        for set in &sets {
            set.changes(phase, &mut visit);
        }
    }
}

/// What differs: changes of tables, sets, chains and rules; and the sets whose elements may differ.
#[derive(Default)]
struct Differences<'a> {
    plain: Vec<Change>,
    sets: Vec<SetPair<'a>>,
}

/// A set as it is and as it must be.
struct SetPair<'a> {
    table: TableKey,
    name: &'a Name,
    old: Option<&'a OrdMap<Key, Element>>,
    new: &'a OrdMap<Key, Element>,
}

impl SetPair<'_> {
    /// The changes of its elements that belong to a phase. All keys of a set are of one kind, so one says
    /// which phases the set's changes belong to.
    fn changes(&self, phase: Phase, visit: &mut impl FnMut(Change)) {
        let nothing = OrdMap::new();
        let old = self.old.unwrap_or(&nothing);
        let Some(key) = old.keys().next().or_else(|| self.new.keys().next()) else { return };
        if Phase::of_removal(self.name, key) == phase {
            removals(self.table, self.name, old, self.new, visit);
        }
        if Phase::of_put(self.name) == phase {
            puts(self.table, self.name, old, self.new, visit);
        }
    }
}

fn is_compatible(desired: &Table, observed: &Table) -> bool {
    let sets = desired.sets.iter().all(|(name, set)| observed.sets.get(name).is_none_or(|seen| seen.kind == set.kind));
    let chain = |name: &Name| observed.chains.get(name);
    sets && desired.chains.iter().all(|(name, want)| chain(name).is_none_or(|seen| seen.base == want.base))
}

impl<'a> Differences<'a> {
    fn add_table(&mut self, key: TableKey, desired: &'a Table, observed: &'a Table) {
        let changes = &mut self.plain;
        for (name, set) in &desired.sets {
            let seen = observed.sets.get(name);
            if seen.is_none() {
                changes.push(Change::CreateSet(key, name.clone(), set.kind));
            }
            if set.kind.is_learned() {
                continue;
            }
            self.sets.push(SetPair { table: key, name, old: seen.map(|seen| &seen.elements), new: &set.elements });
        }
        for (name, chain) in &desired.chains {
            let seen = observed.chains.get(name);
            if seen.is_none() {
                changes.push(Change::CreateChain(key, name.clone(), chain.base));
            }
            let rules = seen.map(|seen| seen.rules.as_slice()).unwrap_or_default();
            super::change::rule_changes(key, name, rules, &chain.rules, changes);
        }
        let extra: Vec<&Name> = observed.chains.keys().filter(|name| !desired.chains.contains_key(*name)).collect();
        // All rules go first: these chains may refer to each other.
        changes.extend(extra.iter().map(|name| Change::WriteRules(key, (*name).clone(), Vec::new())));
        changes.extend(extra.iter().map(|name| Change::DeleteChain(key, (*name).clone())));
        for name in observed.sets.keys().filter(|name| !desired.sets.contains_key(*name)) {
            changes.push(Change::DeleteSet(key, name.clone()));
        }
    }
}

/// The changes of one set's elements: removals first, since an interval must be gone before one that
/// overlaps it comes.
pub(super) fn elements(
    table: TableKey,
    set: &Name,
    old: &OrdMap<Key, Element>,
    new: &OrdMap<Key, Element>,
    changes: &mut Vec<Change>,
) {
    removals(table, set, old, new, &mut |change| changes.push(change));
    puts(table, set, old, new, &mut |change| changes.push(change));
}

/// Elements that go. Equal parts of two versions of one map cost nothing.
fn removals(
    table: TableKey,
    set: &Name,
    old: &OrdMap<Key, Element>,
    new: &OrdMap<Key, Element>,
    visit: &mut impl FnMut(Change),
) {
    for item in old.diff(new) {
        if let DiffItem::Remove(key, _) = item {
            visit(Change::RemoveElement { table, set: set.clone(), key: *key });
        }
    }
}

/// Elements that come, or are another than before.
fn puts(
    table: TableKey,
    set: &Name,
    old: &OrdMap<Key, Element>,
    new: &OrdMap<Key, Element>,
    visit: &mut impl FnMut(Change),
) {
    for item in old.diff(new) {
        let (key, element, replaces) = match item {
            DiffItem::Add(key, element) => (key, element, false),
            DiffItem::Update { old: (_, before), new: (key, element) } if !before.is_same(element) => {
                (key, element, true)
            }
            DiffItem::Update { .. } | DiffItem::Remove(..) => continue,
        };
        visit(Change::PutElement { table, set: set.clone(), key: *key, element: element.clone(), replaces });
    }
}
