//! The rules mean what `Frontend::decide` says, for every client, family and setting.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use portolan_intent::NodeView;
use portolan_intent::services::{
    Backend, Client, Decision, DetectLocal, Endpoints, Frontend, FrontendKey, FrontendKind, Masquerade,
    NodePortAddresses, ProxySettings, ServicesIntent,
};
use portolan_net::{Family, ObjectKey, ObjectKind, Origin, Packet, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};
use proptest::prelude::*;

use super::super::{Choice, Environment, Hook, Outcome, Program, Verdict, What, compile, interpret};
use super::{masquerade, port, view};

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn any_key() -> impl Strategy<Value = FrontendKey> {
    let protocol = || prop::sample::select(PROTOCOLS.to_vec());
    prop_oneof![
        (1u8..4, protocol()).prop_map(|(last, protocol)| {
            FrontendKey::Address { address: address(&format!("10.96.0.{last}")), protocol, port: port(80) }
        }),
        (1u8..3, protocol()).prop_map(|(last, protocol)| {
            FrontendKey::Address { address: address(&format!("fd96::{last}")), protocol, port: port(80) }
        }),
        (30_000u16..30_002, protocol(), prop::sample::select(Family::ALL.to_vec()))
            .prop_map(|(number, protocol, family)| FrontendKey::NodePort { family, protocol, port: port(number) }),
    ]
}

/// Endpoints of both kinds of node, each at one of two ports.
fn any_endpoints(family: Family) -> impl Strategy<Value = Arc<Endpoints>> {
    let backend = (0u8..3, 2u8..5, 8080u16..8082).prop_map(move |(net, host, number)| Backend {
        address: match family {
            Family::V4 => address(&format!("10.42.{net}.{host}")),
            Family::V6 => address(&format!("fd42:0:0:{net}::{host}")),
        },
        port: port(number),
        local: net == 1,
        origin: Origin::object(ObjectKind::EndpointSlice, ObjectKey::new("default", "slice-1")),
    });
    (prop::collection::vec(backend, 0..5), any::<[bool; 3]>()).prop_map(|(backends, [cluster, local, anywhere])| {
        let all = Endpoints::all(backends);
        let keep = |list: &Arc<[Backend]>, is_kept: bool| if is_kept { list.clone() } else { Arc::default() };
        let anywhere = anywhere || all.anywhere;
        Arc::new(Endpoints { cluster: keep(&all.cluster, cluster), local: keep(&all.local, local), anywhere, ..all })
    })
}

/// A frontend with every field on its own: more than any Service can ask for.
pub(super) fn any_frontend(key: FrontendKey) -> impl Strategy<Value = Arc<Frontend>> {
    let kinds = match key {
        FrontendKey::Address { .. } => {
            vec![FrontendKind::ClusterIp, FrontendKind::ExternalIp, FrontendKind::LoadBalancer]
        }
        FrontendKey::NodePort { .. } => vec![FrontendKind::NodePort],
    };
    let masquerades = vec![Masquerade::Never, Masquerade::Node, Masquerade::OffCluster, Masquerade::Always];
    let timeouts = vec![None, AffinityTimeout::new(60), Some(AffinityTimeout::DEFAULT)];
    let ranges = vec!["10.42.0.0/16", "203.0.113.0/24", "203.0.113.5/32", "192.168.64.0/24", "2001:db8::/32", "::/0"];
    let sources = prop::collection::vec(prop::sample::select(ranges), 0..3);
    (
        prop::sample::select(vec!["cart", "shop"]),
        prop::sample::select(kinds),
        prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]),
        prop::sample::select(masquerades),
        prop::sample::select(timeouts),
        prop::option::of(sources),
        any_endpoints(key.family()),
    )
        .prop_map(|(name, kind, policy, masquerade, affinity, sources, endpoints)| {
            let parse = |text: &str| text.parse::<IpNet>().unwrap();
            Arc::new(Frontend {
                origin: Origin::field(ObjectKind::Service, ObjectKey::new("default", name), "spec"),
                port_name: "http".into(),
                kind,
                policy,
                masquerade,
                affinity,
                sources: sources.map(|list| list.into_iter().map(parse).collect::<BTreeSet<_>>().into_iter().collect()),
                endpoints,
            })
        })
}

pub(super) fn any_settings() -> impl Strategy<Value = ProxySettings> {
    let detect_local = vec![
        DetectLocal::ClusterPrefixes,
        DetectLocal::NodePrefixes,
        DetectLocal::Bridge("cni0".to_owned()),
        DetectLocal::InterfacePrefix("veth".to_owned()),
        DetectLocal::Nothing,
    ];
    let within = ["192.168.64.0/24".parse().unwrap(), "2001:db8::/64".parse().unwrap()];
    let addresses =
        vec![NodePortAddresses::All, NodePortAddresses::Primary, NodePortAddresses::Within(within.to_vec())];
    (prop::sample::select(detect_local), prop::sample::select(addresses)).prop_map(
        |(detect_local, node_port_addresses)| ProxySettings {
            detect_local,
            node_port_addresses,
            ..ProxySettings::default()
        },
    )
}

