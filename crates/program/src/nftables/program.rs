//! The typed program: tables, sets with typed elements, chains with typed rules.
//!
//! It holds only what this room uses. There are no anonymous sets: a kernel needs quadratic time to
//! load many of them. Large sets are persistent maps, so that a copy of a program is cheap.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use portolan_net::{Family, Origin, Port, Protocol};
use serde::{Deserialize, Serialize};

use crate::layout;

/// The name of a set or a chain.
pub type Name = Arc<str>;

/// What our nftables tables must hold, or what they were seen to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The tables.
    #[serde(with = "crate::pairs")]
    pub tables: BTreeMap<TableKey, Table>,
}

/// Which table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TableKey {
    /// The family: `ip` or `ip6`.
    pub family: Family,
    /// The name.
    pub name: TableName,
}

/// The tables that are ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TableName {
    /// Services.
    Services,
    /// Masquerading of what pods send out of the cluster.
    Masquerade,
}

impl TableName {
    /// All of them.
    pub const ALL: [TableName; 2] = [TableName::Services, TableName::Masquerade];

    /// The name in the kernel.
    pub fn as_str(self) -> &'static str {
        match self {
            TableName::Services => layout::SERVICES_TABLE,
            TableName::Masquerade => layout::MASQUERADE_TABLE,
        }
    }
}

/// One table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Sets and maps.
    pub sets: BTreeMap<Name, Set>,
    /// Chains.
    pub chains: BTreeMap<Name, Chain>,
}

/// The most clients that are remembered, of addresses and of node ports in each family. Further ones go to any
/// endpoint. The kernel reserves 16 bytes for each.
pub const CLIENTS_MAX: u32 = 65_536;

/// What the elements of a set are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SetKind {
    /// Address, protocol and port.
    Frontends,
    /// Protocol and port.
    NodePorts,
    /// A map from address, protocol, port and slot to address and port.
    FrontendSlots,
    /// A map from protocol, port and slot to address and port.
    NodePortSlots,
    /// Source and destination address.
    AddressPairs,
    /// Addresses.
    Addresses,
    /// Prefixes, as intervals.
    Prefixes,
    /// Address, protocol, port and source prefix, as intervals.
    FrontendSources,
    /// Protocol, port and source prefix, as intervals.
    NodePortSources,
    /// Address, protocol, port and a number.
    FrontendNumbers,
    /// Protocol, port and a number.
    NodePortNumbers,
    /// Address, protocol, port, and an endpoint's address and port.
    FrontendEndpoints,
    /// Protocol, port, and an endpoint's address and port.
    NodePortEndpoints,
    /// A map from client, address, protocol and port to address and port, which packets fill. What they put
    /// there is not part of a program.
    FrontendClients,
    /// A map from client, protocol and port to address and port, which packets fill likewise.
    NodePortClients,
    /// Something that this room does not use. It is only ever observed.
    Unknown,
}

impl SetKind {
    /// Whether elements have values.
    pub fn is_map(self) -> bool {
        matches!(self, SetKind::FrontendSlots | SetKind::NodePortSlots) || self.is_learned()
    }

    /// Whether packets fill it, and not programs.
    pub fn is_learned(self) -> bool {
        matches!(self, SetKind::FrontendClients | SetKind::NodePortClients)
    }

    /// Whether elements stand for all keys from one to another.
    pub fn is_interval(self) -> bool {
        matches!(self, SetKind::Prefixes | SetKind::FrontendSources | SetKind::NodePortSources)
    }

    /// All kinds that a program may hold.
    pub const ALL: [SetKind; 15] = [
        SetKind::Frontends,
        SetKind::NodePorts,
        SetKind::FrontendSlots,
        SetKind::NodePortSlots,
        SetKind::AddressPairs,
        SetKind::Addresses,
        SetKind::Prefixes,
        SetKind::FrontendSources,
        SetKind::NodePortSources,
        SetKind::FrontendNumbers,
        SetKind::NodePortNumbers,
        SetKind::FrontendEndpoints,
        SetKind::NodePortEndpoints,
        SetKind::FrontendClients,
        SetKind::NodePortClients,
    ];
}

