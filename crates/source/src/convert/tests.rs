//! Every case of a bad object, as a table, and that no JSON whatever makes a conversion fail.

use portolan_net::{Family, MacAddress, Vni};
use portolan_state::{Node, Pod, Service, ServiceType};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn convert<T: Table>(object: &Value) -> Converted<T> {
    serde_json::from_str(&object.to_string()).unwrap()
}

/// The fields that were noted, in their order.
fn fields<T>(converted: &Converted<T>) -> Vec<&str> {
    converted.problems.iter().map(|problem| &*problem.field).collect()
}

fn service(spec: &Value) -> Converted<Services> {
    convert(&json!({"metadata": {"namespace": "shop", "name": "cart"}, "spec": spec}))
}

fn kept_service(converted: &Converted<Services>) -> &Service {
    match &converted.outcome {
        Outcome::Keep(Object::Service(service)) => service,
        other => panic!("{other:?}"),
    }
}

fn slice(object: &Value) -> Converted<EndpointSlices> {
    let mut whole = json!({
        "metadata": {"namespace": "shop", "name": "cart-x", "labels": {"kubernetes.io/service-name": "cart"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [],
    });
    for (key, value) in object.as_object().unwrap() {
        whole[key] = value.clone();
    }
    convert(&whole)
}

fn kept_slice(converted: &Converted<EndpointSlices>) -> &portolan_state::EndpointSlice {
    match &converted.outcome {
        Outcome::Keep(Object::EndpointSlice(slice)) => slice,
        other => panic!("{other:?}"),
    }
}

fn node(annotations: &Value, spec: &Value, status: &Value) -> (Node, Vec<Problem>) {
    let object = json!({
        "metadata": {"name": "n1", "annotations": annotations, "labels": {"topology.kubernetes.io/zone": "z1"}},
        "spec": spec,
        "status": status,
    });
    let converted = convert::<Nodes>(&object);
    match converted.outcome {
        Outcome::Keep(Object::Node(node)) => (node, converted.problems),
        other => panic!("{other:?}"),
    }
}

fn pod(object: &Value) -> Pod {
    match convert::<Pods>(object).outcome {
        Outcome::Keep(Object::Pod(pod)) => pod,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_slice_says_when_its_endpoints_changed() {
    let trigger = |text: &str| {
        let labels = json!({"kubernetes.io/service-name": "cart"});
        let annotations = json!({"endpoints.kubernetes.io/last-change-trigger-time": text});
        let metadata = json!({"namespace": "shop", "name": "cart-x", "labels": labels, "annotations": annotations});
        slice(&json!({"metadata": metadata})).trigger
    };
    let at = |seconds, nanoseconds| Some(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds));
    assert_eq!(trigger("2026-11-20T14:40:22Z"), at(1_795_185_622, 0));
    assert_eq!(trigger("2026-11-20T15:40:22.5+01:00"), at(1_795_185_622, 500_000_000));
    assert_eq!([trigger("yesterday"), trigger(""), trigger("1969-12-31T23:59:59Z")], [None; 3]);
    assert_eq!(slice(&json!({})).trigger, None);
}

#[test]
fn a_service_is_converted_whole() {
    let converted = service(&json!({
        "type": "NodePort",
        "clusterIP": "10.96.0.1",
        "clusterIPs": ["10.96.0.1", "fd00:96::1"],
        "publishNotReadyAddresses": true,
        "ports": [
            {"name": "http", "port": 80, "targetPort": "web", "nodePort": 30080},
            {"name": "dns", "protocol": "UDP", "port": 53},
        ],
    }));
    assert_eq!(fields(&converted), [""; 0]);
    let service = kept_service(&converted);
    assert_eq!(service.key, ObjectKey::new("shop", "cart"));
    assert_eq!(service.service_type, ServiceType::NodePort);
    assert_eq!(service.cluster_addresses, ["10.96.0.1".parse::<IpAddr>().unwrap(), "fd00:96::1".parse().unwrap()]);
    assert!(service.publish_not_ready && !service.headless);
    let ports: Vec<_> = service.ports.iter().map(|it| (&*it.name, it.protocol, it.port.get())).collect();
    assert_eq!(ports, [("http", Protocol::Tcp, 80), ("dns", Protocol::Udp, 53)]);
    assert_eq!(service.ports[0].node_port.map(portolan_net::Port::get), Some(30080));
    assert_eq!(service.ports[1].node_port, None);
}

#[test]
fn a_bad_part_of_a_service_is_left_out_and_named() {
    let good_port = json!({"name": "http", "port": 80});
    // What is written, which fields are noted, how many addresses and ports are left.
    let cases = [
        (json!({"clusterIPs": ["10.96.0.1", "10.96.0.999"], "ports": [good_port]}), "spec.clusterIPs[1]", 1, 1),
        (json!({"clusterIPs": ["10.96.0.1", "10.96.0.2"], "ports": [good_port]}), "spec.clusterIPs[1]", 1, 1),
        (json!({"clusterIPs": ["fd00::1", "::1"], "ports": [good_port]}), "spec.clusterIPs[1]", 1, 1),
        (json!({"clusterIPs": ["10.96.0.1", 7], "ports": [good_port]}), "spec.clusterIPs[1]", 1, 1),
        (json!({"clusterIP": "10.96.0.1", "ports": [good_port, {"name": "b", "port": 0}]}), "spec.ports[b].port", 1, 1),
        (
            json!({"clusterIP": "10.96.0.1", "ports": [good_port, {"name": "b", "port": 65536}]}),
            "spec.ports[b].port",
            1,
            1,
        ),
        (json!({"clusterIP": "10.96.0.1", "ports": [good_port, {"name": "b"}]}), "spec.ports[b].port", 1, 1),
        (
            json!({"clusterIP": "10.96.0.1", "ports": [good_port, {"name": "b", "port": "81"}]}),
            "spec.ports[b].port",
            1,
            1,
        ),
        (json!({"clusterIP": "10.96.0.1", "ports": [good_port, "http"]}), "spec.ports[1].port", 1, 1),
        (
            json!({"clusterIP": "10.96.0.1", "ports": [good_port, {"name": "b", "port": 81, "protocol": "ICMP"}]}),
            "spec.ports[b].protocol",
            1,
            1,
        ),
        (
            json!({"clusterIP": "10.96.0.1", "ports": [good_port, {"name": "b", "port": 80}]}),
            "spec.ports[b].port",
            1,
            1,
        ),
        (
            json!({"clusterIP": "10.96.0.1", "ports": [good_port, {"name": "http", "port": 81}]}),
            "spec.ports[1].name",
            1,
            1,
        ),
        (
            json!({"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80, "nodePort": 70000}]}),
            "spec.ports[http].nodePort",
            1,
            1,
        ),
    ];
    for (spec, field, addresses, ports) in cases {
        let converted = service(&spec);
        assert_eq!(fields(&converted), [field], "{spec}");
        let service = kept_service(&converted);
        assert_eq!((service.cluster_addresses.len(), service.ports.len()), (addresses, ports), "{spec}");
        let problem = &converted.problems[0];
        assert!(!problem.reason.is_empty() && !problem.hint.is_empty());
        assert_eq!(problem.object.to_string(), "Service shop/cart");
    }
}

#[test]
fn a_service_is_rejected_when_nothing_of_it_can_be_used() {
    let cases = [
        (json!({"clusterIP": "nonsense", "ports": [{"port": 80}]}), "spec.clusterIP"),
        (json!({"clusterIP": "169.254.1.1", "ports": [{"port": 80}]}), "spec.clusterIP"),
        (json!({"clusterIP": "10.96.0.1", "ports": [{"port": 0}]}), "spec.ports[0].port"),
        (json!({"type": "Teleport", "clusterIP": "10.96.0.1", "ports": [{"port": 80}]}), "spec.type"),
        (json!({"type": 7, "clusterIP": "10.96.0.1", "ports": [{"port": 80}]}), "spec.type"),
        (json!({"type": "ExternalName"}), "spec.externalName"),
    ];
    for (spec, field) in cases {
        let converted = service(&spec);
        assert_eq!(converted.outcome, Outcome::Reject, "{spec}");
        assert_eq!(fields(&converted)[0], field, "{spec}");
    }
}

#[test]
fn special_services_are_no_problem() {
    // Headless, a name only, not given an address yet, without a spec.
    let headless = service(&json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"port": 80}]}));
    assert!(kept_service(&headless).headless && kept_service(&headless).cluster_addresses.is_empty());
    let named = service(&json!({"type": "ExternalName", "externalName": "example.org"}));
    assert_eq!(kept_service(&named).service_type, ServiceType::ExternalName("example.org".into()));
    let young = service(&json!({"ports": [{"port": 80, "nodePort": 0}]}));
    assert!(kept_service(&young).cluster_addresses.is_empty() && !kept_service(&young).headless);
    for converted in [headless, named, young, service(&Value::Null)] {
        assert_eq!(fields(&converted), [""; 0]);
    }
}

#[test]
fn a_service_of_another_proxy_is_marked() {
    let labels = json!({"service.kubernetes.io/service-proxy-name": "mesh"});
    let object =
        json!({"metadata": {"name": "a", "namespace": "b", "labels": labels}, "spec": {"clusterIP": "10.96.0.1"}});
    assert!(matches!(convert::<Services>(&object).outcome, Outcome::OtherProxy(_)));
}

#[test]
fn a_slice_is_converted_whole() {
    let converted = slice(&json!({
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "all"}],
        "endpoints": [
            {"addresses": ["10.42.1.2", "10.42.1.3"], "nodeName": "n1", "targetRef": {"kind": "Pod", "name": "cart-1"}},
            {"addresses": ["10.42.1.4"], "conditions": {"ready": false, "serving": true, "terminating": true}, "hostname": "h"},
            {"addresses": ["10.42.1.5"], "conditions": {"ready": false}, "targetRef": {"kind": "VM", "name": "v"}},
        ],
    }));
    assert_eq!(fields(&converted), [""; 0]);
    let slice = kept_slice(&converted);
    assert_eq!((slice.service.to_string().as_str(), slice.family), ("shop/cart", Family::V4));
    assert_eq!(slice.ports.len(), 1);
    let [first, second, third] = &*slice.endpoints else { panic!("{slice:?}") };
    assert_eq!(first.address.to_string(), "10.42.1.2");
    assert!(first.ready && first.serving && !first.terminating);
    assert_eq!(first.node, Some("n1".into()));
    assert!(!second.ready && second.serving && second.terminating);
    assert_eq!(second.hostname.as_deref(), Some("h"));
    assert!(!third.ready && !third.serving);
}

