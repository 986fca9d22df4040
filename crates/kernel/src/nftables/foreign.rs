//! What can be told of tables that others make: those of iptables' programs on the nft backend.

use portolan_net::Family;
use portolan_program::iptables::TableName;

use super::constants::{
    DELETE_CHAIN, DELETE_RULE, FAMILY_IPV4, FAMILY_IPV6, HEADER_LENGTH, NEW_CHAIN, NEW_GENERATION, NEW_RULE, chain,
    rule,
};
use super::expression::Expression;
use crate::monitor::{ChainName, Event};
use crate::rawnetlink::OwnedMessage;

/// What a notification tells of.
pub(crate) fn event(message: &OwnedMessage) -> Option<Event> {
    let (table, name) = match message.kind & 0xff {
        // The end of a transaction, whose changes were told before.
        NEW_GENERATION => return None,
        NEW_RULE | DELETE_RULE => (rule::TABLE, rule::CHAIN),
        NEW_CHAIN | DELETE_CHAIN => (chain::TABLE, chain::NAME),
        _ => return Some(Event::Ruleset),
    };
    Some(chain_name(message, table, name).map_or(Event::Ruleset, Event::Rules))
}

/// The chain that a message names, if it lies in a table of iptables' programs.
fn chain_name(message: &OwnedMessage, table: u16, name: u16) -> Option<ChainName> {
    let family = match *message.header::<HEADER_LENGTH>()?.first()? {
        FAMILY_IPV4 => Family::V4,
        FAMILY_IPV6 => Family::V6,
        _ => return None,
    };
    let attributes = message.attributes(HEADER_LENGTH);
    let table = TableName::from_name(attributes.get(table)?.text()?)?;
    Some(ChainName { family, table, chain: attributes.get(name)?.text()?.to_owned() })
}

/// The chain that a rule leads to, whatever else it says.
pub(super) fn leads_to(message: &OwnedMessage) -> Option<String> {
    let list = message.attributes(HEADER_LENGTH).get(rule::EXPRESSIONS)?.nested();
    list.map(|it| Expression::read(&it)).find_map(|expression| match expression {
        Expression::Verdict { chain, .. } => chain,
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rawnetlink::MessageBuilder;

    fn message(kind: u16, family: u8, table: &str, name: (u16, &str)) -> OwnedMessage {
        let mut builder = MessageBuilder::new(kind, 0);
        builder.header(&[family, 0, 0, 0]).put_str(1, table).put_str(name.0, name.1);
        let bytes = builder.finish();
        OwnedMessage { kind, flags: 0, payload: bytes.get(16..).unwrap().to_vec() }
    }

    #[test]
    fn chains_of_iptables_are_named_and_others_are_not() {
        let of = |kind: u16| (super::super::constants::SUBSYSTEM << 8) | kind;
        let expected = ChainName { family: Family::V6, table: TableName::Nat, chain: "KUBE-SERVICES".into() };
        let rule = message(of(DELETE_RULE), FAMILY_IPV6, "nat", (rule::CHAIN, "KUBE-SERVICES"));
        assert_eq!(event(&rule), Some(Event::Rules(expected.clone())));
        let chain = message(of(NEW_CHAIN), FAMILY_IPV6, "nat", (chain::NAME, "KUBE-SERVICES"));
        assert_eq!(event(&chain), Some(Event::Rules(expected)));
        // `inet`, and a table that is nobody's of iptables.
        for other in [
            message(of(NEW_RULE), 1, "nat", (rule::CHAIN, "x")),
            message(of(NEW_RULE), FAMILY_IPV4, "portolan-services", (rule::CHAIN, "x")),
            message(of(12), FAMILY_IPV4, "nat", (rule::CHAIN, "x")),
        ] {
            assert_eq!(event(&other), Some(Event::Ruleset));
        }
        assert_eq!(event(&message(of(NEW_GENERATION), 0, "", (3, ""))), None);
    }
}
