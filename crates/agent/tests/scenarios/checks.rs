//! What checks find: tables, programs, traces, problems.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::IpAddr;

use portolan_agent::node::engine::Engine;
use portolan_agent::node::table;
use portolan_agent::table::Table;
use portolan_net::{Family, NodeName, Packet};
use portolan_program::netlink;
use portolan_program::nftables::{self, Program};
use portolan_trace::{
    Choice, Cluster as Nodes, End, Exit, Hop, Ingress, NodePrograms, NodeTrace, Stage, render, trace_node, walk,
};

use super::cluster::{Cluster, address_of};
use super::format::{Room, Sender, TraceStep, Verb};
use super::kernel::FakePort;

/// What a check finds, as the scenario writes it.
pub fn look(cluster: &Cluster, verb: &Verb) -> Result<String, String> {
    Ok(match verb {
        Verb::Show(name, Some(node)) => columns(&table_of(engine(cluster, node)?, name)),
        Verb::Show(name, None) => everywhere(cluster, |engine| rows(&table_of(engine, name))),
        Verb::Problems => everywhere(cluster, |engine| engine.problems().iter().map(ToString::to_string).collect()),
        Verb::Program(Room::Netlink, node, _) => {
            engine(cluster, node)?.netlink_program().map(netlink::render).unwrap_or_default()
        }
        Verb::Program(Room::Nftables, node, parts) => match engine(cluster, node)?.nftables_program() {
            Some(program) => nftables(program, parts)?,
            None => String::new(),
        },
        Verb::Trace(step) => trace(cluster, step)?,
        Verb::Waiting(node) => engine(cluster, node)?.waiting().map(ToString::to_string).unwrap_or_default(),
        Verb::Failures(node) => machine(cluster, node)?.failures.join("\n"),
        Verb::Changes(node, expected) => {
            let changes = machine(cluster, node)?.changes;
            if changes != *expected {
                return Err(format!("there were {changes}"));
            }
            String::new()
        }
        _ => return Err("this is no check".into()),
    })
}

fn machine<'a>(cluster: &'a Cluster, node: &NodeName) -> Result<&'a super::cluster::Machine, String> {
    cluster.machines.get(node).ok_or_else(|| format!("there is no machine {node}"))
}

fn engine<'a>(cluster: &'a Cluster, node: &NodeName) -> Result<&'a Engine<FakePort>, String> {
    machine(cluster, node).map(|machine| &machine.engine)
}

fn table_of(engine: &Engine<FakePort>, name: &str) -> Table {
    let nothing = || Table { name: name.into(), columns: Vec::new(), rows: Vec::new(), items: Vec::new() };
    table(engine, name).unwrap_or_else(nothing)
}

fn rows(table: &Table) -> Vec<String> {
    table.rows.iter().map(|row| row.join("  ").trim_end().to_owned()).collect()
}

/// Rows under headings, aligned. A table without rows has no headings.
fn columns(table: &Table) -> String {
    if table.rows.is_empty() {
        return String::new();
    }
    let all: Vec<&Vec<String>> = std::iter::once(&table.columns).chain(&table.rows).collect();
    let width = |index: usize| all.iter().map(|row| row[index].chars().count()).max().unwrap_or(0);
    let line = |row: &&Vec<String>| {
        let pad = |(index, cell): (usize, &String)| format!("{cell:<width$}", width = width(index) + 3);
        let cells: Vec<String> = row.iter().enumerate().map(pad).collect();
        cells.concat().trim_end().to_owned() + "\n"
    };
    all.iter().map(line).collect()
}

/// The rows of all nodes; where not all of them have a row, it says which have.
fn everywhere(cluster: &Cluster, rows: impl Fn(&Engine<FakePort>) -> Vec<String>) -> String {
    let mut holders: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for (node, machine) in &cluster.machines {
        for row in rows(&machine.engine) {
            holders.entry(row).or_default().insert(node.as_str());
        }
    }
    let line = |(row, nodes): (String, BTreeSet<&str>)| {
        let is_everywhere = nodes.len() == cluster.machines.len();
        let nodes: Vec<&str> = nodes.into_iter().collect();
        if is_everywhere { format!("{row}\n") } else { format!("{row} [{}]\n", nodes.join(" ")) }
    };
    holders.into_iter().map(line).collect()
}