#[test]
fn a_bad_part_of_a_slice_is_left_out_and_named() {
    let good = json!({"addresses": ["10.42.1.2"]});
    let at = "endpoints[1].addresses[0]";
    let bad = [
        "127.0.0.1",
        "169.254.1.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "fd00::2",
        "::1",
        "fe80::1",
        "::",
        "ff02::1",
        "::ffff:10.0.0.1",
        "10.42.1.2/24",
        "example.org",
        "",
    ];
    for address in bad {
        let converted = slice(&json!({"endpoints": [good, {"addresses": [address]}]}));
        assert_eq!(fields(&converted), [at], "{address}");
        assert_eq!(kept_slice(&converted).endpoints.len(), 1, "{address}");
    }
    for endpoint in [json!({}), json!({"addresses": []}), json!({"addresses": [7]}), json!("10.42.1.3"), json!(null)] {
        let converted = slice(&json!({"endpoints": [good, endpoint]}));
        assert_eq!(fields(&converted), [at], "{endpoint}");
        assert_eq!(kept_slice(&converted).endpoints.len(), 1, "{endpoint}");
    }
    for (port, field) in [
        (json!({"name": "b", "port": 0}), "ports[b].port"),
        (json!({"name": "b", "port": -1}), "ports[b].port"),
        (json!({"port": 80, "protocol": "tcp"}), "ports[1].protocol"),
    ] {
        let converted = slice(&json!({"ports": [{"port": 80}, port], "endpoints": [good]}));
        assert_eq!(fields(&converted), [field], "{port}");
        assert_eq!(kept_slice(&converted).ports.len(), 1, "{port}");
    }
}

