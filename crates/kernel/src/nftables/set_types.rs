//! What a kind of set is to the kernel, and to `nft` which lists it.
//!
//! The kernel compares bytes and knows lengths alone. Types, and how `nft` is to print them, are
//! numbers and user data that it keeps for those who list the set.

use portolan_net::Family;
use portolan_program::nftables::{CLIENTS_MAX, SetKind};

use super::constants::{kind, set};

/// The attributes of a new set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SetLayout {
    pub(super) flags: u32,
    pub(super) key_type: u32,
    pub(super) key_length: u32,
    /// 0 where there are no values.
    pub(super) data_type: u32,
    pub(super) data_length: u32,
    /// The most elements, where packets add them.
    pub(super) size: Option<u32>,
    /// The lengths of a key's fields, where they are intervals each.
    pub(super) fields: Vec<u32>,
    pub(super) user_data: Vec<u8>,
}

/// How a kind of set is laid out.
pub(super) fn set_layout(family: Family, of: SetKind) -> SetLayout {
    let (address, length) = match family {
        Family::V4 => (kind::IPV4_ADDRESS, 4),
        Family::V6 => (kind::IPV6_ADDRESS, 16),
    };
    let types: Vec<(u32, u32)> = {
        let (address, protocol, port) = ((address, length), (kind::PROTOCOL, 1), (kind::SERVICE, 2));
        let number = (kind::INTEGER, 4);
        match of {
            SetKind::Frontends => vec![address, protocol, port],
            SetKind::NodePorts => vec![protocol, port],
            SetKind::FrontendSlots | SetKind::FrontendNumbers => vec![address, protocol, port, number],
            SetKind::NodePortSlots | SetKind::NodePortNumbers => vec![protocol, port, number],
            SetKind::AddressPairs => vec![address, address],
            SetKind::Addresses | SetKind::Prefixes | SetKind::Unknown => vec![address],
            SetKind::FrontendSources => vec![address, protocol, port, address],
            SetKind::NodePortSources => vec![protocol, port, address],
            SetKind::FrontendEndpoints => vec![address, protocol, port, address, port],
            SetKind::NodePortEndpoints => vec![protocol, port, address, port],
            SetKind::FrontendClients => vec![address, address, protocol, port],
            SetKind::NodePortClients => vec![address, protocol, port],
        }
    };
    let numbers: Vec<u32> = types.iter().map(|(number, _)| *number).collect();
    let mut layout = SetLayout {
        flags: 0,
        key_type: concatenated(&numbers),
        key_length: types.iter().map(|(_, length)| length.next_multiple_of(4)).sum(),
        data_type: 0,
        data_length: 0,
        size: None,
        fields: Vec::new(),
        user_data: Vec::new(),
    };
    if of.is_map() {
        layout.flags |= set::FLAG_MAP;
        layout.data_type = concatenated(&[address, kind::SERVICE]);
        layout.data_length = length + 4;
    }
    if of.is_learned() {
        layout.flags |= set::FLAG_DYNAMIC | set::FLAG_TIMEOUT;
        layout.size = Some(CLIENTS_MAX);
    }
    if of.is_interval() {
        layout.flags |= set::FLAG_INTERVAL;
        if types.len() > 1 {
            layout.flags |= set::FLAG_CONCATENATED;
            layout.fields = types.iter().map(|(_, length)| *length).collect();
        }
    }
    layout.user_data = user_data(family, of);
    layout
}

/// The kind of set that is laid out so, and is not printed in a way that `nft` cannot read.
pub(super) fn kind_of(family: Family, flags: u32, key: (u32, u32), data: (u32, u32)) -> SetKind {
    let is_so = |of: &SetKind| {
        let layout = set_layout(family, *of);
        layout.flags == flags
            && (layout.key_type, layout.key_length) == key
            && (layout.data_type, layout.data_length) == data
    };
    SetKind::ALL.into_iter().find(is_so).unwrap_or(SetKind::Unknown)
}

/// `nft` numbers a concatenation by its parts, six bits each (`TYPE_BITS`).
fn concatenated(types: &[u32]) -> u32 {
    types.iter().fold(0, |sum, it| (sum << 6) | it)
}

/// User data is a list of type, length (one byte each) and value.
fn item(kind: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, u8::try_from(value.len()).unwrap_or(u8::MAX)];
    bytes.extend(value);
    bytes
}

/// A comment as user data, of a rule and of an element (`NFTNL_UDATA_RULE_COMMENT` and its sister are
/// both 0), with the NUL that `nft` expects.
pub(super) fn comment_data(comment: &str) -> Vec<u8> {
    let length = comment.len().min(usize::from(u8::MAX) - 1);
    let mut text = comment.as_bytes()[..length].to_vec();
    text.push(0);
    item(0, &text)
}

/// The comment in user data.
pub(super) fn comment_of(mut bytes: &[u8]) -> Option<&str> {
    while let [kind, length, rest @ ..] = bytes {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
            return std::str::from_utf8(&value[..end]).ok();
        }
        bytes = rest.get(usize::from(*length)..)?;
    }
    None
}

