//! The rooms that serve Services in a mode other than nftables, as the engine keeps them.
//!
//! Every room is handled alike: it follows frontends that changed, and is compared as a whole with what the
//! kernel holds when that is in doubt. A room that the mode has no use for is kept too, with nothing wanted:
//! so what another mode, or a real kube-proxy, left on the node goes away, and only after what replaces it is
//! there.

use std::any::Any;
use std::collections::BTreeSet;
use std::net::IpAddr;

use portolan_intent::services::FrontendUpdate;
use portolan_kernel::KernelError;
use portolan_kernel::monitor::ChainName;
use portolan_net::{IpNet, Port};

use super::compiled::FRONTENDS_PER_STEP;
use super::port::Applied;

/// A program's compiler, and how its programs are compared and shown.
pub trait Room {
    /// The room's name.
    const NAME: &'static str;
    /// Whether reading the kernel's side takes so long that it is done only where there is cause.
    const IS_COSTLY: bool = false;
    /// What the kernel must hold.
    type Program: 'static;
    /// One step.
    type Change;

    /// What the kernel must hold now.
    fn program(&self) -> &Self::Program;
    /// Follows frontends; returns the steps in their order.
    fn update_services(&mut self, updates: &[FrontendUpdate]) -> Vec<Self::Change>;
    /// Follows the node's own circumstances.
    fn set_node(&mut self, node: &NodeFacts) -> Vec<Self::Change>;
    /// The steps from what is observed to what is wanted.
    fn diff(observed: &Self::Program, wanted: &Self::Program) -> Vec<Self::Change>;
    /// The steps as the room's own text.
    fn render_changes(changes: &[Self::Change]) -> String;
    /// The program as the room's own text.
    fn render(program: &Self::Program) -> String;
    /// How many rules of iptables there are, and how many of them these steps write.
    fn count_rules(_program: &Self::Program, _changes: &[Self::Change]) -> Vec<RuleCount> {
        Vec::new()
    }
    /// Takes over from what is observed what must end gently, before the two are compared.
    fn adopt(&mut self, _observed: &Self::Program) {}
}

/// The kernel's side of a room.
pub trait RoomPort<R: Room> {
    /// What the kernel holds.
    fn observe(&mut self) -> Result<R::Program, KernelError>;
    /// The same, in less memory where it is what is wanted.
    fn observe_beside(&mut self, _wanted: &R::Program) -> Result<R::Program, KernelError> {
        self.observe()
    }
    /// Makes changes; one that fails does not stop unrelated ones.
    fn apply(&mut self, changes: &[R::Change]) -> Applied<R::Change>;
    /// Whether what is always there is there, by a cheap look.
    fn is_intact(&mut self) -> bool {
        true
    }
    /// The steps that put back what others changed of these chains, where this room has chains.
    fn mend(&mut self, _room: &R, _chains: &BTreeSet<ChainName>) -> Result<Vec<R::Change>, KernelError> {
        Ok(Vec::new())
    }
    /// Lets go of what has ended by now.
    fn settle(&mut self, _room: &mut R) -> Result<Vec<R::Change>, KernelError> {
        Ok(Vec::new())
    }
    /// What must stay for a while although nothing of the room is wanted: connections go through it.
    fn spare(&mut self, _observed: &R::Program) -> Result<R::Program, KernelError>
    where
        R::Program: Default,
    {
        Ok(R::Program::default())
    }
}

/// What rooms must know of the node beside Services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its addresses; the first of each family is the primary.
    pub addresses: Vec<IpAddr>,
    /// Its pod prefixes.
    pub prefixes: Vec<IpNet>,
    /// The ports at which load balancers ask for its health.
    pub health_ports: BTreeSet<Port>,
}

/// The rules of one table of iptables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleCount {
    /// The table.
    pub table: &'static str,
    /// How many of ours it holds.
    pub total: usize,
    /// How many of them were written now.
    pub written: usize,
}

/// What became of steps.
#[derive(Debug, Default)]
pub struct Steps {
    /// The room.
    pub room: &'static str,
    /// How many there were.
    pub changes: usize,
    /// Messages, or lines, that they took.
    pub messages: usize,
    /// What was refused: the step as text, and why.
    pub failed: Vec<(String, KernelError)>,
    /// Whether something stays for a while, and must be looked at again.
    pub pending: bool,
    /// The rules of iptables, where that is the room.
    pub rules: Vec<RuleCount>,
}

