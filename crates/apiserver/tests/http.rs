//! The API as HTTP clients see it, over the Unix socket: what kube-apiserver promises, as far as this
//! server does.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod common;

use common::{CONFIG_MAPS, PATIENCE, Rig, config_map, revision, rig, rig_with};
use http::{Method, Request, header};
use http_body_util::Full;
use portolan_apiserver::{Config, Error, start};
use serde_json::{Value, json};

#[tokio::test]
async fn discovery_names_every_kind() {
    let rig = rig().await;
    assert_eq!(rig.get("/healthz").await, (200, Value::String("ok".into())));
    assert_eq!(rig.get("/version").await.1["major"], "1");
    assert_eq!(rig.get("/api").await.1["versions"], json!(["v1"]));
    let (_, core) = rig.get("/api/v1").await;
    let named = |name: &str| core["resources"].as_array().unwrap().iter().find(|it| it["name"] == name).cloned();
    let services = named("services").unwrap();
    assert_eq!(services["shortNames"], json!(["svc"]));
    assert_eq!(services["categories"], json!(["all"]));
    assert_eq!(services["namespaced"], true);
    assert!(named("pods/status").is_some());
    let (_, groups) = rig.get("/apis").await;
    let groups: Vec<&str> =
        groups["groups"].as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    let expected = ["apiextensions.k8s.io", "apps", "coordination.k8s.io", "discovery.k8s.io", "networking.k8s.io"];
    assert_eq!(groups, expected);
    let (_, apps) = rig.get("/apis/apps/v1").await;
    assert!(apps["resources"].as_array().unwrap().iter().any(|it| it["name"] == "deployments/scale"));
    for path in
        ["/apis/none", "/apis/apps/v9", "/api/v1/nothings", "/elsewhere", "/api/v1/namespaces/default/pods/a/b/c"]
    {
        let (code, status) = rig.get(path).await;
        assert_eq!((code, status["kind"].as_str(), status["reason"].as_str()), (404, Some("Status"), Some("NotFound")));
    }
}

#[tokio::test]
async fn an_object_lives_its_life() {
    let rig = rig().await;
    let (code, created) = rig.post(CONFIG_MAPS, config_map("one", "a")).await;
    assert_eq!(code, 201);
    assert_eq!(created["metadata"]["namespace"], "default");
    assert_eq!(created["metadata"]["uid"].as_str().unwrap().len(), 36);
    assert!(created["metadata"]["creationTimestamp"].as_str().unwrap().ends_with('Z'));
    let path = format!("{CONFIG_MAPS}/one");
    assert_eq!(rig.get(&path).await, (200, created.clone()));
    let (code, status) = rig.post(CONFIG_MAPS, config_map("one", "b")).await;
    assert_eq!((code, status["reason"].as_str()), (409, Some("AlreadyExists")));
    assert_eq!(status["message"], "configmaps \"one\" already exists");
    assert_eq!(status["details"], json!({"name": "one", "kind": "configmaps"}));

    let mut changed = created.clone();
    changed["data"]["key"] = "b".into();
    changed["metadata"]["creationTimestamp"] = "2000-01-01T00:00:00Z".into();
    let (code, updated) = rig.put(&path, changed.clone()).await;
    assert_eq!(code, 200);
    assert_eq!(updated["metadata"]["creationTimestamp"], created["metadata"]["creationTimestamp"]);
    assert_ne!(revision(&updated), revision(&created));
    let (code, status) = rig.put(&path, changed).await;
    assert_eq!((code, status["reason"].as_str()), (409, Some("Conflict")));
    let (_, same) = rig.put(&path, updated.clone()).await;
    assert_eq!(revision(&same), revision(&updated), "a write that changes nothing is none");

    let (code, status) = rig.delete(&path, None).await;
    assert_eq!((code, status["status"].as_str()), (200, Some("Success")));
    assert_eq!(rig.get(&path).await.0, 404);
    assert_eq!(rig.delete(&path, None).await.0, 404);
}