#[test]
fn an_ipv6_slice_holds_ipv6_endpoints() {
    let converted =
        slice(&json!({"addressType": "IPv6", "endpoints": [{"addresses": ["fd00::2"]}, {"addresses": ["10.0.0.1"]}]}));
    assert_eq!(kept_slice(&converted).endpoints.len(), 1);
    assert_eq!(fields(&converted), ["endpoints[1].addresses[0]"]);
}

#[test]
fn a_slice_that_says_too_little_is_rejected_or_skipped() {
    let converted = slice(&json!({"metadata": {"namespace": "shop", "name": "cart-x"}}));
    assert_eq!(converted.outcome, Outcome::Reject);
    assert_eq!(fields(&converted), ["metadata.labels[kubernetes.io/service-name]"]);
    let converted = slice(&json!({"addressType": "IPv5"}));
    assert_eq!((&converted.outcome, &*fields(&converted)), (&Outcome::Reject, &["addressType"][..]));
    let converted = slice(&json!({"addressType": "FQDN", "endpoints": [{"addresses": ["example.org"]}]}));
    assert_eq!((&converted.outcome, converted.problems.len()), (&Outcome::Skip, 0));
}

#[test]
fn headless_slices_are_kept_for_names() {
    let labels = json!({"kubernetes.io/service-name": "cart", "service.kubernetes.io/headless": ""});
    let converted = slice(&json!({"metadata": {"namespace": "shop", "name": "cart-x", "labels": labels}}));
    assert_eq!(kept_slice(&converted).service, ObjectKey::new("shop", "cart"));
}

