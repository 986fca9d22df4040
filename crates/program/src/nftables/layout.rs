//! Names of sets and chains, which table has which, and how frontends are told apart by address and by port.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portolan_intent::services::{DetectLocal, NodePortAddresses, ProxySettings};
use portolan_net::{Family, Protocol};

use super::{
    BaseHook, Chain, ChainKind, Hook, KeyExpression, Match, Name, Program, Set, SetKind, Statement, Table, TableKey,
    TableName,
};
use crate::layout::{PRIORITY_DESTINATION_NAT, PRIORITY_FILTER, PRIORITY_SOURCE_NAT};

pub(super) const CLUSTER_IPS: &str = "cluster-ips";
pub(super) const CLUSTER_PREFIXES: &str = "cluster-prefixes";
pub(super) const NODE_PREFIXES: &str = "node-prefixes";
pub(super) const NODEPORT_IPS: &str = "nodeport-ips";
pub(super) const POD_PREFIXES: &str = "pod-prefixes";
pub(super) const HAIRPIN: &str = "hairpin";

pub(super) const SERVICES: &str = "services";
pub(super) const NODEPORTS: &str = "nodeports";
pub(super) const NO_ENDPOINTS: &str = "no-endpoints";
pub(super) const REJECT: &str = "reject-chain";
pub(super) const LEARN: &str = "learn";
pub(super) const LEARN_OUTSIDE: &str = "learn-outside";

/// Which frontends: those that are an address and port, or those that are a port of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    Address,
    NodePort,
}

/// The sets and chains of one scope.
#[derive(Debug)]
pub(super) struct Names {
    /// The fields of a packet that name a frontend, and those and its source.
    pub(super) key: KeyExpression,
    pub(super) source_key: KeyExpression,
    /// Gates: frontends that all clients use alike; those that differ by client; those that refuse.
    pub(super) services: &'static str,
    pub(super) policies: &'static str,
    pub(super) refused: &'static str,
    /// Traits: other endpoints for clients outside, limited sources, and whose address is replaced.
    pub(super) local: &'static str,
    pub(super) restricted: &'static str,
    pub(super) sources: &'static str,
    pub(super) masquerade: &'static str,
    pub(super) masquerade_node: &'static str,
    pub(super) masquerade_never: &'static str,
    /// Endpoints, and which clients keep theirs.
    pub(super) endpoints: &'static str,
    pub(super) affinity: &'static str,
    pub(super) affinity_clients: &'static str,
    pub(super) affinity_timeouts: &'static str,
    pub(super) affinity_endpoints: &'static str,
    pub(super) affinity_outside_endpoints: &'static str,
    /// Chains.
    pub(super) serve: &'static str,
    pub(super) policy: &'static str,
    pub(super) policy_local: &'static str,
    pub(super) mark: &'static str,
    pub(super) balance: &'static str,
    pub(super) balance_local: &'static str,
}

static ADDRESS: Names = Names {
    key: KeyExpression::Frontend,
    source_key: KeyExpression::FrontendSource,
    services: "service-ips",
    policies: "policy-ips",
    refused: "no-endpoint-services",
    local: "local-policy-ips",
    restricted: "restricted-ips",
    sources: "restricted-ips-sources",
    masquerade: "masquerade-ips",
    masquerade_node: "masquerade-node-ips",
    masquerade_never: "masquerade-never-ips",
    endpoints: "endpoints",
    affinity: "affinity-ips",
    affinity_clients: "affinity-clients",
    affinity_timeouts: "affinity-timeouts",
    affinity_endpoints: "affinity-endpoints",
    affinity_outside_endpoints: "affinity-outside-endpoints",
    serve: "serve",
    policy: "serve-by-policy",
    policy_local: "serve-local",
    mark: "mark-for-masquerade",
    balance: "balance",
    balance_local: "balance-local",
};