/// A set or a map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    /// What its elements are.
    pub kind: SetKind,
    /// The elements.
    #[serde(with = "crate::pairs")]
    pub elements: OrdMap<Key, Element>,
}

impl Set {
    /// A set without elements.
    pub fn empty(kind: SetKind) -> Set {
        Set { kind, elements: OrdMap::new() }
    }
}

/// The key of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Key {
    /// `ipv4_addr . inet_proto . inet_service`.
    Frontend(IpAddr, Protocol, Port),
    /// `inet_proto . inet_service`.
    NodePort(Protocol, Port),
    /// `ipv4_addr . inet_proto . inet_service . slot`.
    FrontendSlot(IpAddr, Protocol, Port, u32),
    /// `inet_proto . inet_service . slot`.
    NodePortSlot(Protocol, Port, u32),
    /// `ipv4_addr . ipv4_addr`.
    AddressPair(IpAddr, IpAddr),
    /// `ipv4_addr`.
    Address(IpAddr),
    /// `ipv4_addr/length`.
    Prefix(IpNet),
    /// `ipv4_addr . inet_proto . inet_service . ipv4_addr/length`.
    FrontendSource(IpAddr, Protocol, Port, IpNet),
    /// `inet_proto . inet_service . ipv4_addr/length`.
    NodePortSource(Protocol, Port, IpNet),
    /// `ipv4_addr . inet_proto . inet_service . ipv4_addr . inet_service`.
    FrontendEndpoint(IpAddr, Protocol, Port, IpAddr, Port),
    /// `inet_proto . inet_service . ipv4_addr . inet_service`.
    NodePortEndpoint(Protocol, Port, IpAddr, Port),
}

impl Key {
    /// Whether it stands for all keys within a prefix. Those of one set must not overlap.
    pub fn is_interval(&self) -> bool {
        matches!(self, Key::Prefix(_) | Key::FrontendSource(..) | Key::NodePortSource(..))
    }
}

/// What a key carries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Element {
    /// The value, in maps.
    pub value: Option<SocketAddr>,
    /// The comment in the kernel, which `nft list` shows.
    pub comment: Option<Arc<str>>,
    /// What caused it. The kernel does not hold it.
    pub origin: Option<Origin>,
}

impl Element {
    /// Whether the kernel holds the same for both.
    pub fn is_same(&self, other: &Element) -> bool {
        self.value == other.value && self.comment == other.comment
    }
}

/// Where a packet is on its way through the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hook {
    /// Before the routing decision.
    Prerouting,
    /// To a process of this node.
    Input,
    /// From one interface to another.
    Forward,
    /// From a process of this node.
    Output,
    /// After the routing decision.
    Postrouting,
}

impl Hook {
    /// The name that `nft` prints.
    pub fn name(self) -> &'static str {
        match self {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        }
    }
}

/// The type of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChainKind {
    /// Every packet.
    Filter,
    /// The first packet of each connection; the kernel treats the others alike.
    Nat,
    /// Output with a new routing decision. It is only ever observed.
    Route,
}

impl ChainKind {
    /// The name that `nft` prints.
    pub fn name(self) -> &'static str {
        match self {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
            ChainKind::Route => "route",
        }
    }
}

/// What makes a chain a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseHook {
    /// Its type.
    pub kind: ChainKind,
    /// Where it is hooked.
    pub hook: Hook,
    /// Lower numbers see packets first.
    pub priority: i32,
    /// Whether packets at its end are accepted. Ours always do; drop is only ever observed.
    pub accepts: bool,
}

/// A chain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// For base chains: where the kernel enters them.
    pub base: Option<BaseHook>,
    /// The rules, in order.
    pub rules: Vec<Rule>,
}

/// A rule: what a packet must be, and what is then done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// All of these must hold.
    pub matches: Vec<Match>,
    /// What is done, in order.
    pub statements: Vec<Statement>,
    /// The comment in the kernel.
    pub comment: Option<Arc<str>>,
    /// What caused it. The kernel does not hold it.
    pub origin: Option<Origin>,
}

impl Rule {
    /// Whether the kernel holds the same for both.
    pub fn is_same(&self, other: &Rule) -> bool {
        self.matches == other.matches && self.statements == other.statements && self.comment == other.comment
    }
}

