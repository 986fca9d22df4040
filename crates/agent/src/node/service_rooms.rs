//! Which rooms a mode of Services uses, and their kernel sides.

use std::collections::BTreeSet;
use std::sync::Arc;

use portolan_intent::NodeView;
use portolan_intent::services::FrontendUpdate;
use portolan_kernel::KernelError;
use portolan_kernel::iptables::Backend;
use portolan_kernel::monitor::ChainName;
use portolan_net::{Family, Protocol};
use portolan_program::ipvs::{RealKey, RealServer, ServerKey};
use portolan_program::{ipset, iptables, ipvs};

use super::mending;
use super::port::{Applied, RealKernel};
use super::rooms::{Kept, KeptRoom, NodeFacts, Room, RoomPort, RuleCount, Unused};
use crate::config::{AgentConfig, ServicesMode};

type Rooms = Vec<Box<dyn KeptRoom<RealKernel> + Send>>;

/// The rooms beside nftables that a mode uses, in the order of their application.
pub(super) fn used(config: &AgentConfig, view: &NodeView, families: &[Family]) -> Rooms {
    match config.services_mode() {
        ServicesMode::Nftables => Vec::new(),
        ServicesMode::Iptables => vec![Box::new(Kept::new(iptables::Compiler::new(view, families)))],
        ServicesMode::Ipvs => {
            let settings = config.ipvs_settings();
            // Chains refer to sets, and what IPVS balances must find both.
            vec![
                Box::new(Kept::new(ipset::Compiler::new(view, families))),
                Box::new(Kept::new(IpvsChains::new(view, families))),
                Box::new(Kept::new(ipvs::Compiler::with_settings(view, families, settings))),
            ]
        }
    }
}

/// The rooms that a mode does not use, in the order in which they are emptied.
pub(super) fn unused(mode: Option<ServicesMode>) -> Rooms {
    let mut rooms: Rooms = Vec::new();
    if mode != Some(ServicesMode::Ipvs) {
        rooms.push(Box::new(Unused::<ipvs::Compiler>::default()));
    }
    if !matches!(mode, Some(ServicesMode::Iptables | ServicesMode::Ipvs)) {
        rooms.push(Box::new(Unused::<iptables::Compiler>::default()));
    }
    if mode != Some(ServicesMode::Ipvs) {
        rooms.push(Box::new(Unused::<ipset::Compiler>::default()));
    }
    rooms
}

impl Room for iptables::Compiler {
    const NAME: &'static str = "iptables";
    // With 10,000 Services `iptables-save` takes seconds, on the nft backend minutes.
    const IS_COSTLY: bool = true;
    type Program = iptables::Program;
    type Change = iptables::Change;

    fn program(&self) -> &iptables::Program {
        iptables::Compiler::program(self)
    }

    fn update_services(&mut self, updates: &[FrontendUpdate]) -> Vec<iptables::Change> {
        iptables::Compiler::update_services(self, updates)
    }

    fn set_node(&mut self, node: &NodeFacts) -> Vec<iptables::Change> {
        let mut changes = self.set_node_addresses(&node.addresses);
        changes.extend(self.set_node_prefixes(&node.prefixes));
        changes.extend(self.set_health_ports(&node.health_ports));
        changes
    }

    fn diff(observed: &iptables::Program, wanted: &iptables::Program) -> Vec<iptables::Change> {
        iptables::diff(observed, wanted)
    }

    fn render_changes(changes: &[iptables::Change]) -> String {
        Family::ALL.into_iter().map(|family| iptables::render_restore(changes, family)).collect()
    }

    fn render(program: &iptables::Program) -> String {
        iptables::render(program)
    }

    fn count_rules(program: &iptables::Program, changes: &[iptables::Change]) -> Vec<RuleCount> {
        count_rules(program, changes)
    }
}

impl RoomPort<iptables::Compiler> for RealKernel {
    fn observe(&mut self) -> Result<iptables::Program, KernelError> {
        self.iptables()?.observe()
    }

    fn observe_beside(&mut self, wanted: &iptables::Program) -> Result<iptables::Program, KernelError> {
        self.iptables()?.observe_beside(wanted)
    }

    fn apply(&mut self, changes: &[iptables::Change]) -> Applied<iptables::Change> {
        Applied::by(self.iptables(), changes, |room| {
            let report = room.apply(changes);
            (report.failed, report.restores)
        })
    }

    /// The kernel tells of chains only where it is nftables that holds them.
    fn mend(
        &mut self,
        room: &iptables::Compiler,
        chains: &BTreeSet<ChainName>,
    ) -> Result<Vec<iptables::Change>, KernelError> {
        mend(self, room.program(), chains)
    }

