//! One change of what the kernel holds, and in which order changes are made.

use serde::{Deserialize, Serialize};

use super::{BaseHook, Chain, Element, Key, Name, Program, Rule, Set, SetKind, Statement, Table, TableKey};

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
    /// Adds a rule whose order means nothing: one that balances over a number of backends.
    ///
    /// The kernel walks a whole map when a chain that does not refer to it yet gets a rule that does:
    /// 12 ms for 100,000 elements. One rule more in a chain that keeps its other rules costs nothing.
    AddRule(TableKey, Name, Rule),
    /// Removes such a rule from a chain.
    RemoveRule(TableKey, Name, Rule),
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
    /// Takes clients out of a map that packets fill: those that are remembered for this endpoint of this
    /// frontend. Its rules drop what they still send there.
    ForgetClients {
        /// The table.
        table: TableKey,
        /// The map.
        clients: Name,
        /// Frontend and endpoint.
        key: Key,
    },
}

/// The order of changes: what is referred to is made first and removed last, and traffic is sent to
/// a thing only when it is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Tables that cannot be brought up to date go.
    Clear,
    /// Tables, sets and chains are made.
    Create,
    /// Rules of regular chains. They come before what they look up: the kernel walks a map that a rule
    /// begins to refer to.
    Rules,
    /// Backends are filled in.
    Fill,
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
    /// What packets left behind.
    Forget,
}

impl Phase {
    /// All of them, in their order.
    pub const ALL: [Phase; 10] = [
        Phase::Clear,
        Phase::Create,
        Phase::Rules,
        Phase::Fill,
        Phase::Dispatch,
        Phase::Hook,
        Phase::Withdraw,
        Phase::Empty,
        Phase::Delete,
        Phase::Forget,
    ];

    /// When elements of a set are added or replaced.
    pub(super) fn of_put(set: &str) -> Phase {
        if super::layout::is_gate(set) { Phase::Dispatch } else { Phase::Fill }
    }

    /// When they are removed.
    pub(super) fn of_removal(set: &str, key: &Key) -> Phase {
        if key.is_interval() {
            // It must be gone before one that overlaps it comes.
            Phase::Fill
        } else if super::layout::is_gate(set) {
            Phase::Withdraw
        } else {
            Phase::Empty
        }
    }
}

impl Change {
    /// When it is its turn.
    pub fn phase(&self) -> Phase {
        match self {
            Change::DeleteTable(_) => Phase::Clear,
            Change::CreateTable(_) | Change::CreateSet(..) | Change::CreateChain(..) => Phase::Create,
            Change::PutElement { set, .. } => Phase::of_put(set),
            Change::WriteRules(_, chain, _) if super::layout::is_base(chain) => Phase::Hook,
            Change::WriteRules(..) | Change::AddRule(..) => Phase::Rules,
            Change::RemoveElement { set, key, .. } => Phase::of_removal(set, key),
            Change::RemoveRule(..) | Change::DeleteChain(..) | Change::DeleteSet(..) => Phase::Delete,
            Change::ForgetClients { .. } => Phase::Forget,
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
            | Change::AddRule(table, ..)
            | Change::RemoveRule(table, ..)
            | Change::RemoveElement { table, .. }
            | Change::ForgetClients { table, .. }
            | Change::DeleteChain(table, _)
            | Change::DeleteSet(table, _) => *table,
        }
    }
}

/// Brings rules at the end of a chain whose order means nothing into the order in which a program has them.
/// In the kernel they stand as they were added.
pub fn sort_balancing(rules: &mut [Rule]) {
    let head = rules.iter().take_while(|rule| place_of(rule).is_none()).count();
    if let Some(tail) = rules.get_mut(head..)
        && tail.iter().all(|rule| place_of(rule).is_some())
    {
        tail.sort_by_key(place_of);
    }
}

/// Where a rule stands among those whose order means nothing: no frontend has slots of two numbers of backends.
fn place_of(rule: &Rule) -> Option<(u32, u32)> {
    match (rule.matches.as_slice(), rule.statements.as_slice()) {
        ([], [Statement::Balance { slots, offset, .. }]) => Some((*slots, *offset)),
        _ => None,
    }
}

/// The changes that make one list of rules of another: single rules whose order means
/// nothing, if nothing else differs.
pub(super) fn rule_changes(table: TableKey, chain: &Name, old: &[Rule], new: &[Rule], changes: &mut Vec<Change>) {
    let is_same = |a: &[Rule], b: &[Rule]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.is_same(b));
    if is_same(old, new) {
        return;
    }
    let head = |rules: &[Rule]| rules.iter().take_while(|rule| place_of(rule).is_none()).count();
    let ((old_head, old_tail), (new_head, new_tail)) = (old.split_at(head(old)), new.split_at(head(new)));
    if !is_same(old_head, new_head) || old_tail.iter().any(|rule| place_of(rule).is_none()) {
        changes.push(Change::WriteRules(table, chain.clone(), new.to_vec()));
        return;
    }
    let is_in = |rule: &Rule, list: &[Rule]| list.iter().any(|it| it.is_same(rule));
    for rule in new_tail.iter().filter(|rule| !is_in(rule, old_tail)) {
        changes.push(Change::AddRule(table, chain.clone(), rule.clone()));
    }
    for rule in old_tail.iter().filter(|rule| !is_in(rule, new_tail)) {
        changes.push(Change::RemoveRule(table, chain.clone(), rule.clone()));
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
                if let Some(chain) = self.chain_mut(*table, name) {
                    chain.rules.clone_from(rules);
                }
            }
            Change::AddRule(table, name, rule) => {
                if let Some(chain) = self.chain_mut(*table, name) {
                    chain.rules.push(rule.clone());
                    sort_balancing(&mut chain.rules);
                }
            }
            Change::RemoveRule(table, name, rule) => {
                if let Some(chain) = self.chain_mut(*table, name)
                    && let Some(position) = chain.rules.iter().position(|it| it.is_same(rule))
                {
                    chain.rules.remove(position);
                }
            }
            Change::RemoveElement { table, set, key } => {
                if let Some(set) = self.set_mut(*table, set) {
                    set.elements.remove(key);
                }
            }
            // What packets put into maps is no part of a program.
            Change::ForgetClients { .. } => {}
            Change::DeleteChain(table, name) => {
                self.tables.get_mut(table).and_then(|table: &mut Table| table.chains.remove(name));
            }
            Change::DeleteSet(table, name) => {
                self.tables.get_mut(table).and_then(|table: &mut Table| table.sets.remove(name));
            }
        }
    }

    fn chain_mut(&mut self, table: TableKey, name: &str) -> Option<&mut Chain> {
        self.tables.get_mut(&table).and_then(|table| table.chains.get_mut(name))
    }

    pub(super) fn set_mut(&mut self, table: TableKey, name: &str) -> Option<&mut Set> {
        self.tables.get_mut(&table).and_then(|table| table.sets.get_mut(name))
    }
}
