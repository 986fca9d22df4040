//! A real `portolan agent` process that reads a large cluster: how soon it is ready, and what it holds.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::json;

use super::feed;
use super::machine::{Built, NetworkNamespace, Scratch, output};
use super::report::{Goal, Row};

const PATIENCE: Duration = Duration::from_mins(2);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// An agent that is killed with this value.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn run(built: &Built, services: u32, endpoints: u32) -> anyhow::Result<Vec<Row>> {
    let scratch = Scratch::create("agent")?;
    let namespace = NetworkNamespace::create("portolan-bench-agent")?;
    for arguments in [
        &["link", "set", "lo", "up"][..],
        &["link", "add", "uplink0", "type", "veth", "peer", "name", "uplink1"],
        &["link", "set", "uplink0", "up"],
        &["link", "set", "uplink1", "up"],
        &["address", "add", "192.0.2.1/24", "dev", "uplink0"],
    ] {
        output(namespace.command(Path::new("ip")).args(arguments))?;
    }
    let api = scratch.0.join("api.sock");
    feed::serve(&api, feed::Cluster::new(services, endpoints))?;
    let config = scratch.0.join("agent.yaml");
    let content = json!({
        "node": "node-1", "kubernetes": {"socket": api}, "clusterPrefixes": ["10.0.0.0/9"],
        "servicePrefixes": ["10.128.0.0/12"], "stateDirectory": scratch.0.join("state"),
        "runtimeDirectory": &scratch.0,
    });
    fs::write(&config, content.to_string())?;
    let what = |text: &str| format!("agent, {services} Services × {endpoints}: {text}");
    let (cold, cold_memory) = start(built, &namespace, &config, &scratch.0)?;
    // The tables are still there, as after a kill -9: it reads them back and changes nothing.
    let (again, again_memory) = start(built, &namespace, &config, &scratch.0)?;
    Ok(vec![
        Row::new(what("start → ready"), cold.as_secs_f64(), "s"),
        Row::new(what("peak memory"), cold_memory, "MiB").goal(Goal::Below(100.0)),
        Row::new(what("start again → ready, all adopted"), again.as_secs_f64(), "s"),
        Row::new(what("start again, peak memory"), again_memory, "MiB").goal(Goal::Below(100.0)),
    ])
}

/// Starts the agent, waits until it is ready, and returns the time and the most memory that it held.
pub(super) fn start(
    built: &Built,
    namespace: &NetworkNamespace,
    config: &Path,
    directory: &Path,
) -> anyhow::Result<(Duration, f64)> {
    let log = fs::File::create(directory.join("agent.log"))?;
    let mut command: Command = namespace.command(&built.portolan);
    command.args(["agent", "--config"]).arg(config).stdout(Stdio::null()).stderr(log);
    let begin = Instant::now();
    // `ip netns exec` becomes the program, so the child is the agent.
    let mut agent = Agent(command.spawn()?);
    let socket = directory.join("agent.sock");
    while !is_ready(&socket) {
        if let Some(status) = agent.0.try_wait()? {
            let log = fs::read_to_string(directory.join("agent.log")).unwrap_or_default();
            bail!("the agent ended with {status}: {}", log.lines().last().unwrap_or_default());
        }
        if begin.elapsed() > PATIENCE {
            let log = fs::read_to_string(directory.join("agent.log")).unwrap_or_default();
            bail!("the agent is not ready: {}", log.lines().last().unwrap_or_default());
        }
        std::thread::sleep(LOOK_AGAIN_AFTER);
    }
    let time = begin.elapsed();
    let status = fs::read_to_string(format!("/proc/{}/status", agent.0.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok((time, kilobytes / 1024.0))
}

fn is_ready(socket: &Path) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = UnixStream::connect(socket)?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.starts_with("HTTP/1.1 200"))
    };
    ask().unwrap_or(false)
}
