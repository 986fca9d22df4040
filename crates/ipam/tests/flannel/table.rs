//! The table of leases: changes, problems, overlaps, and that events and snapshots give the same.

use std::sync::Arc;

use portolan_ipam::flannel::{Change, Layout, Lease, Subnet, Table};
use portolan_store::KeyValue;
use proptest::prelude::*;

use crate::model::Model;

const SUBNETS: &str = "/coreos.com/network/subnets/";

fn value(number: usize) -> String {
    format!(
        r#"{{"PublicIP":"192.168.{}.{}","PublicIPv6":null,"BackendType":"host-gw"}}"#,
        number / 250,
        number % 250 + 1
    )
}

fn put(store: &mut Model, name: &str, value: &str, lease: i64) {
    store.put(&format!("{SUBNETS}{name}"), value, lease);
}

fn items(store: &Model) -> Vec<Arc<KeyValue>> {
    store.range(&Layout::new("/coreos.com/network").subnets()).items
}

fn fresh(store: &Model, own: Option<Subnet>) -> Table {
    let mut table = Table::new(Layout::new("/coreos.com/network"));
    table.set_own(own);
    table.replace(store.revision, items(store).iter().map(Arc::as_ref));
    table
}

fn names(table: &Table) -> Vec<String> {
    table.leases().map(|lease| lease.subnet.to_string()).collect()
}

fn words(changes: &[Change]) -> Vec<String> {
    let text = |change: &Change| match change {
        Change::Added(lease) => format!("+{}", lease.subnet),
        Change::Changed(lease) => format!("~{}", lease.subnet),
        Change::Removed(subnet) => format!("-{subnet}"),
    };
    changes.iter().map(text).collect()
}

