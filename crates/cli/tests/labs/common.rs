//! Starts the built binary, looks at what it made, and takes down what a test brought up, also when
//! it failed.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// The binary that cargo built for these tests.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_portolan");

/// How long anything may take that is not a matter of moments.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Four pods on all nodes, TCP and UDP on one port.
pub(crate) const CART: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart}
spec:
  replicas: 4
  selector: {matchLabels: {app: cart}}
  template:
    metadata: {labels: {app: cart}}
    spec: {containers: [{name: server, image: x, ports: [{containerPort: 7070}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: cart}
  ports: [{name: tcp, port: 7070}, {name: udp, port: 7070, protocol: UDP}]
";

/// Asks the Service `cart` by name from a pod.
pub(crate) const ASK: [&str; 3] = ["bash", "-c", "exec 3<>/dev/tcp/cart/7070 && echo hello >&3 && head -n 1 <&3"];

/// A lab of a test, by a name that no other test has.
pub(crate) struct TestLab {
    directory: PathBuf,
    pub(crate) name: String,
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A pod's interface, as its node's agent knows it.
#[derive(Debug, Clone)]
pub(crate) struct PodInterface {
    pub(crate) pod: String,
    pub(crate) network: PathBuf,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) host_interface: String,
}

impl TestLab {
    /// A name, or nothing if this machine cannot run labs; says why then.
    pub(crate) fn new() -> Option<TestLab> {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: labs need root");
            return None;
        }
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // Apart from the user's own labs. Short: a socket's path has at most 107 bytes (unix(7)).
        let directory = PathBuf::from(format!("/run/portolan/test-{process}"));
        std::fs::create_dir_all(&directory).expect("creating the test's directory");
        Some(TestLab { directory, name: format!("t{process}-{number}") })
    }

    /// Runs the binary.
    pub(crate) fn portolan(&self, arguments: &[&str]) -> Done {
        Done::of(self.command().args(arguments))
    }

    /// The binary, in the test's directory of labs.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.env("PORTOLAN_LAB_DIRECTORY", &self.directory);
        command
    }

    /// Runs `portolan lab VERB --name NAME …`.
    pub(crate) fn run(&self, verb: &str, arguments: &[&str]) -> Done {
        Done::of(self.command().args(["lab", verb, "--name", &self.name]).args(arguments))
    }

    /// Runs `portolan VERB … --name NAME`.
    pub(crate) fn ask(&self, verb: &str, arguments: &[&str]) -> Done {
        Done::of(self.command().arg(verb).args(arguments).args(["--name", &self.name]))
    }

    /// Starts `portolan lab VERB --name NAME …` and does not wait for it.
    pub(crate) fn start(&self, verb: &str, arguments: &[&str]) -> Child {
        let mut command = self.command();
        command.args(["lab", verb, "--name", &self.name]).args(arguments);
        command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("starting the binary")
    }

    /// Runs a command in a target of the lab.
    pub(crate) fn exec(&self, target: &str, command: &[&str]) -> Done {
        let mut arguments = vec![target, "--"];
        arguments.extend(command);
        self.run("exec", &arguments)
    }

    /// Runs a shell script in the network namespace of a node, a client or the router; it must succeed.
    pub(crate) fn shell(&self, member: &str, script: &str) -> String {
        let done = self.try_shell(member, script);
        assert_eq!(done.code, 0, "{member}: {script}: {}{}", done.stdout, done.stderr);
        done.stdout
    }

    /// The same, whatever comes of it.
    pub(crate) fn try_shell(&self, member: &str, script: &str) -> Done {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace(member).display())).args(["--", "sh", "-c", script]);
        Done::of(&mut command)
    }

    /// kubectl with the lab's API.
    pub(crate) fn kubectl(&self, arguments: &[&str], input: &str) -> Done {
        let mut command = Command::new("kubectl");
        command.arg("--kubeconfig").arg(self.directory().join("kubeconfig")).args(arguments);
        Done::with_input(&mut command, input)
    }

    /// Writes a manifest to a file.
    pub(crate) fn manifest(&self, text: &str) -> String {
        let file = self.directory.join(format!("{}.yaml", self.name));
        std::fs::write(&file, text).expect("writing a manifest");
        file.display().to_string()
    }

    /// Brings the lab up and waits for it.
    pub(crate) fn up(&self, manifest: &str, arguments: &[&str]) {
        let file = self.manifest(manifest);
        let mut all = vec!["-f", &file, "--wait"];
        all.extend(arguments);
        let done = self.run("up", &all);
        assert_eq!(done.code, 0, "{}", done.stderr);
    }

    /// The directory of the lab.
    pub(crate) fn directory(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// The directory of a node.
    pub(crate) fn node_directory(&self, node: &str) -> PathBuf {
        self.directory().join("nodes").join(node)
    }

    /// The network namespace of a node, a client or the router.
    pub(crate) fn namespace(&self, member: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/portolan-{}-{member}", self.name))
    }

    /// The lab's namespaces that have a name.
    pub(crate) fn namespaces(&self) -> Vec<String> {
        let prefix = format!("portolan-{}-", self.name);
        let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter(|name| name.starts_with(&prefix)).collect()
    }

    /// How many processes were started for the lab.
    pub(crate) fn processes(&self) -> usize {
        // With the slash: the next lab's name may begin with this one's.
        let own = format!("{}/", self.directory().display());
        let named = format!("\0{}\0", self.name);
        let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
        let commands = entries.filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("cmdline")).ok());
        commands.filter(|command| command.contains(&own) || command.contains(&named)).count()
    }

    /// The number in a file of the lab.
    pub(crate) fn number(&self, file: &str) -> i32 {
        let path = self.directory().join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        text.trim().parse().expect("a number")
    }

    /// Kills a process whose number is in a file of the lab; returns the number.
    pub(crate) fn kill(&self, file: &str) -> i32 {
        let number = self.number(file);
        kill(Pid::from_raw(number), Signal::SIGKILL).expect("killing a process");
        number
    }

    /// Kills a node's agent.
    pub(crate) fn kill_agent(&self, node: &str) -> i32 {
        self.kill(&format!("nodes/{node}/agent.pid"))
    }

    /// Kills the supervisor, and waits until everything that it started has died with it.
    pub(crate) fn crash(&self) {
        self.kill("supervisor.pid");
        until("what it started has died with it", || self.processes() == 0);
        // A process that ends has no command line any more when its sockets are still open.
        let nodes = std::fs::read_dir(self.directory().join("nodes")).expect("nodes");
        for node in nodes.map(|node| node.expect("a node").path()) {
            until("its agent answers no more", || UnixStream::connect(node.join("agent.sock")).is_err());
        }
    }

    /// Waits until a node has another agent than this process, which is ready.
    pub(crate) fn await_agent_after(&self, node: &str, process: i32) {
        until("another agent is ready", || {
            self.number(&format!("nodes/{node}/agent.pid")) != process && self.is_agent_ready(node)
        });
    }

    /// Whether a node's agent says that it is ready.
    pub(crate) fn is_agent_ready(&self, node: &str) -> bool {
        is_ready(&self.node_directory(node).join("agent.sock"))
    }

    /// A number among the metrics of a node's agent, by its name with labels.
    pub(crate) fn metric(&self, node: &str, name: &str) -> Option<f64> {
        let metrics = get(&self.node_directory(node).join("agent.sock"), "/metrics").expect("metrics");
        metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// Nothing of the lab is left.
    pub(crate) fn assert_gone(&self) {
        assert_eq!(self.namespaces(), Vec::<String>::new());
        assert!(!self.directory().exists(), "{} is left", self.directory().display());
        // One that was being started when its parent ended sees that itself, and ends a moment later.
        until("no process is left", || self.processes() == 0);
    }

    /// `portolan lab status` as JSON.
    pub(crate) fn status(&self) -> Value {
        self.run("status", &["-o", "json"]).json()
    }

    /// A table of a node's agent as JSON.
    pub(crate) fn table(&self, table: &str, node: &str) -> Vec<Value> {
        let done = self.ask("show", &[table, "--node", node, "-o", "json"]);
        done.json().as_array().expect("rows").clone()
    }

    /// The pod interfaces of a node.
    pub(crate) fn pods_on(&self, node: &str) -> Vec<PodInterface> {
        self.table("attachments", node).iter().map(PodInterface::read).collect()
    }

    /// A pod of a Deployment on a node.
    pub(crate) fn pod_on(&self, node: &str, deployment: &str) -> PodInterface {
        let prefix = format!("{deployment}-");
        let pods = self.pods_on(node);
        let found = pods.iter().find(|pod| pod.pod.starts_with(&prefix));
        found.unwrap_or_else(|| panic!("no pod of {deployment} on {node}: {pods:?}")).clone()
    }

    /// The cluster addresses of a Service, IPv4 first.
    pub(crate) fn service(&self, name: &str) -> Vec<IpAddr> {
        let rows = self.table("services", "node-1");
        let rows = rows.iter().filter(|row| row["name"] == name && row["type"] == "ClusterIP");
        let addresses = rows.filter_map(|row| find(row, "address")?.as_str()?.parse().ok());
        addresses.collect::<BTreeSet<IpAddr>>().into_iter().collect()
    }

    /// Nothing is to change in any node's kernel.
    pub(crate) fn assert_as_planned(&self) {
        let done = self.ask("plan", &[]);
        assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
    }
}

