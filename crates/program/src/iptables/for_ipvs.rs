//! The chains of the IPVS mode, as kube-proxy has them: who is masqueraded, refused and dropped.
//!
//! All that depends on Services is in sets ([`IpSetName`]), so the chains are the same whatever Services there are.
//! kube-proxy leaves out rules whose set is empty; here they are always there.
//!
//! What is not kube-proxy's: a client on the node is masqueraded at external addresses with the policy `Local` as
//! well, since it may be sent to any endpoint whose node does not know the address that it comes from; where this
//! node has no endpoint, clients are dropped by two more sets; and what the node itself sends to an address with
//! source ranges is filtered in `mangle`, since IPVS takes it before `filter` sees it. There kube-proxy has one rule
//! per load balancer, with a match that sees the packet behind IPVS.

use std::collections::BTreeMap;

use ipnet::IpNet;
use portolan_intent::NodeView;
use portolan_net::{Family, Origin, Protocol};

use super::base::{MARK_MASQUERADE, PROXY_FIREWALL, SERVICES, Settings, postrouting_rules};
use super::{
    Chain, ChainName, End, Match, Program, Rejection, Rule, RuleBuilder, States, Table, TableKey, TableName, Target,
};
use crate::layout::{IpSetName, MASQUERADE_MARK};

const LOAD_BALANCER: &str = "KUBE-LOAD-BALANCER";
const NODE_PORT: &str = "KUBE-NODE-PORT";
const POSTROUTING: &str = "KUBE-POSTROUTING";
const FORWARD: &str = "KUBE-FORWARD";
const SOURCE_RANGES: &str = "KUBE-SOURCE-RANGES-FIREWALL";
const FILTER: &str = "KUBE-IPVS-FILTER";
const OUT_FILTER: &str = "KUBE-IPVS-OUT-FILTER";

/// From which built-in chain, to which of ours, with what comment; in the order in which they stand after
/// kube-proxy put each in front of the others.
type Jumps = &'static [(&'static str, &'static str, &'static str)];

const FILTER_JUMPS: Jumps = &[
    ("INPUT", FILTER, "kubernetes ipvs access filter"),
    ("INPUT", PROXY_FIREWALL, "kube-proxy firewall rules"),
    ("INPUT", NODE_PORT, "kubernetes health check rules"),
    ("FORWARD", PROXY_FIREWALL, "kube-proxy firewall rules"),
    ("FORWARD", FORWARD, "kubernetes forwarding rules"),
];

const NAT_JUMPS: Jumps = &[
    ("PREROUTING", SERVICES, "kubernetes service portals"),
    ("OUTPUT", SERVICES, "kubernetes service portals"),
    ("POSTROUTING", POSTROUTING, "kubernetes postrouting rules"),
];

const MANGLE_JUMPS: Jumps = &[("OUTPUT", OUT_FILTER, "kubernetes ipvs access filter")];

/// The destination address and port: `dst,dst`.
const DESTINATION: &[End] = &[End::Destination, End::Destination];

/// The port alone: `dst`.
const PORT: &[End] = &[End::Destination];

/// The destination address and port, and the source address: `dst,dst,src`.
const DESTINATION_AND_SOURCE: &[End] = &[End::Destination, End::Destination, End::Source];

/// The chains of the IPVS mode in these families. `node_prefixes` are those of this node's pods; they matter only
/// where pods are told by them.
pub fn chains_for_ipvs(view: &NodeView, families: &[Family], node_prefixes: &[IpNet]) -> Program {
    let mut settings = Settings::new(view);
    settings.node_prefixes = node_prefixes.to_vec();
    let mut program = Program::default();
    for family in families.iter().copied() {
        let chains = Chains { family, settings: &settings, masquerade_all: view.proxy.masquerade_all };
        for (name, jumps, rules) in [
            (TableName::Filter, FILTER_JUMPS, chains.filter()),
            (TableName::Nat, NAT_JUMPS, chains.nat()),
            (TableName::Mangle, MANGLE_JUMPS, chains.mangle()),
        ] {
            program.tables.insert(TableKey::new(family, name), table(jumps, rules));
        }
    }
    program
}