    /// The legacy backend is asked for the sizes of its tables. Of the nft backend the kernel tells by notification,
    /// and two chains that always have rules are looked at: whoever flushes a table empties them too.
    fn is_intact(&mut self) -> bool {
        match self.iptables().map(|room| (room.backend(), room.was_touched())) {
            Err(_) => false,
            Ok((Backend::Legacy, was_touched)) => !was_touched,
            Ok((Backend::Nft, _)) => Family::ALL.into_iter().any(|family| {
                let mut has_rules =
                    |table, chain| self.nftables().targets(family, table, chain).is_ok_and(|rules| !rules.is_empty());
                has_rules("nat", "KUBE-POSTROUTING") && has_rules("filter", "KUBE-FORWARD")
            }),
        }
    }
}

/// Counts the rules of both families together, as they are written in one sync.
fn count_rules(program: &iptables::Program, changes: &[iptables::Change]) -> Vec<RuleCount> {
    let written = |change: &iptables::Change| match change {
        iptables::Change::FillChain(_, _, rules) => rules.len(),
        iptables::Change::InsertJump(..) => 1,
        iptables::Change::CreateChain(..) | iptables::Change::RemoveJump(..) | iptables::Change::DeleteChain(..) => 0,
    };
    let count = |table: iptables::TableName| {
        let tables = program.tables.iter().filter(|(key, _)| key.name == table);
        let total = tables.flat_map(|(_, table)| table.chains.values()).map(|chain| chain.rules.len()).sum();
        let changes = changes.iter().filter(|change| change.table().name == table);
        RuleCount { table: table.as_str(), total, written: changes.map(written).sum() }
    };
    iptables::TableName::OURS.map(count).into()
}

fn mend(
    kernel: &mut RealKernel,
    program: &iptables::Program,
    chains: &BTreeSet<ChainName>,
) -> Result<Vec<iptables::Change>, KernelError> {
    if kernel.iptables()?.backend() != Backend::Nft {
        return Ok(Vec::new());
    }
    mending::steps(program, chains, |name| kernel.nftables().targets(name.family, name.table.as_str(), &name.chain))
}

/// The chains of the ipvs mode. They look members of sets up, so that no Service changes them.
struct IpvsChains {
    view: NodeView,
    families: Vec<Family>,
    program: iptables::Program,
}

impl IpvsChains {
    fn new(view: &NodeView, families: &[Family]) -> IpvsChains {
        let program = iptables::chains_for_ipvs(view, families, &[]);
        IpvsChains { view: view.clone(), families: families.to_vec(), program }
    }
}

impl Room for IpvsChains {
    const NAME: &'static str = "iptables";
    type Program = iptables::Program;
    type Change = iptables::Change;

    fn program(&self) -> &iptables::Program {
        &self.program
    }

    fn update_services(&mut self, _: &[FrontendUpdate]) -> Vec<iptables::Change> {
        Vec::new()
    }

    fn set_node(&mut self, node: &NodeFacts) -> Vec<iptables::Change> {
        let program = iptables::chains_for_ipvs(&self.view, &self.families, &node.prefixes);
        let changes = iptables::diff(&self.program, &program);
        self.program = program;
        changes
    }

    fn diff(observed: &iptables::Program, wanted: &iptables::Program) -> Vec<iptables::Change> {
        iptables::diff(observed, wanted)
    }

    fn render_changes(changes: &[iptables::Change]) -> String {
        <iptables::Compiler as Room>::render_changes(changes)
    }

    fn render(program: &iptables::Program) -> String {
        iptables::render(program)
    }

    fn count_rules(program: &iptables::Program, changes: &[iptables::Change]) -> Vec<RuleCount> {
        count_rules(program, changes)
    }
}

/// The kernel's side is the same, whoever wants chains in it.
impl RoomPort<IpvsChains> for RealKernel {
    fn observe(&mut self) -> Result<iptables::Program, KernelError> {
        RoomPort::<iptables::Compiler>::observe(self)
    }

    fn apply(&mut self, changes: &[iptables::Change]) -> Applied<iptables::Change> {
        RoomPort::<iptables::Compiler>::apply(self, changes)
    }

    fn mend(&mut self, room: &IpvsChains, chains: &BTreeSet<ChainName>) -> Result<Vec<iptables::Change>, KernelError> {
        mend(self, &room.program, chains)
    }

    fn is_intact(&mut self) -> bool {
        RoomPort::<iptables::Compiler>::is_intact(self)
    }
}

impl Room for ipset::Compiler {
    const NAME: &'static str = "ipset";
    type Program = ipset::Program;
    type Change = ipset::Change;

