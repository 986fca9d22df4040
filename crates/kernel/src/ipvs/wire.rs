//! Virtual and real servers as attributes, and back (`linux/ip_vs.h`, generic netlink family `IPVS`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use portolan_net::{Port, Protocol};
use portolan_program::ipvs::{
    Forwarding, RealKey, RealServer, Scheduler, ServerKey, SourceHash, Timeouts, VirtualServer,
};

use crate::rawnetlink::{Attributes, MessageBuilder};

/// `struct genlmsghdr`.
pub(super) const HEADER_LENGTH: usize = 4;

/// `GENL_ID_CTRL`: the family that knows the others by name.
const CONTROL_FAMILY: u16 = 16;
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_FAMILY_ID: u16 = 1;
const CONTROL_FAMILY_NAME: u16 = 2;

/// `IPVS_GENL_VERSION`.
const VERSION: u8 = 1;

/// `IPVS_CMD_…`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Command {
    NewService = 1,
    SetService = 2,
    DeleteService = 3,
    GetService = 4,
    NewDestination = 5,
    SetDestination = 6,
    DeleteDestination = 7,
    GetDestination = 8,
    SetConfiguration = 12,
    GetConfiguration = 13,
}

const ATTRIBUTE_SERVICE: u16 = 1;
const ATTRIBUTE_DESTINATION: u16 = 2;
const TIMEOUT_TCP: u16 = 4;
const TIMEOUT_TCP_FIN: u16 = 5;
const TIMEOUT_UDP: u16 = 6;

const SERVICE_FAMILY: u16 = 1;
const SERVICE_PROTOCOL: u16 = 2;
const SERVICE_ADDRESS: u16 = 3;
const SERVICE_PORT: u16 = 4;
const SERVICE_SCHEDULER: u16 = 6;
const SERVICE_FLAGS: u16 = 7;
const SERVICE_TIMEOUT: u16 = 8;
const SERVICE_NETMASK: u16 = 9;

const DESTINATION_ADDRESS: u16 = 1;
const DESTINATION_PORT: u16 = 2;
const DESTINATION_FORWARDING: u16 = 3;
const DESTINATION_WEIGHT: u16 = 4;
const DESTINATION_UPPER_THRESHOLD: u16 = 5;
const DESTINATION_LOWER_THRESHOLD: u16 = 6;
const DESTINATION_ACTIVE: u16 = 7;
const DESTINATION_INACTIVE: u16 = 8;
const DESTINATION_FAMILY: u16 = 11;

/// `IP_VS_SVC_F_PERSISTENT`.
const FLAG_PERSISTENT: u32 = 0x1;
/// `IP_VS_SVC_F_SCHED1`.
const FLAG_FALLBACK: u32 = 0x8;
/// `IP_VS_SVC_F_SCHED2`.
const FLAG_PORT: u32 = 0x10;

/// `IP_VS_CONN_F_FWD_MASK`.
const FORWARDING_MASK: u32 = 0x7;

/// Asks for the number of the family `IPVS`.
pub(super) fn get_family() -> Vec<u8> {
    let mut message = MessageBuilder::new(CONTROL_FAMILY, 0);
    message.header(&[CONTROL_GET_FAMILY, 1, 0, 0]);
    message.put_str(CONTROL_FAMILY_NAME, "IPVS");
    message.finish()
}

/// The number of the family, from the answer.
pub(super) fn family_id(attributes: &Attributes<'_>) -> Option<u16> {
    attributes.get(CONTROL_FAMILY_ID)?.u16()
}

fn start(family: u16, command: Command) -> MessageBuilder {
    let mut message = MessageBuilder::new(family, 0);
    message.header(&[command as u8, VERSION, 0, 0]);
    message
}

/// Asks for something that needs no argument: all virtual servers, the timeouts.
pub(super) fn ask(family: u16, command: Command) -> Vec<u8> {
    start(family, command).finish()
}