#[tokio::test]
async fn what_is_wrong_is_said_in_kubernetes_words() {
    let rig = rig().await;
    let check = async |method: Method, path: &str, content: &str, body: Value, code: u16, reason: &str| {
        let (found, status) = rig.call(method, path, content, Some(body)).await;
        assert_eq!((found, status["reason"].as_str()), (code, Some(reason)), "{path}: {status:#}");
        assert_eq!(status["code"], code);
        status
    };
    let json = "application/json";
    check(Method::POST, CONFIG_MAPS, json, json!({"kind": "Pod"}), 400, "BadRequest").await;
    check(Method::POST, CONFIG_MAPS, json, json!([1]), 400, "BadRequest").await;
    check(Method::POST, CONFIG_MAPS, "text/plain", config_map("a", ""), 415, "UnsupportedMediaType").await;
    check(Method::PUT, CONFIG_MAPS, json, config_map("a", ""), 405, "MethodNotAllowed").await;
    check(Method::POST, "/api/v1/namespaces/none/configmaps", json, config_map("a", ""), 404, "NotFound").await;
    check(Method::POST, CONFIG_MAPS, json, config_map("Not A Name", ""), 422, "Invalid").await;
    check(Method::GET, &format!("{CONFIG_MAPS}?labelSelector=a+in"), "", Value::Null, 400, "BadRequest").await;
    check(Method::GET, &format!("{CONFIG_MAPS}?continue=%21"), "", Value::Null, 400, "BadRequest").await;
    let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 70000}]}});
    let status = check(Method::POST, "/api/v1/namespaces/default/services", json, service, 422, "Invalid").await;
    assert_eq!(status["details"]["causes"][0]["field"], "spec.ports[0].port");
    assert_eq!(status["details"]["causes"][0]["reason"], "FieldValueInvalid");
    let mut connection = rig.connect().await;
    let request = Request::get(CONFIG_MAPS).header(header::ACCEPT, "application/vnd.kubernetes.protobuf");
    assert_eq!(connection.send(request.body(Full::default()).unwrap()).await.0, 406);
}

#[tokio::test]
async fn a_list_comes_in_pages_of_one_moment() {
    let rig = rig().await;
    for number in 0..7 {
        let mut object = config_map(&format!("page-{number}"), "a");
        object["metadata"]["labels"] = json!({"parity": if number % 2 == 0 { "even" } else { "odd" }});
        rig.post(CONFIG_MAPS, object).await;
    }
    let (_, first) = rig.get(&format!("{CONFIG_MAPS}?limit=3")).await;
    assert_eq!(first["kind"], "ConfigMapList");
    assert_eq!(names(&first), ["page-0", "page-1", "page-2"]);
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    rig.delete(&format!("{CONFIG_MAPS}/page-5"), None).await;
    let mut seen = names(&first);
    let mut page = first.clone();
    while let Some(token) = page["metadata"]["continue"].as_str() {
        page = rig.get(&format!("{CONFIG_MAPS}?limit=3&continue={token}")).await.1;
        assert_eq!(revision(&page), revision(&first), "all pages are of one moment");
        seen.extend(names(&page));
    }
    assert_eq!(seen.len(), 7, "what was deleted meanwhile is on its page: {seen:?}");
    let (_, odd) = rig.get(&format!("{CONFIG_MAPS}?labelSelector=parity%3Dodd")).await;
    assert_eq!(names(&odd), ["page-1", "page-3"]);
    let (_, odd) = rig.get(&format!("{CONFIG_MAPS}?labelSelector=parity%3Dodd&limit=1")).await;
    assert_eq!(names(&odd), ["page-1"]);
    let token = odd["metadata"]["continue"].as_str().unwrap();
    let (_, odd) = rig.get(&format!("{CONFIG_MAPS}?labelSelector=parity%3Dodd&limit=1&continue={token}")).await;
    assert_eq!(names(&odd), ["page-3"]);
    let (_, one) = rig.get("/api/v1/configmaps?fieldSelector=metadata.name%3Dpage-4").await;
    assert_eq!(names(&one), ["page-4"]);
    let (_, one) = rig.get(&format!("{CONFIG_MAPS}?fieldSelector=metadata.name%3Dpage-4")).await;
    assert_eq!(names(&one), ["page-4"]);
}

