//! Admission, seen from outside: what is filled in, what is refused and in which words.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

struct Cluster {
    services: Objects,
    nodes: Objects,
    service_prefixes: Vec<IpNet>,
    pod_prefixes: Vec<IpNet>,
    ports: RangeInclusive<u16>,
}

impl Cluster {
    fn new(service_prefixes: &[&str]) -> Cluster {
        let parse = |prefixes: &[&str]| prefixes.iter().map(|it| it.parse().unwrap()).collect();
        Cluster {
            services: Objects::new(),
            nodes: Objects::new(),
            service_prefixes: parse(service_prefixes),
            pod_prefixes: parse(&["10.42.0.0/16", "fd42::/48"]),
            ports: 30000..=32767,
        }
    }

    fn admit(&self, kind: &str, old: Option<&Value>, mut new: Value) -> Result<Value, Vec<Cause>> {
        let holders = Holders::of(self.services.values());
        let view = ClusterView {
            holders: &holders,
            nodes: &self.nodes,
            service_prefixes: &self.service_prefixes,
            node_port_range: self.ports.clone(),
            cluster_prefixes: &self.pod_prefixes,
            node_prefix_lengths: NodePrefixLengths::default(),
        };
        admit(kind, old, &mut new, &view).map(|()| new)
    }

    /// Admits a Service and keeps it.
    fn service(&mut self, service_name: &str, spec: Value) -> Result<Value, Vec<Cause>> {
        let service = self.admit("Service", None, service(service_name, spec))?;
        self.services.insert(("default".into(), service_name.into()), service.clone());
        Ok(service)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "every caller has a literal")]
fn service(service_name: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": service_name, "namespace": "default"}, "spec": spec})
}

fn one_port() -> Value {
    json!([{"port": 80}])
}

/// The fields and reasons of a refusal.
fn faults(result: Result<Value, Vec<Cause>>) -> Vec<(String, CauseReason)> {
    result.expect_err("must be refused").into_iter().map(|cause| (cause.field, cause.reason)).collect()
}

#[test]
fn a_service_gets_its_defaults_and_the_lowest_free_address() {
    let mut cluster = Cluster::new(&["10.96.0.0/24"]);
    let first = cluster.service("a", json!({"ports": one_port(), "selector": {"app": "a"}})).unwrap();
    assert_eq!(
        first["spec"],
        json!({
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}], "selector": {"app": "a"},
            "type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"],
            "clusterIP": "10.96.0.2", "clusterIPs": ["10.96.0.2"],
        })
    );
    let asked = cluster.service("dns", json!({"ports": one_port(), "clusterIP": "10.96.0.10"})).unwrap();
    assert_eq!(asked["spec"]["clusterIPs"], json!(["10.96.0.10"]));
    let second = cluster.service("b", json!({"ports": one_port()})).unwrap();
    assert_eq!(second["spec"]["clusterIP"], "10.96.0.3");
    cluster.services.remove(&("default".into(), "a".into()));
    assert_eq!(cluster.service("c", json!({"ports": one_port()})).unwrap()["spec"]["clusterIP"], "10.96.0.2");
}