/// Asks for the real servers of a virtual server, or removes it.
pub(super) fn about_service(family: u16, command: Command, key: &ServerKey) -> Vec<u8> {
    let mut message = start(family, command);
    message.nested(ATTRIBUTE_SERVICE, |into| put_service_key(into, key));
    message.finish()
}

/// Makes or changes a virtual server.
pub(super) fn put_service(family: u16, command: Command, key: &ServerKey, server: &VirtualServer) -> Vec<u8> {
    let mut message = start(family, command);
    message.nested(ATTRIBUTE_SERVICE, |into| {
        put_service_key(into, key);
        into.put_str(SERVICE_SCHEDULER, server.scheduler.name());
        let set = [
            (server.persistence_seconds.is_some(), FLAG_PERSISTENT),
            (server.source_hash.fallback, FLAG_FALLBACK),
            (server.source_hash.port, FLAG_PORT),
        ];
        let flags: u32 = set.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum();
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&flags.to_ne_bytes());
        bytes[4..].copy_from_slice(&(FLAG_PERSISTENT | FLAG_FALLBACK | FLAG_PORT).to_ne_bytes());
        into.put_bytes(SERVICE_FLAGS, &bytes);
        into.put_u32(SERVICE_TIMEOUT, server.persistence_seconds.unwrap_or(0));
        put_netmask(into, key, server.client_bits);
    });
    message.finish()
}

/// A mask in network byte order for IPv4, a length for IPv6.
fn put_netmask(into: &mut MessageBuilder, key: &ServerKey, bits: u8) {
    if key.address.is_ipv4() {
        let mask = u32::MAX.checked_shl(32 - u32::from(bits.min(32))).unwrap_or(0);
        into.put_u32_be(SERVICE_NETMASK, mask);
    } else {
        into.put_u32(SERVICE_NETMASK, u32::from(bits));
    }
}

/// Makes or changes a real server.
pub(super) fn put_destination(family: u16, command: Command, key: &ServerKey, real: &RealServer) -> Vec<u8> {
    destination(family, command, key, &real.key, |into| {
        let forwarding = match real.forwarding {
            Forwarding::Masquerade => 0,
            Forwarding::Local => 1,
            Forwarding::Tunnel => 2,
            Forwarding::Direct => 3,
            Forwarding::Other(number) => number & FORWARDING_MASK,
        };
        into.put_u32(DESTINATION_FORWARDING, forwarding).put_u32(DESTINATION_WEIGHT, real.weight);
        into.put_u32(DESTINATION_UPPER_THRESHOLD, 0).put_u32(DESTINATION_LOWER_THRESHOLD, 0);
    })
}

/// Removes a real server.
pub(super) fn delete_destination(family: u16, key: &ServerKey, real: &RealKey) -> Vec<u8> {
    destination(family, Command::DeleteDestination, key, real, |_| {})
}

fn destination(
    family: u16,
    command: Command,
    key: &ServerKey,
    real: &RealKey,
    settings: impl FnOnce(&mut MessageBuilder),
) -> Vec<u8> {
    let mut message = start(family, command);
    message.nested(ATTRIBUTE_SERVICE, |into| put_service_key(into, key));
    message.nested(ATTRIBUTE_DESTINATION, |into| {
        put_address(into, DESTINATION_ADDRESS, real.address);
        into.put_u16_be(DESTINATION_PORT, real.port.get());
        into.put_u16(DESTINATION_FAMILY, family_number(real.address));
        settings(into);
    });
    message.finish()
}

/// Sets how long connections are remembered. The kernel takes all three; 0 leaves one as it is.
pub(super) fn set_timeouts(family: u16, timeouts: &Timeouts) -> Vec<u8> {
    let mut message = start(family, Command::SetConfiguration);
    for (kind, seconds) in
        [(TIMEOUT_TCP, timeouts.tcp), (TIMEOUT_TCP_FIN, timeouts.tcp_fin), (TIMEOUT_UDP, timeouts.udp)]
    {
        message.put_u32(kind, seconds.unwrap_or(0));
    }
    message.finish()
}

