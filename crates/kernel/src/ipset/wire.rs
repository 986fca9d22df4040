//! Sets and their entries as attributes, and back (`linux/netfilter/ipset/ip_set.h`).

use std::net::IpAddr;

use portolan_net::{Family, IpNet, Port, Protocol};
use portolan_program::ipset::{Entry, SetKey, SetKind};
use portolan_program::layout::IpSetName;

use crate::rawnetlink::{Attribute, Attributes, MessageBuilder};

/// `struct nfgenmsg`.
pub(super) const HEADER_LENGTH: usize = 4;

/// `NFNL_SUBSYS_IPSET`.
const SUBSYSTEM: u16 = 6;

/// `IPSET_PROTOCOL_MIN`: what every kernel since 2.6.39 understands.
const PROTOCOL_VERSION: u8 = 6;

/// `NLA_F_NET_BYTEORDER`: without it the kernel refuses numbers.
const NETWORK_ORDER: u16 = 0x4000;

/// How many entries a set may have. kube-proxy's 65,536 are not enough for 50,000 Services of two ports.
const ENTRIES_MAX: u32 = 1 << 20;

/// Buckets of a new set, as kube-proxy has it. It grows.
const BUCKETS: u32 = 1024;

/// `IPSET_CMD_…`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Command {
    Create = 2,
    Destroy = 3,
    Flush = 4,
    List = 7,
    Add = 9,
    Remove = 10,
}

const PROTOCOL: u16 = 1;
const SET_NAME: u16 = 2;
const TYPE_NAME: u16 = 3;
const REVISION: u16 = 4;
const FAMILY: u16 = 5;
const DATA: u16 = 7;
const ENTRIES: u16 = 8;

const DATA_ADDRESS: u16 = 1;
const DATA_PREFIX_LENGTH: u16 = 3;
const DATA_PORT: u16 = 4;
const DATA_PORT_TO: u16 = 5;
const DATA_PROTOCOL: u16 = 7;
const DATA_BUCKETS: u16 = 18;
const DATA_ENTRIES_MAX: u16 = 19;
const DATA_ADDRESS_2: u16 = 20;
const DATA_PREFIX_LENGTH_2: u16 = 21;

const ADDRESS_V4: u16 = 1;
const ADDRESS_V6: u16 = 2;

fn start(command: Command, key: Option<SetKey>) -> MessageBuilder {
    let mut message = MessageBuilder::new(SUBSYSTEM << 8 | u16::from(command as u8), 0);
    let family = key.map_or(libc::AF_UNSPEC as u8, |key| family_number(key.family));
    message.header(&[family, 0, 0, 0]);
    message.put_u8(PROTOCOL, PROTOCOL_VERSION);
    if let Some(key) = key {
        message.put_str(SET_NAME, key.name.name(key.family));
    }
    message
}

/// Asks for all sets with their entries.
pub(super) fn list() -> Vec<u8> {
    start(Command::List, None).finish()
}

/// Removes all entries of a set, or the set.
pub(super) fn about_set(command: Command, key: SetKey) -> Vec<u8> {
    start(command, Some(key)).finish()
}

/// Makes a set. One of the same name and kind is fine.
pub(super) fn create(key: SetKey, kind: &SetKind) -> Vec<u8> {
    let mut message = start(Command::Create, Some(key));
    message.put_str(TYPE_NAME, kind.name());
    message.put_u8(REVISION, revision(kind));
    let family = if *kind == SetKind::BitmapPort { libc::AF_UNSPEC as u8 } else { family_number(key.family) };
    message.put_u8(FAMILY, family);
    message.nested(DATA, |data| {
        if *kind == SetKind::BitmapPort {
            data.put_u16_be(DATA_PORT | NETWORK_ORDER, 0);
            data.put_u16_be(DATA_PORT_TO | NETWORK_ORDER, u16::MAX);
        } else {
            data.put_u32_be(DATA_BUCKETS | NETWORK_ORDER, BUCKETS);
            data.put_u32_be(DATA_ENTRIES_MAX | NETWORK_ORDER, ENTRIES_MAX);
        }
    });
    message.finish()
}

