//! A real packet: agents watch, the sender sends, and what they saw is put in order.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, anyhow};
use portolan_agent::api::{ObserveQuestion, Observed, ProbeAnswer, ProbeQuestion};
use portolan_net::Protocol;
use portolan_trace::{Difference, End, Ingress, Sighting, Trace};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Sender, Sent};
use crate::agents::Agents;
use crate::output::Failure;

/// How long agents look for the probe, in milliseconds. An unanswered probe is given up before.
const LOOK_MILLISECONDS: u64 = 2500;

/// How long after the last sighting of an answered probe nothing more is expected.
const QUIET: Duration = Duration::from_millis(100);

/// Sightings that wait to be looked at.
const SIGHTINGS_QUEUE: usize = 1024;

/// What was seen of the probe.
#[derive(Debug, Serialize)]
pub(crate) struct Observation {
    /// What its sender saw.
    pub(crate) answer: ProbeAnswer,
    /// Where it was seen, in the order of time since the first sighting.
    pub(crate) sightings: Vec<Sighting>,
}

/// Sends the packet while every agent watches, until it was answered and `is_complete` says of what was
/// seen that nothing is missing, or until the time is over.
pub(super) async fn observe(
    agents: &Agents,
    sent: &Sent,
    predicted: &Trace,
    mut is_complete: impl FnMut(&[Sighting]) -> bool,
) -> Result<Observation, Failure> {
    let cookie = format!("portolan-trace-{}-{}", std::process::id(), sent.packet.source_port);
    let question = ObserveQuestion {
        protocol: sent.packet.protocol,
        destination_ports: destination_ports(sent, predicted),
        source_port: sent.packet.source_port,
        cookie: cookie.clone(),
        milliseconds: LOOK_MILLISECONDS,
    };
    let (sender, mut seen) = mpsc::channel::<Observed>(SIGHTINGS_QUEUE);
    // They end with this function.
    let mut watchers = JoinSet::new();
    for (node, client) in agents.all() {
        // When this returns, the agent's capture is open.
        let mut lines = client
            .lines("/observe", &question)
            .await
            .with_context(|| format!("node {node} cannot watch for the probe"))
            .map_err(Failure::Environment)?;
        let sender = sender.clone();
        watchers.spawn(async move {
            while let Ok(Some(observed)) = lines.next::<Observed>().await {
                if sender.send(observed).await.is_err() {
                    return;
                }
            }
        });
    }
    drop(sender);
    let answer = send(agents, sent, &cookie).await?;
    let mut all = Vec::new();
    loop {
        match tokio::time::timeout(QUIET, seen.recv()).await {
            Ok(Some(observed)) => all.push(observed),
            // Every agent has stopped to look.
            Ok(None) => break,
            Err(_) if answer == ProbeAnswer::Silence => {}
            Err(_) if is_complete(&of_this_probe(sent, predicted, all.clone())) => break,
            Err(_) => {}
        }
    }
    Ok(Observation { answer, sightings: of_this_probe(sent, predicted, all) })
}

/// All ports that the probe may be seen with.
fn destination_ports(sent: &Sent, predicted: &Trace) -> Vec<u16> {
    let chosen = alternatives(predicted).into_iter().map(|endpoint| endpoint.port());
    let along = predicted.hops.iter().map(|hop| hop.after.destination_port);
    let ports: BTreeSet<u16> = chosen.chain(along).chain([sent.packet.destination_port]).collect();
    ports.into_iter().collect()
}

async fn send(agents: &Agents, sent: &Sent, cookie: &str) -> Result<ProbeAnswer, Failure> {
    match &sent.sender {
        Sender::Agent(node, ingress) => {
            let (_, client) = agents.one(Some(node.as_str()))?;
            let question = ProbeQuestion { from: ingress.clone(), packet: sent.packet, cookie: cookie.to_owned() };
            Ok(client.post("/probe", &question).await.context("the probe could not be sent")?)
        }
        Sender::Outside(name) => {
            let lab = agents.lab.as_deref().ok_or_else(|| {
                Failure::Usage(anyhow!("{name} is outside the cluster: a live trace can start there only in a lab"))
            })?;
            let (packet, cookie) = (sent.packet, cookie.to_owned());
            let answer =
                portolan_lab::in_client(lab, name, move || portolan_agent::probe::send_blocking(&packet, &cookie))?;
            answer.map_err(|error| Failure::Environment(error.into()))
        }
    }
}