/// A room with its kernel side, whatever its types.
pub trait KeptRoom<P> {
    /// The room's name.
    fn name(&self) -> &'static str;
    /// Follows frontends that changed, and the node.
    fn follow(&mut self, port: &mut P, updates: &[FrontendUpdate], node: &NodeFacts) -> Steps;
    /// Follows in memory only: the kernel is compared afterwards.
    fn learn(&mut self, updates: &[FrontendUpdate], node: &NodeFacts);
    /// Reads the kernel and mends what differs.
    fn compare(&mut self, port: &mut P) -> Result<Steps, KernelError>;
    /// What [`KeptRoom::compare`] would do, as text.
    fn plan(&self, port: &mut P) -> Result<String, KernelError>;
    /// What the kernel must hold, as text.
    fn render(&self) -> String;
    /// What the kernel must hold, for whoever knows the room's type.
    fn program(&self) -> &dyn Any;
    /// Whether reading the kernel's side takes so long that it is done only where there is cause.
    fn is_costly(&self) -> bool;
    /// Whether the mode uses it; if not, all that is found of it goes.
    fn is_used(&self) -> bool;
    /// Lets go of what has ended by now.
    fn settle(&mut self, port: &mut P) -> Result<Steps, KernelError>;
    /// Puts back what others changed of these chains.
    fn mend(&mut self, port: &mut P, chains: &BTreeSet<ChainName>) -> Result<Steps, KernelError>;
    /// A cheap look at whether others have taken all of it away. What they changed in part is found by
    /// [`KeptRoom::mend`] or [`KeptRoom::compare`].
    fn is_intact(&self, port: &mut P) -> bool;
}

/// A room that is in use.
#[derive(Debug)]
pub struct Kept<R> {
    room: R,
    node: NodeFacts,
}

impl<R: Room> Kept<R> {
    /// A room that has seen nothing yet.
    pub fn new(room: R) -> Kept<R> {
        Kept { room, node: NodeFacts::default() }
    }

    fn changes(&mut self, updates: &[FrontendUpdate], node: &NodeFacts) -> Vec<R::Change> {
        let mut changes = Vec::new();
        if self.node != *node {
            self.node = node.clone();
            changes = self.room.set_node(node);
        }
        changes.extend(self.room.update_services(updates));
        changes
    }
}

impl<R: Room, P: RoomPort<R>> KeptRoom<P> for Kept<R> {
    fn name(&self) -> &'static str {
        R::NAME
    }

    fn follow(&mut self, port: &mut P, updates: &[FrontendUpdate], node: &NodeFacts) -> Steps {
        let changes = self.changes(updates, node);
        apply::<R, P>(port, self.room.program(), &changes)
    }

    fn learn(&mut self, updates: &[FrontendUpdate], node: &NodeFacts) {
        self.changes(&[], node);
        // What a whole cluster would change is more than need be in memory.
        for part in updates.chunks(FRONTENDS_PER_STEP) {
            self.room.update_services(part);
        }
    }

    fn compare(&mut self, port: &mut P) -> Result<Steps, KernelError> {
        let observed = port.observe_beside(self.room.program())?;
        self.room.adopt(&observed);
        let wanted = self.room.program();
        Ok(apply::<R, P>(port, wanted, &R::diff(&observed, wanted)))
    }

    fn plan(&self, port: &mut P) -> Result<String, KernelError> {
        Ok(R::render_changes(&R::diff(&port.observe_beside(self.room.program())?, self.room.program())))
    }

    fn render(&self) -> String {
        R::render(self.room.program())
    }

    fn program(&self) -> &dyn Any {
        self.room.program()
    }

    fn settle(&mut self, port: &mut P) -> Result<Steps, KernelError> {
        let changes = port.settle(&mut self.room)?;
        Ok(apply::<R, P>(port, self.room.program(), &changes))
    }

    fn mend(&mut self, port: &mut P, chains: &BTreeSet<ChainName>) -> Result<Steps, KernelError> {
        let changes = port.mend(&self.room, chains)?;
        Ok(apply::<R, P>(port, self.room.program(), &changes))
    }

    fn is_costly(&self) -> bool {
        R::IS_COSTLY
    }

    fn is_used(&self) -> bool {
        true
    }

    fn is_intact(&self, port: &mut P) -> bool {
        port.is_intact()
    }
}

/// A room that another mode uses, or used: nothing of it is wanted.
#[derive(Debug)]
pub struct Unused<R: Room> {
    nothing: R::Program,
}

impl<R: Room> Default for Unused<R>
where
    R::Program: Default,
{
    fn default() -> Unused<R> {
        Unused { nothing: R::Program::default() }
    }
}

impl<R: Room> Unused<R>
where
    R::Program: Default + PartialEq,
{
    /// The steps that take away what is found, and whether something of it stays for a while.
    fn leftovers<P: RoomPort<R>>(&self, port: &mut P) -> Result<(Vec<R::Change>, bool), KernelError> {
        let observed = port.observe()?;
        let spared = port.spare(&observed)?;
        Ok((R::diff(&observed, &spared), spared != self.nothing))
    }
}