#[test]
fn dual_stack_follows_the_policy() {
    let mut cluster = Cluster::new(&["10.96.0.0/24", "fd96::/112"]);
    let both = cluster.service("both", json!({"ports": one_port(), "ipFamilyPolicy": "RequireDualStack"})).unwrap();
    assert_eq!(both["spec"]["clusterIPs"], json!(["10.96.0.2", "fd96::2"]));
    assert_eq!(both["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    let six = cluster.service("six", json!({"ports": one_port(), "ipFamilies": ["IPv6"]})).unwrap();
    assert_eq!(six["spec"]["clusterIPs"], json!(["fd96::3"]));
    let none = json!({"ports": one_port(), "clusterIP": "None", "ipFamilyPolicy": "PreferDualStack"});
    let headless = cluster.service("headless", none).unwrap();
    assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    assert_eq!(headless["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    let mut back = both.clone();
    back["spec"]["ipFamilyPolicy"] = json!("SingleStack");
    let back = cluster.admit("Service", Some(&both), back).unwrap();
    assert_eq!(back["spec"]["clusterIPs"], json!(["10.96.0.2"]));
    cluster.services.insert(("default".into(), "both".into()), back.clone());
    let mut up = back.clone();
    up["spec"]["ipFamilyPolicy"] = json!("PreferDualStack");
    assert_eq!(
        cluster.admit("Service", Some(&back), up).unwrap()["spec"]["clusterIPs"],
        json!(["10.96.0.2", "fd96::2"])
    );
    let mut single = Cluster::new(&["10.96.0.0/24"]);
    let refused = single.service("x", json!({"ports": one_port(), "ipFamilyPolicy": "RequireDualStack"}));
    assert_eq!(faults(refused), [("spec.ipFamilyPolicy".into(), CauseReason::Invalid)]);
}

#[test]
fn a_refusal_names_the_field_and_the_holder() {
    let mut cluster = Cluster::new(&["10.96.0.0/30"]);
    cluster.service("a", json!({"ports": [{"port": 80, "nodePort": 30080}], "type": "NodePort"})).unwrap();
    let taken = cluster.service(
        "b",
        json!({"ports": [{"port": 80, "nodePort": 30080}], "type": "NodePort", "clusterIP": "10.96.0.1"}),
    );
    let causes = taken.unwrap_err();
    assert_eq!(
        causes[0].to_string(),
        "spec.ports[0].nodePort: Invalid value: 30080: provided port is already allocated to Service default/a"
    );
    let taken = cluster.service("b", json!({"ports": one_port(), "clusterIP": "10.96.0.2"})).unwrap_err();
    assert!(taken[0].message.contains("already allocated to Service default/a"), "{taken:?}");
    let full = cluster.service("c", json!({"ports": one_port()})).unwrap_err();
    assert!(full[0].message.contains("range is full"), "{full:?}");
    let outside = cluster
        .service("d", json!({"ports": [{"port": 80, "nodePort": 80}], "type": "NodePort", "clusterIP": "10.97.0.1"}));
    assert_eq!(
        faults(outside),
        [("spec.clusterIPs[0]".into(), CauseReason::Invalid), ("spec.ports[0].nodePort".into(), CauseReason::Invalid)]
    );
}

#[test]
fn ports_are_checked_one_by_one() {
    let cluster = Cluster::new(&["10.96.0.0/24"]);
    let bad = json!({"ports": [
        {"port": 70000, "name": "a"}, {"port": 80, "name": "a"}, {"port": 80, "protocol": "ICMP"}, {"name": "d"},
        {"port": 80, "name": "e", "targetPort": "no spaces"}]});
    let faults = faults(cluster.admit("Service", None, service("s", bad)));
    let expected = [
        ("spec.ports[0].port", CauseReason::Invalid),
        ("spec.ports[0].targetPort", CauseReason::Invalid),
        ("spec.ports[1].name", CauseReason::Duplicate),
        ("spec.ports[2].protocol", CauseReason::NotSupported),
        ("spec.ports[2].name", CauseReason::Required),
        ("spec.ports[3].port", CauseReason::Required),
        ("spec.ports[4].targetPort", CauseReason::Invalid),
        ("spec.ports[4]", CauseReason::Duplicate),
    ];
    assert_eq!(faults, expected.map(|(field, reason)| (field.to_owned(), reason)));
    let none = self::faults(cluster.admit("Service", None, service("s", json!({}))));
    assert_eq!(none, [("spec.ports".to_owned(), CauseReason::Required)]);
}

#[test]
fn an_update_keeps_what_was_given_and_may_not_move() {
    let mut cluster = Cluster::new(&["10.96.0.0/24"]);
    let old = cluster.service("a", json!({"ports": one_port(), "type": "NodePort"})).unwrap();
    let again =
        cluster.admit("Service", Some(&old), service("a", json!({"ports": one_port(), "type": "NodePort"}))).unwrap();
    assert_eq!(again["spec"]["clusterIP"], old["spec"]["clusterIP"]);
    assert_eq!(again["spec"]["ports"][0]["nodePort"], old["spec"]["ports"][0]["nodePort"]);
    let moved = json!({"ports": one_port(), "clusterIP": "10.96.0.77"});
    assert_eq!(
        faults(cluster.admit("Service", Some(&old), service("a", moved))),
        [("spec.clusterIP".to_owned(), CauseReason::Invalid)]
    );
    let mut back = old.clone();
    back["spec"]["type"] = json!("ClusterIP");
    let back = cluster.admit("Service", Some(&old), back).unwrap();
    assert!(back["spec"]["ports"][0].get("nodePort").is_none());
    let external = service("a", json!({"type": "ExternalName", "externalName": "example.com"}));
    assert!(cluster.admit("Service", None, external).unwrap()["spec"].get("clusterIP").is_none());
    let missing = service("a", json!({"type": "ExternalName"}));
    assert_eq!(
        faults(cluster.admit("Service", None, missing)),
        [("spec.externalName".to_owned(), CauseReason::Required)]
    );
}

/// The messages of a refusal, with their fields.
fn said(result: Result<Value, Vec<Cause>>) -> Vec<String> {
    result.expect_err("must be refused").into_iter().map(|cause| cause.to_string()).collect()
}

#[test]
fn a_service_says_who_gets_which_traffic() {
    let mut cluster = Cluster::new(&["10.96.0.0/24"]);
    let node_port = cluster.service("n", json!({"ports": one_port(), "type": "NodePort"})).unwrap();
    assert_eq!(node_port["spec"]["externalTrafficPolicy"], "Cluster");
    assert_eq!(node_port["spec"]["internalTrafficPolicy"], "Cluster");
    let external = cluster.service("e", json!({"ports": one_port(), "externalIPs": ["192.0.2.1"]})).unwrap();
    assert_eq!(external["spec"]["externalTrafficPolicy"], "Cluster");
    let sticky = cluster.service("s", json!({"ports": one_port(), "sessionAffinity": "ClientIP"})).unwrap();
    assert_eq!(sticky["spec"]["sessionAffinityConfig"], json!({"clientIP": {"timeoutSeconds": 10800}}));
    let mut loose = sticky.clone();
    loose["spec"]["sessionAffinity"] = json!("None");
    let loose = cluster.admit("Service", Some(&sticky), loose).unwrap();
    assert!(loose["spec"].get("sessionAffinityConfig").is_none());

    let refused = |spec: Value| said(cluster.admit("Service", None, service("x", spec)));
    for (field, value, message) in [
        ("sessionAffinity", json!("Cookie"), r#"Unsupported value: "Cookie": supported values: "ClientIP", "None""#),
        ("internalTrafficPolicy", json!("Near"), r#"Unsupported value: "Near": supported values: "Cluster", "Local""#),
        (
            "externalTrafficPolicy",
            json!("Local"),
            r#"Invalid value: "Local": may only be set for externally-accessible services"#,
        ),
        (
            "trafficDistribution",
            json!("Far"),
            r#"Unsupported value: "Far": supported values: "PreferClose", "PreferSameNode", "PreferSameZone""#,
        ),
        ("allocateLoadBalancerNodePorts", json!(true), "Forbidden: may only be used when `type` is 'LoadBalancer'"),
        ("loadBalancerClass", json!("a.example/b"), "Forbidden: may only be used when `type` is 'LoadBalancer'"),
        (
            "healthCheckNodePort",
            json!(30100),
            "Invalid value: 30100: may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
        ),
    ] {
        let mut spec = json!({"ports": one_port()});
        spec[field] = value;
        assert_eq!(refused(spec), [format!("spec.{field}: {message}")]);
    }
    for (seconds, is_good) in [(0, false), (1, true), (86_400, true), (86_401, false)] {
        let spec = json!({"ports": one_port(), "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}});
        assert_eq!(cluster.admit("Service", None, service("x", spec)).is_ok(), is_good, "{seconds}");
    }
    let addresses =
        json!({"ports": one_port(), "externalIPs": ["127.0.0.1", "fe80::1", "x", "::", "224.0.0.1", "192.0.2.1"]});
    assert_eq!(
        refused(addresses),
        [
            r#"spec.externalIPs[0]: Invalid value: "127.0.0.1": may not be in the loopback range (127.0.0.0/8, ::1/128)"#,
            r#"spec.externalIPs[1]: Invalid value: "fe80::1": may not be in the link-local range (169.254.0.0/16, fe80::/10)"#,
            r#"spec.externalIPs[2]: Invalid value: "x": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"#,
            r#"spec.externalIPs[3]: Invalid value: "::": may not be unspecified (::)"#,
            r#"spec.externalIPs[4]: Invalid value: "224.0.0.1": may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"#,
        ]
    );
    let ranges =
        json!({"ports": one_port(), "type": "LoadBalancer", "loadBalancerSourceRanges": [" 10.0.0.0/8 ", "ten"]});
    assert_eq!(
        refused(ranges),
        [
            r#"spec.LoadBalancerSourceRanges[1]: Invalid value: "ten": must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"#
        ]
    );
    let misplaced = json!({"ports": one_port(), "loadBalancerSourceRanges": ["10.0.0.0/8"]});
    assert_eq!(
        refused(misplaced),
        ["spec.LoadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'"]
    );
}

#[test]
fn a_load_balancer_has_a_health_check_and_frees_what_it_held() {
    let mut cluster = Cluster::new(&["10.96.0.0/24"]);
    let local = json!({"ports": one_port(), "type": "LoadBalancer", "externalTrafficPolicy": "Local"});
    let old = cluster.service("lb", local).unwrap();
    assert_eq!(old["spec"]["allocateLoadBalancerNodePorts"], true);
    let health = old["spec"]["healthCheckNodePort"].as_u64().unwrap();
    assert!(health >= 30000 && old["spec"]["ports"][0]["nodePort"] != health);
    let taken = json!({"ports": [{"port": 80, "nodePort": health}], "type": "NodePort"});
    let taken = said(cluster.admit("Service", None, service("x", taken)));
    assert!(taken[0].ends_with("provided port is already allocated to Service default/lb"), "{taken:?}");
    // It stays, also when the client leaves it out, and cannot move.
    let mut again = old.clone();
    again["spec"].as_object_mut().unwrap().shift_remove("healthCheckNodePort");
    assert_eq!(cluster.admit("Service", Some(&old), again).unwrap()["spec"]["healthCheckNodePort"], health);
    let mut moved = old.clone();
    moved["spec"]["healthCheckNodePort"] = json!(30_001);
    assert_eq!(
        said(cluster.admit("Service", Some(&old), moved)),
        ["spec.healthCheckNodePort: Forbidden: field is immutable"]
    );
    // Each step back gives up what only the step before had.
    let mut wide = old.clone();
    wide["spec"]["externalTrafficPolicy"] = json!("Cluster");
    let wide = cluster.admit("Service", Some(&old), wide).unwrap();
    assert!(wide["spec"].get("healthCheckNodePort").is_none());
    let mut held = old.clone();
    held["status"] = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.7", "ipMode": "VIP"}]}});
    let mut plain = held.clone();
    plain["spec"]["type"] = json!("ClusterIP");
    let plain = cluster.admit("Service", Some(&held), plain).unwrap();
    for field in ["healthCheckNodePort", "externalTrafficPolicy", "allocateLoadBalancerNodePorts"] {
        assert!(plain["spec"].get(field).is_none(), "{field}");
    }
    assert!(plain["spec"]["ports"][0].get("nodePort").is_none());
    assert_eq!(plain["status"]["loadBalancer"], json!({}));
    assert_eq!(plain["spec"]["clusterIP"], old["spec"]["clusterIP"]);
    let mut external = plain.clone();
    external["spec"]["type"] = json!("ExternalName");
    external["spec"]["externalName"] = json!("example.com");
    let external = cluster.admit("Service", Some(&plain), external).unwrap();
    assert!(external["spec"].get("clusterIP").is_none() && external["spec"].get("ipFamilies").is_none());
    // Without node ports on demand.
    let none = json!({"ports": one_port(), "type": "LoadBalancer", "allocateLoadBalancerNodePorts": false});
    let none = cluster.service("none", none).unwrap();
    assert!(none["spec"]["ports"][0].get("nodePort").is_none());
}

#[test]
fn a_status_says_at_which_address_a_load_balancer_answers() {
    let mut cluster = Cluster::new(&["10.96.0.0/24"]);
    let old = cluster.service("lb", json!({"ports": one_port(), "type": "LoadBalancer"})).unwrap();
    let with = |ingress: Value| {
        let mut new = old.clone();
        new["status"]["loadBalancer"]["ingress"] = ingress;
        cluster.admit("Service", Some(&old), new)
    };
    let good = with(json!([{"ip": "192.0.2.7"}, {"ip": "2001:db8::7", "ipMode": "Proxy"}, {"hostname": "a.example"}]));
    assert_eq!(
        good.unwrap()["status"]["loadBalancer"]["ingress"],
        json!([{"ip": "192.0.2.7", "ipMode": "VIP"}, {"ip": "2001:db8::7", "ipMode": "Proxy"}, {"hostname": "a.example"}])
    );
    assert_eq!(
        faults(with(json!([{"ip": "ten"}, {"hostname": "a.example", "ipMode": "VIP"}, {"hostname": "192.0.2.7"},
            {"ip": "192.0.2.7", "ipMode": "Magic"}]))),
        [
            ("status.loadBalancer.ingress[0].ip".to_owned(), CauseReason::Invalid),
            ("status.loadBalancer.ingress[1].ipMode".to_owned(), CauseReason::Forbidden),
            ("status.loadBalancer.ingress[2].hostname".to_owned(), CauseReason::Invalid),
            ("status.loadBalancer.ingress[3].ipMode".to_owned(), CauseReason::NotSupported),
        ]
    );
    let plain = cluster.service("plain", json!({"ports": one_port()})).unwrap();
    let mut claims = plain.clone();
    claims["status"]["loadBalancer"]["ingress"] = json!([{"ip": "192.0.2.7"}]);
    assert_eq!(
        said(cluster.admit("Service", Some(&plain), claims)),
        [r#"status.loadBalancer.ingress: Forbidden: may only be used when `spec.type` is "LoadBalancer""#]
    );
}

#[expect(clippy::needless_pass_by_value, reason = "every caller has a literal")]
fn pod(spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"}, "spec": spec})
}

#[test]
fn pods_have_containers_and_mostly_stay_as_they_are() {
    let cluster = Cluster::new(&["10.96.0.0/24"]);
    let old = cluster.admit("Pod", None, pod(json!({"containers": [{"name": "a", "image": "x:1"}]}))).unwrap();
    assert_eq!(old["spec"]["restartPolicy"], "Always");
    assert_eq!(old["spec"]["dnsPolicy"], "ClusterFirst");
    assert_eq!(old["status"]["phase"], "Pending");
    let mut bound = old.clone();
    bound["spec"]["nodeName"] = json!("node-1");
    bound["spec"]["containers"][0]["image"] = json!("x:2");
    let bound = cluster.admit("Pod", Some(&old), bound).unwrap();
    let mut moved = bound.clone();
    moved["spec"]["nodeName"] = json!("node-2");
    assert_eq!(faults(cluster.admit("Pod", Some(&bound), moved)), [("spec".to_owned(), CauseReason::Forbidden)]);
    assert_eq!(
        faults(cluster.admit("Pod", None, pod(json!({"containers": []})))),
        [("spec.containers".to_owned(), CauseReason::Required)]
    );
    let twice = json!({"containers": [{"name": "a", "image": "x"}, {"name": "a", "image": "x", "ports": [{"containerPort": 0}]}]});
    assert_eq!(
        faults(cluster.admit("Pod", None, pod(twice))),
        [
            ("spec.containers[1].name".to_owned(), CauseReason::Duplicate),
            ("spec.containers[1].ports[0].containerPort".to_owned(), CauseReason::Invalid)
        ]
    );
}

#[test]
fn a_deployment_selects_its_own_pods() {
    let cluster = Cluster::new(&["10.96.0.0/24"]);
    let deployment = |labels: Value| {
        json!({"metadata": {"name": "d", "namespace": "default"}, "spec": {
            "selector": {"matchLabels": {"app": "a"}},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "x"}]}}}})
    };
    let good = cluster.admit("Deployment", None, deployment(json!({"app": "a"}))).unwrap();
    assert_eq!(good["spec"]["replicas"], 1);
    let bad = cluster.admit("Deployment", None, deployment(json!({"app": "b"})));
    assert_eq!(faults(bad), [("spec.template.metadata.labels".to_owned(), CauseReason::Invalid)]);
    let mut other = good.clone();
    other["spec"]["selector"]["matchLabels"] = json!({"tier": "x"});
    other["spec"]["template"]["metadata"]["labels"] = json!({"tier": "x"});
    assert_eq!(
        faults(cluster.admit("Deployment", Some(&good), other)),
        [("spec.selector".to_owned(), CauseReason::Invalid)]
    );
}

#[test]
fn nodes_may_not_overlap() {
    let mut cluster = Cluster::new(&["10.96.0.0/24"]);
    let node = |node_name: &str, prefix: &str| json!({"kind": "Node", "metadata": {"name": node_name}, "spec": {"podCIDR": prefix}});
    let first = cluster.admit("Node", None, node("a", "10.42.1.0/24")).unwrap();
    assert_eq!(first["spec"]["podCIDRs"], json!(["10.42.1.0/24"]));
    cluster.nodes.insert((String::new(), "a".into()), first);
    let causes = cluster.admit("Node", None, node("b", "10.42.0.0/23")).unwrap_err();
    assert!(causes[0].message.contains("overlaps with 10.42.1.0/24 of Node a"), "{causes:?}");
    assert!(cluster.admit("Node", None, node("b", "10.96.0.0/25")).is_err());
    assert!(cluster.admit("Node", None, node("b", "ten")).is_err());
}

#[test]
fn endpoints_may_not_be_where_no_packet_goes() {
    let cluster = Cluster::new(&["10.96.0.0/24"]);
    let slice = |address: &str, family: &str| json!({"metadata": {"name": "s", "namespace": "default"}, "addressType": family, "endpoints": [{"addresses": [address]}], "ports": [{"port": 80}]});
    assert!(cluster.admit("EndpointSlice", None, slice("10.42.0.2", "IPv4")).is_ok());
    for (address, family) in
        [("127.0.0.1", "IPv4"), ("169.254.1.1", "IPv4"), ("fe80::1", "IPv6"), ("::1", "IPv6"), ("10.0.0.1", "IPv6")]
    {
        let refused = faults(cluster.admit("EndpointSlice", None, slice(address, family)));
        assert_eq!(refused, [("endpoints[0].addresses[0]".to_owned(), CauseReason::Invalid)], "{address}");
    }
}

#[test]
fn other_kinds_and_names() {
    let cluster = Cluster::new(&["10.96.0.0/24"]);
    let named = |object_name: &str| json!({"metadata": {"name": object_name}});
    assert!(cluster.admit("ConfigMap", None, named("a.b")).is_ok());
    assert_eq!(
        faults(cluster.admit("Namespace", None, named("a.b"))),
        [("metadata.name".to_owned(), CauseReason::Invalid)]
    );
    assert_eq!(
        faults(cluster.admit("ConfigMap", None, json!({}))),
        [("metadata.name".to_owned(), CauseReason::Required)]
    );
    for group in ["core", "apps", "discovery.k8s.io"] {
        let definition = json!({"metadata": {"name": format!("pods.{group}")}, "spec": {"group": group, "scope": "Cluster",
            "names": {"plural": "pods", "kind": "Pod"}, "versions": [{"name": "v1", "served": true, "storage": true}]}});
        let refused = faults(cluster.admit("CustomResourceDefinition", None, definition));
        assert_eq!(refused, [("spec.group".to_owned(), CauseReason::Invalid)], "{group}");
    }
    let crd = json!({"metadata": {"name": "widgets.example.org"}, "spec": {"group": "example.com", "scope": "Cluster",
        "names": {"plural": "widgets", "kind": "Widget"}, "versions": [{"name": "v1", "served": true, "storage": true}]}});
    assert_eq!(
        faults(cluster.admit("CustomResourceDefinition", None, crd)),
        [("metadata.name".to_owned(), CauseReason::Invalid)]
    );
    let ingress = json!({"metadata": {"name": "i"}, "spec": {"rules": [{"http": {"paths": [{"path": "/", "backend": {"service": {"name": "s", "port": {"number": 80}}}}]}}]}});
    assert_eq!(
        faults(cluster.admit("Ingress", None, ingress)),
        [("spec.rules[0].http.paths[0].pathType".to_owned(), CauseReason::Required)]
    );
    let policy = json!({"metadata": {"name": "n"}, "spec": {"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/24"]}}]}]}});
    assert_eq!(
        faults(cluster.admit("NetworkPolicy", None, policy)),
        [("spec.egress[0].to[0].ipBlock.except[0]".to_owned(), CauseReason::Invalid)]
    );
}

