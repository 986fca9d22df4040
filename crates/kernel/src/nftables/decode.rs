//! Netlink messages to a program: only our tables, and of them everything.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use portolan_net::{Family, Port, Protocol};
use portolan_program::nftables::{
    BaseHook, Chain, Element, Key, Name, Rule, Set, SetKind, Statement, Table, TableKey, TableName,
};

use super::constants::{FAMILY_IPV4, FAMILY_IPV6, HEADER_LENGTH, chain, data, element, rule, set, table};
use super::encode::{chain_kind_of, hook_of};
use super::expression::Expression;
use super::rules::from_expressions;
use super::set_types::{comment_of, kind_of};
use crate::rawnetlink::{Attribute, Attributes, OwnedMessage};

/// The tables of a dump that are ours.
pub(super) fn tables(messages: &[OwnedMessage]) -> BTreeMap<TableKey, Table> {
    let ours = messages.iter().filter_map(|message| table_key(message, table::NAME));
    ours.map(|key| (key, Table::default())).collect()
}

/// Which of our tables a message is about.
pub(super) fn table_key(message: &OwnedMessage, attribute: u16) -> Option<TableKey> {
    let family = match message.header::<HEADER_LENGTH>()?[0] {
        FAMILY_IPV4 => Family::V4,
        FAMILY_IPV6 => Family::V6,
        _ => return None,
    };
    let text = message.attributes(HEADER_LENGTH).get(attribute)?.text()?;
    TableName::ALL.into_iter().find(|name| name.as_str() == text).map(|name| TableKey { family, name })
}

/// A set without its elements.
pub(super) fn read_set(message: &OwnedMessage) -> Option<(TableKey, Name, Set)> {
    let key = table_key(message, set::TABLE)?;
    let attributes = message.attributes(HEADER_LENGTH);
    let name = attributes.get(set::NAME)?.text()?;
    let number = |kind: u16| attributes.get(kind).and_then(|it| it.u32_be()).unwrap_or(0);
    let kind = kind_of(
        key.family,
        number(set::FLAGS),
        (number(set::KEY_TYPE), number(set::KEY_LENGTH)),
        (number(set::DATA_TYPE), number(set::DATA_LENGTH)),
    );
    Some((key, name.into(), Set::empty(kind)))
}

/// A chain without its rules.
pub(super) fn read_chain(message: &OwnedMessage) -> Option<(TableKey, Name, Chain)> {
    let key = table_key(message, chain::TABLE)?;
    let attributes = message.attributes(HEADER_LENGTH);
    let name = attributes.get(chain::NAME)?.text()?;
    let base = attributes.get(chain::HOOK).and_then(|hook| {
        let hook = hook.nested();
        Some(BaseHook {
            kind: chain_kind_of(attributes.get(chain::TYPE)?.text()?)?,
            hook: hook_of(hook.get(chain::HOOK_NUMBER)?.u32_be()?)?,
            priority: hook.get(chain::HOOK_PRIORITY)?.u32_be()?.cast_signed(),
            accepts: attributes.get(chain::POLICY).and_then(|it| it.u32_be()) != Some(0),
        })
    });
    Some((key, name.into(), Chain { base, rules: Vec::new() }))
}

/// A rule and its chain.
pub(super) fn read_rule(message: &OwnedMessage) -> Option<(TableKey, Name, Rule)> {
    let key = table_key(message, rule::TABLE)?;
    let attributes = message.attributes(HEADER_LENGTH);
    let name = attributes.get(rule::CHAIN)?.text()?;
    let list = attributes.get(rule::EXPRESSIONS).map_or(Attributes::new(&[]), |it| it.nested());
    let mut expressions: Vec<Expression> = list.map(|it| Expression::read(&it)).collect();
    expressions.retain(|expression| *expression != Expression::Nothing);
    let mut rule = from_expressions(key.family, &expressions);
    rule.comment = attributes.get(rule::USER_DATA).and_then(|it| comment_of(it.value)).map(Into::into);
    if expressions.is_empty() {
        rule.statements.push(Statement::Unknown("nothing".to_owned()));
    }
    Some((key, name.into(), rule))
}

/// The number that the kernel gave a rule.
pub(super) fn handle_of(message: &OwnedMessage) -> Option<u64> {
    message.attributes(HEADER_LENGTH).get(rule::HANDLE)?.u64_be()
}

/// The elements of a set, read from a dump as it arrives.
pub(super) struct ElementReader {
    family: Family,
    /// What they are; unknown from the first element on that is not understood.
    kind: SetKind,
    edges: Vec<Edge>,
    read: Vec<(Key, Element)>,
}

impl ElementReader {
    pub(super) fn new(family: Family, kind: SetKind) -> ElementReader {
        ElementReader { family, kind, edges: Vec::new(), read: Vec::new() }
    }

