//! The typed program: tables, chains, rules.
//!
//! What the room uses is typed. What others wrote and this room has no type for is kept as text
//! ([`Match::Other`], [`Target::Other`]), so that nothing of it is lost. Two rules are equal in the kernel
//! if [`Rule::is_same`] says so: types hold what the kernel holds, not how it was written.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use portolan_net::{Family, Origin, Port, Protocol};
use serde::{Deserialize, Serialize};

use super::{ChainName, RuleBuilder, Rules};

/// The name of an interface or a set, or a comment.
pub type Name = Arc<str>;

/// What the tables must hold, or what they were seen to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The tables.
    #[serde(with = "crate::pairs")]
    pub tables: BTreeMap<TableKey, Table>,
}

impl Program {
    /// A chain, if it is there.
    pub fn chain(&self, table: TableKey, chain: &str) -> Option<&Chain> {
        self.tables.get(&table)?.chains.get(&ChainName::from(chain))
    }

    /// How many rules there are.
    pub fn rule_count(&self) -> usize {
        self.tables.values().flat_map(|table| table.chains.values()).map(|chain| chain.rules.len()).sum()
    }
}

/// Which table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TableKey {
    /// IPv4: `iptables`. IPv6: `ip6tables`.
    pub family: Family,
    /// The name.
    pub name: TableName,
}

impl TableKey {
    /// A table of a family.
    pub fn new(family: Family, name: TableName) -> TableKey {
        TableKey { family, name }
    }
}

/// The tables of iptables, in the order in which the room writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TableName {
    /// Who may pass.
    Filter,
    /// Translation of addresses.
    Nat,
    /// Marks and header fields.
    Mangle,
    /// Before connection tracking. It is only ever observed.
    Raw,
    /// Labels of security modules. It is only ever observed.
    Security,
}

impl TableName {
    /// All of them.
    pub const ALL: [TableName; 5] =
        [TableName::Filter, TableName::Nat, TableName::Mangle, TableName::Raw, TableName::Security];

    /// Those that hold something of ours.
    pub const OURS: [TableName; 3] = [TableName::Filter, TableName::Nat, TableName::Mangle];

    /// The name in the kernel.
    pub fn as_str(self) -> &'static str {
        match self {
            TableName::Filter => "filter",
            TableName::Nat => "nat",
            TableName::Mangle => "mangle",
            TableName::Raw => "raw",
            TableName::Security => "security",
        }
    }

    /// The table of this name.
    pub fn from_name(name: &str) -> Option<TableName> {
        TableName::ALL.into_iter().find(|table| table.as_str() == name)
    }
}

/// One table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// The chains. A program that was compiled holds of built-in chains only what is ours in them.
    pub chains: OrdMap<ChainName, Chain>,
}

/// A chain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// What becomes of packets at the end of a built-in chain. Chains that were made have none.
    pub policy: Option<Policy>,
    /// The rules, in order.
    pub rules: Rules,
}

impl Chain {
    /// A chain that is not built in.
    pub fn of(rules: impl Into<Rules>) -> Chain {
        Chain { policy: None, rules: rules.into() }
    }

    /// A built-in chain that accepts at its end.
    pub fn built_in(rules: impl Into<Rules>) -> Chain {
        Chain { policy: Some(Policy::Accept), rules: rules.into() }
    }
}

/// What becomes of packets at the end of a built-in chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Policy {
    /// They go on.
    Accept,
    /// They are lost.
    Drop,
}

/// A rule: what a packet must be, and what is then done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// All of these must hold. Those of the rule's head (addresses, interfaces, protocol) come first, in the
    /// order in which `iptables-save` prints them. Rules share them: most endpoints have the same.
    pub matches: Arc<[Match]>,
    /// What is done; nothing where there is none.
    pub target: Option<Target>,
    /// What caused it. The kernel does not hold it.
    pub origin: Option<Origin>,
}

impl Rule {
    /// A rule without conditions and without effect, to be built upon.
    pub fn builder() -> RuleBuilder {
        RuleBuilder::default()
    }

    /// Whether the kernel holds the same for both.
    pub fn is_same(&self, other: &Rule) -> bool {
        self.matches == other.matches && self.target == other.target
    }

    /// Its comment, if it has one.
    pub fn comment(&self) -> Option<&Name> {
        self.matches.iter().find_map(|it| match it {
            Match::Comment(comment) => Some(comment),
            _ => None,
        })
    }

    /// The chain that it leads to, if it leads to one.
    pub fn leads_to(&self) -> Option<&ChainName> {
        match &self.target {
            Some(Target::Jump(chain) | Target::Goto(chain)) => Some(chain),
            _ => None,
        }
    }
}