/// Other traffic has the same ports: the probe's first sighting gives the sequence number that all the
/// others must have.
fn of_this_probe(sent: &Sent, predicted: &Trace, all: Vec<Observed>) -> Vec<Sighting> {
    let sequence = first_of(sent, predicted, &all).and_then(|observed| observed.tcp_sequence);
    let mut sightings: Vec<Sighting> = all
        .into_iter()
        .filter(|observed| sent.packet.protocol != Protocol::Tcp || observed.tcp_sequence == sequence)
        .map(|observed| observed.sighting)
        .collect();
    sightings.sort_by_key(|sighting| sighting.microseconds);
    let begin = sightings.first().map_or(0, |first| first.microseconds);
    for sighting in &mut sightings {
        sighting.microseconds -= begin;
    }
    sightings
}

/// Where the sender's own port is still seen, that is the probe. A node rewrites its own packets before
/// any interface sees them: there it is the first one from that node to an endpoint that was predicted.
fn first_of<'a>(sent: &Sent, predicted: &Trace, all: &'a [Observed]) -> Option<&'a Observed> {
    let is_untouched = |observed: &&Observed| {
        let packet = &observed.sighting.packet;
        packet.source_port == sent.packet.source_port && packet.destination_port == sent.packet.destination_port
    };
    let Sender::Agent(node, Ingress::Node) = &sent.sender else { return all.iter().find(is_untouched) };
    let mut endpoints = alternatives(predicted);
    endpoints.push(SocketAddr::new(sent.packet.destination, sent.packet.destination_port));
    let is_from_node = |observed: &&Observed| {
        let packet = &observed.sighting.packet;
        observed.sighting.node == *node
            && observed.sighting.outgoing
            && endpoints.contains(&SocketAddr::new(packet.destination, packet.destination_port))
    };
    all.iter().filter(is_from_node).min_by_key(|observed| observed.sighting.microseconds)
}

/// All endpoints that the kernel may choose on the way.
fn alternatives(predicted: &Trace) -> Vec<SocketAddr> {
    predicted.hops.iter().flat_map(|hop| hop.alternatives.iter().copied()).collect()
}

/// The endpoint that the kernel chose, of those that the prediction knows.
pub(super) fn endpoint(sightings: &[Sighting], predicted: &Trace) -> Option<SocketAddr> {
    let candidates = alternatives(predicted);
    sightings
        .iter()
        .map(|sighting| SocketAddr::new(sighting.packet.destination, sighting.packet.destination_port))
        .find(|destination| candidates.contains(destination))
}

impl Observation {
    /// Whether the sender's experience contradicts how the prediction ends.
    pub(super) fn contradiction(&self, predicted: &Trace) -> Option<Difference> {
        let difference =
            |predicted: String, seen: String| Some(Difference { node: "the sender".to_owned(), predicted, seen });
        match (&predicted.end, &self.answer) {
            (End::Refused { reason, .. }, ProbeAnswer::Answered { .. }) => {
                difference(format!("refused: {reason}"), "an answer".to_owned())
            }
            // A closed port answers a packet that did arrive; only UDP servers may keep silent.
            (End::Delivered { at }, ProbeAnswer::Refused { reason }) if !reason.contains("refused") => {
                difference(format!("delivered to {at}"), reason.clone())
            }
            (End::Delivered { at }, ProbeAnswer::Silence)
                if predicted.sent.protocol == Protocol::Tcp || self.sightings.is_empty() =>
            {
                difference(format!("delivered to {at}"), "silence".to_owned())
            }
            _ => None,
        }
    }

    /// The observation as lines under a trace.
    pub(super) fn render(&self) -> String {
        let mut text = match &self.answer {
            ProbeAnswer::Answered { microseconds } => format!("   live: answered after {microseconds} µs\n"),
            ProbeAnswer::Refused { reason } => format!("   live: {reason}\n"),
            ProbeAnswer::Silence => "   live: no answer\n".to_owned(),
        };
        for sighting in &self.sightings {
            let arrow = if sighting.outgoing { "out" } else { "in " };
            let _ = writeln!(
                text,
                "     {:>6} µs  {:<10} {arrow} {:<12} {}",
                sighting.microseconds, sighting.node, sighting.interface, sighting.packet
            );
        }
        text
    }
}