fn names(list: &Value) -> Vec<String> {
    let items = list["items"].as_array().unwrap();
    items.iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_watch_resumes_and_follows_a_selection() {
    let rig = rig().await;
    let (_, first) = rig.post(CONFIG_MAPS, config_map("one", "a")).await;
    let mut watch = rig.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion={}", revision(&first))).await;
    rig.post(CONFIG_MAPS, config_map("two", "a")).await;
    let merge = "merge-patch+json";
    let one = format!("{CONFIG_MAPS}/one");
    rig.patch(&one, merge, json!({"metadata": {"labels": {"app": "web"}}})).await;
    rig.delete(&format!("{CONFIG_MAPS}/two"), None).await;
    for expected in [("ADDED", "two"), ("MODIFIED", "one"), ("DELETED", "two")] {
        let (kind, name) = watch.next_named().await;
        assert_eq!((kind.as_str(), name.as_str()), expected);
    }
    let path = format!("{CONFIG_MAPS}?watch=1&labelSelector=app%3Dweb&resourceVersion={}", revision(&first));
    let mut selected = rig.watch(&path).await;
    assert_eq!(selected.next_named().await, ("ADDED".into(), "one".into()));
    rig.patch(&one, merge, json!({"metadata": {"labels": {"app": "other"}}})).await;
    assert_eq!(selected.next_named().await, ("DELETED".into(), "one".into()));
    let mut present = rig.watch(&format!("{CONFIG_MAPS}?watch=true")).await;
    assert_eq!(present.next_named().await, ("ADDED".into(), "one".into()));
    let query = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut streamed = rig.watch(&format!("{CONFIG_MAPS}?{query}")).await;
    assert_eq!(streamed.next_named().await, ("ADDED".into(), "one".into()));
    let end = streamed.next().await.unwrap();
    assert_eq!(end["object"]["metadata"]["annotations"], json!({"k8s.io/initial-events-end": "true"}));
    let mut short = rig.watch(&format!("{CONFIG_MAPS}?watch=true&timeoutSeconds=1&resourceVersion=1")).await;
    while short.next().await.is_some() {}
}

#[tokio::test]
async fn an_idle_watch_gets_bookmarks() {
    let rig = rig().await;
    let (_, list) = rig.get(CONFIG_MAPS).await;
    let query = format!("watch=true&allowWatchBookmarks=true&resourceVersion={}", revision(&list));
    let mut watch = rig.watch(&format!("{CONFIG_MAPS}?{query}")).await;
    let event = watch.next().await.unwrap();
    assert_eq!((event["type"].as_str(), event["object"]["kind"].as_str()), (Some("BOOKMARK"), Some("ConfigMap")));
    assert!(event["object"]["metadata"]["resourceVersion"].is_string());
}

#[tokio::test]
async fn what_lies_before_history_or_after_the_present_is_gone() {
    let rig = rig_with(|config| config.history_revisions = 20).await;
    for number in 0..5 {
        rig.post(CONFIG_MAPS, config_map(&format!("page-{number}"), "a")).await;
    }
    let (_, page) = rig.get(&format!("{CONFIG_MAPS}?limit=2")).await;
    let mut connection = rig.connect().await;
    for number in 0..100 {
        let body = Some(config_map("page-0", &number.to_string()));
        let path = format!("{CONFIG_MAPS}/page-0");
        assert_eq!(connection.call(Method::PUT, &path, "application/json", body).await.0, 200);
    }
    for lost in [revision(&page), "999999999".to_owned()] {
        let mut watch = rig.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion={lost}")).await;
        let event = watch.next().await.unwrap();
        assert_eq!((event["type"].as_str(), event["object"]["code"].as_u64()), (Some("ERROR"), Some(410)));
        assert_eq!(event["object"]["reason"], "Expired");
        assert!(watch.next().await.is_none());
    }
    let token = page["metadata"]["continue"].as_str().unwrap();
    let (code, status) = rig.get(&format!("{CONFIG_MAPS}?limit=2&continue={token}")).await;
    assert_eq!((code, status["reason"].as_str()), (410, Some("Expired")));
}

#[tokio::test]
async fn patches_of_all_kinds() {
    let rig = rig().await;
    let services = "/api/v1/namespaces/default/services";
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}, {"name": "tls", "port": 443}]}});
    let (code, created) = rig.post(services, service.clone()).await;
    assert_eq!(code, 201, "{created:#}");
    let path = format!("{services}/web");
    let (_, merged) = rig.patch(&path, "merge-patch+json", json!({"metadata": {"labels": {"a": "b"}}})).await;
    assert_eq!(merged["metadata"]["labels"], json!({"a": "b"}));
    let strategic = json!({"spec": {"ports": [{"port": 443, "targetPort": 8443}]}});
    let (code, merged) = rig.patch(&path, "strategic-merge-patch+json", strategic).await;
    assert_eq!(code, 200, "{merged:#}");
    let ports = merged["spec"]["ports"].as_array().unwrap();
    assert_eq!((ports.len(), &ports[1]["targetPort"]), (2, &json!(8443)));
    let operations = json!([{"op": "test", "path": "/metadata/labels/a", "value": "b"},
        {"op": "replace", "path": "/metadata/labels/a", "value": "c"}]);
    let (_, patched) = rig.patch(&path, "json-patch+json", operations.clone()).await;
    assert_eq!(patched["metadata"]["labels"]["a"], "c");
    assert_eq!(rig.patch(&path, "json-patch+json", operations).await.0, 422);
    let stale = json!({"metadata": {"resourceVersion": revision(&created), "labels": {"a": "d"}}});
    assert_eq!(rig.patch(&path, "merge-patch+json", stale).await.0, 409);
    assert_eq!(rig.patch(&path, "other", json!({})).await.0, 415);
}

