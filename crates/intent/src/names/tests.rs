//! Promises that hold for every cluster: the index agrees with the tables, and names and addresses
//! lead to each other. The single rules have scenarios of their own, in `scenarios/dns`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use portolan_net::{Family, ObjectKey, ObjectKind};
use portolan_state::{
    Change, Endpoint, EndpointSlice, Namespace, Object, ObjectRef, Pod, Service, ServiceType, Snapshot, Writer,
};
use proptest::prelude::*;

use super::{DomainName, Lookup, Names, RecordData, address_of, reverse_name};

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

fn zone() -> DomainName {
    "cluster.local".parse().unwrap()
}

fn synced_writer() -> Writer {
    let mut writer = Writer::new();
    let namespace = Object::Namespace(Namespace { name: "default".into() });
    writer.apply(Change::Replace(ObjectKind::Namespace, vec![(namespace, Vec::new())], Vec::new()));
    for kind in [ObjectKind::Service, ObjectKind::EndpointSlice, ObjectKind::Pod] {
        writer.apply(Change::Replace(kind, Vec::new(), Vec::new()));
    }
    writer
}

fn service(name: &str, address: Option<&str>) -> Change {
    let service = Service {
        key: key(name),
        service_type: ServiceType::ClusterIp,
        cluster_addresses: address.into_iter().map(|address| address.parse().unwrap()).collect(),
        headless: address.is_none(),
        ports: Vec::new(),
        publish_not_ready: false,
        traffic: portolan_state::ServiceTraffic::default(),
    };
    Change::Upsert(Object::Service(service), Vec::new())
}

fn slice(name: &str, service: &str, addresses: &[(&str, bool)]) -> Change {
    let endpoint = |(address, ready): &(&str, bool)| Endpoint {
        address: address.parse().unwrap(),
        ready: *ready,
        serving: *ready,
        terminating: false,
        node: None,
        hostname: None,
        hints: None,
    };
    let slice = EndpointSlice {
        key: key(name),
        service: key(service),
        family: Family::V4,
        ports: Vec::new(),
        endpoints: addresses.iter().map(endpoint).collect(),
        headless: false,
    };
    Change::Upsert(Object::EndpointSlice(slice), Vec::new())
}

fn pod(name: &str, address: &str) -> Change {
    let pod = Pod { key: key(name), node: None, addresses: vec![address.parse().unwrap()], host_network: false };
    Change::Upsert(Object::Pod(pod), Vec::new())
}

fn values(lookup: &Lookup) -> Vec<RecordData> {
    match lookup {
        Lookup::Found { records, .. } => records.iter().map(|record| record.data.clone()).collect(),
        Lookup::NotOurs | Lookup::NotReady | Lookup::NoSuchName => Vec::new(),
    }
}

fn names_of(snapshot: &Snapshot) -> Names {
    let mut names = Names::new(zone());
    names.update(snapshot);
    names
}

#[test]
fn a_record_names_the_object_that_caused_it() {
    let mut writer = synced_writer();
    writer.apply(service("web", Some("10.96.0.1")));
    let snapshot = writer.snapshot();
    let name = "web.default.svc.cluster.local".parse().unwrap();
    let Lookup::Found { records, .. } = names_of(snapshot).lookup(snapshot, &name) else { panic!("not found") };
    assert_eq!(records[0].origin.to_string(), "Service default/web spec.clusterIPs");
    assert_eq!(records[0].to_string(), "web.default.svc.cluster.local. A 10.96.0.1");
}

#[test]
fn nothing_is_said_before_the_tables_are_listed() {
    let snapshot = Snapshot::default();
    let names = names_of(&snapshot);
    assert_eq!(names.lookup(&snapshot, &"web.default.svc.cluster.local".parse().unwrap()), Lookup::NotReady);
    assert_eq!(names.lookup(&snapshot, &reverse_name("10.96.0.1".parse().unwrap())), Lookup::NotReady);
    assert_eq!(names.lookup(&snapshot, &"example.org".parse().unwrap()), Lookup::NotOurs);
}

