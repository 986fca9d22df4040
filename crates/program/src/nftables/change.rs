//! One change of what the kernel holds, and in which order changes are made.

use serde::{Deserialize, Serialize};

use super::{BaseHook, Chain, Element, Key, Name, Program, Rule, Set, SetKind, Table, TableKey};

/// One change. A list of them is one transaction, or a few where it is very long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Deletes a table with all that it holds.
    DeleteTable(TableKey),
    /// Makes a table.
    CreateTable(TableKey),
    /// Makes a set without elements.
    CreateSet(TableKey, Name, SetKind),
    /// Makes a chain without rules.
    CreateChain(TableKey, Name, Option<BaseHook>),
    /// Adds an element, or replaces the one of this key.
    PutElement {
        /// The table.
        table: TableKey,
        /// The set.
        set: Name,
        /// The key.
        key: Key,
        /// The element.
        element: Element,
        /// Whether there is one of this key, which goes away in the same step.
        replaces: bool,
    },
    /// Replaces all rules of a chain.
    WriteRules(TableKey, Name, Vec<Rule>),
    /// Removes an element.
    RemoveElement {
        /// The table.
        table: TableKey,
        /// The set.
        set: Name,
        /// The key.
        key: Key,
    },
    /// Deletes a chain that has no rules any more.
    DeleteChain(TableKey, Name),
    /// Deletes a set that no rule refers to any more.
    DeleteSet(TableKey, Name),
}

/// The order of changes: what is referred to is made first and removed last, and traffic is sent to
/// a thing only when it is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Tables that cannot be brought up to date go.
    Clear,
    /// Tables, sets and chains are made.
    Create,
    /// Backends are filled in.
    Fill,
    /// Rules of regular chains.
    Rules,
    /// Frontends are filled in: from here on packets are sent there.
    Dispatch,
    /// Rules of base chains.
    Hook,
    /// Frontends that went away.
    Withdraw,
    /// Backends that went away.
    Empty,
    /// Chains and sets that nothing needs.
    Delete,
}

impl Change {
    /// When it is its turn.
    pub fn phase(&self) -> Phase {
        match self {
            Change::DeleteTable(_) => Phase::Clear,
            Change::CreateTable(_) | Change::CreateSet(..) | Change::CreateChain(..) => Phase::Create,
            Change::PutElement { key, .. } if is_dispatch(key) => Phase::Dispatch,
            Change::PutElement { .. } => Phase::Fill,
            Change::WriteRules(_, chain, _) if super::layout::is_base(chain) => Phase::Hook,
            Change::WriteRules(..) => Phase::Rules,
            Change::RemoveElement { key, .. } if is_dispatch(key) => Phase::Withdraw,
            // An interval must be gone before one that overlaps it comes.
            Change::RemoveElement { key: Key::Prefix(_), .. } => Phase::Fill,
            Change::RemoveElement { .. } => Phase::Empty,
            Change::DeleteChain(..) | Change::DeleteSet(..) => Phase::Delete,
        }
    }

    /// The table that is changed.
    pub fn table(&self) -> TableKey {
        match self {
            Change::DeleteTable(table)
            | Change::CreateTable(table)
            | Change::CreateSet(table, ..)
            | Change::CreateChain(table, ..)
            | Change::PutElement { table, .. }
            | Change::WriteRules(table, ..)
            | Change::RemoveElement { table, .. }
            | Change::DeleteChain(table, _)
            | Change::DeleteSet(table, _) => *table,
        }
    }
}

/// Whether packets are sent somewhere because of this element.
fn is_dispatch(key: &Key) -> bool {
    match key {
        Key::Frontend(..) | Key::NodePort(..) => true,
        Key::FrontendSlot(..) | Key::NodePortSlot(..) | Key::AddressPair(..) | Key::Prefix(_) => false,
    }
}

impl Program {
    /// What the kernel holds once it has made a change. A change that refers to what is not there has
    /// no effect, as a transaction of it would fail.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::DeleteTable(table) => {
                self.tables.remove(table);
            }
            Change::CreateTable(table) => {
                self.tables.entry(*table).or_default();
            }
            Change::CreateSet(table, name, kind) => {
                if let Some(table) = self.tables.get_mut(table) {
                    table.sets.entry(name.clone()).or_insert_with(|| Set::empty(*kind));
                }
            }
            Change::CreateChain(table, name, base) => {
                if let Some(table) = self.tables.get_mut(table) {
                    table.chains.entry(name.clone()).or_insert_with(|| Chain { base: *base, rules: Vec::new() });
                }
            }
            Change::PutElement { table, set, key, element, .. } => {
                if let Some(set) = self.set_mut(*table, set) {
                    set.elements.insert(*key, element.clone());
                }
            }
            Change::WriteRules(table, name, rules) => {
                if let Some(chain) = self.tables.get_mut(table).and_then(|table| table.chains.get_mut(name)) {
                    chain.rules.clone_from(rules);
                }
            }
            Change::RemoveElement { table, set, key } => {
                if let Some(set) = self.set_mut(*table, set) {
                    set.elements.remove(key);
                }
            }
            Change::DeleteChain(table, name) => {
                self.tables.get_mut(table).and_then(|table: &mut Table| table.chains.remove(name));
            }
            Change::DeleteSet(table, name) => {
                self.tables.get_mut(table).and_then(|table: &mut Table| table.sets.remove(name));
            }
        }
    }

    pub(super) fn set_mut(&mut self, table: TableKey, name: &str) -> Option<&mut Set> {
        self.tables.get_mut(&table).and_then(|table| table.sets.get_mut(name))
    }
}
