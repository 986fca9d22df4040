//! What the machine lacks or has given away: one clear error that says what to do, and nothing left behind.

use std::net::TcpListener;
use std::process::Command;

use crate::common::{ASK, CART, Done, PROGRAM, TestLab, has};

/// Runs the binary under `setpriv`; brings a lab up that cannot come up; returns what was said.
fn refused_with(lab: &TestLab, privileges: &[&str]) -> Option<String> {
    let mut command = Command::new("setpriv");
    command.args(privileges).arg(PROGRAM).args(["lab", "up", "--name", &lab.name]);
    command.env("PORTOLAN_LAB_DIRECTORY", lab.directory().parent().unwrap());
    let done = Done::of(&mut command);
    if done.code == 126 || done.code == 127 {
        println!("skipped: {}", done.stderr.trim());
        return None;
    }
    assert_eq!(done.code, 3, "{}{}", done.stdout, done.stderr);
    assert!(done.stderr.contains("hint: "), "{}", done.stderr);
    assert_eq!(done.stderr.matches("error: ").count(), 1, "{}", done.stderr);
    lab.assert_gone();
    Some(done.stderr)
}

#[test]
fn a_missing_right_is_named_before_anything_is_made() {
    let Some(lab) = TestLab::new() else { return };
    if !has("setpriv", "util-linux") {
        return;
    }
    if let Some(said) = refused_with(&lab, &["--reuid=65534", "--regid=65534", "--clear-groups"]) {
        assert!(said.contains("a lab needs root"), "{said}");
    }
    for capability in ["net_admin", "sys_admin"] {
        let without = format!("-{capability}");
        let privileges = ["--bounding-set", &without, "--inh-caps", &without];
        if let Some(said) = refused_with(&lab, &privileges) {
            assert!(said.contains(&format!("CAP_{}", capability.to_uppercase())), "{said}");
        }
    }
}

#[test]
fn an_agent_without_rights_says_what_it_needs() {
    let Some(lab) = TestLab::new() else { return };
    lab.up("", &["--nodes", "1"]);
    let configuration = lab.manifest(&format!(
        "node: node-1\nkubernetes: {{socket: {0}/api.sock}}\nclusterPrefixes: [10.42.0.0/16]\n\
         stateDirectory: {0}/other\nruntimeDirectory: {0}/other\n",
        lab.directory().display()
    ));
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", lab.namespace("client-1").display()));
    command.args(["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "timeout", "20"]);
    let done = Done::of(command.args([PROGRAM, "agent", "--config", &configuration]));
    assert_eq!(done.code, 3, "{}", done.stderr);
    assert!(done.stderr.contains("CAP_NET_ADMIN"), "{}", done.stderr);
}

#[test]
fn a_port_of_the_api_in_use_is_named() {
    let Some(lab) = TestLab::new() else { return };
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let directory = lab.directory();
    let (data, socket) = (directory.join("data"), directory.join("api.sock"));
    let done = lab.portolan(&[
        "apiserver",
        "--data-directory",
        data.to_str().unwrap(),
        "--socket",
        socket.to_str().unwrap(),
        "--listen",
        &address,
    ]);
    assert_eq!(done.code, 3, "{}", done.stderr);
    assert!(done.stderr.contains(&address), "{}", done.stderr);
    assert!(!socket.exists(), "its socket is left");
    let _ = std::fs::remove_dir_all(&directory);
}

#[test]
fn a_second_agent_on_a_node_ends_before_it_touches_anything() {
    let Some(lab) = TestLab::new() else { return };
    lab.up(CART, &["--nodes", "1"]);
    let configuration = lab.node_directory("node-1").join("agent.yaml");
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", lab.namespace("node-1").display()));
    let done = Done::of(command.args([PROGRAM, "agent", "--config"]).arg(&configuration));
    assert_eq!(done.code, 3, "{}", done.stderr);
    assert!(done.stderr.contains("agent.sock"), "{}", done.stderr);
    assert!(lab.is_agent_ready("node-1"));
    lab.assert_as_planned();

    let wrong =
        lab.manifest("node: a\nkubernetes: {}\nclusterPrefixes: [10.42.0.0/16]\nservicePrefixes: [10.42.9.0/24]\n");
    let done = lab.portolan(&["agent", "--config", &wrong]);
    assert_eq!(done.code, 2, "{}", done.stderr);
    assert!(done.stderr.contains("servicePrefixes: 10.42.9.0/24 overlaps the pods' 10.42.0.0/16"), "{}", done.stderr);
}

#[test]
fn an_object_that_cannot_be_served_is_refused_and_the_rest_goes_on() {
    let Some(lab) = TestLab::new() else { return };
    if !has("kubectl", "kubernetes-client") {
        return;
    }
    lab.up(CART, &["--nodes", "2"]);
    let fine = lab.ask("doctor", &[]);
    assert_eq!((fine.code, fine.stdout.as_str()), (0, "no problems on 2 nodes\n"), "{}", fine.stderr);
    // Its pods would be those of node-1.
    let node = "
apiVersion: v1
kind: Node
metadata: {name: twin}
spec: {podCIDR: 10.42.0.0/25, podCIDRs: [10.42.0.0/25]}
";
    let refused = lab.kubectl(&["create", "-f", "-"], node);
    assert_eq!(refused.code, 1, "{}", refused.stdout);
    assert!(refused.stderr.contains("spec.podCIDRs[0]") && refused.stderr.contains("node-1"), "{}", refused.stderr);
    let slice = "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-typo, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: tcp, port: 7070}]
endpoints: [{addresses: [127.0.0.1]}]
";
    let made = lab.kubectl(&["create", "--validate=false", "-f", "-"], slice);
    assert_eq!(made.code, 1, "{}", made.stdout);
    assert!(made.stderr.contains("endpoints[0].addresses[0]: Invalid value: \"127.0.0.1\""), "{}", made.stderr);
    assert_eq!(lab.ask("doctor", &[]).code, 0);
    let done = lab.exec("deploy/cart", &ASK);
    assert_eq!((done.code, done.stdout.as_str()), (0, "hello\n"), "{}", done.stderr);
    lab.assert_as_planned();
}
