//! The controllers together: passes over a mirror until nothing is left to do.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::fields::{at, items, label, set, text};

/// A cluster in memory: it does what the API server and the nodes' agents do, in a few lines.
struct World {
    mirror: Mirror,
    controllers: Controllers,
    clock: i64,
    counter: u64,
    passes: usize,
    /// Whether agents bring pods up.
    has_agents: bool,
}

const KINDS: &[&str] =
    &["Namespace", "Node", "Pod", "Service", "Endpoints", "EndpointSlice", "Deployment", "ReplicaSet", "ConfigMap"];

impl World {
    fn new(nodes: usize) -> World {
        let config = ControllersConfig {
            cluster_prefixes: vec!["10.42.0.0/16".parse().unwrap(), "fd42::/48".parse().unwrap()],
            ..ControllersConfig::default()
        };
        let mirror = Mirror::new(KINDS.iter().copied());
        let mut world = World {
            mirror,
            controllers: Controllers::new(config),
            clock: 1_700_000_000,
            counter: 0,
            passes: 0,
            has_agents: true,
        };
        for index in 1..=nodes {
            world.put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{index}"),
                "labels": {"topology.kubernetes.io/zone": format!("zone-{index}")}},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
        }
        world
    }

    fn put(&mut self, mut object: Value) {
        self.counter += 1;
        if text(&object, "metadata.uid").is_empty() {
            set(&mut object, "metadata.uid", json!(format!("uid-{}", self.counter)));
            set(&mut object, "metadata.creationTimestamp", json!(format_time(self.clock)));
        }
        set(&mut object, "metadata.resourceVersion", json!(self.counter.to_string()));
        self.mirror.upsert(object);
    }

    fn deployment(&mut self, replicas: i64, image: &str) {
        let old = self.mirror.get("Deployment", "default", "web").cloned();
        let mut object = old.unwrap_or_else(|| {
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "default"}})
        });
        set(
            &mut object,
            "spec",
            json!({
            "replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [
                {"name": "c", "image": image, "ports": [{"name": "http", "containerPort": 8080}]}]}}}),
        );
        self.put(object);
    }

    #[expect(clippy::needless_pass_by_value, reason = "every caller has a literal")]
    fn service(&mut self, spec: Value) {
        self.put(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"}, "spec": spec}));
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Create(object) => {
                let kind = text(&object, "kind").to_owned();
                let is_taken = self.mirror.get(&kind, namespace(&object), name(&object)).is_some();
                assert!(!is_taken, "created twice: {object}");
                self.put(object);
            }
            Action::Update(object) | Action::UpdateStatus(object) => {
                let kind = text(&object, "kind").to_owned();
                let Some(old) = self.mirror.get(&kind, namespace(&object), name(&object)) else { return };
                if at(old, "metadata.resourceVersion") != at(&object, "metadata.resourceVersion") {
                    return self.mirror.mark_all_dirty();
                }
                assert_ne!(old, &object, "a write that changes nothing");
                if crate::fields::is_terminating(&object)
                    && items(&object, "spec.finalizers").is_empty()
                    && items(&object, "metadata.finalizers").is_empty()
                {
                    self.mirror.remove(&kind, namespace(&object), name(&object));
                } else {
                    self.put(object);
                }
            }
            Action::Delete { kind, namespace, name, uid } => {
                let is_same =
                    self.mirror.get(&kind, &namespace, &name).is_some_and(|it| text(it, "metadata.uid") == uid);
                assert!(is_same, "deletes what is not there: {kind} {namespace}/{name}");
                self.mirror.remove(&kind, &namespace, &name);
            }
        }
    }

    /// Gives pods with a node an address and readiness.
    fn agents(&mut self) {
        let new: Vec<Value> = self
            .mirror
            .all("Pod")
            .filter(|pod| !text(pod, "spec.nodeName").is_empty() && text(pod, "status.podIP").is_empty())
            .cloned()
            .collect();
        for mut pod in new {
            let number = self.counter;
            let (four, six) =
                (format!("10.42.{}.{}", number / 250 % 250, number % 250 + 1), format!("fd42::{number:x}"));
            set(
                &mut pod,
                "status",
                json!({"phase": "Running", "podIP": four, "podIPs": [{"ip": four}, {"ip": six}],
                "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": format_time(self.clock)}]}),
            );
            self.put(pod);
        }
    }

    /// One pass over what changed; it must come to what a pass over everything comes to.
    fn reconcile(&mut self) -> Vec<Action> {
        let actions = self.controllers.reconcile(&self.mirror, self.clock);
        let mut everything = self.mirror.clone();
        everything.mark_all_dirty();
        let sorted = |actions: &[Action]| {
            let mut texts: Vec<String> = actions.iter().map(|action| format!("{action:?}")).collect();
            texts.sort();
            texts
        };
        assert_eq!(sorted(&actions), sorted(&self.controllers.reconcile(&everything, self.clock)));
        self.mirror.take_dirty();
        actions
    }

    /// Passes until nothing is to be done, and says how many it took.
    fn settle(&mut self) -> usize {
        for round in 0..60 {
            self.clock += 1;
            self.passes += 1;
            let actions = self.reconcile();
            for action in actions {
                self.act(action);
            }
            if self.has_agents {
                self.agents();
            }
            self.check();
            if !self.mirror.is_dirty() {
                let rest = self.reconcile();
                assert!(rest.is_empty(), "quiet, but not settled: {rest:?}");
                return round;
            }
        }
        panic!("no end after 60 passes");
    }

    /// What must hold at every moment.
    fn check(&self) {
        for slice in self.mirror.all("EndpointSlice") {
            assert!(items(slice, "endpoints").len() <= 100);
        }
    }

    fn endpoints(&self, family: &str) -> Vec<Value> {
        let slices = self.mirror.all("EndpointSlice").filter(|slice| text(slice, "addressType") == family);
        slices.flat_map(|slice| items(slice, "endpoints").to_vec()).collect()
    }
}

