//! What would happen to the first packet of a connection: the oracle of tests, and the user's tracer.
//!
//! Where the kernel chooses at random, every choice is a [`Branch`]. It works on the rules of others too: what
//! has no type is passed over, and the [`Outcome`] says so.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use portolan_net::{Origin, Packet, Protocol};
use serde::{Deserialize, Serialize};

use super::render::render_rule;
use super::{
    Chain, End, Match, Name, Policy, Program, RecentAction, Rule, SetMatch, States, TableKey, TableName, Target,
};

/// The deepest nesting of jumps. The kernel refuses loops, but a program need not come from it.
const JUMPS_MAX: usize = 64;

/// How many branches are followed; more than any Service has endpoints in practice.
pub const BRANCHES_MAX: usize = 65_536;

/// What is true around a packet and not in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// The interface that it comes by; nothing where this node sends it.
    pub in_interface: Option<String>,
    /// The interface that it leaves by, where that is known.
    pub out_interface: Option<String>,
    /// The addresses of this node. Loopback addresses are always local.
    pub local_addresses: Vec<IpAddr>,
    /// The lists of recent addresses (`-m recent`) that hold the packet's source: which endpoints the client had.
    pub recent: BTreeSet<Name>,
    /// The members of sets that are asked for (`-m set`), each with the name of its set.
    pub sets: BTreeSet<(Name, Vec<SetPart>)>,
}

/// One part of a member of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum SetPart {
    /// An address.
    Address(IpAddr),
    /// All addresses of a prefix.
    Prefix(IpNet),
    /// A protocol and a port.
    Port(Protocol, u16),
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes on.
    Accept,
    /// It is lost without a word.
    Drop,
    /// Its sender is told.
    Reject,
}

/// A rule that did something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The table.
    pub table: TableKey,
    /// The chain.
    pub chain: Name,
    /// What was done.
    pub target: Target,
    /// The rule's comment.
    pub comment: Option<Name>,
    /// The object that caused the rule, where it is known.
    pub origin: Option<Origin>,
}

/// One way that the packet may go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// The packet at the end of its way through this node. Where it is masqueraded, its source is still the old one.
    pub packet: Packet,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Where it goes instead, if its destination was translated.
    pub backend: Option<SocketAddr>,
    /// Whether its source becomes the node's.
    pub masqueraded: bool,
    /// The rules that did something, in order.
    pub steps: Vec<Step>,
}

/// A rule that was passed over, since there is no type for a part of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NotUnderstood {
    /// The table.
    pub table: TableKey,
    /// The rule, as `iptables-save` prints it.
    pub rule: String,
}

/// What the kernel would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// All ways that the packet may go; there is at least one.
    pub branches: Vec<Branch>,
    /// Rules that it met and that were passed over. The outcome is only certain where there are none.
    pub not_understood: BTreeSet<NotUnderstood>,
    /// Whether there are more branches than were followed.
    pub truncated: bool,
}

impl Outcome {
    /// What becomes of the packet, if it is the same on every way.
    pub fn verdict(&self) -> Option<Verdict> {
        let first = self.branches.first()?.verdict;
        self.branches.iter().all(|branch| branch.verdict == first).then_some(first)
    }

    /// All that it may be sent to instead of its destination.
    pub fn backends(&self) -> BTreeSet<SocketAddr> {
        self.branches.iter().filter_map(|branch| branch.backend).collect()
    }

    /// Whether its source becomes the node's, if it is the same on every way.
    pub fn is_masqueraded(&self) -> Option<bool> {
        let first = self.branches.first()?.masqueraded;
        self.branches.iter().all(|branch| branch.masqueraded == first).then_some(first)
    }
}

/// A place where the kernel asks the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hook {
    chain: &'static str,
    /// In the order of their priorities (`netfilter_ipv4.h`).
    tables: &'static [TableName],
}

use TableName::{Filter, Mangle, Nat, Raw, Security};