#[test]
fn the_problems_of_one_object_are_bounded() {
    let endpoints = vec![json!({"addresses": ["127.0.0.1"]}); 1000];
    let converted = slice(&json!({"endpoints": endpoints}));
    assert_eq!(converted.problems.len(), PROBLEMS_PER_OBJECT_MAX + 1);
    assert!(converted.problems.last().unwrap().reason.starts_with("980 more"));
}

#[test]
fn a_node_is_converted_whole() {
    let annotations = json!({
        "flannel.alpha.coreos.com/backend-type": "vxlan",
        "flannel.alpha.coreos.com/backend-data": "{\"VNI\":1,\"VtepMAC\":\"ae:11:22:33:44:55\"}",
        "flannel.alpha.coreos.com/backend-v6-data": "{\"VNI\":1,\"VtepMAC\":\"ae:11:22:33:44:66\"}",
        "flannel.alpha.coreos.com/public-ip": "192.168.64.11",
        "flannel.alpha.coreos.com/public-ip-overwrite": "203.0.113.1",
        "flannel.alpha.coreos.com/public-ipv6": "fd00:64::11",
    });
    let status = json!({"addresses": [
        {"type": "Hostname", "address": "n1"},
        {"type": "InternalIP", "address": "192.168.64.11"},
        {"type": "InternalIP", "address": "fd00:64::11"},
    ]});
    let (node, problems) = node(&annotations, &json!({"podCIDRs": ["10.42.1.7/24", "fd00:42:1::/64"]}), &status);
    assert_eq!(problems, []);
    assert_eq!(node.addresses.len(), 2);
    assert_eq!(
        node.pod_prefixes.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.42.1.0/24", "fd00:42:1::/64"]
    );
    assert_eq!(node.zone.as_deref(), Some("z1"));
    let tunnel = node.tunnel.unwrap();
    assert_eq!(&*tunnel.backend, "vxlan");
    assert_eq!(tunnel.vni, Vni::new(1));
    assert_eq!(tunnel.vtep_mac_v4, "ae:11:22:33:44:55".parse::<MacAddress>().ok());
    assert_eq!(tunnel.vtep_mac_v6, "ae:11:22:33:44:66".parse::<MacAddress>().ok());
    assert_eq!(tunnel.public_addresses[0].to_string(), "203.0.113.1");
    assert_eq!(tunnel.public_addresses[1].to_string(), "fd00:64::11");
}

