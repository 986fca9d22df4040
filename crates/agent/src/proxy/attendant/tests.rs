//! What the loop's calls come to, without a kernel.

use std::time::{Duration, Instant};

use portolan_intent::services::{Backend, Endpoints, FrontendKind, Masquerade};
use portolan_net::{Origin, Port};
use portolan_state::{Problem, Service, ServiceTraffic, ServiceType};
use proptest::prelude::*;

use super::*;

/// No test waits so long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(10);

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

fn address_key(last: u8, protocol: Protocol) -> FrontendKey {
    FrontendKey::Address { address: [10, 96, 0, last].into(), protocol, port: Port::try_from(80).unwrap() }
}

fn node_port_key() -> FrontendKey {
    let (family, protocol, port) = (Family::V4, Protocol::Tcp, Port::try_from(30_080).unwrap());
    FrontendKey::NodePort { family, protocol, port }
}

/// A frontend of one Service port, with an endpoint on another node, or on this one, or without any.
fn frontend(kind: FrontendKind, policy: TrafficPolicy, is_local: Option<bool>) -> Arc<Frontend> {
    let backend = |local| Backend {
        address: [10, 42, 0, 2].into(),
        port: Port::try_from(8080).unwrap(),
        local,
        origin: Origin::object(ObjectKind::EndpointSlice, key("web-1")),
    };
    Arc::new(Frontend {
        origin: Origin::object(ObjectKind::Service, key("web")),
        port_name: "http".into(),
        kind,
        policy,
        masquerade: Masquerade::OffCluster,
        affinity: None,
        sources: None,
        endpoints: Arc::new(Endpoints::all(is_local.into_iter().map(backend).collect())),
    })
}

#[test]
fn a_port_without_local_endpoints_counts_once_whatever_its_frontends() {
    use FrontendKind::{ClusterIp, LoadBalancer, NodePort};
    let mut lacking = NoLocalEndpoints::default();
    let remote = |kind| frontend(kind, TrafficPolicy::Local, Some(false));
    let keys = [address_key(1, Protocol::Tcp), address_key(2, Protocol::Tcp), node_port_key()];
    let states = [remote(ClusterIp), remote(LoadBalancer), remote(NodePort)];
    for (key, state) in keys.iter().zip(&states) {
        lacking.follow(key, None, Some(state));
    }
    assert_eq!((lacking.internal.len(), lacking.external.len()), (1, 1));
    lacking.follow(&keys[1], Some(&states[1]), Some(&frontend(LoadBalancer, TrafficPolicy::Local, Some(true))));
    assert_eq!(lacking.external.len(), 1, "the node port still lacks one");
    lacking.follow(&keys[2], Some(&states[2]), Some(&frontend(NodePort, TrafficPolicy::Cluster, Some(false))));
    lacking.follow(&keys[0], Some(&states[0]), Some(&frontend(ClusterIp, TrafficPolicy::Local, None)));
    assert!(lacking.internal.is_empty() && lacking.external.is_empty(), "rejected is not dropped");
}

proptest! {
    #[test]
    fn following_counts_as_from_nothing(steps in prop::collection::vec((0usize..3, 0usize..5), 1..30)) {
        let keys = [address_key(1, Protocol::Tcp), address_key(2, Protocol::Tcp), node_port_key()];
        let kinds = [FrontendKind::ClusterIp, FrontendKind::LoadBalancer, FrontendKind::NodePort];
        let mut held: [Option<Arc<Frontend>>; 3] = [None, None, None];
        let mut lacking = NoLocalEndpoints::default();
        for (place, state) in steps {
            let of = |policy, is_local| Some(frontend(kinds[place], policy, is_local));
            let new = match state {
                0 => None,
                1 => of(TrafficPolicy::Local, Some(true)),
                2 => of(TrafficPolicy::Cluster, Some(false)),
                3 => of(TrafficPolicy::Local, None),
                _ => of(TrafficPolicy::Local, Some(false)),
            };
            lacking.follow(&keys[place], held[place].as_ref(), new.as_ref());
            held[place] = new;
            let mut scratch = NoLocalEndpoints::default();
            keys.iter().zip(&held).for_each(|(key, new)| scratch.follow(key, None, new.as_ref()));
            prop_assert_eq!(&lacking.internal, &scratch.internal);
            prop_assert_eq!(&lacking.external, &scratch.external);
        }
    }
}

fn service(name: &str) -> Service {
    Service {
        key: key(name),
        service_type: ServiceType::ClusterIp,
        cluster_addresses: Vec::new(),
        headless: false,
        ports: Vec::new(),
        publish_not_ready: false,
        traffic: ServiceTraffic::default(),
    }
}

