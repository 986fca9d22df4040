//! What does not depend on Services: the chains that packets enter by, and the jumps to them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;
use portolan_intent::NodeView;
use portolan_intent::services::{DetectLocal, NodePortAddresses};
use portolan_net::{Family, Origin, Port, Protocol};

use super::compile::MARTIAN_COMMENT;
use super::{Chain, ChainName, Match, Probability, Rule, RuleBuilder, States, Table, TableName, Target};
use crate::layout::MASQUERADE_MARK;

pub(super) const SERVICES: &str = "KUBE-SERVICES";
pub(super) const NODE_PORTS: &str = "KUBE-NODEPORTS";
pub(super) const EXTERNAL_SERVICES: &str = "KUBE-EXTERNAL-SERVICES";
pub(super) const PROXY_FIREWALL: &str = "KUBE-PROXY-FIREWALL";
pub(super) const MARK_MASQUERADE: &str = "KUBE-MARK-MASQ";
const FORWARD: &str = "KUBE-FORWARD";
const POSTROUTING: &str = "KUBE-POSTROUTING";
const FIREWALL: &str = "KUBE-FIREWALL";
const CANARY: &str = "KUBE-PROXY-CANARY";

/// The jumps of a table: from which built-in chain, to which, with what comment, and whether only for the first
/// packets of connections. In the order in which they stand after kube-proxy put each in front of the others.
///
/// `OUTPUT` to `KUBE-EXTERNAL-SERVICES` is the one that kube-proxy does not have: with it, the node itself is
/// refused at an external address without endpoints as everyone else is.
type Jumps = &'static [(&'static str, &'static str, &'static str, bool)];

const FILTER_JUMPS: Jumps = &[
    ("INPUT", FIREWALL, "", false),
    ("INPUT", PROXY_FIREWALL, "kubernetes load balancer firewall", true),
    ("INPUT", NODE_PORTS, "kubernetes health check service ports", false),
    ("INPUT", EXTERNAL_SERVICES, "kubernetes externally-visible service portals", true),
    ("FORWARD", PROXY_FIREWALL, "kubernetes load balancer firewall", true),
    ("FORWARD", FORWARD, "kubernetes forwarding rules", false),
    ("FORWARD", SERVICES, "kubernetes service portals", true),
    ("FORWARD", EXTERNAL_SERVICES, "kubernetes externally-visible service portals", true),
    ("OUTPUT", FIREWALL, "", false),
    ("OUTPUT", PROXY_FIREWALL, "kubernetes load balancer firewall", true),
    ("OUTPUT", SERVICES, "kubernetes service portals", true),
    ("OUTPUT", EXTERNAL_SERVICES, "kubernetes externally-visible service portals", true),
];

const NAT_JUMPS: Jumps = &[
    ("PREROUTING", SERVICES, "kubernetes service portals", false),
    ("OUTPUT", SERVICES, "kubernetes service portals", false),
    ("POSTROUTING", POSTROUTING, "kubernetes postrouting rules", false),
];

/// What is configured, as far as rules depend on it.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    view: NodeView,
    /// This node's addresses.
    pub(super) node_addresses: Vec<IpAddr>,
    /// The prefixes of this node's pods.
    pub(super) node_prefixes: Vec<IpNet>,
    shared: Arc<Shared>,
}

/// What the rules of all ports share.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shared {
    /// Where a packet is marked to be masqueraded.
    pub(super) mark: ChainName,
    /// The conditions of one in so many, from none on.
    chances: Box<[Arc<[Match]>]>,
}

impl Shared {
    /// The condition of one in so many.
    pub(super) fn chance(&self, number: usize) -> Arc<[Match]> {
        self.chances.get(number).cloned().unwrap_or_else(|| new_chance(number))
    }
}

/// Up to this number of endpoints of a port, the conditions that choose one are shared by all ports.
const SHARED_CHANCES: usize = 64;

impl Settings {
    pub(super) fn new(view: &NodeView) -> Settings {
        let chances = (0..=SHARED_CHANCES).map(new_chance).collect();
        let shared = Arc::new(Shared { mark: MARK_MASQUERADE.into(), chances });
        Settings { view: view.clone(), node_addresses: Vec::new(), node_prefixes: Vec::new(), shared }
    }