#[test]
fn a_node_without_a_prefix_is_no_problem() {
    for spec in [json!({}), json!({"podCIDR": ""}), json!({"podCIDRs": null}), Value::Null] {
        let (node, problems) = node(&json!({}), &spec, &Value::Null);
        assert_eq!((node.pod_prefixes.len(), problems.len(), node.tunnel), (0, 0, None), "{spec}");
    }
}

#[test]
fn a_bad_part_of_a_node_is_left_out_and_named() {
    let data = "metadata.annotations[flannel.alpha.coreos.com/backend-data]";
    let tunnel = |value: &str| json!({"flannel.alpha.coreos.com/backend-type": "vxlan", "flannel.alpha.coreos.com/backend-data": value});
    let cases = [
        (tunnel("{"), data.to_owned()),
        (tunnel("{\"VNI\":16777216,\"VtepMAC\":\"ae:11:22:33:44:55\"}"), format!("{data}.VNI")),
        (tunnel("{\"VNI\":\"one\"}"), format!("{data}.VNI")),
        (tunnel("{\"VNI\":1,\"VtepMAC\":\"ae:11\"}"), format!("{data}.VtepMAC")),
        (tunnel("{\"VNI\":1,\"VtepMAC\":\"ff:ff:ff:ff:ff:ff\"}"), format!("{data}.VtepMAC")),
        (
            json!({"flannel.alpha.coreos.com/backend-type": "vxlan", "flannel.alpha.coreos.com/public-ip": "fd00::1"}),
            "metadata.annotations[flannel.alpha.coreos.com/public-ip]".to_owned(),
        ),
    ];
    for (annotations, field) in cases {
        let (node, problems) = node(&annotations, &json!({}), &json!({}));
        assert_eq!(problems.iter().map(|it| it.field.to_string()).collect::<Vec<_>>(), [field], "{annotations}");
        assert!(node.tunnel.is_some());
    }
    for (spec, field) in [
        (json!({"podCIDR": "10.42.0.0"}), "spec.podCIDR"),
        (json!({"podCIDRs": ["10.42.0.0/24", "10.43.0.0/24"]}), "spec.podCIDRs[1]"),
        (json!({"podCIDRs": ["10.42.0.0/33"]}), "spec.podCIDRs[0]"),
    ] {
        let (_, problems) = node(&json!({}), &spec, &json!({}));
        assert_eq!(problems.len(), 1, "{spec}");
        assert_eq!(&*problems[0].field, field);
    }
    let (node, problems) =
        node(&json!({}), &json!({}), &json!({"addresses": [{"type": "InternalIP", "address": "::1"}]}));
    assert_eq!((node.addresses.len(), &*problems[0].field), (0, "status.addresses[0].address"));
}

#[test]
fn a_backend_without_data_is_no_problem() {
    for data in ["null", "", "{}"] {
        let annotations = json!({
            "flannel.alpha.coreos.com/backend-type": "host-gw",
            "flannel.alpha.coreos.com/backend-data": data,
        });
        let (node, problems) = node(&annotations, &json!({}), &json!({}));
        assert_eq!(problems, []);
        let tunnel = node.tunnel.unwrap();
        assert_eq!((tunnel.vni, tunnel.vtep_mac_v4), (None, None));
    }
}

#[test]
fn a_pod_that_has_ended_holds_no_address() {
    let object = |phase: &str| {
        json!({
            "metadata": {"namespace": "shop", "name": "cart-1"},
            "spec": {"nodeName": "n1", "hostNetwork": true},
            "status": {"phase": phase, "podIP": "10.42.1.2", "podIPs": [{"ip": "10.42.1.2"}, {"ip": "fd00::2"}]},
        })
    };
    let running = pod(&object("Running"));
    assert_eq!((running.addresses.len(), running.host_network, running.node), (2, true, Some("n1".into())));
    assert_eq!(pod(&object("Succeeded")).addresses.len(), 0);
    assert_eq!(pod(&object("Failed")).addresses.len(), 0);
    assert_eq!(pod(&json!({"metadata": {"name": "p"}, "status": {"podIP": "10.42.1.2"}})).addresses.len(), 1);
}

