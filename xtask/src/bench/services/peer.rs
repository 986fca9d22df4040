//! A real kube-proxy 1.20.2 in its iptables mode, on the legacy backend, which is the faster one.
//!
//! Its syncs are measured by its own metrics: neither the way of a change from the API to it counts, nor how long it
//! waits before it begins. What it holds at most is read from `/proc`.
#![expect(clippy::print_stdout, reason = "what runs inside a namespace answers by its output")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::super::feed;
use super::bed::Bed;
use super::connect::{self, Speed};
use crate::kube_proxy::process::{self, Api, KubeProxy, NODES, SERVICES, SLICES};

/// The unit of times in `/proc`.
const TICKS_PER_SECOND: f64 = 100.0;

const CHANGES: u32 = 20;
const PATIENCE: Duration = Duration::from_mins(5);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// What was measured.
pub(super) struct Peer {
    /// From the start of the process to the end of its first sync.
    pub(super) start_seconds: f64,
    /// The first sync itself.
    pub(super) first_sync_seconds: f64,
    pub(super) change_p50_ms: f64,
    pub(super) change_p99_ms: f64,
    /// Its processor time for a change, its programs' included.
    pub(super) change_cpu_ms: f64,
    /// The memory that it gained by the changes.
    pub(super) grown_mib: f64,
    pub(super) memory_mib: f64,
    pub(super) connections: Vec<(&'static str, Speed)>,
}

/// Starts it in a bed of its own, changes endpoints, and then lets a client connect.
pub(super) fn measure(services: u32, endpoints: u32) -> anyhow::Result<Peer> {
    let bed = Bed::build("peer")?;
    let programs = bed.scratch.0.join("programs");
    std::fs::create_dir_all(&programs)?;
    for name in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            symlink(format!("/usr/sbin/{name}-legacy{suffix}"), programs.join(format!("{name}{suffix}")))?;
        }
    }
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = bed.node.command(&std::env::current_exe()?);
    command.args(["bench", super::INSIDE, "peer"]).arg(&bed.scratch.0);
    command.args([services.to_string(), endpoints.to_string()]);
    command.env("PATH", format!("{}:{path}", programs.display())).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
    let measured: Value = serde_json::from_str(&line).context("kube-proxy could not be measured")?;
    let connections = bed.connect(services, endpoints, connect::ROUNDS);
    // It goes on until its input ends.
    drop(child.stdin.take());
    child.wait()?;
    let get = |name: &str| measured[name].as_f64().with_context(|| format!("no {name}"));
    Ok(Peer {
        start_seconds: get("start_seconds")?,
        first_sync_seconds: get("first_sync_seconds")?,
        change_p50_ms: get("change_p50_ms")?,
        change_p99_ms: get("change_p99_ms")?,
        change_cpu_ms: get("change_cpu_ms")?,
        grown_mib: get("grown_mib")?,
        memory_mib: get("memory_mib")?,
        connections: connections?,
    })
}

