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
use super::report::{Goal, Place, Row, progress};
use bed::Bed;
use connect::Speed;
use peer::Peer;

/// The argument with which the benchmark starts itself inside a network namespace.
pub(super) const INSIDE: &str = "inside-services";

const ENDPOINTS: u32 = 10;

/// The size that the goals name.
const GOAL_AT: u32 = 10_000;

/// The most Services that a peer is measured with: beyond, one of its syncs takes minutes.
const PEER_SERVICES_MAX: u32 = 10_000;

/// A node with the most Services and one with a single one take turns so often.
const TURNS: usize = 9;

/// What a new connection may cost more among the most Services than where there is one.
const FLAT_WITHIN: f64 = 1.05;

/// A mode, and where it matters the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mode {
    /// As it is asked for and printed.
    pub(super) name: &'static str,
    /// As an agent's configuration calls it.
    pub(super) services: &'static str,
    /// The backend of iptables.
    pub(super) backend: Option<&'static str>,
    /// Whether a change costs the same, however many Services there are.
    is_flat: bool,
}

const MODES: [Mode; 4] = [
    Mode { name: "nftables", services: "nftables", backend: None, is_flat: true },
    Mode { name: "iptables-nft", services: "iptables", backend: Some("nft"), is_flat: false },
    Mode { name: "iptables-legacy", services: "iptables", backend: Some("legacy"), is_flat: false },
    Mode { name: "ipvs", services: "ipvs", backend: None, is_flat: true },
];

/// The mode of a name.
pub(super) fn mode(name: &str) -> anyhow::Result<Mode> {
    let known = MODES.map(|mode| mode.name).join(", ");
    MODES.into_iter().find(|mode| mode.name == name).with_context(|| format!("no mode {name}: there are {known}"))
}

/// What is measured of all that could be.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) sizes: Vec<u32>,
    pub(super) modes: Vec<Mode>,
    pub(super) has_peer: bool,
}

impl Default for Choice {
    /// What this machine can run. IPVS is measured in the guest, where there is no peer.
    fn default() -> Choice {
        let modes = MODES.into_iter().filter(|mode| mode.name != "ipvs").collect();
        Choice { sizes: vec![1000, 10_000, 50_000], modes, has_peer: true }
    }
}

pub(super) fn run(built: &Built, choice: &Choice) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for services in choice.sizes.iter().copied() {
        let peer = if choice.has_peer && services <= PEER_SERVICES_MAX {
            progress(&format!("kube-proxy with {services} Services"));
            Some(peer::measure(services, ENDPOINTS)?)
        } else {
            None
        };
        for mode in &choice.modes {
            progress(&format!("{} with {services} Services", mode.name));
            let subject = Subject { mode: *mode, services, peer: peer.as_ref() };
            rows.extend(subject.engine(built)?);
            rows.extend(subject.connections(built)?);
        }
    }
    let most = choice.sizes.iter().copied().max().unwrap_or(1);
    for mode in choice.modes.iter().filter(|mode| mode.is_flat) {
        progress(&format!("{}: connections among {most} Services, and where there is one", mode.name));
        rows.extend(flatness(built, *mode, most)?);
    }
    if choice.has_peer {
        rows.extend(agent::run(built, GOAL_AT, ENDPOINTS)?);
    }
    Ok(rows)
}

/// What runs inside a network namespace.
pub(super) fn inside(arguments: &[String]) -> anyhow::Result<()> {
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["peer", directory, services, endpoints] => {
            peer::inside(Path::new(directory), services.parse()?, endpoints.parse()?)
        }
        ["serve"] => connect::serve(),
        ["connect", rounds, ref targets @ ..] => connect::inside(rounds.parse()?, targets),
        _ => bail!("this is the benchmark's own: run `cargo xtask bench services`"),
    }
}

/// One mode at one size.
struct Subject<'a> {
    mode: Mode,
    services: u32,
    peer: Option<&'a Peer>,
}