type Rules = Vec<(&'static str, Vec<Rule>)>;

fn table(jumps: Jumps, rules: Rules) -> Table {
    let mut table = Table::default();
    let mut built_in: BTreeMap<&str, Vec<Rule>> = BTreeMap::new();
    for (from, to, comment) in jumps {
        built_in.entry(from).or_default().push(Rule::builder().comment(comment).jump(&(*to).into()));
    }
    for (name, rules) in built_in {
        table.chains.insert(name.into(), Chain::built_in(rules));
    }
    for (name, rules) in rules {
        table.chains.insert(name.into(), Chain::of(rules));
    }
    table
}

/// The rules of one family.
struct Chains<'a> {
    family: Family,
    settings: &'a Settings,
    masquerade_all: bool,
}

impl Chains<'_> {
    fn nat(&self) -> Rules {
        let mark = Rule::builder().origin(&masquerading()).target(Target::set_mark(MASQUERADE_MARK));
        let mut postrouting = vec![
            self.commented(IpSetName::LoopBack, DESTINATION_AND_SOURCE)
                .target(Target::Masquerade { random_fully: false }),
        ];
        postrouting.extend(postrouting_rules());
        vec![
            (SERVICES, self.services()),
            (LOAD_BALANCER, self.load_balancer()),
            (NODE_PORT, self.node_port()),
            (MARK_MASQUERADE, vec![mark]),
            (POSTROUTING, postrouting),
        ]
    }

    fn services(&self) -> Vec<Rule> {
        let mark: ChainName = MARK_MASQUERADE.into();
        let loopback = if self.family == Family::V4 { "127.0.0.0/8" } else { "::1/128" };
        let mut rules = Vec::new();
        if let Ok(prefix) = loopback.parse() {
            rules.push(Rule::builder().source(prefix).target(Target::Return));
        }
        rules.push(self.commented(IpSetName::LoadBalancer, DESTINATION).jump(&LOAD_BALANCER.into()));
        let cluster = self.commented(IpSetName::ClusterIp, DESTINATION);
        if self.masquerade_all {
            rules.push(cluster.jump(&mark));
        } else if let Some(outside) = self.settings.is_pod(self.family, false) {
            rules.push(cluster.when(outside).jump(&mark));
        } else {
            // The node itself reaches a cluster address from that same address, which endpoints cannot answer.
            let own = &[End::Source, End::Destination];
            rules.push(self.commented(IpSetName::ClusterIp, own).jump(&mark));
        }
        rules.push(self.commented(IpSetName::ExternalIp, DESTINATION).jump(&mark));
        rules.push(
            self.commented(IpSetName::ExternalIp, DESTINATION).when(Match::DESTINATION_IS_LOCAL).target(Target::Accept),
        );
        rules.push(self.commented(IpSetName::ExternalIpLocal, DESTINATION).when(Match::SOURCE_IS_LOCAL).jump(&mark));
        let local = self.commented(IpSetName::ExternalIpLocal, DESTINATION);
        rules.push(local.when(Match::DESTINATION_IS_LOCAL).target(Target::Accept));
        rules.push(Rule::builder().when(Match::DESTINATION_IS_LOCAL).jump(&NODE_PORT.into()));
        for set in [IpSetName::ClusterIp, IpSetName::LoadBalancer] {
            rules.push(self.within(set, DESTINATION).target(Target::Accept));
        }
        rules
    }

    fn load_balancer(&self) -> Vec<Rule> {
        let mark: ChainName = MARK_MASQUERADE.into();
        vec![
            self.commented(IpSetName::LoadBalancerLocal, DESTINATION).when(Match::SOURCE_IS_LOCAL).jump(&mark),
            self.commented(IpSetName::LoadBalancerLocal, DESTINATION).target(Target::Return),
            Rule::builder().jump(&mark),
        ]
    }

    fn node_port(&self) -> Vec<Rule> {
        let mark: ChainName = MARK_MASQUERADE.into();
        let sets = [
            (Protocol::Tcp, IpSetName::NodePortLocalTcp, IpSetName::NodePortTcp, PORT),
            (Protocol::Udp, IpSetName::NodePortLocalUdp, IpSetName::NodePortUdp, PORT),
            (Protocol::Sctp, IpSetName::NodePortLocalSctp, IpSetName::NodePortSctp, DESTINATION),
        ];
        let rules = |(protocol, local, all, ends): (Protocol, IpSetName, IpSetName, &[End])| {
            let of = |set| self.commented(set, ends).when(Match::Protocol { protocol, inside: true });
            [of(local).when(Match::SOURCE_IS_LOCAL).jump(&mark), of(local).target(Target::Return), of(all).jump(&mark)]
        };
        sets.into_iter().flat_map(rules).collect()
    }

    fn filter(&self) -> Rules {
        let health = self.commented(IpSetName::HealthCheckNodePort, PORT).target(Target::Accept);
        vec![
            (FORWARD, forward_rules()),
            (NODE_PORT, vec![health]),
            (PROXY_FIREWALL, self.firewall(true)),
            (SOURCE_RANGES, self.source_ranges()),
            (FILTER, self.access()),
        ]
    }

    fn mangle(&self) -> Rules {
        vec![(OUT_FILTER, self.firewall(false)), (SOURCE_RANGES, self.source_ranges())]
    }

    /// Who may not connect. Connections that are there stay, wherever endpoints go.
    fn firewall(&self, arrives: bool) -> Vec<Rule> {
        let mut rules = vec![
            self.commented(IpSetName::LoadBalancerFw, DESTINATION).jump(&SOURCE_RANGES.into()),
            self.within(IpSetName::NoLocal, DESTINATION).when(Match::NEW).target(Target::Drop),
        ];
        if arrives {
            let outside = self.within(IpSetName::NoLocalOutside, DESTINATION).when(Match::NEW);
            let outside = outside.when(Match::AddressIsLocal { end: End::Source, inside: false });
            rules.push(outside.when_some(self.settings.is_pod(self.family, false)).target(Target::Drop));
        }
        rules
    }

    fn source_ranges(&self) -> Vec<Rule> {
        vec![
            self.commented(IpSetName::LoadBalancerSourceCidr, DESTINATION_AND_SOURCE).target(Target::Return),
            self.commented(IpSetName::LoadBalancerSourceIp, DESTINATION_AND_SOURCE).target(Target::Return),
            Rule::builder().target(Target::Drop),
        ]
    }

    /// What else listens on this node is not reached by the addresses of Services.
    fn access(&self) -> Vec<Rule> {
        let served = [IpSetName::LoadBalancer, IpSetName::ClusterIp, IpSetName::ExternalIp, IpSetName::ExternalIpLocal];
        let mut rules: Vec<Rule> =
            served.into_iter().map(|set| self.within(set, DESTINATION).target(Target::Return)).collect();
        rules.push(self.within(IpSetName::HealthCheckNodePort, PORT).target(Target::Return));
        let address = Rule::builder().when(Match::NEW).when(self.in_set(IpSetName::IpvsIps, PORT));
        rules.push(address.target(Target::Reject(Rejection::PortUnreachable)));
        rules
    }

    fn in_set(&self, set: IpSetName, ends: &[End]) -> Match {
        Match::set(set.name(self.family), ends)
    }

    fn within(&self, set: IpSetName, ends: &[End]) -> RuleBuilder {
        Rule::builder().when(self.in_set(set, ends))
    }

    fn commented(&self, set: IpSetName, ends: &[End]) -> RuleBuilder {
        Rule::builder().comment(comment(set)).when(self.in_set(set, ends))
    }
}