#[tokio::test]
async fn applying_owns_fields() {
    let rig = rig().await;
    let path = |manager: &str| format!("{CONFIG_MAPS}/applied?fieldManager={manager}");
    let apply = "apply-patch+yaml";
    let wanted = |value: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "applied"}, "data": {"key": value}});
    assert_eq!(rig.patch(&format!("{CONFIG_MAPS}/applied"), apply, wanted("a")).await.0, 400);
    let (code, created) = rig.patch(&path("one"), apply, wanted("a")).await;
    assert_eq!((code, created["data"]["key"].as_str()), (200, Some("a")), "{created:#}");
    let (code, status) = rig.patch(&path("two"), apply, wanted("b")).await;
    assert_eq!((code, status["reason"].as_str()), (409, Some("Conflict")));
    assert_eq!(status["details"]["causes"][0]["field"], ".data.key");
    let (code, forced) = rig.patch(&format!("{}&force=true", path("two")), apply, wanted("b")).await;
    assert_eq!((code, forced["data"]["key"].as_str()), (200, Some("b")));
    let (_, again) = rig.patch(&path("two"), apply, wanted("b")).await;
    assert_eq!(revision(&again), revision(&forced), "applying the same again changes nothing");
}

#[tokio::test]
async fn custom_objects_are_served_as_defined() {
    let rig = rig().await;
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "ports.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced",
            "names": {"plural": "ports", "singular": "port", "kind": "Port", "shortNames": ["po2"]},
            "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                "additionalPrinterColumns": [{"name": "Depth", "type": "integer", "jsonPath": ".spec.depth"}],
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}});
    let (code, created) = rig.post(definitions, definition).await;
    assert_eq!(code, 201, "{created:#}");
    let conditions = created["status"]["conditions"].as_array().unwrap();
    assert!(conditions.iter().any(|it| it["type"] == "Established" && it["status"] == "True"));
    assert_eq!(rig.get("/apis/example.com/v1").await.1["resources"][0]["shortNames"], json!(["po2"]));
    let ports = "/apis/example.com/v1/namespaces/default/ports";
    let port = json!({"apiVersion": "example.com/v1", "kind": "Port", "metadata": {"name": "lisbon"},
        "spec": {"depth": 12}, "status": {"ships": 3}});
    let (code, created) = rig.post(ports, port).await;
    assert_eq!((code, &created["metadata"]["generation"], &created["status"]), (201, &json!(1), &Value::Null));
    let path = format!("{ports}/lisbon");
    let (_, after) =
        rig.patch(&format!("{path}/status"), "merge-patch+json", json!({"status": {"ships": 4}, "spec": null})).await;
    assert_eq!(
        (&after["status"]["ships"], &after["spec"]["depth"], &after["metadata"]["generation"]),
        (&json!(4), &json!(12), &json!(1))
    );
    let (_, after) = rig.patch(&path, "merge-patch+json", json!({"status": {"ships": 9}, "spec": {"depth": 13}})).await;
    assert_eq!((&after["status"]["ships"], &after["metadata"]["generation"]), (&json!(4), &json!(2)));
    assert_eq!(rig.patch(&path, "strategic-merge-patch+json", json!({})).await.0, 415);
    let mut connection = rig.connect().await;
    let table = Request::get(ports).header(header::ACCEPT, "application/json;as=Table;v=v1;g=meta.k8s.io");
    let (_, table) = connection.send(table.body(Full::default()).unwrap()).await;
    assert_eq!(table["columnDefinitions"][1]["name"], "Depth");
    assert_eq!(table["rows"][0]["cells"][1], 13);
    rig.delete(&format!("{definitions}/ports.example.com"), None).await;
    assert_eq!(rig.get(ports).await.0, 404);
}