#[test]
fn a_deployment_becomes_ready_pods_spread_over_the_nodes() {
    let mut world = World::new(3);
    world.deployment(6, "web:1");
    world.settle();
    let mut per_node: BTreeMap<&str, usize> = BTreeMap::new();
    for pod in world.mirror.all("Pod") {
        *per_node.entry(text(pod, "spec.nodeName")).or_default() += 1;
        assert!(name(pod).starts_with("web-") && label(pod, "pod-template-hash").is_some());
    }
    assert_eq!(per_node.into_values().collect::<Vec<_>>(), [2, 2, 2]);
    let deployment = world.mirror.get("Deployment", "default", "web").unwrap();
    assert_eq!(deployment["status"]["availableReplicas"], 6);
    assert_eq!(deployment["status"]["conditions"][0]["status"], "True");
    assert_eq!(deployment["status"]["conditions"][1]["reason"], "NewReplicaSetAvailable");
    let prefixes: BTreeSet<String> =
        world.mirror.all("Node").map(|node| text(node, "spec.podCIDR").to_owned()).collect();
    assert_eq!(prefixes.into_iter().collect::<Vec<_>>(), ["10.42.0.0/24", "10.42.1.0/24", "10.42.2.0/24"]);
}

#[test]
fn a_rolling_update_keeps_its_promises() {
    let mut world = World::new(2);
    world.deployment(4, "web:1");
    world.settle();
    world.deployment(4, "web:2");
    for _ in 0..40 {
        world.clock += 1;
        let actions = world.controllers.reconcile(&world.mirror, world.clock);
        world.mirror.take_dirty();
        for action in actions {
            world.act(action);
            let pods: Vec<&Value> = world.mirror.all("Pod").collect();
            let ready = pods.iter().filter(|pod| crate::fields::condition_holds(pod, "Ready")).count();
            assert!(pods.len() <= 5 && ready >= 3, "{} pods, {ready} ready", pods.len());
        }
        world.agents();
    }
    assert_eq!(world.settle(), 0);
    assert!(world.mirror.all("Pod").all(|pod| pod["spec"]["containers"][0]["image"] == "web:2"));
    assert_eq!(world.mirror.all("Pod").count(), 4);
    assert_eq!(world.mirror.all("ReplicaSet").count(), 2, "the old one stays for the history");
}

