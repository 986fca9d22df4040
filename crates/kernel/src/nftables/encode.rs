//! Changes to netlink messages.

use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;
use portolan_net::{Family, Port, Protocol};
use portolan_program::nftables::{BaseHook, ChainKind, Change, Element, Hook, Key, Rule, SetKind, TableKey};

use super::constants::{
    BATCH_BEGIN, BATCH_END, DELETE_CHAIN, DELETE_ELEMENT, DELETE_RULE, DELETE_SET, DELETE_TABLE, FAMILY_IPV4,
    FAMILY_IPV6, NEW_CHAIN, NEW_ELEMENT, NEW_RULE, NEW_SET, NEW_TABLE, SUBSYSTEM, chain, data, element, rule, set,
    table,
};
use super::set_types::{SetLayout, comment_data, set_layout};
use crate::rawnetlink::MessageBuilder;

/// The most bytes of elements in one message: their list is one attribute, which holds 65,535, and the
/// longest element of an interval set takes less than 1 KiB.
const ELEMENTS_BYTES_MAX: usize = 60 << 10;

const CREATE: u16 = libc::NLM_F_CREATE as u16;
const APPEND: u16 = libc::NLM_F_APPEND as u16;

/// A message, and the changes that it makes.
#[derive(Debug, Clone)]
pub(super) struct Encoded {
    pub(super) bytes: Vec<u8>,
    /// Positions in the list of changes that was encoded.
    pub(super) changes: Range<usize>,
}

/// Encodes changes in their order. Elements of one set that follow each other share messages, but
/// for those that `alone` names: so an error is led back to one of them.
pub(super) fn encode(changes: &[&Change], alone: impl Fn(usize) -> bool) -> Vec<Encoded> {
    let mut messages = Vec::new();
    let mut index = 0;
    while let Some(change) = changes.get(index) {
        let end = if alone(index) { index + 1 } else { run_end(changes, index, &alone) };
        if matches!(change, Change::PutElement { .. } | Change::RemoveElement { .. }) {
            index = elements(changes, index..end, &mut messages);
        } else {
            plain(change, index, &mut messages);
            index += 1;
        }
    }
    messages
}

/// The start and the end of a transaction.
pub(super) fn batch_frame() -> (Vec<u8>, Vec<u8>) {
    let frame = |kind: u16| {
        let mut builder = MessageBuilder::new(kind, 0);
        // `nfgenmsg`: the subsystem in network byte order where other messages have 0.
        builder.header(&[0, 0, (SUBSYSTEM >> 8) as u8, SUBSYSTEM as u8]);
        builder.finish()
    };
    (frame(BATCH_BEGIN), frame(BATCH_END))
}

/// A message with its fixed header.
pub(super) fn start(kind: u16, flags: u16, family: Family) -> MessageBuilder {
    let mut builder = MessageBuilder::new((SUBSYSTEM << 8) | kind, flags);
    let family = match family {
        Family::V4 => FAMILY_IPV4,
        Family::V6 => FAMILY_IPV6,
    };
    builder.header(&[family, 0, 0, 0]);
    builder
}

/// Where the elements end that can share messages with the first.
fn run_end(changes: &[&Change], from: usize, alone: &impl Fn(usize) -> bool) -> usize {
    let is_same = |a: &Change, b: &Change| match (a, b) {
        (Change::PutElement { table, set, .. }, Change::PutElement { table: other_table, set: other_set, .. })
        | (
            Change::RemoveElement { table, set, .. },
            Change::RemoveElement { table: other_table, set: other_set, .. },
        ) => table == other_table && set == other_set,
        _ => false,
    };
    let mut end = from + 1;
    while end < changes.len() && is_same(changes[from], changes[end]) && !alone(end) {
        end += 1;
    }
    end
}