/// The primary ones first.
pub(super) fn node_addresses() -> Vec<IpAddr> {
    ["192.168.64.11", "2001:db8::11", "172.16.5.11", "2001:db8:5::11"].map(address).to_vec()
}

/// Where a packet comes from, and where it comes in.
struct Origination {
    source: IpAddr,
    link: Option<&'static str>,
    client: Client,
}

/// One of each kind, where pods are told so.
fn originations(family: Family, settings: &ProxySettings) -> Vec<Origination> {
    let of = |v4: &str, v6: &str| address(if family == Family::V4 { v4 } else { v6 });
    let link = match settings.detect_local {
        DetectLocal::InterfacePrefix(_) => "veth1234",
        _ => "cni0",
    };
    let pod = if settings.detect_local == DetectLocal::Nothing { Client::Outside } else { Client::Pod };
    vec![
        Origination { source: of("10.42.1.77", "fd42:0:0:1::77"), link: Some(link), client: pod },
        Origination { source: of("192.168.64.11", "2001:db8::11"), link: None, client: Client::Node },
        Origination { source: of("203.0.113.5", "2001:db9::5"), link: Some("eth0"), client: Client::Outside },
    ]
}

/// What comes of a new connection: at the hook that translates, and at the one that refuses.
fn connect(
    program: &Program,
    key: &FrontendKey,
    from: &Origination,
    remembered: Option<SocketAddr>,
) -> (Outcome, Verdict) {
    let destination = match key {
        FrontendKey::Address { address, .. } => *address,
        FrontendKey::NodePort { family: Family::V4, .. } => address("192.168.64.11"),
        FrontendKey::NodePort { family: Family::V6, .. } => address("2001:db8::11"),
    };
    let packet = Packet {
        source: from.source,
        destination,
        protocol: key.protocol(),
        source_port: 41_022,
        destination_port: key.port().get(),
        mark: 0,
    };
    let mut environment = Environment {
        local_addresses: node_addresses(),
        in_interface: from.link.map(str::to_owned),
        remembered,
        ..Environment::default()
    };
    let (first, second) = match (from.client, key) {
        (Client::Node, _) => (Hook::Output, Hook::Output),
        (_, FrontendKey::Address { .. }) => (Hook::Prerouting, Hook::Forward),
        (_, FrontendKey::NodePort { .. }) => (Hook::Prerouting, Hook::Input),
    };
    let outcome = interpret(program, packet, first, &environment, Choice::First);
    if outcome.verdict != Verdict::Accept || first == second {
        let verdict = outcome.verdict;
        return (outcome, verdict);
    }
    environment.destination_translated = outcome.destination_translated;
    environment.original_destination = Some(SocketAddr::new(destination, key.port().get()));
    let checked = interpret(program, outcome.packet, second, &environment, Choice::First);
    (outcome, checked.verdict)
}