/// The source or the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// `src`.
    Source,
    /// `dst`.
    Destination,
}

/// A condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Match {
    /// `-s`.
    Source {
        /// The prefix.
        prefix: IpNet,
        /// Whether it must be in it.
        inside: bool,
    },
    /// `-d`.
    Destination {
        /// The prefix.
        prefix: IpNet,
        /// Whether it must be in it.
        inside: bool,
    },
    /// `-i`.
    InInterface {
        /// The name; with `+` at its end, what the name starts with.
        name: Name,
        /// Whether it must be so.
        inside: bool,
    },
    /// `-o`.
    OutInterface {
        /// The name; with `+` at its end, what the name starts with.
        name: Name,
        /// Whether it must be so.
        inside: bool,
    },
    /// `-p`.
    Protocol {
        /// The protocol.
        protocol: Protocol,
        /// Whether it must be this one.
        inside: bool,
    },
    /// `-m tcp --dport`.
    Transport {
        /// The protocol; `-p` says the same.
        protocol: Protocol,
        /// The destination port.
        port: Option<Port>,
    },
    /// `-m addrtype --src-type LOCAL` or `--dst-type LOCAL`.
    AddressIsLocal {
        /// Which address.
        end: End,
        /// Whether it must be local.
        inside: bool,
    },
    /// `-m mark --mark`: these bits of the mark have this value.
    Mark {
        /// The value.
        value: u32,
        /// Which bits.
        mask: u32,
        /// Whether it must be so.
        inside: bool,
    },
    /// `-m conntrack --ctstate`.
    State {
        /// The states.
        states: States,
        /// Whether it must be one of them.
        inside: bool,
    },
    /// `-m statistic --mode random`.
    Random(Probability),
    /// `-m recent`.
    Recent(Box<Recent>),
    /// `-m set --match-set`.
    Set(Box<SetMatch>),
    /// `-m comment`. It is always true.
    Comment(Name),
    /// Something that this room does not use, as text. It is only ever observed.
    Other(Name),
}

impl Match {
    /// A mark with all bits of the mask set.
    pub fn mark(mask: u32) -> Match {
        Match::Mark { value: mask, mask, inside: true }
    }

    /// `-m conntrack --ctstate NEW`.
    pub const NEW: Match = Match::State { states: States::NEW, inside: true };

    /// `-m addrtype --src-type LOCAL`.
    pub const SOURCE_IS_LOCAL: Match = Match::AddressIsLocal { end: End::Source, inside: true };

    /// `-m addrtype --dst-type LOCAL`.
    pub const DESTINATION_IS_LOCAL: Match = Match::AddressIsLocal { end: End::Destination, inside: true };

    /// `-m set --match-set NAME src,dst`.
    pub fn set(name: &str, ends: &[End]) -> Match {
        Match::Set(Box::new(SetMatch { name: name.into(), ends: ends.into(), inside: true }))
    }

    /// Where it stands in a rule: what belongs to the head first.
    pub(super) fn place(&self) -> u8 {
        match self {
            Match::Source { .. } => 0,
            Match::Destination { .. } => 1,
            Match::InInterface { .. } => 2,
            Match::OutInterface { .. } => 3,
            Match::Protocol { .. } => 4,
            _ => 5,
        }
    }
}

/// States of a connection, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct States(pub u8);

impl States {
    /// No connection that is known or could begin.
    pub const INVALID: States = States(1);
    /// The first packet.
    pub const NEW: States = States(2);
    /// A new connection that belongs to another one.
    pub const RELATED: States = States(4);
    /// Any other packet.
    pub const ESTABLISHED: States = States(8);
    /// Not tracked.
    pub const UNTRACKED: States = States(16);
    /// Its source was translated.
    pub const SNAT: States = States(32);
    /// Its destination was translated.
    pub const DNAT: States = States(64);

    /// All of them, in the order in which `iptables-save` prints them.
    pub const ALL: [(States, &'static str); 7] = [
        (States::INVALID, "INVALID"),
        (States::NEW, "NEW"),
        (States::RELATED, "RELATED"),
        (States::ESTABLISHED, "ESTABLISHED"),
        (States::UNTRACKED, "UNTRACKED"),
        (States::SNAT, "SNAT"),
        (States::DNAT, "DNAT"),
    ];

    /// The states of both.
    #[must_use]
    pub fn and(self, other: States) -> States {
        States(self.0 | other.0)
    }

    /// Whether they have one in common.
    pub fn meets(self, other: States) -> bool {
        self.0 & other.0 != 0
    }
}

/// A probability, in parts of 2³¹ as the kernel holds it (`xt_statistic`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Probability(u32);

impl Probability {
    /// Certainty.
    const WHOLE: u32 = 1 << 31;

