//! Incremental equals from nothing; a diff leads where it should; texts are read as they were written.

mod decide;
mod foreign;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use portolan_intent::NodeView;
use portolan_intent::services::{
    Backend, DetectLocal, Endpoints, Frontend, FrontendKey, FrontendKind, FrontendUpdate, Masquerade,
    NodePortAddresses, ServicesIntent,
};
use portolan_net::{Family, ObjectKey, ObjectKind, Origin, Port, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};
use proptest::prelude::*;

use super::{
    BUILT_IN, COMMENTED_ENDPOINTS_MAX, ChainName, Change, Compiler, Program, Reader, Rule, TableKey, TableName,
    compile, diff, parse, render, render_restore, sample, split,
};

pub(super) fn view() -> NodeView {
    sample::view().unwrap()
}

fn port(number: u16) -> Port {
    Port::try_from(number).unwrap()
}

/// The addresses of the node in tests.
pub(super) const NODE: [&str; 2] = ["192.168.0.1", "fd00::1"];

pub(super) fn node_addresses() -> Vec<IpAddr> {
    NODE.iter().map(|text| text.parse().unwrap()).collect()
}

/// A Service as a generator makes it.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) name: &'static str,
    pub(super) protocol: Protocol,
    pub(super) internal: TrafficPolicy,
    pub(super) external: TrafficPolicy,
    pub(super) affinity: bool,
    pub(super) node_port: bool,
    pub(super) external_ip: bool,
    pub(super) load_balancer: bool,
    /// Which sources the load balancer admits.
    pub(super) sources: Option<Vec<IpNet>>,
    /// Endpoints of each family: the last part of the address, and whether it is local.
    pub(super) endpoints: Vec<(u8, bool)>,
}

/// Numbers of Services by name, so that each has its own addresses.
const NAMES: [&str; 3] = ["cart", "shop", "web"];

impl Plan {
    /// The frontends of both families, as `intent::services` would make them.
    pub(super) fn frontends(&self, view: &NodeView) -> Vec<(FrontendKey, Arc<Frontend>)> {
        let number = 1 + NAMES.iter().position(|name| *name == self.name).unwrap();
        let mut list = Vec::new();
        for family in Family::ALL {
            let at = |v4: &str, v6: &str| {
                let prefix = if family == Family::V4 { v4 } else { v6 };
                let address = format!("{prefix}{number}").parse().unwrap();
                FrontendKey::Address { address, protocol: self.protocol, port: port(80) }
            };
            let endpoints = Arc::new(self.endpoints_of(family));
            let mut add = |key: FrontendKey, kind: FrontendKind, sources: Option<Arc<[IpNet]>>| {
                list.push((key, Arc::new(self.frontend(view, kind, sources, endpoints.clone()))));
            };
            add(at("10.96.0.", "fd96::"), FrontendKind::ClusterIp, None);
            if self.external_ip {
                add(at("198.51.100.", "2001:db8:1::"), FrontendKind::ExternalIp, None);
            }
            if self.load_balancer {
                let of_family = |it: &&IpNet| Family::of_prefix(it) == family;
                let sources = self.sources.as_ref().map(|list| list.iter().filter(of_family).copied().collect());
                add(at("203.0.113.", "2001:db8:2::"), FrontendKind::LoadBalancer, sources);
            }
            if self.node_port {
                let number = port(30_000 + u16::try_from(number).unwrap());
                add(
                    FrontendKey::NodePort { family, protocol: self.protocol, port: number },
                    FrontendKind::NodePort,
                    None,
                );
            }
        }
        list
    }

    fn endpoints_of(&self, family: Family) -> Endpoints {
        let backend = |(last, local): &(u8, bool)| Backend {
            address: match (family, local) {
                (Family::V4, true) => format!("10.42.1.{last}"),
                (Family::V4, false) => format!("10.42.2.{last}"),
                (Family::V6, true) => format!("fd42:0:0:1::{last}"),
                (Family::V6, false) => format!("fd42:0:0:2::{last}"),
            }
            .parse()
            .unwrap(),
            port: port(8080),
            local: *local,
            origin: Origin::object(ObjectKind::EndpointSlice, ObjectKey::new("default", format!("{}-1", self.name))),
        };
        let mut endpoints = Endpoints::all(self.endpoints.iter().map(backend).collect());
        let is_external = self.node_port || self.external_ip || self.load_balancer;
        let asks = |policy| self.internal == policy || is_external && self.external == policy;
        if !asks(TrafficPolicy::Local) {
            endpoints.local = Arc::default();
        }
        if !asks(TrafficPolicy::Cluster) && !is_external {
            endpoints.cluster = Arc::default();
        }
        endpoints
    }