    /// Takes one message of the dump.
    pub(super) fn take(&mut self, attributes: &Attributes<'_>) {
        let list = attributes.get(element::LIST_ELEMENTS);
        for attributes in list.iter().flat_map(Attribute::nested).map(|it| it.nested()) {
            let is_read = match self.kind {
                SetKind::Unknown => return,
                SetKind::Prefixes => read_edge(&attributes).map(|edge| self.edges.push(edge)),
                kind => read_element(self.family, kind, &attributes).map(|found| self.read.push(found)),
            };
            if is_read.is_none() {
                self.kind = SetKind::Unknown;
            }
        }
    }

    /// Puts them into their set.
    pub(super) fn finish(mut self, into: &mut Set) {
        if self.kind == SetKind::Prefixes {
            match intervals(self.family, self.edges) {
                Some(prefixes) => self.read = prefixes,
                None => self.kind = SetKind::Unknown,
            }
        }
        into.kind = self.kind;
        if self.kind != SetKind::Unknown {
            // Sorted input makes the tree compact.
            self.read.sort_unstable_by_key(|(key, _)| *key);
            into.elements = self.read.into_iter().collect();
        }
    }
}

/// Of a message with clients that packets put into a map, the keys of those that are remembered for one of these
/// endpoints of frontends.
pub(super) fn clients_of(family: Family, attributes: &Attributes<'_>, gone: &BTreeSet<Key>) -> Vec<Vec<u8>> {
    let list = attributes.get(element::LIST_ELEMENTS);
    let elements = list.iter().flat_map(Attribute::nested).map(|it| it.nested());
    let found = elements.filter_map(|attributes| {
        let bytes = value_of(attributes.get(element::KEY))?;
        let mut value = Reader { family, bytes: value_of(attributes.get(element::DATA))? };
        let (to, to_port) = (value.address()?, value.port()?);
        let mut key = Reader { family, bytes };
        // The client's own address comes first.
        key.address()?;
        let is_address = key.bytes.len() > 8;
        let address = if is_address { Some(key.address()?) } else { None };
        let (protocol, port) = (key.protocol()?, key.port()?);
        let endpoint = match address {
            Some(address) => Key::FrontendEndpoint(address, protocol, port, to, to_port),
            None => Key::NodePortEndpoint(protocol, port, to, to_port),
        };
        gone.contains(&endpoint).then(|| bytes.to_vec())
    });
    found.collect()
}

fn value_of(attribute: Option<Attribute<'_>>) -> Option<&[u8]> {
    attribute?.nested().get(data::VALUE).map(|it| it.value)
}

fn read_element(family: Family, kind: SetKind, attributes: &Attributes<'_>) -> Option<(Key, Element)> {
    let mut reader = Reader { family, bytes: value_of(attributes.get(element::KEY))? };
    let key = match kind {
        SetKind::Frontends => Key::Frontend(reader.address()?, reader.protocol()?, reader.port()?),
        SetKind::NodePorts => Key::NodePort(reader.protocol()?, reader.port()?),
        SetKind::FrontendSlots => {
            Key::FrontendSlot(reader.address()?, reader.protocol()?, reader.port()?, reader.slot()?)
        }
        SetKind::NodePortSlots => Key::NodePortSlot(reader.protocol()?, reader.port()?, reader.slot()?),
        SetKind::FrontendNumbers => {
            Key::FrontendSlot(reader.address()?, reader.protocol()?, reader.port()?, reader.slot()?)
        }
        SetKind::NodePortNumbers => Key::NodePortSlot(reader.protocol()?, reader.port()?, reader.slot()?),
        SetKind::AddressPairs => Key::AddressPair(reader.address()?, reader.address()?),
        SetKind::Addresses => Key::Address(reader.address()?),
        SetKind::FrontendSources => {
            let (address, protocol, port) = (reader.address()?, reader.protocol()?, reader.port()?);
            Key::FrontendSource(address, protocol, port, reader.interval(value_of(attributes.get(element::KEY_END))?)?)
        }
        SetKind::NodePortSources => {
            let (protocol, port) = (reader.protocol()?, reader.port()?);
            Key::NodePortSource(protocol, port, reader.interval(value_of(attributes.get(element::KEY_END))?)?)
        }
        SetKind::FrontendEndpoints => {
            let (address, protocol, port) = (reader.address()?, reader.protocol()?, reader.port()?);
            Key::FrontendEndpoint(address, protocol, port, reader.address()?, reader.port()?)
        }
        SetKind::NodePortEndpoints => {
            let (protocol, port) = (reader.protocol()?, reader.port()?);
            Key::NodePortEndpoint(protocol, port, reader.address()?, reader.port()?)
        }
        SetKind::Prefixes | SetKind::FrontendClients | SetKind::NodePortClients | SetKind::Unknown => return None,
    };
    let value = if kind.is_map() {
        let mut reader = Reader { family, bytes: value_of(attributes.get(element::DATA))? };
        Some(SocketAddr::new(reader.address()?, reader.port()?.get()))
    } else {
        None
    };
    Some((key, Element { value, comment: comment(attributes), origin: None }))
}