    fn program(&self) -> &ipset::Program {
        ipset::Compiler::program(self)
    }

    fn update_services(&mut self, updates: &[FrontendUpdate]) -> Vec<ipset::Change> {
        ipset::Compiler::update_services(self, updates)
    }

    fn set_node(&mut self, node: &NodeFacts) -> Vec<ipset::Change> {
        let mut changes = self.set_node_addresses(&node.addresses);
        changes.extend(self.set_health_ports(&node.health_ports));
        changes
    }

    fn diff(observed: &ipset::Program, wanted: &ipset::Program) -> Vec<ipset::Change> {
        ipset::diff(observed, wanted)
    }

    fn render_changes(changes: &[ipset::Change]) -> String {
        changes.iter().map(|change| ipset::render_change(change) + "\n").collect()
    }

    fn render(program: &ipset::Program) -> String {
        ipset::render(program)
    }
}

impl RoomPort<ipset::Compiler> for RealKernel {
    fn observe(&mut self) -> Result<ipset::Program, KernelError> {
        self.ipset()?.observe()
    }

    fn apply(&mut self, changes: &[ipset::Change]) -> Applied<ipset::Change> {
        Applied::by(self.ipset(), changes, |room| {
            let report = room.apply(changes);
            (report.failed, report.messages)
        })
    }
}

impl Room for ipvs::Compiler {
    const NAME: &'static str = "ipvs";
    type Program = ipvs::Program;
    type Change = ipvs::Change;

    fn program(&self) -> &ipvs::Program {
        ipvs::Compiler::program(self)
    }

    fn update_services(&mut self, updates: &[FrontendUpdate]) -> Vec<ipvs::Change> {
        ipvs::Compiler::update_services(self, updates)
    }

    fn set_node(&mut self, node: &NodeFacts) -> Vec<ipvs::Change> {
        let mut changes = self.set_node_addresses(&node.addresses);
        changes.extend(self.set_health_ports(&node.health_ports));
        changes
    }

    fn diff(observed: &ipvs::Program, wanted: &ipvs::Program) -> Vec<ipvs::Change> {
        ipvs::diff(observed, wanted)
    }

    fn render_changes(changes: &[ipvs::Change]) -> String {
        changes.iter().map(|change| ipvs::render_change(change) + "\n").collect()
    }

    fn render(program: &ipvs::Program) -> String {
        ipvs::render(program)
    }

    fn adopt(&mut self, observed: &ipvs::Program) {
        ipvs::Compiler::adopt(self, observed);
    }
}

impl RoomPort<ipvs::Compiler> for RealKernel {
    fn observe(&mut self) -> Result<ipvs::Program, KernelError> {
        self.ipvs()?.observe()
    }

    fn apply(&mut self, changes: &[ipvs::Change]) -> Applied<ipvs::Change> {
        Applied::by(self.ipvs(), changes, |room| {
            let report = room.apply(changes);
            (report.failed, report.messages)
        })
    }

    fn settle(&mut self, room: &mut ipvs::Compiler) -> Result<Vec<ipvs::Change>, KernelError> {
        let leaving: Vec<_> = room.leaving().collect();
        let connections = self.ipvs()?.connections(leaving)?;
        Ok(room.settle(&connections))
    }

    /// Connections that go through a virtual server end with it. So one that has some stays, at weight 0 and with
    /// its address, until they are gone.
    fn spare(&mut self, observed: &ipvs::Program) -> Result<ipvs::Program, KernelError> {
        let tcp = observed.servers.iter().filter(|(key, _)| key.protocol == Protocol::Tcp);
        let all: Vec<_> = tcp.flat_map(|(key, server)| server.real.iter().map(|real| (*key, real.key))).collect();
        if all.is_empty() {
            return Ok(ipvs::Program::default());
        }
        let counted = self.ipvs()?.connections(all)?;
        let busy = counted.into_iter().filter(|(.., count)| count.unwrap_or(0) > 0);
        let busy: BTreeSet<(ServerKey, RealKey)> = busy.map(|(server, real, _)| (server, real)).collect();
        let mut spared = ipvs::Program::default();
        for (key, server) in &observed.servers {
            let has_some = server.real.iter().filter(|real| busy.contains(&(*key, real.key)));
            let real: Vec<RealServer> = has_some.map(|real| RealServer { weight: 0, ..real.clone() }).collect();
            if !real.is_empty() {
                spared.device = observed.device;
                spared.addresses.extend(observed.addresses.get(&key.address));
                let server = ipvs::VirtualServer { real: real.into(), ..(**server).clone() };
                spared.servers.insert(*key, Arc::new(server));
            }
        }
        Ok(spared)
    }
}
