//! Typed rules to the kernel's expressions and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portolan_net::{Family, Protocol};
use portolan_program::nftables::{KeyExpression, Match, Name, Rejection, Rule, Statement};

use super::composite;
use super::constants::{FAMILY_IPV4, FAMILY_IPV6, verdict};
use super::expression::{Expression, FIRST_REGISTER};

const NETWORK_HEADER: u32 = 1;
pub(super) const TRANSPORT_HEADER: u32 = 2;

/// `NFT_META_MARK`, `NFT_META_IIFNAME`, `NFT_META_L4PROTO`.
const META_MARK: u32 = 3;
const META_INTERFACE: u32 = 6;
pub(super) const META_PROTOCOL: u32 = 16;

/// `IFNAMSIZ`: names are shorter, and the rest is NUL.
const INTERFACE_LENGTH: usize = 16;

/// `NFT_CT_STATE`, `NFT_CT_STATUS`, and the bits `IP_CT_NEW` (as state mask) and `IPS_DST_NAT`.
const CONNECTION_STATE: u32 = 0;
const CONNECTION_STATUS: u32 = 2;
const STATE_NEW: u32 = 8;
const STATUS_DESTINATION_NAT: u32 = 32;

/// `NFT_FIB_RESULT_ADDRTYPE`, `NFTA_FIB_F_SADDR`, `NFTA_FIB_F_DADDR`, `RTN_LOCAL`.
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_SOURCE: u32 = 1;
const FIB_DESTINATION: u32 = 2;
const ROUTE_LOCAL: u32 = 2;

/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
const FULLY_RANDOM: u32 = 16;

/// `NFT_REJECT_ICMP_UNREACH`, `NFT_REJECT_TCP_RST`, and "port unreachable" of either family.
const REJECT_ICMP: u32 = 0;
const REJECT_TCP_RESET: u32 = 1;
const PORT_UNREACHABLE_V4: u8 = 3;
const PORT_UNREACHABLE_V6: u8 = 4;

/// The instructions of a rule.
pub(super) fn to_expressions(family: Family, rule: &Rule) -> Vec<Expression> {
    let mut list = Vec::new();
    rule.matches.iter().for_each(|condition| write_match(family, condition, &mut list));
    rule.statements.iter().for_each(|statement| write_statement(family, statement, &mut list));
    list
}

pub(super) fn source(family: Family) -> (u32, u32) {
    match family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    }
}

pub(super) fn destination(family: Family) -> (u32, u32) {
    match family {
        Family::V4 => (16, 4),
        Family::V6 => (24, 16),
    }
}

pub(super) fn load_address((offset, length): (u32, u32), register: u32) -> Expression {
    Expression::Payload { base: NETWORK_HEADER, offset, length, register }
}

/// Loads a key and returns the register behind it.
pub(super) fn write_key(family: Family, key: KeyExpression, mut register: u32, list: &mut Vec<Expression>) -> u32 {
    let words = destination(family).1 / 4;
    match key {
        KeyExpression::Source => list.push(load_address(source(family), register)),
        KeyExpression::Destination => list.push(load_address(destination(family), register)),
        KeyExpression::AddressPair => {
            list.push(load_address(source(family), register));
            register += words;
            list.push(load_address(destination(family), register));
        }
        KeyExpression::FrontendSource | KeyExpression::NodePortSource => {
            let is_address = key == KeyExpression::FrontendSource;
            let frontend = if is_address { KeyExpression::Frontend } else { KeyExpression::NodePort };
            register = write_key(family, frontend, register, list);
            list.push(load_address(source(family), register));
        }
        KeyExpression::Frontend | KeyExpression::NodePort => {
            if key == KeyExpression::Frontend {
                list.push(load_address(destination(family), register));
                register += words;
            }
            list.push(Expression::Meta { key: META_PROTOCOL, register });
            register += 1;
            list.push(Expression::Payload { base: TRANSPORT_HEADER, offset: 2, length: 2, register });
            return register + 1;
        }
    }
    register + words
}

fn number(value: u32) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

fn mask_number(mask: u32, flip: u32) -> Expression {
    let (mask, flip) = (number(mask), number(flip));
    Expression::Bitwise { source: FIRST_REGISTER, target: FIRST_REGISTER, mask, flip }
}

fn compare(is_equal: bool, value: Vec<u8>) -> Expression {
    Expression::Compare { register: FIRST_REGISTER, is_equal, value }
}

