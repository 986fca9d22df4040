//! What the source makes of lists, watches and failures, change by change.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeSet;

use portolan_net::{MacAddress, NodeName, ObjectKey, ObjectKind, Vni};
use portolan_source::{Client, Connection, Handle, Published, Selection, SourceError, SourceEvent};
use portolan_state::{Change, Namespace, NodeTunnel, Object, ObjectRef};
use serde_json::{Value, json};
use support::{PATIENCE, Server, failure, list, socket};
use tokio::sync::mpsc;

struct Source {
    events: mpsc::Receiver<SourceEvent>,
    _handle: Handle,
    _directory: tempfile::TempDir,
}

impl Source {
    async fn next(&mut self) -> SourceEvent {
        tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("an event").expect("a running source")
    }

    /// The next event, which is changes.
    async fn changes(&mut self) -> Vec<Change> {
        match self.next().await {
            SourceEvent::Changes(changes) => changes,
            other => panic!("{other:?}"),
        }
    }

    /// The next event, which tells of a failure: its reason and hint.
    async fn disconnected(&mut self) -> (String, String) {
        match self.next().await {
            SourceEvent::Disconnected { reason, hint, .. } => (reason, hint),
            other => panic!("{other:?}"),
        }
    }

    async fn connected(&mut self, table: ObjectKind) {
        assert_eq!(self.next().await, SourceEvent::Connected { table });
    }
}

async fn start(table: ObjectKind) -> (Server, Source, std::path::PathBuf) {
    start_with(Selection { tables: BTreeSet::from([table]), ..Selection::default() }, 16).await
}

async fn start_with(selection: Selection, capacity: usize) -> (Server, Source, std::path::PathBuf) {
    let (directory, path) = socket();
    let server = Server::start(&path);
    let client = Connection::Socket(path.clone()).client().await.unwrap();
    let (sender, events) = mpsc::channel(capacity);
    let handle = portolan_source::start(&client, &selection, &sender, 1);
    (server, Source { events, _handle: handle, _directory: directory }, path)
}

fn namespace(name: &str, revision: u32) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "resourceVersion": revision.to_string()}})
}

fn object(name: &str) -> Object {
    Object::Namespace(Namespace { name: name.into() })
}

fn upsert(name: &str) -> Change {
    Change::Upsert(object(name), Vec::new())
}

fn delete(name: &str) -> Change {
    Change::Delete(ObjectRef::Namespace(name.into()))
}

fn replace(names: &[&str]) -> Change {
    let objects = names.iter().map(|name| (object(name), Vec::new())).collect();
    Change::Replace(ObjectKind::Namespace, objects, Vec::new())
}

#[tokio::test]
async fn a_list_in_pages_is_one_replace() {
    let (mut server, mut source, _) = start(ObjectKind::Namespace).await;
    let call = server.list().await;
    assert_eq!(call.path, "/api/v1/namespaces");
    assert_eq!(call.query["limit"], portolan_source::limits::PAGE_SIZE.to_string());
    let page = |token: &str, name| {
        list("Namespace", &json!({"resourceVersion": "5", "continue": token}), &[namespace(name, 1)])
    };
    call.json(200, &page("more", "a"));
    let call = server.list().await;
    assert_eq!(call.query["continue"], "more");
    call.json(200, &page("", "b"));
    source.connected(ObjectKind::Namespace).await;
    assert_eq!(source.changes().await, [replace(&["a", "b"])]);
    server.watch("5").await;
}

#[tokio::test]
async fn half_a_list_is_nothing() {
    let (mut server, mut source, _) = start(ObjectKind::Namespace).await;
    let page = list("Namespace", &json!({"resourceVersion": "5", "continue": "more"}), &[namespace("a", 1)]);
    server.list().await.json(200, &page);
    server.list().await.error(500, "InternalError");
    let (reason, hint) = source.disconnected().await;
    assert!(reason.starts_with("cannot list Namespace objects") && reason.contains("InternalError"), "{reason}");
    assert!(!hint.is_empty());
    let call = server.list().await;
    assert!(!call.query.contains_key("continue"));
    call.items("Namespace", "6", &[namespace("b", 1)]);
    source.connected(ObjectKind::Namespace).await;
    assert_eq!(source.changes().await, [replace(&["b"])]);
}