impl Subject<'_> {
    fn row(&self, what: &str, ours: f64, unit: &'static str, theirs: impl Fn(&Peer) -> f64) -> Row {
        let row = Row::new(format!("{}, {} Services × {ENDPOINTS}: {what}", self.mode.name, self.services), ours, unit);
        match self.peer {
            Some(peer) => row.beside(theirs(peer)),
            None => row,
        }
    }

    fn place(&self, figure: &'static str) -> Place {
        Place { figure, mode: self.mode.name, services: self.services }
    }

    /// How many changes are measured: through iptables one takes a thousand times as long.
    fn changes(&self) -> u32 {
        match (self.mode.is_flat, self.services) {
            (true, _) => 1000,
            (false, ..=GOAL_AT) => 50,
            (false, _) => 5,
        }
    }

    /// The engine alone against the kernel, beside kube-proxy's own figures of its syncs.
    fn engine(&self, built: &Built) -> anyhow::Result<Vec<Row>> {
        let numbers = [self.services, ENDPOINTS, self.changes()].map(|number| number.to_string());
        let printed = output(Command::new(&built.scale).args(numbers).arg(self.mode.name))?;
        let measured: Value = serde_json::from_str(&printed)?;
        let get = |name: &str| measured[name].as_f64().with_context(|| format!("the example prints no {name}"));
        let with_goal = |row: Row, goal: Option<f64>| match goal.filter(|_| self.services == GOAL_AT) {
            Some(goal) => row.goal(Goal::Below(goal)),
            None => row,
        };
        let is_nftables = self.mode.name == "nftables";
        let cold = self.row("state → kernel, cold", get("cold_ms")? / 1e3, "s", |it| it.first_sync_seconds);
        let middle = self.row("one endpoint → kernel, p50", get("change_p50_ms")?, "ms", |it| it.change_p50_ms);
        let worst = self.row("one endpoint → kernel, p99", get("change_p99_ms")?, "ms", |it| it.change_p99_ms);
        let cpu = get("cpu_ms_per_change")?;
        let grown = get("memory_after_changes_mib")? - get("memory_before_changes_mib")?;
        let memory = self.row("peak memory of the engine alone", get("peak_memory_mib")?, "MiB", |it| it.memory_mib);
        Ok(vec![
            with_goal(cold, is_nftables.then_some(1.0)).at(self.place("cold sync, s")),
            middle.at(self.place("one endpoint changed, p50, ms")),
            with_goal(worst, Some(if is_nftables { 2.0 } else { 150.0 })),
            self.row("CPU time of 1,000 changes of an endpoint", cpu, "s", |it| it.change_cpu_ms),
            self.row(&format!("memory gained by {} changes", self.changes()), grown, "MiB", |it| it.grown_mib),
            with_goal(memory, Some(60.0)).at(self.place("peak memory, MiB")),
        ])
    }

    /// A real agent, and what a client's connections cost through its rules, beside those through kube-proxy's.
    fn connections(&self, built: &Built) -> anyhow::Result<Vec<Row>> {
        let bed = Bed::build(self.mode.name)?;
        let (ready, memory) = bed.start_agent(built, self.mode, self.services, ENDPOINTS)?;
        let ours = bed.connect(self.services, ENDPOINTS, connect::ROUNDS)?;
        let start = "agent's start → ready, kube-proxy's → first sync done";
        let mut rows = vec![
            self.row(start, ready.as_secs_f64(), "s", |it| it.start_seconds),
            self.row("peak memory of the process", memory, "MiB", |it| it.memory_mib),
        ];
        let theirs = |index: usize, of: fn(&Speed) -> f64| {
            move |peer: &Peer| peer.connections.get(index).map_or(0.0, |(_, speed)| of(speed))
        };
        for (index, (name, ours)) in ours.iter().enumerate() {
            let what = format!("new connection to {name}, p50");
            let row = self.row(&what, ours.p50_us, "µs", theirs(index, |it| it.p50_us));
            let is_last = index + 1 == bed::TARGETS;
            rows.push(if is_last { row.at(self.place("new connection to the last Service, p50, µs")) } else { row });
        }
        for (index, (name, ours)) in ours.iter().enumerate() {
            let what = format!("connections to {name}");
            rows.push(self.row(&what, ours.per_second, "/s", theirs(index, |it| it.per_second)));
        }
        Ok(rows)
    }
}

/// Connections to the last of the most Services, beside those on a node with a single one: by turns, so that a busy
/// machine slows both.
fn flatness(built: &Built, mode: Mode, most: u32) -> anyhow::Result<Vec<Row>> {
    let (many, one) = (Bed::build("many")?, Bed::build("one")?);
    many.start_agent(built, mode, most, ENDPOINTS)?;
    one.start_agent(built, mode, 1, ENDPOINTS)?;
    let (mut among_many, mut alone) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        for (bed, services, times) in [(&many, most, &mut among_many), (&one, 1, &mut alone)] {
            let speeds = bed.connect(services, ENDPOINTS, connect::ROUNDS / 4)?;
            times.extend(speeds.last().map(|(_, speed)| speed.p50_us));
        }
    }
    let middle = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or_default()
    };
    let what = format!("{}: new connection to the last of {most} Services, beside a single one, p50", mode.name);
    let row = Row::new(what, middle(&mut among_many), "µs").beside(middle(&mut alone));
    Ok(vec![row.goal(Goal::OfPeer(FLAT_WITHIN))])
}
