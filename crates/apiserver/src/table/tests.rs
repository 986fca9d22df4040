//! Tables, as kubectl would print them.

use serde_json::{Value, json};

use super::*;

const NOW: i64 = 1_704_067_384;
const BORN: &str = "2024-01-01T00:00:00Z";

/// The cells of the only row by column.
fn row(kind: &str, object: &Value) -> Vec<(String, String)> {
    let table = render(kind, std::slice::from_ref(object), NOW);
    let names = table["columnDefinitions"].as_array().unwrap();
    let cells = table["rows"][0]["cells"].as_array().unwrap();
    assert_eq!(names.len(), cells.len(), "{kind}");
    let show = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    names.iter().zip(cells).map(|(name, cell)| (show(&name["name"]), show(cell))).collect()
}

fn cells(kind: &str, object: &Value) -> Vec<String> {
    row(kind, object).into_iter().map(|(_, cell)| cell).collect()
}

#[test]
fn ages_are_kubectls() {
    let cases = [
        (-5, "<invalid>"),
        (0, "0s"),
        (119, "119s"),
        (184, "3m4s"),
        (180, "3m"),
        (660, "11m"),
        (10_860, "3h1m"),
        (90_000, "25h"),
        (180_000, "2d2h"),
        (700_000, "8d"),
        (63_072_000 + 86_400, "2y1d"),
        (400_000_000, "12y"),
    ];
    for (seconds, expected) in cases {
        assert_eq!(human_duration(seconds), expected);
    }
}

#[test]
fn a_pod_says_what_its_containers_do() {
    let mut pod = json!({
        "metadata": {"name": "p", "creationTimestamp": BORN},
        "spec": {"nodeName": "node-1", "containers": [{"name": "a"}, {"name": "b"}]},
        "status": {"phase": "Running", "podIP": "10.42.1.2", "containerStatuses": [
            {"ready": true, "restartCount": 0, "state": {"running": {}}},
            {"ready": false, "restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]},
    });
    assert_eq!(
        cells("Pod", &pod),
        ["p", "1/2", "CrashLoopBackOff", "2", "3m4s", "10.42.1.2", "node-1", "<none>", "<none>"]
    );
    pod["metadata"]["deletionTimestamp"] = json!(BORN);
    assert_eq!(cells("Pod", &pod)[2], "Terminating");
    let table = render("Pod", &[pod], NOW);
    assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    assert_eq!(
        table["columnDefinitions"][5],
        json!({"name": "IP", "type": "string", "format": "", "description": "", "priority": 1})
    );
}

#[test]
fn the_other_kinds() {
    let service = json!({"metadata": {"name": "s", "creationTimestamp": BORN}, "spec": {"type": "NodePort", "clusterIP": "10.96.0.2",
        "selector": {"b": "2", "a": "1"}, "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}});
    assert_eq!(
        cells("Service", &service),
        ["s", "NodePort", "10.96.0.2", "<none>", "80:30080/TCP,53/UDP", "3m4s", "a=1,b=2"]
    );
    let node = json!({"metadata": {"name": "n", "creationTimestamp": BORN, "labels": {"node-role.kubernetes.io/worker": ""}},
        "spec": {"unschedulable": true}, "status": {"conditions": [{"type": "Ready", "status": "True"}],
        "addresses": [{"type": "InternalIP", "address": "192.168.64.11"}], "nodeInfo": {"kubeletVersion": "v1"}}});
    assert_eq!(cells("Node", &node)[..6], ["n", "Ready,SchedulingDisabled", "worker", "3m4s", "v1", "192.168.64.11"]);
    let deployment = json!({"metadata": {"name": "d", "creationTimestamp": BORN}, "spec": {"replicas": 3,
        "selector": {"matchLabels": {"app": "d"}}, "template": {"spec": {"containers": [{"name": "c", "image": "x:1"}]}}},
        "status": {"readyReplicas": 2, "updatedReplicas": 3, "availableReplicas": 2}});
    assert_eq!(cells("Deployment", &deployment), ["d", "2/3", "3", "2", "3m4s", "c", "x:1", "app=d"]);
    let slice = json!({"metadata": {"name": "e", "creationTimestamp": BORN}, "addressType": "IPv4", "ports": [{"port": 80}],
        "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.3"]}, {"addresses": ["10.0.0.4"]}]});
    assert_eq!(cells("EndpointSlice", &slice)[3], "10.0.0.1,10.0.0.2,10.0.0.3 + 1 more...");
    let endpoints =
        json!({"metadata": {"name": "e"}, "subsets": [{"addresses": [{"ip": "fd00::1"}], "ports": [{"port": 80}]}]});
    assert_eq!(cells("Endpoints", &endpoints), ["e", "[fd00::1]:80", "<unknown>"]);
    let kinds = [
        "Namespace",
        "ReplicaSet",
        "ConfigMap",
        "Secret",
        "ServiceAccount",
        "Ingress",
        "IngressClass",
        "NetworkPolicy",
        "CustomResourceDefinition",
        "Lease",
        "Event",
        "Widget",
    ];
    for kind in kinds {
        assert!(!row(kind, &json!({"metadata": {"name": "x"}})).is_empty(), "an almost empty {kind} has a row");
    }
}

#[test]
fn custom_objects_have_the_columns_of_their_definition() {
    let columns = [
        json!({"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Ready\")].status"}),
        json!({"name": "Size", "type": "integer", "jsonPath": ".spec.sizes[1]", "priority": 1}),
        json!({"name": "Zone", "type": "string", "jsonPath": ".metadata.labels['a.b/zone']"}),
        json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}),
        json!({"name": "Gone", "type": "string", "jsonPath": ".spec.gone"}),
    ];
    let object = json!({"metadata": {"name": "w", "creationTimestamp": BORN, "labels": {"a.b/zone": "z"}},
        "spec": {"sizes": [1, 2]}, "status": {"conditions": [{"type": "Other", "status": "x"}, {"type": "Ready", "status": "True"}]}});
    let table = render_custom(&columns, std::slice::from_ref(&object), NOW);
    assert_eq!(table["rows"][0]["cells"], json!(["w", "True", 2, "z", "3m4s", null]));
    assert_eq!(render_custom(&[], &[object], NOW)["rows"][0]["cells"], json!(["w", "3m4s"]));
}

proptest::proptest! {
    #[test]
    fn no_path_makes_a_column_panic(text in "[.a\\\\\\[\\]?(@='\"0*)]{0,20}") {
        let _ = path::find(&json!({"a": [{"a": 1}]}), &text);
    }
}
