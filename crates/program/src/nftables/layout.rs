//! The fixed parts: which sets and chains there are, and the rules that do not depend on Services.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portolan_net::{Family, Origin, Protocol};

use super::{
    BaseHook, Chain, ChainKind, Hook, KeyExpression, Match, Program, Rejection, Rule, Set, SetKind, Statement, Table,
    TableKey, TableName,
};
use crate::layout::{MASQUERADE_MARK, PRIORITY_DESTINATION_NAT, PRIORITY_FILTER, PRIORITY_SOURCE_NAT};

pub(super) const SERVICE_IPS: &str = "service-ips";
pub(super) const SERVICE_NODEPORTS: &str = "service-nodeports";
pub(super) const MASQUERADE_IPS: &str = "masquerade-ips";
pub(super) const MASQUERADE_NODEPORTS: &str = "masquerade-nodeports";
pub(super) const ENDPOINTS: &str = "endpoints";
pub(super) const NODEPORT_ENDPOINTS: &str = "nodeport-endpoints";
pub(super) const NO_ENDPOINT_SERVICES: &str = "no-endpoint-services";
pub(super) const NO_ENDPOINT_NODEPORTS: &str = "no-endpoint-nodeports";
pub(super) const CLUSTER_PREFIXES: &str = "cluster-prefixes";
pub(super) const POD_PREFIXES: &str = "pod-prefixes";
pub(super) const HAIRPIN: &str = "hairpin";

pub(super) const BALANCE: &str = "balance";
pub(super) const BALANCE_NODEPORTS: &str = "balance-nodeports";
const SERVICES: &str = "services";
const NO_ENDPOINTS: &str = "no-endpoints";
const REJECT: &str = "reject-chain";

const SERVICE_SETS: [(&str, SetKind); 10] = [
    (SERVICE_IPS, SetKind::Frontends),
    (SERVICE_NODEPORTS, SetKind::NodePorts),
    (MASQUERADE_IPS, SetKind::Frontends),
    (MASQUERADE_NODEPORTS, SetKind::NodePorts),
    (ENDPOINTS, SetKind::FrontendSlots),
    (NODEPORT_ENDPOINTS, SetKind::NodePortSlots),
    (NO_ENDPOINT_SERVICES, SetKind::Frontends),
    (NO_ENDPOINT_NODEPORTS, SetKind::NodePorts),
    (CLUSTER_PREFIXES, SetKind::Prefixes),
    (HAIRPIN, SetKind::AddressPairs),
];

const BASE_CHAINS: [(&str, ChainKind, Hook, i32); 7] = [
    ("filter-input", ChainKind::Filter, Hook::Input, PRIORITY_FILTER),
    ("filter-forward", ChainKind::Filter, Hook::Forward, PRIORITY_FILTER),
    ("filter-output", ChainKind::Filter, Hook::Output, PRIORITY_FILTER),
    ("nat-prerouting", ChainKind::Nat, Hook::Prerouting, PRIORITY_DESTINATION_NAT),
    ("nat-output", ChainKind::Nat, Hook::Output, PRIORITY_DESTINATION_NAT),
    ("nat-postrouting", ChainKind::Nat, Hook::Postrouting, PRIORITY_SOURCE_NAT),
    ("postrouting", ChainKind::Nat, Hook::Postrouting, PRIORITY_SOURCE_NAT),
];

/// Whether a chain of this name is entered by the kernel and not by a rule.
pub(super) fn is_base(chain: &str) -> bool {
    BASE_CHAINS.iter().any(|(name, ..)| *name == chain)
}

/// The table with all that does not depend on intent.
pub(super) fn skeleton(key: TableKey) -> Table {
    match key.name {
        TableName::Services => services(key.family),
        TableName::Masquerade => masquerade(key.family),
    }
}

/// The program of a family without Services, with one balancing rule: all that a kernel must be able to
/// hold, so that it can be asked whether it is.
pub fn blank(family: Family) -> Program {
    let mut program = Program::default();
    for name in TableName::ALL {
        let key = TableKey { family, name };
        let mut table = skeleton(key);
        if let Some(chain) = table.chains.get_mut(BALANCE) {
            let (key, map) = (KeyExpression::Frontend, ENDPOINTS.into());
            let statement = Statement::Balance { key, slots: 1, offset: 0, map };
            chain.rules.push(Rule { statements: vec![statement], ..Rule::default() });
        }
        program.tables.insert(key, table);
    }
    program
}

fn services(family: Family) -> Table {
    let mut table = Table::default();
    table.sets.extend(SERVICE_SETS.map(|(name, kind)| (name.into(), Set::empty(kind))));
    let refuse = vec![Rule {
        matches: vec![Match::NewConnection],
        statements: vec![Statement::Jump(NO_ENDPOINTS.into())],
        ..Rule::default()
    }];
    let enter = vec![Rule { statements: vec![Statement::Jump(SERVICES.into())], ..Rule::default() }];
    let chains = [
        base("filter-input", refuse.clone()),
        base("filter-forward", refuse.clone()),
        base("filter-output", refuse),
        base("nat-prerouting", enter.clone()),
        base("nat-output", enter),
        base("nat-postrouting", service_postrouting()),
        (SERVICES, regular(service_dispatch(family))),
        (NO_ENDPOINTS, regular(no_endpoints(family))),
        (REJECT, regular(reject())),
        (BALANCE, regular(balance_head(KeyExpression::Frontend))),
        (BALANCE_NODEPORTS, regular(balance_head(KeyExpression::NodePort))),
    ];
    table.chains.extend(chains.map(|(name, chain)| (name.into(), chain)));
    table
}