#[test]
fn slices_follow_pods_with_little_churn() {
    let mut world = World::new(2);
    world.deployment(250, "web:1");
    world.service(json!({"selector": {"app": "web"}, "clusterIP": "None", "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]}));
    world.settle();
    assert_eq!(world.endpoints("IPv4").len(), 250);
    assert_eq!(world.endpoints("IPv6").len(), 250);
    let slice = world.mirror.all("EndpointSlice").next().unwrap();
    assert_eq!(label(slice, "kubernetes.io/service-name"), Some("web"));
    assert_eq!(label(slice, "service.kubernetes.io/headless"), Some(""));
    assert_eq!(slice["ports"], json!([{"name": "http", "port": 8080, "protocol": "TCP"}]));
    let first = &slice["endpoints"][0];
    assert_eq!(first["conditions"], json!({"ready": true, "serving": true, "terminating": false}));
    assert!(first["zone"].as_str().unwrap().starts_with("zone-") && first["targetRef"]["kind"] == "Pod");
    assert_eq!(
        items(world.mirror.get("Endpoints", "default", "web").unwrap(), "subsets")[0]["addresses"]
            .as_array()
            .unwrap()
            .len(),
        250
    );

    // One pod that ends touches the one slice of each family in which it is.
    let mut pod = world.mirror.all("Pod").next().unwrap().clone();
    set(&mut pod, "metadata.deletionTimestamp", json!("2024-01-01T00:00:00Z"));
    world.put(pod);
    let mut actions = Vec::new();
    endpoint_slice::reconcile(&world.mirror, &world.mirror.due_services(), &mut actions);
    assert_eq!(actions.len(), 2, "{actions:?}");
    for action in actions {
        world.act(action);
    }
    let ending: Vec<Value> =
        world.endpoints("IPv4").into_iter().filter(|it| it["conditions"]["terminating"] == true).collect();
    assert_eq!(ending.len(), 1);
    assert_eq!(ending[0]["conditions"], json!({"ready": false, "serving": true, "terminating": true}));
}

#[test]
fn endpoints_say_for_whom_they_are_meant_and_when_they_changed() {
    let mut world = World::new(2);
    world.deployment(2, "web:1");
    let spec = |distribution: &str| {
        json!({"selector": {"app": "web"}, "clusterIP": "10.96.0.2", "ipFamilies": ["IPv4"],
        "trafficDistribution": distribution, "ports": [{"port": 80}]})
    };
    let zoned = |zone: &str| json!([{"name": zone}]);
    for (distribution, expected) in [
        ("PreferSameZone", json!({"forZones": zoned("zone-1")})),
        ("PreferClose", json!({"forZones": zoned("zone-1")})),
        ("PreferSameNode", json!({"forZones": zoned("zone-1"), "forNodes": zoned("node-1")})),
        ("", Value::Null),
    ] {
        world.service(spec(distribution));
        world.settle();
        let endpoints = world.endpoints("IPv4");
        let first = endpoints.iter().find(|endpoint| endpoint["nodeName"] == "node-1").unwrap();
        assert_eq!(*at(first, "hints"), expected, "{distribution}");
    }
    const TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
    let time = |world: &World| {
        at(world.mirror.all("EndpointSlice").next().unwrap(), "metadata.annotations").get(TIME).cloned()
    };
    // A pod that becomes ready is a change with a time; one that goes is none.
    world.clock += 100;
    let mut pod = world.mirror.all("Pod").next().unwrap().clone();
    let now = format_time(world.clock);
    pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False", "lastTransitionTime": now}]);
    world.put(pod.clone());
    world.settle();
    assert_eq!(time(&world), Some(json!(now)));
    world.has_agents = false;
    set(&mut pod, "metadata.deletionTimestamp", json!(format_time(world.clock)));
    let key = (namespace(&pod).to_owned(), name(&pod).to_owned());
    world.put(pod);
    world.settle();
    assert_eq!(time(&world), None);
    world.mirror.remove("Pod", &key.0, &key.1);
    world.settle();
    assert_eq!(world.endpoints("IPv4").len(), 1);
}

#[test]
fn a_service_without_pods_has_an_empty_slice_and_loses_all_with_itself() {
    let mut world = World::new(1);
    world.service(
        json!({"selector": {"app": "web"}, "clusterIP": "10.96.0.2", "ipFamilies": ["IPv4"], "ports": [{"port": 80}]}),
    );
    world.settle();
    assert_eq!(world.mirror.all("EndpointSlice").count(), 1);
    world.mirror.remove("Service", "default", "web");
    world.settle();
    assert_eq!(world.mirror.all("EndpointSlice").count() + world.mirror.all("Endpoints").count(), 0);
}

#[test]
fn a_stale_view_asks_for_the_same_names_again() {
    let mut world = World::new(1);
    world.deployment(3, "web:1");
    for _ in 0..3 {
        let before = world.mirror.clone();
        let first = world.controllers.reconcile(&before, world.clock);
        let second = world.controllers.reconcile(&before, world.clock + 5);
        let names = |actions: &[Action]| -> Vec<String> {
            let created =
                actions.iter().filter_map(|action| if let Action::Create(it) = action { Some(it) } else { None });
            created.map(|it| format!("{}/{}", text(it, "kind"), name(it))).collect()
        };
        assert_eq!(names(&first), names(&second));
        world.mirror.take_dirty();
        for action in first {
            world.act(action);
        }
    }
    assert_eq!(world.mirror.all("Pod").count(), 3);
}

#[test]
fn a_new_target_port_changes_the_slice_in_place() {
    let mut world = World::new(1);
    let spec = |target: u16| json!({"selector": {"app": "web"}, "clusterIP": "10.96.0.2", "ipFamilies": ["IPv4"], "ports": [{"port": 80, "targetPort": target}]});
    world.service(spec(8080));
    world.deployment(2, "web:1");
    world.settle();
    let before = world.mirror.all("EndpointSlice").next().unwrap().clone();
    let mut service = world.mirror.get("Service", "default", "web").unwrap().clone();
    service["spec"] = spec(9090);
    world.put(service);
    world.settle();
    let after: Vec<&Value> = world.mirror.all("EndpointSlice").collect();
    assert_eq!((after.len(), name(after[0])), (1, name(&before)));
    assert_eq!(after[0]["ports"][0]["port"], 9090);
    assert_eq!(after[0]["endpoints"], before["endpoints"]);
}

#[test]
fn hand_written_endpoints_are_mirrored() {
    let mut world = World::new(1);
    world.service(json!({"clusterIP": "10.96.0.2", "ipFamilies": ["IPv4"], "ports": [{"port": 80}]}));
    world.put(json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "web", "namespace": "default"},
        "subsets": [{"addresses": [{"ip": "192.168.1.1"}, {"ip": "fd00::1"}], "notReadyAddresses": [{"ip": "192.168.1.2"}], "ports": [{"port": 8080}]}]}));
    world.settle();
    assert_eq!(
        world.endpoints("IPv4").iter().map(|it| it["conditions"]["ready"].clone()).collect::<Vec<_>>(),
        [json!(true), json!(false)]
    );
    assert_eq!(world.endpoints("IPv6").len(), 1);
    world.mirror.remove("Endpoints", "default", "web");
    world.settle();
    assert_eq!(world.mirror.all("EndpointSlice").count(), 0);
}

