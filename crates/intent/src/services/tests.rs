//! The incremental result equals the one from nothing, whatever the order of events.

use std::net::IpAddr;

use portolan_net::{Family, NodeName, ObjectKey, Port, Protocol};
use portolan_state::{
    Change, Dirty, Endpoint, EndpointPort, EndpointSlice, Object, ObjectRef, Service, ServicePort, ServiceType, Writer,
};
use proptest::prelude::*;

use super::{FrontendKey, ProxySettings, ServicesCompiler};

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

fn port(number: u16) -> Port {
    Port::try_from(number).unwrap()
}

fn service(name: &str, address: &str, number: u16, node_port: Option<u16>) -> Change {
    let service = Service {
        key: key(name),
        service_type: if node_port.is_some() { ServiceType::NodePort } else { ServiceType::ClusterIp },
        cluster_addresses: vec![address.parse().unwrap()],
        headless: false,
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: port(number),
            node_port: node_port.map(port),
        }],
        publish_not_ready: false,
        traffic: portolan_state::ServiceTraffic::default(),
    };
    Change::Upsert(Object::Service(service), Vec::new())
}

fn endpoint(address: &str, ready: bool, terminating: bool) -> Endpoint {
    Endpoint {
        address: address.parse().unwrap(),
        ready,
        serving: ready || terminating,
        terminating,
        node: Some("node-1".into()),
        hostname: None,
        hints: None,
    }
}

fn slice(name: &str, service: &str, endpoints: Vec<Endpoint>) -> Change {
    let slice = EndpointSlice {
        key: key(name),
        service: key(service),
        family: Family::V4,
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints,
        headless: false,
    };
    Change::Upsert(Object::EndpointSlice(slice), Vec::new())
}

fn compile(changes: Vec<Change>) -> ServicesCompiler {
    let mut writer = Writer::new();
    changes.into_iter().for_each(|change| writer.apply(change));
    let (snapshot, dirty) = writer.take();
    let mut compiler = ServicesCompiler::new(NodeName::from("node-1"), ProxySettings::default());
    compiler.update(&snapshot, &dirty);
    compiler
}

fn cluster_ip(address: &str, number: u16) -> FrontendKey {
    FrontendKey::Address { address: address.parse().unwrap(), protocol: Protocol::Tcp, port: port(number) }
}

fn addresses(compiler: &ServicesCompiler, key: &FrontendKey) -> Vec<IpAddr> {
    compiler.intent()[key].endpoints.cluster.iter().map(|backend| backend.address).collect()
}

#[test]
fn only_ready_endpoints_serve() {
    let compiler = compile(vec![
        service("web", "10.96.0.1", 80, None),
        slice("web-1", "web", vec![endpoint("10.42.0.2", true, false), endpoint("10.42.0.3", false, false)]),
    ]);
    assert_eq!(addresses(&compiler, &cluster_ip("10.96.0.1", 80)), ["10.42.0.2".parse::<IpAddr>().unwrap()]);
}

#[test]
fn endpoints_that_drain_serve_only_when_none_is_ready() {
    let drain = endpoint("10.42.0.3", false, true);
    let compiler = compile(vec![
        service("web", "10.96.0.1", 80, None),
        slice("web-1", "web", vec![drain.clone(), endpoint("10.42.0.4", false, false)]),
    ]);
    assert_eq!(addresses(&compiler, &cluster_ip("10.96.0.1", 80)), [drain.address]);
}

#[test]
fn a_service_without_endpoints_keeps_its_frontend() {
    let compiler = compile(vec![service("web", "10.96.0.1", 80, Some(30_080))]);
    assert_eq!(compiler.intent().len(), 2);
    assert!(addresses(&compiler, &cluster_ip("10.96.0.1", 80)).is_empty());
}

#[test]
fn one_address_in_two_slices_is_one_backend() {
    let compiler = compile(vec![
        service("web", "10.96.0.1", 80, None),
        slice("web-1", "web", vec![endpoint("10.42.0.2", true, false)]),
        slice("web-2", "web", vec![endpoint("10.42.0.2", true, false)]),
    ]);
    assert_eq!(addresses(&compiler, &cluster_ip("10.96.0.1", 80)).len(), 1);
}

#[test]
fn the_first_of_two_claimants_holds_a_node_port_and_the_other_follows() {
    let mut writer = Writer::new();
    let mut compiler = ServicesCompiler::new(NodeName::from("node-1"), ProxySettings::default());
    writer.apply(service("beta", "10.96.0.2", 80, Some(30_080)));
    writer.apply(service("alpha", "10.96.0.1", 80, Some(30_080)));
    let (snapshot, dirty) = writer.take();
    compiler.update(&snapshot, &dirty);
    let node_port = FrontendKey::NodePort { family: Family::V4, protocol: Protocol::Tcp, port: port(30_080) };
    assert_eq!(compiler.intent()[&node_port].origin.key, key("alpha"));
    assert_eq!(compiler.problems().len(), 1);
    writer.apply(Change::Delete(ObjectRef::Service(key("alpha"))));
    let (snapshot, dirty) = writer.take();
    compiler.update(&snapshot, &dirty);
    assert_eq!(compiler.intent()[&node_port].origin.key, key("beta"));
    assert!(compiler.problems().is_empty());
}

fn any_change() -> impl Strategy<Value = Change> {
    let name = || prop::sample::select(vec!["a", "b", "c"]);
    let address = || prop::sample::select(vec!["10.96.0.1", "10.96.0.2"]);
    let endpoint_address = prop::sample::select(vec!["10.42.0.2", "10.42.0.3", "10.42.1.2"]);
    let endpoints = prop::collection::vec((endpoint_address, any::<bool>(), any::<bool>()), 0..4).prop_map(|list| {
        list.into_iter().map(|(address, ready, terminating)| endpoint(address, ready, terminating)).collect::<Vec<_>>()
    });
    let node_port = prop::option::of(30_000u16..30_003);
    prop_oneof![
        (name(), address(), 80u16..82, node_port)
            .prop_map(|(name, address, number, node_port)| service(name, address, number, node_port)),
        (name(), name(), endpoints).prop_map(|(name, service, endpoints)| slice(name, service, endpoints)),
        name().prop_map(|name| Change::Delete(ObjectRef::Service(key(name)))),
        name().prop_map(|name| Change::Delete(ObjectRef::EndpointSlice(key(name)))),
    ]
}

proptest! {
    #[test]
    fn incremental_equals_from_scratch(batches in prop::collection::vec(prop::collection::vec(any_change(), 1..4), 1..20)) {
        let mut writer = Writer::new();
        let mut incremental = ServicesCompiler::new(NodeName::from("node-1"), ProxySettings::default());
        let mut followed = super::ServicesIntent::new();
        for batch in batches {
            batch.into_iter().for_each(|change| writer.apply(change));
            let (snapshot, dirty) = writer.take();
            for update in incremental.update(&snapshot, &dirty) {
                let before = match update.new {
                    Some(new) => followed.insert(update.key, new),
                    None => followed.remove(&update.key),
                };
                prop_assert_eq!(before, update.old, "an update says what was there before");
            }
            let mut scratch = ServicesCompiler::new(NodeName::from("node-1"), ProxySettings::default());
            scratch.update(&snapshot, &Dirty::everything(&snapshot));
            prop_assert_eq!(incremental.intent(), scratch.intent());
            prop_assert_eq!(&followed, scratch.intent(), "the updates alone lead to the same intent");
            prop_assert_eq!(incremental.problems(), scratch.problems());
        }
    }
}
