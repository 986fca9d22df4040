//! A lab whose API server keeps its objects in an etcd.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::{ASK, CART, TestLab, has, until};

/// What etcd says when it serves.
const READY: &str = "ready to serve client requests";

/// How often a port that was free a moment ago may be found taken.
const ATTEMPTS: usize = 5;

/// An etcd on loopback, which ends with its test, and its files too.
struct Etcd {
    directory: PathBuf,
    ports: [u16; 2],
    child: Child,
}

impl Etcd {
    fn start(directory: &Path) -> Etcd {
        for _ in 0..ATTEMPTS {
            let free =
                |_| TcpListener::bind(("127.0.0.1", 0)).expect("a port").local_addr().expect("its number").port();
            let ports = [0, 1].map(free);
            let _ = std::fs::remove_dir_all(directory);
            if let Some(child) = spawn(directory, ports) {
                return Etcd { directory: directory.to_owned(), ports, child };
            }
        }
        panic!("etcd does not start");
    }

    /// Kills it, and starts it again on what it had written.
    fn crash(&mut self) {
        self.child.kill().expect("killing etcd");
        self.child.wait().expect("waiting for its end");
        self.child = spawn(&self.directory, self.ports).expect("etcd starts again");
    }

    fn location(&self) -> String {
        format!("etcd=http://127.0.0.1:{}", self.ports[0])
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Starts it and waits until it serves; nothing if it ends before.
fn spawn(directory: &Path, [client, peer]: [u16; 2]) -> Option<Child> {
    let [client, peer] = [client, peer].map(|port| format!("http://127.0.0.1:{port}"));
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "etcd", "--name", "alone", "--data-dir"]).arg(directory);
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.args(["--initial-cluster", &format!("alone={peer}")]).stderr(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().expect("starting etcd");
    let mut lines = BufReader::new(child.stderr.take().expect("its messages")).lines();
    if lines.any(|line| line.is_ok_and(|line| line.contains(READY))) {
        // What it says from now on is read, or it would wait for its reader.
        std::thread::spawn(move || lines.for_each(drop));
        return Some(child);
    }
    let _ = child.wait();
    None
}

#[test]
fn a_lab_on_etcd_outlives_a_crash_of_it_and_leaves_nothing_in_it() {
    let Some(lab) = TestLab::new() else { return };
    if !has("etcd", "etcd-server") || !has("setpriv", "util-linux") || !has("kubectl", "kubernetes-client") {
        return;
    }
    let files = std::env::temp_dir().join(format!("portolan-test-{}-etcd", lab.name));
    let mut etcd = Etcd::start(&files);
    let store = etcd.location();
    lab.up(CART, &["--nodes", "2", "--store", &store]);
    let client = format!("pod/{}", lab.pod_on("node-1", "cart").pod);
    let asks = |what: &str| until(what, || lab.exec(&client, &ASK).code == 0);
    asks("the Service answers");
    etcd.crash();
    asks("the Service answers after the crash");
    // What is created now goes all the way: API server, etcd, watch, controllers, agents.
    until("the API serves again", || lab.kubectl(&["scale", "deployment/cart", "--replicas=5"], "").code == 0);
    until("the fifth pod is ready", || {
        let ready = ["get", "deployment/cart", "-o", "jsonpath={.status.readyReplicas}"];
        lab.kubectl(&ready, "").stdout.trim() == "5"
    });
    let done = lab.run("down", &[]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    lab.assert_gone();
    // The same name again begins with nothing.
    lab.up("", &["--nodes", "1", "--store", &store]);
    let done = lab.kubectl(&["get", "deployments", "-A", "-o", "name"], "");
    assert!(done.code == 0 && !done.stdout.contains("cart"), "{done:?}");
}

#[test]
fn an_etcd_that_does_not_answer_is_said_and_nothing_is_left() {
    let Some(lab) = TestLab::new() else { return };
    let free = TcpListener::bind(("127.0.0.1", 0)).expect("a port").local_addr().expect("its number");
    let done = lab.run("up", &["--nodes", "1", "--store", &format!("etcd=http://{free}?timeout=1s")]);
    assert_eq!(done.code, 4, "{}", done.stderr);
    assert!(done.stderr.contains(&free.to_string()) && done.stderr.contains("etcd"), "{}", done.stderr);
    lab.assert_gone();
    let done = lab.run("up", &["--store", "etcd=http://127.0.0.1:1?tls=please"]);
    assert_eq!(done.code, 2);
    assert!(done.stderr.contains("the option \"tls\" is not known"), "{}", done.stderr);
}