#[test]
fn changes_are_counted_by_their_kind() {
    let count = |change: &Change| [ObjectKind::Service, ObjectKind::EndpointSlice].map(|kind| concerned(change, kind));
    assert_eq!(count(&Change::Upsert(Object::Service(service("a")), Vec::new())), [1, 0]);
    assert_eq!(count(&Change::Delete(ObjectRef::EndpointSlice(key("a")))), [0, 1]);
    assert_eq!(count(&Change::Delete(ObjectRef::Node("a".into()))), [0, 0]);
    let objects = vec![(Object::Service(service("a")), Vec::new()), (Object::Service(service("b")), Vec::new())];
    assert_eq!(count(&Change::Replace(ObjectKind::Service, objects, Vec::new())), [2, 0]);
    let object = ObjectRef::Service(key("a"));
    let (field, reason, hint) = ("spec".into(), "bad".into(), "mend it".into());
    assert_eq!(count(&Change::Reject(Problem { object, field, reason, hint })), [1, 0]);
}

fn node(leaving: bool) -> Node {
    Node {
        name: "node-1".into(),
        addresses: vec![[127, 0, 0, 1].into()],
        pod_prefixes: Vec::new(),
        tunnel: None,
        zone: None,
        leaving,
    }
}

async fn attendant(lines: &str) -> Attendant {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.yaml");
    let head = "node: node-1\nkubernetes: {socket: /run/api.sock}\nclusterPrefixes: [10.42.0.0/16]\n";
    std::fs::write(&path, format!("{head}{lines}")).unwrap();
    let config = AgentConfig::load(&path).unwrap();
    Attendant::start(&config, Arc::new(Metrics::new())).await.unwrap()
}

#[tokio::test]
async fn a_cycle_reaches_health_metrics_and_health_checks() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken_at = taken.local_addr().unwrap();
    let mut attendant = attendant(&format!(
        "proxy: {{healthzBindAddress: {taken_at}, nodePortAddresses: [127.0.0.0/8], iptables: {{localhostNodePorts: true}}}}\nservices: iptables\n"
    ))
    .await;
    let checks: OrdMap<ObjectKey, HealthCheck> =
        [(key("web"), HealthCheck { port: Port::try_from(taken_at.port()).unwrap(), local_endpoints: 1 })]
            .into_iter()
            .collect();
    let frontends: ServicesIntent =
        [(node_port_key(), frontend(FrontendKind::NodePort, TrafficPolicy::Local, Some(false)))].into_iter().collect();
    attendant.queued(&[Change::Upsert(Object::Service(service("web")), Vec::new())]);
    let text = attendant.metrics.render();
    assert!(text.contains("kubeproxy_sync_proxy_rules_service_changes_pending 1"), "{text}");
    let node = node(true);
    let mut synced = Synced {
        frontends: &frontends,
        health_checks: &checks,
        node: &node,
        link_addresses: &[],
        changes: 3,
        failures: 3,
    };
    attendant.synced(&synced);
    let text = attendant.metrics.render();
    assert!(text.contains("kubeproxy_sync_proxy_rules_service_changes_pending 1"), "all was refused: {text}");
    synced.failures = 1;
    attendant.synced(&synced);
    let text = attendant.metrics.render();
    assert!(text.contains("kubeproxy_sync_proxy_rules_service_changes_pending 0"), "{text}");
    assert!(text.contains("no_local_endpoints_total{traffic_policy=\"external\"} 1"), "{text}");
    assert_eq!(attendant.health.healthz(Now::read()).status.as_u16(), 503, "the node is leaving");
    assert_eq!(attendant.health.livez(Now::read()).status.as_u16(), 200);
    // Both servers want a port that is taken.
    let end = Instant::now() + PATIENCE;
    let is_told = |board: &ProblemBoard| {
        let fields: BTreeSet<String> = board.all().iter().map(|problem| problem.field.to_string()).collect();
        ["healthzBindAddress", "spec.healthCheckNodePort"].iter().all(|field| fields.contains(*field))
    };
    while !is_told(&attendant.board) {
        assert!(Instant::now() < end, "{:?}", attendant.board.all());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_address_in_use_is_an_error_where_that_is_asked_for() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.yaml");
    let address = taken.local_addr().unwrap();
    let text = format!(
        "node: a\nkubernetes: {{}}\nclusterPrefixes: [10.42.0.0/16]\nproxy: {{metricsBindAddress: {address}, bindAddressHardFail: true}}\n"
    );
    std::fs::write(&path, text).unwrap();
    let config = AgentConfig::load(&path).unwrap();
    let error = Attendant::start(&config, Arc::new(Metrics::new())).await.err().unwrap().to_string();
    assert!(error.contains(&format!("metricsBindAddress {address}")), "{error}");
}
