//! Statements that consist of many instructions: choosing an endpoint, and keeping clients at theirs.

use portolan_net::{Family, Protocol};
use portolan_program::nftables::{KeyExpression, Learned, Name, Statement};

use super::expression::{DynamicOperation, Expression, FIRST_REGISTER, REGISTERS};
use super::rules::{META_PROTOCOL, TRANSPORT_HEADER, destination, load_address, number_of, source, write_key};

/// `NFT_CT_PROTO_DST`, `NFT_CT_DST_IP`, `NFT_CT_DST_IP6`.
const CONNECTION_PORT: u32 = 12;
const CONNECTION_ADDRESS_V4: u32 = 20;
const CONNECTION_ADDRESS_V6: u32 = 22;

/// The instructions of such a statement; none for others.
pub(super) fn write(family: Family, statement: &Statement) -> Vec<Expression> {
    let words = destination(family).1 / 4;
    let mut list = Vec::new();
    let first = FIRST_REGISTER;
    let lookup =
        |set: &Name, target| Expression::Lookup { set: set.to_string(), source: first, target, inverted: false };
    match statement {
        Statement::Balance { key, slots, offset, map } => {
            let slot = write_key(family, *key, first, &mut list);
            list.push(Expression::Random { register: slot, modulus: *slots, offset: *offset });
            list.push(lookup(map, Some(first)));
            list.push(translate(family, first, words));
        }
        Statement::Keep { key, clients } => {
            write_client(family, *key, &mut list);
            list.push(lookup(clients, Some(first)));
            list.push(translate(family, first, words));
        }
        Statement::Remember(learned) => {
            let (operation, timeout_ms) = (DynamicOperation::Update, u64::from(learned.seconds) * 1000);
            write_learned(family, learned, true, operation, timeout_ms, &mut list);
        }
        Statement::Forget(learned) => {
            write_learned(family, learned, false, DynamicOperation::Delete, 0, &mut list);
        }
        _ => {}
    }
    list
}

fn translate(family: Family, address: u32, words: u32) -> Expression {
    Expression::DestinationNat { family: number_of(family), address, port: address + words }
}

/// Conditions on the frontend and the endpoint, then the change of the map.
fn write_learned(
    family: Family,
    learned: &Learned,
    lives: bool,
    operation: DynamicOperation,
    timeout_ms: u64,
    list: &mut Vec<Expression>,
) {
    let (first, words) = (FIRST_REGISTER, destination(family).1 / 4);
    let compare = |is_equal, value| Expression::Compare { register: first, is_equal, value };
    let lookup =
        |set: &Name, inverted| Expression::Lookup { set: set.to_string(), source: first, target: None, inverted };
    // `tcp dport != 0`: what tells `nft` the protocol.
    list.push(Expression::Meta { key: META_PROTOCOL, register: first });
    list.push(compare(true, vec![learned.protocol.number(family)]));
    list.push(Expression::Payload { base: TRANSPORT_HEADER, offset: 2, length: 2, register: first });
    list.push(compare(false, vec![0, 0]));
    let number = write_original(family, learned.key, first, list);
    list.push(Expression::Random { register: number, modulus: 1, offset: learned.seconds });
    list.push(lookup(&learned.timeouts, false));
    let endpoint = write_original(family, learned.key, first, list);
    write_endpoint(family, endpoint, list);
    list.push(lookup(&learned.endpoints, !lives));
    list.push(load_address(source(family), first));
    let behind = write_original(family, learned.key, first + words, list);
    // As `nft` does it: at a multiple of sixteen bytes. It cannot do it at all where that does not fit.
    let aligned = first + (behind - first).next_multiple_of(4);
    let data = if aligned + words < first + REGISTERS { aligned } else { behind };
    // The kernel wants a value for every map, also to delete.
    write_endpoint(family, data, list);
    let set = learned.clients.to_string();
    list.push(Expression::DynamicSet { set, operation, key: first, data, timeout_ms });
}

/// Loads the client and the frontend, and returns the register behind them.
fn write_client(family: Family, key: KeyExpression, list: &mut Vec<Expression>) -> u32 {
    list.push(load_address(source(family), FIRST_REGISTER));
    write_key(family, key, FIRST_REGISTER + destination(family).1 / 4, list)
}

/// Loads the packet's destination as an endpoint.
fn write_endpoint(family: Family, register: u32, list: &mut Vec<Expression>) {
    list.push(load_address(destination(family), register));
    let register = register + destination(family).1 / 4;
    list.push(Expression::Payload { base: TRANSPORT_HEADER, offset: 2, length: 2, register });
}

/// Loads the frontend to which the connection went before it was translated.
fn write_original(family: Family, key: KeyExpression, mut register: u32, list: &mut Vec<Expression>) -> u32 {
    if key == KeyExpression::Frontend {
        let key = match family {
            Family::V4 => CONNECTION_ADDRESS_V4,
            Family::V6 => CONNECTION_ADDRESS_V6,
        };
        list.push(Expression::ConnectionOriginal { key, register });
        register += destination(family).1 / 4;
    }
    list.push(Expression::Meta { key: META_PROTOCOL, register });
    list.push(Expression::ConnectionOriginal { key: CONNECTION_PORT, register: register + 1 });
    register + 2
}

/// The statement that begins a list of instructions, and what follows it.
pub(super) fn read(family: Family, list: &[Expression]) -> Option<(Statement, &[Expression])> {
    for key in [KeyExpression::Frontend, KeyExpression::NodePort] {
        let makers: [fn(KeyExpression, Parts) -> Statement; 4] = [
            |key, it| Statement::Balance { key, slots: it.modulus, offset: it.offset, map: it.names[0].clone() },
            |key, it| Statement::Keep { key, clients: it.names[0].clone() },
            |key, it| Statement::Remember(it.learned(key)),
            |key, it| Statement::Forget(it.learned(key)),
        ];
        for make in makers {
            let length = write(family, &make(key, Parts::default())).len();
            let Some((head, rest)) = list.split_at_checked(length) else { continue };
            let statement = make(key, Parts::of(head));
            if write(family, &statement) == head {
                return Some((statement, rest));
            }
        }
    }
    None
}

/// What differs between statements of one kind.
#[derive(Default)]
struct Parts {
    names: [Name; 3],
    modulus: u32,
    offset: u32,
    protocol: Option<Protocol>,
}

impl Parts {
    fn of(list: &[Expression]) -> Parts {
        let mut parts = Parts::default();
        let names = list.iter().filter_map(|expression| match expression {
            Expression::Lookup { set, .. } | Expression::DynamicSet { set, .. } => Some(Name::from(set.as_str())),
            _ => None,
        });
        for (into, name) in parts.names.iter_mut().zip(names) {
            *into = name;
        }
        let random = list.iter().find_map(|expression| match expression {
            Expression::Random { modulus, offset, .. } => Some((*modulus, *offset)),
            _ => None,
        });
        (parts.modulus, parts.offset) = random.unwrap_or_default();
        parts.protocol = list.iter().find_map(|expression| match expression {
            Expression::Compare { value, .. } => Protocol::from_number(*value.first()?),
            _ => None,
        });
        parts
    }

    fn learned(self, key: KeyExpression) -> Learned {
        let [timeouts, endpoints, clients] = self.names;
        let protocol = self.protocol.unwrap_or(Protocol::Tcp);
        Learned { key, protocol, seconds: self.offset, timeouts, endpoints, clients }
    }
}
