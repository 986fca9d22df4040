//! The chains and rules of one port of a Service, in one family.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_intent::services::{Backend, Endpoints, Frontend, FrontendKey, FrontendKind, Masquerade};
use portolan_net::{Family, ObjectKey, Origin, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};

use super::base::{EXTERNAL_SERVICES, NODE_PORTS, PROXY_FIREWALL, SERVICES, Settings};
use super::names::{cluster_chain, external_chain, firewall_chain, local_chain, service_port_name};
use super::rules::PortEndpoints;
use super::{ChainName, Match, Rejection, Rule, RuleBuilder, Rules, TableName, Target};

/// What has chains of its own: one port of a Service in one family.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PortKey {
    pub(super) family: Family,
    pub(super) service: ObjectKey,
    pub(super) port: Arc<str>,
    pub(super) protocol: Protocol,
}

impl PortKey {
    pub(super) fn of(key: &FrontendKey, frontend: &Frontend) -> PortKey {
        PortKey {
            family: key.family(),
            service: frontend.service().clone(),
            port: frontend.port_name.clone(),
            protocol: key.protocol(),
        }
    }
}

/// The frontends of a port. They are few: a sorted list takes less memory than a tree.
pub(super) type Frontends = Vec<(FrontendKey, Arc<Frontend>)>;

/// A chain that has rules of all Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Dispatch {
    NatServices,
    NatNodePorts,
    FilterServices,
    FilterExternal,
    FilterFirewall,
}

impl Dispatch {
    pub(super) const ALL: [Dispatch; 5] = [
        Dispatch::NatServices,
        Dispatch::NatNodePorts,
        Dispatch::FilterServices,
        Dispatch::FilterExternal,
        Dispatch::FilterFirewall,
    ];

    pub(super) fn chain(self) -> (TableName, &'static str) {
        match self {
            Dispatch::NatServices => (TableName::Nat, SERVICES),
            Dispatch::NatNodePorts => (TableName::Nat, NODE_PORTS),
            Dispatch::FilterServices => (TableName::Filter, SERVICES),
            Dispatch::FilterExternal => (TableName::Filter, EXTERNAL_SERVICES),
            Dispatch::FilterFirewall => (TableName::Filter, PROXY_FIREWALL),
        }
    }
}

/// What a port has.
#[derive(Debug, Default)]
pub(super) struct Built {
    /// Its own chains in the table `nat`, those of its endpoints among them.
    pub(super) chains: BTreeMap<ChainName, Rules>,
    /// Its endpoints that have chains.
    pub(super) endpoints: Option<Arc<PortEndpoints>>,
    /// Its rules in chains that it shares.
    pub(super) dispatch: Vec<(Dispatch, Rule)>,
}

/// Of how many endpoints there may be chains.
pub(super) fn endpoint_count(frontends: &Frontends) -> usize {
    let Some((_, frontend)) = frontends.first() else { return 0 };
    let endpoints = &frontend.endpoints;
    let only_local = endpoints.local.iter().filter(|local| endpoints.cluster.binary_search(local).is_err()).count();
    endpoints.cluster.len() + only_local
}

/// The chains and rules of a port. `comments` is off in large clusters, as with kube-proxy.
pub(super) fn build(key: &PortKey, frontends: &Frontends, settings: &Settings, comments: bool) -> Built {
    let Some((_, first)) = frontends.first() else { return Built::default() };
    let name = service_port_name(&key.service, &key.port);
    let protocol = key.protocol;
    let mut port = PortRules {
        key,
        settings,
        comments,
        endpoints: &first.endpoints,
        affinity: first.affinity.map(AffinityTimeout::seconds),
        origin: &first.origin,
        cluster: cluster_chain(&name, protocol),
        local: local_chain(&name, protocol),
        external: external_chain(&name, protocol),
        firewall: firewall_chain(&name, protocol),
        mark: settings.shared().mark.clone(),
        name,
        built: Built::default(),
    };
    port.build(frontends);
    port.built
}

struct PortRules<'a> {
    key: &'a PortKey,
    settings: &'a Settings,
    comments: bool,
    endpoints: &'a Endpoints,
    affinity: Option<u32>,
    origin: &'a Origin,
    name: String,
    cluster: ChainName,
    local: ChainName,
    external: ChainName,
    firewall: ChainName,
    mark: ChainName,
    built: Built,
}