fn put_service_key(into: &mut MessageBuilder, key: &ServerKey) {
    into.put_u16(SERVICE_FAMILY, family_number(key.address));
    into.put_u16(SERVICE_PROTOCOL, key.protocol.number(key.family()).into());
    put_address(into, SERVICE_ADDRESS, key.address);
    into.put_u16_be(SERVICE_PORT, key.port.get());
}

/// `union nf_inet_addr`: sixteen bytes for both families.
fn put_address(into: &mut MessageBuilder, kind: u16, address: IpAddr) {
    let mut bytes = [0; 16];
    match address {
        IpAddr::V4(address) => bytes[..4].copy_from_slice(&address.octets()),
        IpAddr::V6(address) => bytes = address.octets(),
    }
    into.put_bytes(kind, &bytes);
}

fn family_number(address: IpAddr) -> u16 {
    if address.is_ipv4() { libc::AF_INET as u16 } else { libc::AF_INET6 as u16 }
}

/// A virtual server without its real servers; `None` for those that are named by a mark, or that cannot be ours.
pub(super) fn read_service(attributes: &Attributes<'_>) -> Option<(ServerKey, VirtualServer)> {
    let inner = attributes.get(ATTRIBUTE_SERVICE)?.nested();
    let family = inner.get(SERVICE_FAMILY)?.u16()?;
    let address = read_address(&inner, SERVICE_ADDRESS, family)?;
    let protocol = Protocol::from_number(u8::try_from(inner.get(SERVICE_PROTOCOL)?.u16()?).ok()?)?;
    let port = Port::try_from(inner.get(SERVICE_PORT)?.u16_be()?).ok()?;
    // The kernel sends flags and a mask of those that count.
    let flags = inner.get(SERVICE_FLAGS)?.u32()?;
    let is_set = |flag: u32| flags & flag != 0;
    let netmask = inner.get(SERVICE_NETMASK)?;
    let client_bits =
        if address.is_ipv4() { netmask.u32_be()?.leading_ones() as u8 } else { u8::try_from(netmask.u32()?).ok()? };
    let server = VirtualServer {
        scheduler: Scheduler::observed(inner.get(SERVICE_SCHEDULER)?.text()?),
        persistence_seconds: inner.get(SERVICE_TIMEOUT)?.u32().filter(|_| is_set(FLAG_PERSISTENT)),
        client_bits,
        source_hash: SourceHash { fallback: is_set(FLAG_FALLBACK), port: is_set(FLAG_PORT) },
        real: Arc::new([]),
        origin: None,
    };
    Some((ServerKey { protocol, address, port }, server))
}

/// A real server and how many connections it has, active and inactive together.
pub(super) fn read_destination(attributes: &Attributes<'_>, server: &ServerKey) -> Option<(RealServer, u32)> {
    let inner = attributes.get(ATTRIBUTE_DESTINATION)?.nested();
    let family = inner.get(DESTINATION_FAMILY).and_then(|it| it.u16());
    let family = family.unwrap_or_else(|| family_number(server.address));
    let address = read_address(&inner, DESTINATION_ADDRESS, family)?;
    let port = Port::try_from(inner.get(DESTINATION_PORT)?.u16_be()?).ok()?;
    let forwarding = match inner.get(DESTINATION_FORWARDING)?.u32()? & FORWARDING_MASK {
        0 => Forwarding::Masquerade,
        1 => Forwarding::Local,
        2 => Forwarding::Tunnel,
        3 => Forwarding::Direct,
        other => Forwarding::Other(other),
    };
    let weight = inner.get(DESTINATION_WEIGHT)?.u32()?;
    let count = |kind: u16| inner.get(kind).and_then(|it| it.u32()).unwrap_or(0);
    let connections = count(DESTINATION_ACTIVE).saturating_add(count(DESTINATION_INACTIVE));
    Some((RealServer { key: RealKey { address, port }, weight, forwarding, origin: None }, connections))
}