/// Which fields of a packet are looked up in a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyExpression {
    /// `ip daddr . meta l4proto . th dport`.
    Frontend,
    /// `meta l4proto . th dport`.
    NodePort,
    /// `ip saddr . ip daddr`.
    AddressPair,
    /// `ip saddr`.
    Source,
    /// `ip daddr`.
    Destination,
    /// `ip daddr . meta l4proto . th dport . ip saddr`.
    FrontendSource,
    /// `meta l4proto . th dport . ip saddr`.
    NodePortSource,
}

/// A condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Match {
    /// The fields are in the set, or are not.
    Set {
        /// Which fields.
        key: KeyExpression,
        /// Which set.
        set: Name,
        /// Whether they must be in it.
        inside: bool,
    },
    /// The destination is in the prefix, or is not.
    Destination {
        /// The prefix.
        prefix: IpNet,
        /// Whether it must be in it.
        inside: bool,
    },
    /// `fib daddr type local`.
    DestinationIsLocal,
    /// `fib saddr type local`, or not.
    SourceIsLocal {
        /// Whether it must be.
        inside: bool,
    },
    /// `iifname`: the interface that the packet came by. One that this node sends came by none.
    Interface {
        /// Its name, or what its name starts with.
        name: String,
        /// Whether more may follow.
        is_prefix: bool,
        /// Whether it must be this one.
        inside: bool,
    },
    /// All these bits of the mark are set.
    Mark(u32),
    /// `meta l4proto`.
    Protocol(Protocol),
    /// `ct status dnat`: the connection's destination was translated.
    DestinationTranslated,
    /// `ct state new`: the first packet of a connection.
    NewConnection,
}

/// How a packet is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rejection {
    /// A TCP segment with RST.
    TcpReset,
    /// ICMP or ICMPv6 port unreachable.
    PortUnreachable,
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Statement {
    /// Goes on in another chain and comes back.
    Jump(Name),
    /// Goes on in another chain and does not come back.
    Goto(Name),
    /// Leaves the chain.
    Return,
    /// Loses the packet without a word.
    Drop,
    /// Sets bits of the mark.
    SetMark(u32),
    /// Clears bits of the mark.
    ClearMark(u32),
    /// Translates the destination to what the map holds for the key and a random slot. Where it holds
    /// nothing, the packet goes on to the next rule.
    Balance {
        /// Which fields, [`KeyExpression::Frontend`] or [`KeyExpression::NodePort`].
        key: KeyExpression,
        /// How many slots.
        slots: u32,
        /// The first slot.
        offset: u32,
        /// Which map.
        map: Name,
    },
    /// Translates the destination to the endpoint that the client had before. Where none is remembered, the
    /// packet goes on to the next rule.
    Keep {
        /// Which fields, [`KeyExpression::Frontend`] or [`KeyExpression::NodePort`].
        key: KeyExpression,
        /// The map of clients.
        clients: Name,
    },
    /// Notes for so long to which endpoint the client went, or that it goes there still, if what it connected to
    /// is [`Learned`] and that endpoint lives. It comes after the translation.
    Remember(Learned),
    /// Takes the client out of the map, if what it connected to is [`Learned`] and its endpoint lives no more.
    /// Else the packet goes on to the next rule.
    Forget(Learned),
    /// Replaces the source by the address of the interface, with a random port.
    Masquerade,
    /// Refuses the packet.
    Reject(Rejection),
    /// Something that this room does not use. It is only ever observed.
    Unknown(String),
}

/// Frontends whose clients keep their endpoints. `nft` knows the type of a connection's port only where the
/// protocol is named, so each has its own rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learned {
    /// Which fields, [`KeyExpression::Frontend`] or [`KeyExpression::NodePort`].
    pub key: KeyExpression,
    /// The protocol.
    pub protocol: Protocol,
    /// For how long.
    pub seconds: u32,
    /// The set of frontends and seconds.
    pub timeouts: Name,
    /// The set of endpoints that live.
    pub endpoints: Name,
    /// The map of clients.
    pub clients: Name,
}