fn write_match(family: Family, condition: &Match, list: &mut Vec<Expression>) {
    let register = FIRST_REGISTER;
    match condition {
        Match::Set { key, set, inside } => {
            write_key(family, *key, register, list);
            list.push(Expression::Lookup { set: set.to_string(), source: register, target: None, inverted: !inside });
        }
        Match::Destination { prefix, inside } => {
            list.push(load_address(destination(family), register));
            let (address, mask) = octets(prefix);
            if prefix.prefix_len() < prefix.max_prefix_len() {
                let flip = vec![0; mask.len()];
                list.push(Expression::Bitwise { source: register, target: register, mask, flip });
            }
            list.push(compare(*inside, address));
        }
        Match::DestinationIsLocal => {
            list.push(Expression::Fib { result: FIB_ADDRESS_TYPE, flags: FIB_DESTINATION, register });
            list.push(compare(true, number(ROUTE_LOCAL)));
        }
        Match::SourceIsLocal { inside } => {
            list.push(Expression::Fib { result: FIB_ADDRESS_TYPE, flags: FIB_SOURCE, register });
            list.push(compare(*inside, number(ROUTE_LOCAL)));
        }
        Match::Interface { name, is_prefix, inside } => {
            list.push(Expression::Meta { key: META_INTERFACE, register });
            let mut bytes = name.as_bytes().to_vec();
            bytes.truncate(INTERFACE_LENGTH - 1);
            if !is_prefix {
                bytes.resize(INTERFACE_LENGTH, 0);
            }
            list.push(compare(*inside, bytes));
        }
        Match::Mark(bits) => {
            list.push(Expression::Meta { key: META_MARK, register });
            list.push(mask_number(*bits, 0));
            list.push(compare(true, number(*bits)));
        }
        Match::Protocol(protocol) => {
            list.push(Expression::Meta { key: META_PROTOCOL, register });
            list.push(compare(true, vec![protocol.number(family)]));
        }
        Match::DestinationTranslated => {
            list.push(Expression::Connection { key: CONNECTION_STATUS, register });
            list.push(mask_number(STATUS_DESTINATION_NAT, 0));
            list.push(compare(false, number(0)));
        }
        Match::NewConnection => {
            list.push(Expression::Connection { key: CONNECTION_STATE, register });
            list.push(mask_number(STATE_NEW, 0));
            list.push(compare(false, number(0)));
        }
    }
}

fn write_statement(family: Family, statement: &Statement, list: &mut Vec<Expression>) {
    let mut set_mark = |mask: u32, flip: u32| {
        list.push(Expression::Meta { key: META_MARK, register: FIRST_REGISTER });
        list.push(mask_number(mask, flip));
        list.push(Expression::MetaSet { key: META_MARK, register: FIRST_REGISTER });
    };
    match statement {
        Statement::SetMark(bits) => set_mark(!bits, *bits),
        Statement::ClearMark(bits) => set_mark(!bits, 0),
        Statement::Jump(chain) => {
            list.push(Expression::Verdict { code: verdict::JUMP, chain: Some(chain.to_string()) });
        }
        Statement::Goto(chain) => {
            list.push(Expression::Verdict { code: verdict::GOTO, chain: Some(chain.to_string()) });
        }
        Statement::Return => list.push(Expression::Verdict { code: verdict::RETURN, chain: None }),
        Statement::Drop => list.push(Expression::Verdict { code: verdict::DROP, chain: None }),
        Statement::Balance { .. } | Statement::Keep { .. } | Statement::Remember(_) | Statement::Forget(_) => {
            list.extend(composite::write(family, statement));
        }
        Statement::Masquerade => list.push(Expression::Masquerade { flags: FULLY_RANDOM }),
        Statement::Reject(Rejection::TcpReset) => list.push(Expression::Reject { kind: REJECT_TCP_RESET, code: 0 }),
        Statement::Reject(Rejection::PortUnreachable) => {
            list.push(Expression::Reject { kind: REJECT_ICMP, code: port_unreachable(family) });
        }
        // A program that is desired never holds one.
        Statement::Unknown(name) => list.push(Expression::Unknown(name.clone())),
    }
}

pub(super) fn number_of(family: Family) -> u32 {
    match family {
        Family::V4 => FAMILY_IPV4.into(),
        Family::V6 => FAMILY_IPV6.into(),
    }
}