/// As kube-proxy's ipvs mode has them: what fits no connection passes, unlike in its iptables mode.
fn forward_rules() -> Vec<Rule> {
    let known = Match::State { states: States::RELATED.and(States::ESTABLISHED), inside: true };
    let marked = Rule::builder().comment("kubernetes forwarding rules").when(Match::mark(MASQUERADE_MARK));
    vec![
        marked.origin(&masquerading()).target(Target::Accept),
        Rule::builder().comment("kubernetes forwarding conntrack rule").when(known).target(Target::Accept),
    ]
}

fn masquerading() -> Origin {
    Origin::configuration("masqueradeBit")
}

/// What a set is for, in kube-proxy's words.
fn comment(set: IpSetName) -> &'static str {
    match set {
        IpSetName::LoopBack => "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose",
        IpSetName::ClusterIp => "Kubernetes service cluster ip + port for masquerade purpose",
        IpSetName::ExternalIp => "Kubernetes service external ip + port for masquerade and filter purpose",
        IpSetName::ExternalIpLocal => "Kubernetes service external ip + port with externalTrafficPolicy=local",
        IpSetName::LoadBalancer => "Kubernetes service lb portal",
        IpSetName::LoadBalancerLocal => "Kubernetes service load balancer ip + port with externalTrafficPolicy=local",
        IpSetName::LoadBalancerFw => "Kubernetes service load balancer ip + port for load balancer with sourceRange",
        IpSetName::LoadBalancerSourceIp => {
            "Kubernetes service load balancer ip + port + source IP for packet filter purpose"
        }
        IpSetName::LoadBalancerSourceCidr => {
            "Kubernetes service load balancer ip + port + source cidr for packet filter purpose"
        }
        IpSetName::NodePortTcp => "Kubernetes nodeport TCP port for masquerade purpose",
        IpSetName::NodePortLocalTcp => "Kubernetes nodeport TCP port with externalTrafficPolicy=local",
        IpSetName::NodePortUdp => "Kubernetes nodeport UDP port for masquerade purpose",
        IpSetName::NodePortLocalUdp => "Kubernetes nodeport UDP port with externalTrafficPolicy=local",
        IpSetName::NodePortSctp => "Kubernetes nodeport SCTP port for masquerade purpose with type 'hash ip:port'",
        IpSetName::NodePortLocalSctp => {
            "Kubernetes nodeport SCTP port with externalTrafficPolicy=local with type 'hash ip:port'"
        }
        IpSetName::HealthCheckNodePort => "Kubernetes health check node port",
        IpSetName::IpvsIps => "Addresses of the dummy link",
        IpSetName::NoLocal => "Service without an endpoint on this node",
        IpSetName::NoLocalOutside => "Service without an endpoint on this node, for clients outside",
    }
}

#[cfg(test)]
mod tests {
    use super::super::{diff, parse_family, render};
    use super::*;
    use crate::iptables::is_built_in;
    use crate::iptables::sample::view;
    use crate::layout::is_our_chain;

    #[test]
    fn the_chains_are_ours_and_read_back_as_they_are() {
        for family in Family::ALL {
            let program = chains_for_ipvs(&view().unwrap(), &[family], &[]);
            for (key, table) in &program.tables {
                for name in table.chains.keys().filter(|name| !is_built_in(&name.text())) {
                    assert!(is_our_chain(key.name.as_str(), &name.text()), "{name} in {}", key.name.as_str());
                }
            }
            let text = render(&program);
            let read = parse_family(&text, family).unwrap();
            assert_eq!(diff(&read, &program), [], "{text}");
            assert_eq!(diff(&program, &read), [], "{text}");
        }
    }

    #[test]
    fn sets_have_the_names_of_their_family() {
        let text = render(&chains_for_ipvs(&view().unwrap(), &[Family::V6], &[]));
        assert!(text.contains("--match-set KUBE-6-CLUSTER-IP dst,dst"), "{text}");
        assert!(!text.contains("--match-set KUBE-CLUSTER-IP"), "{text}");
    }
}
