//! What to change in the kernel, so that it holds what it should.

use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use super::{Change, Element, Key, Name, Program, Table, TableKey};

/// The changes from what was observed to what is desired, in the order in which they are made.
///
/// Only the tables of this room are looked at. A set whose type is not the desired one, or a base
/// chain that hangs elsewhere, cannot be changed in place: then the whole table is replaced, in one
/// transaction, so that no packet meets a node without it.
pub fn diff(desired: &Program, observed: &Program) -> Vec<Change> {
    let mut changes = Vec::new();
    for key in observed.tables.keys().filter(|key| !desired.tables.contains_key(key)) {
        changes.push(Change::DeleteTable(*key));
    }
    let nothing = Table::default();
    for (key, table) in &desired.tables {
        match observed.tables.get(key) {
            Some(seen) if is_compatible(table, seen) => diff_table(*key, table, seen, &mut changes),
            Some(_) => {
                changes.push(Change::DeleteTable(*key));
                changes.push(Change::CreateTable(*key));
                diff_table(*key, table, &nothing, &mut changes);
            }
            None => {
                changes.push(Change::CreateTable(*key));
                diff_table(*key, table, &nothing, &mut changes);
            }
        }
    }
    changes.sort_by_key(Change::phase);
    changes
}

fn is_compatible(desired: &Table, observed: &Table) -> bool {
    let sets = desired.sets.iter().all(|(name, set)| observed.sets.get(name).is_none_or(|seen| seen.kind == set.kind));
    let chain = |name: &Name| observed.chains.get(name);
    sets && desired.chains.iter().all(|(name, want)| chain(name).is_none_or(|seen| seen.base == want.base))
}

fn diff_table(key: TableKey, desired: &Table, observed: &Table, changes: &mut Vec<Change>) {
    let nothing = OrdMap::new();
    for (name, set) in &desired.sets {
        let seen = observed.sets.get(name);
        if seen.is_none() {
            changes.push(Change::CreateSet(key, name.clone(), set.kind));
        }
        elements(key, name, seen.map_or(&nothing, |seen| &seen.elements), &set.elements, changes);
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

/// The changes of one set's elements. Equal parts of two versions of one map cost nothing.
pub(super) fn elements(
    table: TableKey,
    set: &Name,
    old: &OrdMap<Key, Element>,
    new: &OrdMap<Key, Element>,
    changes: &mut Vec<Change>,
) {
    let put = |key: &Key, element: &Element, replaces: bool| Change::PutElement {
        table,
        set: set.clone(),
        key: *key,
        element: element.clone(),
        replaces,
    };
    let start = changes.len();
    for item in old.diff(new) {
        match item {
            DiffItem::Add(key, element) => changes.push(put(key, element, false)),
            DiffItem::Update { old: (_, before), new: (key, element) } => {
                if !before.is_same(element) {
                    changes.push(put(key, element, true));
                }
            }
            DiffItem::Remove(key, _) => changes.push(Change::RemoveElement { table, set: set.clone(), key: *key }),
        }
    }
    // An interval must be gone before one that overlaps it comes.
    changes[start..].sort_by_key(|change| matches!(change, Change::PutElement { .. }));
}
