//! One apply cycle: tables to intent to programs to kernel.
//!
//! Intent and programs are kept between cycles, so that a cycle costs what changed: a cycle that follows
//! changes believes that the kernel holds what the last one wanted. A failure, a notification or the
//! passing of time makes the engine read the kernel again and work from what is there.
//!
//! A cycle with changes to follow does not read the kernel because something else failed:
//! [`Engine::retry`] says when it is time for that, so that one item that the kernel refuses for ever does
//! not make every other change cost as much as the whole cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use portolan_intent::services::HealthCheck;
use portolan_intent::{Encapsulation, NodeView, wiring};
use portolan_kernel::KernelError;
use portolan_kernel::monitor::{ChainName, Event};
use portolan_net::{Family, IpNet, MacAddress, ObjectKey, ObjectKind};
use portolan_program::netlink::{self, Surroundings};
use portolan_program::{ipvs_mode, nftables};
use portolan_state::{AttachmentKey, Change, Dirty, Node, NodeTunnel, Problem, Snapshot, Writer};
use portolan_trace::ServicesPrograms;

use super::compiled::{Compiled, health_ports, node_addresses, view};
use super::port::KernelPort;
use super::refusals::{self, Refusals};
use super::rooms::{KeptRoom, Steps};
use super::stale::Rooms;
pub use super::waiting::Waiting;
use crate::config::{AgentConfig, ServicesMode};
use crate::metrics::Metrics;
use crate::proxy::ProblemBoard;

/// Tables that must have been listed in full before the kernel is touched. Pods serve names and traces
/// only, so the data plane does not wait for them.
const NEEDED: &[ObjectKind] = &[ObjectKind::Node, ObjectKind::Service, ObjectKind::EndpointSlice];

/// How many nftables changes are in memory at a time: as many as the kernel gets in one transaction.
const CHANGES_PER_STEP: usize = 20_000;

/// What came of a cycle.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Whether the kernel was touched or read at all: false before in-sync.
    pub ran: bool,
    /// Changes that were made or tried.
    pub changes: usize,
    /// Netlink messages that they took.
    pub messages: usize,
    /// What the kernel refused; it is tried again.
    pub failures: Vec<String>,
    /// Pod interfaces that could not be made, set or removed, with the reason.
    pub failed_pods: BTreeMap<AttachmentKey, KernelError>,
}

/// The agent's memory of the cluster and of the kernel.
pub struct Engine<P> {
    /// The kernel.
    pub port: P,
    /// The tables' writer.
    pub writer: Writer,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Problems of what runs beside the loop.
    pub board: Arc<ProblemBoard>,
    config: AgentConfig,
    snapshot: Snapshot,
    /// Keys that changed before the engine could use them.
    pending: Dirty,
    compiled: Option<Compiled<P>>,
    waiting: Option<Waiting>,
    others: Surroundings,
    /// Rooms whose kernel side must be read again at the next cycle.
    stale: Rooms,
    /// Rooms in which something was refused.
    failed: Rooms,
    /// Chains of iptables that others may have changed.
    touched: BTreeSet<ChainName>,
    refusals: Refusals,
}

impl<P: KernelPort> Engine<P> {
    /// An engine that has seen nothing yet.
    pub fn new(config: AgentConfig, port: P, metrics: Arc<Metrics>) -> Engine<P> {
        let refusals = Refusals::new(config.node.clone());
        Engine {
            port,
            writer: Writer::new(),
            metrics,
            board: Arc::default(),
            config,
            snapshot: Snapshot::default(),
            pending: Dirty::default(),
            compiled: None,
            waiting: Some(Waiting::NotInSync("all".to_owned())),
            others: Surroundings::default(),
            stale: Rooms::ALL,
            failed: Rooms::NONE,
            touched: BTreeSet::new(),
            refusals,
        }
    }

    /// The tables as of the last cycle.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// What keeps the engine from working, if anything does.
    pub fn waiting(&self) -> Option<&Waiting> {
        self.waiting.as_ref()
    }

    /// The node's view, once it is known.
    pub fn view(&self) -> Option<&NodeView> {
        self.compiled.as_ref().map(|compiled| &compiled.view)
    }