impl Drop for TestLab {
    fn drop(&mut self) {
        if self.directory().exists() {
            if std::thread::panicking() {
                let log = std::fs::read_to_string(self.directory().join("supervisor.log")).unwrap_or_default();
                println!("the supervisor said:\n{log}");
            }
            let _ = self.run("down", &[]);
        }
        let _ = std::fs::remove_file(self.directory.join(format!("{}.yaml", self.name)));
        // Only goes when it is empty: other tests of this process share it.
        let _ = std::fs::remove_dir(&self.directory);
    }
}

impl PodInterface {
    fn read(row: &Value) -> PodInterface {
        let addresses = row["addresses"].as_array().expect("addresses").iter();
        let plain = |prefix: &Value| prefix.as_str()?.split('/').next()?.parse().ok();
        PodInterface {
            pod: row["pod"]["name"].as_str().unwrap_or_default().to_owned(),
            network: row["namespace_path"].as_str().expect("a namespace").into(),
            addresses: addresses.filter_map(plain).collect(),
            host_interface: row["host_interface"].as_str().expect("an interface").to_owned(),
        }
    }
}

impl Done {
    /// Runs a command to its end.
    pub(crate) fn of(command: &mut Command) -> Done {
        let output = command.stdin(Stdio::null()).output();
        Done::from(&output.unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    /// The same with something on standard input.
    pub(crate) fn with_input(command: &mut Command, input: &str) -> Done {
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // A child that does not read its input has its reasons.
        let _ = child.stdin.take().expect("standard input").write_all(input.as_bytes());
        Done::from(&child.wait_with_output().expect("waiting for a command"))
    }

    fn from(output: &Output) -> Done {
        Done {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The output of a command that succeeded, as JSON.
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{}{}", self.stdout, self.stderr);
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

/// Waits for something that another process does.
pub(crate) fn until(what: &str, holds: impl FnMut() -> bool) {
    within_time(what, PATIENCE, holds);
}

/// Waits for something that another process does, and does soon.
pub(crate) fn within_time(what: &str, time: Duration, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + time;
    while !holds() {
        assert!(Instant::now() < end, "not after {time:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs something in a thread that is in a network namespace.
pub(crate) fn within<T: Send>(network: &Path, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            enter(network);
            work()
        });
        entered.join().expect("a thread in a namespace")
    })
}

/// Moves the calling thread into a network namespace.
pub(crate) fn enter(network: &Path) {
    let file = std::fs::File::open(network).unwrap_or_else(|error| panic!("{}: {error}", network.display()));
    setns(file, CloneFlags::CLONE_NEWNET).expect("entering a network namespace");
}

/// Whether the agent behind a socket says that it is ready.
pub(crate) fn is_ready(socket: &Path) -> bool {
    get(socket, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

/// What the agent behind a socket answers, head and body.
pub(crate) fn get(socket: &Path, path: &str) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    let _ = stream.set_read_timeout(Some(PATIENCE));
    write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// The first value with this key, at any depth.
pub(crate) fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map.get(key).or_else(|| map.values().find_map(|inner| find(inner, key))),
        Value::Array(items) => items.iter().find_map(|inner| find(inner, key)),
        _ => None,
    }
}

/// Whether a program is installed; says what is skipped if it is not.
pub(crate) fn has(program: &str, package: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::split_paths(&paths).any(|directory| directory.join(program).is_file());
    if !there {
        println!("skipped: no {program}: install the package {package}");
    }
    there
}
