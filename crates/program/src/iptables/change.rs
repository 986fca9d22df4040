//! One change of what the kernel holds.

use serde::{Deserialize, Serialize};

use super::{Chain, ChainName, Program, Rule, Rules, TableKey};

/// One change. A list of them is one `iptables-restore` per family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Makes a chain, if it is not there. One that is there loses its rules.
    CreateChain(TableKey, ChainName),
    /// Makes a chain of these rules, whatever it was.
    FillChain(TableKey, ChainName, Rules),
    /// Puts a jump first in a built-in chain.
    InsertJump(TableKey, ChainName, Box<Rule>),
    /// Removes a jump from a built-in chain.
    RemoveJump(TableKey, ChainName, Box<Rule>),
    /// Deletes a chain with its rules. Nothing may lead to it any more.
    DeleteChain(TableKey, ChainName),
}

impl Change {
    /// The table that is changed.
    pub fn table(&self) -> TableKey {
        match self {
            Change::CreateChain(table, _)
            | Change::FillChain(table, ..)
            | Change::InsertJump(table, ..)
            | Change::RemoveJump(table, ..)
            | Change::DeleteChain(table, _) => *table,
        }
    }

    /// The chain that is changed.
    pub fn chain(&self) -> &ChainName {
        match self {
            Change::CreateChain(_, chain)
            | Change::FillChain(_, chain, _)
            | Change::InsertJump(_, chain, _)
            | Change::RemoveJump(_, chain, _)
            | Change::DeleteChain(_, chain) => chain,
        }
    }
}

impl Program {
    /// What the kernel holds once it has made a change.
    pub fn apply(&mut self, change: &Change) {
        let table = self.tables.entry(change.table()).or_default();
        match change {
            Change::CreateChain(_, name) => {
                table.chains.insert(name.clone(), Chain::default());
            }
            Change::FillChain(_, name, rules) => {
                table.chains.insert(name.clone(), Chain::of(rules.clone()));
            }
            Change::InsertJump(_, name, rule) => {
                let chain = table.chains.entry(name.clone()).or_insert_with(|| Chain::built_in([]));
                let rules = std::iter::once(&**rule).chain(chain.rules.list().iter()).cloned().collect();
                chain.rules = rules;
            }
            Change::RemoveJump(_, name, rule) => {
                if let Some(chain) = table.chains.get_mut(name)
                    && let Some(position) = chain.rules.list().iter().position(|it| it.is_same(rule))
                {
                    let mut rules = chain.rules.list().into_owned();
                    rules.remove(position);
                    chain.rules = rules.into();
                }
            }
            Change::DeleteChain(_, name) => {
                table.chains.remove(name);
            }
        }
    }
}