/// Encodes as many elements of a run as fit one message, and returns where it stopped.
fn elements(changes: &[&Change], run: Range<usize>, messages: &mut Vec<Encoded>) -> usize {
    let mut removed = Vec::new();
    let mut added = Vec::new();
    let mut bytes = 0;
    let mut end = run.start;
    let mut place: Option<(TableKey, &str)> = None;
    for change in &changes[run.clone()] {
        if bytes > ELEMENTS_BYTES_MAX {
            break;
        }
        match change {
            Change::PutElement { table, set, key, element, replaces } => {
                place = Some((*table, set));
                bytes += element_length(key, element);
                if *replaces {
                    removed.push(*key);
                }
                added.push((*key, element));
            }
            Change::RemoveElement { table, set, key } => {
                place = Some((*table, set));
                bytes += element_length(key, &Element::default());
                removed.push(*key);
            }
            _ => break,
        }
        end += 1;
    }
    let Some((table, set)) = place else { return run.end };
    let nothing = Element::default();
    let removed: Vec<(Key, &Element)> = removed.into_iter().map(|key| (key, &nothing)).collect();
    for (kind, flags, list) in [(DELETE_ELEMENT, 0, removed), (NEW_ELEMENT, CREATE, added)] {
        if !list.is_empty() {
            let bytes = element_message(kind, flags, table, set, &list);
            messages.push(Encoded { bytes, changes: run.start..end });
        }
    }
    end
}

fn element_message(kind: u16, flags: u16, table: TableKey, set: &str, list: &[(Key, &Element)]) -> Vec<u8> {
    let mut builder = start(kind, flags, table.family);
    builder.put_str(element::LIST_TABLE, table.name.as_str()).put_str(element::LIST_SET, set);
    builder.nested(element::LIST_ELEMENTS, |elements| {
        for (key, element) in list {
            write_element(elements, key, element);
        }
    });
    builder.finish()
}

/// An upper bound of what an element takes in a message.
fn element_length(key: &Key, element: &Element) -> usize {
    let copies = if key.is_interval() { 2 } else { 1 };
    let comment = element.comment.as_ref().map_or(0, |comment| comment.len() + 16);
    copies * 64 + if element.value.is_some() { 40 } else { 0 } + comment
}

fn write_element(into: &mut MessageBuilder, key: &Key, value: &Element) {
    if let Key::Prefix(prefix) = key {
        return write_interval(into, prefix, value);
    }
    into.nested(rule::LIST_ELEMENT, |body| {
        body.nested(element::KEY, |it| {
            it.put_bytes(data::VALUE, &key_bytes(key, false));
        });
        if key.is_interval() {
            body.nested(element::KEY_END, |it| {
                it.put_bytes(data::VALUE, &key_bytes(key, true));
            });
        }
        if let Some(socket) = value.value {
            let mut bytes = Vec::with_capacity(20);
            push_address(&mut bytes, socket.ip());
            push_padded(&mut bytes, &socket.port().to_be_bytes());
            body.nested(element::DATA, |it| {
                it.put_bytes(data::VALUE, &bytes);
            });
        }
        write_comment(body, value);
    });
}

/// An interval is two elements: its first key, and the first key behind it, if there is any.
fn write_interval(into: &mut MessageBuilder, prefix: &IpNet, value: &Element) {
    into.nested(rule::LIST_ELEMENT, |body| {
        body.nested(element::KEY, |it| {
            it.put_address(data::VALUE, prefix.network());
        });
        write_comment(body, value);
    });
    if let Some(end) = behind(prefix) {
        into.nested(rule::LIST_ELEMENT, |body| {
            body.nested(element::KEY, |it| {
                it.put_address(data::VALUE, end);
            });
            body.put_u32_be(element::FLAGS, element::FLAG_INTERVAL_END);
        });
    }
}

fn write_comment(body: &mut MessageBuilder, value: &Element) {
    if let Some(comment) = &value.comment {
        body.put_bytes(element::USER_DATA, &comment_data(comment));
    }
}

/// The first address behind a prefix.
fn behind(prefix: &IpNet) -> Option<IpAddr> {
    match prefix {
        IpNet::V4(prefix) => u32::from(prefix.broadcast()).checked_add(1).map(|bits| IpAddr::V4(bits.into())),
        IpNet::V6(prefix) => u128::from(prefix.broadcast()).checked_add(1).map(|bits| IpAddr::V6(bits.into())),
    }
}