    /// MTU of pods in bytes, once it is known.
    pub fn pod_mtu(&self) -> Option<u32> {
        let view = self.view()?;
        Some(view.pod_mtu(wiring::underlay_has_ipv6(&self.snapshot, &view.node)))
    }

    /// What is not ours on this node, as of the last reading.
    pub fn surroundings(&self) -> &Surroundings {
        &self.others
    }

    /// The netlink room's program.
    pub fn netlink_program(&self) -> Option<&netlink::Program> {
        self.compiled.as_ref().map(|compiled| &compiled.wanted)
    }

    /// The nftables room's program.
    pub fn nftables_program(&self) -> Option<&nftables::Program> {
        self.compiled.as_ref().map(|compiled| compiled.nftables.program())
    }

    /// The text of a room that serves Services in a mode other than nftables.
    pub fn render_room(&self, name: &str) -> Option<String> {
        let compiled = self.compiled.as_ref()?;
        compiled.rooms.iter().find(|room| room.is_used() && room.name() == name).map(|room| room.render())
    }

    /// The programs that serve Services.
    pub fn services_programs(&self) -> ServicesPrograms<'_> {
        match (self.room_program(), self.room_program(), self.room_program()) {
            (Some(chains), Some(sets), Some(servers)) => {
                ServicesPrograms::Ipvs(ipvs_mode::Programs { chains, sets, servers })
            }
            (Some(chains), ..) => ServicesPrograms::Iptables(chains),
            _ => ServicesPrograms::Nftables,
        }
    }

    /// The program of a room that the mode uses.
    fn room_program<T: 'static>(&self) -> Option<&T> {
        let rooms = self.compiled.iter().flat_map(|compiled| &compiled.rooms);
        rooms.filter(|room| room.is_used()).find_map(|room| room.program().downcast_ref())
    }

    /// The frontends of Services.
    pub fn services(&self) -> Option<&portolan_intent::services::ServicesIntent> {
        self.compiled.as_ref().map(|compiled| compiled.services.intent())
    }

    /// What load balancers may ask this node, by Service.
    pub fn health_checks(&self) -> Option<&OrdMap<ObjectKey, HealthCheck>> {
        self.compiled.as_ref().map(|compiled| compiled.services.health_checks())
    }

    /// What has no effect, and why: objects, claims, other nodes.
    pub fn problems(&self) -> Vec<Problem> {
        let further = self
            .compiled
            .iter()
            .flat_map(|compiled| compiled.problems.iter().cloned().chain(compiled.services.problems()));
        crate::table::gather(&self.snapshot, further.chain(self.refusals.problems().cloned()).chain(self.board.all()))
    }

    /// The hardware addresses that other nodes must know for the VXLAN fabric, by family.
    pub fn vtep_macs(&self) -> Option<[MacAddress; 2]> {
        let view = self.view().filter(|view| view.encapsulation() == Some(Encapsulation::Vxlan))?;
        let mac = |family| netlink::fabric::vtep_mac(&view.node, view.fabric_settings.vxlan.vni, family);
        Some([mac(Family::V4), mac(Family::V6)])
    }

    /// What the Node object should say of this node's end of the fabric; `None` while it says so, or
    /// while there is nothing to say.
    pub fn announcement(&self) -> Option<NodeTunnel> {
        let view = self.view()?;
        let node = self.snapshot.nodes.get(&view.node)?;
        let [mac_v4, mac_v6] = self.vtep_macs().map_or([None, None], |macs| macs.map(Some));
        let has = |family| node.pod_prefix(family).is_some();
        let wanted = NodeTunnel {
            backend: view.fabric.name().into(),
            public_addresses: Family::ALL
                .into_iter()
                .filter(|family| has(*family))
                .filter_map(|family| node.address(family))
                .collect(),
            vni: self.vtep_macs().map(|_| view.fabric_settings.vxlan.vni),
            vtep_mac_v4: mac_v4.filter(|_| has(Family::V4)),
            vtep_mac_v6: mac_v6.filter(|_| has(Family::V6)),
        };
        (node.tunnel.as_ref() != Some(&wanted)).then_some(wanted)
    }

    /// How many objects and parts of objects have no effect.
    pub fn problem_count(&self) -> usize {
        let further = self.compiled.as_ref().map_or(0, |compiled| compiled.problems.len());
        self.snapshot.problems.len() + further + self.refusals.count() + self.board.count()
    }

    /// The kernel may differ from what is believed: read all that is quickly read at the next cycle.
    pub fn request_resync(&mut self) {
        self.stale = Rooms { services: self.stale.services, ..Rooms::ALL };
    }

    /// The same, and what takes long.
    pub fn request_full_resync(&mut self) {
        self.stale = Rooms::ALL;
    }

    /// What is known of one pod's interface is in doubt: read links at the next cycle.
    pub fn distrust_pods(&mut self) {
        self.stale.netlink = true;
    }

    /// It is time to try again what was refused: read that part of the kernel at the next cycle.
    pub fn retry(&mut self) {
        self.stale.netlink |= self.failed.netlink;
        self.stale.nftables |= self.failed.nftables;
        self.stale.services |= self.failed.services;
    }

    /// Whether something waits for [`Engine::retry`].
    pub fn wants_retry(&self) -> bool {
        self.failed != Rooms::NONE || matches!(self.waiting, Some(Waiting::Kernel(_)))
    }

    /// Whether something was refused, since the last call, that was not refused before.
    pub fn take_news(&mut self) -> bool {
        self.refusals.take_news()
    }

    /// Others changed the kernel: read that part of it at the next cycle. Whoever hears of changes
    /// gathers them for a moment first, so that a busy neighbour does not make every cycle read the kernel.
    pub fn noticed(&mut self, event: &Event) {
        match event {
            Event::Ruleset => {
                self.stale.nftables = true;
                self.look_after_services();
            }
            Event::Rules(chain) => drop(self.touched.insert(chain.clone())),
            Event::Link(_) | Event::Address | Event::Route | Event::Neighbour => self.stale.netlink = true,
            Event::Overrun => {
                self.request_resync();
                self.look_after_services();
            }
        }
    }

    /// Whether others took away what serves Services: a cheap look, for what the kernel does not tell of, and
    /// for what it tells of without saying what it was.
    pub fn look_after_services(&mut self) {
        let Some(compiled) = &self.compiled else { return };
        let mut used = compiled.rooms.iter().filter(|room| room.is_used());
        self.stale.services |= !used.all(|room| room.is_intact(&mut self.port));
    }

    /// Lets go of what has ended by now.
    pub fn settle(&mut self) {
        let Some(compiled) = &mut self.compiled else { return };
        let mut outcome = Outcome::default();
        let settled: Vec<_> = compiled.rooms.iter_mut().filter_map(|room| room.settle(&mut self.port).ok()).collect();
        settled.into_iter().for_each(|steps| self.record(steps, &mut outcome));
    }

    /// Brings the kernel up to the tables.
    pub fn cycle(&mut self) -> Outcome {
        let (snapshot, dirty) = self.writer.take();
        self.snapshot = snapshot;
        merge(&mut self.pending, dirty);
        let touched = std::mem::take(&mut self.touched);
        match self.run() {
            Ok(mut outcome) => {
                self.mend(touched, &mut outcome);
                self.waiting = None;
                self.metrics.set_in_sync();
                outcome
            }
            Err(waiting) => {
                if self.waiting.as_ref() != Some(&waiting) {
                    tracing::info!(reason = %waiting, "waiting");
                }
                self.waiting = Some(waiting);
                self.touched = touched;
                Outcome::default()
            }
        }
    }

    /// Puts back what others changed of single chains, once everything else is as it must be. Where the kernel refused
    /// something a chain is not what it should be, and that is tried again at its own time.
    fn mend(&mut self, chains: BTreeSet<ChainName>, outcome: &mut Outcome) {
        let is_wanted = !chains.is_empty() && !self.failed.services;
        let Some(compiled) = self.compiled.as_mut().filter(|_| is_wanted) else { return };
        let used = compiled.rooms.iter_mut().filter(|room| room.is_used());
        let taken: Result<Vec<Steps>, KernelError> = used.map(|room| room.mend(&mut self.port, &chains)).collect();
        match taken {
            Ok(taken) => taken.into_iter().for_each(|steps| self.record(steps, outcome)),
            // Read while they changed: at the next cycle.
            Err(_) => self.touched = chains,
        }
    }

    fn run(&mut self) -> Result<Outcome, Waiting> {
        self.check_in_sync()?;
        let node = self.own_node()?;
        if self.stale != Rooms::NONE {
            return self.resync(&node);
        }
        let dirty = std::mem::take(&mut self.pending);
        // The node's own entry decides the view; so a change of it starts from what the kernel holds.
        if self.compiled.is_none() || dirty.nodes.contains(&self.config.node) {
            merge(&mut self.pending, dirty);
            return self.resync(&node);
        }
        Ok(self.follow(&dirty))
    }

    fn check_in_sync(&self) -> Result<(), Waiting> {
        let missing: Vec<String> =
            NEEDED.iter().filter(|table| !self.snapshot.in_sync.contains(*table)).map(ToString::to_string).collect();
        if missing.is_empty() { Ok(()) } else { Err(Waiting::NotInSync(missing.join(", "))) }
    }

    fn own_node(&self) -> Result<Arc<Node>, Waiting> {
        let name = &self.config.node;
        let node = self.snapshot.nodes.get(name).ok_or_else(|| Waiting::NoNode(name.to_string()))?;
        if node.pod_prefixes.is_empty() {
            return Err(Waiting::NoPodPrefix(name.to_string()));
        }
        Ok(node.clone())
    }

    /// Applies what changed, by what the kernel is believed to hold.
    fn follow(&mut self, dirty: &Dirty) -> Outcome {
        let mut outcome = Outcome { ran: true, ..Outcome::default() };
        let Some(compiled) = &mut self.compiled else { return outcome };
        self.refusals.forget_attachments(&dirty.attachments);
        let changes = if !dirty.nodes.is_empty() {
            let held = compiled.compile_netlink(&self.snapshot);
            netlink::diff(&compiled.wanted, &held, &self.others)
        } else if !dirty.attachments.is_empty() {
            compiled.compile_pods(&self.snapshot, dirty)
        } else {
            Vec::new()
        };
        self.apply_netlink(&changes, &mut outcome);
        let Some(compiled) = &mut self.compiled else { return outcome };
        if !dirty.services.is_empty() {
            let updates = compiled.services.update(&self.snapshot, dirty);
            compiled.facts.health_ports = health_ports(&compiled.services);
            let mut steps = Vec::new();
            for room in compiled.rooms.iter_mut().filter(|room| room.is_used()) {
                steps.push(room.follow(&mut self.port, &updates, &compiled.facts));
            }
            let changes = match compiled.mode {
                ServicesMode::Nftables => compiled.nftables.update_services(&updates),
                _ => Vec::new(),
            };
            steps.into_iter().for_each(|steps| self.record(steps, &mut outcome));
            self.apply_nftables(&changes, &mut outcome);
        }
        outcome
    }

    /// Reads what is stale of the kernel, compiles, and applies the difference.
    fn resync(&mut self, node: &Node) -> Result<Outcome, Waiting> {
        self.metrics.resync();
        let unreadable = |error: KernelError| Waiting::Kernel(error.to_string());
        let observed = self.port.observe_netlink().map_err(unreadable)?;
        self.others = observed.others;
        let view = view(&self.config, node, &self.others)?;
        let is_known = self.compiled.as_mut().is_some_and(|compiled| compiled.take_view(&view));
        let tables = if is_known && !self.stale.nftables {
            None
        } else {
            Some(self.port.observe_nftables().map_err(unreadable)?)
        };
        let mut dirty = std::mem::take(&mut self.pending);
        if !is_known {
            self.compiled = Some(Compiled::new(view, &self.config, &mut self.port));
            dirty = Dirty::everything(&self.snapshot);
        }
        let mut outcome = Outcome { ran: true, ..Outcome::default() };
        let is_tables_read = tables.is_some();
        let Some(compiled) = &mut self.compiled else { return Ok(outcome) };
        compiled.compile_netlink(&self.snapshot);
        compiled.facts.addresses = node_addresses(node, &self.others);
        compiled.facts.prefixes.clone_from(&node.pod_prefixes);
        let is_compared = self.stale.services || !is_known;
        let is_quick = self.stale.quick;
        let table_changes =
            compiled.compile_services(&self.snapshot, &dirty, is_tables_read, &mut self.port, is_compared);
        let changes = netlink::diff(&compiled.wanted, &observed.ours, &self.others);
        // What is read now is known now, and what is refused is refused anew.
        self.stale = Rooms::NONE;
        self.failed.netlink = false;
        self.failed.services &= !is_compared;
        self.refusals.forget_netlink();
        if is_tables_read {
            self.failed.nftables = false;
            self.refusals.forget_services("nftables");
        }
        // A copy of a program shares all that is large.
        let wanted = is_tables_read.then(|| compiled.nftables.program().clone());
        let (table_changes, room_steps) = table_changes;
        self.apply_netlink(&changes, &mut outcome);
        room_steps.into_iter().for_each(|steps| self.record(steps, &mut outcome));
        // What serves comes before what served goes, so that there is no moment with neither.
        let is_done = match (is_compared, is_quick) {
            (true, _) => self.compare_rooms(|room| room.is_used(), &mut outcome),
            (false, true) => self.compare_rooms(|room| room.is_used() && !room.is_costly(), &mut outcome),
            (false, false) => true,
        };
        if !is_done {
            self.stale.nftables |= is_tables_read;
            return Ok(outcome);
        }
        match (wanted, tables) {
            (Some(wanted), Some(observed)) => self.apply_difference(&wanted, &observed, &mut outcome),
            _ => self.apply_nftables(&table_changes, &mut outcome),
        }
        let may_leave = self.compiled.as_ref().is_some_and(|compiled| !compiled.is_alone) && !self.failed.nftables;
        if may_leave {
            let is_alone = self.compare_rooms(|room| !room.is_used(), &mut outcome);
            if let Some(compiled) = &mut self.compiled {
                compiled.is_alone = is_alone;
            }
        }
        Ok(outcome)
    }

    /// Compares some of the rooms with the kernel. Returns whether everything is as it must be.
    fn compare_rooms(&mut self, which: impl Fn(&dyn KeptRoom<P>) -> bool, outcome: &mut Outcome) -> bool {
        let Some(compiled) = &mut self.compiled else { return false };
        let mut is_done = true;
        let mut steps = Vec::new();
        for room in compiled.rooms.iter_mut().filter(|room| which(&***room)) {
            self.refusals.forget_services(room.name());
            match room.compare(&mut self.port) {
                Ok(taken) => steps.push(taken),
                Err(error) => {
                    is_done = false;
                    self.failed.services = true;
                    let what =
                        if room.is_used() { "read what serves Services" } else { "look for what other modes left" };
                    self.refusals.services(room.name(), what, &error);
                    outcome.failures.push(format!("{}: {error}", room.name()));
                }
            }
        }
        for steps in steps {
            is_done &= steps.failed.is_empty() && !steps.pending;
            self.record(steps, outcome);
        }
        is_done
    }

    /// Counts what a room did, and keeps what was refused.
    fn record(&mut self, steps: Steps, outcome: &mut Outcome) {
        if steps.changes == 0 {
            return;
        }
        outcome.changes += steps.changes;
        outcome.messages += steps.messages;
        self.metrics.applied(steps.room, steps.changes, steps.failed.len(), steps.messages);
        for count in steps.rules {
            self.metrics.proxy.set_iptables_rules(count.table, count.total, count.written);
        }
        for (change, error) in steps.failed {
            self.refusals.services(steps.room, &change, &error);
            outcome.failures.push(format!("{change}: {error}"));
            self.failed.services = true;
        }
    }

    fn apply_netlink(&mut self, changes: &[netlink::Change], outcome: &mut Outcome) {
        if changes.is_empty() {
            return;
        }
        outcome.changes += changes.len();
        let applied = self.port.apply_netlink(changes);
        outcome.messages += applied.messages;
        self.metrics.applied("netlink", changes.len(), applied.failed.len(), applied.messages);
        for (change, error) in applied.failed {
            outcome.failures.push(format!("{change}: {error}"));
            self.failed.netlink |= self.refusals.netlink(&change, &error);
            if let Some(pod) = refusals::pod_of(&change) {
                outcome.failed_pods.insert(pod.key.clone(), error);
            }
        }
    }

    /// Applies what differs, a part at a time where it is a whole cluster's. Changes that fit one part are
    /// applied together, so that they are one transaction.
    fn apply_difference(&mut self, wanted: &nftables::Program, observed: &nftables::Program, outcome: &mut Outcome) {
        let mut part = Vec::with_capacity(CHANGES_PER_STEP);
        nftables::diff_each(wanted, observed, |change| {
            part.push(change);
            if part.len() == CHANGES_PER_STEP {
                self.apply_nftables(&part, outcome);
                part.clear();
            }
        });
        self.apply_nftables(&part, outcome);
    }

    fn apply_nftables(&mut self, changes: &[nftables::Change], outcome: &mut Outcome) {
        if changes.is_empty() {
            return;
        }
        outcome.changes += changes.len();
        let applied = self.port.apply_nftables(changes);
        outcome.messages += applied.messages;
        self.metrics.applied("nftables", changes.len(), applied.failed.len(), applied.messages);
        for (change, error) in applied.failed {
            let text = nftables::render_changes(&[change]);
            self.refusals.services("nftables", &text, &error);
            outcome.failures.push(format!("{}: {error}", text.trim_end()));
            self.failed.nftables = true;
        }
    }

    /// Removes one pod's interface and nothing else, also while the engine waits: what DEL says of it is
    /// all that must be known. An interface that is not there, or not ours, is none.
    pub fn remove_pod(&mut self, key: &AttachmentKey) -> Result<(), KernelError> {
        let observed = self.port.observe_netlink()?;
        if let Some(pod) = observed.ours.pods.get(key) {
            let applied = self.port.apply_netlink(&[netlink::Change::RemovePod(pod.clone())]);
            if let Some((_, error)) = applied.failed.into_iter().next() {
                return Err(error);
            }
        }
        if let Some(compiled) = &mut self.compiled {
            compiled.wanted.pods.remove(key);
        }
        Ok(())
    }

    /// What would change in the kernel now, as the text of each room.
    pub fn plan(&mut self) -> Result<String, KernelError> {
        let observed = self.port.observe_netlink()?;
        let tables = self.port.observe_nftables()?;
        let Some(compiled) = &self.compiled else { return Ok(String::new()) };
        let mut text = String::new();
        for change in netlink::diff(&compiled.wanted, &observed.ours, &observed.others) {
            text.push_str(&change.to_string());
            text.push('\n');
        }
        let changes = nftables::diff(compiled.nftables.program(), &tables);
        text.push_str(&nftables::render_changes(&changes));
        for room in &compiled.rooms {
            text.push_str(&room.plan(&mut self.port)?);
        }
        Ok(text)
    }

    /// Applies one change of the tables: for the CNI verbs, which then run a cycle.
    pub fn write(&mut self, change: Change) {
        self.writer.apply(change);
    }

    /// Applies many changes of the tables.
    pub fn write_all(&mut self, changes: Vec<Change>) {
        for change in changes {
            self.writer.apply(change);
        }
    }

    /// This node's pod prefixes, for the book of attachments.
    pub fn pod_prefixes(&self) -> Vec<IpNet> {
        self.snapshot.nodes.get(&self.config.node).map(|node| node.pod_prefixes.clone()).unwrap_or_default()
    }
}

fn merge(into: &mut Dirty, from: Dirty) {
    into.namespaces.extend(from.namespaces);
    into.nodes.extend(from.nodes);
    into.services.extend(from.services);
    into.pods.extend(from.pods);
    into.attachments.extend(from.attachments);
}