#[test]
fn a_pod_that_fits_nowhere_says_why_and_is_placed_when_it_can_be() {
    let mut world = World::new(1);
    world.put(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"},
        "spec": {"nodeSelector": {"disk": "fast"}, "containers": []}, "status": {"phase": "Pending"}}));
    world.settle();
    let pod = world.mirror.get("Pod", "default", "p").unwrap();
    assert_eq!(
        pod["status"]["conditions"][0]["message"],
        "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
    );
    world.has_agents = false;
    let mut node = world.mirror.get("Node", "", "node-1").unwrap().clone();
    node["metadata"]["labels"]["disk"] = json!("fast");
    world.put(node);
    world.settle();
    let pod = world.mirror.get("Pod", "default", "p").unwrap();
    assert_eq!(
        (text(pod, "spec.nodeName"), pod["status"]["conditions"][0]["status"].as_str()),
        ("node-1", Some("True"))
    );
}

#[test]
fn owners_and_namespaces_take_theirs_with_them() {
    let mut world = World::new(1);
    world.put(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}, "spec": {"finalizers": ["kubernetes"]}}));
    world.deployment(2, "web:1");
    world.settle();
    world.mirror.remove("Deployment", "default", "web");
    world.settle();
    assert_eq!(world.mirror.all("Pod").count() + world.mirror.all("ReplicaSet").count(), 0);
    world.deployment(2, "web:1");
    world.put(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "default"}}));
    world.settle();
    let mut ended = world.mirror.get("Namespace", "", "default").unwrap().clone();
    set(&mut ended, "metadata.deletionTimestamp", json!("2024-01-01T00:00:00Z"));
    world.put(ended);
    world.settle();
    assert_eq!(
        world.mirror.all("Namespace").count() + world.mirror.all("ConfigMap").count() + world.mirror.all("Pod").count(),
        0
    );
}