fn check(program: &Program, key: &FrontendKey, frontend: &Frontend, from: &Origination) -> Result<(), TestCaseError> {
    let (outcome, verdict) = connect(program, key, from, None);
    let told = format!("{key} {:?} from {}\n{frontend:#?}\n{:#?}", from.client, from.source, outcome.steps);
    let named = || outcome.steps.iter().any(|step| step.origin.as_ref() == Some(&frontend.origin));
    match frontend.decide(from.client, from.source) {
        Decision::Reject => prop_assert!(matches!(verdict, Verdict::Reject(_)), "{verdict:?}: {told}"),
        Decision::Drop => {
            prop_assert_eq!(verdict, Verdict::Drop, "{}", told);
            prop_assert!(named(), "{}", told);
        }
        Decision::Forward { backends, masquerade } => {
            prop_assert_eq!(verdict, Verdict::Accept, "{}", told);
            let expected: Vec<SocketAddr> = backends.iter().map(Backend::socket).collect();
            let possible: Vec<SocketAddr> = outcome.alternatives.iter().map(|it| it.socket).collect();
            prop_assert_eq!(&possible, &expected, "{}", told);
            prop_assert_eq!(outcome.packet.mark == 0x4000, masquerade, "{}", told);
            prop_assert_eq!(outcome.keeps_endpoint, frontend.affinity.is_some(), "{}", told);
            prop_assert!(named(), "{}", told);
            if frontend.affinity.is_some() {
                let last = expected.last().copied();
                let (kept, _) = connect(program, key, from, last);
                let possible: Vec<SocketAddr> = kept.alternatives.iter().map(|it| it.socket).collect();
                prop_assert_eq!(possible, last.into_iter().collect::<Vec<_>>(), "{}", told);
                let gone = Some(SocketAddr::new(from.source, 1));
                let (_, verdict) = connect(program, key, from, gone);
                prop_assert_eq!(verdict, Verdict::Drop, "an endpoint that is gone gets nothing: {}", told);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn rules_mean_what_a_frontend_decides(
        frontends in prop::collection::vec(
            any_key().prop_flat_map(|key| (Just(key), any_frontend(key))), 1..6
        ),
        settings in any_settings(),
    ) {
        let view = NodeView { proxy: settings.clone(), ..view() };
        let intent: ServicesIntent = frontends.into_iter().collect();
        let program = compile(&intent, &masquerade(), &node_addresses(), &masquerade().sources, &view);
        for (key, frontend) in &intent {
            for from in originations(key.family(), &settings) {
                check(&program, key, frontend, &from)?;
            }
        }
    }
}

fn sticky() -> (FrontendKey, Program) {
    let key = super::address_key("10.96.0.10", 80);
    let mut intent = super::intent(&[(key, "cart", &["10.42.1.2", "10.42.2.3"])]);
    let frontend = Frontend { affinity: AffinityTimeout::new(90), ..Frontend::clone(&intent[&key]) };
    intent.insert(key, Arc::new(frontend));
    (key, compile(&intent, &masquerade(), &[], &[], &view()))
}

#[test]
fn a_client_that_keeps_its_endpoint_is_remembered_where_it_is_known() {
    let (key, program) = sticky();
    let from = &originations(Family::V4, &ProxySettings::default())[0];
    let (outcome, _) = connect(&program, &key, from, None);
    assert!(outcome.keeps_endpoint);
    let environment = Environment {
        local_addresses: node_addresses(),
        destination_translated: true,
        original_destination: Some("10.96.0.10:80".parse().unwrap()),
        ..Environment::default()
    };
    let later = interpret(&program, outcome.packet, Hook::Forward, &environment, Choice::First);
    assert_eq!(later.steps.last().unwrap().what, What::Remembered { seconds: 90 });
    assert_eq!(later.steps.last().unwrap().origin.as_ref().unwrap().key, ObjectKey::new("default", "cart"));
}

#[test]
fn a_drop_says_why() {
    let key = super::address_key("203.0.113.80", 80);
    let mut intent = super::intent(&[(key, "cart", &["10.42.2.3"])]);
    let limited = Frontend { kind: FrontendKind::LoadBalancer, ..Frontend::clone(&intent[&key]) };
    let from = &originations(Family::V4, &ProxySettings::default())[2];
    for (frontend, why) in [
        (Frontend { sources: Some(Arc::default()), ..limited.clone() }, "not in loadBalancerSourceRanges"),
        (Frontend { policy: TrafficPolicy::Local, ..limited.clone() }, "no endpoint on this node"),
        (Frontend { kind: FrontendKind::ClusterIp, policy: TrafficPolicy::Local, ..limited }, "no endpoint here"),
    ] {
        intent.insert(key, Arc::new(frontend));
        let program = compile(&intent, &masquerade(), &[], &[], &view());
        let (outcome, verdict) = connect(&program, &key, from, None);
        assert_eq!(verdict, Verdict::Drop);
        assert_eq!(outcome.steps.last().unwrap().what, What::Dropped(why.to_owned()));
    }
}

#[test]
fn node_ports_answer_at_the_addresses_that_are_named() {
    let key = super::node_port_key(Family::V4, 30_080);
    let intent = super::intent(&[(key, "cart", &["10.42.2.3"])]);
    for (node_port_addresses, answering) in [
        (NodePortAddresses::All, &["192.168.64.11", "172.16.5.11"][..]),
        (NodePortAddresses::Primary, &["192.168.64.11"][..]),
        (NodePortAddresses::Within(vec!["172.16.0.0/12".parse().unwrap()]), &["172.16.5.11"][..]),
        (NodePortAddresses::Within(vec!["127.0.0.0/8".parse().unwrap()]), &[][..]),
    ] {
        let proxy = ProxySettings { node_port_addresses, ..ProxySettings::default() };
        let view = NodeView { proxy, ..view() };
        let program = compile(&intent, &masquerade(), &node_addresses(), &[], &view);
        let mut local_addresses = node_addresses();
        local_addresses.push(address("127.0.0.1"));
        for destination in local_addresses.iter().copied().filter(IpAddr::is_ipv4) {
            let packet = Packet {
                source: address("203.0.113.5"),
                destination,
                protocol: Protocol::Tcp,
                source_port: 1,
                destination_port: 30_080,
                mark: 0,
            };
            let environment = Environment { local_addresses: local_addresses.clone(), ..Environment::default() };
            let outcome = interpret(&program, packet, Hook::Prerouting, &environment, Choice::First);
            let answers = !outcome.alternatives.is_empty();
            assert_eq!(answers, answering.contains(&destination.to_string().as_str()), "{destination}");
        }
    }
}
