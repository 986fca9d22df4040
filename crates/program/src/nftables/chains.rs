//! The chains and their rules. Those that depend on intent are few, and come and go one by one.
//!
//! A frontend that is in a gate is answered by its chain, whatever happens: where no endpoint is found, the chain
//! ends with a drop. So a frontend without endpoints for a client needs no rule and no element.

use std::collections::BTreeMap;

use portolan_net::{Family, Origin, Protocol};

use super::layout::{
    CLUSTER_IPS, CLUSTER_PREFIXES, HAIRPIN, LEARN, LEARN_OUTSIDE, NO_ENDPOINTS, NODEPORTS, Names, POD_PREFIXES, REJECT,
    SERVICES, Scope, Settings, base_hook, multicast,
};
use super::{Chain, KeyExpression, Learned, Match, Name, Rejection, Rule, Statement};
use crate::layout::MASQUERADE_MARK;

/// The chains of the Services table.
pub(super) fn services(family: Family, settings: &Settings) -> BTreeMap<Name, Chain> {
    let check = || vec![when(Match::NewConnection, Statement::Jump(NO_ENDPOINTS.into()))];
    let enter = || vec![rule(Statement::Jump(SERVICES.into()))];
    let mut chains = BTreeMap::from([
        chain("filter-input", check()),
        chain("filter-forward", check()),
        chain("filter-output", check()),
        chain("nat-prerouting", enter()),
        chain("nat-output", enter()),
        chain("nat-postrouting", postrouting()),
        chain(SERVICES, dispatch(family, settings)),
        chain(NODEPORTS, gates(Scope::NodePort)),
        chain(NO_ENDPOINTS, no_endpoints(family, settings)),
        chain(REJECT, reject()),
        chain(LEARN, Vec::new()),
        chain(LEARN_OUTSIDE, Vec::new()),
    ]);
    for names in Scope::ALL.map(Scope::names) {
        chains.extend([
            chain(names.serve, serve(names)),
            chain(names.policy, policy(names, settings)),
            chain(names.policy_local, policy_local(names)),
            chain(names.mark, mark(names, settings)),
            chain(names.balance, Vec::new()),
            chain(names.balance_local, Vec::new()),
        ]);
    }
    chains
}

/// The chain of the masquerading table.
pub(super) fn masquerade(family: Family) -> BTreeMap<Name, Chain> {
    // The Services table does it, or kube-proxy where that runs: never twice (Flannel's rule 1).
    let marked = when(Match::Mark(MASQUERADE_MARK), Statement::Return);
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
    BTreeMap::from([chain("postrouting", vec![marked, outward])])
}

/// What remembers clients of Services with this protocol and timeout, inside the cluster or outside. One that is
/// remembered for an endpoint which is gone is forgotten, and its packet dropped, so that it tries again.
pub(super) fn learn(names: &Names, protocol: Protocol, seconds: u32, is_outside: bool) -> [Rule; 2] {
    let endpoints = if is_outside { names.affinity_outside_endpoints } else { names.affinity_endpoints };
    let learned = Learned {
        key: names.key,
        protocol,
        seconds,
        timeouts: names.affinity_timeouts.into(),
        endpoints: endpoints.into(),
        clients: names.affinity_clients.into(),
    };
    let forget = Rule { statements: vec![Statement::Forget(learned.clone()), Statement::Drop], ..Rule::default() };
    [rule(Statement::Remember(learned)), with_comment(forget, "its endpoint is gone")]
}

/// What comes before those rules for clients inside.
pub(super) fn learn_head(settings: &Settings) -> Rule {
    when_all(settings.outside().collect(), Statement::Goto(LEARN_OUTSIDE.into()))
}

/// A rule without conditions.
pub(super) fn rule(statement: Statement) -> Rule {
    Rule { statements: vec![statement], ..Rule::default() }
}

fn when(condition: Match, statement: Statement) -> Rule {
    when_all(vec![condition], statement)
}

fn when_all(matches: Vec<Match>, statement: Statement) -> Rule {
    Rule { matches, statements: vec![statement], ..Rule::default() }
}

fn chain(name: &str, rules: Vec<Rule>) -> (Name, Chain) {
    (name.into(), Chain { base: base_hook(name), rules })
}

fn in_set(key: KeyExpression, set: &str, inside: bool) -> Match {
    Match::Set { key, set: set.into(), inside }
}

fn with_comment(rule: Rule, comment: &str) -> Rule {
    Rule { comment: Some(comment.into()), ..rule }
}

