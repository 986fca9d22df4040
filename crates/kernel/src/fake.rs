//! A kernel in memory: it takes the same steps and is observed the same way. For tests of whole
//! scenarios, which need no rights and touch nothing.

use std::collections::VecDeque;

use nix::errno::Errno;
use portolan_program::netlink::{Change, Program, Surroundings};
use portolan_program::nftables;

use crate::error::{KernelError, Refusal};
use crate::netlink::{Observed, Report};
use crate::nftables::Report as TablesReport;

/// What a node's kernel holds, in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FakeKernel {
    netlink: Program,
    nftables: nftables::Program,
    others: Surroundings,
    /// Whether each of the next steps is refused.
    fates: VecDeque<bool>,
}

impl FakeKernel {
    /// A kernel that holds nothing of ours.
    pub fn new(others: Surroundings) -> FakeKernel {
        FakeKernel { others, ..FakeKernel::default() }
    }

    /// What rtnetlink holds.
    pub fn observe_netlink(&self) -> Observed {
        Observed { ours: self.netlink.clone(), others: self.others.clone() }
    }

    /// What rtnetlink holds, to be changed behind our back.
    pub fn netlink_mut(&mut self) -> (&mut Program, &mut Surroundings) {
        (&mut self.netlink, &mut self.others)
    }

    /// Refuses the next steps, as a kernel without memory would.
    pub fn refuse_next(&mut self, steps: usize) {
        self.decide_next(std::iter::repeat_n(true, steps));
    }

    /// Decides for each of the next steps whether it is refused, in both rooms. Later ones succeed.
    pub fn decide_next(&mut self, refused: impl IntoIterator<Item = bool>) {
        self.fates = refused.into_iter().collect();
    }

    /// What nftables holds.
    pub fn observe_nftables(&self) -> nftables::Program {
        self.nftables.clone()
    }

    /// What nftables holds, to be changed behind our back.
    pub fn nftables_mut(&mut self) -> &mut nftables::Program {
        &mut self.nftables
    }

    /// Makes the changes that refer to what is there, and reports the others as the real room does.
    pub fn apply_nftables(&mut self, changes: &[nftables::Change]) -> TablesReport {
        let mut report = TablesReport { messages: changes.len(), ..TablesReport::default() };
        for (index, change) in changes.iter().enumerate() {
            match self.decide().and_then(|()| possible(&self.nftables, change)) {
                Ok(()) => self.nftables.apply(change),
                Err(error) => report.failed.push((index, error)),
            }
        }
        report
    }

    fn decide(&mut self) -> Result<(), KernelError> {
        if self.fates.pop_front().unwrap_or_default() { Err(refused(Errno::ENOMEM)) } else { Ok(()) }
    }

    /// Does the steps.
    pub fn apply_netlink(&mut self, changes: &[Change]) -> Report {
        let mut report = Report::default();
        let mut ordered: Vec<&Change> = changes.iter().collect();
        ordered.sort_by_key(|change| change.phase());
        for change in ordered {
            report.messages += 1;
            let outcome = self.step(change);
            report.record(change, outcome);
        }
        report
    }

    fn step(&mut self, change: &Change) -> Result<(), KernelError> {
        self.decide()?;
        if let Some(device) = change.device().filter(|device| !self.has_link(device)) {
            return Err(KernelError::NoSuchLink(device.to_owned()));
        }
        let held = &mut self.netlink;
        match change.clone() {
            Change::RemoveRoute(it) => drop(held.routes.remove(&it.destination)),
            Change::RemoveForwarding(it) => drop(held.forwarding.remove(&(it.device, it.mac))),
            Change::RemoveNeighbour(it) => drop(held.neighbours.remove(&(it.device, it.address))),
            Change::RemoveAddress(it) => drop(held.addresses.remove(&(it.device, it.prefix))),
            Change::RemovePod(it) => drop(held.pods.remove(&it.key)),
            Change::RemoveLink(it) => self.remove_link(&it.name),
            Change::CreateLink(it) | Change::AdjustLink(it) => {
                self.others.links.retain(|other| other.name != it.name);
                held.links.insert(it.name.clone(), it);
            }
            Change::SetSysctl { path, value } => {
                let origin = portolan_net::Origin::configuration("kernel");
                held.sysctls.insert(path, portolan_program::netlink::Sysctl { value, origin });
            }
            Change::AddAddress(it) => drop(held.addresses.insert((it.device.clone(), it.prefix), it)),
            Change::SetNeighbour(it) => drop(held.neighbours.insert((it.device.clone(), it.address), it)),
            Change::SetForwarding(it) => drop(held.forwarding.insert((it.device.clone(), it.mac), it)),
            Change::AddRoute(it) => {
                let taken = |other: &&portolan_program::netlink::ForeignRoute| {
                    other.destination == it.destination
                        && (other.device != it.device || other.gateway != Some(it.gateway))
                };
                if self.others.routes.iter().find(taken).is_some() {
                    let wanted = Change::AddRoute(it.clone()).to_string();
                    return Err(KernelError::RouteTaken { destination: it.destination, wanted });
                }
                held.routes.insert(it.destination, it);
            }
            Change::ReplaceRoute(it) => {
                self.others.routes.retain(|other| other.destination != it.destination);
                held.routes.insert(it.destination, it);
            }
            Change::CreatePod(it) | Change::AdjustPod(it) => drop(held.pods.insert(it.key.clone(), it)),
        }
        Ok(())
    }

