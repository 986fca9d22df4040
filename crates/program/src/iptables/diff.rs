//! What to change so that the tables hold what they should.

use std::collections::BTreeSet;

use super::render::is_built_in;
use super::{ChainName, Change, Match, Program, Rule, Rules, Table, TableKey, TableName, Target};
use crate::layout::is_our_chain;

/// The chain that the kubelet has too (`pkg/kubelet/kubelet_network_linux.go`).
const SHARED: &str = "KUBE-FIREWALL";

/// The changes that make `desired` of `observed`, in order. Only chains of ours and jumps to them count: the
/// rules of others stay, also between ours in built-in chains. A jump that is missing is put first, as
/// kube-proxy does; one that stands behind rules of others stays there.
pub fn diff(observed: &Program, desired: &Program) -> Vec<Change> {
    let keys: BTreeSet<TableKey> = observed
        .tables
        .keys()
        .filter(|key| TableName::OURS.contains(&key.name))
        .chain(desired.tables.keys())
        .copied()
        .collect();
    let (nothing_there, nothing_wanted) = (Table::default(), Table::default());
    let mut changes = Vec::new();
    for key in keys {
        let there = observed.tables.get(&key).unwrap_or(&nothing_there);
        let wanted = desired.tables.get(&key).unwrap_or(&nothing_wanted);
        diff_table(key, there, wanted, &mut changes);
    }
    changes
}

fn diff_table(key: TableKey, there: &Table, wanted: &Table, changes: &mut Vec<Change>) {
    let is_ours = |chain: &ChainName| !is_built_in(&chain.text()) && is_our_chain(key.name.as_str(), &chain.text());
    for (name, chain) in wanted.chains.iter().filter(|(name, _)| !is_built_in(&name.text())) {
        match there.chains.get(name) {
            Some(found) if found.rules.is_same(&chain.rules) || is_left_alone(key, name, &chain.rules) => {}
            _ if chain.rules.is_empty() => changes.push(Change::CreateChain(key, name.clone())),
            _ => changes.push(Change::FillChain(key, name.clone(), chain.rules.clone())),
        }
    }
    let stale: Vec<&ChainName> = there
        .chains
        .iter()
        .filter(|(name, _)| is_ours(name) && !wanted.chains.contains_key(*name))
        .filter(|(name, chain)| !(is_shared(key, name) && chain.rules.list().iter().any(|rule| !is_martian_rule(rule))))
        .map(|(name, _)| name)
        .collect();
    diff_jumps(key, there, wanted, &stale, changes);
    // What a chain of somebody else leads to cannot be deleted; it loses its rules.
    let held: BTreeSet<ChainName> = there
        .chains
        .iter()
        .filter(|(name, _)| !is_built_in(&name.text()) && !is_ours(name))
        .flat_map(|(_, chain)| chain.rules.list().iter().filter_map(Rule::leads_to).cloned().collect::<Vec<_>>())
        .collect();
    for name in stale {
        if !held.contains(name) {
            changes.push(Change::DeleteChain(key, name.clone()));
        } else if there.chains.get(name).is_some_and(|chain| !chain.rules.is_empty()) {
            changes.push(Change::CreateChain(key, name.clone()));
        }
    }
}

fn diff_jumps(key: TableKey, there: &Table, wanted: &Table, stale: &[&ChainName], changes: &mut Vec<Change>) {
    let built_in = |table: &Table| -> BTreeSet<ChainName> {
        table.chains.keys().filter(|name| is_built_in(&name.text())).cloned().collect()
    };
    for name in built_in(there).union(&built_in(wanted)) {
        let rules =
            |table: &Table| table.chains.get(name).map(|chain| chain.rules.list().into_owned()).unwrap_or_default();
        let (found, desired) = (rules(there), rules(wanted));
        // Jumps to ours, unless the chain stays since it is the kubelet's too.
        let is_ours = |rule: &&Rule| {
            rule.leads_to().is_some_and(|chain| {
                is_our_chain(key.name.as_str(), &chain.text())
                    && (wanted.chains.contains_key(chain) || stale.contains(&chain))
            })
        };
        let mut missing: Vec<&Rule> = desired.iter().collect();
        let mut surplus = Vec::new();
        for rule in found.iter().filter(is_ours) {
            match missing.iter().position(|it| it.is_same(rule)) {
                Some(position) => {
                    missing.remove(position);
                }
                None => surplus.push(rule),
            }
        }
        // Each is put first, so the last one goes first.
        for rule in missing.into_iter().rev() {
            changes.push(Change::InsertJump(key, name.clone(), Box::new(rule.clone())));
        }
        for rule in surplus {
            changes.push(Change::RemoveJump(key, name.clone(), Box::new(rule.clone())));
        }
    }
}

fn is_shared(key: TableKey, chain: &ChainName) -> bool {
    key.name == TableName::Filter && *chain == SHARED
}

/// The chain that the kubelet has too is only written where we have a rule for it.
pub fn is_left_alone(key: TableKey, chain: &ChainName, wanted: &Rules) -> bool {
    is_shared(key, chain) && wanted.is_empty()
}

/// The one rule that kube-proxy, the kubelet and we have in that chain.
fn is_martian_rule(rule: &Rule) -> bool {
    rule.target == Some(Target::Drop)
        && rule.comment().is_some_and(|comment| comment.as_ref() == super::compile::MARTIAN_COMMENT)
        && rule.matches.iter().any(|it| matches!(it, Match::Destination { .. }))
}
