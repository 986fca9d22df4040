//! Several servers on one etcd: one cluster, whoever is asked.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

#[expect(dead_code, reason = "others use the rest")]
mod common;
#[expect(dead_code, reason = "one member is enough here")]
#[path = "../../store/tests/common/mod.rs"]
mod etcd;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{CONFIG_MAPS, Rig, config_map, revision, rig_with};
use portolan_apiserver::{StoreLocation, clear};
use portolan_store::{Etcd, EtcdConfig, EventKind, KeyRange, RangeRequest, Store, WatchMessage, WatchRequest};
use serde_json::{Value, json};

/// How long another server may take to notice that one died: its lease, and some more.
const TAKEOVER_MAX: Duration = Duration::from_mins(1);

const SERVICES: &str = "/api/v1/namespaces/default/services";

fn location(member: &etcd::Etcd) -> StoreLocation {
    format!("etcd={}/cluster", member.endpoint()).parse().unwrap()
}

async fn server(member: &etcd::Etcd) -> Rig {
    let store = location(member);
    rig_with(|config| config.store = store).await
}

fn service(name: &str, spec: &Value) -> Value {
    let mut service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"type": "NodePort", "ports": [{"port": 80}]}});
    for (field, value) in spec.as_object().into_iter().flatten() {
        service["spec"][field] = value.clone();
    }
    service
}

fn deployment(name: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": name}}, "template": {
            "metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}})
}

/// Two pods of a Deployment come to be, as the controllers make them.
async fn pods_of(rig: &Rig, name: &str) {
    let (code, answer) = rig.post("/apis/apps/v1/namespaces/default/deployments", deployment(name)).await;
    assert_eq!(code, 201, "{answer:#}");
    let path = format!("/api/v1/namespaces/default/pods?labelSelector=app%3D{name}");
    rig.until(&path, "two pods", |list| list["items"].as_array().is_some_and(|pods| pods.len() == 2)).await;
}

#[tokio::test]
async fn what_one_server_writes_the_other_serves() {
    if !etcd::is_installed() {
        return;
    }
    let member = etcd::Etcd::start(&[]);
    let (one, two) = (server(&member).await, server(&member).await);
    let mut watch = two.watch(&format!("{CONFIG_MAPS}?watch=true")).await;
    let (_, created) = one.post(CONFIG_MAPS, config_map("a", "1")).await;
    assert_eq!(watch.next_named().await, ("ADDED".to_owned(), "a".to_owned()));
    let path = format!("{CONFIG_MAPS}/a");
    assert_eq!(two.get(&path).await.1, created);

    // A version of one server's answer means the same to the other.
    let mut changed = created.clone();
    changed["data"]["key"] = json!("2");
    let (code, second) = two.put(&path, changed.clone()).await;
    assert_eq!(code, 200, "{second:#}");
    assert_eq!(one.put(&path, changed).await.0, 409);
    assert_eq!(watch.next_named().await.0, "MODIFIED");
    let resumed = format!("{CONFIG_MAPS}?watch=true&resourceVersion={}", revision(&created));
    assert_eq!(one.watch(&resumed).await.next_named().await.0, "MODIFIED");

    let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "boats.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "boats", "singular": "boat", "kind": "Boat", "listKind": "BoatList"},
            "versions": [{"name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object"}}}]}});
    let (code, answer) = one.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition).await;
    assert_eq!(code, 201, "{answer:#}");
    let boats = "/apis/example.com/v1/namespaces/default/boats";
    two.until(boats, "served", |list| list["kind"] == "BoatList").await;
    pods_of(&one, "first").await;
    pods_of(&two, "second").await;
}

#[tokio::test]
async fn nothing_is_given_out_twice() {
    if !etcd::is_installed() {
        return;
    }
    const EACH: usize = 25;
    let member = etcd::Etcd::start(&[]);
    let (one, two) = (server(&member).await, server(&member).await);
    let many = |rig: &'static str, on| async move {
        let on: &Rig = on;
        let mut made = Vec::new();
        for number in 0..EACH {
            let (code, service) = on.post(SERVICES, service(&format!("{rig}-{number}"), &json!({}))).await;
            assert_eq!(code, 201, "{service:#}");
            made.push(service);
            let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("{rig}-{number}")}});
            assert_eq!(on.post("/api/v1/nodes", node).await.0, 201);
        }
        made
    };
    let (left, right) = tokio::join!(many("one", &one), many("two", &two));
    let made: Vec<&Value> = left.iter().chain(&right).collect();
    let addresses: BTreeSet<String> = made.iter().map(|it| it["spec"]["clusterIP"].to_string()).collect();
    let ports: BTreeSet<String> = made.iter().map(|it| it["spec"]["ports"][0]["nodePort"].to_string()).collect();
    assert_eq!((addresses.len(), ports.len()), (2 * EACH, 2 * EACH));

    let is_given = |list: &Value| {
        let nodes = list["items"].as_array();
        nodes.is_some_and(|nodes| nodes.len() == 2 * EACH && nodes.iter().all(|it| it["spec"]["podCIDR"].is_string()))
    };
    let nodes = two.until("/api/v1/nodes", "given podCIDRs", is_given).await;
    let nodes = nodes["items"].as_array().unwrap();
    let prefixes: BTreeSet<String> = nodes.iter().map(|it| it["spec"]["podCIDR"].to_string()).collect();
    assert_eq!(prefixes.len(), 2 * EACH);

    // Both ask for one address at once: one has it, and the other is told who.
    for number in 0..5 {
        let wanted = json!({"clusterIP": format!("10.96.200.{number}")});
        let (left, right) = (service(&format!("l{number}"), &wanted), service(&format!("r{number}"), &wanted));
        let (left, right) = tokio::join!(one.post(SERVICES, left), two.post(SERVICES, right));
        let mut codes = [left.0, right.0];
        codes.sort_unstable();
        assert_eq!(codes, [201, 422], "{:#} {:#}", left.1, right.1);
        // What one lets go the other may take at once.
        let (holder, other) = if left.0 == 201 { ("l", &two) } else { ("r", &one) };
        let path = format!("{SERVICES}/{holder}{number}");
        let on = if holder == "l" { &one } else { &two };
        assert_eq!(on.delete(&path, None).await.0, 200);
        let (code, answer) = other.post(SERVICES, service(&format!("again{number}"), &wanted)).await;
        assert_eq!(code, 201, "{answer:#}");
    }
}

