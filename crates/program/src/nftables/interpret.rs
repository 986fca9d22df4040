//! What the kernel would do to a packet at a hook: the oracle of tests, and the user's tracer.
//!
//! Everything that the program's types can say is modelled. What is observed and not of this room
//! (`Statement::Unknown`) is reported as a step and otherwise passed over.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use portolan_net::{Origin, Packet, Port};
use serde::{Deserialize, Serialize};

use super::render::{render_match, render_statement};
use super::{
    Chain, ChainKind, Element, Hook, Key, KeyExpression, Learned, Match, Name, Program, Rejection, Rule, Set, SetKind,
    Statement, Table, TableKey,
};

/// The deepest nesting of jumps that the kernel allows (`NFT_JUMP_STACK_SIZE`).
const JUMPS_MAX: usize = 16;

/// What is true around a packet and not in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// The addresses of this node in its own namespace, loopback ones too.
    pub local_addresses: Vec<IpAddr>,
    /// The interface that it came by.
    pub in_interface: Option<String>,
    /// The interface that it leaves by.
    pub out_interface: Option<String>,
    /// The address of that interface that the kernel would choose as source.
    pub out_address: Option<IpAddr>,
    /// Whether it is not the first packet of its connection.
    pub established: bool,
    /// Whether the connection's destination was translated at an earlier hook.
    pub destination_translated: bool,
    /// Where the connection went before that. The packet's own destination where it is not given.
    pub original_destination: Option<SocketAddr>,
    /// The endpoint at which the kernel keeps this client of this frontend, if it remembers one.
    pub remembered: Option<SocketAddr>,
}

/// Which of several backends is taken, where the kernel chooses at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Choice {
    /// The first one.
    #[default]
    First,
    /// The one at this slot, counted from 0; it wraps around.
    Slot(u32),
    /// This one, if it is among them; else the first.
    Prefer(SocketAddr),
}

/// What becomes of the packet at this hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It goes on.
    Accept,
    /// It is lost without a word.
    Drop,
    /// Its sender is told.
    Reject(Rejection),
}

/// One of the backends that the kernel could have chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    /// Address and port.
    pub socket: SocketAddr,
    /// Its place among them, from 0.
    pub slot: u32,
    /// What causes it.
    pub origin: Option<Origin>,
}

/// Something that happened on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The table.
    pub table: TableKey,
    /// The chain.
    pub chain: Name,
    /// What happened.
    pub what: What,
    /// The object that caused it, where one did.
    pub origin: Option<Origin>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A rule sent the packet to another chain because of a condition.
    Matched {
        /// The condition, as `nft` prints it.
        condition: String,
        /// What was done, as `nft` prints it.
        action: String,
    },
    /// The mark changed.
    Marked {
        /// What it was.
        from: u32,
        /// What it is.
        to: u32,
    },
    /// The destination was translated.
    DestinationTranslated {
        /// What it was.
        from: SocketAddr,
        /// What it is.
        to: SocketAddr,
        /// Which one was chosen, counted from 1.
        chosen: u32,
        /// Out of how many.
        of: u32,
    },
    /// The source became the interface's address; the port is chosen at random.
    Masqueraded {
        /// What it was.
        from: IpAddr,
        /// What it is.
        to: IpAddr,
    },
    /// The interface has no address to leave with, so the kernel drops the packet.
    NoSourceAddress,
    /// The packet was refused.
    Rejected(Rejection),
    /// The packet was dropped: why, as the rule says.
    Dropped(String),
    /// The client keeps its endpoint for so long.
    Remembered {
        /// How long.
        seconds: u32,
    },
    /// A statement that is not ours was passed over.
    NotUnderstood(String),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::Matched { condition, action } => write!(f, "{condition}: {action}"),
            What::Marked { from, to } => write!(f, "mark {from:#x} ⇒ {to:#x}"),
            What::DestinationTranslated { from, to, chosen, of } => write!(f, "dst {from} ⇒ {to}, {chosen} of {of}"),
            What::Masqueraded { from, to } => write!(f, "src {from} ⇒ {to}"),
            What::NoSourceAddress => f.write_str("dropped: the interface has no address of this family"),
            What::Rejected(Rejection::TcpReset) => f.write_str("refused with a TCP reset"),
            What::Dropped(why) => write!(f, "dropped: {why}"),
            What::Remembered { seconds } => write!(f, "the client keeps its endpoint for {seconds} s"),
            What::Rejected(Rejection::PortUnreachable) => f.write_str("refused with ICMP port unreachable"),
            What::NotUnderstood(text) => write!(f, "a rule that is not ours was passed over: {text}"),
        }
    }
}

