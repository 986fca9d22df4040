//! Measures the engine against the real kernel: tables of many Services, cold, and then one endpoint
//! changing at a time. Needs root. Prints one JSON object.
//!
//! `cargo run --release -p portolan-agent --example scale -- SERVICES ENDPOINTS CHANGES [MODE [again|here]]`
//!
//! A mode is that of an agent; `iptables-nft` and `iptables-legacy` choose the backend too. With `again`, another
//! process starts once the tables are there, as a restarted agent does, and the numbers are its. With `here`, all
//! happens in the network namespace of the caller; with tables that are there already it is such a restart.
#![expect(clippy::expect_used, clippy::print_stdout, reason = "a bench that prints its result")]

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use portolan_agent::AgentConfig;
use portolan_agent::metrics::Metrics;
use portolan_agent::node::engine::Engine;
use portolan_agent::node::port::RealKernel;
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Family, ObjectKey, ObjectKind, Port, Protocol};
use portolan_state::{Change, Endpoint, EndpointPort, EndpointSlice, Node, Object, Service, ServicePort, ServiceType};

const CONFIG: &str = "node: node-1
kubernetes: {}
clusterPrefixes: [10.0.0.0/9]
servicePrefixes: [10.128.0.0/12]
underlayInterface: lo
";

/// The unit of times in `/proc`, on every architecture that Linux runs on today.
const TICKS_PER_SECOND: f64 = 100.0;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let texts: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (numbers, mode, start) = match texts.as_slice() {
        [numbers @ .., mode, start @ ("again" | "here")] => (numbers, *mode, Some(*start)),
        [numbers @ .., mode] if numbers.len() == 3 => (numbers, *mode, None),
        numbers => (numbers, "nftables", None),
    };
    let [services, endpoints, changes] = numbers else {
        return Err("usage: scale SERVICES ENDPOINTS CHANGES [MODE [again|here]]".into());
    };
    let (services, endpoints, changes) = (services.parse()?, endpoints.parse()?, changes.parse()?);
    let (mode, backend) = mode.split_once('-').map_or((mode, None), |(mode, backend)| (mode, Some(backend.to_owned())));
    let config = format!("{CONFIG}services: {mode}\n");
    if start == Some("here") {
        println!("{}", measure(&config, services, endpoints, changes)?);
        return Ok(());
    }
    let namespace = Namespace::create_unnamed()?;
    let first = in_namespace(&namespace, move || {
        backend.map_or(Ok(()), |backend| choose_backend(&backend))?;
        measure(&config, services, endpoints, changes)
    })??;
    if start == Some("again") {
        println!("{}", in_namespace(&namespace, move || repeat(&arguments))??);
    } else {
        println!("{first}");
    }
    Ok(())
}

/// Leaves the kubelet's mark, by which its choice of a backend is known.
fn choose_backend(backend: &str) -> Result<(), String> {
    let mark = ["-t", "mangle", "-N", "KUBE-KUBELET-CANARY"];
    let status = Command::new(format!("iptables-{backend}")).args(mark).status().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("iptables-{backend} ended with {status}")) }
}

/// The same in another process, in the network namespace of this thread.
fn repeat(arguments: &[String]) -> Result<String, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let numbers_and_mode = arguments.iter().take(arguments.len().saturating_sub(1));
    let mut command = Command::new(program);
    let output = command.args(numbers_and_mode).arg("here").output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

