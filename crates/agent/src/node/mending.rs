//! Putting back single chains of iptables that others changed, as the kernel tells of them: the whole of a table is
//! not read for that, which takes seconds where there are many Services.

use std::collections::BTreeSet;

use portolan_kernel::monitor::ChainName;
use portolan_program::iptables::{self, Change, Program, Rule, TableKey};

/// The steps that give each of these chains what it must hold, if it does not. `targets` tells for each rule that a
/// chain holds the chain that it leads to: rules that were taken out, put in or moved are seen by it, and one that was
/// replaced by another of the same kind is not. What it cannot tell is no reason to write anything.
pub(super) fn steps<E>(
    program: &Program,
    changed: &BTreeSet<ChainName>,
    mut targets: impl FnMut(&ChainName) -> Result<Vec<Option<String>>, E>,
) -> Result<Vec<Change>, E> {
    let mut steps = Vec::new();
    for name in changed {
        let key = TableKey { family: name.family, name: name.table };
        let chains = program.tables.get(&key).map(|table| &table.chains);
        let Some((chain_name, chain)) =
            chains.and_then(|chains| chains.get_key_value(&iptables::ChainName::from(&*name.chain)))
        else {
            continue;
        };
        if iptables::is_left_alone(key, chain_name, &chain.rules) {
            continue;
        }
        let wanted = chain.rules.list();
        let found = targets(name)?;
        if chain.policy.is_some() {
            // Rules of others are between ours. Each is put first, so the last one goes first.
            let missing = wanted.iter().rev().filter(|rule| !found.iter().any(|it| leads_there(rule, it.as_deref())));
            steps.extend(missing.map(|rule| Change::InsertJump(key, chain_name.clone(), Box::new(rule.clone()))));
        } else if wanted.is_empty() && !found.is_empty() {
            steps.push(Change::CreateChain(key, chain_name.clone()));
        } else if wanted.len() != found.len()
            || wanted.iter().zip(&found).any(|(rule, it)| !leads_there(rule, it.as_deref()))
        {
            steps.push(Change::FillChain(key, chain_name.clone(), chain.rules.clone()));
        }
    }
    Ok(steps)
}

fn leads_there(rule: &Rule, target: Option<&str>) -> bool {
    match (rule.leads_to(), target) {
        (Some(chain), Some(target)) => *chain == target,
        (chain, target) => chain.is_none() && target.is_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_net::Family;
    use portolan_program::iptables::{Chain, TableName, sample};

    fn name(chain: &str) -> ChainName {
        ChainName { family: Family::V4, table: TableName::Nat, chain: chain.to_owned() }
    }

    fn program() -> Program {
        let mut sample = sample::Sample::new(&sample::view().unwrap(), &[Family::V4]);
        sample.fill(Family::V4, 3, 2);
        sample.compiler().program().clone()
    }

    fn steps_of(
        program: &Program,
        changed: &[&ChainName],
        found: impl Fn(&ChainName) -> Vec<Option<String>>,
    ) -> Vec<Change> {
        let changed = changed.iter().copied().cloned().collect();
        steps(program, &changed, |name| Ok::<_, ()>(found(name))).unwrap()
    }

    /// What the kernel would tell of a chain that holds these rules.
    fn told(chain: &Chain) -> Vec<Option<String>> {
        chain.rules.list().iter().map(|rule| rule.leads_to().map(ToString::to_string)).collect()
    }

    fn chain_of(program: &Program, name: &ChainName) -> Chain {
        program.tables[&TableKey { family: name.family, name: name.table }].chains
            [&iptables::ChainName::from(&*name.chain)]
            .clone()
    }

    #[test]
    fn what_is_as_it_must_be_is_left() {
        let program = program();
        let key = TableKey { family: Family::V4, name: TableName::Nat };
        let all: BTreeSet<ChainName> = program.tables[&key].chains.keys().map(|chain| name(&chain.text())).collect();
        assert!(all.len() > 5);
        let all: Vec<&ChainName> = all.iter().collect();
        assert_eq!(steps_of(&program, &all, |name| told(&chain_of(&program, name))), []);
        assert_eq!(steps_of(&program, &[&name("DOCKER")], |_| vec![None]), []);
        // What the kubelet has in the chain that is its own too, and where we have nothing.
        let shared = ChainName { table: TableName::Filter, ..name("KUBE-FIREWALL") };
        assert!(chain_of(&program, &shared).rules.is_empty());
        assert_eq!(steps_of(&program, &[&shared], |_| vec![None]), []);
    }

    #[test]
    fn a_rule_that_is_gone_new_or_moved_is_seen() {
        let program = program();
        let services = name("KUBE-SERVICES");
        let wanted = chain_of(&program, &services);
        let whole = told(&wanted);
        assert!(whole.len() > 1, "{whole:?}");
        let gone = whole.get(1..).unwrap().to_vec();
        let new = [whole.clone(), vec![None]].concat();
        let moved: Vec<_> = whole.iter().rev().cloned().collect();
        for found in [Vec::new(), gone, new, moved] {
            let steps = steps_of(&program, &[&services], |_| found.clone());
            assert!(
                matches!(&steps[..], [Change::FillChain(_, chain, rules)]
                if *chain == "KUBE-SERVICES" && rules.is_same(&wanted.rules)),
                "{steps:?}"
            );
        }
    }

    #[test]
    fn a_jump_is_put_back_among_the_rules_of_others() {
        let program = program();
        let output = name("OUTPUT");
        let ours = told(&chain_of(&program, &output));
        let with_others = [vec![Some("DOCKER".to_owned())], ours.clone()].concat();
        assert_eq!(steps_of(&program, &[&output], |_| with_others.clone()), []);
        let steps = steps_of(&program, &[&output], |_| vec![Some("DOCKER".to_owned())]);
        assert_eq!(steps.len(), ours.len());
        assert!(steps.iter().all(|step| matches!(step, Change::InsertJump(..))), "{steps:?}");
    }

    #[test]
    fn what_cannot_be_read_is_not_written() {
        let changed = BTreeSet::from([name("OUTPUT")]);
        assert_eq!(steps(&program(), &changed, |_| Err("interrupted")), Err("interrupted"));
    }
}