#[derive(Debug, Clone)]
enum Step {
    Scale(i64, u8),
    Service(bool, bool),
    NoService,
    KillPod(usize),
    NodeReady(usize, bool),
    NodeZone(usize, u8),
    Relabel(usize, bool),
    NoDeployment,
    EndPod(usize),
}

#[test]
fn a_custom_kind_with_a_known_name_is_another_kind() {
    let mut world = World::new(1);
    let spec = json!({"selector": {"app": "web"}, "ports": [{"port": 80}], "ipFamilies": ["IPv4"]});
    let metadata = json!({"name": "web", "namespace": "default"});
    world.put(json!({"apiVersion": "serving.example.com/v1", "kind": "Service", "metadata": metadata, "spec": spec}));
    world.settle();
    assert!(world.mirror.get("Service.serving.example.com", "default", "web").is_some());
    assert_eq!(world.mirror.all("Service").count() + world.mirror.all("EndpointSlice").count(), 0);
    // An owner is found by its group too.
    let owner = world.mirror.get("Service.serving.example.com", "default", "web").unwrap();
    let mut owned =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "of-web", "namespace": "default"}});
    set(&mut owned, "metadata.ownerReferences", controlled_by(owner));
    world.put(owned);
    world.settle();
    assert!(world.mirror.get("ConfigMap", "default", "of-web").is_some());
    world.mirror.remove("Service.serving.example.com", "default", "web");
    world.settle();
    assert!(world.mirror.get("ConfigMap", "default", "of-web").is_none());
}

