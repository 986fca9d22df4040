//! Whole labs with real traffic.

use serde_json::Value;

use crate::common::{ASK, CART, TestLab, until};

#[test]
fn a_lab_comes_up_answers_and_goes_without_a_trace() {
    let Some(lab) = TestLab::new() else { return };
    lab.up(CART, &["--nodes", "2", "--ip-family", "dual"]);

    let status: Value = serde_json::from_str(&lab.run("status", &["-o", "json"]).stdout).expect("JSON");
    assert_eq!(status["name"], lab.name.as_str());
    assert_eq!(status["nodes"][1]["addresses"], serde_json::json!(["192.168.64.12", "fd00:64::12"]));
    assert_eq!(status["clients"][1]["name"], "server-1");
    let pods = status["pods"].as_array().expect("pods");
    assert_eq!(pods.len(), 6, "{pods:?}");
    assert!(pods.iter().all(|pod| pod["ready"] == true && pod["addresses"].as_array().map(Vec::len) == Some(2)));

    let done = lab.exec("deploy/cart", &ASK);
    assert_eq!((done.code, done.stdout.as_str()), (0, "hello\n"), "{}", done.stderr);
    let done = lab.exec("deploy/cart", &["cat", "/proc/sys/kernel/hostname", "/etc/resolv.conf"]);
    assert!(done.stdout.starts_with("cart-"), "{}", done.stdout);
    assert!(done.stdout.contains("nameserver 10.96.0.10\n"), "{}", done.stdout);
    assert_eq!(lab.exec("node/node-1", &["sh", "-c", "exit 7"]).code, 7);
    let missing = lab.exec("pod/moon", &["true"]);
    assert_eq!(missing.code, 1);
    assert!(missing.stderr.contains("has no pod/default/moon"), "{}", missing.stderr);

    assert_eq!(lab.run("down", &[]).code, 0);
    lab.assert_gone();
}

#[test]
fn an_agent_that_was_killed_is_started_again_and_traffic_goes_on_meanwhile() {
    let Some(lab) = TestLab::new() else { return };
    lab.up(CART, &["--nodes", "1"]);
    let agent = lab.kill_agent("node-1");
    let done = lab.exec("deploy/cart", &ASK);
    assert_eq!((done.code, done.stdout.as_str()), (0, "hello\n"), "{}", done.stderr);
    lab.await_agent_after("node-1", agent);
}

#[test]
fn a_pod_that_cannot_run_says_why_and_the_rest_runs() {
    let Some(lab) = TestLab::new() else { return };
    let conflict = "
apiVersion: v1
kind: Pod
metadata: {name: crowded}
spec:
  containers:
  - {name: a, image: x, ports: [{containerPort: 80}]}
  - {name: b, image: x, ports: [{containerPort: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: broken, annotations: {portolan.dev/run: 'sh -c \"echo went wrong; exit 3\"'}}
spec: {containers: [{name: a, image: x}]}
---
apiVersion: v1
kind: Pod
metadata: {name: fine, annotations: {portolan.dev/run: 'sleep 1000'}}
spec: {containers: [{name: a, image: x}]}
";
    let file = lab.manifest(conflict);
    assert_eq!(lab.run("up", &["-f", &file, "--nodes", "1"]).code, 0);
    let ready = |name: &str| {
        let status: Value = serde_json::from_str(&lab.run("status", &["-o", "json"]).stdout).expect("JSON");
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        pods.iter().any(|pod| pod["name"] == name && pod["ready"] == true)
    };
    until("the pod `fine` is ready", || ready("fine"));
    let log = || std::fs::read_to_string(lab.directory().join("supervisor.log")).unwrap_or_default();
    until("the reasons are told", || {
        log().contains("containers `a` and `b` both have containerPort 80") && log().contains("went wrong")
    });
    assert!(!ready("crowded"));
}