#[tokio::test]
async fn events_become_changes_and_a_closed_watch_is_resumed() {
    let (mut server, mut source, _) = start(ObjectKind::Namespace).await;
    server.list().await.items("Namespace", "5", &[]);
    source.connected(ObjectKind::Namespace).await;
    assert_eq!(source.changes().await, [replace(&[])]);

    let watch = server.watch("5").await;
    watch.event("ADDED", &namespace("a", 6)).await;
    assert_eq!(source.changes().await, [upsert("a")]);
    // Duplicates and deletions of what is not there are legal, and the writer's to absorb.
    watch.event("MODIFIED", &namespace("a", 6)).await;
    assert_eq!(source.changes().await, [upsert("a")]);
    watch.event("DELETED", &namespace("never", 7)).await;
    assert_eq!(source.changes().await, [delete("never")]);
    watch.event("DELETED", &namespace("a", 8)).await;
    assert_eq!(source.changes().await, [delete("a")]);

    // A bookmark moves the revision; a watch that the server ends goes on from there, without a list.
    watch
        .event("BOOKMARK", &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"resourceVersion": "20"}}))
        .await;
    drop(watch);
    let watch = server.watch("20").await;
    watch.event("ADDED", &namespace("b", 21)).await;
    assert_eq!(source.changes().await, [upsert("b")]);

    // So does one that breaks off in the middle of an event.
    watch.bytes("{\"type\":\"ADDED\",\"obj".to_owned()).await;
    watch.break_off().await;
    let watch = server.watch("21").await;
    watch.event("ADDED", &namespace("c", 22)).await;
    assert_eq!(source.changes().await, [upsert("c")]);
}

#[tokio::test]
async fn what_arrives_together_is_merged_by_object() {
    let (mut server, mut source, _) = start(ObjectKind::Namespace).await;
    server.list().await.items("Namespace", "5", &[]);
    source.connected(ObjectKind::Namespace).await;
    source.changes().await;
    let watch = server.watch("5").await;
    let line = |kind: &str, name, revision| format!("{}\n", json!({"type": kind, "object": namespace(name, revision)}));
    let lines =
        [("ADDED", "b", 6), ("ADDED", "a", 7), ("DELETED", "b", 8)].map(|(kind, name, it)| line(kind, name, it));
    watch.bytes(lines.concat()).await;
    assert_eq!(source.changes().await, [upsert("a"), delete("b")]);
}

#[tokio::test]
async fn a_slice_that_changes_says_since_when_and_a_listed_one_does_not() {
    let (mut server, mut source, _) = start(ObjectKind::EndpointSlice).await;
    let slice = |revision: u32, labels: &Value| {
        let annotations = json!({"endpoints.kubernetes.io/last-change-trigger-time": "1970-01-01T00:00:07Z"});
        let metadata = json!({
            "namespace": "shop", "name": "cart-x", "resourceVersion": revision.to_string(),
            "labels": labels, "annotations": annotations,
        });
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata,
            "addressType": "IPv6", "ports": [], "endpoints": [],
        })
    };
    let ours = json!({"kubernetes.io/service-name": "cart"});
    let others = json!({"kubernetes.io/service-name": "cart", "service.kubernetes.io/service-proxy-name": "mesh"});
    server.list().await.items("EndpointSlice", "5", &[slice(4, &ours)]);
    source.connected(ObjectKind::EndpointSlice).await;
    assert_eq!(source.changes().await.len(), 1);
    let watch = server.watch("5").await;
    watch.event("MODIFIED", &slice(6, &ours)).await;
    let at = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(7);
    assert_eq!(source.next().await, SourceEvent::Triggered(vec![(portolan_net::Family::V6, at)]));
    assert_eq!(source.changes().await.len(), 1);
    watch.event("MODIFIED", &slice(7, &others)).await;
    assert!(matches!(source.changes().await.as_slice(), [Change::Delete(_)]), "another proxy's");
}

