//! Incremental equals from nothing; a diff leads where it should; packets go where they should.

mod meaning;
mod packets;

use std::net::IpAddr;
use std::sync::Arc;

use portolan_intent::masquerade::MasqueradeIntent;
use portolan_intent::services::{
    Backend, Endpoints, Frontend, FrontendKey, FrontendKind, FrontendUpdate, Masquerade, ServicesIntent,
};
use portolan_intent::{FabricMode, FabricSettings, NodeView, Segment};
use portolan_net::{Family, ObjectKey, ObjectKind, Origin, Port, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};
use proptest::prelude::*;

use super::{
    Chain, Change, Compiler, Element, Key, Program, Rule, Set, SetKind, Statement, TableKey, TableName, compile, diff,
    render, render_changes,
};

pub(super) fn view() -> NodeView {
    NodeView {
        node: "node-1".into(),
        fabric: FabricMode::Vxlan,
        fabric_settings: FabricSettings::default(),
        cluster_prefixes: vec!["10.42.0.0/16".parse().unwrap(), "fd42::/48".parse().unwrap()],
        service_prefixes: vec!["10.96.0.0/16".parse().unwrap(), "fd96::/112".parse().unwrap()],
        masquerade: true,
        underlay_interface: "eth0".into(),
        underlay_mtu: 1500,
        segment: Segment::default(),
        bridge: "cni0".into(),
        proxy: portolan_intent::services::ProxySettings::default(),
    }
}

pub(super) fn masquerade() -> MasqueradeIntent {
    MasqueradeIntent {
        sources: vec!["10.42.1.0/24".parse().unwrap(), "fd42:0:0:1::/64".parse().unwrap()],
        except: view().cluster_prefixes,
        origin: Origin::configuration("masquerade"),
    }
}

fn port(number: u16) -> Port {
    Port::try_from(number).unwrap()
}

pub(super) fn address_key(address: &str, number: u16) -> FrontendKey {
    FrontendKey::Address { address: address.parse().unwrap(), protocol: Protocol::Tcp, port: port(number) }
}

pub(super) fn node_port_key(family: Family, number: u16) -> FrontendKey {
    FrontendKey::NodePort { family, protocol: Protocol::Tcp, port: port(number) }
}

/// Backends at port 8080; those in this node's prefixes are local.
pub(super) fn frontend(key: &FrontendKey, name: &str, backends: &[&str]) -> Arc<Frontend> {
    let backends: Vec<Backend> = backends
        .iter()
        .map(|address| Backend {
            address: address.parse().unwrap(),
            port: port(8080),
            local: address.starts_with("10.42.1.") || address.starts_with("fd42:0:0:1:"),
            origin: Origin::object(ObjectKind::EndpointSlice, ObjectKey::new("default", format!("{name}-1"))),
        })
        .collect();
    let (kind, masquerade, field) = match key {
        FrontendKey::Address { .. } => (FrontendKind::ClusterIp, Masquerade::OffCluster, "spec.ports[http]"),
        FrontendKey::NodePort { .. } => (FrontendKind::NodePort, Masquerade::Always, "spec.ports[http].nodePort"),
    };
    let origin = Origin::field(ObjectKind::Service, ObjectKey::new("default", name), field);
    Arc::new(Frontend {
        origin,
        port_name: "http".into(),
        kind,
        policy: TrafficPolicy::Cluster,
        masquerade,
        affinity: None,
        sources: None,
        endpoints: Arc::new(Endpoints::all(backends)),
    })
}

pub(super) fn intent(frontends: &[(FrontendKey, &str, &[&str])]) -> ServicesIntent {
    frontends.iter().map(|(key, name, backends)| (*key, frontend(key, name, backends))).collect()
}

/// A program without what the kernel does not hold.
fn kernel_part(program: &Program) -> Program {
    let mut program = program.clone();
    for table in program.tables.values_mut() {
        for set in table.sets.values_mut() {
            let strip = |element: &Element| Element { origin: None, ..element.clone() };
            set.elements = set.elements.iter().map(|(key, element)| (*key, strip(element))).collect();
        }
        table.chains.values_mut().flat_map(|chain| &mut chain.rules).for_each(|rule| rule.origin = None);
    }
    program
}