fn port_unreachable(family: Family) -> u8 {
    match family {
        Family::V4 => PORT_UNREACHABLE_V4,
        Family::V6 => PORT_UNREACHABLE_V6,
    }
}

fn octets(prefix: &IpNet) -> (Vec<u8>, Vec<u8>) {
    match prefix {
        IpNet::V4(prefix) => (prefix.network().octets().to_vec(), prefix.netmask().octets().to_vec()),
        IpNet::V6(prefix) => (prefix.network().octets().to_vec(), prefix.netmask().octets().to_vec()),
    }
}

/// The rule that consists of these instructions. From the first one that is not understood on, it
/// holds [`Statement::Unknown`], which no desired rule equals.
pub(super) fn from_expressions(family: Family, mut list: &[Expression]) -> Rule {
    let mut rule = Rule::default();
    while let Some(first) = list.first() {
        // `counter` does nothing to a packet, but `nft` users add it: then the rule is not ours.
        if let Some((statement, rest)) = composite::read(family, list) {
            // These begin with conditions.
            rule.statements.push(statement);
            list = rest;
        } else if rule.statements.is_empty()
            && let Some((condition, rest)) = read_match(family, list)
        {
            rule.matches.push(condition);
            list = rest;
        } else if let Some((statement, rest)) = read_statement(family, list) {
            rule.statements.push(statement);
            list = rest;
        } else {
            rule.statements.push(Statement::Unknown(format!("{first:?}")));
            break;
        }
    }
    rule
}

/// Reads a key: the condition's kind, and what follows.
fn read_key(family: Family, list: &[Expression]) -> Option<(KeyExpression, &[Expression])> {
    // Those that begin like another come first.
    let keys = [
        KeyExpression::FrontendSource,
        KeyExpression::NodePortSource,
        KeyExpression::Frontend,
        KeyExpression::NodePort,
        KeyExpression::AddressPair,
        KeyExpression::Source,
        KeyExpression::Destination,
    ];
    keys.into_iter().find_map(|key| {
        let mut wanted = Vec::new();
        write_key(family, key, FIRST_REGISTER, &mut wanted);
        list.strip_prefix(wanted.as_slice()).map(|rest| (key, rest))
    })
}

fn read_match(family: Family, list: &[Expression]) -> Option<(Match, &[Expression])> {
    for fixed in [
        Match::DestinationIsLocal,
        Match::SourceIsLocal { inside: true },
        Match::SourceIsLocal { inside: false },
        Match::DestinationTranslated,
        Match::NewConnection,
    ] {
        let mut wanted = Vec::new();
        write_match(family, &fixed, &mut wanted);
        if let Some(rest) = list.strip_prefix(wanted.as_slice()) {
            return Some((fixed, rest));
        }
    }
    if let Some((key, [Expression::Lookup { set, source: FIRST_REGISTER, target: None, inverted }, rest @ ..])) =
        read_key(family, list)
    {
        return Some((Match::Set { key, set: Name::from(set.as_str()), inside: !inverted }, rest));
    }
    match list {
        [
            Expression::Meta { key: META_MARK, register: FIRST_REGISTER },
            Expression::Bitwise { source: FIRST_REGISTER, target: FIRST_REGISTER, mask, flip },
            Expression::Compare { register: FIRST_REGISTER, is_equal: true, value },
            rest @ ..,
        ] if mask == value && *flip == number(0) => Some((Match::Mark(read_number(mask)?), rest)),
        [
            Expression::Meta { key: META_INTERFACE, register: FIRST_REGISTER },
            Expression::Compare { register: FIRST_REGISTER, is_equal, value },
            rest @ ..,
        ] => {
            let is_prefix = value.len() < INTERFACE_LENGTH;
            let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
            let name = std::str::from_utf8(value.get(..end)?).ok()?.to_owned();
            Some((Match::Interface { name, is_prefix, inside: *is_equal }, rest))
        }
        [
            Expression::Meta { key: META_PROTOCOL, register: FIRST_REGISTER },
            Expression::Compare { register: FIRST_REGISTER, is_equal: true, value },
            rest @ ..,
        ] => {
            let protocol = Protocol::from_number(*value.first()?)?;
            (*value == [protocol.number(family)]).then_some((Match::Protocol(protocol), rest))
        }
        [
            Expression::Payload { base: NETWORK_HEADER, offset, length, register: FIRST_REGISTER },
            Expression::Compare { register: FIRST_REGISTER, is_equal, value },
            rest @ ..,
        ] if (*offset, value.len() as u32) == (destination(family).0, *length) && *length < destination(family).1 => {
            read_short_destination(family, value).map(|prefix| (Match::Destination { prefix, inside: *is_equal }, rest))
        }
        [first, rest @ ..] if *first == load_address(destination(family), FIRST_REGISTER) => {
            read_destination(family, rest)
        }
        _ => None,
    }
}