fn gates(scope: Scope) -> Vec<Rule> {
    let names = scope.names();
    vec![
        when(in_set(names.key, names.services, true), Statement::Goto(names.serve.into())),
        when(in_set(names.key, names.policies, true), Statement::Goto(names.policy.into())),
    ]
}

fn dispatch(family: Family, settings: &Settings) -> Vec<Rule> {
    let mut rules = gates(Scope::Address);
    rules.push(when_all(settings.at_node_port(family), Statement::Goto(NODEPORTS.into())));
    rules
}

/// Frontends that answer all clients alike.
fn serve(names: &Names) -> Vec<Rule> {
    vec![
        rule(Statement::Jump(names.mark.into())),
        rule(Statement::Jump(names.balance.into())),
        with_comment(rule(Statement::Drop), "no endpoint here"),
    ]
}

/// Frontends that do not: some admit not everyone, have other endpoints for clients outside, or keep clients at
/// their endpoints.
fn policy(names: &Names, settings: &Settings) -> Vec<Rule> {
    let refused = when_all(
        vec![in_set(names.key, names.restricted, true), in_set(names.source_key, names.sources, false)],
        Statement::Drop,
    );
    let keep = Statement::Keep { key: names.key, clients: names.affinity_clients.into() };
    let outside = [in_set(names.key, names.local, true)].into_iter().chain(settings.outside());
    vec![
        with_comment(refused, "not in loadBalancerSourceRanges"),
        rule(Statement::Jump(names.mark.into())),
        when(in_set(names.key, names.affinity, true), keep),
        when_all(outside.collect(), Statement::Goto(names.policy_local.into())),
        rule(Statement::Jump(names.balance.into())),
        with_comment(rule(Statement::Drop), "no endpoint here"),
    ]
}

/// Clients outside of frontends whose policy is local.
fn policy_local(names: &Names) -> Vec<Rule> {
    vec![
        rule(Statement::Jump(names.balance_local.into())),
        with_comment(rule(Statement::Drop), "no endpoint on this node"),
    ]
}

/// Marks what leaves with the node's address. Pods' packets pass two lookups.
fn mark(names: &Names, settings: &Settings) -> Vec<Rule> {
    let set_mark = |matches| when_all(matches, Statement::SetMark(MASQUERADE_MARK));
    let is_in = |set: &str, inside| in_set(names.key, set, inside);
    let mut rules = vec![set_mark(vec![is_in(names.masquerade, true)])];
    if let Some(pod) = settings.pod(true) {
        rules.push(when(pod, Statement::Return));
        // What is in no set: everyone but pods.
        let others = vec![is_in(names.masquerade_node, false), is_in(names.masquerade_never, false)];
        rules.push(set_mark(others));
    }
    rules.push(set_mark(vec![is_in(names.masquerade_node, true), Match::SourceIsLocal { inside: true }]));
    rules
}

fn postrouting() -> Vec<Rule> {
    let masquerade = vec![Statement::ClearMark(MASQUERADE_MARK), Statement::Masquerade];
    let hairpin = when_all(
        vec![in_set(KeyExpression::AddressPair, HAIRPIN, true), Match::DestinationTranslated],
        Statement::Masquerade,
    );
    vec![
        Rule { matches: vec![Match::Mark(MASQUERADE_MARK)], statements: masquerade, ..Rule::default() },
        with_comment(hairpin, "a pod that reaches itself through its Service"),
    ]
}

/// What is translated is decided. What is not, and yet goes to a Service, is refused.
fn no_endpoints(family: Family, settings: &Settings) -> Vec<Rule> {
    let (address, node_port) = (Scope::Address.names(), Scope::NodePort.names());
    let to_reject = || Statement::Goto(REJECT.into());
    let mut at_node = settings.at_node_port(family);
    at_node.push(in_set(node_port.key, node_port.refused, true));
    let unserved = when(in_set(KeyExpression::Destination, CLUSTER_IPS, true), to_reject());
    vec![
        when(Match::DestinationTranslated, Statement::Goto(LEARN.into())),
        when(in_set(address.key, address.refused, true), to_reject()),
        with_comment(unserved, "not a port of the Service"),
        when_all(at_node, to_reject()),
    ]
}

fn reject() -> Vec<Rule> {
    vec![
        when(Match::Protocol(Protocol::Tcp), Statement::Reject(Rejection::TcpReset)),
        rule(Statement::Reject(Rejection::PortUnreachable)),
    ]
}