fn masquerade(family: Family) -> Table {
    let mut table = Table::default();
    table.sets.extend([POD_PREFIXES, CLUSTER_PREFIXES].map(|name| (name.into(), Set::empty(SetKind::Prefixes))));
    let marked = Rule {
        // The Services table does it, or kube-proxy where that runs: never twice (Flannel's rule 1).
        matches: vec![Match::Mark(MASQUERADE_MARK)],
        statements: vec![Statement::Return],
        ..Rule::default()
    };
    let outward = Rule {
        matches: vec![
            in_set(KeyExpression::Source, POD_PREFIXES, true),
            in_set(KeyExpression::Destination, CLUSTER_PREFIXES, false),
            Match::Destination { prefix: multicast(family), inside: false },
        ],
        statements: vec![Statement::Masquerade],
        comment: Some("pods to outside the cluster".into()),
        origin: Some(Origin::configuration("masquerade")),
    };
    let (name, chain) = base("postrouting", vec![marked, outward]);
    table.chains.insert(name.into(), chain);
    table
}

fn base(name: &'static str, rules: Vec<Rule>) -> (&'static str, Chain) {
    let base = BASE_CHAINS.iter().find(|(it, ..)| *it == name).map(|(_, kind, hook, priority)| BaseHook {
        kind: *kind,
        hook: *hook,
        priority: *priority,
        accepts: true,
    });
    (name, Chain { base, rules })
}

fn regular(rules: Vec<Rule>) -> Chain {
    Chain { base: None, rules }
}

fn in_set(key: KeyExpression, set: &str, inside: bool) -> Match {
    Match::Set { key, set: set.into(), inside }
}

/// Node ports answer at every address of the node but the loopback ones: a connection from there to
/// a pod would need `route_localnet`.
fn at_node_address(family: Family) -> [Match; 2] {
    [Match::Destination { prefix: loopback(family), inside: false }, Match::DestinationIsLocal]
}

fn service_dispatch(family: Family) -> Vec<Rule> {
    let [not_loopback, is_local] = at_node_address(family);
    vec![
        Rule {
            matches: vec![in_set(KeyExpression::Frontend, SERVICE_IPS, true)],
            statements: vec![Statement::Goto(BALANCE.into())],
            ..Rule::default()
        },
        Rule {
            matches: vec![not_loopback, is_local, in_set(KeyExpression::NodePort, SERVICE_NODEPORTS, true)],
            statements: vec![Statement::Goto(BALANCE_NODEPORTS.into())],
            ..Rule::default()
        },
    ]
}

/// What the balancing chains do before they choose: marks what leaves with the node's address.
pub(super) fn balance_head(key: KeyExpression) -> Vec<Rule> {
    let always = if key == KeyExpression::Frontend { MASQUERADE_IPS } else { MASQUERADE_NODEPORTS };
    let mark = |condition: Match| Rule {
        matches: vec![condition],
        statements: vec![Statement::SetMark(MASQUERADE_MARK)],
        ..Rule::default()
    };
    vec![mark(in_set(KeyExpression::Source, CLUSTER_PREFIXES, false)), mark(in_set(key, always, true))]
}

fn service_postrouting() -> Vec<Rule> {
    vec![
        Rule {
            matches: vec![Match::Mark(MASQUERADE_MARK)],
            statements: vec![Statement::ClearMark(MASQUERADE_MARK), Statement::Masquerade],
            ..Rule::default()
        },
        Rule {
            matches: vec![in_set(KeyExpression::AddressPair, HAIRPIN, true), Match::DestinationTranslated],
            statements: vec![Statement::Masquerade],
            comment: Some("a pod that reaches itself through its Service".into()),
            origin: None,
        },
    ]
}

fn no_endpoints(family: Family) -> Vec<Rule> {
    let [not_loopback, is_local] = at_node_address(family);
    vec![
        Rule {
            matches: vec![in_set(KeyExpression::Frontend, NO_ENDPOINT_SERVICES, true)],
            statements: vec![Statement::Goto(REJECT.into())],
            ..Rule::default()
        },
        Rule {
            matches: vec![not_loopback, is_local, in_set(KeyExpression::NodePort, NO_ENDPOINT_NODEPORTS, true)],
            statements: vec![Statement::Goto(REJECT.into())],
            ..Rule::default()
        },
    ]
}

fn reject() -> Vec<Rule> {
    vec![
        Rule {
            matches: vec![Match::Protocol(Protocol::Tcp)],
            statements: vec![Statement::Reject(Rejection::TcpReset)],
            ..Rule::default()
        },
        Rule { statements: vec![Statement::Reject(Rejection::PortUnreachable)], ..Rule::default() },
    ]
}

/// RFC 1122 §3.2.1.3 (g), RFC 4291 §2.5.3.
fn loopback(family: Family) -> IpNet {
    match family {
        Family::V4 => Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8).into(),
        Family::V6 => Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128).into(),
    }
}

/// RFC 5771, RFC 4291 §2.7.
fn multicast(family: Family) -> IpNet {
    match family {
        Family::V4 => Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4).into(),
        Family::V6 => Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8).into(),
    }
}