/// What the kernel would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The packet afterwards.
    pub packet: Packet,
    /// What becomes of it.
    pub verdict: Verdict,
    /// What happened, in order.
    pub steps: Vec<Step>,
    /// All backends that could have been chosen; empty where none was.
    pub alternatives: Vec<Alternative>,
    /// Whether the connection's destination is translated, at this hook or before.
    pub destination_translated: bool,
    /// Whether the client keeps the endpoint that it gets: session affinity applies. Then its next connection
    /// goes to the same one, unless [`Environment::remembered`] says that it had one already.
    pub keeps_endpoint: bool,
}

/// What the kernel would do to a packet at a hook.
pub fn interpret(program: &Program, packet: Packet, at: Hook, environment: &Environment, choice: Choice) -> Outcome {
    let mut chains: Vec<(i32, TableKey, &Table, &Name, &Chain, ChainKind)> = Vec::new();
    for (key, table) in program.tables.iter().filter(|(key, _)| key.family == packet.family()) {
        for (name, chain) in &table.chains {
            if let Some(base) = chain.base.filter(|base| base.hook == at) {
                chains.push((base.priority, *key, table, name, chain, base.kind));
            }
        }
    }
    chains.sort_by_key(|(priority, key, ..)| (*priority, *key));
    let mut run = Run {
        packet,
        environment,
        choice,
        steps: Vec::new(),
        alternatives: Vec::new(),
        destination_translated: environment.destination_translated,
        translated_here: false,
        keeps_endpoint: false,
        original_destination: environment.original_destination,
    };
    let mut verdict = Verdict::Accept;
    for (_, key, table, name, chain, kind) in chains {
        // The kernel asks NAT chains once per connection, and no further one after a translation.
        if kind == ChainKind::Nat && (environment.established || run.translated_here) {
            continue;
        }
        let accepts = chain.base.is_none_or(|base| base.accepts);
        verdict = match run.chain(Place { key, table, chain: name }, chain, 0) {
            Flow::End(verdict) => verdict,
            Flow::Continue if accepts => Verdict::Accept,
            Flow::Continue => Verdict::Drop,
        };
        if verdict != Verdict::Accept {
            break;
        }
    }
    Outcome {
        packet: run.packet,
        verdict,
        steps: run.steps,
        alternatives: run.alternatives,
        destination_translated: run.destination_translated,
        keeps_endpoint: run.keeps_endpoint,
    }
}

#[derive(Clone, Copy)]
struct Place<'a> {
    key: TableKey,
    table: &'a Table,
    chain: &'a Name,
}

/// What follows a statement or a chain.
enum Flow {
    Continue,
    End(Verdict),
}

/// What follows a rule.
enum Next {
    Rule,
    Leave,
    End(Verdict),
}

/// Whether a condition holds; if so, the origin of the element that made it so.
enum Held {
    No,
    Yes(Option<Origin>),
}

struct Run<'a> {
    packet: Packet,
    environment: &'a Environment,
    choice: Choice,
    steps: Vec<Step>,
    alternatives: Vec<Alternative>,
    destination_translated: bool,
    translated_here: bool,
    keeps_endpoint: bool,
    original_destination: Option<SocketAddr>,
}