/// The first revision of the type that has what we need: SCTP came with the second of those with ports.
fn revision(kind: &SetKind) -> u8 {
    match kind {
        SetKind::HashIpPort | SetKind::HashIpPortIp | SetKind::HashIpPortNet => 1,
        SetKind::HashIp | SetKind::BitmapPort | SetKind::Other(_) => 0,
    }
}

/// Adds or removes an entry.
pub(super) fn entry(command: Command, key: SetKey, entry: &Entry) -> Vec<u8> {
    let mut message = start(command, Some(key));
    message.nested(DATA, |data| put_entry(data, entry));
    message.finish()
}

fn put_entry(data: &mut MessageBuilder, entry: &Entry) {
    let port = |data: &mut MessageBuilder, protocol: Protocol, port: Port, family: Family| {
        data.put_u16_be(DATA_PORT | NETWORK_ORDER, port.get()).put_u8(DATA_PROTOCOL, protocol.number(family));
    };
    match entry {
        Entry::Ip(address) => put_address(data, DATA_ADDRESS, *address),
        Entry::IpPort(address, protocol, number) => {
            put_address(data, DATA_ADDRESS, *address);
            port(data, *protocol, *number, Family::of(*address));
        }
        Entry::IpPortIp(address, protocol, number, second) => {
            put_address(data, DATA_ADDRESS, *address);
            port(data, *protocol, *number, Family::of(*address));
            put_address(data, DATA_ADDRESS_2, *second);
        }
        Entry::IpPortNet(address, protocol, number, prefix) => {
            put_address(data, DATA_ADDRESS, *address);
            port(data, *protocol, *number, Family::of(*address));
            put_address(data, DATA_ADDRESS_2, prefix.addr());
            data.put_u8(DATA_PREFIX_LENGTH_2, prefix.prefix_len());
        }
        Entry::Port(number) => {
            data.put_u16_be(DATA_PORT | NETWORK_ORDER, number.get());
        }
    }
}

fn put_address(data: &mut MessageBuilder, kind: u16, address: IpAddr) {
    let inner = if address.is_ipv4() { ADDRESS_V4 } else { ADDRESS_V6 };
    data.nested(kind, |into| {
        into.put_address(inner | NETWORK_ORDER, address);
    });
}

fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

/// Part of a set. A long set comes in many parts, of which the first alone names the kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) key: SetKey,
    pub(super) kind: Option<SetKind>,
    pub(super) entries: Vec<Entry>,
}

/// Reads a part of a set; `None` for those of others.
pub(super) fn read_part(attributes: &Attributes<'_>, kind_so_far: Option<&SetKind>) -> Option<Part> {
    let (name, family) = IpSetName::from_name(attributes.get(SET_NAME)?.text()?)?;
    let kind = attributes.get(TYPE_NAME).and_then(|it| it.text()).map(SetKind::observed);
    let mut part = Part { key: SetKey { family, name }, kind, entries: Vec::new() };
    if let (Some(kind), Some(list)) = (part.kind.as_ref().or(kind_so_far), attributes.get(ENTRIES)) {
        part.entries = list.nested().filter_map(|data| read_entry(&data.nested(), kind)).collect();
    }
    Some(part)
}

