//! The kernel's expressions that our rules consist of, to and from netlink attributes.
//!
//! A rule is a list of small instructions for a machine with sixteen registers of four bytes.

use crate::rawnetlink::{Attribute, Attributes, MessageBuilder};

use super::constants::{data, rule};

/// The register of verdicts (`NFT_REG_VERDICT`).
const VERDICT_REGISTER: u32 = 0;

/// The first register of four bytes (`NFT_REG32_00`).
pub(super) const FIRST_REGISTER: u32 = 8;

/// How many there are.
pub(super) const REGISTERS: u32 = 16;

/// `IP_CT_DIR_ORIGINAL`.
const DIRECTION_ORIGINAL: u8 = 0;

/// What a packet does to a set (`enum nft_dynset_ops`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DynamicOperation {
    /// Adds an element, or gives one that is there its whole time again. Its value stays.
    Update = 1,
    /// Removes it.
    Delete = 2,
}

/// One instruction. Registers are numbered as `NFT_REG32_…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expression {
    /// Loads bytes of the packet. Base 1 is the network header, 2 the transport header.
    Payload { base: u32, offset: u32, length: u32, register: u32 },
    /// Loads metadata.
    Meta { key: u32, register: u32 },
    /// Stores metadata.
    MetaSet { key: u32, register: u32 },
    /// Loads a field of the connection.
    Connection { key: u32, register: u32 },
    /// Loads a field of the connection's first packet, as it was before any translation.
    ConnectionOriginal { key: u32, register: u32 },
    /// Changes a set: takes a key, and for maps a value, from registers.
    DynamicSet { set: String, operation: DynamicOperation, key: u32, data: u32, timeout_ms: u64 },
    /// Asks the routing tables.
    Fib { result: u32, flags: u32, register: u32 },
    /// Masks and flips bits.
    Bitwise { source: u32, target: u32, mask: Vec<u8>, flip: Vec<u8> },
    /// Goes on if equal, or if not.
    Compare { register: u32, is_equal: bool, value: Vec<u8> },
    /// Goes on if the registers are in a set, or are not; or loads what a map holds for them.
    Lookup { set: String, source: u32, target: Option<u32>, inverted: bool },
    /// Ends the rule with a verdict.
    Verdict { code: i32, chain: Option<String> },
    /// Loads a random number below `modulus`, plus `offset`.
    Random { register: u32, modulus: u32, offset: u32 },
    /// Translates the destination to an address and port in registers.
    DestinationNat { family: u32, address: u32, port: u32 },
    /// Translates the source to the address of the interface.
    Masquerade { flags: u32 },
    /// Refuses the packet.
    Reject { kind: u32, code: u8 },
    /// Does nothing. `nft` 1.0 writes a change of byte order of a single byte into keys of intervals.
    Nothing,
    /// Anything else.
    Unknown(String),
}

impl Expression {
    fn name(&self) -> &str {
        match self {
            Expression::Payload { .. } => "payload",
            Expression::Meta { .. } | Expression::MetaSet { .. } => "meta",
            Expression::Connection { .. } | Expression::ConnectionOriginal { .. } => "ct",
            Expression::DynamicSet { .. } => "dynset",
            Expression::Fib { .. } => "fib",
            Expression::Bitwise { .. } => "bitwise",
            Expression::Compare { .. } => "cmp",
            Expression::Lookup { .. } => "lookup",
            Expression::Verdict { .. } => "immediate",
            Expression::Random { .. } => "numgen",
            Expression::DestinationNat { .. } => "nat",
            Expression::Masquerade { .. } => "masq",
            Expression::Reject { .. } => "reject",
            Expression::Nothing => "byteorder",
            Expression::Unknown(name) => name,
        }
    }

    /// Writes it as one element of a rule's list.
    pub(super) fn write(&self, into: &mut MessageBuilder) {
        into.nested(rule::LIST_ELEMENT, |element| {
            element.put_str(1, self.name());
            element.nested(2, |body| self.write_body(body));
        });
    }

