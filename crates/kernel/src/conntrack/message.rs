//! The messages: `struct nfgenmsg` and nested attributes.

use std::net::{IpAddr, SocketAddr};

use portolan_net::Family;

use super::{Count, Entry, Tuple};
use crate::rawnetlink::{Attribute, Attributes, MessageBuilder};

/// `NFNL_SUBSYS_CTNETLINK`.
const SUBSYSTEM: u16 = 1 << 8;

const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const GET_STATISTICS: u16 = SUBSYSTEM | 5;

/// `struct nfgenmsg`: family, version, resource.
const HEADER_LENGTH: usize = 4;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;

const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;

const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;

const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

const CTA_FILTER_ORIG_FLAGS: u16 = 1;
/// `CTA_FILTER_FLAG(CTA_PROTO_NUM)` of the kernel's `nf_conntrack_netlink.c`, which no header exports.
const FILTER_PROTOCOL: u32 = 1 << 3;

const CTA_STATS_GLOBAL_ENTRIES: u16 = 1;
const CTA_STATS_GLOBAL_MAX_ENTRIES: u16 = 2;

/// `IPS_SEEN_REPLY`.
const STATUS_ANSWERED: u32 = 1 << 1;

const UDP: u8 = libc::IPPROTO_UDP as u8;

fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

fn begin(kind: u16, family: u8) -> MessageBuilder {
    let mut builder = MessageBuilder::new(kind, 0);
    builder.header(&[family, 0, 0, 0]);
    builder
}

/// Asks for all UDP entries of a family.
pub(super) fn list_udp(family: Family) -> Vec<u8> {
    let mut builder = begin(GET, family_number(family));
    builder.nested(CTA_TUPLE_ORIG, |tuple| {
        tuple.nested(CTA_TUPLE_PROTO, |protocol| {
            protocol.put_u8(CTA_PROTO_NUM, UDP);
        });
    });
    builder.nested(CTA_FILTER, |filter| {
        filter.put_u32(CTA_FILTER_ORIG_FLAGS, FILTER_PROTOCOL);
    });
    builder.finish()
}

/// Asks for one entry to be deleted.
pub(super) fn delete(entry: &Entry) -> Vec<u8> {
    let mut builder = begin(DELETE, family_number(Family::of(entry.original.destination.ip())));
    builder.nested(CTA_TUPLE_ORIG, |tuple| put_tuple(tuple, &entry.original));
    builder.put_u32_be(CTA_ID, entry.id);
    if entry.zone != 0 {
        builder.put_u16_be(CTA_ZONE, entry.zone);
    }
    builder.finish()
}

/// Asks how many entries there are.
pub(super) fn statistics() -> Vec<u8> {
    begin(GET_STATISTICS, libc::AF_UNSPEC as u8).finish()
}

fn put_tuple(builder: &mut MessageBuilder, tuple: &Tuple) {
    let (source, destination) = match tuple.source {
        SocketAddr::V4(_) => (CTA_IP_V4_SRC, CTA_IP_V4_DST),
        SocketAddr::V6(_) => (CTA_IP_V6_SRC, CTA_IP_V6_DST),
    };
    builder.nested(CTA_TUPLE_IP, |addresses| {
        addresses.put_address(source, tuple.source.ip()).put_address(destination, tuple.destination.ip());
    });
    builder.nested(CTA_TUPLE_PROTO, |protocol| {
        protocol
            .put_u8(CTA_PROTO_NUM, UDP)
            .put_u16_be(CTA_PROTO_SRC_PORT, tuple.source.port())
            .put_u16_be(CTA_PROTO_DST_PORT, tuple.destination.port());
    });
}

/// Reads an entry; `None` if it is not a whole one of UDP.
pub(super) fn read_udp(payload: &[u8]) -> Option<Entry> {
    let attributes = Attributes::new(payload.get(HEADER_LENGTH..)?);
    let status = attributes.get(CTA_STATUS)?.u32_be()?;
    Some(Entry {
        original: read_tuple(&attributes.get(CTA_TUPLE_ORIG)?)?,
        reply: read_tuple(&attributes.get(CTA_TUPLE_REPLY)?)?,
        is_answered: status & STATUS_ANSWERED != 0,
        id: attributes.get(CTA_ID)?.u32_be()?,
        zone: attributes.get(CTA_ZONE).and_then(|zone| zone.u16_be()).unwrap_or_default(),
    })
}