#[test]
fn an_event_goes_after_an_hour() {
    let mut world = World::new(1);
    world.put(json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "a", "namespace": "default"}}));
    world.clock += 3500;
    world.settle();
    assert_eq!(world.mirror.all("Event").count(), 1);
    world.clock += 100;
    world.mirror.mark_all_dirty();
    world.settle();
    assert_eq!(world.mirror.all("Event").count(), 0);
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..8i64, 1..3u8).prop_map(|(replicas, image)| Step::Scale(replicas, image)),
        (any::<bool>(), any::<bool>()).prop_map(|(is_dual, is_headless)| Step::Service(is_dual, is_headless)),
        Just(Step::NoService),
        (0..8usize).prop_map(Step::KillPod),
        (1..4usize, any::<bool>()).prop_map(|(node, is_ready)| Step::NodeReady(node, is_ready)),
        (1..4usize, 0..3u8).prop_map(|(node, zone)| Step::NodeZone(node, zone)),
        (0..8usize, any::<bool>()).prop_map(|(pod, is_selected)| Step::Relabel(pod, is_selected)),
        Just(Step::NoDeployment),
        (0..8usize).prop_map(Step::EndPod),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever happens, the controllers come to rest in bounded time, and the slices are right then.
    #[test]
    fn they_converge(steps in proptest::collection::vec(any_step(), 1..8)) {
        let mut world = World::new(3);
        for step in steps {
            match step {
                Step::Scale(replicas, image) => world.deployment(replicas, &format!("web:{image}")),
                Step::Service(is_dual, is_headless) => world.service(json!({
                    "selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}],
                    "clusterIP": if is_headless { "None" } else { "10.96.0.2" },
                    "ipFamilies": if is_dual { json!(["IPv4", "IPv6"]) } else { json!(["IPv4"]) },
                    "trafficDistribution": if is_dual { "PreferSameNode" } else { "PreferSameZone" },
                })),
                Step::NodeZone(node, zone) => {
                    let mut node = world.mirror.get("Node", "", &format!("node-{node}")).unwrap().clone();
                    node["metadata"]["labels"] = json!({"topology.kubernetes.io/zone": format!("zone-{zone}")});
                    world.put(node);
                }
                Step::Relabel(index, is_selected) => {
                    let pod = world.mirror.all("Pod").nth(index).cloned();
                    if let Some(mut pod) = pod {
                        pod["metadata"]["labels"]["app"] = json!(if is_selected { "web" } else { "other" });
                        world.put(pod);
                    }
                }
                Step::NoDeployment => drop(world.mirror.remove("Deployment", "default", "web")),
                Step::EndPod(index) => {
                    let pod = world.mirror.all("Pod").nth(index).cloned();
                    if let Some(mut pod) = pod {
                        set(&mut pod, "metadata.deletionTimestamp", json!("2024-01-01T00:00:00Z"));
                        world.put(pod);
                    }
                }
                Step::NoService => drop(world.mirror.remove("Service", "default", "web")),
                Step::KillPod(index) => {
                    let victim = world.mirror.all("Pod").nth(index).map(|pod| name(pod).to_owned());
                    if let Some(victim) = victim {
                        world.mirror.remove("Pod", "default", &victim);
                    }
                }
                Step::NodeReady(node, is_ready) => {
                    let mut node = world.mirror.get("Node", "", &format!("node-{node}")).unwrap().clone();
                    set(&mut node, "status.conditions", json!([{"type": "Ready", "status": if is_ready { "True" } else { "False" }}]));
                    world.put(node);
                }
            }
            world.settle();
            let is_selected = |pod: &&Value| !text(pod, "status.podIP").is_empty() && label(pod, "app") == Some("web");
            let with_address = world.mirror.all("Pod").filter(is_selected).count();
            let has_service = world.mirror.get("Service", "default", "web").is_some();
            prop_assert_eq!(world.endpoints("IPv4").len(), if has_service { with_address } else { 0 });
            if let Some(deployment) = world.mirror.get("Deployment", "default", "web") {
                let wanted = usize::try_from(deployment["spec"]["replicas"].as_i64().unwrap()).unwrap();
                let any_ready = world.mirror.all("Node").any(|node| crate::fields::condition_holds(node, "Ready"));
                if any_ready {
                    let is_ending = |pod: &&Value| crate::fields::is_terminating(pod);
                    prop_assert_eq!(world.mirror.all("Pod").filter(|pod| !is_ending(pod)).count(), wanted);
                }
            }
        }
    }
}