#[tokio::test]
async fn a_definition_held_by_a_finalizer_takes_its_objects_along() {
    let rig = rig().await;
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "ships.example.com", "finalizers": ["example.com/hold"]},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": {"plural": "ships", "kind": "Ship"},
            "versions": [{"name": "v1", "served": true, "storage": true}]}});
    let ships = "/apis/example.com/v1/namespaces/default/ships";
    assert_eq!(rig.post(definitions, definition.clone()).await.0, 201);
    let ship = json!({"apiVersion": "example.com/v1", "kind": "Ship", "metadata": {"name": "santa-maria"}});
    assert_eq!(rig.post(ships, ship).await.0, 201);
    let path = format!("{definitions}/ships.example.com");
    rig.delete(&path, None).await;
    rig.patch(&path, "merge-patch+json", json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(rig.get(&path).await.0, 404);
    assert_eq!(rig.post(definitions, definition).await.0, 201);
    assert_eq!(rig.get(ships).await.1["items"], json!([]), "an object of the old definition came back");
}

#[tokio::test]
async fn a_list_is_never_older_than_what_the_client_knows() {
    let rig = rig().await;
    let (code, status) = rig.get(&format!("{CONFIG_MAPS}?resourceVersion=999999999")).await;
    assert_eq!((code, status["reason"].as_str()), (504, Some("Timeout")), "{status:#}");
    assert_eq!(status["details"]["causes"][0]["reason"], "ResourceVersionTooLarge");
    let (_, first) = rig.post(CONFIG_MAPS, config_map("one", "a")).await;
    rig.post(CONFIG_MAPS, config_map("two", "a")).await;
    let version = revision(&first);
    let count = |list: &serde_json::Value| list["items"].as_array().map(Vec::len);
    let (_, newer) = rig.get(&format!("{CONFIG_MAPS}?resourceVersion={version}")).await;
    assert_eq!(count(&newer), Some(2));
    for exact in ["limit=5", "resourceVersionMatch=Exact"] {
        let (_, list) = rig.get(&format!("{CONFIG_MAPS}?resourceVersion={version}&{exact}")).await;
        assert_eq!(count(&list), Some(1), "{exact}");
    }
}

#[tokio::test]
async fn a_pod_ends_when_its_node_says_so() {
    let rig = rig().await;
    let pods = "/api/v1/namespaces/default/pods";
    let pod = |name: &str, node: &str| {
        let mut spec = json!({"containers": [{"name": "c", "image": "i"}]});
        if !node.is_empty() {
            spec["nodeName"] = node.into();
        }
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
    };
    rig.post(pods, pod("waiting", "")).await;
    assert_eq!(rig.delete(&format!("{pods}/waiting"), None).await.1["status"], "Success");
    let (code, created) = rig.post(pods, pod("running", "node-1")).await;
    assert_eq!((code, created["status"]["phase"].as_str()), (201, Some("Pending")), "{created:#}");
    let path = format!("{pods}/running");
    let (_, marked) = rig.delete(&path, Some(json!({"kind": "DeleteOptions", "apiVersion": "v1"}))).await;
    assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
    assert!(rig.get(&path).await.1["metadata"]["deletionTimestamp"].is_string());
    let (_, status) =
        rig.patch(&format!("{path}/status"), "merge-patch+json", json!({"status": {"phase": "Running"}})).await;
    assert_eq!(status["status"]["phase"], "Running", "a pod that ends still reports");
    let wrong = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": "another"}});
    assert_eq!(rig.delete(&path, Some(wrong)).await.0, 409);
    assert_eq!(rig.delete(&path, Some(json!({"gracePeriodSeconds": 0}))).await.1["status"], "Success");
    assert_eq!(rig.get(&path).await.0, 404);
}