/// `nft` loads only the first bytes of the address where a prefix ends between bytes.
fn read_short_destination(family: Family, value: &[u8]) -> Option<IpNet> {
    let length = u8::try_from(value.len() * 8).ok()?;
    let mut bytes = value.to_vec();
    bytes.resize(destination(family).1 as usize, 0);
    let address: IpAddr = match family {
        Family::V4 => Ipv4Addr::from(<[u8; 4]>::try_from(bytes.as_slice()).ok()?).into(),
        Family::V6 => Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?).into(),
    };
    IpNet::new(address, length).ok()
}

fn read_destination(family: Family, list: &[Expression]) -> Option<(Match, &[Expression])> {
    let (mask, list) = match list {
        [Expression::Bitwise { source: FIRST_REGISTER, target: FIRST_REGISTER, mask, flip }, rest @ ..]
            if flip.iter().all(|byte| *byte == 0) =>
        {
            (Some(mask), rest)
        }
        other => (None, other),
    };
    let [Expression::Compare { register: FIRST_REGISTER, is_equal, value }, rest @ ..] = list else { return None };
    let prefix: IpNet = match family {
        Family::V4 => {
            let address = Ipv4Addr::from(<[u8; 4]>::try_from(value.as_slice()).ok()?);
            let mask = mask.map_or(Ok([255; 4]), |mask| <[u8; 4]>::try_from(mask.as_slice())).ok()?;
            Ipv4Net::with_netmask(address, mask.into()).ok()?.into()
        }
        Family::V6 => {
            let address = Ipv6Addr::from(<[u8; 16]>::try_from(value.as_slice()).ok()?);
            let mask = mask.map_or(Ok([255; 16]), |mask| <[u8; 16]>::try_from(mask.as_slice())).ok()?;
            Ipv6Net::with_netmask(address, mask.into()).ok()?.into()
        }
    };
    Some((Match::Destination { prefix, inside: *is_equal }, rest))
}

fn read_statement(family: Family, list: &[Expression]) -> Option<(Statement, &[Expression])> {
    match list {
        [Expression::Verdict { code, chain }, rest @ ..] => {
            let statement = match (*code, chain) {
                (verdict::JUMP, Some(chain)) => Statement::Jump(chain.as_str().into()),
                (verdict::GOTO, Some(chain)) => Statement::Goto(chain.as_str().into()),
                (verdict::RETURN, None) => Statement::Return,
                (verdict::DROP, None) => Statement::Drop,
                _ => return None,
            };
            Some((statement, rest))
        }
        [
            Expression::Meta { key: META_MARK, register: FIRST_REGISTER },
            Expression::Bitwise { source: FIRST_REGISTER, target: FIRST_REGISTER, mask, flip },
            Expression::MetaSet { key: META_MARK, register: FIRST_REGISTER },
            rest @ ..,
        ] => {
            let (mask, flip) = (read_number(mask)?, read_number(flip)?);
            match flip {
                0 => Some((Statement::ClearMark(!mask), rest)),
                bits if bits == !mask => Some((Statement::SetMark(bits), rest)),
                _ => None,
            }
        }
        [Expression::Masquerade { flags: FULLY_RANDOM }, rest @ ..] => Some((Statement::Masquerade, rest)),
        [Expression::Reject { kind: REJECT_TCP_RESET, .. }, rest @ ..] => {
            Some((Statement::Reject(Rejection::TcpReset), rest))
        }
        [Expression::Reject { kind: REJECT_ICMP, code }, rest @ ..] if *code == port_unreachable(family) => {
            Some((Statement::Reject(Rejection::PortUnreachable), rest))
        }
        _ => None,
    }
}