async fn observer(member: &etcd::Etcd) -> Etcd {
    Etcd::connect(EtcdConfig { prefix: "/cluster".to_owned(), ..member.config() }).await.unwrap()
}

/// Who leads, and the revision at which it does.
async fn leader(store: &Etcd) -> (String, u64) {
    let range = KeyRange::key("/leader/controllers");
    let read = store.range(RangeRequest::new(range.clone())).await.unwrap();
    if let Some(item) = read.items.first() {
        return (String::from_utf8_lossy(&item.value).into_owned(), item.mod_revision);
    }
    let mut watcher = store.watch(WatchRequest::new(range, read.revision + 1)).await.unwrap();
    loop {
        let next = tokio::time::timeout(TAKEOVER_MAX, watcher.next()).await.unwrap().unwrap();
        if let WatchMessage::Events { events, revision } = next
            && events[0].kind == EventKind::Put
        {
            return (String::from_utf8_lossy(&events[0].current.value).into_owned(), revision);
        }
    }
}

/// Who leads after a revision.
async fn next_leader(store: &Etcd, since: u64) -> String {
    let request = WatchRequest::new(KeyRange::key("/leader/controllers"), since + 1);
    let mut watcher = store.watch(request).await.unwrap();
    loop {
        let next = tokio::time::timeout(TAKEOVER_MAX, watcher.next()).await.unwrap().unwrap();
        if let WatchMessage::Events { events, .. } = next
            && events[0].kind == EventKind::Put
        {
            return String::from_utf8_lossy(&events[0].current.value).into_owned();
        }
    }
}

#[tokio::test]
async fn another_server_takes_the_controllers_over() {
    if !etcd::is_installed() {
        return;
    }
    let member = etcd::Etcd::start(&[]);
    let store = observer(&member).await;
    let leads = |rig: &Rig, leader: &str| leader.ends_with(&rig.server.unix_socket().display().to_string());
    let (one, two) = (server(&member).await, server(&member).await);
    let (first, since) = leader(&store).await;
    let (leading, other) = if leads(&one, &first) { (one, two) } else { (two, one) };
    assert!(leads(&leading, &first), "{first}");

    // Without a word, as when it is killed: its lease ends.
    drop(leading);
    let second = next_leader(&store, since).await;
    assert!(leads(&other, &second), "{second}");
    pods_of(&other, "survivor").await;

    // With a word: the next is there at once, and knows what was made.
    let third = server(&member).await;
    let (_, since) = leader(&store).await;
    other.server.shutdown().await;
    let last = next_leader(&store, since).await;
    assert!(leads(&third, &last), "{last}");
    pods_of(&third, "later").await;
    let pods = third.get("/api/v1/namespaces/default/pods").await.1;
    assert_eq!(pods["items"].as_array().unwrap().len(), 4);
}

#[tokio::test]
async fn a_server_outlives_its_etcd() {
    if !etcd::is_installed() {
        return;
    }
    let mut member = etcd::Etcd::start(&[]);
    let rig = server(&member).await;
    pods_of(&rig, "before").await;
    let mut watch = rig.watch(&format!("{CONFIG_MAPS}?watch=true")).await;
    member.kill();
    let quick = rig.get(CONFIG_MAPS);
    let restarted = async { member.restart() };
    let ((code, answer), ()) = tokio::join!(quick, restarted);
    // It waited for etcd, or said that it cannot be reached.
    assert!(matches!(code, 200 | 503), "{answer:#}");
    rig.until(CONFIG_MAPS, "listed", |list| list["kind"] == "ConfigMapList").await;
    let (code, answer) = rig.post(CONFIG_MAPS, config_map("after", "1")).await;
    assert_eq!(code, 201, "{answer:#}");
    assert_eq!(watch.next_named().await, ("ADDED".to_owned(), "after".to_owned()));
    pods_of(&rig, "after").await;
}

#[tokio::test]
async fn a_cluster_is_cleared_and_its_neighbour_stays() {
    if !etcd::is_installed() {
        return;
    }
    let member = etcd::Etcd::start(&[]);
    let whole = Etcd::connect(member.config()).await.unwrap();
    let rig = server(&member).await;
    rig.post(CONFIG_MAPS, config_map("a", "1")).await;
    rig.server.shutdown().await;
    for key in ["/cluster2/registry/x", "/registry/x"] {
        whole.transaction(portolan_store::Transaction::put(key, "neighbour")).await.unwrap();
    }
    clear(&location(&member)).await.unwrap();
    let left = whole.range(RangeRequest::new(KeyRange::all())).await.unwrap();
    let left: Vec<_> = left.items.iter().map(|item| String::from_utf8_lossy(&item.key).into_owned()).collect();
    assert_eq!(left, ["/cluster2/registry/x", "/registry/x"]);
}