#[test]
fn bad_keys_and_values_are_problems_and_the_rest_goes_on() {
    let mut store = Model::default();
    put(&mut store, "10.5.1.0-24", &value(1), 0);
    put(&mut store, "10.5.2.0-24", "{", 0);
    put(&mut store, "10.5.3.0-24", r#"{"PublicIP":"1.2.3.4","BackendType":"ipsec"}"#, 0);
    put(&mut store, "10.5.4.7-24", &value(4), 0);
    put(&mut store, "junk", &value(5), 0);
    put(&mut store, "10.5.6.0-24", r#"{"PublicIP":"0.0.0.0"}"#, 0);
    let table = fresh(&store, None);
    assert_eq!(names(&table), ["10.5.1.0-24"]);
    let problems = table.problems();
    let texts: Vec<String> = problems.iter().map(|row| format!("{}: {}", row.name, row.text)).collect();
    assert_eq!(texts.len(), 5, "{texts:#?}");
    for (text, wanted) in texts.iter().zip([
        "not a JSON object",
        "`ipsec` is unknown",
        "the subnet is 10.5.4.0-24",
        "PublicIP",
        "not a subnet's key",
    ]) {
        assert!(text.contains(wanted), "{text}");
    }
    assert!(problems.iter().all(|row| !row.hint.is_empty()));
}

#[test]
fn changes_are_the_real_ones() {
    let mut store = Model::default();
    let mut table = fresh(&store, None);
    let mut follow = |store: &Model, older: &Model| words(&table.apply(store.revision, &store.events_since(older)));
    let older = store.clone();
    put(&mut store, "10.5.1.0-24", &value(1), 0);
    assert_eq!(follow(&store, &older), ["+10.5.1.0-24"]);
    // flanneld renews by writing the same value again.
    let older = store.clone();
    put(&mut store, "10.5.1.0-24", &value(1), 0);
    assert!(follow(&store, &older).is_empty());
    let older = store.clone();
    put(&mut store, "10.5.1.0-24", &value(2), 0);
    assert_eq!(follow(&store, &older), ["~10.5.1.0-24"]);
    let older = store.clone();
    put(&mut store, "10.5.1.0-24", "broken", 0);
    assert_eq!(follow(&store, &older), ["-10.5.1.0-24"]);
    // Events of before are passed over: a watch that is behind shows nothing that is gone.
    let late = older.events_since(&Model::default());
    assert!(words(&table.apply(older.revision, &late)).is_empty());
    assert!(names(&table).is_empty());
}

#[test]
fn after_a_compaction_the_list_gives_the_difference() {
    let mut store = Model::default();
    (1..=5).for_each(|number| put(&mut store, &format!("10.5.{number}.0-24"), &value(number), 0));
    let mut table = fresh(&store, None);
    put(&mut store, "10.5.2.0-24", &value(22), 0);
    put(&mut store, "10.5.6.0-24", &value(6), 0);
    store.delete(&format!("{SUBNETS}10.5.4.0-24"));
    let changes = table.replace(store.revision, items(&store).iter().map(Arc::as_ref));
    assert_eq!(words(&changes), ["~10.5.2.0-24", "-10.5.4.0-24", "+10.5.6.0-24"]);
    assert!(table.replace(store.revision, items(&store).iter().map(Arc::as_ref)).is_empty());
}

#[test]
fn of_overlapping_leases_the_oldest_counts() {
    let mut store = Model::default();
    put(&mut store, "10.5.1.0-24&fd00:1::-64", &value(1), 0);
    let mut table = fresh(&store, None);
    let older = store.clone();
    put(&mut store, "10.5.1.0-24&fd00:2::-64", &value(2), 0);
    assert!(table.apply(store.revision, &store.events_since(&older)).is_empty());
    assert_eq!(table.problems()[0].text, "the lease overlaps 10.5.1.0-24&fd00:1::-64, which is older, and is not used");
    let older = store.clone();
    put(&mut store, "10.5.0.0-16&fd00:3::-64", &value(3), 0);
    assert!(table.apply(store.revision, &store.events_since(&older)).is_empty());
    assert_eq!(table.problems().len(), 2);
    let older = store.clone();
    store.delete(&format!("{SUBNETS}10.5.1.0-24&fd00:1::-64"));
    let changes = table.apply(store.revision, &store.events_since(&older));
    assert_eq!(words(&changes), ["-10.5.1.0-24&fd00:1::-64", "+10.5.1.0-24&fd00:2::-64"]);
}

#[test]
fn ones_own_subnet_is_no_row_and_nobody_elses() {
    let mut store = Model::default();
    put(&mut store, "10.5.1.0-24", &value(1), 0);
    put(&mut store, "10.5.1.0-25", &value(2), 0);
    put(&mut store, "10.5.2.0-24", &value(3), 0);
    let mut table = fresh(&store, None);
    assert_eq!(words(&table.set_own("10.5.1.0-24".parse().ok())), ["-10.5.1.0-24"]);
    assert_eq!(names(&table), ["10.5.2.0-24"]);
    let problems = table.problems();
    assert_eq!(problems.len(), 1, "one's own key is no problem: {problems:?}");
    assert!(problems[0].text.contains("overlaps this node's own subnet 10.5.1.0-24"));
    assert_eq!(words(&table.set_own(None)), ["+10.5.1.0-24"]);
}

#[test]
fn five_thousand_leases_are_small_and_one_change_is_one_change() {
    let mut store = Model::default();
    for number in 0..5_000 {
        let mac = format!("02:00:00:00:{:02x}:{:02x}", number / 256, number % 256);
        let value =
            value(number).replace("host-gw\"", &format!("vxlan\",\"BackendData\":{{\"VNI\":1,\"VtepMAC\":\"{mac}\"}}"));
        put(&mut store, &format!("10.{}.{}.0-24", number / 256, number % 256), &value, 0);
    }
    let items = items(&store);
    let before = resident_kib();
    let start = std::time::Instant::now();
    let mut table = Table::new(Layout::new("/coreos.com/network"));
    assert_eq!(table.replace(store.revision, items.iter().map(Arc::as_ref)).len(), 5_000);
    let took = start.elapsed();
    let grown = resident_kib().saturating_sub(before);
    println!("5,000 leases: {took:?}, {grown} KiB");
    assert!(grown < 40 * 1024, "{grown} KiB");
    let older = store.clone();
    store.delete(&format!("{SUBNETS}10.7.7.0-24"));
    assert_eq!(words(&table.apply(store.revision, &store.events_since(&older))), ["-10.7.7.0-24"]);
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

#[derive(Debug, Clone)]
enum Edit {
    Put(String, usize),
    Break(String),
    Delete(String),
    Own(Option<String>),
    Relist,
}

fn any_name() -> impl Strategy<Value = String> {
    let v4 = (0u8..4, prop_oneof![Just(24u8), Just(24), Just(25), Just(22)]);
    (v4, proptest::option::of(0u8..4)).prop_map(|((third, length), v6)| {
        let v4 = if length == 22 { "10.5.0.0-22".to_owned() } else { format!("10.5.{third}.0-{length}") };
        v6.map_or(v4.clone(), |v6| format!("{v4}&fd00:0:0:{v6}::-64"))
    })
}

fn any_edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        6 => (any_name(), 0usize..20).prop_map(|(name, number)| Edit::Put(name, number)),
        1 => any_name().prop_map(Edit::Break),
        4 => any_name().prop_map(Edit::Delete),
        1 => proptest::option::of(any_name()).prop_map(Edit::Own),
        1 => Just(Edit::Relist),
    ]
}

proptest! {
    #[test]
    fn events_and_a_snapshot_give_the_same(edits in proptest::collection::vec(any_edit(), 0..40)) {
        let mut store = Model::default();
        let mut own = None;
        let mut table = fresh(&store, None);
        // What a reader that only takes changes knows.
        let mut mirror: std::collections::BTreeMap<Subnet, Arc<Lease>> = std::collections::BTreeMap::new();
        for edit in edits {
            let older = store.clone();
            let mut changes = Vec::new();
            match edit {
                Edit::Put(name, number) => put(&mut store, &name, &value(number), 0),
                Edit::Break(name) => put(&mut store, &name, "{", 0),
                Edit::Delete(name) => store.delete(&format!("{SUBNETS}{name}")),
                Edit::Own(name) => {
                    own = name.and_then(|name| name.parse().ok());
                    changes = table.set_own(own);
                }
                Edit::Relist => changes = table.replace(store.revision, items(&store).iter().map(Arc::as_ref)),
            }
            changes.extend(table.apply(store.revision, &store.events_since(&older)));
            for change in changes {
                match change {
                    Change::Added(lease) => prop_assert!(mirror.insert(lease.subnet, lease).is_none()),
                    Change::Changed(lease) => prop_assert!(mirror.insert(lease.subnet, lease).is_some()),
                    Change::Removed(subnet) => prop_assert!(mirror.remove(&subnet).is_some()),
                }
            }
            let scratch = fresh(&store, own);
            prop_assert_eq!(names(&table), names(&scratch));
            prop_assert_eq!(table.problems(), scratch.problems());
            prop_assert_eq!(mirror.values().cloned().collect::<Vec<_>>(), sorted(&scratch));
            // No two leases that count share an address.
            let leases: Vec<_> = table.leases().map(|lease| lease.subnet).collect();
            for (index, one) in leases.iter().enumerate() {
                prop_assert!(leases[index + 1..].iter().all(|other| !one.overlaps(other)));
            }
        }
    }
}

fn sorted(table: &Table) -> Vec<Arc<Lease>> {
    let mut leases: Vec<_> = table.leases().cloned().collect();
    leases.sort_by_key(|lease| lease.subnet);
    leases
}