    fn write_body(&self, body: &mut MessageBuilder) {
        match self {
            Expression::Payload { base, offset, length, register } => {
                body.put_u32_be(1, *register).put_u32_be(2, *base).put_u32_be(3, *offset).put_u32_be(4, *length);
            }
            Expression::Meta { key, register } => {
                body.put_u32_be(2, *key).put_u32_be(1, *register);
            }
            Expression::MetaSet { key, register } => {
                body.put_u32_be(2, *key).put_u32_be(3, *register);
            }
            Expression::Connection { key, register } => {
                body.put_u32_be(2, *key).put_u32_be(1, *register);
            }
            Expression::ConnectionOriginal { key, register } => {
                body.put_u32_be(2, *key).put_u32_be(1, *register).put_u8(3, DIRECTION_ORIGINAL);
            }
            Expression::DynamicSet { set, operation, key, data, timeout_ms } => {
                body.put_str(1, set).put_u32_be(3, *operation as u32).put_u32_be(4, *key).put_u32_be(5, *data);
                if *timeout_ms > 0 {
                    body.put_u64_be(6, *timeout_ms);
                }
            }
            Expression::Fib { result, flags, register } => {
                body.put_u32_be(1, *register).put_u32_be(2, *result).put_u32_be(3, *flags);
            }
            Expression::Bitwise { source, target, mask, flip } => {
                let length = u32::try_from(mask.len()).unwrap_or(u32::MAX);
                body.put_u32_be(1, *source).put_u32_be(2, *target).put_u32_be(3, length);
                put_value(body, 4, mask);
                put_value(body, 5, flip);
            }
            Expression::Compare { register, is_equal, value } => {
                body.put_u32_be(1, *register).put_u32_be(2, u32::from(!is_equal));
                put_value(body, 3, value);
            }
            Expression::Lookup { set, source, target, inverted } => {
                body.put_str(1, set).put_u32_be(2, *source);
                if let Some(target) = target {
                    body.put_u32_be(3, *target);
                }
                if *inverted {
                    body.put_u32_be(5, 1);
                }
            }
            Expression::Verdict { code, chain } => {
                body.put_u32_be(1, VERDICT_REGISTER);
                body.nested(2, |value| {
                    value.nested(data::VERDICT, |verdict| {
                        verdict.put_u32_be(data::VERDICT_CODE, code.cast_unsigned());
                        if let Some(chain) = chain {
                            verdict.put_str(data::VERDICT_CHAIN, chain);
                        }
                    });
                });
            }
            Expression::Random { register, modulus, offset } => {
                body.put_u32_be(1, *register).put_u32_be(2, *modulus).put_u32_be(3, 1).put_u32_be(4, *offset);
            }
            Expression::DestinationNat { family, address, port } => {
                body.put_u32_be(1, 1).put_u32_be(2, *family).put_u32_be(3, *address).put_u32_be(5, *port);
            }
            Expression::Masquerade { flags } => {
                body.put_u32_be(1, *flags);
            }
            Expression::Reject { kind, code } => {
                body.put_u32_be(1, *kind).put_u8(2, *code);
            }
            Expression::Nothing | Expression::Unknown(_) => {}
        }
    }

    /// Reads one element of a rule's list. What is not understood has its name alone.
    pub(super) fn read(element: &Attribute<'_>) -> Expression {
        let element = element.nested();
        let name = element.get(1).and_then(|it| it.text()).unwrap_or("nameless").to_owned();
        let body = element.get(2).map_or(Attributes::new(&[]), |it| it.nested());
        Expression::read_body(&name, &body).unwrap_or(Expression::Unknown(name))
    }