/// JSON with the field names that matter here.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "(None|IPv4|NodePort|25%|10.0.0.1|fe80::1|a|\\PC{0,3})".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        let field = "(name|port|ports|protocol|type|ip|addresses|selector|matchLabels|matchExpressions|key|operator|values|spec|template|replicas|http|paths|from|to|ipBlock|cidr|conditions|containers|\\$patch|\\$retainKeys)";
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(field, inner, 0..5).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever is asked for and deleted in between, no address and no node port is given twice.
    #[test]
    fn nothing_is_given_twice(steps in proptest::collection::vec((0..40u8, any::<bool>(), proptest::option::of(0..24u8), any::<bool>()), 1..80)) {
        let mut cluster = Cluster::new(&["10.96.0.0/28", "fd96::/124"]);
        cluster.ports = 30000..=30015;
        for (index, is_deleted, asked, is_dual) in steps {
            let service_name = format!("s{index}");
            if is_deleted {
                cluster.services.remove(&("default".into(), service_name));
                continue;
            }
            if cluster.services.contains_key(&("default".into(), service_name.clone())) {
                continue;
            }
            let mut spec = json!({"ports": one_port(), "type": "NodePort"});
            if is_dual {
                spec["ipFamilyPolicy"] = json!("PreferDualStack");
            }
            if let Some(asked) = asked {
                spec["clusterIP"] = json!(format!("10.96.0.{asked}"));
                spec["ports"][0]["nodePort"] = json!(30000 + u16::from(asked));
            }
            let _ = cluster.service(&service_name, spec);
            let addresses: Vec<_> = cluster.services.values().flat_map(allocate::service_addresses).collect();
            prop_assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), addresses.len());
            let ports: Vec<_> = cluster.services.values().map(|it| it["spec"]["ports"][0]["nodePort"].as_u64()).collect();
            prop_assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), ports.len());
        }
    }

    /// Whatever a client sends: an answer, no panic; the same for those who look at the object later.
    #[test]
    fn no_object_makes_anything_panic(body in any_json(), spec in any_json(), ports in any_json(), status in any_json()) {
        let cluster = Cluster::new(&["10.96.0.0/24", "fd96::/112"]);
        let mut full = json!({"spec": spec, "status": status, "metadata": {"name": "a", "namespace": "default", "uid": "u", "labels": body}});
        let mut listed = full.clone();
        listed["spec"] = json!({"ports": ports, "containers": ports, "rules": ports, "ingress": ports, "podCIDRs": ports,
            "versions": ports, "selector": spec, "template": {"spec": {"containers": spec}, "metadata": {"labels": spec}}});
        for key in ["endpoints", "ports", "subsets", "rules"] {
            full[key] = ports.clone();
        }
        for kind in ["Service", "Pod", "ReplicaSet", "Deployment", "Endpoints", "EndpointSlice", "Ingress", "NetworkPolicy", "Namespace", "Node", "CustomResourceDefinition", "Event", "Lease", "Widget"] {
            let mut mirror = crate::controllers::Mirror::new([kind, "Pod"]);
            for object in [&body, &full, &listed] {
                let mut object = object.clone();
                let _ = cluster.admit(kind, None, object.clone());
                let _ = cluster.admit(kind, Some(&full), object.clone());
                let _ = crate::table::render(kind, std::slice::from_ref(&object), 0);
                let _ = crate::patch::server_side_apply(kind, Some(&full), &object, "m", true, "");
                let _ = crate::patch::strategic_merge(kind, &mut full.clone(), &object);
                crate::patch::record_update(kind, Some(&full), &mut object.clone(), "m", "");
                if object.is_object() {
                    object["kind"] = json!(kind);
                    mirror.upsert(object);
                }
            }
            let _ = crate::controllers::Controllers::default().reconcile(&mirror, 0);
        }
    }

    #[test]
    fn no_two_nodes_get_one_prefix(count in 1..20usize, length in 20..26u8) {
        let cluster: Vec<IpNet> = vec!["10.42.0.0/16".parse().unwrap(), "fd42::/48".parse().unwrap()];
        let lengths = NodePrefixLengths { ipv4: length, ipv6: 64 };
        let mut nodes = Objects::new();
        nodes.insert((String::new(), "by-hand".into()), json!({"spec": {"podCIDRs": ["10.42.0.128/25"]}}));
        for index in 0..count {
            if let Ok(prefixes) = node_prefixes(&nodes, &cluster, lengths) {
                nodes.insert((String::new(), format!("n{index}")), json!({"spec": {"podCIDRs": prefixes}}));
            }
        }
        let all: Vec<IpNet> = nodes.values().flat_map(allocate::pod_prefixes).collect();
        for (index, one) in all.iter().enumerate() {
            prop_assert!(all[index + 1..].iter().all(|other| !allocate::overlaps(one, other)), "{:?}", all);
        }
    }
}
