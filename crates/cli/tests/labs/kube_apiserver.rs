//! A lab's nodes on a real kube-apiserver, if this machine has one: `cargo xtask kube-apiserver` builds it.
//!
//! It comes without controllers: what kube-controller-manager and the scheduler would write (pod
//! prefixes, a pod's node, EndpointSlices), the test writes.

#[path = "../../../../xtask/src/kube_apiserver/process.rs"]
mod process;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use process::{Binaries, Cluster};
use serde_json::{Value, json};

use crate::common::{Done, TestLab, has, until};
use crate::traffic::{Kind, Stream};

/// Serves the API on a Unix socket, until it is dropped.
struct Proxy(Child);

impl Proxy {
    fn start(kubeconfig: &Path, socket: &Path) -> Proxy {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(kubeconfig).arg("proxy").arg(format!("--unix-socket={}", socket.display()));
        let proxy = Proxy(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starting kubectl"));
        until("kubectl serves the API", || std::os::unix::net::UnixStream::connect(socket).is_ok());
        proxy
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// kubectl with all rights; it must succeed.
fn kubectl(cluster: &Cluster, arguments: &[&str], input: &Value) -> String {
    let mut command = Command::new("kubectl");
    command.arg("--kubeconfig").arg(cluster.kubeconfig()).args(arguments);
    let done = Done::with_input(&mut command, &input.to_string());
    assert_eq!(done.code, 0, "kubectl {}: {}", arguments.join(" "), done.stderr);
    done.stdout
}

fn create(cluster: &Cluster, object: &Value) {
    kubectl(cluster, &["create", "--validate=false", "-f", "-"], object);
}

fn with_kind(version: &str, kind: &str, mut object: Value) -> Value {
    object["apiVersion"] = json!(version);
    object["kind"] = json!(kind);
    object
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "cart"}},
        "spec": {"nodeName": node, "containers": [{"name": "server", "image": "x", "ports": [{"containerPort": 7070}]}]},
    })
}

#[test]
fn nodes_follow_a_real_server() {
    let Some(lab) = TestLab::new() else { return };
    let binaries = match Binaries::find() {
        Ok(binaries) => binaries,
        Err(missing) => {
            println!("skipped: {missing}");
            return;
        }
    };
    if !has("kubectl", "kubernetes-client") {
        return;
    }
    let directory = lab.directory().with_file_name(format!("api-{}", lab.name));
    let mut cluster = Cluster::start(binaries, &directory).expect("a real server");
    let socket = directory.join("proxy.sock");
    let proxy = Proxy::start(&cluster.kubeconfig(), &socket);
    let up = lab.run("up", &["--nodes", "2", "--api-socket", socket.to_str().unwrap()]);
    assert_eq!(up.code, 0, "{}", up.stderr);

    // Without pod prefixes an agent waits, and says for what.
    assert!(!lab.is_agent_ready("node-1"));
    for (node, prefix) in [("node-1", "10.42.1.0/24"), ("node-2", "10.42.2.0/24")] {
        let prefixes = json!({"spec": {"podCIDR": prefix, "podCIDRs": [prefix]}}).to_string();
        kubectl(&cluster, &["patch", "node", node, "-p", &prefixes], &Value::Null);
        until("the agent is ready", || lab.is_agent_ready(node));
    }
    let (one, two) = answers_on_both_nodes(&lab, &cluster);

    // A node whose pods would be another's has no routes, and is named.
    let twin = json!({"metadata": {"name": "twin"}, "spec": {"podCIDR": "10.42.2.0/25", "podCIDRs": ["10.42.2.0/25"]}});
    create(&cluster, &with_kind("v1", "Node", twin));
    until("the overlap is told", || lab.ask("doctor", &[]).stdout.contains("Node twin: "));
    let text = lab.ask("doctor", &[]).stdout;
    assert!(text.contains("10.42.2.0/25") && text.contains("node-2"), "{text}");
    kubectl(&cluster, &["delete", "node", "twin"], &Value::Null);
    until("the overlap is gone", || lab.ask("doctor", &[]).code == 0);

    // While the server is away, everything stays; when it is back, changes come through again.
    let before = lab.shell("node-1", "nft list ruleset; ip route; bridge fdb show dev flannel.1");
    let stream = Stream::start(Kind::Connections, &lab.namespace("node-1"), SocketAddr::new(one, 80));
    cluster.kill_server();
    stream.await_more(50);
    assert_eq!(lab.shell("node-1", "nft list ruleset; ip route; bridge fdb show dev flannel.1"), before);
    cluster.start_server().expect("the server again");
    stream.await_more(50);
    stream.finish();
    let slice = json!({"endpoints": [{"addresses": [two.to_string()], "nodeName": "node-2"}]}).to_string();
    kubectl(&cluster, &["patch", "endpointslice", "cart-x", "--type=merge", "-p", &slice], &Value::Null);
    until("one endpoint is left", || lab.table("endpoints", "node-1").len() == 1);
    kubectl(&cluster, &["delete", "service", "cart"], &Value::Null);
    until("the Service is gone", || lab.table("services", "node-1").iter().all(|row| row["name"] != "cart"));

    assert_eq!(lab.run("down", &[]).code, 0);
    lab.assert_gone();
    drop(proxy);
    drop(cluster);
    let _ = std::fs::remove_dir_all(&directory);
}

/// Runs two pods behind a Service; returns the Service's address and the second pod's.
fn answers_on_both_nodes(lab: &TestLab, cluster: &Cluster) -> (IpAddr, IpAddr) {
    create(cluster, &pod("cart-1", "node-1"));
    create(cluster, &pod("cart-2", "node-2"));
    kubectl(cluster, &["wait", "--for=condition=Ready", "pod", "--all", "--timeout=30s"], &Value::Null);
    let text = |arguments: &[&str]| kubectl(cluster, arguments, &Value::Null).parse::<IpAddr>().expect("an address");
    let pods = ["cart-1", "cart-2"].map(|name| text(&["get", "pod", name, "-o", "jsonpath={.status.podIP}"]));
    assert!(pods[0].to_string().starts_with("10.42.1.") && pods[1].to_string().starts_with("10.42.2."), "{pods:?}");
    let spec = json!({"selector": {"app": "cart"}, "ports": [{"port": 80, "targetPort": 7070}]});
    create(cluster, &json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "cart"}, "spec": spec}));
    let endpoint = |index: usize, node: &str| json!({"addresses": [pods[index].to_string()], "nodeName": node});
    create(
        cluster,
        &json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "cart-x", "labels": {"kubernetes.io/service-name": "cart"}},
            "addressType": "IPv4", "ports": [{"port": 7070, "protocol": "TCP"}],
            "endpoints": [endpoint(0, "node-1"), endpoint(1, "node-2")],
        }),
    );
    let service = text(&["get", "service", "cart", "-o", "jsonpath={.spec.clusterIP}"]);
    for node in ["node-1", "node-2"] {
        until("both endpoints are known", || lab.table("endpoints", node).len() == 2);
        let pod = lab.pod_on(node, "cart").network;
        for from in [pod, lab.namespace(node)] {
            for to in [SocketAddr::new(service, 80), SocketAddr::new(pods[0], 7070), SocketAddr::new(pods[1], 7070)] {
                let stream = Stream::start(Kind::Connections, &from, to);
                stream.await_more(10);
                stream.finish();
            }
        }
    }
    lab.assert_as_planned();
    (service, pods[1])
}