impl PortRules<'_> {
    fn build(&mut self, frontends: &Frontends) {
        let mut ordered: Vec<&(FrontendKey, Arc<Frontend>)> = frontends.iter().collect();
        ordered.sort_by_key(|(key, frontend)| (frontend.kind, *key));
        for (key, frontend) in &ordered {
            self.dispatch(key, frontend);
        }
        if !self.endpoints.anywhere {
            return;
        }
        // Rules before those that balance, by chain.
        let mut heads: BTreeMap<ChainName, Vec<Rule>> = BTreeMap::new();
        for (key, frontend) in ordered.iter().filter(|(_, frontend)| frontend.kind == FrontendKind::ClusterIp) {
            if let Some(rule) = self.masquerade_of_cluster_address(key, frontend) {
                heads.entry(self.chain_of(frontend.policy).clone()).or_default().push(rule);
            }
        }
        let external = || ordered.iter().filter(|(_, frontend)| frontend.kind.is_external());
        if let Some((_, frontend)) = external().next() {
            let rules = self.external_rules(frontend);
            self.built.chains.insert(self.external.clone(), rules.into());
        }
        let guarded: Vec<&[IpNet]> = external().filter_map(|(_, frontend)| frontend.sources.as_deref()).collect();
        if !guarded.is_empty() {
            let rules = self.firewall_rules(&guarded, frontends);
            self.built.chains.insert(self.firewall.clone(), rules.into());
        }
        let uses = |policy: TrafficPolicy| {
            ordered
                .iter()
                .any(|(_, it)| it.policy == policy || policy == TrafficPolicy::Cluster && it.kind.is_external())
        };
        let mut used: Vec<Arc<PortEndpoints>> = Vec::new();
        for policy in [TrafficPolicy::Cluster, TrafficPolicy::Local] {
            let backends = self.endpoints.of(policy);
            if backends.is_empty() || !uses(policy) {
                continue;
            }
            let endpoints = self.of_backends(backends.clone());
            let chain = self.chain_of(policy).clone();
            let head = heads.remove(&chain).unwrap_or_default();
            self.built.chains.insert(chain, Rules::of_balance(head, endpoints.clone()));
            used.push(endpoints);
        }
        let reachable = match used.as_slice() {
            [] => return,
            [one] => one.clone(),
            several => {
                let all = several.iter().flat_map(|it| it.backends.iter()).map(|backend| (backend.socket(), backend));
                let all: BTreeMap<SocketAddr, &Backend> = all.collect();
                self.of_backends(all.into_values().cloned().collect())
            }
        };
        for (position, backend) in reachable.backends.iter().enumerate() {
            let rules = Rules::of_endpoint(reachable.clone(), position);
            self.built.chains.insert(reachable.chain(backend), rules);
        }
        self.built.endpoints = Some(reachable);
    }

    /// What the rules of these endpoints are made of.
    fn of_backends(&self, backends: Arc<[Backend]>) -> Arc<PortEndpoints> {
        Arc::new(PortEndpoints {
            name: self.name.as_str().into(),
            protocol: self.key.protocol,
            comments: self.comments,
            affinity: self.affinity,
            shared: self.settings.shared().clone(),
            backends,
        })
    }

    fn chain_of(&self, policy: TrafficPolicy) -> &ChainName {
        match policy {
            TrafficPolicy::Cluster => &self.cluster,
            TrafficPolicy::Local => &self.local,
        }
    }

    /// A rule at the address of a frontend; node ports have no address.
    fn rule_at(&self, key: &FrontendKey, frontend: &Frontend, comment: &str) -> RuleBuilder {
        let builder = rule(comment, &frontend.origin).port(self.key.protocol, key.port());
        match key {
            FrontendKey::Address { address, .. } => builder.destination(IpNet::from(*address)),
            FrontendKey::NodePort { .. } => builder,
        }
    }

    /// The rules of a frontend in chains that all Services share.
    fn dispatch(&mut self, key: &FrontendKey, frontend: &Frontend) {
        let is_served = self.endpoints.anywhere && !self.endpoints.of(frontend.policy).is_empty();
        let (comment, chain, goes_on) = match frontend.kind {
            FrontendKind::ClusterIp => ("cluster IP", self.chain_of(frontend.policy), is_served),
            FrontendKind::ExternalIp => ("external IP", &self.external, self.endpoints.anywhere),
            FrontendKind::LoadBalancer if frontend.sources.is_some() => {
                ("loadbalancer IP", &self.firewall, self.endpoints.anywhere)
            }
            FrontendKind::LoadBalancer => ("loadbalancer IP", &self.external, self.endpoints.anywhere),
            FrontendKind::NodePort => ("", &self.external, self.endpoints.anywhere),
        };
        if goes_on {
            let comment = format!("{} {comment}", self.name);
            let rule = self.rule_at(key, frontend, comment.trim_end()).jump(chain);
            let node_port = frontend.kind == FrontendKind::NodePort;
            let place = if node_port { Dispatch::NatNodePorts } else { Dispatch::NatServices };
            self.built.dispatch.push((place, rule));
        }
        if self.endpoints.anywhere && frontend.sources.is_some() {
            let comment = format!("{} traffic not accepted by {}", self.name, self.firewall);
            let rule = self.rule_at(key, frontend, &comment).target(Target::Drop);
            self.built.dispatch.push((Dispatch::FilterFirewall, rule));
        }
        if !is_served {
            self.refuse(key, frontend);
        }
    }

    /// Refuses what nobody serves; loses what only others serve, so that the client tries again.
    fn refuse(&mut self, key: &FrontendKey, frontend: &Frontend) {
        let (comment, target) = if self.endpoints.anywhere {
            (format!("{} has no local endpoints", self.name), Target::Drop)
        } else {
            (format!("{} has no endpoints", self.name), Target::Reject(Rejection::PortUnreachable))
        };
        if frontend.kind != FrontendKind::NodePort {
            let place = if frontend.kind.is_external() { Dispatch::FilterExternal } else { Dispatch::FilterServices };
            let rule = self.rule_at(key, frontend, &comment).target(target);
            self.built.dispatch.push((place, rule));
            return;
        }
        for conditions in self.settings.node_port_destinations(self.key.family) {
            let builder = rule(&comment, &frontend.origin);
            let builder = conditions.into_iter().fold(builder, RuleBuilder::when);
            let rule = builder.port(self.key.protocol, key.port()).target(target.clone());
            self.built.dispatch.push((Dispatch::FilterExternal, rule));
        }
    }

    /// Who is masqueraded on the way to a cluster address.
    fn masquerade_of_cluster_address(&self, key: &FrontendKey, frontend: &Frontend) -> Option<Rule> {
        let condition = match frontend.masquerade {
            Masquerade::Never => return None,
            Masquerade::Always => None,
            Masquerade::Node => Some(Match::SOURCE_IS_LOCAL),
            Masquerade::OffCluster => Some(self.settings.is_pod(self.key.family, false)?),
        };
        let builder = self.rule_at(key, frontend, &format!("{} cluster IP", self.name));
        Some(builder.when_some(condition).jump(&self.mark))
    }

    /// The chain of traffic from outside.
    fn external_rules(&self, frontend: &Frontend) -> Vec<Rule> {
        let mut rules = Vec::new();
        let comment = |text: &str| format!("{text} {} external destinations", self.name);
        let origin = &frontend.origin;
        if frontend.policy == TrafficPolicy::Cluster {
            rules.push(rule(&comment("masquerade traffic for"), origin).jump(&self.mark));
        } else {
            // Pods and the node itself reach every endpoint: as if their packets went out and came back by a
            // load balancer.
            let short_circuits = !self.endpoints.cluster.is_empty();
            if short_circuits && let Some(condition) = self.settings.is_pod(self.key.family, true) {
                let builder = rule(&comment("pod traffic for"), origin).when(condition);
                rules.push(builder.jump(&self.cluster));
            }
            // The address may be bound to the node, and would then be the source.
            let builder = rule(&comment("masquerade LOCAL traffic for"), origin);
            rules.push(builder.when(Match::SOURCE_IS_LOCAL).jump(&self.mark));
            if short_circuits {
                let builder = rule(&comment("route LOCAL traffic for"), origin);
                rules.push(builder.when(Match::SOURCE_IS_LOCAL).jump(&self.cluster));
            }
        }
        if !self.endpoints.of(frontend.policy).is_empty() {
            rules.push(Rule::builder().origin(origin).jump(self.chain_of(frontend.policy)));
        }
        rules
    }

    /// The chain of who may connect: the sources first, then the load balancer's own addresses, which are among
    /// them where the node is.
    fn firewall_rules(&self, sources: &[&[IpNet]], frontends: &Frontends) -> Vec<Rule> {
        let is_own = |prefix: &IpNet| {
            frontends
                .iter()
                .any(|(key, _)| matches!(key, FrontendKey::Address { address, .. } if IpNet::from(*address) == *prefix))
        };
        let mut prefixes: Vec<IpNet> = sources.iter().flat_map(|prefixes| prefixes.iter().copied()).collect();
        prefixes.sort_by_key(|prefix| (is_own(prefix), *prefix));
        prefixes.dedup();
        let comment = format!("{} loadbalancer IP", self.name);
        let admit = |prefix: IpNet| {
            let builder = rule(&comment, self.origin);
            // The whole family is no condition.
            let builder = if prefix.prefix_len() == 0 { builder } else { builder.source(prefix.trunc()) };
            builder.jump(&self.external)
        };
        let mut rules: Vec<Rule> = prefixes.into_iter().map(admit).collect();
        let comment = format!("other traffic to {} will be dropped by KUBE-PROXY-FIREWALL", self.name);
        rules.push(rule(&comment, self.origin).without_target());
        rules
    }
}

fn rule(comment: &str, origin: &Origin) -> RuleBuilder {
    Rule::builder().comment(comment).origin(origin)
}