fn read_number(bytes: &[u8]) -> Option<u32> {
    <[u8; 4]>::try_from(bytes).ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_program::nftables::Learned;
    use proptest::prelude::*;

    fn any_key() -> impl Strategy<Value = KeyExpression> {
        prop::sample::select(vec![
            KeyExpression::Frontend,
            KeyExpression::NodePort,
            KeyExpression::AddressPair,
            KeyExpression::Source,
            KeyExpression::Destination,
            KeyExpression::FrontendSource,
            KeyExpression::NodePortSource,
        ])
    }

    fn any_prefix(family: Family) -> BoxedStrategy<IpNet> {
        match family {
            Family::V4 => (any::<u32>(), 1u8..=32)
                .prop_map(|(bits, length)| Ipv4Net::new_assert(bits.into(), length).trunc().into())
                .boxed(),
            Family::V6 => (any::<u128>(), 1u8..=128)
                .prop_map(|(bits, length)| Ipv6Net::new_assert(bits.into(), length).trunc().into())
                .boxed(),
        }
    }

    fn any_rule(family: Family) -> impl Strategy<Value = Rule> {
        let name = || "[a-z-]{1,20}".prop_map(Name::from);
        let condition = prop_oneof![
            (any_key(), name(), any::<bool>()).prop_map(|(key, set, inside)| Match::Set { key, set, inside }),
            (any_prefix(family), any::<bool>()).prop_map(|(prefix, inside)| Match::Destination { prefix, inside }),
            Just(Match::DestinationIsLocal),
            any::<bool>().prop_map(|inside| Match::SourceIsLocal { inside }),
            ("[a-z0-9.@-]{1,15}", any::<[bool; 2]>()).prop_map(|(name, [is_prefix, inside])| Match::Interface {
                name,
                is_prefix,
                inside
            }),
            Just(Match::DestinationTranslated),
            Just(Match::NewConnection),
            any::<u32>().prop_map(Match::Mark),
            prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Icmp])
                .prop_map(Match::Protocol),
        ];
        let frontend = || prop::sample::select(vec![KeyExpression::Frontend, KeyExpression::NodePort]);
        let protocols = vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let learned = move || {
            (frontend(), prop::sample::select(protocols.clone()), 1u32..86_401, name(), name(), name()).prop_map(
                |(key, protocol, seconds, timeouts, endpoints, clients)| Learned {
                    key,
                    protocol,
                    seconds,
                    timeouts,
                    endpoints,
                    clients,
                },
            )
        };
        let statement =
            prop_oneof![
                name().prop_map(Statement::Jump),
                name().prop_map(Statement::Goto),
                Just(Statement::Return),
                Just(Statement::Drop),
                (1..u32::MAX).prop_map(Statement::SetMark),
                (1..u32::MAX).prop_map(Statement::ClearMark),
                (frontend(), 1u32..100, any::<u32>(), name())
                    .prop_map(|(key, slots, offset, map)| Statement::Balance { key, slots, offset, map }),
                (frontend(), name()).prop_map(|(key, clients)| Statement::Keep { key, clients }),
                learned().prop_map(Statement::Remember),
                learned().prop_map(Statement::Forget),
                Just(Statement::Masquerade),
                Just(Statement::Reject(Rejection::TcpReset)),
                Just(Statement::Reject(Rejection::PortUnreachable)),
            ];
        (prop::collection::vec(condition, 0..5), prop::collection::vec(statement, 1..4))
            .prop_map(|(matches, statements)| Rule { matches, statements, ..Rule::default() })
    }

    proptest! {
        #[test]
        fn every_rule_is_read_back_as_written(
            (family, rule) in prop::sample::select(vec![Family::V4, Family::V6])
                .prop_flat_map(|family| (Just(family), any_rule(family)))
        ) {
            let expressions = to_expressions(family, &rule);
            let mut builder = crate::rawnetlink::MessageBuilder::new(0, 0);
            for expression in &expressions {
                expression.write(&mut builder);
            }
            let bytes = builder.finish();
            let attributes = crate::rawnetlink::Attributes::new(&bytes[16..]);
            let read: Vec<Expression> = attributes.map(|it| Expression::read(&it)).collect();
            prop_assert_eq!(&read, &expressions);
            prop_assert_eq!(from_expressions(family, &read), rule);
        }

        #[test]
        fn any_bytes_are_an_expression_of_some_kind(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let list: Vec<Expression> =
                crate::rawnetlink::Attributes::new(&bytes).map(|it| Expression::read(&it)).collect();
            from_expressions(Family::V4, &list);
        }
    }
}
