//! CNI ADD: the wall time of the plugin's process, by turns with Debian's `bridge` and `host-local`.
//!
//! Both are started the same way, from one process that runs inside the peer's network namespace, since
//! `bridge` works in the namespace that it is started in. Ours asks the agent of a lab's node. Both have
//! the same number of pods already; namespaces are made before and deleted after the measurement, because
//! the kernel takes namespaces down in the background.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::lab::Lab;
use super::machine::{Built, NetworkNamespace, Scratch, output};
use super::report::{Goal, Row, median_milliseconds};

/// The argument with which the benchmark starts itself inside the peer's namespace.
pub(super) const INSIDE: &str = "inside-cni";

/// Pods that are there before the first one is measured.
const STANDING: usize = 10;
const WARM_UP: usize = 5;
const ROUNDS: usize = 50;

const SIDES: [&str; 2] = ["ours", "peer"];

/// Where Debian and others put the plugins.
const PEER_DIRECTORIES: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

pub(super) fn run(built: &Built) -> anyhow::Result<Vec<Row>> {
    let peer = PEER_DIRECTORIES.into_iter().find(|it| Path::new(it).join("host-local").exists());
    let peer = peer.context("no plugins to compare with: install Debian's containernetworking-plugins")?;
    let scratch = Scratch::create("cni")?;
    let (lab, _) = Lab::up(&built.portolan, "bench-cni", None, &["--nodes", "1"])?;
    let socket = lab.directory()?.join("nodes/node-1/cni.sock");
    let outside = NetworkNamespace::create("portolan-bench-peer")?;
    // `ip netns exec` gives its command mounts of its own: what is made inside is not seen by the agent.
    let pods: Vec<NetworkNamespace> = (0..STANDING + WARM_UP + ROUNDS)
        .flat_map(|index| SIDES.map(|side| pod_name(side, index)))
        .map(|name| NetworkNamespace::create(&name))
        .collect::<anyhow::Result<_>>()?;
    let inside = output(
        outside
            .command(&std::env::current_exe()?)
            .args(["bench", INSIDE])
            .arg(&built.plugin)
            .arg(&socket)
            .arg(peer)
            .arg(&scratch.0),
    )?;
    drop(pods);
    let medians: Value = serde_json::from_str(&inside)?;
    let get = |name: &str| medians[name].as_f64().with_context(|| format!("no {name}"));
    Ok(vec![
        Row::new(format!("CNI ADD, {STANDING} pods there, median of {ROUNDS}"), get("ours")?, "ms")
            .beside(get("peer")?)
            .goal(Goal::OfPeer(0.2)),
        Row::new("CNI DEL", get("ours-delete")?, "ms").beside(get("peer-delete")?),
    ])
}

/// The name of a pod's namespace, and its container's.
fn pod_name(side: &str, index: usize) -> String {
    format!("portolan-bench-{side}-{index}")
}

/// One plugin and how it is asked.
struct Plugin {
    name: &'static str,
    program: PathBuf,
    configuration: String,
    path: String,
}

impl Plugin {
    fn call(&self, verb: &str, pod: usize) -> anyhow::Result<Duration> {
        let container = pod_name(self.name, pod);
        let mut command = Command::new(&self.program);
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &container)
            .env("CNI_NETNS", format!("/run/netns/{container}"))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let begin = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(self.configuration.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let time = begin.elapsed();
        if !output.status.success() {
            bail!("{} {verb}: {}", self.name, String::from_utf8_lossy(&output.stdout).trim());
        }
        Ok(time)
    }
}

/// Runs inside the peer's namespace and prints the medians.
#[expect(clippy::print_stdout, reason = "this is the measurement's output")]
pub(super) fn inside(arguments: &[String]) -> anyhow::Result<()> {
    let [plugin, socket, peer, scratch] = arguments else { bail!("usage: {INSIDE} PLUGIN SOCKET PEER SCRATCH") };
    let ours = json!({"cniVersion": "1.0.0", "name": "bench", "type": "portolan-cni", "socket": socket});
    let theirs = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "hairpinMode": true, "ipMasq": false,
        "ipam": {
            "type": "host-local", "dataDir": format!("{scratch}/host-local"),
            "ranges": [[{"subnet": "10.42.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
        },
    });
    let plugins = [
        Plugin { name: SIDES[0], program: plugin.into(), configuration: ours.to_string(), path: String::new() },
        Plugin {
            name: SIDES[1],
            program: Path::new(peer).join("bridge"),
            configuration: theirs.to_string(),
            path: peer.clone(),
        },
    ];
    let mut adds = [Vec::new(), Vec::new()];
    let mut deletes = [Vec::new(), Vec::new()];
    for round in 0..STANDING + WARM_UP + ROUNDS {
        for (side, plugin) in plugins.iter().enumerate() {
            let add = plugin.call("ADD", round)?;
            if round < STANDING {
                continue;
            }
            let delete = plugin.call("DEL", round)?;
            if round >= STANDING + WARM_UP {
                adds[side].push(add);
                deletes[side].push(delete);
            }
        }
    }
    for round in 0..STANDING {
        for plugin in &plugins {
            plugin.call("DEL", round)?;
        }
    }
    ensure!(adds.iter().all(|times| times.len() == ROUNDS), "a round is missing");
    println!(
        "{}",
        json!({
            "ours": median_milliseconds(&adds[0]), "peer": median_milliseconds(&adds[1]),
            "ours-delete": median_milliseconds(&deletes[0]), "peer-delete": median_milliseconds(&deletes[1]),
        })
    );
    Ok(())
}
