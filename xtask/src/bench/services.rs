//! Many Services: the engine alone against the kernel in each mode, a real agent behind a scripted API server, a real
//! kube-proxy behind another, and what connections cost where each of them has been.

mod bed;
mod connect;
mod peer;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

use super::agent;
use super::machine::{Built, output};
use super::report::{Goal, Row, progress};
use peer::Peer;

/// The argument with which the benchmark starts itself inside a network namespace.
pub(super) const INSIDE: &str = "inside-services";

const SIZES: [u32; 2] = [1000, 10_000];
const ENDPOINTS: u32 = 10;
const CHANGES: u32 = 1000;

/// The modes that this machine can run. IPVS is measured in the guest, where there is no peer.
const MODES: [&str; 2] = ["nftables", "iptables"];

/// What a mode's engine is measured with; in the iptables mode a change takes a hundred times as long.
const CHANGES_IPTABLES: u32 = 50;

pub(super) fn run(built: &Built) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for services in SIZES {
        progress(&format!("kube-proxy with {services} Services"));
        let peer = peer::measure(services, ENDPOINTS)?;
        for mode in MODES {
            progress(&format!("{mode} with {services} Services"));
            rows.extend(engine(built, mode, services, &peer)?);
            rows.extend(connections(built, mode, services, &peer)?);
        }
    }
    rows.extend(agent::run(built, 10_000, ENDPOINTS)?);
    Ok(rows)
}

/// What runs inside a network namespace.
pub(super) fn inside(arguments: &[String]) -> anyhow::Result<()> {
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["peer", directory, services, endpoints] => {
            peer::inside(Path::new(directory), services.parse()?, endpoints.parse()?)
        }
        ["serve"] => connect::serve(),
        ["connect", ref targets @ ..] => connect::inside(targets),
        _ => bail!("this is the benchmark's own: run `cargo xtask bench services`"),
    }
}

/// The engine alone against the kernel, beside kube-proxy's own figures of its syncs.
fn engine(built: &Built, mode: &str, services: u32, peer: &Peer) -> anyhow::Result<Vec<Row>> {
    let changes = if mode == "iptables" { CHANGES_IPTABLES } else { CHANGES };
    let numbers = [services, ENDPOINTS, changes].map(|number| number.to_string());
    let printed = output(Command::new(&built.scale).args(numbers).arg(mode))?;
    let measured: Value = serde_json::from_str(&printed)?;
    let get = |name: &str| measured[name].as_f64().with_context(|| format!("the example prints no {name}"));
    let is_large = services == 10_000;
    let is_nftables = mode == "nftables";
    let row = |what: &str, value: f64, unit: &'static str, goal: Option<f64>| {
        let row = Row::new(format!("{mode}, {services} Services × {ENDPOINTS}: {what}"), value, unit);
        match goal.filter(|_| is_large) {
            Some(goal) => row.goal(Goal::Below(goal)),
            None => row,
        }
    };
    let (cold_goal, change_goal) = if is_nftables { (Some(1.0), Some(2.0)) } else { (None, Some(150.0)) };
    Ok(vec![
        row("state → kernel, cold", get("cold_ms")? / 1e3, "s", cold_goal).beside(peer.first_sync_seconds),
        row("one endpoint changed → kernel, p50", get("change_p50_ms")?, "ms", None).beside(peer.change_p50_ms),
        row("one endpoint changed → kernel, p99", get("change_p99_ms")?, "ms", change_goal).beside(peer.change_p99_ms),
        row("peak memory of the engine alone", get("peak_memory_mib")?, "MiB", Some(60.0)).beside(peer.memory_mib),
    ])
}

/// A real agent, and what a client's connections cost through its rules, beside those through kube-proxy's.
fn connections(built: &Built, mode: &str, services: u32, peer: &Peer) -> anyhow::Result<Vec<Row>> {
    let bed = bed::Bed::build(mode)?;
    let (ready, memory) = bed.start_agent(built, mode, services, ENDPOINTS)?;
    let ours = bed.connect(services)?;
    let what = |text: &str| format!("{mode}, {services} Services × {ENDPOINTS}: {text}");
    let mut rows = vec![
        Row::new(what("agent's start → ready, kube-proxy's → first sync done"), ready.as_secs_f64(), "s")
            .beside(peer.start_seconds),
        Row::new(what("peak memory of the process"), memory, "MiB").beside(peer.memory_mib),
    ];
    for ((name, ours), (_, theirs)) in ours.iter().zip(&peer.connections) {
        rows.push(Row::new(what(&format!("new connection to {name}, p50")), ours.p50_us, "µs").beside(theirs.p50_us));
    }
    for ((name, ours), (_, theirs)) in ours.iter().zip(&peer.connections) {
        rows.push(Row::new(what(&format!("connections to {name}")), ours.per_second, "/s").beside(theirs.per_second));
    }
    Ok(rows)
}
