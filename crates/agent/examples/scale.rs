//! Measures the engine against the real kernel: tables of many Services, cold, and then one endpoint
//! changing at a time. Needs root. Prints one JSON object.
//!
//! `cargo run --release -p portolan-agent --example scale -- SERVICES ENDPOINTS CHANGES [nftables|iptables|ipvs]`
#![expect(clippy::expect_used, clippy::print_stdout, reason = "a bench that prints its result")]

use std::net::{IpAddr, Ipv4Addr};
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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (services, endpoints, changes, mode) = match arguments.as_slice() {
        [services, endpoints, changes] => (services, endpoints, changes, "nftables"),
        [services, endpoints, changes, mode] => (services, endpoints, changes, mode.as_str()),
        _ => return Err("usage: scale SERVICES ENDPOINTS CHANGES [MODE]".into()),
    };
    let (services, endpoints, changes) = (services.parse()?, endpoints.parse()?, changes.parse()?);
    let config = format!("{CONFIG}services: {mode}\n");
    let namespace = Namespace::create_unnamed()?;
    let report = in_namespace(&namespace, move || measure(&config, services, endpoints, changes))??;
    println!("{report}");
    Ok(())
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
        "peak_memory_mib": peak_memory_mib(),
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

/// The most memory that this process held, from `VmHWM` (proc(5)).
fn peak_memory_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}