#[test]
fn a_stale_index_never_invents_a_name() {
    let mut writer = synced_writer();
    writer.apply(service("web", Some("10.96.0.1")));
    let names = names_of(writer.snapshot());
    writer.apply(Change::Delete(ObjectRef::Service(key("web"))));
    assert_eq!(names.lookup(writer.snapshot(), &reverse_name("10.96.0.1".parse().unwrap())), Lookup::NotOurs);
}

#[test]
fn only_the_one_reverse_name_of_an_address_is_read() {
    let address = |text: &str| address_of(&text.parse().unwrap());
    assert_eq!(address("1.0.96.10.in-addr.arpa"), Some("10.96.0.1".parse().unwrap()));
    for other in ["01.0.96.10.in-addr.arpa", "0.96.10.in-addr.arpa", "1.1.0.96.10.in-addr.arpa", "ip6.arpa"] {
        assert_eq!(address(other), None, "{other}");
    }
}

fn any_change() -> impl Strategy<Value = Change> {
    const ADDRESSES: [&str; 4] = ["10.42.0.2", "10.42.0.3", "fd00::2", "10.96.0.1"];
    let name = || prop::sample::select(vec!["a", "b", "c"]);
    let address = || prop::sample::select(ADDRESSES.to_vec());
    prop_oneof![
        (name(), prop::option::of(address())).prop_map(|(name, address)| service(name, address)),
        (name(), name(), prop::collection::vec((address(), any::<bool>()), 0..4))
            .prop_map(|(name, service, addresses)| slice(name, service, &addresses)),
        (name(), address()).prop_map(|(name, address)| pod(name, address)),
        name().prop_map(|name| Change::Delete(ObjectRef::Service(key(name)))),
        name().prop_map(|name| Change::Delete(ObjectRef::EndpointSlice(key(name)))),
        name().prop_map(|name| Change::Delete(ObjectRef::Pod(key(name)))),
    ]
}

proptest! {
    #[test]
    fn reverse_names_round_trip(address: IpAddr) {
        prop_assert_eq!(address_of(&reverse_name(address)), Some(address));
    }

    #[test]
    fn no_name_panics(labels in prop::collection::vec("[a-z_-]{1,3}", 0..7)) {
        let mut writer = synced_writer();
        writer.apply(service("a", Some("10.96.0.1")));
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let _ = names_of(writer.snapshot()).lookup(writer.snapshot(), &zone().under(&labels).unwrap());
    }

    #[test]
    fn a_followed_index_equals_one_from_nothing(batches in prop::collection::vec(prop::collection::vec(any_change(), 1..4), 1..16)) {
        let mut writer = synced_writer();
        let mut followed = Names::new(zone());
        for batch in batches {
            for change in batch {
                writer.apply(change);
            }
            let (snapshot, _) = writer.take();
            followed.update(&snapshot);
            let scratch = names_of(&snapshot);
            for address in ["10.42.0.2", "10.42.0.3", "fd00::2", "10.96.0.1"] {
                let address: IpAddr = address.parse().unwrap();
                let name = reverse_name(address);
                let answer = scratch.lookup(&snapshot, &name);
                prop_assert_eq!(&followed.lookup(&snapshot, &name), &answer);
                // Where an address leads to a name, the name leads to the address.
                for value in values(&answer) {
                    let RecordData::Pointer(target) = value else { panic!("a PTR record") };
                    let addresses: BTreeSet<IpAddr> = values(&scratch.lookup(&snapshot, &target))
                        .into_iter()
                        .filter_map(|value| match value { RecordData::Address(address) => Some(address), _ => None })
                        .collect();
                    prop_assert!(addresses.contains(&address), "{} is not among {:?}", address, addresses);
                }
                let dashed = address.to_string().replace(['.', ':'], "-");
                let pod = zone().under(&[&dashed, "default", "pod"]).unwrap();
                prop_assert_eq!(followed.lookup(&snapshot, &pod), scratch.lookup(&snapshot, &pod));
            }
        }
    }
}