/// The tables, or only those sets and chains of them that are named.
fn nftables(program: &Program, parts: &[String]) -> Result<String, String> {
    if parts.is_empty() {
        return Ok(nftables::render(program));
    }
    let mut tables = program.tables.values();
    let known: BTreeSet<&str> =
        tables.by_ref().flat_map(|it| it.sets.keys().chain(it.chains.keys())).map(|it| &**it).collect();
    if let Some(part) = parts.iter().find(|part| !known.contains(part.as_str())) {
        return Err(format!("there is no set or chain {part}"));
    }
    let mut some = program.clone();
    for table in some.tables.values_mut() {
        table.sets.retain(|name, _| parts.iter().any(|part| **part == **name));
        table.chains.retain(|name, _| parts.iter().any(|part| **part == **name));
    }
    some.tables.retain(|_, table| !table.sets.is_empty() || !table.chains.is_empty());
    Ok(nftables::render(&some))
}

/// The engines' programs, as the tracer asks for them.
struct Programs<'a>(&'a Cluster);

impl Nodes for Programs<'_> {
    type Error = Infallible;

    fn node(
        &mut self,
        node: &NodeName,
        packet: Packet,
        ingress: Ingress,
        choice: Choice,
    ) -> Result<NodeTrace, Infallible> {
        let engine = &self.0.machines[node].engine;
        let (Some(netlink), Some(nftables)) = (engine.netlink_program(), engine.nftables_program()) else {
            let reason = engine.waiting().map(ToString::to_string).unwrap_or_default();
            let exit = Exit::Refused { how: "no agent".into(), reason, origin: None };
            return Ok(NodeTrace { hops: Vec::new(), packet, exit });
        };
        let services = engine.services_programs();
        let programs = NodePrograms { node, netlink, nftables, services, surroundings: engine.surroundings() };
        Ok(trace_node(&programs, packet, &ingress, choice))
    }

    fn node_at(&self, address: IpAddr) -> Option<NodeName> {
        let holds = |engine: &Engine<FakePort>| {
            let own = engine.netlink_program().into_iter().flat_map(|program| program.addresses.keys());
            let mut all = engine.surroundings().addresses.iter().map(|(_, it)| it).chain(own.map(|(_, it)| it));
            all.any(|prefix| prefix.addr() == address)
        };
        let mut machines = self.0.machines.iter();
        machines.find(|(_, machine)| holds(&machine.engine)).map(|(node, _)| node.clone())
    }

    fn outside_name(&self, address: IpAddr) -> String {
        format!("outside {address}")
    }
}

fn trace(cluster: &Cluster, step: &TraceStep) -> Result<String, String> {
    let mut packet = step.packet;
    let mut programs = Programs(cluster);
    let mut first = None;
    let (start, ingress) = match &step.sender {
        Sender::Pod(pod) => {
            let (node, attachment) = cluster.attachment_of(pod).ok_or_else(|| format!("pod {pod} is on no node"))?;
            let family = Family::of(packet.destination);
            packet.source = address_of(attachment, family).ok_or_else(|| format!("pod {pod} has no {family}"))?;
            (node.clone(), Ingress::Pod)
        }
        Sender::Node(node) => (node.clone(), Ingress::Node),
        Sender::Client => {
            first = Some(outside(packet));
            let node = programs.node_at(packet.destination);
            (node.ok_or_else(|| format!("{} is no node's address", packet.destination))?, Ingress::Network)
        }
    };
    machine(cluster, &start)?;
    let mut trace = walk(&mut programs, &start, packet, ingress, step.choice).map_err(|error| error.to_string())?;
    if let Some(first) = first {
        trace.hops.insert(0, first);
    }
    Ok(match &trace.end {
        End::Delivered { .. } => render(&trace, &step.from, &step.to),
        End::Refused { node, reason } => format!("refused: {reason} (on {node})\n"),
    })
}

fn outside(packet: Packet) -> Hop {
    Hop {
        node: "client".into(),
        stage: Stage::Outside,
        by: String::new(),
        before: packet,
        after: packet,
        detail: String::new(),
        origins: Vec::new(),
        alternatives: Vec::new(),
    }
}
