//! The writer's promises: idempotence, indexes that agree with their tables, problems that follow
//! their objects.

use portolan_net::{Family, ObjectKey, ObjectKind};
use proptest::prelude::*;

use crate::{Change, Dirty, EndpointSlice, Namespace, NodeTunnel, Object, ObjectRef, Problem, Subnet, Writer};

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

fn slice(name: &str, service: &str) -> Object {
    Object::EndpointSlice(EndpointSlice {
        key: key(name),
        service: key(service),
        family: Family::V4,
        ports: Vec::new(),
        endpoints: Vec::new(),
        headless: false,
    })
}

fn problem(reference: ObjectRef) -> Problem {
    Problem { object: reference, field: "spec".into(), reason: "wrong".into(), hint: "mend it".into() }
}

#[test]
fn an_equal_upsert_changes_nothing() {
    let mut writer = Writer::new();
    writer.apply(Change::Upsert(slice("a-1", "a"), Vec::new()));
    let (first, dirty) = writer.take();
    assert_eq!(dirty.services.len(), 1);
    writer.apply(Change::Upsert(slice("a-1", "a"), Vec::new()));
    let (second, dirty) = writer.take();
    assert_eq!(first, second);
    assert!(dirty.is_empty());
}

#[test]
fn a_slice_that_moves_makes_both_services_dirty() {
    let mut writer = Writer::new();
    writer.apply(Change::Upsert(slice("a-1", "a"), Vec::new()));
    writer.take();
    writer.apply(Change::Upsert(slice("a-1", "b"), Vec::new()));
    let (snapshot, dirty) = writer.take();
    assert_eq!(dirty.services.into_iter().collect::<Vec<_>>(), [key("a"), key("b")]);
    assert_eq!(snapshot.slices_of(&key("a")).count(), 0);
    assert_eq!(snapshot.slices_of(&key("b")).count(), 1);
}

#[test]
fn a_rejected_object_is_absent_with_a_reason_until_it_is_mended() {
    let mut writer = Writer::new();
    let reference = ObjectRef::EndpointSlice(key("a-1"));
    writer.apply(Change::Upsert(slice("a-1", "a"), Vec::new()));
    writer.apply(Change::Reject(problem(reference.clone())));
    assert!(writer.snapshot().endpoint_slices.is_empty());
    assert!(writer.snapshot().problems.contains_key(&reference));
    writer.apply(Change::Upsert(slice("a-1", "a"), Vec::new()));
    assert!(writer.snapshot().problems.is_empty());
    assert_eq!(writer.snapshot().endpoint_slices.len(), 1);
}

#[test]
fn a_list_deletes_what_it_does_not_name_and_marks_the_table_in_sync() {
    let mut writer = Writer::new();
    writer.apply(Change::Upsert(slice("a-1", "a"), Vec::new()));
    assert!(!writer.snapshot().is_in_sync(&[ObjectKind::EndpointSlice]));
    writer.apply(Change::Replace(ObjectKind::EndpointSlice, vec![(slice("b-1", "b"), Vec::new())], Vec::new()));
    let (snapshot, _) = writer.take();
    assert!(snapshot.is_in_sync(&[ObjectKind::EndpointSlice]));
    assert_eq!(snapshot.endpoint_slices.keys().collect::<Vec<_>>(), [&key("b-1")]);
}

#[test]
fn leased_subnets_are_a_table_like_any_other() {
    let subnet = |key: &str, backend: &str| {
        let tunnel = NodeTunnel {
            backend: backend.into(),
            public_addresses: Vec::new(),
            vni: None,
            vtep_mac_v4: None,
            vtep_mac_v6: None,
        };
        let prefixes = vec!["10.5.34.0/24".parse().unwrap()];
        let (public_key_v4, public_key_v6) = (None, None);
        let key = key.into();
        Object::Subnet(Subnet { key, prefixes, tunnel, public_key_v4, public_key_v6, is_reservation: false })
    };
    let mut writer = Writer::new();
    let list = vec![(subnet("10.5.34.0-24", "udp"), Vec::new()), (subnet("10.5.35.0-24", "udp"), Vec::new())];
    writer.apply(Change::Replace(ObjectKind::Subnet, list, vec![problem(ObjectRef::Subnet("junk".into()))]));
    let (snapshot, dirty) = writer.take();
    assert!(snapshot.is_in_sync(&[ObjectKind::Subnet]));
    assert_eq!((snapshot.subnets.len(), dirty.subnets.len(), snapshot.problems.len()), (2, 2, 1));
    assert_eq!(Dirty::everything(&snapshot).subnets, dirty.subnets);
    writer.apply(Change::Upsert(subnet("10.5.34.0-24", "vxlan"), Vec::new()));
    writer.apply(Change::Delete(ObjectRef::Subnet("junk".into())));
    writer.apply(Change::Replace(ObjectKind::Subnet, vec![(subnet("10.5.34.0-24", "vxlan"), Vec::new())], Vec::new()));
    let (snapshot, dirty) = writer.take();
    assert_eq!((snapshot.subnets.len(), dirty.subnets.len(), snapshot.problems.len()), (1, 2, 0));
    assert_eq!(ObjectRef::Subnet("10.5.34.0-24".into()).to_string(), "Subnet 10.5.34.0-24");
}

fn any_change() -> impl Strategy<Value = Change> {
    let name = prop::sample::select(vec!["x", "y", "z"]);
    let service = prop::sample::select(vec!["a", "b"]);
    prop_oneof![
        (name.clone(), service).prop_map(|(name, service)| Change::Upsert(slice(name, service), Vec::new())),
        name.clone().prop_map(|name| Change::Delete(ObjectRef::EndpointSlice(key(name)))),
        name.clone().prop_map(|name| Change::Reject(problem(ObjectRef::EndpointSlice(key(name))))),
        name.prop_map(|name| Change::Upsert(Object::Namespace(Namespace { name: name.into() }), Vec::new())),
        Just(Change::Replace(ObjectKind::EndpointSlice, Vec::new(), Vec::new())),
    ]
}

proptest! {
    #[test]
    fn the_index_agrees_with_the_table(changes in prop::collection::vec(any_change(), 0..40)) {
        let mut writer = Writer::new();
        for change in changes {
            writer.apply(change.clone());
            let before = writer.snapshot().clone();
            writer.apply(change);
            prop_assert_eq!(&before, writer.snapshot(), "a change applied twice is applied once");
            for (key, slice) in &before.endpoint_slices {
                prop_assert!(before.slices_by_service.contains(&(slice.service.clone(), key.clone())));
            }
            let indexed = before.slices_by_service.len();
            prop_assert_eq!(indexed, before.endpoint_slices.len());
        }
    }
}