    fn frontend(
        &self,
        view: &NodeView,
        kind: FrontendKind,
        sources: Option<Arc<[IpNet]>>,
        endpoints: Arc<Endpoints>,
    ) -> Frontend {
        let policy = if kind.is_external() { self.external } else { self.internal };
        let masquerade = match (kind.is_external(), policy) {
            (true, TrafficPolicy::Cluster) => Masquerade::Always,
            (true, TrafficPolicy::Local) => Masquerade::Node,
            (false, _) if view.proxy.masquerade_all => Masquerade::Always,
            (false, _) if view.proxy.detect_local == DetectLocal::Nothing => Masquerade::Never,
            (false, _) => Masquerade::OffCluster,
        };
        Frontend {
            origin: Origin::object(ObjectKind::Service, ObjectKey::new("default", self.name)),
            port_name: "http".into(),
            kind,
            policy,
            masquerade,
            affinity: self.affinity.then_some(AffinityTimeout::DEFAULT),
            sources,
            endpoints,
        }
    }
}

pub(super) fn any_plan() -> impl Strategy<Value = Plan> {
    let policy = || prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]);
    let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
    let prefix =
        prop::sample::select(vec!["172.16.0.0/12", "0.0.0.0/0", "10.42.0.0/16", "192.168.0.0/24", "fd42::/48"])
            .prop_map(|text| text.parse::<IpNet>().unwrap());
    let sources = prop::option::of(prop::collection::btree_set(prefix, 0..3).prop_map(|set| set.into_iter().collect()));
    (
        prop::sample::select(NAMES.to_vec()),
        protocol,
        (policy(), policy()),
        any::<bool>(),
        (any::<bool>(), any::<bool>(), any::<bool>()),
        sources,
        prop::collection::btree_map(2u8..7, any::<bool>(), 0..4),
    )
        .prop_map(
            |(
                name,
                protocol,
                (internal, external),
                affinity,
                (node_port, external_ip, load_balancer),
                sources,
                endpoints,
            )| Plan {
                name,
                protocol,
                internal,
                external,
                affinity,
                node_port,
                external_ip,
                load_balancer,
                sources,
                endpoints: endpoints.into_iter().collect(),
            },
        )
}

pub(super) fn any_view() -> impl Strategy<Value = NodeView> {
    let detect = prop::sample::select(vec![
        DetectLocal::ClusterPrefixes,
        DetectLocal::Bridge("cni0".to_owned()),
        DetectLocal::InterfacePrefix("veth".to_owned()),
        DetectLocal::Nothing,
    ]);
    let addresses = prop::sample::select(vec![
        NodePortAddresses::All,
        NodePortAddresses::Primary,
        NodePortAddresses::Within(vec!["192.168.0.0/16".parse().unwrap(), "127.0.0.0/8".parse().unwrap()]),
    ]);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (detect, addresses, flags).prop_map(|(detect, addresses, (masquerade_all, localhost, liberal))| {
        let mut view = view();
        view.proxy.detect_local = detect;
        view.proxy.node_port_addresses = addresses;
        view.proxy.masquerade_all = masquerade_all;
        view.proxy.localhost_node_ports = localhost;
        view.proxy.tcp_be_liberal = liberal;
        view
    })
}

pub(super) fn intent_of(plans: &[Plan], view: &NodeView) -> ServicesIntent {
    // A later plan of a name is the Service's new state.
    let current: BTreeMap<&str, &Plan> = plans.iter().map(|plan| (plan.name, plan)).collect();
    current.values().flat_map(|plan| plan.frontends(view)).collect()
}

/// A program without what the kernel does not hold.
pub(super) fn kernel_part(program: &Program) -> Program {
    let mut program = program.clone();
    for table in program.tables.values_mut() {
        let bare = |chain: &super::Chain| super::Chain {
            policy: chain.policy,
            rules: chain.rules.list().iter().cloned().map(|rule| super::Rule { origin: None, ..rule }).collect(),
        };
        table.chains = table.chains.iter().map(|(name, chain)| (name.clone(), bare(chain))).collect();
    }
    program
}

