//! Mistakes in words, files and names: one clear error that names the object and the field, and nothing left behind.

use crate::common::{CART, TestLab, until};

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

#[test]
fn what_contradicts_itself_is_said() {
    let Some(lab) = TestLab::new() else { return };
    let file = lab.manifest(
        "segments: [{name: rack, router: [10.42.0.1/24]}]\n\
                             nodes: [{name: a, segment: rack, addresses: [10.42.0.2]}]\n",
    );
    assert_eq!(lab.run("up", &["--nodes", "2", "--topology", &file]).code, 2);
    let stderr = refused(&lab, 2, &["--topology", &file]);
    assert!(stderr.contains("segment `rack`: router 10.42.0.1/24 overlaps with 10.42.0.0/16"), "{stderr}");
}

#[test]
fn a_directory_that_is_no_lab_is_left_alone() {
    let Some(lab) = TestLab::new() else { return };
    let file = lab.directory().join("letters/one");
    std::fs::create_dir_all(file.parent().expect("a directory")).expect("creating a directory");
    std::fs::write(&file, "dear").expect("writing a file");
    let done = lab.run("down", &[]);
    assert_eq!(done.code, 3, "{}", done.stderr);
    assert!(done.stderr.contains("is not a lab"), "{}", done.stderr);
    assert!(file.exists());
    std::fs::remove_dir_all(lab.directory()).expect("removing a directory");
}

#[test]
fn a_description_that_cannot_be_read_does_not_keep_a_lab_from_going_down() {
    let Some(lab) = TestLab::new() else { return };
    assert_eq!(lab.run("up", &["--nodes", "1"]).code, 0);
    std::fs::write(lab.directory().join("lab.json"), "{").expect("writing a file");
    let done = lab.run("status", &[]);
    assert_eq!(done.code, 3, "{}", done.stderr);
    assert!(done.stderr.contains("lab down"), "{}", done.stderr);
    assert_eq!(lab.run("down", &[]).code, 0);
    lab.assert_gone();
}

#[test]
fn an_interrupted_wait_leaves_nothing_behind() {
    let Some(lab) = TestLab::new() else { return };
    let file = lab.manifest(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: deaf, annotations: {portolan.dev/run: sleep 1000}}\n\
         spec: {containers: [{name: c, image: i, ports: [{containerPort: 80}]}]}\n",
    );
    let pods = lab.directory().join("pods");
    let runs = |entry: std::io::Result<std::fs::DirEntry>| entry.is_ok_and(|it| it.path().join("pod.json").exists());
    // Each round is interrupted at another moment.
    for moment in ["lab.json", "supervisor.pid", "supervisor.sock", "api.sock", "nodes/node-1/agent.pid", "a pod"] {
        let mut up = lab.start("up", &["-f", &file, "--nodes", "1", "--wait"]);
        until(moment, || match moment {
            "a pod" => std::fs::read_dir(&pods).is_ok_and(|mut pods| pods.any(runs)),
            file => lab.directory().join(file).exists(),
        });
        let process = nix::unistd::Pid::from_raw(i32::try_from(up.id()).expect("a process id"));
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGINT).expect("interrupting");
        assert_eq!(up.wait().expect("waiting").code(), Some(130), "{moment}");
        lab.assert_gone();
    }
}

#[test]
fn words_that_are_not_known_are_usage_errors() {
    let Some(lab) = TestLab::new() else { return };
    for (arguments, said) in [
        (vec!["--fabric", "carrier-pigeon"], "[possible values: vxlan, host-gw, ipip]"),
        (vec!["--fabric-option", "vxlan.colour=red"], "there is no such field"),
        (vec!["--segments", "9"], "a lab's nodes are on 1 to 4"),
        (vec!["--services", "magic"], "nftables"),
        (vec!["--ip-family", "ipv5"], "ipv4"),
        (vec!["--nodes", "many"], "--nodes"),
    ] {
        let done = lab.run("up", &arguments);
        assert_eq!(done.code, 2, "{}", done.stderr);
        assert!(done.stderr.contains(said), "{}", done.stderr);
        lab.assert_gone();
    }
    let done = lab.portolan(&["lab", "up", "--name", "Not/A/Name"]);
    assert_eq!(done.code, 2, "{}", done.stderr);
    assert!(done.stderr.contains("Not/A/Name"), "{}", done.stderr);
}

#[test]
fn a_selector_that_matches_nothing_is_a_warning() {
    let Some(lab) = TestLab::new() else { return };
    let service = "
---
apiVersion: v1
kind: Service
metadata: {name: typo}
spec: {selector: {app: crat}, ports: [{port: 80}]}
";
    let file = lab.manifest(&format!("{CART}{service}"));
    let done = lab.run("up", &["-f", &file, "--nodes", "1", "--wait"]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let warning = done.stderr.lines().find(|line| line.starts_with("warning: ")).expect("a warning");
    assert!(warning.contains(&file) && warning.contains("document 3: Service default/typo"), "{warning}");
    assert!(warning.contains("spec.selector `app=crat` matches no pod"), "{warning}");
}