    /// What the rules of all ports share.
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// What a packet of a pod is told by; nothing where pods are not told.
    pub(super) fn is_pod(&self, family: Family, inside: bool) -> Option<Match> {
        let within = |prefixes: &[IpNet]| {
            let prefix = prefixes.iter().find(|prefix| Family::of_prefix(prefix) == family)?.trunc();
            Some(Match::Source { prefix, inside })
        };
        match &self.view.proxy.detect_local {
            DetectLocal::ClusterPrefixes => within(&self.view.cluster_prefixes),
            DetectLocal::NodePrefixes => within(&self.node_prefixes),
            DetectLocal::Bridge(name) => Some(Match::InInterface { name: name.as_str().into(), inside }),
            DetectLocal::InterfacePrefix(prefix) => {
                Some(Match::InInterface { name: format!("{prefix}+").into(), inside })
            }
            DetectLocal::Nothing => None,
        }
    }

    /// Whether node ports answer at 127.0.0.1: they cannot at ::1.
    fn serves_localhost(&self, family: Family) -> bool {
        family == Family::V4 && self.view.proxy.localhost_node_ports
    }

    /// The conditions under which a packet is for this node's node ports: each is one rule.
    pub(super) fn node_port_destinations(&self, family: Family) -> Vec<Vec<Match>> {
        let loopback = if family == Family::V4 { "127.0.0.0/8" } else { "::1/128" };
        let mine = || self.node_addresses.iter().copied().filter(|it| Family::of(*it) == family && !it.is_loopback());
        let mut addresses: Vec<IpAddr> = match &self.view.proxy.node_port_addresses {
            NodePortAddresses::All => {
                let mut conditions = vec![Match::DESTINATION_IS_LOCAL];
                if !self.serves_localhost(family)
                    && let Ok(prefix) = loopback.parse()
                {
                    conditions.push(Match::Destination { prefix, inside: false });
                }
                return vec![conditions];
            }
            NodePortAddresses::Primary => mine().take(1).collect(),
            NodePortAddresses::Within(prefixes) => {
                let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
                let candidates = mine().chain(self.serves_localhost(family).then_some(localhost));
                candidates.filter(|address| prefixes.iter().any(|prefix| prefix.contains(address))).collect()
            }
        };
        addresses.sort_unstable();
        addresses.dedup();
        let of = |address| vec![Match::Destination { prefix: IpNet::from(address), inside: true }];
        addresses.into_iter().map(of).collect()
    }

    /// The last rules of `KUBE-SERVICES`.
    pub(super) fn node_port_rules(&self, family: Family) -> Vec<Rule> {
        let origin = Origin::configuration("nodePortAddresses");
        let rule = |conditions: Vec<Match>| {
            let comment = "kubernetes service nodeports; NOTE: this must be the last rule in this chain";
            // kube-proxy writes the comment before the type of address here.
            let builder = Rule::builder().comment(comment).origin(&origin);
            conditions.into_iter().fold(builder, RuleBuilder::when).jump(&NODE_PORTS.into())
        };
        self.node_port_destinations(family).into_iter().map(rule).collect()
    }
}

/// The last one of a list is certain.
fn new_chance(number: usize) -> Arc<[Match]> {
    let chance = (number > 1).then(|| Match::Random(Probability::one_of(number)));
    Rule::builder().when_some(chance).conditions()
}