static NODE_PORT: Names = Names {
    key: KeyExpression::NodePort,
    source_key: KeyExpression::NodePortSource,
    services: "service-nodeports",
    policies: "policy-nodeports",
    refused: "no-endpoint-nodeports",
    local: "local-policy-nodeports",
    restricted: "restricted-nodeports",
    sources: "restricted-nodeports-sources",
    masquerade: "masquerade-nodeports",
    masquerade_node: "masquerade-node-nodeports",
    masquerade_never: "masquerade-never-nodeports",
    endpoints: "nodeport-endpoints",
    affinity: "affinity-nodeports",
    affinity_clients: "nodeport-affinity-clients",
    affinity_timeouts: "nodeport-affinity-timeouts",
    affinity_endpoints: "nodeport-affinity-endpoints",
    affinity_outside_endpoints: "nodeport-affinity-outside-endpoints",
    serve: "serve-nodeports",
    policy: "serve-by-policy-nodeports",
    policy_local: "serve-local-nodeports",
    mark: "mark-for-masquerade-nodeports",
    balance: "balance-nodeports",
    balance_local: "balance-local-nodeports",
};

impl Scope {
    pub(super) const ALL: [Scope; 2] = [Scope::Address, Scope::NodePort];

    pub(super) fn names(self) -> &'static Names {
        match self {
            Scope::Address => &ADDRESS,
            Scope::NodePort => &NODE_PORT,
        }
    }

    fn sets(self) -> [(&'static str, SetKind); 15] {
        let names = self.names();
        let (plain, slots, sources, numbers, endpoints, clients) = match self {
            Scope::Address => (
                SetKind::Frontends,
                SetKind::FrontendSlots,
                SetKind::FrontendSources,
                SetKind::FrontendNumbers,
                SetKind::FrontendEndpoints,
                SetKind::FrontendClients,
            ),
            Scope::NodePort => (
                SetKind::NodePorts,
                SetKind::NodePortSlots,
                SetKind::NodePortSources,
                SetKind::NodePortNumbers,
                SetKind::NodePortEndpoints,
                SetKind::NodePortClients,
            ),
        };
        [
            (names.services, plain),
            (names.policies, plain),
            (names.refused, plain),
            (names.local, plain),
            (names.restricted, plain),
            (names.sources, sources),
            (names.masquerade, plain),
            (names.masquerade_node, plain),
            (names.masquerade_never, plain),
            (names.endpoints, slots),
            (names.affinity, plain),
            (names.affinity_clients, clients),
            (names.affinity_timeouts, numbers),
            (names.affinity_endpoints, endpoints),
            (names.affinity_outside_endpoints, endpoints),
        ]
    }
}

/// Whether packets are sent somewhere because of this set's elements.
pub(super) fn is_gate(set: &str) -> bool {
    Scope::ALL
        .iter()
        .map(|scope| scope.names())
        .any(|names| [names.services, names.policies, names.refused].contains(&set))
        || set == CLUSTER_IPS
}

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

/// Where a base chain of ours is hooked.
pub(super) fn base_hook(chain: &str) -> Option<BaseHook> {
    let (_, kind, hook, priority) = BASE_CHAINS.iter().find(|(name, ..)| *name == chain)?;
    Some(BaseHook { kind: *kind, hook: *hook, priority: *priority, accepts: true })
}

/// The part of a node's settings that rules depend on.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub(super) detect_local: DetectLocal,
    pub(super) node_port_addresses: NodePortAddresses,
}

impl Settings {
    pub(super) fn of(proxy: &ProxySettings) -> Settings {
        Settings { detect_local: proxy.detect_local.clone(), node_port_addresses: proxy.node_port_addresses.clone() }
    }

    /// Whether pods are told from other clients at all.
    pub(super) fn tells_pods(&self) -> bool {
        self.detect_local != DetectLocal::Nothing
    }

    /// How a packet from outside is told: neither from a pod nor from this node.
    pub(super) fn outside(&self) -> impl Iterator<Item = Match> {
        self.pod(false).into_iter().chain([Match::SourceIsLocal { inside: false }])
    }

