//! Mistakes: one clear error that names the object and the field, and nothing left behind.

use crate::common::TestLab;

/// Brings a lab up that cannot come up; returns what was said.
fn refused(lab: &TestLab, code: i32, arguments: &[&str]) -> String {
    let done = lab.run("up", arguments);
    assert_eq!(done.code, code, "{}", done.stderr);
    assert!(done.stderr.contains("hint: "), "{}", done.stderr);
    lab.assert_gone();
    done.stderr
}

#[test]
fn a_manifest_with_a_mistake_is_refused_before_anything_is_made() {
    let Some(lab) = TestLab::new() else { return };
    for (text, said) in [
        ("apiVersion: v1\nkind: Moon\nmetadata: {name: a}\n", "document 1: kind `Moon` of `v1` is not known"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {}\n", "document 1: Pod: the field metadata.name is missing"),
        ("apiVersion: v1\nkind: [\n", "document 1, line "),
    ] {
        let file = lab.manifest(text);
        let stderr = refused(&lab, 2, &["-f", &file]);
        assert!(stderr.contains(&file) && stderr.contains(said), "{stderr}");
    }
    assert!(refused(&lab, 2, &["-f", "/nowhere.yaml"]).contains("/nowhere.yaml"));
    assert!(refused(&lab, 2, &["--nodes", "0"]).contains("1 to 32 nodes"));
}

#[test]
fn an_object_that_the_api_refuses_takes_the_lab_down_again() {
    let Some(lab) = TestLab::new() else { return };
    let service = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
             spec: {{type: NodePort, ports: [{{port: 80, nodePort: 30999}}]}}\n---\n"
        )
    };
    let file = lab.manifest(&format!("{}{}", service("one"), service("two")));
    let stderr = refused(&lab, 2, &["-f", &file]);
    assert!(stderr.contains("document 2: Service default/two: "), "{stderr}");
    assert!(stderr.contains("30999"), "{stderr}");
}

#[test]
fn a_topology_with_an_address_twice_is_refused() {
    let Some(lab) = TestLab::new() else { return };
    let file = lab.manifest(
        "segments: [{name: rack, router: [10.0.0.1/24]}]\n\
         nodes:\n- {name: a, segment: rack, addresses: [10.0.0.2]}\n- {name: b, segment: rack, addresses: [10.0.0.2]}\n",
    );
    let stderr = refused(&lab, 2, &["--topology", &file]);
    assert!(stderr.contains("b: 10.0.0.2 is taken by another machine"), "{stderr}");
}

#[test]
fn a_name_in_use_is_refused_and_the_lab_of_that_name_stays() {
    let Some(lab) = TestLab::new() else { return };
    assert_eq!(lab.run("up", &["--nodes", "1"]).code, 0);
    let done = lab.run("up", &["--nodes", "1"]);
    assert_eq!(done.code, 3, "{}", done.stderr);
    assert!(done.stderr.contains(&format!("a lab named `{}` is up already", lab.name)), "{}", done.stderr);
    assert!(done.stderr.contains("hint: "), "{}", done.stderr);
    assert_eq!(lab.run("status", &[]).code, 0);
    assert_eq!(lab.run("down", &[]).code, 0);
    lab.assert_gone();
    assert_eq!(lab.run("status", &[]).code, 1);
    assert_eq!(lab.run("down", &[]).code, 1);
}