fn read_tuple(tuple: &Attribute<'_>) -> Option<Tuple> {
    let addresses = tuple.nested().get(CTA_TUPLE_IP)?.nested();
    let protocol = tuple.nested().get(CTA_TUPLE_PROTO)?.nested();
    if protocol.get(CTA_PROTO_NUM)?.u8()? != UDP {
        return None;
    }
    let address =
        |kinds: [u16; 2]| -> Option<IpAddr> { kinds.into_iter().find_map(|kind| addresses.get(kind)?.address()) };
    let source = address([CTA_IP_V4_SRC, CTA_IP_V6_SRC])?;
    let destination = address([CTA_IP_V4_DST, CTA_IP_V6_DST])?;
    if Family::of(source) != Family::of(destination) {
        return None;
    }
    Some(Tuple {
        source: SocketAddr::new(source, protocol.get(CTA_PROTO_SRC_PORT)?.u16_be()?),
        destination: SocketAddr::new(destination, protocol.get(CTA_PROTO_DST_PORT)?.u16_be()?),
    })
}

/// Reads the answer to [`statistics`].
pub(super) fn read_count(payload: &[u8]) -> Option<Count> {
    let attributes = Attributes::new(payload.get(HEADER_LENGTH..)?);
    let number = |kind| attributes.get(kind).and_then(|it| it.u32_be());
    Some(Count { entries: number(CTA_STATS_GLOBAL_ENTRIES)?, most: number(CTA_STATS_GLOBAL_MAX_ENTRIES) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rawnetlink::Messages;
    use proptest::prelude::*;

    /// What the kernel would send for an entry.
    fn sent(entry: &Entry) -> Vec<u8> {
        let mut builder = begin(GET, family_number(Family::of(entry.original.source.ip())));
        builder.nested(CTA_TUPLE_ORIG, |tuple| put_tuple(tuple, &entry.original));
        builder.nested(CTA_TUPLE_REPLY, |tuple| put_tuple(tuple, &entry.reply));
        let status = if entry.is_answered { STATUS_ANSWERED } else { 0 };
        builder.put_u32_be(CTA_STATUS, status | 1 << 3).put_u32_be(CTA_ID, entry.id);
        if entry.zone != 0 {
            builder.put_u16_be(CTA_ZONE, entry.zone);
        }
        builder.finish()
    }

    fn payload(message: &[u8]) -> Vec<u8> {
        Messages::new(message).next().unwrap().payload.to_vec()
    }

    fn any_tuple(is_v6: bool) -> impl Strategy<Value = Tuple> {
        let end = move || {
            (any::<[u8; 16]>(), any::<u16>()).prop_map(move |(bytes, port)| {
                let short = [bytes[0], bytes[1], bytes[2], bytes[3]];
                let address = if is_v6 { IpAddr::from(bytes) } else { IpAddr::from(short) };
                SocketAddr::new(address, port)
            })
        };
        (end(), end()).prop_map(|(source, destination)| Tuple { source, destination })
    }

    fn any_entry() -> impl Strategy<Value = Entry> {
        let of = |is_v6| (any_tuple(is_v6), any_tuple(is_v6), any::<bool>(), any::<u32>(), any::<u16>());
        prop_oneof![of(false), of(true)].prop_map(|(original, reply, is_answered, id, zone)| Entry {
            original,
            reply,
            is_answered,
            id,
            zone,
        })
    }

    proptest! {
        #[test]
        fn an_entry_is_read_as_it_is_sent(entry in any_entry()) {
            prop_assert_eq!(read_udp(&payload(&sent(&entry))), Some(entry));
        }

        #[test]
        fn a_deletion_names_the_tuple_the_number_and_the_zone(entry in any_entry()) {
            let payload = payload(&delete(&entry));
            let attributes = Attributes::new(&payload[HEADER_LENGTH..]);
            prop_assert_eq!(read_tuple(&attributes.get(CTA_TUPLE_ORIG).unwrap()), Some(entry.original));
            prop_assert_eq!(attributes.get(CTA_ID).unwrap().u32_be(), Some(entry.id));
            prop_assert_eq!(attributes.get(CTA_ZONE).map_or(Some(0), |zone| zone.u16_be()), Some(entry.zone));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = (read_udp(&bytes), read_count(&bytes));
        }
    }
}