#[tokio::test]
async fn a_forgotten_revision_is_listed_again_without_deletions() {
    let (mut server, mut source, _) = start(ObjectKind::Namespace).await;
    server.list().await.items("Namespace", "5", &[namespace("a", 1), namespace("b", 2)]);
    source.connected(ObjectKind::Namespace).await;
    assert_eq!(source.changes().await, [replace(&["a", "b"])]);
    let watch = server.watch("5").await;
    watch.event("ERROR", &failure(410, "Expired")).await;
    server.list().await.items("Namespace", "9", &[namespace("b", 2), namespace("c", 8)]);
    assert_eq!(source.changes().await, [replace(&["b", "c"])]);
    // The same when the server says so in place of starting the watch.
    let call = server.call().await;
    assert_eq!(call.query["resourceVersion"], "9");
    call.error(410, "Expired");
    server.list().await.items("Namespace", "12", &[namespace("c", 8)]);
    assert_eq!(source.changes().await, [replace(&["c"])]);
    // Any other refusal of a watch is a disconnection.
    server.call().await.error(403, "Forbidden");
    let (reason, hint) = source.disconnected().await;
    assert!(reason.starts_with("cannot watch Namespace objects"), "{reason}");
    assert!(hint.starts_with("allow"), "{hint}");
    server.list().await.items("Namespace", "13", &[]);
    source.connected(ObjectKind::Namespace).await;
    assert_eq!(source.changes().await, [replace(&[])]);
}

#[tokio::test]
async fn a_server_that_is_away_changes_nothing() {
    let (mut server, mut source, path) = start(ObjectKind::Namespace).await;
    server.list().await.items("Namespace", "5", &[namespace("a", 1)]);
    source.connected(ObjectKind::Namespace).await;
    assert_eq!(source.changes().await, [replace(&["a"])]);
    let watch = server.watch("5").await;
    drop(server);
    drop(watch);
    std::fs::remove_file(&path).unwrap();
    // Told once, however often it is tried.
    let (reason, hint) = source.disconnected().await;
    assert!(reason.starts_with("cannot watch Namespace objects"), "{reason}");
    assert!(reason.contains("No such file"), "{reason}");
    assert_eq!(hint, "look whether the server runs and can be reached from here");
    let mut server = Server::start(&path);
    server.list().await.items("Namespace", "3", &[namespace("b", 1)]);
    source.connected(ObjectKind::Namespace).await;
    assert_eq!(source.changes().await, [replace(&["b"])]);
    server.watch("3").await;
}

#[tokio::test]
async fn a_refusal_says_what_to_allow() {
    let (mut server, mut source, _) = start(ObjectKind::EndpointSlice).await;
    let call = server.list().await;
    assert_eq!(call.path, "/apis/discovery.k8s.io/v1/endpointslices");
    call.error(403, "Forbidden");
    let (_, hint) = source.disconnected().await;
    assert_eq!(hint, "allow this account to list and watch EndpointSlice objects");
    server.list().await.error(403, "Forbidden");
    server.list().await.items("EndpointSlice", "1", &[]);
    source.connected(ObjectKind::EndpointSlice).await;
    assert_eq!(source.changes().await, [Change::Replace(ObjectKind::EndpointSlice, Vec::new(), Vec::new())]);
}

#[tokio::test]
async fn an_event_that_cannot_be_read_leads_to_a_list() {
    let (mut server, mut source, _) = start(ObjectKind::Namespace).await;
    server.list().await.items("Namespace", "5", &[]);
    source.connected(ObjectKind::Namespace).await;
    source.changes().await;
    server.watch("5").await.bytes("{\"type\":\"ADDED\"]\n".to_owned()).await;
    source.disconnected().await;
    server.list().await.items("Namespace", "6", &[namespace("a", 6)]);
    source.connected(ObjectKind::Namespace).await;
    assert_eq!(source.changes().await, [replace(&["a"])]);
}

fn service(name: &str, revision: u32, labels: &Value, cluster_ip: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
           "metadata": {"name": name, "namespace": "shop", "resourceVersion": revision.to_string(), "labels": labels},
           "spec": {"clusterIP": cluster_ip, "ports": [{"port": 80}]}})
}