fn applied(program: &Program, changes: &[Change]) -> Program {
    let mut program = program.clone();
    for change in changes {
        program.apply(change);
    }
    kernel_part(&program)
}

fn any_intent_steps() -> impl Strategy<Value = Vec<Vec<(FrontendKey, Option<Arc<Frontend>>)>>> {
    let step = meaning::any_key().prop_flat_map(|key| (Just(key), prop::option::of(meaning::any_frontend(key))));
    prop::collection::vec(prop::collection::vec(step, 1..4), 1..12)
}

/// Makes the updates of one step, as the intent's compiler does: one for each key that differs.
fn updates_of(intent: &mut ServicesIntent, step: Vec<(FrontendKey, Option<Arc<Frontend>>)>) -> Vec<FrontendUpdate> {
    let before = intent.clone();
    let mut keys: Vec<FrontendKey> = step.iter().map(|(key, _)| *key).collect();
    keys.sort();
    keys.dedup();
    for (key, wanted) in step {
        match wanted {
            Some(wanted) => intent.insert(key, wanted),
            None => intent.remove(&key),
        };
    }
    let of = |key| FrontendUpdate { key, old: before.get(&key).cloned(), new: intent.get(&key).cloned() };
    keys.into_iter().map(of).filter(|update| update.old != update.new).collect()
}

proptest! {
    #[test]
    fn incremental_equals_from_nothing(steps in any_intent_steps(), proxy in meaning::any_settings()) {
        let view = NodeView { proxy, ..view() };
        let mut compiler = Compiler::new(&view, &Family::ALL);
        compiler.set_masquerade(&masquerade());
        compiler.set_node_addresses(&["192.0.2.7".parse().unwrap()]);
        let changes = compiler.set_node_addresses(&meaning::node_addresses());
        let is_put = |change: &Change| matches!(change, Change::PutElement { .. });
        prop_assert!(changes.is_sorted_by_key(is_put), "intervals may overlap");
        compiler.set_node_prefixes(&masquerade().sources);
        let mut intent = ServicesIntent::new();
        for step in steps {
            let before = compiler.program().clone();
            let updates = updates_of(&mut intent, step);
            let changes = compiler.update_services(&updates);
            let scratch = compile(&intent, &masquerade(), &meaning::node_addresses(), &masquerade().sources, &view);
            prop_assert_eq!(compiler.program(), &scratch);
            prop_assert_eq!(applied(&before, &changes), kernel_part(&scratch), "its changes lead there");
            let changes = diff(&scratch, &before);
            prop_assert_eq!(applied(&before, &changes), kernel_part(&scratch), "so does a diff");
            prop_assert!(diff(&scratch, &kernel_part(&scratch)).is_empty(), "and then nothing is left");
        }
    }

    #[test]
    fn a_program_survives_serialisation(steps in any_intent_steps()) {
        let mut intent = ServicesIntent::new();
        for step in steps {
            updates_of(&mut intent, step);
        }
        let program = compile(&intent, &masquerade(), &[], &[], &view());
        let text = serde_json::to_string(&program).unwrap();
        prop_assert_eq!(serde_json::from_str::<Program>(&text).unwrap(), program);
    }
}

#[test]
fn one_endpoint_costs_the_same_whatever_the_number_of_services() {
    let changes_among = |services: u32| {
        let key = |index: u32| {
            let address = IpAddr::from(std::net::Ipv4Addr::from(0x0a60_0000 + index));
            FrontendKey::Address { address, protocol: Protocol::Tcp, port: port(80) }
        };
        let mut compiler = Compiler::new(&view(), &Family::ALL);
        let updates: Vec<FrontendUpdate> = (0..services)
            .map(|index| {
                let backends = if index % 2 == 0 { &["10.42.0.2", "10.42.2.3"][..] } else { &["10.42.0.2"][..] };
                let new = Some(frontend(&key(index), "web", backends));
                FrontendUpdate { key: key(index), old: None, new }
            })
            .collect();
        compiler.update_services(&updates);
        let old = Some(frontend(&key(3), "web", &["10.42.0.2"]));
        let new = Some(frontend(&key(3), "web", &["10.42.0.2", "10.42.2.9"]));
        compiler.update_services(&[FrontendUpdate { key: key(3), old, new }])
    };
    let few = changes_among(10);
    assert_eq!(few.len(), 3, "two slots of two come, one slot of one goes: {}", render_changes(&few));
    assert_eq!(changes_among(1000), few);
}