const PREROUTING: Hook = Hook { chain: "PREROUTING", tables: &[Raw, Mangle, Nat] };
/// A packet that the node sent to itself: its translation is settled.
const PREROUTING_LOOPED: Hook = Hook { chain: "PREROUTING", tables: &[Raw, Mangle] };
const INPUT: Hook = Hook { chain: "INPUT", tables: &[Mangle, Filter, Security, Nat] };
const INPUT_LOOPED: Hook = Hook { chain: "INPUT", tables: &[Mangle, Filter, Security] };
const FORWARD: Hook = Hook { chain: "FORWARD", tables: &[Mangle, Filter, Security] };
const OUTPUT: Hook = Hook { chain: "OUTPUT", tables: &[Raw, Mangle, Nat, Filter, Security] };
const POSTROUTING: Hook = Hook { chain: "POSTROUTING", tables: &[Mangle, Nat] };

/// What becomes of the first packet of a connection, from where it enters this node to where it leaves it or is
/// delivered. It is assumed that there is a route to every destination.
pub fn interpret(program: &Program, packet: &Packet, environment: &Environment) -> Outcome {
    let branch =
        Branch { packet: *packet, verdict: Verdict::Accept, backend: None, masqueraded: false, steps: Vec::new() };
    let mut run = Run { program, environment, not_understood: BTreeSet::new(), truncated: false, looped: false };
    let arrives = environment.in_interface.is_some();
    let branches = run.hook(if arrives { PREROUTING } else { OUTPUT }, vec![branch]);
    // The routing decision.
    let (local, remote): (Vec<_>, Vec<_>) =
        branches.into_iter().partition(|branch| is_local(environment, branch.packet.destination));
    let mut branches = if arrives {
        let mut delivered = run.hook(INPUT, local);
        let forwarded = run.hook(FORWARD, remote);
        delivered.extend(run.hook(POSTROUTING, forwarded));
        delivered
    } else {
        let mut sent = run.hook(POSTROUTING, remote);
        let looped = run.hook(POSTROUTING, local);
        run.looped = true;
        let looped = run.hook(PREROUTING_LOOPED, looped);
        sent.extend(run.hook(INPUT_LOOPED, looped));
        sent
    };
    run.truncated |= branches.len() > BRANCHES_MAX;
    branches.truncate(BRANCHES_MAX);
    Outcome { branches, not_understood: run.not_understood, truncated: run.truncated }
}

fn is_local(environment: &Environment, address: IpAddr) -> bool {
    address.is_loopback() || environment.local_addresses.contains(&address)
}

struct Run<'a> {
    program: &'a Program,
    environment: &'a Environment,
    not_understood: BTreeSet<NotUnderstood>,
    truncated: bool,
    /// Whether the node sent the packet to itself, and it comes in by `lo`.
    looped: bool,
}

/// How a packet leaves a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// To the rule behind the jump.
    Back,
    /// Nowhere else in this table.
    End,
}

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    Yes,
    No,
    /// As chance has it.
    Maybe,
    NotUnderstood,
}

impl From<bool> for Holds {
    fn from(holds: bool) -> Holds {
        if holds { Holds::Yes } else { Holds::No }
    }
}

/// Where a packet is.
#[derive(Clone, Copy)]
struct Place<'a> {
    hook: Hook,
    table: TableKey,
    chain: &'a str,
}