impl<R: Room, P: RoomPort<R>> KeptRoom<P> for Unused<R>
where
    R::Program: Default + PartialEq,
{
    fn name(&self) -> &'static str {
        R::NAME
    }

    fn follow(&mut self, _: &mut P, _: &[FrontendUpdate], _: &NodeFacts) -> Steps {
        Steps { room: R::NAME, ..Steps::default() }
    }

    fn learn(&mut self, _: &[FrontendUpdate], _: &NodeFacts) {}

    fn compare(&mut self, port: &mut P) -> Result<Steps, KernelError> {
        let (changes, pending) = self.leftovers(port)?;
        Ok(Steps { pending, ..apply::<R, P>(port, &R::Program::default(), &changes) })
    }

    fn plan(&self, port: &mut P) -> Result<String, KernelError> {
        let (changes, _) = self.leftovers(port)?;
        Ok(R::render_changes(&changes))
    }

    fn render(&self) -> String {
        String::new()
    }

    fn program(&self) -> &dyn Any {
        &self.nothing
    }

    fn settle(&mut self, _: &mut P) -> Result<Steps, KernelError> {
        Ok(Steps { room: R::NAME, ..Steps::default() })
    }

    fn mend(&mut self, _: &mut P, _: &BTreeSet<ChainName>) -> Result<Steps, KernelError> {
        Ok(Steps { room: R::NAME, ..Steps::default() })
    }

    fn is_costly(&self) -> bool {
        R::IS_COSTLY
    }

    fn is_used(&self) -> bool {
        false
    }

    fn is_intact(&self, _: &mut P) -> bool {
        true
    }
}

/// Makes changes that lead to a program.
fn apply<R: Room, P: RoomPort<R>>(port: &mut P, program: &R::Program, changes: &[R::Change]) -> Steps {
    if changes.is_empty() {
        return Steps { room: R::NAME, ..Steps::default() };
    }
    let applied = port.apply(changes);
    let text = |change: &R::Change| R::render_changes(std::slice::from_ref(change)).trim_end().to_owned();
    Steps {
        room: R::NAME,
        changes: changes.len(),
        messages: applied.messages,
        failed: applied.failed.iter().map(|(change, error)| (text(change), error.clone())).collect(),
        pending: false,
        rules: R::count_rules(program, changes),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use portolan_net::Protocol;
    use portolan_program::ipvs::{
        self, Change, Compiler, Forwarding, Program, RealKey, RealServer, Scheduler, ServerKey, SourceHash,
        VirtualServer,
    };

    use super::*;

    /// A kernel with what another mode left there, where one real server has connections.
    struct Leftovers {
        observed: Program,
        busy: RealKey,
        applied: Vec<Change>,
    }

    impl RoomPort<Compiler> for Leftovers {
        fn observe(&mut self) -> Result<Program, KernelError> {
            Ok(self.observed.clone())
        }

        fn apply(&mut self, changes: &[Change]) -> Applied<Change> {
            self.applied.extend(changes.iter().cloned());
            Applied { failed: Vec::new(), messages: changes.len() }
        }

        fn spare(&mut self, observed: &Program) -> Result<Program, KernelError> {
            let mut spared = observed.clone();
            for (key, server) in &observed.servers {
                let busy = server.real.iter().filter(|real| real.key == self.busy);
                let real = busy.map(|real| RealServer { weight: 0, ..real.clone() }).collect();
                spared.servers.insert(*key, Arc::new(VirtualServer { real, ..(**server).clone() }));
            }
            Ok(spared)
        }
    }

    fn real(last: u8) -> RealServer {
        RealServer {
            key: RealKey { address: IpAddr::from([10, 42, 0, last]), port: Port::try_from(8080).unwrap() },
            weight: 1,
            forwarding: Forwarding::Masquerade,
            origin: None,
        }
    }

    fn leftovers() -> Leftovers {
        let address = IpAddr::from([10, 96, 0, 10]);
        let key = ServerKey { protocol: Protocol::Tcp, address, port: Port::try_from(80).unwrap() };
        let server = VirtualServer {
            scheduler: Scheduler::RoundRobin,
            persistence_seconds: None,
            client_bits: 32,
            source_hash: SourceHash::default(),
            real: [real(1), real(2)].into(),
            origin: None,
        };
        let mut observed = Program { device: true, ..Program::default() };
        observed.addresses.insert(address);
        observed.servers.insert(key, Arc::new(server));
        Leftovers { observed, busy: real(2).key, applied: Vec::new() }
    }

    #[test]
    fn what_is_planned_for_leftovers_is_what_is_done_and_spares_connections() {
        let mut kernel = leftovers();
        let mut room: Box<dyn KeptRoom<Leftovers>> = Box::new(Unused::<Compiler>::default());
        let plan = room.plan(&mut kernel).unwrap();
        assert_eq!(kernel.applied, [], "a plan changes nothing");
        let steps = room.compare(&mut kernel).unwrap();
        let done: String = kernel.applied.iter().map(|change| ipvs::render_change(change) + "\n").collect();
        assert_eq!(plan, done);
        assert!(steps.pending, "what was spared is looked at again");
        assert!(plan.contains("10.42.0.1:8080"), "{plan}");
        // The virtual server and the device would take the connections with them.
        let kept = kernel.applied.iter().all(|change| !matches!(change, Change::RemoveServer(..)));
        assert!(kept && !plan.contains("kube-ipvs0"), "{plan}");
    }
}