    fn has_link(&self, name: &str) -> bool {
        self.netlink.links.contains_key(name) || self.others.link(name).is_some()
    }

    /// What hangs on a link goes with it.
    fn remove_link(&mut self, name: &str) {
        let held = &mut self.netlink;
        held.links.remove(name);
        held.addresses.retain(|(device, _), _| device != name);
        held.neighbours.retain(|(device, _), _| device != name);
        held.forwarding.retain(|(device, _), _| device != name);
        held.routes.retain(|_, route| route.device != name);
        held.sysctls.retain(|path, _| !path.split('/').any(|part| part == name));
        for pod in held.pods.values_mut().filter(|pod| pod.bridge == name) {
            pod.bridge.clear();
        }
    }
}

fn refused(errno: Errno) -> KernelError {
    KernelError::Refused(Refusal { errno, message: None, offset: None })
}

/// Whether nf_tables would make a change: what it refers to is there, what it adds is not there as
/// something else, and what it deletes is in nobody's use.
fn possible(held: &nftables::Program, change: &nftables::Change) -> Result<(), KernelError> {
    use nftables::Change;
    let absent = || refused(Errno::ENOENT);
    let key = change.table();
    if let Change::CreateTable(_) = change {
        return Ok(());
    }
    let table = held.tables.get(&key).ok_or_else(absent)?;
    match change {
        Change::DeleteTable(_) | Change::CreateTable(_) | Change::CreateSet(..) | Change::CreateChain(..) => Ok(()),
        Change::ForgetClients { clients, .. } => table.sets.get(clients).map(|_| ()).ok_or_else(absent),
        Change::PutElement { set, key, element, replaces, .. } => {
            match (table.sets.get(set).ok_or_else(absent)?.elements.get(key), replaces) {
                (None, true) => Err(absent()),
                (Some(there), false) if !there.is_same(element) => Err(refused(Errno::EEXIST)),
                _ => Ok(()),
            }
        }
        Change::RemoveElement { set, key, .. } => {
            let elements = &table.sets.get(set).ok_or_else(absent)?.elements;
            if elements.contains_key(key) { Ok(()) } else { Err(absent()) }
        }
        Change::WriteRules(_, chain, rules) => {
            table.chains.get(chain).ok_or_else(absent)?;
            rules.iter().try_for_each(|rule| refers_to_what_is_there(table, rule))
        }
        Change::AddRule(_, chain, rule) => {
            table.chains.get(chain).ok_or_else(absent)?;
            refers_to_what_is_there(table, rule)
        }
        Change::RemoveRule(_, chain, rule) => {
            let rules = &table.chains.get(chain).ok_or_else(absent)?.rules;
            if rules.iter().any(|it| it.is_same(rule)) { Ok(()) } else { Err(absent()) }
        }
        Change::DeleteChain(_, name) => {
            let chain = table.chains.get(name).ok_or_else(absent)?;
            let is_used = !chain.rules.is_empty() || references(table).any(|it| it == Reference::Chain(name));
            if is_used { Err(refused(Errno::EBUSY)) } else { Ok(()) }
        }
        Change::DeleteSet(_, name) => {
            table.sets.get(name).ok_or_else(absent)?;
            let is_used = references(table).any(|it| it == Reference::Set(name));
            if is_used { Err(refused(Errno::EBUSY)) } else { Ok(()) }
        }
    }
}

/// What a rule refers to.
#[derive(PartialEq, Eq)]
enum Reference<'a> {
    Set(&'a str),
    Chain(&'a str),
}

fn references_of(rule: &nftables::Rule) -> impl Iterator<Item = Reference<'_>> {
    let sets = rule.matches.iter().filter_map(|condition| match condition {
        nftables::Match::Set { set, .. } => Some(Reference::Set(set)),
        _ => None,
    });
    let others = rule.statements.iter().flat_map(|statement| match statement {
        nftables::Statement::Jump(chain) | nftables::Statement::Goto(chain) => vec![Reference::Chain(chain)],
        nftables::Statement::Balance { map, .. } => vec![Reference::Set(map)],
        nftables::Statement::Keep { clients, .. } => vec![Reference::Set(clients)],
        nftables::Statement::Remember(it) | nftables::Statement::Forget(it) => {
            vec![Reference::Set(&it.timeouts), Reference::Set(&it.endpoints), Reference::Set(&it.clients)]
        }
        _ => Vec::new(),
    });
    sets.chain(others)
}

fn references(table: &nftables::Table) -> impl Iterator<Item = Reference<'_>> {
    table.chains.values().flat_map(|chain| &chain.rules).flat_map(references_of)
}

fn refers_to_what_is_there(table: &nftables::Table, rule: &nftables::Rule) -> Result<(), KernelError> {
    let is_there = |reference: Reference<'_>| match reference {
        Reference::Set(name) => table.sets.contains_key(name),
        Reference::Chain(name) => table.chains.contains_key(name),
    };
    if references_of(rule).all(is_there) { Ok(()) } else { Err(refused(Errno::ENOENT)) }
}