#[tokio::test]
async fn finalizers_hold_an_object() {
    let rig = rig().await;
    let mut object = config_map("held", "a");
    object["metadata"]["finalizers"] = json!(["example.com/hold"]);
    rig.post(CONFIG_MAPS, object).await;
    let path = format!("{CONFIG_MAPS}/held");
    let (_, marked) = rig.delete(&path, None).await;
    assert!(marked["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(rig.get(&path).await.0, 200);
    rig.patch(&path, "merge-patch+json", json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(rig.get(&path).await.0, 404);
}

#[tokio::test]
async fn a_namespace_takes_its_content_along() {
    let rig = rig().await;
    rig.post("/api/v1/namespaces", json!({"metadata": {"name": "crew"}})).await;
    rig.post("/api/v1/namespaces/crew/configmaps", config_map("one", "a")).await;
    let (_, marked) = rig.delete("/api/v1/namespaces/crew", None).await;
    assert_eq!(marked["status"]["phase"], "Terminating");
    rig.until("/api/v1/namespaces/crew", "gone", |answer| answer["code"] == 404).await;
    assert!(names(&rig.get("/api/v1/configmaps?fieldSelector=metadata.namespace%3Dcrew").await.1).is_empty());
    assert_eq!(rig.delete("/api/v1/namespaces/default", None).await.0, 403);
}

#[tokio::test]
async fn a_deployment_becomes_pods_on_nodes_and_endpoints() {
    let rig = rig().await;
    for name in ["node-1", "node-2"] {
        let status = json!({"conditions": [{"type": "Ready", "status": "True"}]});
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": status});
        let (code, node) = rig.post("/api/v1/nodes", node).await;
        assert_eq!(code, 201, "{node:#}");
    }
    rig.until("/api/v1/nodes", "given podCIDRs", |nodes| {
        nodes["items"].as_array().unwrap().iter().all(|node| node["spec"]["podCIDR"].is_string())
    })
    .await;
    let labels = json!({"app": "web"});
    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": 4, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels},
            "spec": {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80}]}]}}}});
    let (code, answer) = rig.post("/apis/apps/v1/namespaces/default/deployments", deployment).await;
    assert_eq!(code, 201, "{answer:#}");
    let service = json!({"metadata": {"name": "web"}, "spec": {"selector": labels, "ports": [{"port": 80}]}});
    rig.post("/api/v1/namespaces/default/services", service).await;
    let pods = "/api/v1/namespaces/default/pods";
    let list = rig
        .until(pods, "four placed pods", |list| {
            let items = list["items"].as_array().unwrap();
            items.len() == 4 && items.iter().all(|pod| pod["spec"]["nodeName"].is_string())
        })
        .await;
    let on_first = list["items"].as_array().unwrap().iter().filter(|pod| pod["spec"]["nodeName"] == "node-1").count();
    assert_eq!(on_first, 2, "pods spread over the nodes");
    for (index, name) in names(&list).iter().enumerate() {
        let address = format!("10.42.0.{}", index + 2);
        let status = json!({"phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}]});
        let (code, answer) =
            rig.patch(&format!("{pods}/{name}/status"), "merge-patch+json", json!({"status": status})).await;
        assert_eq!(code, 200, "{answer:#}");
    }
    rig.until("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", "four ready endpoints", |list| {
        let slices = list["items"].as_array().unwrap().iter();
        let endpoints = slices.flat_map(|slice| slice["endpoints"].as_array().cloned().unwrap_or_default());
        endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true).count() == 4
    })
    .await;
    let scale = "/apis/apps/v1/namespaces/default/deployments/web/scale";
    rig.until(scale, "four replicas", |scale| scale["status"]["replicas"] == 4).await;
    let (_, scaled) = rig.patch(scale, "merge-patch+json", json!({"spec": {"replicas": 1}})).await;
    assert_eq!((scaled["kind"].as_str(), &scaled["spec"]["replicas"]), (Some("Scale"), &json!(1)));
    rig.until(pods, "one pod that stays", |list| {
        let pods = list["items"].as_array().unwrap().iter();
        pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).count() == 1
    })
    .await;
    rig.delete("/apis/apps/v1/namespaces/default/deployments/web", None).await;
    rig.until("/apis/apps/v1/namespaces/default/replicasets", "collected", |list| names(list).is_empty()).await;
}