fn applied(program: &Program, changes: &[Change]) -> Program {
    let mut program = program.clone();
    changes.iter().for_each(|change| program.apply(change));
    kernel_part(&program)
}

fn updates_between(before: &ServicesIntent, after: &ServicesIntent) -> Vec<FrontendUpdate> {
    let keys: BTreeSet<FrontendKey> = before.keys().chain(after.keys()).copied().collect();
    let of = |key| FrontendUpdate { key, old: before.get(&key).cloned(), new: after.get(&key).cloned() };
    keys.into_iter().map(of).filter(|update| update.old != update.new).collect()
}

proptest! {
    #[test]
    fn incremental_equals_from_nothing(
        view in any_view(),
        steps in prop::collection::vec(prop::collection::vec(any_plan(), 0..4), 1..8),
        health in prop::collection::btree_set(32_000u16..32_004, 0..3),
    ) {
        let health: BTreeSet<Port> = health.into_iter().map(port).collect();
        let mut compiler = Compiler::new(&view, &Family::ALL);
        let mut kernel = kernel_part(compiler.program());
        let mut follow = |changes: Vec<Change>, compiler: &Compiler| {
            kernel = applied(&kernel, &changes);
            assert_eq!(kernel, kernel_part(compiler.program()), "the changes lead there");
        };
        let changes = compiler.set_health_ports(&health);
        follow(changes, &compiler);
        let changes = compiler.set_node_addresses(&node_addresses());
        follow(changes, &compiler);
        let mut before = ServicesIntent::new();
        for plans in steps {
            let after = intent_of(&plans, &view);
            let changes = compiler.update_services(&updates_between(&before, &after));
            follow(changes, &compiler);
            let scratch = compile(&after, &health, &node_addresses(), &view);
            prop_assert_eq!(compiler.program(), &scratch);
            before = after;
        }
        prop_assert!(diff(&kernel_part(compiler.program()), compiler.program()).is_empty());
        prop_assert_eq!(&applied(&Program::default(), &diff(&Program::default(), compiler.program())), &kernel_part(compiler.program()));
    }

    #[test]
    fn what_is_rendered_is_read_back(view in any_view(), plans in prop::collection::vec(any_plan(), 0..5)) {
        let program = compile(&intent_of(&plans, &view), &[port(32_000)].into(), &node_addresses(), &view);
        let text = render(&program);
        let read = parse(&text).unwrap();
        prop_assert_eq!(render(&read), text);
        prop_assert_eq!(read, kernel_part(&program));
    }

    #[test]
    fn what_is_read_beside_a_program_is_what_is_read_alone(
        plans in prop::collection::vec(any_plan(), 0..4),
        others in prop::collection::vec(any_plan(), 0..4),
    ) {
        let program = |plans: &[Plan]| compile(&intent_of(plans, &view()), &BTreeSet::new(), &node_addresses(), &view());
        let (program, expected) = (program(&plans), program(&others));
        let text = render(&program);
        let beside = |expected: &Program| {
            let mut reader = Reader::beside(Family::V4, expected);
            text.lines().for_each(|line| reader.line(line).unwrap());
            reader.finish()
        };
        let (alone, read) = (parse(&text).unwrap(), beside(&expected));
        prop_assert_eq!(&kernel_part(&read), &alone);
        prop_assert_eq!(diff(&read, &expected), diff(&alone, &expected));
        for chain in program.tables.values().flat_map(|table| table.chains.values()) {
            prop_assert_eq!(chain.rules.len(), chain.rules.list().len());
        }
        prop_assert_eq!(beside(&program), program, "origins too: the rules are those of the program");
    }

    #[test]
    fn a_program_survives_serialisation(plans in prop::collection::vec(any_plan(), 0..4)) {
        let program = compile(&intent_of(&plans, &view()), &BTreeSet::new(), &node_addresses(), &view());
        let text = serde_json::to_string(&program).unwrap();
        prop_assert_eq!(serde_json::from_str::<Program>(&text).unwrap(), program);
    }
}

fn nat(family: Family) -> TableKey {
    TableKey::new(family, TableName::Nat)
}

