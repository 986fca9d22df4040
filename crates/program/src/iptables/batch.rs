//! Splits a long list of changes into several restores, each of which leaves something that works.
//!
//! The order decides what every later change costs on the nft backend. Before the kernel takes one, it walks the whole
//! table, from `PREROUTING` and `OUTPUT` by all jumps: 860,000 rules with 10,000 Services of 10 endpoints, which takes
//! 0.12 s where they lie in its memory in the order of that walk, and 0.28 s where they lie anyhow (Linux 6.18). So
//! chains are made in that order: those of one Service together, Services in the order of their dispatch.
//!
//! `iptables-nft-restore` takes time with the square of the number of chains in its input, and of those that it jumps
//! to: 10,000 Services with 10 endpoints took it 17 s of CPU with all endpoints first and then all balancing, 4.3 s in
//! parts of 1,000 chains that are whole Services, 2.9 s in parts of 500 (version 1.8.9).

use std::cmp::Reverse;

use super::{ChainName, Change, Rule, TableKey};

/// The changes in lists of at most so many chains. Chains come right before the first one that leads to them, and are
/// deleted behind all else; of several changes of one chain the last stays.
pub fn split<'a>(changes: impl IntoIterator<Item = &'a Change>, chains_max: usize) -> Vec<Vec<&'a Change>> {
    let changes: Vec<&Change> = changes.into_iter().collect();
    if changes.len() <= chains_max {
        return if changes.is_empty() { Vec::new() } else { vec![changes] };
    }
    let is_jump = |change: &&Change| matches!(change, Change::InsertJump(..) | Change::RemoveJump(..));
    let (jumps, mut chains): (Vec<&Change>, Vec<&Change>) = changes.into_iter().partition(is_jump);
    chains.sort_by_key(|change| place(change));
    chains.reverse();
    chains.dedup_by_key(|change| place(change));
    chains.reverse();
    let (mut deleted, filled): (Vec<&Change>, Vec<&Change>) =
        chains.into_iter().partition(|change| matches!(change, Change::DeleteChain(..)));
    deleted.sort_by_key(|change| (rank(&change.chain().text()), Reverse(place(change))));
    let walked = Walk::all(&filled);
    drop(filled);
    [walked, jumps, deleted].iter().flat_map(|list| list.chunks(chains_max)).map(<[&Change]>::to_vec).collect()
}

/// What is deleted leads only to chains of a higher rank, or of a name that sorts before its own: a chain can go when
/// nothing leads to it any more.
fn rank(chain: &str) -> usize {
    let order = [["KUBE-FW-"; 2], ["KUBE-EXT-", "KUBE-XLB-"], ["KUBE-SVC-", "KUBE-SVL-"], ["KUBE-SEP-", "KUBE-MARK-"]];
    let of_prefix = |prefixes: &[&str; 2]| prefixes.iter().any(|prefix| chain.starts_with(prefix));
    order.iter().position(of_prefix).map_or(0, |position| position + 1)
}

fn place(change: &Change) -> (TableKey, &ChainName) {
    (change.table(), change.chain())
}

/// A walk along jumps, from chain to chain of a list that is sorted by place.
struct Walk<'a> {
    chains: &'a [&'a Change],
    is_seen: Vec<bool>,
    order: Vec<usize>,
}

impl<'a> Walk<'a> {
    /// Chains in the order in which a walk is done with them: each after all that it leads to.
    fn all<'b>(chains: &'a [&'b Change]) -> Vec<&'b Change> {
        let mut walk = Walk { chains, is_seen: vec![false; chains.len()], order: Vec::new() };
        let mut is_led_to = vec![false; chains.len()];
        for change in chains {
            for target in walk.targets(change) {
                if let Some(is_led_to) = is_led_to.get_mut(target) {
                    *is_led_to = true;
                }
            }
        }
        // Packets come in where nothing leads to. What is left then leads in circles, and the kernel will say so.
        for pass in [false, true] {
            for (position, is_led_to) in is_led_to.iter().enumerate() {
                if *is_led_to == pass {
                    walk.visit(position);
                }
            }
        }
        walk.order.iter().filter_map(|position| chains.get(*position)).copied().collect()
    }

    fn visit(&mut self, position: usize) {
        let chains = self.chains;
        let (Some(change), Some(is_seen)) = (chains.get(position), self.is_seen.get_mut(position)) else { return };
        if std::mem::replace(is_seen, true) {
            return;
        }
        for target in self.targets(change) {
            self.visit(target);
        }
        self.order.push(position);
    }

    /// Where a chain leads, in the order of its rules, among those that change.
    fn targets(&self, change: &Change) -> Vec<usize> {
        let Change::FillChain(table, _, rules) = change else { return Vec::new() };
        let position =
            |name: &ChainName| self.chains.binary_search_by_key(&(*table, name), |change| place(change)).ok();
        rules.list().iter().filter_map(Rule::leads_to).filter_map(position).collect()
    }
}