#[test]
fn a_rare_number_of_backends_has_its_rule_while_it_is_needed() {
    let key = address_key("10.96.0.10", 80);
    let backends: Vec<String> = (2..22).map(|host| format!("10.42.2.{host}")).collect();
    let backends: Vec<&str> = backends.iter().map(String::as_str).collect();
    let twenty = Some(frontend(&key, "cart", &backends));
    let one = Some(frontend(&key, "cart", &backends[..1]));
    let mut compiler = Compiler::new(&view(), &Family::ALL);
    let empty = compiler.program().clone();
    let text = |changes: &[Change]| render_changes(changes);
    let came = text(&compiler.update_services(&[FrontendUpdate { key, old: None, new: twenty.clone() }]));
    assert!(came.starts_with("add rule ip portolan-services balance dnat ip to"), "{came}");
    assert!(came.contains("numgen random mod 20 offset 200000"));
    let rare = compiler.program().clone();
    let went = compiler.update_services(&[FrontendUpdate { key, old: twenty, new: one.clone() }]);
    assert!(matches!(went.last(), Some(Change::RemoveRule(..))), "after its slots: {}", text(&went));
    assert_eq!(applied(&rare, &went), kernel_part(compiler.program()));
    compiler.update_services(&[FrontendUpdate { key, old: one, new: None }]);
    assert_eq!(compiler.program(), &empty);
}

#[test]
fn structure_that_cannot_be_changed_in_place_is_replaced_as_a_whole() {
    let desired = compile(&ServicesIntent::new(), &masquerade(), &[], &[], &view());
    let key = TableKey { family: Family::V4, name: TableName::Services };
    let mut observed = desired.clone();
    let table = observed.tables.get_mut(&key).unwrap();
    table.sets.insert("hairpin".into(), Set::empty(SetKind::Unknown));
    let changes = diff(&desired, &observed);
    assert_eq!(changes.first(), Some(&Change::DeleteTable(key)));
    assert!(changes.iter().all(|change| change.table() == key), "other tables stay as they are");
    assert_eq!(applied(&observed, &changes), kernel_part(&desired));
}

#[test]
fn what_others_put_into_our_tables_goes() {
    let desired = compile(&ServicesIntent::new(), &masquerade(), &[], &[], &view());
    let mut observed = desired.clone();
    let table = observed.tables.get_mut(&TableKey { family: Family::V6, name: TableName::Services }).unwrap();
    table.sets.insert("stray".into(), Set::empty(SetKind::Unknown));
    let jump = Rule { statements: vec![Statement::Jump("stray".into())], ..Rule::default() };
    table.chains.get_mut("services").unwrap().rules.push(jump);
    let strange = Rule { statements: vec![Statement::Unknown("quota".into())], ..Rule::default() };
    table.chains.insert("stray".into(), Chain { base: None, rules: vec![strange] });
    let changes = diff(&desired, &observed);
    assert_text(
        &render_changes(&changes),
        "flush chain ip6 portolan-services services\n\
         add rule ip6 portolan-services services ip6 daddr . meta l4proto . th dport @service-ips goto serve\n\
         add rule ip6 portolan-services services ip6 daddr . meta l4proto . th dport @policy-ips goto serve-by-policy\n\
         add rule ip6 portolan-services services ip6 daddr != ::1 fib daddr type local goto nodeports\n\
         flush chain ip6 portolan-services stray\n\
         delete chain ip6 portolan-services stray\n\
         delete set ip6 portolan-services stray\n",
    );
    assert_eq!(applied(&observed, &changes), kernel_part(&desired));
}