#[test]
fn one_endpoint_changes_its_ports_chains_and_nothing_else() {
    let backends: Vec<SocketAddr> = (0..4).map(|index| sample::endpoint(Family::V4, index)).collect();
    let key = FrontendKey::Address {
        address: sample::service_address(Family::V4, 3),
        protocol: Protocol::Tcp,
        port: port(80),
    };
    let changes_among = |services: u32| {
        let mut sample = sample::Sample::new(&view(), &Family::ALL);
        sample.fill(Family::V4, services, 3);
        let before = sample::Wanted { name: "service-3", backends: &backends[..3], ..Default::default() };
        sample.set(key, Some(&before));
        sample.set(key, Some(&sample::Wanted { backends: &backends, ..before }))
    };
    let few = changes_among(10);
    let filled: Vec<String> = few.iter().map(|change| change.chain().to_string()).collect();
    assert_eq!(filled.len(), 2, "the Service's chain and that of the new endpoint: {filled:?}");
    assert!(
        filled.iter().any(|name| name.starts_with("KUBE-SVC-"))
            && filled.iter().any(|name| name.starts_with("KUBE-SEP-"))
    );
    assert_eq!(changes_among(100), few, "whatever the number of Services");
}

#[test]
fn large_clusters_have_no_comments_of_endpoints() {
    let text = |endpoints: usize| {
        let mut sample = sample::Sample::new(&view(), &[Family::V4]);
        sample.fill(Family::V4, 1, u32::try_from(endpoints).unwrap());
        render(sample.compiler().program())
    };
    let (small, large) = (text(COMMENTED_ENDPOINTS_MAX), text(COMMENTED_ENDPOINTS_MAX + 1));
    assert_eq!(small.matches(" -> ").count(), COMMENTED_ENDPOINTS_MAX);
    assert_eq!(large.matches(" -> ").count(), 0);
    assert!(large.contains("default/service-0:http cluster IP"), "others stay");
}