/// A key as the registers hold it: each field starts at a multiple of four bytes. Of an interval, the first key
/// or the last one.
fn key_bytes(key: &Key, is_last: bool) -> Vec<u8> {
    let mut fields = Fields(Vec::with_capacity(48));
    let edge = |prefix: IpNet| if is_last { prefix.broadcast() } else { prefix.network() };
    match *key {
        Key::Frontend(address, protocol, port) => fields.address(address).port(protocol, port),
        Key::NodePort(protocol, port) => fields.port(protocol, port),
        Key::FrontendSlot(address, protocol, port, slot) => fields.address(address).port(protocol, port).number(slot),
        Key::NodePortSlot(protocol, port, slot) => fields.port(protocol, port).number(slot),
        Key::AddressPair(first, second) => fields.address(first).address(second),
        Key::Address(address) => fields.address(address),
        Key::Prefix(prefix) => fields.address(edge(prefix)),
        Key::FrontendSource(address, protocol, port, prefix) => {
            fields.address(address).port(protocol, port).address(edge(prefix))
        }
        Key::NodePortSource(protocol, port, prefix) => fields.port(protocol, port).address(edge(prefix)),
        Key::FrontendEndpoint(address, protocol, port, to, to_port) => {
            fields.address(address).port(protocol, port).address(to).padded(&to_port.get().to_be_bytes())
        }
        Key::NodePortEndpoint(protocol, port, to, to_port) => {
            fields.port(protocol, port).address(to).padded(&to_port.get().to_be_bytes())
        }
    };
    fields.0
}

/// The fields of a key, one behind the other.
struct Fields(Vec<u8>);

impl Fields {
    fn address(&mut self, address: IpAddr) -> &mut Fields {
        push_address(&mut self.0, address);
        self
    }

    fn padded(&mut self, field: &[u8]) -> &mut Fields {
        push_padded(&mut self.0, field);
        self
    }

    /// Only ICMP has another number in IPv6, and it has no ports.
    fn port(&mut self, protocol: Protocol, port: Port) -> &mut Fields {
        self.padded(&[protocol.number(Family::V4)]).padded(&port.get().to_be_bytes())
    }

    /// `numgen` writes numbers in the machine's byte order.
    fn number(&mut self, number: u32) -> &mut Fields {
        self.padded(&number.to_ne_bytes())
    }
}

fn push_address(bytes: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => bytes.extend(address.octets()),
        IpAddr::V6(address) => bytes.extend(address.octets()),
    }
}

fn push_padded(bytes: &mut Vec<u8>, field: &[u8]) {
    bytes.extend(field);
    bytes.resize(bytes.len().div_ceil(4) * 4, 0);
}

fn plain(change: &Change, index: usize, messages: &mut Vec<Encoded>) {
    let mut push = |builder: MessageBuilder| {
        messages.push(Encoded { bytes: builder.finish(), changes: index..index + 1 });
    };
    match change {
        Change::DeleteTable(key) | Change::CreateTable(key) => {
            let is_new = matches!(change, Change::CreateTable(_));
            let (kind, flags) = if is_new { (NEW_TABLE, CREATE) } else { (DELETE_TABLE, 0) };
            let mut builder = start(kind, flags, key.family);
            builder.put_str(table::NAME, key.name.as_str());
            push(builder);
        }
        Change::CreateSet(key, name, kind) => push(new_set(*key, name, *kind, index)),
        Change::CreateChain(key, name, base) => push(new_chain(*key, name, *base)),
        Change::WriteRules(key, name, rules) => {
            let mut builder = start(DELETE_RULE, 0, key.family);
            builder.put_str(rule::TABLE, key.name.as_str()).put_str(rule::CHAIN, name);
            push(builder);
            for it in rules {
                push(new_rule(*key, name, it));
            }
        }
        Change::AddRule(key, name, it) => push(new_rule(*key, name, it)),
        Change::DeleteChain(key, name) => {
            let mut builder = start(DELETE_CHAIN, 0, key.family);
            builder.put_str(chain::TABLE, key.name.as_str()).put_str(chain::NAME, name);
            push(builder);
        }
        Change::DeleteSet(key, name) => {
            let mut builder = start(DELETE_SET, 0, key.family);
            builder.put_str(set::TABLE, key.name.as_str()).put_str(set::NAME, name);
            push(builder);
        }
        // Elements are encoded in runs; rules are removed by `remove_rule`, clients by `forget_client`.
        Change::PutElement { .. }
        | Change::RemoveElement { .. }
        | Change::RemoveRule(..)
        | Change::ForgetClients { .. } => {}
    }
}