    /// How a packet from a pod is told, or one that is not from a pod. Ask [`Settings::tells_pods`] first.
    pub(super) fn pod(&self, inside: bool) -> Option<Match> {
        let prefixes = |set: &str| Match::Set { key: KeyExpression::Source, set: set.into(), inside };
        let interface = |name: &str, is_prefix| Match::Interface { name: name.to_owned(), is_prefix, inside };
        match &self.detect_local {
            DetectLocal::ClusterPrefixes => Some(prefixes(CLUSTER_PREFIXES)),
            DetectLocal::NodePrefixes => Some(prefixes(NODE_PREFIXES)),
            DetectLocal::Bridge(name) => Some(interface(name, false)),
            DetectLocal::InterfacePrefix(name) => Some(interface(name, true)),
            DetectLocal::Nothing => None,
        }
    }

    /// Where node ports answer: at addresses of the node, but never at loopback ones, since a connection from
    /// there to a pod would need `route_localnet`.
    pub(super) fn at_node_port(&self, family: Family) -> Vec<Match> {
        let mut matches = vec![Match::Destination { prefix: loopback(family), inside: false }];
        if self.node_port_addresses != NodePortAddresses::All {
            matches.push(Match::Set { key: KeyExpression::Destination, set: NODEPORT_IPS.into(), inside: true });
        }
        matches.push(Match::DestinationIsLocal);
        matches
    }
}

/// The table with all that does not depend on intent.
pub(super) fn skeleton(key: TableKey, settings: &Settings) -> Table {
    let mut table = Table::default();
    match key.name {
        TableName::Services => {
            let sets = Scope::ALL.into_iter().flat_map(Scope::sets);
            table.sets.extend(sets.map(|(name, kind)| (name.into(), Set::empty(kind))));
            table.sets.insert(CLUSTER_IPS.into(), Set::empty(SetKind::Addresses));
            table.sets.insert(HAIRPIN.into(), Set::empty(SetKind::AddressPairs));
            let prefixes = match settings.detect_local {
                DetectLocal::ClusterPrefixes => Some(CLUSTER_PREFIXES),
                DetectLocal::NodePrefixes => Some(NODE_PREFIXES),
                DetectLocal::Bridge(_) | DetectLocal::InterfacePrefix(_) | DetectLocal::Nothing => None,
            };
            let node_ports = (settings.node_port_addresses != NodePortAddresses::All).then_some(NODEPORT_IPS);
            let prefixes = prefixes.into_iter().chain(node_ports);
            table.sets.extend(prefixes.map(|name| (name.into(), Set::empty(SetKind::Prefixes))));
            table.chains = super::chains::services(key.family, settings);
        }
        TableName::Masquerade => {
            let names = [POD_PREFIXES, CLUSTER_PREFIXES];
            table.sets.extend(names.map(|name| (name.into(), Set::empty(SetKind::Prefixes))));
            table.chains = super::chains::masquerade(key.family);
        }
    }
    table
}

/// The program of a family without Services, with one rule of each kind that comes and goes: all that a kernel
/// must be able to hold, so that it can be asked whether it is.
pub fn blank(family: Family) -> Program {
    let mut program = Program::default();
    let settings = Settings::of(&ProxySettings::default());
    for name in TableName::ALL {
        let key = TableKey { family, name };
        program.tables.insert(key, skeleton(key, &settings));
    }
    let Some(table) = program.tables.get_mut(&TableKey { family, name: TableName::Services }) else { return program };
    let names = Scope::Address.names();
    let (key, map) = (names.key, names.endpoints.into());
    let mut fill = |chain: &str, rules: Vec<super::Rule>| {
        table.chains.insert(Name::from(chain), Chain { base: None, rules });
    };
    fill(names.balance, vec![super::chains::rule(Statement::Balance { key, slots: 1, offset: 0, map })]);
    fill(LEARN, super::chains::learn(names, Protocol::Tcp, 1, false).into());
    program
}

/// RFC 1122 §3.2.1.3 (g), RFC 4291 §2.5.3.
pub(super) fn loopback(family: Family) -> IpNet {
    match family {
        Family::V4 => Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8).into(),
        Family::V6 => Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128).into(),
    }
}

/// RFC 5771, RFC 4291 §2.7.
pub(super) fn multicast(family: Family) -> IpNet {
    match family {
        Family::V4 => Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4).into(),
        Family::V6 => Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8).into(),
    }
}