#[test]
fn rules_of_others_stay_and_ours_come_first() {
    let mut sample = sample::Sample::new(&view(), &[Family::V4]);
    sample.fill(Family::V4, 2, 2);
    let desired = sample.compiler().program().clone();
    let observed = parse(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n\
         :KUBE-SVC-STALE - [0:0]\n:KUBE-SEP-HELD - [0:0]\n:KUBE-MARK-DROP - [0:0]\n\
         -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n-A PREROUTING -j KUBE-SVC-STALE\n\
         -A DOCKER -i docker0 -j RETURN\n-A DOCKER -j KUBE-SEP-HELD\n-A KUBE-SEP-HELD -j ACCEPT\n\
         -A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000\nCOMMIT\n",
    )
    .unwrap();
    let changes = diff(&observed, &desired);
    let after = applied(&observed, &changes);
    let text = render(&after);
    let prerouting: Vec<&str> = text.lines().filter(|line| line.starts_with("-A PREROUTING")).collect();
    assert_eq!(
        prerouting,
        [
            "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES",
            "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        ]
    );
    assert!(after.chain(nat(Family::V4), "KUBE-SVC-STALE").is_none(), "what nobody needs is gone");
    assert!(
        after.chain(nat(Family::V4), "KUBE-SEP-HELD").is_some_and(|chain| chain.rules.is_empty()),
        "held by DOCKER"
    );
    assert!(text.contains("-A DOCKER -i docker0 -j RETURN\n-A DOCKER -j KUBE-SEP-HELD"), "{text}");
    assert!(text.contains("-A KUBE-MARK-DROP -j MARK"), "the kubelet's stays");
    assert!(diff(&after, &desired).is_empty(), "{:?}", diff(&after, &desired));
    let removed = applied(&after, &diff(&after, &Program::default()));
    let left = render(&removed);
    assert!(!left.contains("KUBE-SERVICES") && left.contains("DOCKER") && left.contains("KUBE-MARK-DROP"), "{left}");
}

#[test]
fn the_kubelets_firewall_chain_stays() {
    let observed = "*filter\n:INPUT ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\n\
        -A KUBE-FIREWALL -m comment --comment \"kubernetes firewall for dropping marked packets\" -m mark --mark 0x8000/0x8000 -j DROP\nCOMMIT\n";
    let observed = parse(observed).unwrap();
    let desired = Compiler::new(&view(), &[Family::V4]).program().clone();
    let after = applied(&observed, &diff(&observed, &desired));
    let removed = applied(&after, &diff(&after, &Program::default()));
    for text in [render(&after), render(&removed)] {
        assert!(text.contains("-A INPUT -j KUBE-FIREWALL\n") && text.contains("dropping marked packets"), "{text}");
    }
}

#[test]
fn parts_of_a_long_list_follow_each_other() {
    let mut sample = sample::Sample::new(&view(), &Family::ALL);
    let key = FrontendKey::NodePort { family: Family::V4, protocol: Protocol::Tcp, port: port(30_000) };
    let backends = [sample::endpoint(Family::V4, 1000)];
    sample.set(key, Some(&sample::Wanted { name: "outer", backends: &backends, ..Default::default() }));
    sample.fill(Family::V4, 20, 3);
    let desired = sample.compiler().program().clone();
    let mut observed = Program::default();
    let built_in = |name: &ChainName| BUILT_IN.contains(&&*name.text());
    let check = |program: &Program| {
        for table in program.tables.values() {
            for rule in table.chains.values().flat_map(|chain| chain.rules.list().into_owned()) {
                assert!(rule.leads_to().is_none_or(|chain| table.chains.contains_key(chain)), "{rule:?}");
            }
        }
    };
    for batch in split(&diff(&observed, &desired), 10) {
        assert!(batch.len() <= 10);
        batch.iter().for_each(|change| observed.apply(change));
        check(&observed);
        let reached = observed.tables.values().flat_map(|table| table.chains.keys()).any(built_in);
        let whole = observed.chain(nat(Family::V4), "KUBE-SERVICES").is_some_and(|chain| chain.rules.len() == 21);
        assert!(!reached || whole, "what is entered is complete");
    }
    assert_eq!(kernel_part(&observed), kernel_part(&desired));
    for batch in split(&diff(&desired, &Program::default()), 10) {
        batch.iter().for_each(|change| observed.apply(change));
        check(&observed);
    }
    assert_eq!(observed.rule_count(), 0);
    assert!(observed.tables.values().flat_map(|table| table.chains.keys()).all(built_in));
}

#[test]
fn several_changes_of_one_chain_are_one_in_a_restore() {
    let mut sample = sample::Sample::new(&view(), &[Family::V4]);
    let key = FrontendKey::Address {
        address: sample::service_address(Family::V4, 0),
        protocol: Protocol::Tcp,
        port: port(80),
    };
    let backends: Vec<SocketAddr> = (0..3).map(|index| sample::endpoint(Family::V4, index)).collect();
    let mut changes = Vec::new();
    for count in [3, 1, 2] {
        let wanted = sample::Wanted { name: "web", backends: &backends[..count], ..Default::default() };
        changes.extend(sample.set(key, Some(&wanted)));
    }
    let text = render_restore(&changes, Family::V4);
    assert_eq!(text.matches("cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ").count(), 1, "{text}");
    assert_eq!(text.matches("-X KUBE-SEP-").count(), 1, "{text}");
    assert_eq!(text.matches("--probability 0.5000000000 ").count(), 1, "{text}");
    assert_eq!(render_restore(&changes, Family::V6), "");
}

/// The kernel's memory is filled in the order in which the kernel later walks it.
#[test]
fn chains_are_made_in_the_order_of_a_walk() {
    let mut sample = sample::Sample::new(&view(), &[Family::V4]);
    sample.fill(Family::V4, 30, 4);
    let desired = sample.compiler().program();
    let changes = diff(&Program::default(), desired);
    let parts = split(&changes, 20);
    let made: Vec<&ChainName> = parts.iter().flatten().map(|change| change.chain()).collect();
    let rules = |name: &ChainName| {
        desired.chain(nat(Family::V4), &name.text()).map(|chain| chain.rules.list().into_owned()).unwrap_or_default()
    };
    let is_own = |name: &&ChainName| ["KUBE-SVC-", "KUBE-SEP-"].iter().any(|prefix| name.text().starts_with(prefix));
    let mut walk = Vec::new();
    for service in rules(&"KUBE-SERVICES".into()).iter().filter_map(Rule::leads_to).filter(is_own) {
        walk.extend(rules(service).iter().filter_map(Rule::leads_to).filter(is_own).cloned());
        walk.push(service.clone());
    }
    assert_eq!(walk.len(), 30 * 5);
    assert_eq!(made.into_iter().filter(is_own).collect::<Vec<_>>(), walk.iter().collect::<Vec<_>>());
    let text = render_restore(parts.iter().flatten().copied(), Family::V4);
    let declared: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix(":KUBE-S")?.split(' ').next()).collect();
    let declared: Vec<&str> = declared.into_iter().filter(|name| !name.starts_with("ERVICES")).collect();
    assert_eq!(declared, walk.iter().map(|name| name.text()["KUBE-S".len()..].to_owned()).collect::<Vec<_>>());
}