/// Removes one rule, by the number that the kernel gave it.
pub(super) fn remove_rule(key: TableKey, name: &str, handle: u64) -> Vec<u8> {
    let mut builder = start(DELETE_RULE, 0, key.family);
    builder.put_str(rule::TABLE, key.name.as_str()).put_str(rule::CHAIN, name);
    builder.put_u64_be(rule::HANDLE, handle);
    builder.finish()
}

/// Removes one client from a map that packets fill, by its key as it was read.
pub(super) fn forget_client(table: TableKey, clients: &str, key: &[u8], index: usize) -> Encoded {
    let mut builder = start(DELETE_ELEMENT, 0, table.family);
    builder.put_str(element::LIST_TABLE, table.name.as_str()).put_str(element::LIST_SET, clients);
    builder.nested(element::LIST_ELEMENTS, |elements| {
        elements.nested(rule::LIST_ELEMENT, |body| {
            body.nested(element::KEY, |it| {
                it.put_bytes(data::VALUE, key);
            });
        });
    });
    Encoded { bytes: builder.finish(), changes: index..index + 1 }
}

fn new_set(key: TableKey, name: &str, kind: SetKind, index: usize) -> MessageBuilder {
    let layout = set_layout(key.family, kind);
    let mut builder = start(NEW_SET, CREATE, key.family);
    builder.put_str(set::TABLE, key.name.as_str()).put_str(set::NAME, name);
    builder.put_u32_be(set::FLAGS, layout.flags);
    builder.put_u32_be(set::KEY_TYPE, layout.key_type).put_u32_be(set::KEY_LENGTH, layout.key_length);
    if kind.is_map() {
        builder.put_u32_be(set::DATA_TYPE, layout.data_type).put_u32_be(set::DATA_LENGTH, layout.data_length);
    }
    if layout.size.is_some() || !layout.fields.is_empty() {
        builder.nested(set::DESCRIPTION, |description| write_description(description, &layout));
    }
    // A number by which rules of the same transaction could refer to it; ours use the name.
    builder.put_u32_be(set::ID, u32::try_from(index).unwrap_or(0).saturating_add(1));
    builder.put_bytes(set::USER_DATA, &layout.user_data);
    builder
}

fn write_description(description: &mut MessageBuilder, layout: &SetLayout) {
    if let Some(size) = layout.size {
        description.put_u32_be(set::DESCRIPTION_SIZE, size);
    }
    if !layout.fields.is_empty() {
        description.nested(set::DESCRIPTION_FIELDS, |fields| {
            for length in &layout.fields {
                fields.nested(rule::LIST_ELEMENT, |field| {
                    field.put_u32_be(set::FIELD_LENGTH, *length);
                });
            }
        });
    }
}

fn new_chain(key: TableKey, name: &str, base: Option<BaseHook>) -> MessageBuilder {
    let mut builder = start(NEW_CHAIN, CREATE, key.family);
    builder.put_str(chain::TABLE, key.name.as_str()).put_str(chain::NAME, name);
    if let Some(base) = base {
        builder.nested(chain::HOOK, |hook| {
            hook.put_u32_be(chain::HOOK_NUMBER, hook_number(base.hook));
            hook.put_u32_be(chain::HOOK_PRIORITY, base.priority.cast_unsigned());
        });
        builder.put_u32_be(chain::POLICY, u32::from(base.accepts));
        builder.put_str(chain::TYPE, base.kind.name());
    }
    builder
}

fn new_rule(key: TableKey, name: &str, it: &Rule) -> MessageBuilder {
    let mut builder = start(NEW_RULE, CREATE | APPEND, key.family);
    builder.put_str(rule::TABLE, key.name.as_str()).put_str(rule::CHAIN, name);
    builder.nested(rule::EXPRESSIONS, |list| {
        for expression in super::rules::to_expressions(key.family, it) {
            expression.write(list);
        }
    });
    if let Some(comment) = &it.comment {
        builder.put_bytes(rule::USER_DATA, &comment_data(comment));
    }
    builder
}

/// `enum nf_inet_hooks`.
const HOOKS: [Hook; 5] = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

/// The hook with this number.
pub(super) fn hook_of(number: u32) -> Option<Hook> {
    HOOKS.get(number as usize).copied()
}

/// The type of chains with this name.
pub(super) fn chain_kind_of(name: &str) -> Option<ChainKind> {
    [ChainKind::Filter, ChainKind::Nat, ChainKind::Route].into_iter().find(|kind| kind.name() == name)
}