impl Run<'_> {
    /// Takes packets through all tables of a hook. Those that are lost stay as they are.
    fn hook(&mut self, hook: Hook, branches: Vec<Branch>) -> Vec<Branch> {
        let mut branches = branches;
        for name in hook.tables.iter().copied() {
            let mut next = Vec::with_capacity(branches.len());
            for branch in branches {
                let table = TableKey { family: branch.packet.family(), name };
                // The kernel asks the table only once for each direction of translation.
                let is_settled =
                    name == Nat && if is_source(hook) { branch.masqueraded } else { branch.backend.is_some() };
                match self.program.chain(table, hook.chain) {
                    Some(chain) if branch.verdict == Verdict::Accept && !is_settled => {
                        let place = Place { hook, table, chain: hook.chain };
                        for (mut branch, flow) in self.chain(place, chain, branch, 0) {
                            if flow == Flow::Back && chain.policy == Some(Policy::Drop) {
                                branch.verdict = Verdict::Drop;
                            }
                            next.push(branch);
                        }
                    }
                    _ => next.push(branch),
                }
            }
            branches = next;
        }
        branches
    }

    fn chain(&mut self, place: Place<'_>, chain: &Chain, branch: Branch, depth: usize) -> Vec<(Branch, Flow)> {
        let mut left = Vec::new();
        let mut here = vec![branch];
        for rule in chain.rules.list().iter() {
            if here.is_empty() {
                break;
            }
            let mut next = Vec::with_capacity(here.len());
            for branch in here {
                match self.rule_holds(place, rule, &branch) {
                    Holds::No | Holds::NotUnderstood => next.push(branch),
                    Holds::Yes => self.act(place, rule, branch, depth, &mut next, &mut left),
                    Holds::Maybe => {
                        if left.len() + next.len() < BRANCHES_MAX {
                            next.push(branch.clone());
                        } else {
                            self.truncated = true;
                        }
                        self.act(place, rule, branch, depth, &mut next, &mut left);
                    }
                }
            }
            here = next;
        }
        left.extend(here.into_iter().map(|branch| (branch, Flow::Back)));
        left
    }

    /// Does what a rule does. What goes on with the next rule is added to `next`, what leaves the chain to `left`.
    fn act(
        &mut self,
        place: Place<'_>,
        rule: &Rule,
        mut branch: Branch,
        depth: usize,
        next: &mut Vec<Branch>,
        left: &mut Vec<(Branch, Flow)>,
    ) {
        let Some(target) = &rule.target else {
            next.push(branch);
            return;
        };
        branch.steps.push(Step {
            table: place.table,
            chain: place.chain.into(),
            target: target.clone(),
            comment: rule.comment().cloned(),
            origin: rule.origin.clone(),
        });
        match target {
            Target::Jump(name) | Target::Goto(name) => {
                let Some(chain) = self.program.chain(place.table, &name.text()).filter(|_| depth < JUMPS_MAX) else {
                    self.pass_over(place, rule);
                    next.push(branch);
                    return;
                };
                let outcomes = self.chain(Place { chain: &name.text(), ..place }, chain, branch, depth + 1);
                let comes_back = matches!(target, Target::Jump(_));
                for (branch, flow) in outcomes {
                    if flow == Flow::Back && comes_back {
                        next.push(branch);
                    } else {
                        left.push((branch, flow));
                    }
                }
            }
            Target::Return => left.push((branch, Flow::Back)),
            Target::Mark { value, mask } => {
                branch.packet.mark = branch.packet.mark & !mask ^ value;
                next.push(branch);
            }
            Target::Accept => left.push((branch, Flow::End)),
            Target::Drop => {
                branch.verdict = Verdict::Drop;
                left.push((branch, Flow::End));
            }
            Target::Reject(_) => {
                branch.verdict = Verdict::Reject;
                left.push((branch, Flow::End));
            }
            Target::Masquerade { .. } => {
                branch.masqueraded = true;
                left.push((branch, Flow::End));
            }
            Target::Dnat { address, port } => {
                let port = port.map_or(branch.packet.destination_port, portolan_net::Port::get);
                branch.packet.destination = *address;
                branch.packet.destination_port = port;
                branch.backend = Some(SocketAddr::new(*address, port));
                left.push((branch, Flow::End));
            }
            Target::Other(text) => self.act_otherwise(place, rule, text, branch, next, left),
        }
    }

    /// What has no type, and yet a known end.
    fn act_otherwise(
        &mut self,
        place: Place<'_>,
        rule: &Rule,
        text: &str,
        mut branch: Branch,
        next: &mut Vec<Branch>,
        left: &mut Vec<(Branch, Flow)>,
    ) {
        match text.split_whitespace().next() {
            Some("REJECT") => {
                branch.verdict = Verdict::Reject;
                left.push((branch, Flow::End));
            }
            Some("MASQUERADE" | "SNAT") => {
                branch.masqueraded = true;
                left.push((branch, Flow::End));
            }
            // They note something and let the packet go on.
            Some("LOG" | "NFLOG" | "TRACE") => next.push(branch),
            Some("DNAT" | "REDIRECT" | "NETMAP" | "TPROXY" | "NFQUEUE" | "QUEUE") => {
                self.pass_over(place, rule);
                left.push((branch, Flow::End));
            }
            _ => {
                self.pass_over(place, rule);
                next.push(branch);
            }
        }
    }

    fn pass_over(&mut self, place: Place<'_>, rule: &Rule) {
        let rule = render_rule(place.table.family, place.chain, rule);
        self.not_understood.insert(NotUnderstood { table: place.table, rule });
    }

    /// All conditions together. Where one does not hold, what is not understood of the others does not matter.
    fn rule_holds(&mut self, place: Place<'_>, rule: &Rule, branch: &Branch) -> Holds {
        let mut all = Holds::Yes;
        for condition in rule.matches.iter() {
            match (self.holds(place, condition, branch), all) {
                (Holds::No, _) => return Holds::No,
                (Holds::NotUnderstood, _) => all = Holds::NotUnderstood,
                (Holds::Maybe, Holds::Yes) => all = Holds::Maybe,
                _ => {}
            }
        }
        if all == Holds::NotUnderstood {
            self.pass_over(place, rule);
        }
        all
    }

    fn holds(&self, place: Place<'_>, condition: &Match, branch: &Branch) -> Holds {
        let packet = &branch.packet;
        match condition {
            Match::Source { prefix, inside } => (prefix.contains(&packet.source) == *inside).into(),
            Match::Destination { prefix, inside } => (prefix.contains(&packet.destination) == *inside).into(),
            Match::InInterface { name, inside } => (is_interface(name, self.interface_in(place)) == *inside).into(),
            Match::OutInterface { name, inside } => (is_interface(name, self.interface_out(place)) == *inside).into(),
            Match::Protocol { protocol, inside } => ((*protocol == packet.protocol) == *inside).into(),
            Match::Transport { protocol, port } => {
                (*protocol == packet.protocol && port.is_none_or(|port| port.get() == packet.destination_port)).into()
            }
            Match::AddressIsLocal { end, inside } => {
                let address = if *end == End::Source { packet.source } else { packet.destination };
                (is_local(self.environment, address) == *inside).into()
            }
            Match::Mark { value, mask, inside } => ((packet.mark & mask == *value) == *inside).into(),
            Match::State { states, inside } => (states.meets(states_of(branch)) == *inside).into(),
            Match::Random(probability) => match probability.parts() {
                0 => Holds::No,
                parts if parts == 1 << 31 => Holds::Yes,
                _ => Holds::Maybe,
            },
            Match::Recent(recent) => match recent.action {
                RecentAction::Set => Holds::Yes,
                RecentAction::Check { .. } => self.environment.recent.contains(&recent.list).into(),
            },
            Match::Set(set) => (self.is_in_set(set, packet) == set.inside).into(),
            Match::Comment(_) => Holds::Yes,
            Match::Other(_) => Holds::NotUnderstood,
        }
    }

    fn is_in_set(&self, set: &SetMatch, packet: &Packet) -> bool {
        let address = |end: End| if end == End::Source { packet.source } else { packet.destination };
        let port = |end: End| if end == End::Source { packet.source_port } else { packet.destination_port };
        let parts = set.ends.len();
        self.environment.sets.iter().any(|(name, member)| {
            let fits = |(part, end): (&SetPart, &End)| match part {
                SetPart::Address(it) => *it == address(*end),
                SetPart::Prefix(prefix) => prefix.contains(&address(*end)),
                SetPart::Port(protocol, number) => *protocol == packet.protocol && *number == port(*end),
            };
            *name == set.name && member.len() == parts && member.iter().zip(set.ends.iter()).all(fits)
        })
    }

    fn interface_in(&self, place: Place<'_>) -> &str {
        match place.hook.chain {
            "OUTPUT" | "POSTROUTING" => "",
            _ if self.looped => "lo",
            _ => self.environment.in_interface.as_deref().unwrap_or_default(),
        }
    }

    fn interface_out(&self, place: Place<'_>) -> &str {
        match place.hook.chain {
            "PREROUTING" | "INPUT" => "",
            _ => self.environment.out_interface.as_deref().unwrap_or_default(),
        }
    }
}

fn is_source(hook: Hook) -> bool {
    matches!(hook.chain, "POSTROUTING" | "INPUT")
}

/// What connection tracking says of the first packet of a connection.
fn states_of(branch: &Branch) -> States {
    if branch.backend.is_some() { States::NEW.and(States::DNAT) } else { States::NEW }
}

fn is_interface(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('+') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    }
}
