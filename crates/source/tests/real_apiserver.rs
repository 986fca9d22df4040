//! The source against a real kube-apiserver, if this machine has one: `cargo xtask kube-apiserver`
//! builds it.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

#[path = "../../../xtask/src/kube_apiserver/process.rs"]
mod process;

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1 as discovery;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use portolan_net::{MacAddress, NodeName, ObjectKey, ObjectKind, Vni};
use portolan_source::{Client, Connection, Published, Selection, SourceEvent};
use portolan_state::{Change, NodeTunnel, Snapshot, Writer};
use process::{Binaries, Cluster};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_mins(1);
const TABLES: [ObjectKind; 5] =
    [ObjectKind::Namespace, ObjectKind::Node, ObjectKind::Service, ObjectKind::EndpointSlice, ObjectKind::Pod];

/// The tables as the source fills them.
struct Tables {
    writer: Writer,
    events: mpsc::Receiver<SourceEvent>,
}

impl Tables {
    async fn next(&mut self) -> SourceEvent {
        let event = tokio::time::timeout(PATIENCE, self.events.recv()).await;
        let event = event.expect("an event in time").expect("a running source");
        if let SourceEvent::Changes(changes) = &event {
            changes.iter().cloned().for_each(|change| self.writer.apply(change));
        }
        event
    }