/// The tables of a family without Services.
pub(super) fn tables(family: Family, settings: &Settings) -> BTreeMap<TableName, Table> {
    let mut filter = jumps(FILTER_JUMPS);
    for name in [SERVICES, EXTERNAL_SERVICES, NODE_PORTS, PROXY_FIREWALL, CANARY] {
        filter.chains.insert(name.into(), Chain::default());
    }
    filter.chains.insert(FORWARD.into(), Chain::of(forward_rules(settings)));
    filter.chains.insert(FIREWALL.into(), Chain::of(firewall_rules(family, settings)));
    let mut nat = jumps(NAT_JUMPS);
    for name in [NODE_PORTS, CANARY] {
        nat.chains.insert(name.into(), Chain::default());
    }
    nat.chains.insert(SERVICES.into(), Chain::of(settings.node_port_rules(family)));
    nat.chains.insert(POSTROUTING.into(), Chain::of(postrouting_rules()));
    let mark = Rule::builder().origin(&masquerading()).target(Target::set_mark(MASQUERADE_MARK));
    nat.chains.insert(MARK_MASQUERADE.into(), Chain::of([mark]));
    let mut mangle = Table::default();
    mangle.chains.insert(CANARY.into(), Chain::default());
    [(TableName::Filter, filter), (TableName::Nat, nat), (TableName::Mangle, mangle)].into()
}

/// The rules that let health checks in.
pub(super) fn health_rules(ports: &BTreeSet<Port>) -> Vec<Rule> {
    let origin = Origin::configuration("healthCheckNodePort");
    let rule = |port: &Port| {
        let builder = Rule::builder().comment("health check node port").port(Protocol::Tcp, *port);
        builder.origin(&origin).target(Target::Accept)
    };
    ports.iter().map(rule).collect()
}

fn masquerading() -> Origin {
    Origin::configuration("masqueradeBit")
}

fn jumps(jumps: Jumps) -> Table {
    let mut rules: BTreeMap<&str, Vec<Rule>> = BTreeMap::new();
    for (from, to, comment, only_new) in jumps {
        let mut builder = Rule::builder().when_some(only_new.then_some(Match::NEW));
        if !comment.is_empty() {
            builder = builder.comment(comment);
        }
        rules.entry(from).or_default().push(builder.jump(&(*to).into()));
    }
    let chain = |(name, rules): (&str, Vec<Rule>)| (ChainName::from(name), Chain::built_in(rules));
    Table { chains: rules.into_iter().map(chain).collect() }
}

fn forward_rules(settings: &Settings) -> Vec<Rule> {
    let state = |states| Match::State { states, inside: true };
    // Packets that fit no connection would reach the client untranslated, and make it reset
    // (kubernetes/kubernetes#74839).
    let mut rules = Vec::new();
    if !settings.view.proxy.tcp_be_liberal {
        rules.push(Rule::builder().when(state(States::INVALID)).target(Target::Drop));
    }
    rules.extend([
        Rule::builder()
            .comment("kubernetes forwarding rules")
            .when(Match::mark(MASQUERADE_MARK))
            .origin(&masquerading())
            .target(Target::Accept),
        Rule::builder()
            .comment("kubernetes forwarding conntrack rule")
            .when(state(States::RELATED.and(States::ESTABLISHED)))
            .target(Target::Accept),
    ]);
    rules
}

pub(super) fn postrouting_rules() -> Vec<Rule> {
    let mask = MASQUERADE_MARK;
    let unmarked = Match::Mark { value: mask, mask, inside: false };
    vec![
        Rule::builder().when(unmarked).target(Target::Return),
        // Else a packet that comes around again would be masqueraded again.
        Rule::builder().target(Target::flip_mark(MASQUERADE_MARK)),
        Rule::builder()
            .comment("kubernetes service traffic requiring SNAT")
            .origin(&masquerading())
            .target(Target::Masquerade { random_fully: true }),
    ]
}

/// Where node ports answer at 127.0.0.1, `route_localnet` is on, which would let neighbours in to what listens
/// there (CVE-2020-8558).
fn firewall_rules(family: Family, settings: &Settings) -> Vec<Rule> {
    let Some(prefix) = settings.serves_localhost(family).then(|| "127.0.0.0/8".parse().ok()).flatten() else {
        return Vec::new();
    };
    let known = States::RELATED.and(States::ESTABLISHED).and(States::DNAT);
    let rule = Rule::builder()
        .comment(MARTIAN_COMMENT)
        .destination(prefix)
        .when(Match::Source { prefix, inside: false })
        .when(Match::State { states: known, inside: false })
        .origin(&Origin::configuration("localhostNodePorts"))
        .target(Target::Drop);
    vec![rule]
}