#[tokio::test]
async fn two_at_once_never_get_the_same_address() {
    let rig = rig().await;
    let create = async |number: u32| {
        let service = json!({"metadata": {"generateName": "many-"}, "spec": {"type": "NodePort", "ports": [{"port": number + 1}]}});
        rig.post("/api/v1/namespaces/default/services", service).await
    };
    let created = futures::future::join_all((0..60).map(create)).await;
    let mut addresses: Vec<String> = Vec::new();
    let mut ports: Vec<u64> = Vec::new();
    for (code, service) in created {
        assert_eq!(code, 201, "{service:#}");
        addresses.push(service["spec"]["clusterIP"].as_str().unwrap().to_owned());
        ports.push(service["spec"]["ports"][0]["nodePort"].as_u64().unwrap());
    }
    addresses.sort();
    addresses.dedup();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!((addresses.len(), ports.len()), (60, 60));
}

#[tokio::test]
async fn what_was_written_is_there_after_a_restart() {
    let rig = rig().await;
    let (_, created) = rig.post(CONFIG_MAPS, config_map("kept", "a")).await;
    let mut open = rig.watch(&format!("{CONFIG_MAPS}?watch=true")).await;
    open.next_named().await;
    let Rig { server, directory } = rig;
    let token = server.token().to_owned();
    server.shutdown().await;
    let server = start(Config::new(directory.path())).await.unwrap();
    assert_eq!(server.token(), token, "a kubeconfig that was copied stays valid");
    let rig = Rig { server, directory };
    assert_eq!(rig.get(&format!("{CONFIG_MAPS}/kept")).await.1, created);
}

#[tokio::test]
async fn a_socket_or_port_in_use_is_one_clear_error() {
    let rig = rig().await;
    let again = start(Config::new(rig.directory.path())).await.err().unwrap();
    assert!(matches!(again, Error::SocketInUse { .. }), "{again}");
    let other = tempfile::tempdir().unwrap();
    let config = Config { loopback_port: rig.server.address().port(), ..Config::new(other.path()) };
    let taken = start(config).await.err().unwrap();
    assert!(matches!(taken, Error::PortInUse { .. }), "{taken}");
    assert!(!other.path().join("api.sock").exists(), "nothing half-built stays behind");
    let open = Config { loopback_address: [0, 0, 0, 0].into(), ..Config::new(other.path()) };
    assert!(matches!(start(open).await, Err(Error::NotLoopback { .. })));
}

#[tokio::test]
async fn the_sockets_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let rig = rig().await;
    for name in ["api.sock", "kubeconfig", "server.key", "store.redb", "token"] {
        let mode = std::fs::metadata(rig.directory.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    tokio::time::timeout(PATIENCE, rig.server.shutdown()).await.unwrap();
    assert!(!rig.directory.path().join("api.sock").exists());
}

#[tokio::test]
async fn a_load_balancer_is_told_its_address_through_the_status() {
    let rig = rig().await;
    let services = "/api/v1/namespaces/default/services";
    let body = json!({"metadata": {"name": "lb"}, "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local",
        "ports": [{"port": 80}]}, "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}}});
    let (code, created) = rig.post(services, body).await;
    assert_eq!((code, &created["status"]), (201, &json!({"loadBalancer": {}})), "{created}");
    let path = format!("{services}/lb");
    let mut with = created.clone();
    with["status"]["loadBalancer"]["ingress"] = json!([{"ip": "192.0.2.7"}]);
    with["spec"]["externalTrafficPolicy"] = json!("Cluster");
    let (code, told) = rig.put(&format!("{path}/status"), with).await;
    assert_eq!(code, 200, "{told}");
    assert_eq!(told["status"]["loadBalancer"]["ingress"], json!([{"ip": "192.0.2.7", "ipMode": "VIP"}]));
    assert_eq!(told["spec"], created["spec"], "a status changes nothing else");
    let wrong = json!({"status": {"loadBalancer": {"ingress": [{"ip": "here"}]}}});
    let (code, status) = rig.patch(&format!("{path}/status"), "merge-patch+json", wrong).await;
    assert_eq!((code, status["reason"].as_str()), (422, Some("Invalid")));
    assert_eq!(status["details"]["causes"][0]["field"], "status.loadBalancer.ingress[0].ip");
    let (code, narrow) = rig.patch(&path, "merge-patch+json", json!({"spec": {"type": "ClusterIP"}})).await;
    assert_eq!((code, &narrow["status"]), (200, &json!({"loadBalancer": {}})), "{narrow}");
    for field in ["healthCheckNodePort", "externalTrafficPolicy", "allocateLoadBalancerNodePorts"] {
        assert!(narrow["spec"].get(field).is_none(), "{field}: {narrow}");
    }
}