fn measure(config: &str, services: u32, endpoints: u32, changes: u32) -> Result<serde_json::Value, String> {
    let directory = std::env::temp_dir().join(format!("portolan-scale-{}.yaml", std::process::id()));
    std::fs::write(&directory, config).map_err(|error| error.to_string())?;
    let config = AgentConfig::load(&directory).map_err(|error| error.to_string())?;
    let _ = std::fs::remove_file(&directory);
    let port = RealKernel::open().map_err(|error| error.to_string())?;
    let mut engine = Engine::new(config, port, Arc::new(Metrics::new()));
    let tables: Vec<Change> = tables(services, endpoints);

    let begin = Instant::now();
    engine.write_all(tables);
    let cold = engine.cycle();
    let cold_seconds = begin.elapsed().as_secs_f64();
    if !cold.ran || !cold.failures.is_empty() {
        return Err(format!("the first cycle failed: {:?} {:?}", engine.waiting(), cold.failures.first()));
    }

    let (cpu_before, memory_before) = (cpu_seconds(), memory_mib("VmRSS:"));
    let (mut seconds, mut messages) = (Vec::new(), Vec::new());
    for index in 0..changes {
        // Spread over all Services; each change takes one endpoint out, or puts it back.
        let service = (index / 2).wrapping_mul(7919) % services;
        let change = slice(service, endpoints, index % 2 == 0);
        let begin = Instant::now();
        engine.write(change);
        let outcome = engine.cycle();
        seconds.push(begin.elapsed().as_secs_f64());
        messages.push(outcome.messages);
        if !outcome.failures.is_empty() {
            return Err(format!("a change failed: {:?}", outcome.failures));
        }
    }
    let cpu = cpu_seconds() - cpu_before;
    seconds.sort_by(f64::total_cmp);
    messages.sort_unstable();
    let at = |percent: usize| seconds.get((seconds.len() * percent / 100).min(seconds.len() - 1)).copied();
    Ok(serde_json::json!({
        "services": services,
        "endpoints_each": endpoints,
        "cold_ms": cold_seconds * 1e3,
        "cold_messages": cold.messages,
        "change_p50_ms": at(50).map(|it| it * 1e3),
        "change_p99_ms": at(99).map(|it| it * 1e3),
        "change_messages_max": messages.last(),
        "cpu_ms_per_change": cpu * 1e3 / f64::from(changes),
        "memory_before_changes_mib": memory_before,
        "memory_after_changes_mib": memory_mib("VmRSS:"),
        "peak_memory_mib": memory_mib("VmHWM:"),
    }))
}

fn tables(services: u32, endpoints: u32) -> Vec<Change> {
    let node = Node {
        name: "node-1".into(),
        addresses: vec![Ipv4Addr::LOCALHOST.into()],
        pod_prefixes: vec!["10.0.0.0/24".parse().expect("a prefix")],
        tunnel: None,
        zone: None,
        leaving: false,
    };
    let all_services = (0..services).map(|index| (Object::Service(service(index)), Vec::new())).collect();
    let all_slices = (0..services)
        .filter_map(|index| match slice(index, endpoints, false) {
            Change::Upsert(object, problems) => Some((object, problems)),
            _ => None,
        })
        .collect();
    vec![
        Change::Replace(ObjectKind::Node, vec![(Object::Node(node), Vec::new())], Vec::new()),
        Change::Replace(ObjectKind::Service, all_services, Vec::new()),
        Change::Replace(ObjectKind::EndpointSlice, all_slices, Vec::new()),
    ]
}

fn key(index: u32) -> ObjectKey {
    ObjectKey::new("default", format!("service-{index}"))
}

fn port(number: u16) -> Port {
    Port::try_from(number).expect("a port")
}

fn address(base: u32, offset: u32) -> IpAddr {
    Ipv4Addr::from(base + offset).into()
}

fn service(index: u32) -> Service {
    Service {
        key: key(index),
        service_type: ServiceType::ClusterIp,
        cluster_addresses: vec![address(0x0a80_0000, index + 1)],
        headless: false,
        ports: vec![ServicePort { name: "".into(), protocol: Protocol::Tcp, port: port(80), node_port: None }],
        publish_not_ready: false,
        traffic: portolan_state::ServiceTraffic::default(),
    }
}

fn slice(index: u32, endpoints: u32, is_short: bool) -> Change {
    let endpoint = |offset: u32| Endpoint {
        address: address(0x0a00_0100, index * endpoints + offset),
        ready: true,
        serving: true,
        terminating: false,
        node: Some("node-2".into()),
        hostname: None,
        hints: None,
    };
    let slice = EndpointSlice {
        key: key(index),
        service: key(index),
        family: Family::V4,
        ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints: (u32::from(is_short)..endpoints).map(endpoint).collect(),
        headless: false,
    };
    Change::Upsert(Object::EndpointSlice(slice), Vec::new())
}

/// What this process holds, or held at most: `VmRSS` and `VmHWM` of proc(5).
fn memory_mib(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}

/// The processor time of this process and of the programs that it ran, in seconds.
fn cpu_seconds() -> f64 {
    let nanoseconds = |path: std::path::PathBuf| -> Option<f64> {
        std::fs::read_to_string(path).ok()?.split_whitespace().next()?.parse().ok()
    };
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let own: f64 = threads.filter_map(|thread| nanoseconds(thread.path().join("schedstat"))).sum();
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The fields after the name, which may hold spaces: `cutime` and `cstime` are the 16th and 17th of all.
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split_whitespace();
    let ticks: f64 = fields.skip(13).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    own / 1e9 + ticks / TICKS_PER_SECOND
}