#[tokio::test]
async fn one_bad_object_costs_only_itself() {
    let (mut server, mut source, _) = start(ObjectKind::Service).await;
    let other_proxy = json!({"service.kubernetes.io/service-proxy-name": "mesh"});
    let items = [
        service("good", 1, &json!({}), "10.96.0.1"),
        service("bad", 2, &json!({}), "nonsense"),
        service("mesh", 3, &other_proxy, "10.96.0.2"),
        json!({"metadata": {"name": "shapeless", "namespace": "shop"}, "spec": "none"}),
        json!("not an object"),
    ];
    server.list().await.items("Service", "5", &items);
    source.connected(ObjectKind::Service).await;
    let changes = source.changes().await;
    let [Change::Replace(ObjectKind::Service, objects, rejected)] = &*changes else { panic!("{changes:?}") };
    let names: Vec<_> = objects.iter().map(|(object, _)| object.reference().to_string()).collect();
    assert_eq!(names, ["Service shop/good", "Service shop/shapeless"]);
    assert_eq!(rejected.len(), 1);
    assert_eq!(
        rejected[0].to_string(),
        "Service shop/bad: spec.clusterIP: `nonsense` is not an address (write an IPv4 or IPv6 address, without a prefix length)"
    );

    let watch = server.watch("5").await;
    watch.event("MODIFIED", &service("good", 6, &json!({}), "127.0.0.1")).await;
    let changes = source.changes().await;
    assert!(matches!(&*changes, [Change::Reject(problem)] if &*problem.field == "spec.clusterIP"), "{changes:?}");
    // Handed to another proxy, it is gone from ours.
    watch.event("MODIFIED", &service("good", 7, &other_proxy, "10.96.0.1")).await;
    let key = ObjectKey::new("shop", "good");
    assert_eq!(source.changes().await, [Change::Delete(ObjectRef::Service(key))]);
}

#[tokio::test]
async fn names_keep_what_another_proxy_serves_and_pods_are_those_of_one_node() {
    let selection =
        Selection { tables: BTreeSet::from([ObjectKind::Pod]), pods_of: Some("n1".into()), keep_other_proxies: true };
    let (mut server, _source, _) = start_with(selection.clone(), 16).await;
    let call = server.list().await;
    assert_eq!((call.path.as_str(), call.query["fieldSelector"].as_str()), ("/api/v1/pods", "spec.nodeName%3Dn1"));

    let selection = Selection { tables: BTreeSet::from([ObjectKind::Service]), ..selection };
    let (mut server, mut source, _) = start_with(selection, 16).await;
    let call = server.list().await;
    assert!(!call.query.contains_key("fieldSelector"));
    let other_proxy = json!({"service.kubernetes.io/service-proxy-name": "mesh"});
    call.items("Service", "5", &[service("mesh", 3, &other_proxy, "10.96.0.2")]);
    source.connected(ObjectKind::Service).await;
    let changes = source.changes().await;
    assert!(matches!(&*changes, [Change::Replace(_, objects, _)] if objects.len() == 1), "{changes:?}");
}

#[tokio::test]
async fn a_receiver_that_is_slow_gets_the_latest_values() {
    const UPDATES: u32 = 5_000;
    let selection = Selection { tables: BTreeSet::from([ObjectKind::Service]), ..Selection::default() };
    let (mut server, mut source, _) = start_with(selection, 1).await;
    server.list().await.items("Service", "5", &[]);
    source.connected(ObjectKind::Service).await;
    source.changes().await;
    let watch = server.watch("5").await;
    // Nothing is received while all of this is sent.
    for update in 0..UPDATES {
        let address = format!("10.96.{}.{}", update / 250, update % 250 + 1);
        watch.event("MODIFIED", &service("busy", 6 + update, &json!({}), &address)).await;
    }
    let last =
        format!("10.96.{}.{}", (UPDATES - 1) / 250, (UPDATES - 1) % 250 + 1).parse::<std::net::IpAddr>().unwrap();
    let mut received = 0;
    loop {
        let changes = source.changes().await;
        received += changes.len();
        let [Change::Upsert(Object::Service(service), _)] = &*changes else { panic!("{changes:?}") };
        if service.cluster_addresses == [last] {
            break;
        }
    }
    assert!(received < 100, "{received} of {UPDATES} updates were not merged");
}

#[tokio::test]
async fn it_ends_with_its_receiver() {
    let (mut server, source, _) = start(ObjectKind::Namespace).await;
    server.list().await.items("Namespace", "5", &[]);
    let watch = server.watch("5").await;
    let Source { events, _handle: handle, .. } = source;
    drop(events);
    tokio::time::timeout(PATIENCE, handle.stop()).await.unwrap();
    drop(watch);
}

async fn client() -> (Server, Client, tempfile::TempDir) {
    let (directory, path) = socket();
    let server = Server::start(&path);
    (server, Connection::Socket(path).client().await.unwrap(), directory)
}