/// What `nft` writes for these types, in its version 1.0 (`src/mnl.c`, `src/expression.c`): slots have
/// no type of their own, so that such maps are described by the expressions that make a key
/// (`typeof` in a listing). Without it a listing could not be loaded again.
fn user_data(family: Family, of: SetKind) -> Vec<u8> {
    let network_byte_order = 2u32;
    let mut bytes = match of {
        SetKind::Prefixes => item(0, &network_byte_order.to_ne_bytes()),
        _ => item(0, &0u32.to_ne_bytes()),
    };
    if of.is_map() {
        bytes.extend(item(1, &0u32.to_ne_bytes()));
    }
    let (address_header, address_field) = match family {
        Family::V4 => (HEADER_IPV4, FIELD_IPV4_DESTINATION),
        Family::V6 => (HEADER_IPV6, FIELD_IPV6_DESTINATION),
    };
    let address = field(address_header, address_field);
    let port = field(HEADER_TRANSPORT, FIELD_TRANSPORT_DESTINATION);
    let mut key = vec![expression(EXPRESSION_META, &item(0, &META_PROTOCOL.to_ne_bytes())), port.clone(), slot()];
    if matches!(of, SetKind::FrontendSlots | SetKind::FrontendNumbers) {
        key.insert(0, address.clone());
    }
    if has_numbers(of) {
        bytes.extend(item(3, &concatenation(&key)));
        if of.is_map() {
            bytes.extend(item(4, &concatenation(&[address, port])));
        }
    }
    if of.is_map() {
        // Values are no intervals.
        bytes.extend(item(6, &0u32.to_ne_bytes()));
    }
    bytes
}

fn has_numbers(of: SetKind) -> bool {
    matches!(of, SetKind::FrontendSlots | SetKind::NodePortSlots | SetKind::FrontendNumbers | SetKind::NodePortNumbers)
}

/// `enum expr_types`, `enum proto_desc_id`, and the fields' numbers in `src/proto.c`.
const EXPRESSION_PAYLOAD: u32 = 7;
const EXPRESSION_META: u32 = 9;
const EXPRESSION_CONCATENATION: u32 = 13;
const EXPRESSION_NUMGEN: u32 = 23;
const HEADER_TRANSPORT: u32 = 11;
const HEADER_IPV4: u32 = 12;
const HEADER_IPV6: u32 = 13;
const FIELD_TRANSPORT_DESTINATION: u32 = 2;
const FIELD_IPV4_DESTINATION: u32 = 12;
const FIELD_IPV6_DESTINATION: u32 = 9;
const META_PROTOCOL: u32 = 16;

fn expression(kind: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = item(0, &kind.to_ne_bytes());
    bytes.extend(item(1, value));
    bytes
}

fn field(header: u32, number: u32) -> Vec<u8> {
    let mut value = item(0, &header.to_ne_bytes());
    value.extend(item(1, &number.to_ne_bytes()));
    expression(EXPRESSION_PAYLOAD, &value)
}

/// `numgen random mod 2`: the modulus is a stand-in, each rule has its own.
fn slot() -> Vec<u8> {
    let mut value = item(0, &1u32.to_ne_bytes());
    value.extend(item(1, &2u32.to_ne_bytes()));
    value.extend(item(2, &0u32.to_ne_bytes()));
    expression(EXPRESSION_NUMGEN, &value)
}

fn concatenation(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut value = Vec::new();
    for (index, part) in (0u8..).zip(parts) {
        value.extend(item(index, part));
    }
    expression(EXPRESSION_CONCATENATION, &value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_comment_is_read_back(comment in "[a-z/:.ü-]{0,100}") {
            let data = comment_data(&comment);
            prop_assert_eq!(comment_of(&data), Some(comment.as_str()));
        }

        #[test]
        fn any_user_data_is_read_or_passed_over(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = comment_of(&bytes);
        }
    }

    #[test]
    fn the_description_is_what_nft_writes() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
        assert_eq!(
            hex(&set_layout(Family::V4, SetKind::FrontendSlots).user_data),
            "000400000000010400000000036000040d00000001580014000407000000010c00040c00000001040c000000010e000409000000\
             01060004100000000214000407000000010c00040b000000010402000000031a0004170000000112000401000000010402000000\
             020400000000043400040d000000012c0014000407000000010c00040c00000001040c0000000114000407000000010c00040b00\
             0000010402000000060400000000"
        );
        assert_eq!(
            hex(&set_layout(Family::V6, SetKind::NodePortSlots).user_data),
            "000400000000010400000000034a00040d0000000142000e00040900000001060004100000000114000407000000010c00040b00\
             0000010402000000021a0004170000000112000401000000010402000000020400000000043400040d000000012c001400040700\
             0000010c00040d0000000104090000000114000407000000010c00040b000000010402000000060400000000"
        );
        assert_eq!(set_layout(Family::V4, SetKind::FrontendSlots).key_type, 0x001c_c344);
        assert_eq!(set_layout(Family::V6, SetKind::FrontendSlots).data_type, 0x0000_020d);
    }
}