/// The part that runs in the node's namespace.
pub(super) fn inside(directory: &Path, services: u32, endpoints: u32) -> anyhow::Result<()> {
    let binary = process::find().map_err(anyhow::Error::msg)?;
    let api = Api::start()?;
    let cluster = feed::Cluster::new(services, endpoints);
    let mut slices = put_all(&api, &cluster)?;
    let fields = "mode: iptables\nbindAddress: 192.0.2.1\nclusterCIDR: \"10.0.0.0/9\"\n\
                  iptables: {minSyncPeriod: 0s, syncPeriod: 1h}\n";
    let begin = Instant::now();
    let mut proxy = KubeProxy::start(&binary, &api, &directory.join("kube-proxy"), "node-1", fields)?;
    let first = await_sync(&mut proxy, &directory.join("kube-proxy"), 1)?;
    let start = begin.elapsed();
    let mut milliseconds = Vec::new();
    let mut before = first;
    let process = proxy.child.id();
    let (cpu_before, memory_before) = (cpu_seconds(process)?, memory_mib(process, "VmRSS:")?);
    for change in 0..CHANGES {
        let index = change.wrapping_mul(7919) % services;
        let name = format!("service-{index}-abcde");
        let slice = slices.get_mut(&name).context("no such slice")?;
        slice["endpoints"].as_array_mut().context("no endpoints")?.pop();
        api.put(SLICES, &name, &slice.to_string());
        let after = await_sync(&mut proxy, &directory.join("kube-proxy"), before.count + 1)?;
        milliseconds.push((after.seconds - before.seconds) * 1e3 / f64::from(after.count - before.count));
        before = after;
    }
    let cpu = cpu_seconds(process)? - cpu_before;
    milliseconds.sort_by(f64::total_cmp);
    let at = |percent: usize| milliseconds.get((milliseconds.len() * percent / 100).min(milliseconds.len() - 1));
    let report = json!({
        "start_seconds": start.as_secs_f64(), "first_sync_seconds": first.seconds,
        "change_p50_ms": at(50), "change_p99_ms": at(99), "change_cpu_ms": cpu * 1e3 / f64::from(CHANGES),
        "grown_mib": memory_mib(process, "VmRSS:")? - memory_before, "memory_mib": memory_mib(process, "VmHWM:")?,
    });
    println!("{report}");
    // The rules stay while the parent measures.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Gives the API all objects, and returns the slices by name.
fn put_all(api: &Api, cluster: &feed::Cluster) -> anyhow::Result<BTreeMap<String, Value>> {
    let mut slices = BTreeMap::new();
    let tables = [
        (NODES, "v1", "Node", cluster.nodes()),
        (SERVICES, "v1", "Service", cluster.services()),
        (SLICES, "discovery.k8s.io/v1beta1", "EndpointSlice", cluster.slices()),
    ];
    for (table, version, kind, objects) in tables {
        for object in objects {
            let mut object: Value = serde_json::from_str(object)?;
            object["apiVersion"] = json!(version);
            object["kind"] = json!(kind);
            let name = object["metadata"]["name"].as_str().context("no name")?.to_owned();
            api.put(table, &name, &object.to_string());
            if table == SLICES {
                slices.insert(name, object);
            }
        }
    }
    Ok(slices)
}

/// How often it has brought the rules up to date, and how long that took in all.
#[derive(Debug, Clone, Copy)]
struct Syncs {
    count: u32,
    seconds: f64,
}

fn await_sync(proxy: &mut KubeProxy, directory: &Path, count: u32) -> anyhow::Result<Syncs> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(syncs) = syncs().filter(|syncs| syncs.count >= count) {
            return Ok(syncs);
        }
        proxy.check(directory)?;
        if Instant::now() > end {
            bail!("kube-proxy did not sync in {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(LOOK_AGAIN_AFTER);
    }
}

/// Its own metrics; nothing while it does not listen yet.
fn syncs() -> Option<Syncs> {
    let mut stream = TcpStream::connect("127.0.0.1:10249").ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let value = |name: &str| {
        let name = format!("kubeproxy_sync_proxy_rules_duration_seconds_{name} ");
        text.lines().find_map(|line| line.strip_prefix(&name)).map(str::trim)
    };
    Some(Syncs { count: value("count")?.parse().ok()?, seconds: value("sum")?.parse().ok()? })
}

/// What a process holds, or held at most, by the name of the field in proc(5).
fn memory_mib(process: u32, field: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    ensure!(kilobytes > 0.0, "no memory at all");
    Ok(kilobytes / 1024.0)
}

/// The processor time of a process and of the programs that it ran: fields 14 to 17 of its `stat` (proc(5)).
fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let fields = stat.rsplit_once(") ").context("no name in stat")?.1.split_whitespace();
    Ok(fields.skip(11).take(4).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_SECOND)
}
