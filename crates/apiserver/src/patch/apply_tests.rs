//! The rules of KEP-555, one test each.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const NOW: &str = "2024-01-01T00:00:00Z";

fn apply(live: Option<&Value>, applied: &Value, manager: &str) -> Result<Value, ApplyConflict> {
    server_side_apply("Deployment", live, applied, manager, false, NOW)
}

#[expect(clippy::needless_pass_by_value, reason = "every caller has a literal")]
fn deployment(spec: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "default"}, "spec": spec})
}

fn entry<'a>(object: &'a Value, manager: &str) -> Option<&'a Value> {
    items(object, "metadata.managedFields").iter().find(|entry| text(entry, "manager") == manager)
}

#[test]
fn the_first_apply_owns_what_it_sets_in_kubernetes_own_notation() {
    let spec = json!({"replicas": 2, "template": {"spec": {"containers": [
        {"name": "a", "image": "a:1", "ports": [{"containerPort": 80}]}]}}});
    let live = apply(None, &deployment(spec), "one").unwrap();
    let expected = json!({"f:spec": {"f:replicas": {}, "f:template": {"f:spec": {"f:containers": {
        "k:{\"name\":\"a\"}": {".": {}, "f:image": {}, "f:name": {}, "f:ports": {
            "k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}}}}}});
    assert_eq!(entry(&live, "one").unwrap()["fieldsV1"], expected);
    assert_eq!(FieldSet::parse(&expected).render(), expected);
}

#[test]
fn what_a_manager_applies_no_more_goes_away() {
    let first = deployment(json!({"replicas": 2, "template": {"spec": {
        "nodeSelector": {"disk": "fast"},
        "containers": [{"name": "a", "image": "a:1"}, {"name": "b", "image": "b:1"}]}}}));
    let second = deployment(json!({"template": {"spec": {"containers": [{"name": "b", "image": "b:1"}]}}}));
    let live = apply(None, &first, "one").unwrap();
    let live = apply(Some(&live), &second, "one").unwrap();
    assert_eq!(live["spec"], second["spec"]);
}

#[test]
fn what_others_set_stays() {
    let live = apply(None, &deployment(json!({"replicas": 2})), "one").unwrap();
    let live = apply(Some(&live), &deployment(json!({"paused": true, "replicas": 2})), "two").unwrap();
    let live = apply(Some(&live), &deployment(json!({"paused": true})), "two").unwrap();
    assert_eq!(live["spec"], json!({"replicas": 2, "paused": true}));
    // Shared fields go when the last owner lets go.
    let live = apply(Some(&live), &deployment(json!({"minReadySeconds": 1})), "one").unwrap();
    assert_eq!(live["spec"], json!({"paused": true, "minReadySeconds": 1}));
}

#[test]
fn another_value_conflicts_and_force_takes_over() {
    let live = apply(None, &deployment(json!({"replicas": 2})), "one").unwrap();
    let wanted = deployment(json!({"replicas": 3}));
    let error = apply(Some(&live), &wanted, "two").unwrap_err();
    let expected = Conflict { manager: "one".into(), api_version: "apps/v1".into(), field: ".spec.replicas".into() };
    assert_eq!(error.conflicts, [expected]);
    assert!(error.to_string().contains("conflict with \"one\" using apps/v1: .spec.replicas"), "{error}");
    let live = server_side_apply("Deployment", Some(&live), &wanted, "two", true, NOW).unwrap();
    assert_eq!(live["spec"]["replicas"], 3);
    assert!(entry(&live, "one").is_none(), "it owns nothing more: {live}");
}

#[test]
fn an_update_owns_what_it_changed() {
    let live = apply(None, &deployment(json!({"replicas": 2, "paused": true})), "one").unwrap();
    let mut scaled = live.clone();
    scaled["spec"]["replicas"] = json!(5);
    record_update("Deployment", Some(&live), &mut scaled, "kubectl-scale", NOW);
    assert_eq!(entry(&scaled, "kubectl-scale").unwrap()["fieldsV1"], json!({"f:spec": {"f:replicas": {}}}));
    assert_eq!(entry(&scaled, "one").unwrap()["fieldsV1"], json!({"f:spec": {"f:paused": {}}}));
    let error = apply(Some(&scaled), &deployment(json!({"replicas": 2, "paused": true})), "one").unwrap_err();
    assert_eq!(error.conflicts[0].manager, "kubectl-scale");
    // Leaving the field to the other manager is the way out that the KEP recommends.
    let live = apply(Some(&scaled), &deployment(json!({"paused": true})), "one").unwrap();
    assert_eq!(live["spec"]["replicas"], 5);
}

#[test]
fn an_element_stays_while_somebody_owns_a_part_of_it() {
    let with = |image: Value| deployment(json!({"template": {"spec": {"containers": [image]}}}));
    let live = apply(None, &with(json!({"name": "a", "image": "a:1"})), "one").unwrap();
    let live = apply(Some(&live), &with(json!({"name": "a", "stdin": true})), "two").unwrap();
    let live = apply(Some(&live), &deployment(json!({"replicas": 1})), "one").unwrap();
    assert_eq!(live["spec"]["template"]["spec"]["containers"], json!([{"name": "a", "stdin": true}]));
}

#[test]
fn atomic_lists_and_selectors_are_replaced_as_a_whole() {
    let service = |selector: Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"selector": selector}});
    let live = server_side_apply("Service", None, &service(json!({"a": "1", "b": "2"})), "one", false, NOW).unwrap();
    let live = server_side_apply("Service", Some(&live), &service(json!({"a": "1"})), "one", false, NOW).unwrap();
    assert_eq!(live["spec"]["selector"], json!({"a": "1"}));
}

#[test]
fn null_is_absent() {
    let live = apply(None, &deployment(json!({"replicas": 2, "paused": null})), "one").unwrap();
    assert_eq!(live["spec"], json!({"replicas": 2}));
    let live = apply(Some(&live), &deployment(json!({"replicas": null, "paused": true})), "one").unwrap();
    assert_eq!(live["spec"], json!({"paused": true}));
}

fn any_spec() -> impl Strategy<Value = Value> {
    let container = ("[ab]", proptest::option::of("[xy]"), proptest::option::of(1..4u16));
    let containers = proptest::collection::btree_map("[abc]", container, 0..3);
    (proptest::option::of(0..3i64), proptest::collection::btree_map("[kl]", "[12]", 0..3), containers).prop_map(
        |(replicas, labels, containers)| {
            let mut spec = json!({});
            if let Some(replicas) = replicas {
                spec["replicas"] = json!(replicas);
            }
            if !labels.is_empty() {
                set(&mut spec, "template.metadata.labels", json!(labels));
            }
            let containers: Vec<Value> = containers
                .into_iter()
                .map(|(name, (image, workdir, port))| {
                    let mut container = json!({"name": name, "image": image});
                    if let Some(workdir) = workdir {
                        container["workingDir"] = json!(workdir);
                    }
                    if let Some(port) = port {
                        container["ports"] = json!([{"containerPort": port}]);
                    }
                    container
                })
                .collect();
            if !containers.is_empty() {
                set(&mut spec, "template.spec.containers", json!(containers));
            }
            spec
        },
    )
}

proptest! {
    /// With one manager, applying is replacing: the live object is what was applied last.
    #[test]
    fn one_manager_gets_what_it_applies(first in any_spec(), second in any_spec()) {
        let live = apply(None, &deployment(first), "one").unwrap();
        let live = apply(Some(&live), &deployment(second.clone()), "one").unwrap();
        let asked = deployment(second.clone());
        let wanted = FieldSet::of("Deployment", &asked);
        let found = FieldSet::of("Deployment", &live);
        prop_assert_eq!(found.render(), wanted.render());
        for path in wanted.members() {
            if !matches!(path.last(), Some(Step::Key(_))) {
                prop_assert_eq!(lookup(&live, &path), lookup(&asked, &path));
            }
        }
        let again = apply(Some(&live), &deployment(second), "one").unwrap();
        prop_assert_eq!(again, live);
    }

    /// A forced apply always succeeds and has its values.
    #[test]
    fn force_wins(first in any_spec(), second in any_spec()) {
        let live = apply(None, &deployment(first), "one").unwrap();
        let wanted = deployment(second);
        let live = server_side_apply("Deployment", Some(&live), &wanted, "two", true, NOW).unwrap();
        for path in FieldSet::of("Deployment", &wanted).members() {
            let is_empty = lookup(&wanted, &path) == Some(&json!({}));
            if matches!(path.last(), Some(Step::Field(_))) && !is_empty {
                prop_assert_eq!(lookup(&live, &path), lookup(&wanted, &path));
            }
        }
    }
}