impl Run<'_> {
    fn chain(&mut self, place: Place<'_>, chain: &Chain, depth: usize) -> Flow {
        if depth > JUMPS_MAX {
            // The kernel refuses to load such a program.
            return Flow::End(Verdict::Drop);
        }
        for rule in &chain.rules {
            match self.rule(place, rule, depth) {
                Next::Rule => {}
                Next::Leave => return Flow::Continue,
                Next::End(verdict) => return Flow::End(verdict),
            }
        }
        Flow::Continue
    }

    fn rule(&mut self, place: Place<'_>, rule: &Rule, depth: usize) -> Next {
        let mut origin = rule.origin.clone();
        for condition in &rule.matches {
            match self.holds(place, condition) {
                Held::Yes(found) => origin = found.or(origin),
                Held::No => return Next::Rule,
            }
        }
        for statement in &rule.statements {
            let what = match statement {
                Statement::Jump(target) | Statement::Goto(target) => {
                    self.record_match(place, rule, statement, origin.as_ref());
                    let Some(chain) = place.table.chains.get(target) else { return Next::End(Verdict::Drop) };
                    return match (self.chain(Place { chain: target, ..place }, chain, depth + 1), statement) {
                        (Flow::End(verdict), _) => Next::End(verdict),
                        (Flow::Continue, Statement::Jump(_)) => Next::Rule,
                        (Flow::Continue, _) => Next::Leave,
                    };
                }
                Statement::Return => return Next::Leave,
                Statement::Drop => {
                    let why = rule.comment.as_deref().unwrap_or("a rule says so").to_owned();
                    self.record(place, What::Dropped(why), origin);
                    return Next::End(Verdict::Drop);
                }
                Statement::Keep { key, .. } => {
                    return match self.keep(place, *key) {
                        Some(()) => Next::End(Verdict::Accept),
                        None => Next::Rule,
                    };
                }
                Statement::Remember(learned) => {
                    let Held::Yes(origin) = self.learns(place, learned, true) else { return Next::Rule };
                    self.record(place, What::Remembered { seconds: learned.seconds }, origin);
                    continue;
                }
                Statement::Forget(learned) => {
                    let Held::Yes(found) = self.learns(place, learned, false) else { return Next::Rule };
                    origin = found;
                    continue;
                }
                Statement::SetMark(bits) => self.mark(self.packet.mark | bits),
                Statement::ClearMark(bits) => self.mark(self.packet.mark & !bits),
                Statement::Balance { key, slots, offset, map } => {
                    return match self.balance(place, *key, *slots, *offset, map) {
                        Some(()) => Next::End(Verdict::Accept),
                        None => Next::Rule,
                    };
                }
                Statement::Masquerade => {
                    let what = self.masquerade();
                    let verdict = if what == What::NoSourceAddress { Verdict::Drop } else { Verdict::Accept };
                    self.record(place, what, origin);
                    return Next::End(verdict);
                }
                Statement::Reject(how) => {
                    self.record(place, What::Rejected(*how), origin);
                    return Next::End(Verdict::Reject(*how));
                }
                Statement::Unknown(text) => What::NotUnderstood(text.clone()),
            };
            self.record(place, what, origin.clone());
        }
        Next::Rule
    }

    /// Whether a condition holds, and because of what.
    fn holds(&self, place: Place<'_>, condition: &Match) -> Held {
        let environment = self.environment;
        let holds = match condition {
            Match::Set { key, set, inside } => {
                // A rule that refers to a set which is not there cannot be loaded.
                let Some(set) = place.table.sets.get(set) else { return Held::No };
                let found = self.key(*key).and_then(|key| find(set, &key));
                if found.is_some() != *inside {
                    return Held::No;
                }
                return Held::Yes(found.and_then(|element| element.origin.clone()));
            }
            Match::Destination { prefix, inside } => prefix.contains(&self.packet.destination) == *inside,
            Match::DestinationIsLocal => environment.local_addresses.contains(&self.packet.destination),
            Match::SourceIsLocal { inside } => environment.local_addresses.contains(&self.packet.source) == *inside,
            Match::Interface { name, is_prefix, inside } => {
                let here = environment.in_interface.as_deref().unwrap_or_default();
                (if *is_prefix { here.starts_with(name.as_str()) } else { here == name }) == *inside
            }
            Match::Mark(bits) => self.packet.mark & bits == *bits,
            Match::Protocol(protocol) => self.packet.protocol == *protocol,
            Match::DestinationTranslated => self.destination_translated,
            Match::NewConnection => !environment.established,
        };
        if holds { Held::Yes(None) } else { Held::No }
    }

    /// The packet's fields as a key; none for a port that cannot be one.
    fn key(&self, expression: KeyExpression) -> Option<Key> {
        let packet = &self.packet;
        let port = || Port::try_from(packet.destination_port).ok();
        let source = || IpNet::from(packet.source);
        match expression {
            KeyExpression::Frontend => Some(Key::Frontend(packet.destination, packet.protocol, port()?)),
            KeyExpression::NodePort => Some(Key::NodePort(packet.protocol, port()?)),
            KeyExpression::AddressPair => Some(Key::AddressPair(packet.source, packet.destination)),
            KeyExpression::Source => Some(Key::Prefix(IpNet::from(packet.source))),
            KeyExpression::Destination => Some(Key::Prefix(IpNet::from(packet.destination))),
            KeyExpression::FrontendSource => {
                Some(Key::FrontendSource(packet.destination, packet.protocol, port()?, source()))
            }
            KeyExpression::NodePortSource => Some(Key::NodePortSource(packet.protocol, port()?, source())),
        }
    }

    /// The endpoint that the client had, whether it lives or not.
    fn keep(&mut self, place: Place<'_>, key: KeyExpression) -> Option<()> {
        self.keeps_endpoint = true;
        let socket = self.environment.remembered?;
        let endpoint = with_endpoint(self.key(key)?, socket)?;
        let origin = place.table.sets.values().find_map(|set| set.elements.get(&endpoint)?.origin.clone());
        let alternative = Alternative { socket, slot: 0, origin };
        self.translate(place, &alternative, 1);
        self.alternatives = vec![alternative];
        Some(())
    }

    /// Whether the packet's connection went to a frontend that is learned, and to an endpoint that lives, or to
    /// one that does not.
    fn learns(&self, place: Place<'_>, learned: &Learned, is_living: bool) -> Held {
        let packet = &self.packet;
        let socket = SocketAddr::new(packet.destination, packet.destination_port);
        let original = self.original_destination.unwrap_or(socket);
        let Ok(port) = Port::try_from(original.port()) else { return Held::No };
        let (frontend, timeout) = match learned.key {
            KeyExpression::Frontend => (
                Key::Frontend(original.ip(), packet.protocol, port),
                Key::FrontendSlot(original.ip(), packet.protocol, port, learned.seconds),
            ),
            _ => (Key::NodePort(packet.protocol, port), Key::NodePortSlot(packet.protocol, port, learned.seconds)),
        };
        let element = |set: &Name, key: &Key| place.table.sets.get(set).and_then(|set| set.elements.get(key));
        let Some(found) = element(&learned.timeouts, &timeout) else { return Held::No };
        let endpoint = with_endpoint(frontend, socket);
        let lives = endpoint.is_some_and(|endpoint| element(&learned.endpoints, &endpoint).is_some());
        let holds = packet.protocol == learned.protocol && lives == is_living;
        if holds { Held::Yes(found.origin.clone()) } else { Held::No }
    }

    fn balance(&mut self, place: Place<'_>, key: KeyExpression, slots: u32, offset: u32, map: &str) -> Option<()> {
        let map = place.table.sets.get(map)?;
        let frontend = self.key(key)?;
        let at = |slot: u32| {
            let slot = slot.checked_add(offset)?;
            let key = match frontend {
                Key::Frontend(address, protocol, port) => Key::FrontendSlot(address, protocol, port, slot),
                Key::NodePort(protocol, port) => Key::NodePortSlot(protocol, port, slot),
                _ => return None,
            };
            map.elements.get(&key)
        };
        let alternative = |slot: u32| {
            let element = at(slot)?;
            Some(Alternative { socket: element.value?, slot, origin: element.origin.clone() })
        };
        // A frontend has all slots of its number of backends or none.
        alternative(0)?;
        let alternatives: Vec<Alternative> = (0..slots).filter_map(alternative).collect();
        let chosen = match self.choice {
            Choice::First => alternatives.first(),
            Choice::Slot(slot) => alternatives.iter().find(|it| it.slot == slot % slots.max(1)),
            Choice::Prefer(socket) => {
                alternatives.iter().find(|it| it.socket == socket).or_else(|| alternatives.first())
            }
        }?;
        let chosen = chosen.clone();
        self.translate(place, &chosen, slots);
        self.alternatives = alternatives;
        Some(())
    }

    fn translate(&mut self, place: Place<'_>, chosen: &Alternative, of: u32) {
        let from = SocketAddr::new(self.packet.destination, self.packet.destination_port);
        self.original_destination = Some(from);
        self.packet.destination = chosen.socket.ip();
        self.packet.destination_port = chosen.socket.port();
        self.destination_translated = true;
        self.translated_here = true;
        let what = What::DestinationTranslated { from, to: chosen.socket, chosen: chosen.slot + 1, of };
        self.record(place, what, chosen.origin.clone());
    }

    fn mark(&mut self, to: u32) -> What {
        let from = std::mem::replace(&mut self.packet.mark, to);
        What::Marked { from, to }
    }

    fn masquerade(&mut self) -> What {
        let own = self.environment.out_address.filter(|address| address.is_ipv4() == self.packet.source.is_ipv4());
        let Some(to) = own else { return What::NoSourceAddress };
        self.translated_here = true;
        What::Masqueraded { from: std::mem::replace(&mut self.packet.source, to), to }
    }

    fn record(&mut self, place: Place<'_>, what: What, origin: Option<Origin>) {
        self.steps.push(Step { table: place.key, chain: place.chain.clone(), what, origin });
    }

    /// Plain jumps say nothing to a reader; those with a reason do.
    fn record_match(&mut self, place: Place<'_>, rule: &Rule, statement: &Statement, origin: Option<&Origin>) {
        if rule.matches.is_empty() || origin.is_none() {
            return;
        }
        let family = place.key.family;
        let conditions: Vec<String> = rule.matches.iter().map(|it| render_match(family, it)).collect();
        let what = What::Matched { condition: conditions.join(" "), action: render_statement(family, statement) };
        self.record(place, what, origin.cloned());
    }
}