fn tunnel() -> NodeTunnel {
    NodeTunnel {
        backend: "vxlan".into(),
        public_addresses: vec!["192.168.64.11".parse().unwrap()],
        vni: Vni::new(1),
        vtep_mac_v4: Some(MacAddress([0xae, 0x11, 0x22, 0x33, 0x44, 0x55])),
        vtep_mac_v6: None,
    }
}

fn node(annotations: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "annotations": annotations}})
}

#[tokio::test]
async fn a_tunnel_is_published_once_and_only_what_differs() {
    let (mut server, client, _directory) = client().await;
    let name = NodeName::from("n1");
    let published = tokio::spawn({
        let (client, name) = (client.clone(), name.clone());
        async move { portolan_source::publish_node_tunnel(&client, &name, &tunnel(), 1).await }
    });
    // The first answer is lost on the way: it is tried again.
    server.call().await.error(503, "ServiceUnavailable");
    let stale = json!({
        "other.example/key": "kept",
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/public-ipv6": "fd00::1",
    });
    server.call().await.json(200, &node(&stale));
    let call = server.call().await;
    assert_eq!((call.method.as_str(), call.path.as_str()), ("PATCH", "/api/v1/nodes/n1"));
    let written = json!({
        "flannel.alpha.coreos.com/backend-data": "{\"VNI\":1,\"VtepMAC\":\"ae:11:22:33:44:55\"}",
        "flannel.alpha.coreos.com/kube-subnet-manager": "true",
        "flannel.alpha.coreos.com/public-ip": "192.168.64.11",
        "flannel.alpha.coreos.com/public-ipv6": null,
    });
    assert_eq!(call.body, json!({"metadata": {"annotations": written}}));
    call.json(200, &node(&json!({})));
    assert_eq!(published.await.unwrap().unwrap(), Published::Written);

    let again = tokio::spawn(async move { portolan_source::publish_node_tunnel(&client, &name, &tunnel(), 1).await });
    let mut current = written;
    current["flannel.alpha.coreos.com/backend-type"] = json!("vxlan");
    current.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    server.call().await.json(200, &node(&current));
    assert_eq!(again.await.unwrap().unwrap(), Published::Unchanged);
}

#[tokio::test]
async fn a_refused_write_is_not_repeated() {
    let (mut server, client, _directory) = client().await;
    let result =
        tokio::spawn(
            async move { portolan_source::set_network_unavailable_false(&client, &NodeName::from("n1"), 1).await },
        );
    server.call().await.error(403, "Forbidden");
    let error = result.await.unwrap().unwrap_err();
    assert!(matches!(error, SourceError::Write { .. }));
    let text = error.to_string();
    assert!(text.starts_with("cannot set condition NetworkUnavailable of Node n1: "), "{text}");
    assert!(text.ends_with("allow this account to get and patch nodes and nodes/status"), "{text}");
}

#[tokio::test]
async fn the_network_condition_is_set_once() {
    let (mut server, client, _directory) = client().await;
    let set = |client: Client| {
        tokio::spawn(
            async move { portolan_source::set_network_unavailable_false(&client, &NodeName::from("n1"), 1).await },
        )
    };
    let result = set(client.clone());
    server.call().await.json(200, &node(&json!({})));
    let call = server.call().await;
    assert_eq!((call.method.as_str(), call.path.as_str()), ("PATCH", "/api/v1/nodes/n1/status"));
    let condition = &call.body["status"]["conditions"][0];
    assert_eq!((&condition["type"], &condition["status"]), (&json!("NetworkUnavailable"), &json!("False")));
    call.json(200, &node(&json!({})));
    assert_eq!(result.await.unwrap().unwrap(), Published::Written);

    let result = set(client);
    let mut ready = node(&json!({}));
    ready["status"] = json!({"conditions": [{"type": "NetworkUnavailable", "status": "False"}]});
    server.call().await.json(200, &ready);
    assert_eq!(result.await.unwrap().unwrap(), Published::Unchanged);
}

#[tokio::test]
async fn a_kubeconfig_that_is_not_there_is_named() {
    let error = Connection::Kubeconfig("/nonexistent/kubeconfig".into()).client().await.err().unwrap();
    assert!(error.to_string().contains("/nonexistent/kubeconfig"), "{error}");
}
