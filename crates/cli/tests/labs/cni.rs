//! The plugin's process against a node's agent, call by call, as a container runtime makes them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::common::{Done, PATIENCE, PROGRAM, TestLab, has, is_ready, until, within};

/// A runtime's view of one network.
struct Runtime {
    socket: PathBuf,
    version: &'static str,
}

/// A network namespace with a name, until it is dropped.
struct Sandbox(String);

impl Sandbox {
    fn new(lab: &TestLab, name: &str) -> Sandbox {
        let name = format!("portolan-{}-sandbox-{name}", lab.name);
        let made = Done::of(Command::new("ip").args(["netns", "add", &name]));
        assert_eq!(made.code, 0, "{}", made.stderr);
        Sandbox(name)
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    fn shell(&self, script: &str) -> Done {
        let network = format!("--net={}", self.path().display());
        Done::of(Command::new("nsenter").args([&network, "--", "sh", "-c", script]))
    }

    fn remove(&self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if self.path().exists() {
            self.remove();
        }
    }
}

impl Runtime {
    fn of(lab: &TestLab, node: &str, version: &'static str) -> Runtime {
        Runtime { socket: lab.node_directory(node).join("cni.sock"), version }
    }

    fn call(&self, verb: &str, container: &str, network: &Path, interface: &str, more: &Value) -> Done {
        let mut configuration = json!({
            "cniVersion": self.version, "name": "by-hand", "type": "portolan-cni", "socket": self.socket,
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            configuration[key] = value.clone();
        }
        let mut command = Command::new(PROGRAM);
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", container).env("CNI_NETNS", network);
        command.env("CNI_IFNAME", interface).env("CNI_PATH", "/nowhere");
        Done::with_input(&mut command, &configuration.to_string())
    }

    fn on(&self, verb: &str, sandbox: &Sandbox, more: &Value) -> Done {
        self.call(verb, &sandbox.0, &sandbox.path(), "eth0", more)
    }

    fn add(&self, sandbox: &Sandbox) -> Value {
        self.on("ADD", sandbox, &json!({})).json()
    }

    fn delete(&self, sandbox: &Sandbox) {
        assert_quiet(&self.on("DEL", sandbox, &json!({})));
    }
}

fn assert_quiet(done: &Done) {
    assert_eq!((done.code, done.stdout.as_str()), (0, ""), "{}", done.stderr);
}

/// The call failed with this code of the specification.
fn assert_refused(done: &Done, code: u64) -> String {
    assert_eq!(done.code, 1, "{}{}", done.stdout, done.stderr);
    let error: Value = serde_json::from_str(&done.stdout).expect("an error on standard output");
    assert_eq!(error["code"], code, "{error}");
    assert!(error["msg"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
    error.to_string()
}

fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().expect("addresses").iter();
    let plain = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
    ips.filter_map(plain).collect()
}

/// What the agent's records and the node's kernel hold: equal before and after means nothing leaked.
fn held(lab: &TestLab) -> (BTreeSet<String>, Vec<String>, Vec<String>) {
    let records = std::fs::read_dir(lab.node_directory("node-1").join("state/attachments")).expect("records");
    let records = records.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let mut known: Vec<String> = lab.pods_on("node-1").iter().map(|pod| format!("{:?}", pod.addresses)).collect();
    known.sort();
    let links = lab.shell("node-1", "ip -o link show | grep -o 'veth[0-9a-f]*' | sort");
    (records, known, links.lines().map(str::to_owned).collect())
}

#[test]
fn every_verb_of_every_version() {
    let Some(lab) = TestLab::new() else { return };
    lab.up("", &["--nodes", "1", "--ip-family", "dual"]);
    let before = held(&lab);
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let runtime = Runtime::of(&lab, "node-1", version);
        let sandbox = Sandbox::new(&lab, "one");
        let versions = runtime.on("VERSION", &sandbox, &json!({})).json();
        assert_eq!(versions["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));

        let result = runtime.add(&sandbox);
        assert_eq!(result["cniVersion"], version);
        assert_eq!(addresses(&result).len(), 2, "{result}");
        assert_eq!(result["ips"][0]["version"], if version.starts_with('0') { json!("4") } else { Value::Null });
        let shown = sandbox.shell("ip -o addr show dev eth0; ip route; ip -6 route").stdout;
        for ip in result["ips"].as_array().unwrap() {
            assert!(shown.contains(ip["address"].as_str().unwrap()), "{shown}");
        }
        assert_eq!(shown.matches("default via").count(), 2, "{shown}");

        // A runtime that did not get the first answer asks again, and gets the same.
        assert_eq!(runtime.add(&sandbox), result);
        checks(&runtime, &sandbox, &result);
        let status = runtime.on("STATUS", &sandbox, &json!({}));
        if version == "1.1.0" {
            assert_quiet(&status);
            collects_garbage(&lab, &runtime, &sandbox);
        } else {
            assert_refused(&status, 1);
        }
        runtime.delete(&sandbox);
        assert!(!sandbox.shell("ip -o link show").stdout.contains("eth0"));
        runtime.delete(&sandbox);
        assert_eq!(held(&lab), before, "{version}");
    }
}

fn checks(runtime: &Runtime, sandbox: &Sandbox, result: &Value) {
    let check = || runtime.on("CHECK", sandbox, &json!({"prevResult": result}));
    if runtime.version == "0.3.1" {
        assert_refused(&check(), 1);
        return;
    }
    assert_quiet(&check());
    // Only what the node cannot mend: the container's own side.
    sandbox.shell("ip route del default");
    let told = assert_refused(&check(), 101);
    assert!(told.contains("default") || told.contains("0.0.0.0/0"), "{told}");
    let gateway = result["ips"][0]["gateway"].as_str().unwrap();
    sandbox.shell(&format!("ip route add default via {gateway}"));
    assert_quiet(&check());
    let mut other = result.clone();
    other["ips"][0]["address"] = json!("10.42.0.250/24");
    assert_refused(&runtime.on("CHECK", sandbox, &json!({"prevResult": other})), 101);
}

fn collects_garbage(lab: &TestLab, runtime: &Runtime, kept: &Sandbox) {
    let forgotten = Sandbox::new(lab, "forgotten");
    let address = addresses(&runtime.add(&forgotten))[0];
    let known = |address: IpAddr| lab.pods_on("node-1").iter().any(|pod| pod.addresses.contains(&address));
    assert!(known(address));
    // A forgotten field must not remove every pod.
    assert_refused(&runtime.on("GC", kept, &json!({})), 7);
    let valid = json!({"cni.dev/valid-attachments": [{"containerID": kept.0, "ifname": "eth0"}]});
    assert_quiet(&runtime.on("GC", kept, &valid));
    assert!(!known(address));
    assert!(!forgotten.shell("ip -o link show").stdout.contains("eth0"));
    assert!(kept.shell("ip -o link show").stdout.contains("eth0"));
}

#[test]
fn calls_that_go_wrong_leave_nothing() {
    let Some(lab) = TestLab::new() else { return };
    lab.up("", &["--nodes", "1"]);
    let before = held(&lab);
    let runtime = Runtime::of(&lab, "node-1", "1.1.0");
    let nothing = json!({});

    let sandbox = Sandbox::new(&lab, "taken");
    sandbox.shell("ip link add eth0 type bridge");
    let told = assert_refused(&runtime.on("ADD", &sandbox, &nothing), 103);
    assert!(told.contains("eth0"), "{told}");
    assert_eq!(held(&lab), before);
    runtime.delete(&sandbox);
    assert!(sandbox.shell("ip -o link show").stdout.contains("eth0"), "another's interface was removed");

    let gone = Sandbox::new(&lab, "gone");
    runtime.add(&gone);
    gone.remove();
    runtime.delete(&gone);
    runtime.delete(&gone);
    assert_eq!(held(&lab), before);
    let told = assert_refused(&runtime.on("ADD", &gone, &nothing), 4);
    assert!(told.contains(&gone.0), "{told}");
    assert_eq!(held(&lab), before);

    let moved = Sandbox::new(&lab, "moved");
    runtime.add(&moved);
    let other = Sandbox::new(&lab, "other");
    assert_refused(&runtime.call("ADD", &moved.0, &other.path(), "eth0", &nothing), 100);
    assert_refused(&runtime.call("ADD", &other.0, &other.path(), "not/a/name", &nothing), 4);
    assert_refused(&runtime.call("ADD", "", &other.path(), "eth0", &nothing), 4);
    assert_refused(&runtime.on("ADD", &other, &json!({"cniVersion": "9.9.9"})), 1);
    runtime.delete(&moved);
    assert_eq!(held(&lab), before);
}

/// A node of the lab's cluster that is not one of the lab's own, with room for few pods.
struct SmallNode {
    _sandbox: Sandbox,
    directory: PathBuf,
    agent: std::process::Child,
}

impl SmallNode {
    fn start(lab: &TestLab, prefix: &str) -> SmallNode {
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "small"}, "spec": {"podCIDR": prefix, "podCIDRs": [prefix]},
        });
        let made = lab.kubectl(&["create", "-f", "-"], &node.to_string());
        assert_eq!(made.code, 0, "{}", made.stderr);
        let sandbox = Sandbox::new(lab, "small");
        sandbox.shell("ip link add eth0 type bridge && ip addr add 192.168.64.99/24 dev eth0 && ip link set eth0 up");
        let directory = lab.directory().join("small");
        std::fs::create_dir_all(&directory).expect("a directory");
        let configuration = json!({
            "node": "small", "kubernetes": {"socket": lab.directory().join("api.sock")}, "fabric": "host-gw",
            "clusterPrefixes": ["10.42.0.0/16"], "servicePrefixes": ["10.96.0.0/16"], "underlayInterface": "eth0",
            "stateDirectory": directory.join("state"), "runtimeDirectory": directory,
        });
        std::fs::write(directory.join("agent.yaml"), configuration.to_string()).expect("a configuration");
        let log = std::fs::File::create(directory.join("agent.log")).expect("a log");
        let agent = Command::new("nsenter")
            .arg(format!("--net={}", sandbox.path().display()))
            .args([PROGRAM, "agent", "--config"])
            .arg(directory.join("agent.yaml"))
            .stderr(log)
            .spawn()
            .expect("starting an agent");
        let node = SmallNode { _sandbox: sandbox, directory, agent };
        until("the small node's agent is ready", || is_ready(&node.directory.join("agent.sock")));
        node
    }
}

impl Drop for SmallNode {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

#[test]
fn a_node_without_free_addresses_says_so_until_one_is_free() {
    let Some(lab) = TestLab::new() else { return };
    if !has("kubectl", "kubernetes-client") {
        return;
    }
    lab.up("", &["--nodes", "1"]);
    // Eight addresses: network, gateway and broadcast are not for pods.
    let node = SmallNode::start(&lab, "10.42.200.0/29");
    let runtime = Runtime { socket: node.directory.join("cni.sock"), version: "1.1.0" };
    let sandboxes: Vec<Sandbox> = (0..5).map(|number| Sandbox::new(&lab, &number.to_string())).collect();
    let given: BTreeSet<IpAddr> = sandboxes.iter().flat_map(|sandbox| addresses(&runtime.add(sandbox))).collect();
    let expected: BTreeSet<IpAddr> = (2..7).map(|host| IpAddr::from([10, 42, 200, host])).collect();
    assert_eq!(given, expected);

    let late = Sandbox::new(&lab, "late");
    let told = assert_refused(&runtime.on("ADD", &late, &json!({})), 102);
    assert!(told.contains("10.42.200.0/29"), "{told}");
    assert!(!late.shell("ip -o link show").stdout.contains("eth0"));
    assert_refused(&runtime.on("STATUS", &late, &json!({})), 50);
    let freed = addresses(&runtime.add(&sandboxes[3]));
    runtime.delete(&sandboxes[3]);
    assert_quiet(&runtime.on("STATUS", &late, &json!({})));
    assert_eq!(addresses(&runtime.add(&late)), freed);
    let answer = within(&late.path(), || TcpStream::connect_timeout(&"10.42.200.1:1".parse().unwrap(), PATIENCE));
    assert_eq!(answer.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused, "its gateway answers");
}

/// How many pods come and go, and after how many calls the agent is killed.
const PODS: usize = 100;
const CALLS_PER_KILL: usize = 40;

#[test]
fn no_address_is_given_twice_or_lost_when_the_agent_is_killed_between_calls() {
    let Some(lab) = TestLab::new() else { return };
    lab.up("", &["--nodes", "1"]);
    let before = held(&lab);
    let runtime = Runtime::of(&lab, "node-1", "1.1.0");
    let mut owners: BTreeMap<IpAddr, String> = BTreeMap::new();
    for pod in lab.pods_on("node-1") {
        owners.extend(pod.addresses.iter().map(|address| (*address, pod.pod.clone())));
    }
    let mut open: Vec<(Sandbox, Vec<IpAddr>)> = Vec::new();
    let mut kills = 0;
    for number in 0..PODS {
        let sandbox = Sandbox::new(&lab, &number.to_string());
        // In the midst of a call, not between two of them.
        let is_killed = number * 2 % CALLS_PER_KILL == 0;
        let result = std::thread::scope(|scope| {
            let call = scope.spawn(|| repeat(|| runtime.on("ADD", &sandbox, &json!({}))));
            if is_killed {
                kills += 1;
                lab.kill_agent("node-1");
            }
            call.join().expect("a call").json()
        });
        let given = addresses(&result);
        for address in &given {
            assert_eq!(owners.insert(*address, sandbox.0.clone()), None, "{address} is given twice");
        }
        open.push((sandbox, given));
        // Every second pod lives on for a while, so that addresses of many are held.
        if number % 2 == 1 {
            let (sandbox, given) = open.swap_remove(number % open.len());
            assert_quiet(&repeat(|| runtime.on("DEL", &sandbox, &json!({}))));
            given.iter().for_each(|address| drop(owners.remove(address)));
        }
    }
    assert_eq!(kills, 5);
    for (sandbox, _) in &open {
        assert_quiet(&repeat(|| runtime.on("DEL", sandbox, &json!({}))));
    }
    until("the agent is ready", || lab.is_agent_ready("node-1"));
    assert_eq!(held(&lab), before);
    lab.assert_as_planned();
}

/// Calls until the agent answers, as a runtime does after "try again later".
fn repeat(call: impl Fn() -> Done) -> Done {
    let end = Instant::now() + PATIENCE;
    loop {
        let done = call();
        let is_later = done.code == 1 && done.stdout.contains("\"code\":11");
        if !is_later || Instant::now() > end {
            return done;
        }
    }
}