/// The element that a key is, or stands in.
fn find<'a>(set: &'a Set, key: &Key) -> Option<&'a Element> {
    let within = |is_it: &dyn Fn(&Key) -> bool| set.elements.iter().find(|(key, _)| is_it(key)).map(|(_, it)| it);
    match *key {
        Key::Prefix(inner) if set.kind == SetKind::Addresses => set.elements.get(&Key::Address(inner.addr())),
        Key::Prefix(inner) => within(&|key| matches!(key, Key::Prefix(prefix) if prefix.contains(&inner))),
        Key::FrontendSource(address, protocol, port, inner) => within(&|key| {
            matches!(key, Key::FrontendSource(its_address, its_protocol, its_port, prefix)
                if (*its_address, *its_protocol, *its_port) == (address, protocol, port) && prefix.contains(&inner))
        }),
        Key::NodePortSource(protocol, port, inner) => within(&|key| {
            matches!(key, Key::NodePortSource(its_protocol, its_port, prefix)
                if (*its_protocol, *its_port) == (protocol, port) && prefix.contains(&inner))
        }),
        _ => set.elements.get(key),
    }
}

/// The key of an endpoint of a frontend.
fn with_endpoint(frontend: Key, socket: SocketAddr) -> Option<Key> {
    let to = Port::try_from(socket.port()).ok()?;
    match frontend {
        Key::Frontend(address, protocol, port) => Some(Key::FrontendEndpoint(address, protocol, port, socket.ip(), to)),
        Key::NodePort(protocol, port) => Some(Key::NodePortEndpoint(protocol, port, socket.ip(), to)),
        _ => None,
    }
}