/// The timeouts, as the kernel has them.
pub(super) fn read_timeouts(attributes: &Attributes<'_>) -> Timeouts {
    let seconds = |kind: u16| attributes.get(kind).and_then(|it| it.u32());
    Timeouts { tcp: seconds(TIMEOUT_TCP), tcp_fin: seconds(TIMEOUT_TCP_FIN), udp: seconds(TIMEOUT_UDP) }
}

fn read_address(attributes: &Attributes<'_>, kind: u16, family: u16) -> Option<IpAddr> {
    let bytes = attributes.get(kind)?.value;
    match i32::from(family) {
        libc::AF_INET => bytes.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets).into()),
        libc::AF_INET6 => bytes.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rawnetlink::Messages;
    use proptest::prelude::*;

    fn any_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
    }

    fn any_port() -> impl Strategy<Value = Port> {
        (1u16..).prop_map(|number| Port::try_from(number).unwrap())
    }

    fn any_key() -> impl Strategy<Value = ServerKey> {
        let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
        (protocol, any_address(), any_port()).prop_map(|(protocol, address, port)| ServerKey {
            protocol,
            address,
            port,
        })
    }

    fn any_server() -> impl Strategy<Value = (ServerKey, VirtualServer)> {
        let scheduler = prop::sample::select(Scheduler::ALL.to_vec());
        let settings = (scheduler, any::<Option<u32>>(), 0u8..=32, any::<bool>(), any::<bool>());
        (any_key(), settings).prop_map(|(key, (scheduler, persistence_seconds, client_bits, fallback, port))| {
            let source_hash = SourceHash { fallback, port };
            let real = Arc::new([]);
            (key, VirtualServer { scheduler, persistence_seconds, client_bits, source_hash, real, origin: None })
        })
    }

    proptest! {
        #[test]
        fn a_virtual_server_that_is_written_is_read((key, server) in any_server()) {
            let bytes = put_service(20, Command::NewService, &key, &server);
            let message = Messages::new(&bytes).next().unwrap();
            prop_assert_eq!(read_service(&message.attributes(HEADER_LENGTH)), Some((key, server)));
        }

        #[test]
        fn a_real_server_that_is_written_is_read(
            key in any_key(), address in any_address(), port in any_port(), weight: u32, method in 0u32..8
        ) {
            let forwarding = match method {
                0 => Forwarding::Masquerade,
                1 => Forwarding::Local,
                2 => Forwarding::Tunnel,
                3 => Forwarding::Direct,
                other => Forwarding::Other(other),
            };
            let real = RealServer { key: RealKey { address, port }, weight, forwarding, origin: None };
            let bytes = put_destination(20, Command::NewDestination, &key, &real);
            let message = Messages::new(&bytes).next().unwrap();
            prop_assert_eq!(read_destination(&message.attributes(HEADER_LENGTH), &key), Some((real, 0)));
        }

        #[test]
        fn timeouts_that_are_written_are_read(tcp: u32, tcp_fin: u32, udp: u32) {
            let timeouts = Timeouts { tcp: Some(tcp), tcp_fin: Some(tcp_fin), udp: Some(udp) };
            let bytes = set_timeouts(20, &timeouts);
            let message = Messages::new(&bytes).next().unwrap();
            prop_assert_eq!(read_timeouts(&message.attributes(HEADER_LENGTH)), timeouts);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), key in any_key()) {
            let attributes = Attributes::new(&bytes);
            let _ = (read_service(&attributes), read_destination(&attributes, &key), read_timeouts(&attributes));
            let _ = family_id(&attributes);
        }

        #[test]
        fn a_message_with_any_byte_changed_is_read_or_refused((key, server) in any_server(), at: prop::sample::Index, to: u8) {
            let mut bytes = put_service(20, Command::NewService, &key, &server);
            let position = at.index(bytes.len());
            bytes[position] = to;
            for message in Messages::new(&bytes) {
                let _ = read_service(&message.attributes(HEADER_LENGTH));
            }
        }
    }
}