    /// One of so many, as kube-proxy writes it: with ten decimals (`%0.10f`).
    pub fn one_of(number: usize) -> Probability {
        Probability::from_text(&Probability::decimals(number)).unwrap_or(Probability(Probability::WHOLE))
    }

    /// From parts of 2³¹, at most all of them.
    pub fn from_parts(parts: u32) -> Option<Probability> {
        (parts <= Probability::WHOLE).then_some(Probability(parts))
    }

    /// In parts of 2³¹.
    pub fn parts(self) -> u32 {
        self.0
    }

    /// From a decimal fraction between 0 and 1.
    pub fn from_text(text: &str) -> Option<Probability> {
        let value: f64 = text.parse().ok()?;
        if !(0.0..=1.0).contains(&value) {
            return None;
        }
        #[expect(clippy::cast_sign_loss, reason = "between 0 and 2³¹")]
        Some(Probability((value * f64::from(Probability::WHOLE)).round() as u32))
    }

    /// As `iptables-save` prints it.
    pub fn saved_text(self) -> String {
        format!("{:.11}", f64::from(self.0) / f64::from(Probability::WHOLE))
    }

    /// As kube-proxy writes it, where it is one that kube-proxy would write.
    pub fn written_text(self) -> String {
        let number = (Probability::WHOLE + self.0 / 2).checked_div(self.0).unwrap_or(0) as usize;
        if number > 0 && Probability::one_of(number) == self {
            Probability::decimals(number)
        } else {
            self.saved_text()
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "there are fewer than 2⁵² endpoints")]
    fn decimals(number: usize) -> String {
        format!("{:.10}", 1.0 / number.max(1) as f64)
    }
}

/// `-m recent`, for the source address with its whole length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recent {
    /// The list.
    pub list: Name,
    /// What is done with it.
    pub action: RecentAction,
}

/// What is done with a list of recent addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecentAction {
    /// The address is noted. It is always true.
    Set,
    /// The address was noted no longer ago than this.
    Check {
        /// In seconds.
        seconds: u32,
        /// Whether older entries are removed.
        reap: bool,
    },
}

/// `-m set`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetMatch {
    /// The name of the set.
    pub name: Name,
    /// Of which end each part of the key is.
    pub ends: Box<[End]>,
    /// Whether it must be in the set.
    pub inside: bool,
}

/// How a packet is refused. Other kinds are only ever observed, as [`Target::Other`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rejection {
    /// ICMP or ICMPv6 port unreachable: the default.
    PortUnreachable,
    /// A TCP segment with RST.
    TcpReset,
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// Goes on in another chain and comes back.
    Jump(ChainName),
    /// Goes on in another chain and does not come back.
    Goto(ChainName),
    /// Leaves the chain.
    Return,
    /// Lets the packet go on.
    Accept,
    /// Loses the packet.
    Drop,
    /// Refuses the packet.
    Reject(Rejection),
    /// Clears the bits of the mask from the mark, then flips the bits of the value (`--set-xmark`).
    Mark {
        /// Which bits are flipped.
        value: u32,
        /// Which bits are cleared before.
        mask: u32,
    },
    /// Replaces the source by the address of the interface.
    Masquerade {
        /// Whether the port is chosen at random.
        random_fully: bool,
    },
    /// Replaces the destination.
    Dnat {
        /// The address.
        address: IpAddr,
        /// The port, where it changes.
        port: Option<Port>,
    },
    /// Something that this room does not use, as text. It is only ever observed.
    Other(Name),
}

impl Target {
    /// Sets bits of the mark (`--or-mark`).
    pub fn set_mark(bits: u32) -> Target {
        Target::Mark { value: bits, mask: bits }
    }

    /// Flips bits of the mark (`--xor-mark`).
    pub fn flip_mark(bits: u32) -> Target {
        Target::Mark { value: bits, mask: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_written_as_kube_proxy_writes_them() {
        for (number, written, saved) in [
            (1, "1.0000000000", "1.00000000000"),
            (2, "0.5000000000", "0.50000000000"),
            (3, "0.3333333333", "0.33333333349"),
            (7, "0.1428571429", "0.14285714272"),
        ] {
            let probability = Probability::one_of(number);
            assert_eq!((probability.written_text().as_str(), probability.saved_text().as_str()), (written, saved));
            assert_eq!(Probability::from_text(saved), Some(probability), "{saved}");
        }
    }

    #[test]
    fn rules_are_small() {
        assert!(size_of::<Match>() <= 24, "{}", size_of::<Match>());
        assert!(size_of::<Rule>() <= 48, "{}", size_of::<Rule>());
    }
}