#[test]
fn a_node_whose_services_another_mode_serves_only_masquerades() {
    let key = address_key("10.96.0.10", 80);
    let new = Some(frontend(&key, "cart", &["10.42.1.2"]));
    let mut compiler = Compiler::without_services(&view(), &Family::ALL);
    assert_eq!(compiler.update_services(&[FrontendUpdate { key, old: None, new }]), []);
    assert!(compiler.program().tables.keys().all(|key| key.name == TableName::Masquerade));
    assert_eq!(compiler.set_masquerade(&masquerade()).len(), 4);
    let before = compile(&intent(&[(key, "cart", &["10.42.1.2"])]), &masquerade(), &[], &[], &view());
    let gone: Vec<Change> = diff(compiler.program(), &before);
    let tables = Family::ALL.map(|family| Change::DeleteTable(TableKey { family, name: TableName::Services }));
    assert_eq!(gone, tables, "and what served them before goes");
}

#[test]
fn what_clients_the_kernel_remembers_is_no_difference() {
    let key = address_key("10.96.0.10", 80);
    let mut intent = intent(&[(key, "cart", &["10.42.1.2"])]);
    let sticky = Frontend { affinity: AffinityTimeout::new(60), ..Frontend::clone(&intent[&key]) };
    intent.insert(key, Arc::new(sticky));
    let desired = compile(&intent, &masquerade(), &[], &[], &view());
    let mut observed = desired.clone();
    let table = observed.tables.get_mut(&TableKey { family: Family::V4, name: TableName::Services }).unwrap();
    let learned = Element { value: Some("10.42.1.2:8080".parse().unwrap()), ..Element::default() };
    let client =
        Key::FrontendSource("10.96.0.10".parse().unwrap(), Protocol::Tcp, port(80), "192.0.2.9/32".parse().unwrap());
    table.sets.get_mut("affinity-clients").unwrap().elements.insert(client, learned);
    assert_eq!(diff(&desired, &observed), []);
    assert_eq!(diff(&observed, &desired), []);
}

fn assert_text(actual: &str, expected: &str) {
    assert_eq!(actual, expected, "\n--- actual\n{actual}\n--- expected\n{expected}");
}

#[test]
fn a_small_program_reads_like_nft() {
    let external = FrontendKey::NodePort { family: Family::V4, protocol: Protocol::Tcp, port: port(30_443) };
    let mut frontends = intent(&[
        (address_key("10.96.0.10", 80), "cart", &["10.42.1.2", "10.42.2.3"]),
        (address_key("10.96.0.11", 80), "idle", &[]),
        (address_key("10.96.0.12", 80), "sessions", &["10.42.2.3"]),
        (address_key("203.0.113.80", 80), "cart", &["10.42.1.2", "10.42.2.3"]),
        (node_port_key(Family::V4, 30_080), "cart", &["10.42.1.2"]),
        (external, "gate", &["10.42.1.2", "10.42.2.3"]),
    ]);
    let mut change = |key: &FrontendKey, change: &dyn Fn(&mut Frontend)| {
        change(Arc::make_mut(frontends.get_mut(key).unwrap()));
    };
    change(&address_key("10.96.0.12", 80), &|it| it.affinity = Some(AffinityTimeout::DEFAULT));
    change(&address_key("203.0.113.80", 80), &|it| {
        it.kind = FrontendKind::LoadBalancer;
        it.masquerade = Masquerade::Always;
        it.sources = Some(["192.0.2.0/24".parse().unwrap(), "198.51.100.7/32".parse().unwrap()].into());
    });
    change(&external, &|it| {
        it.policy = TrafficPolicy::Local;
        it.masquerade = Masquerade::Node;
    });
    let mut view = view();
    view.cluster_prefixes.truncate(1);
    view.service_prefixes.truncate(1);
    let text = render(&compile(&frontends, &masquerade(), &[], &[], &view));
    assert_text(&text, include_str!("tests/small.nft"));
}

#[test]
fn a_comment_is_bounded_and_cannot_end_early() {
    let name = format!("{}\"ü", "n".repeat(200));
    let key = address_key("10.96.0.10", 80);
    let program = compile(&intent(&[(key, &name, &["10.42.1.2"])]), &masquerade(), &[], &[], &view());
    let table = &program.tables[&TableKey { family: Family::V4, name: TableName::Services }];
    let element =
        &table.sets["service-ips"].elements[&Key::Frontend("10.96.0.10".parse().unwrap(), Protocol::Tcp, port(80))];
    let comment = element.comment.as_deref().unwrap();
    assert_eq!(comment.len(), 127);
    assert!(comment.starts_with("default/nnn"));
}