    /// Takes events until the tables are as they should be.
    async fn until<T>(&mut self, what: &str, found: impl Fn(&Snapshot) -> Option<T>) -> T {
        let wait = async {
            loop {
                if let Some(found) = found(self.writer.snapshot()) {
                    return found;
                }
                self.next().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("not in time: {what}"))
    }
}

fn object<K: DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

/// Found when the condition holds.
fn when(condition: bool) -> Option<()> {
    condition.then_some(())
}

#[tokio::test]
async fn a_real_server_is_followed_through_a_restart() {
    let binaries = match Binaries::find() {
        Ok(binaries) => binaries,
        Err(missing) => {
            println!("skipped: {missing}");
            return;
        }
    };
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(binaries, directory.path()).unwrap();
    let client = Connection::Kubeconfig(cluster.kubeconfig()).client().await.unwrap();
    let (sender, events) = mpsc::channel(16);
    let _handle = portolan_source::start(&client, &Selection::default(), &sender, 1);
    let mut tables = Tables { writer: Writer::new(), events };

    tables.until("every table in sync", |it| when(it.is_in_sync(&TABLES))).await;
    assert!(tables.writer.snapshot().namespaces.contains_key("default"));
    assert_eq!(tables.writer.snapshot().problems.len(), 0);

    follows_nodes(&client, &mut tables).await;
    follows_services(&client, &mut tables).await;
    follows_slices(&client, &mut tables).await;
    survives_a_restart(&client, &mut tables, &mut cluster).await;
}

async fn follows_nodes(client: &Client, tables: &mut Tables) {
    let nodes: Api<v1::Node> = Api::all(client.clone());
    let prefixes = json!(["10.42.1.0/24", "fd00:42:1::/64"]);
    let node = json!({"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.42.1.0/24", "podCIDRs": prefixes}});
    nodes.create(&PostParams::default(), &object(node)).await.unwrap();
    let status = json!({"status": {"addresses": [{"type": "InternalIP", "address": "192.168.64.11"}]}});
    nodes.patch_status("n1", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    let name = NodeName::from("n1");
    let node = tables
        .until("the node with its address", |it| it.nodes.get(&name).filter(|node| !node.addresses.is_empty()).cloned())
        .await;
    let prefixes: Vec<_> = node.pod_prefixes.iter().map(ToString::to_string).collect();
    assert_eq!(prefixes, ["10.42.1.0/24", "fd00:42:1::/64"]);
    assert_eq!(node.tunnel, None);

    let tunnel = NodeTunnel {
        backend: "vxlan".into(),
        public_addresses: vec!["192.168.64.11".parse().unwrap(), "fd00:64::11".parse().unwrap()],
        vni: Vni::new(1),
        vtep_mac_v4: Some(MacAddress([0xae, 0x11, 0x22, 0x33, 0x44, 0x55])),
        vtep_mac_v6: Some(MacAddress([0xae, 0x11, 0x22, 0x33, 0x44, 0x66])),
    };
    let publish = || portolan_source::publish_node_tunnel(client, &name, &tunnel, 1);
    assert_eq!(publish().await.unwrap(), Published::Written);
    assert_eq!(publish().await.unwrap(), Published::Unchanged);
    tables.until("the tunnel", |it| when(it.nodes.get(&name)?.tunnel.as_ref() == Some(&tunnel))).await;

    let set = || portolan_source::set_network_unavailable_false(client, &name, 1);
    assert_eq!(set().await.unwrap(), Published::Written);
    assert_eq!(set().await.unwrap(), Published::Unchanged);
    let conditions = nodes.get("n1").await.unwrap().status.unwrap().conditions.unwrap();
    assert!(conditions.iter().any(|it| it.type_ == "NetworkUnavailable" && it.status == "False"));
}

async fn follows_services(client: &Client, tables: &mut Tables) {
    let services: Api<v1::Service> = Api::namespaced(client.clone(), "default");
    let spec = json!({
        "type": "NodePort",
        "ipFamilyPolicy": "PreferDualStack",
        "selector": {"app": "cart"},
        "ports": [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    });
    let service = json!({"metadata": {"name": "cart"}, "spec": spec});
    services.create(&PostParams::default(), &object(service)).await.unwrap();
    let key = ObjectKey::new("default", "cart");
    let service = tables.until("the Service", |it| it.services.get(&key).cloned()).await;
    assert_eq!(service.cluster_addresses.len(), 2, "{service:?}");
    assert!(service.cluster_addresses[0].to_string().starts_with("10.96."));
    assert!(service.cluster_addresses[1].to_string().starts_with("fd00:96:"));
    assert_eq!(service.ports.len(), 2);
    assert!(service.ports.iter().all(|port| port.node_port.is_some_and(|it| (30_000..32_768).contains(&it.get()))));

    let headless = json!({"metadata": {"name": "peers"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}});
    services.create(&PostParams::default(), &object(headless)).await.unwrap();
    let key = ObjectKey::new("default", "peers");
    tables.until("the headless Service", |it| when(it.services.get(&key)?.headless)).await;
    services.delete("peers", &DeleteParams::default()).await.unwrap();
    tables.until("no headless Service", |it| when(!it.services.contains_key(&key))).await;
}

async fn follows_slices(client: &Client, tables: &mut Tables) {
    let slices: Api<discovery::EndpointSlice> = Api::namespaced(client.clone(), "default");
    let slice = json!({
        "metadata": {"name": "cart-x", "labels": {"kubernetes.io/service-name": "cart"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["10.42.1.2"], "nodeName": "n1"}, {"addresses": ["127.0.0.1"]}],
    });
    slices.create(&PostParams::default(), &object(slice)).await.unwrap();
    let (service, key) = (ObjectKey::new("default", "cart"), ObjectKey::new("default", "cart-x"));
    let addresses = |it: &Snapshot| -> Vec<String> {
        it.slices_of(&service).flat_map(|slice| &slice.endpoints).map(|it| it.address.to_string()).collect()
    };
    tables.until("one good endpoint", |it| when(addresses(it) == ["10.42.1.2"])).await;
    let problems: Vec<_> = tables.writer.snapshot().problems.values().flat_map(|it| it.iter().cloned()).collect();
    assert_eq!(problems.len(), 1);
    assert_eq!(&*problems[0].field, "endpoints[1].addresses[0]");

    let endpoints = json!({"endpoints": [{"addresses": ["10.42.1.2"]}, {"addresses": ["10.42.1.3"]}]});
    slices.patch("cart-x", &PatchParams::default(), &Patch::Merge(endpoints)).await.unwrap();
    tables.until("two endpoints", |it| when(addresses(it) == ["10.42.1.2", "10.42.1.3"])).await;
    assert_eq!(tables.writer.snapshot().problems.len(), 0);
    slices.delete("cart-x", &DeleteParams::default()).await.unwrap();
    tables.until("no slice", |it| when(!it.endpoint_slices.contains_key(&key))).await;
}

async fn survives_a_restart(client: &Client, tables: &mut Tables, cluster: &mut Cluster) {
    let before = tables.writer.snapshot().clone();
    cluster.kill_server();
    let mut away = BTreeSet::new();
    while away.len() < TABLES.len() {
        match tables.next().await {
            SourceEvent::Disconnected { table, .. } => assert!(away.insert(table), "{table} is told twice"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(tables.writer.snapshot(), &before, "a server that is away changes nothing");

    cluster.start_server().unwrap();
    let mut replaced = BTreeSet::new();
    while replaced.len() < TABLES.len() {
        match tables.next().await {
            SourceEvent::Connected { .. } | SourceEvent::Triggered(_) => {}
            SourceEvent::Changes(changes) => {
                for change in changes {
                    match change {
                        Change::Replace(table, _, _) => assert!(replaced.insert(table), "{table} is listed twice"),
                        Change::Upsert(..) => {}
                        Change::Delete(_) | Change::Reject(_) => panic!("{change:?}"),
                    }
                }
            }
            // A server that is starting may take a moment until it serves every kind.
            SourceEvent::Disconnected { table, reason, .. } => assert!(!replaced.contains(&table), "{reason}"),
        }
    }
    let after = tables.writer.snapshot();
    assert_eq!((&after.nodes, &after.services), (&before.nodes, &before.services));

    let services: Api<v1::Service> = Api::namespaced(client.clone(), "default");
    services.delete("cart", &DeleteParams::default()).await.unwrap();
    let key = ObjectKey::new("default", "cart");
    tables.until("no Service", |it| when(!it.services.contains_key(&key))).await;
}