fn read_entry(data: &Attributes<'_>, kind: &SetKind) -> Option<Entry> {
    let address = |kind: u16| read_address(&data.get(kind)?);
    let port = || Port::try_from(data.get(DATA_PORT)?.u16_be()?).ok();
    let protocol = || Protocol::from_number(data.get(DATA_PROTOCOL)?.u8()?);
    Some(match kind {
        SetKind::HashIp => {
            let address = address(DATA_ADDRESS)?;
            let length = data.get(DATA_PREFIX_LENGTH).and_then(|it| it.u8());
            if length.is_some_and(|length| length != Family::of(address).bits()) {
                return None;
            }
            Entry::Ip(address)
        }
        SetKind::HashIpPort => Entry::IpPort(address(DATA_ADDRESS)?, protocol()?, port()?),
        SetKind::HashIpPortIp => {
            Entry::IpPortIp(address(DATA_ADDRESS)?, protocol()?, port()?, address(DATA_ADDRESS_2)?)
        }
        SetKind::HashIpPortNet => {
            let second = address(DATA_ADDRESS_2)?;
            let whole = Family::of(second).bits();
            let length = data.get(DATA_PREFIX_LENGTH_2).and_then(|it| it.u8()).unwrap_or(whole);
            Entry::IpPortNet(address(DATA_ADDRESS)?, protocol()?, port()?, IpNet::new(second, length).ok()?)
        }
        SetKind::BitmapPort => Entry::Port(port()?),
        SetKind::Other(_) => return None,
    })
}

fn read_address(attribute: &Attribute<'_>) -> Option<IpAddr> {
    let inner = attribute.nested();
    inner.get(ADDRESS_V4).or_else(|| inner.get(ADDRESS_V6))?.address()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rawnetlink::Messages;
    use portolan_program::ipset::kind_of;
    use proptest::prelude::*;

    fn any_entry() -> impl Strategy<Value = (SetKind, Entry)> {
        let address = || prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)];
        let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
        let port = (1u16..).prop_map(|number| Port::try_from(number).unwrap());
        let kind = prop::sample::select(SetKind::ALL.to_vec());
        (kind, address(), protocol, port, address(), 1u8..=32).prop_map(
            |(kind, first, protocol, port, second, length)| {
                let entry = match kind {
                    SetKind::HashIp => Entry::Ip(first),
                    SetKind::HashIpPort => Entry::IpPort(first, protocol, port),
                    SetKind::HashIpPortIp => Entry::IpPortIp(first, protocol, port, second),
                    SetKind::HashIpPortNet => {
                        Entry::IpPortNet(first, protocol, port, IpNet::new(second, length).unwrap().trunc())
                    }
                    SetKind::BitmapPort | SetKind::Other(_) => Entry::Port(port),
                };
                (kind, entry)
            },
        )
    }

    fn key() -> SetKey {
        SetKey { family: Family::V4, name: IpSetName::ClusterIp }
    }

    proptest! {
        #[test]
        fn an_entry_that_is_written_is_read((kind, wanted) in any_entry()) {
            let bytes = entry(Command::Add, key(), &wanted);
            let message = Messages::new(&bytes).next().unwrap();
            let data = message.attributes(HEADER_LENGTH).get(DATA).unwrap();
            prop_assert_eq!(read_entry(&data.nested(), &kind), Some(wanted));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), pick in 0usize..5) {
            let attributes = Attributes::new(&bytes);
            let kind = SetKind::ALL[pick].clone();
            let _ = (read_part(&attributes, Some(&kind)), read_entry(&attributes, &kind));
        }

        #[test]
        fn a_message_with_any_byte_changed_is_read_or_refused((kind, it) in any_entry(), at: prop::sample::Index, to: u8) {
            let mut bytes = entry(Command::Add, key(), &it);
            let position = at.index(bytes.len());
            bytes[position] = to;
            for message in Messages::new(&bytes) {
                let attributes = message.attributes(HEADER_LENGTH);
                let _ = read_part(&attributes, Some(&kind));
                let read = attributes.filter_map(|attribute| read_entry(&attribute.nested(), &kind));
                prop_assert!(read.count() <= 3);
            }
        }
    }

    #[test]
    fn a_new_set_names_itself_and_its_kind() {
        for name in IpSetName::ALL {
            let key = SetKey { family: Family::V6, name };
            let bytes = create(key, &kind_of(name));
            let message = Messages::new(&bytes).next().unwrap();
            let part = read_part(&message.attributes(HEADER_LENGTH), None).unwrap();
            assert_eq!(part, Part { key, kind: Some(kind_of(name)), entries: Vec::new() });
        }
    }
}
