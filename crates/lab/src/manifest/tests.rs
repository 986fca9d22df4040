//! What manifests may hold, and how mistakes in them are named.

use super::*;
use proptest::prelude::*;

fn read(text: &str) -> Result<Manifests> {
    parse(&[("shop.yaml".to_owned(), text.to_owned())])
}

fn refused(text: &str) -> String {
    let error = read(text).expect_err("the manifest was taken");
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(!error.hint().is_empty(), "{error} has no hint");
    error.to_string()
}

const CART: &str = "
apiVersion: v1
kind: Service
metadata: {name: cart}
spec: {selector: {app: cart}, ports: [{port: 7070}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart}
spec: {selector: {matchLabels: {app: cart}}, template: {metadata: {labels: {app: cart}}}}
---
apiVersion: v1
kind: Namespace
metadata: {name: team}
";

#[test]
fn documents_become_objects_with_their_places() {
    let manifests = read(CART).unwrap();
    let titles: Vec<String> = manifests.objects.iter().map(|it| format!("{} | {}", it.origin, it.title())).collect();
    assert_eq!(
        titles,
        [
            "shop.yaml: document 3 | Namespace team",
            "shop.yaml: document 1 | Service default/cart",
            "shop.yaml: document 2 | Deployment default/cart",
        ]
    );
    assert!(manifests.warnings.is_empty(), "{:?}", manifests.warnings);
}

#[test]
fn a_list_is_taken_apart() {
    let text = "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: ConfigMap, metadata: {name: a}}]}";
    assert_eq!(read(text).unwrap().objects[0].origin, "shop.yaml: document 1, item 1");
}

#[test]
fn mistakes_are_named_with_document_object_and_field() {
    assert_eq!(
        refused(&format!("{CART}---\napiVersion: v1\nkind: Moon\nmetadata: {{name: a}}\n")),
        "shop.yaml: document 4: kind `Moon` of `v1` is not known"
    );
    assert_eq!(
        refused("apiVersion: v1\nkind: Pod\nmetadata: {}\n"),
        "shop.yaml: document 1: Pod: the field metadata.name is missing"
    );
    assert_eq!(refused("kind: Pod\n"), "shop.yaml: document 1: the field apiVersion is missing");
    assert_eq!(
        refused("apiVersion: v1\nkind: Pod\nmetadata: {name: A_B}\n"),
        "shop.yaml: document 1: Pod A_B: metadata.name `A_B` is not a name"
    );
    assert_eq!(
        refused("apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: moon}\n"),
        "shop.yaml: document 1: Pod moon/a: metadata.namespace: there is no namespace `moon`"
    );
    assert_eq!(
        refused(&format!("{CART}---\napiVersion: v1\nkind: Service\nmetadata: {{name: cart}}\n")),
        "shop.yaml: document 4: Service default/cart stands already at shop.yaml: document 1"
    );
    assert_eq!(refused("- a\n"), "shop.yaml: document 1: this is not an object");
}

#[test]
fn yaml_that_does_not_parse_is_named_with_line_and_column() {
    let text = refused(&format!("{CART}---\nkind: [\n"));
    assert!(text.starts_with("shop.yaml: document 4, line "), "{text}");
    assert!(text.contains("column "), "{text}");
}

#[test]
fn a_selector_that_matches_nothing_is_a_warning() {
    let manifests = read(&CART.replace("{app: cart}, ports", "{app: chart}, ports")).unwrap();
    assert_eq!(
        manifests.warnings,
        ["shop.yaml: document 1: Service default/cart: spec.selector `app=chart` matches no pod of these manifests"]
    );
}

#[test]
fn a_kind_that_the_manifests_define_is_known() {
    let text = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: moons.sky.test}
spec: {group: sky.test, scope: Cluster, names: {kind: Moon, plural: moons}, versions: [{name: v1}]}
---
apiVersion: sky.test/v1
kind: Moon
metadata: {name: luna}
";
    let manifests = read(text).unwrap();
    assert_eq!(manifests.objects[1].kind.collection(None), "/apis/sky.test/v1/moons");
}

proptest! {
    #[test]
    fn any_text_is_taken_or_refused(text: String) {
        let _ = read(&text);
    }
}