fn comment(attributes: &Attributes<'_>) -> Option<std::sync::Arc<str>> {
    attributes.get(element::USER_DATA).and_then(|it| comment_of(it.value)).map(Into::into)
}

/// A start or an end of an interval.
struct Edge {
    address: u128,
    is_start: bool,
    element: Element,
}

fn read_edge(attributes: &Attributes<'_>) -> Option<Edge> {
    let bytes = value_of(attributes.get(element::KEY))?;
    let address = match *bytes {
        [a, b, c, d] => u32::from_be_bytes([a, b, c, d]).into(),
        _ => u128::from_be_bytes(bytes.try_into().ok()?),
    };
    let flags = attributes.get(element::FLAGS).and_then(|it| it.u32_be()).unwrap_or(0);
    let is_start = flags & element::FLAG_INTERVAL_END == 0;
    Some(Edge { address, is_start, element: Element { comment: comment(attributes), ..Element::default() } })
}

/// Joins starts and ends. An end without a start is what `nft` writes for the space before the first.
fn intervals(family: Family, mut edges: Vec<Edge>) -> Option<Vec<(Key, Element)>> {
    edges.sort_by_key(|edge| (edge.address, edge.is_start));
    let mut found = Vec::new();
    let mut edges = edges.into_iter().peekable();
    while let Some(edge) = edges.next() {
        if !edge.is_start {
            continue;
        }
        let end = edges.peek().map(|next| next.address);
        found.push((Key::Prefix(prefix(family, edge.address, end)?), edge.element));
    }
    Some(found)
}

/// The prefix from one address to before another, if it is one.
fn prefix(family: Family, start: u128, end: Option<u128>) -> Option<IpNet> {
    let bits = u32::from(family.bits());
    let largest = u128::MAX >> (128 - bits);
    let last = end.map_or(Some(largest), |end| end.checked_sub(1))?;
    let free = (start ^ last).checked_ilog2().map_or(0, |highest| highest + 1);
    let low = if free == 128 { u128::MAX } else { (1 << free) - 1 };
    if start & low != 0 || last & low != low {
        return None;
    }
    let address = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(u32::try_from(start).ok()?)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(start)),
    };
    IpNet::new(address, u8::try_from(bits - free).ok()?).ok()
}

/// Reads the fields of a key: each starts at a multiple of four bytes.
struct Reader<'a> {
    family: Family,
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn word(&mut self) -> Option<[u8; 4]> {
        let (word, rest) = self.bytes.split_first_chunk()?;
        self.bytes = rest;
        Some(*word)
    }

    fn address(&mut self) -> Option<IpAddr> {
        match self.family {
            Family::V4 => self.word().map(|octets| Ipv4Addr::from(octets).into()),
            Family::V6 => {
                let (octets, rest) = self.bytes.split_first_chunk::<16>()?;
                self.bytes = rest;
                Some(Ipv6Addr::from(*octets).into())
            }
        }
    }

    fn protocol(&mut self) -> Option<Protocol> {
        Protocol::from_number(self.word()?[0])
    }

    fn port(&mut self) -> Option<Port> {
        let [high, low, ..] = self.word()?;
        Port::try_from(u16::from_be_bytes([high, low])).ok()
    }

    /// The prefix at the end of an interval's first key, given its last key. All before it is one value alone.
    fn interval(&mut self, last: &[u8]) -> Option<IpNet> {
        let start = self.bytes;
        let at = last.len().checked_sub(start.len())?;
        let number = |bytes: &[u8]| bytes.iter().fold(0u128, |number, byte| number << 8 | u128::from(*byte));
        self.address()?;
        let end = number(last.get(at..)?).checked_add(1);
        prefix(self.family, number(start), end)
    }

    fn slot(&mut self) -> Option<u32> {
        self.word().map(u32::from_ne_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_message_is_read_or_passed_over(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let message = OwnedMessage { kind: 0, flags: 0, payload };
            let _ = (read_set(&message), read_chain(&message), read_rule(&message));
            clients_of(Family::V6, &message.attributes(HEADER_LENGTH), &BTreeSet::new());
            for kind in SetKind::ALL {
                let mut reader = ElementReader::new(Family::V6, kind);
                reader.take(&message.attributes(HEADER_LENGTH));
                reader.finish(&mut Set::empty(kind));
            }
        }

        #[test]
        fn a_prefix_is_found_again(bits: u32, length in 0u8..=32) {
            let net = ipnet::Ipv4Net::new(bits.into(), length).unwrap().trunc();
            let end = u32::from(net.broadcast()).checked_add(1).map(u128::from);
            prop_assert_eq!(prefix(Family::V4, u32::from(net.network()).into(), end), Some(IpNet::V4(net)));
        }
    }

    #[test]
    fn an_interval_that_is_no_prefix_is_none() {
        assert_eq!(prefix(Family::V4, 1, Some(4)), None);
        assert_eq!(prefix(Family::V6, 0, None), "::/0".parse().ok());
    }
}