/// Keys that conversions look at, so that arbitrary documents reach deep into them.
const KEYS: &[&str] = &[
    "metadata",
    "spec",
    "status",
    "name",
    "namespace",
    "labels",
    "annotations",
    "resourceVersion",
    "type",
    "clusterIP",
    "clusterIPs",
    "ports",
    "port",
    "nodePort",
    "protocol",
    "addressType",
    "endpoints",
    "addresses",
    "conditions",
    "ready",
    "nodeName",
    "targetRef",
    "podCIDR",
    "podCIDRs",
    "address",
    "podIPs",
    "ip",
    "phase",
    "kubernetes.io/service-name",
    "flannel.alpha.coreos.com/backend-type",
    "flannel.alpha.coreos.com/backend-data",
    "flannel.alpha.coreos.com/public-ip",
];

const TEXTS: &[&str] = &[
    "",
    "a",
    "None",
    "IPv4",
    "IPv6",
    "FQDN",
    "10.0.0.1",
    "fd00::1",
    "::1",
    "10.0.0.0/8",
    "TCP",
    "InternalIP",
    "NodePort",
    "ExternalName",
    "{\"VNI\":1}",
    "{",
    "[[[[",
    "null",
    "ae:11:22:33:44:55",
    "é\u{0}\u{1f600}",
];

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0i64..70_000).prop_map(Value::from),
        any::<f32>().prop_map(|it| json!(it)),
        prop::sample::select(TEXTS).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 64, 6, |inner| {
        let key = prop_oneof![prop::sample::select(KEYS).prop_map(str::to_owned), any::<String>()];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..6).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Under every key that is looked at, something arbitrary.
fn any_object() -> impl Strategy<Value = Value> {
    (any_json(), any_json(), any_json(), any_json(), any_json(), prop::sample::select(TEXTS)).prop_map(
        |(spec, status, endpoints, ports, annotations, address_type)| {
            json!({
                "metadata": {"name": "n", "namespace": "s", "annotations": annotations,
                             "labels": {"kubernetes.io/service-name": "s"}},
                "spec": spec, "status": status, "endpoints": endpoints, "ports": ports, "addressType": address_type,
            })
        },
    )
}

fn convert_as_every_kind(object: &Value) -> Result<(), TestCaseError> {
    let text = object.to_string();
    prop_assert!(serde_json::from_str::<Converted<Namespaces>>(&text).is_ok());
    prop_assert!(serde_json::from_str::<Converted<Nodes>>(&text).is_ok());
    prop_assert!(serde_json::from_str::<Converted<Services>>(&text).is_ok());
    prop_assert!(serde_json::from_str::<Converted<EndpointSlices>>(&text).is_ok());
    prop_assert!(serde_json::from_str::<Converted<Pods>>(&text).is_ok());
    Ok(())
}

/// A rejected object has a reason; a list of problems is bounded.
fn is_well_formed<T>(converted: &Converted<T>) -> bool {
    converted.problems.len() <= PROBLEMS_PER_OBJECT_MAX + 1
        && (converted.outcome != Outcome::Reject || !converted.problems.is_empty())
}

proptest! {
    #[test]
    fn no_json_makes_a_conversion_fail(object in any_json()) {
        convert_as_every_kind(&object)?;
    }

    #[test]
    fn no_object_makes_a_conversion_fail(object in any_object()) {
        convert_as_every_kind(&object)?;
        prop_assert!(is_well_formed(&convert::<Services>(&object)));
        prop_assert!(is_well_formed(&convert::<EndpointSlices>(&object)));
        prop_assert!(is_well_formed(&convert::<Nodes>(&object)));
    }
}