    fn read_body(name: &str, body: &Attributes<'_>) -> Option<Expression> {
        let number = |kind: u16| body.get(kind).and_then(|it| it.u32_be());
        let register = |kind: u16| number(kind).map(normal_register);
        let value = |kind: u16| body.get(kind)?.nested().get(data::VALUE).map(|it| it.value.to_vec());
        Some(match name {
            "payload" if number(5).is_none() => {
                Expression::Payload { base: number(2)?, offset: number(3)?, length: number(4)?, register: register(1)? }
            }
            "meta" => match (register(1), register(3)) {
                (Some(register), None) => Expression::Meta { key: number(2)?, register },
                (None, Some(register)) => Expression::MetaSet { key: number(2)?, register },
                _ => return None,
            },
            "ct" if number(4).is_none() && body.get(3).and_then(|it| it.u8()) == Some(DIRECTION_ORIGINAL) => {
                Expression::ConnectionOriginal { key: number(2)?, register: register(1)? }
            }
            // A timeout of the set's own, or counters in elements, are not ours.
            "dynset" if body.get(7).is_none() && body.get(10).is_none() => Expression::DynamicSet {
                set: body.get(1)?.text()?.to_owned(),
                operation: match number(3)? {
                    1 => DynamicOperation::Update,
                    2 => DynamicOperation::Delete,
                    _ => return None,
                },
                key: register(4)?,
                data: register(5)?,
                timeout_ms: body.get(6).and_then(|it| it.u64_be()).unwrap_or(0),
            },
            "ct" if number(3).is_none() && number(4).is_none() && body.get(3).is_none() => {
                Expression::Connection { key: number(2)?, register: register(1)? }
            }
            "fib" => Expression::Fib { result: number(2)?, flags: number(3)?, register: register(1)? },
            "bitwise" if number(6).unwrap_or(0) == 0 => {
                Expression::Bitwise { source: register(1)?, target: register(2)?, mask: value(4)?, flip: value(5)? }
            }
            // Source, target, operation, length, and the size of what is turned round.
            "byteorder" if register(1) == register(2) && number(4)? < number(5)? => Expression::Nothing,
            "cmp" => {
                let is_equal = match number(2)? {
                    0 => true,
                    1 => false,
                    _ => return None,
                };
                Expression::Compare { register: register(1)?, is_equal, value: value(3)? }
            }
            "lookup" => Expression::Lookup {
                set: body.get(1)?.text()?.to_owned(),
                source: register(2)?,
                target: register(3),
                inverted: number(5).unwrap_or(0) & 1 == 1,
            },
            "immediate" if number(1) == Some(VERDICT_REGISTER) => {
                let verdict = body.get(2)?.nested().get(data::VERDICT)?.nested();
                Expression::Verdict {
                    code: verdict.get(data::VERDICT_CODE)?.u32_be()?.cast_signed(),
                    chain: verdict.get(data::VERDICT_CHAIN).and_then(|it| it.text()).map(str::to_owned),
                }
            }
            "numgen" if number(3) == Some(1) => {
                Expression::Random { register: register(1)?, modulus: number(2)?, offset: number(4).unwrap_or(0) }
            }
            "nat" if number(1) == Some(1) => {
                Expression::DestinationNat { family: number(2)?, address: register(3)?, port: register(5)? }
            }
            "masq" if number(2).is_none() => Expression::Masquerade { flags: number(1).unwrap_or(0) },
            "reject" => Expression::Reject { kind: number(1)?, code: body.get(2).and_then(|it| it.u8()).unwrap_or(0) },
            _ => return None,
        })
    }
}

fn put_value(body: &mut MessageBuilder, kind: u16, bytes: &[u8]) {
    body.nested(kind, |value| {
        value.put_bytes(data::VALUE, bytes);
    });
}

/// The kernel names a register that is a multiple of sixteen bytes by its old name, 1 to 4
/// (`nft_dump_register`).
fn normal_register(register: u32) -> u32 {
    match register {
        1..=4 => FIRST_REGISTER + (register - 1) * 4,
        other => other,
    }
}
