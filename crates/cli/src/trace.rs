//! `portolan trace`: a packet's way, predicted from the programs or observed on a real packet.

mod live;
mod resolve;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::anyhow;
use portolan_agent::api::{NodeInformation, TraceQuestion};
use portolan_agent::client::{AgentClient, ClientError};
use portolan_net::{NodeName, Packet, Protocol};
use portolan_trace::{Choice, Cluster, Difference, End, Hop, Ingress, NodeTrace, Sighting, Stage, Trace, walk};
use serde::Serialize;

use crate::agents::{Agents, ClusterArguments};
use crate::output::{Failure, Format, print_value};
use crate::roles::block_on;
use crate::target::Target;

#[derive(Debug, clap::Args)]
pub(crate) struct TraceArguments {
    /// Who sends: pod/[NAMESPACE/]NAME, node/NAME or client/NAME
    from: Target,
    /// Who is meant: pod/…, svc/[NAMESPACE/]NAME[:PORT], node/NAME, IP[:PORT] or http://HOST/PATH
    to: Target,
    /// The protocol; by default the Service port's own, else tcp
    #[arg(long)]
    protocol: Option<Protocol>,
    /// The destination port, where TO has none
    #[arg(long)]
    port: Option<u16>,
    /// Only say what would happen (the default)
    #[arg(long, conflicts_with = "live")]
    predict: bool,
    /// Also send one real packet, observe it along its way, and compare
    #[arg(long)]
    live: bool,
    /// Prefer IPv6 where both ends have it
    #[arg(short = '6', long)]
    ipv6: bool,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArguments,
}

/// Who sends the packet, and how it reaches the first node.
#[derive(Debug, Clone)]
pub(crate) enum Sender {
    /// A pod or a node: its agent sends.
    Agent(NodeName, Ingress),
    /// A machine outside, in a lab.
    Outside(String),
}

/// Everything that a trace found.
#[derive(Debug, Serialize)]
struct Report {
    from: String,
    to: String,
    predicted: Trace,
    #[serde(skip_serializing_if = "Option::is_none")]
    live: Option<live::Observation>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    differences: Vec<Difference>,
}

/// Traces a packet. Exit code 1 if it does not arrive, or if a real packet went another way.
pub(crate) fn run(arguments: &TraceArguments) -> Result<ExitCode, Failure> {
    block_on(async {
        let agents = arguments.cluster.agents().await?;
        let mut cluster = AgentCluster::connect(&agents).await?;
        let sent = resolve::resolve(&agents, &cluster, arguments).await?;
        let mut predicted = cluster.predict(&sent, Choice::First)?;
        let mut observed = None;
        let mut differences = Vec::new();
        if arguments.live {
            // Everything was seen when the prediction holds for the endpoint that the kernel chose.
            let is_complete = |seen: &[Sighting]| {
                let choice = live::endpoint(seen, &predicted).map_or(Choice::First, Choice::Endpoint);
                cluster.predict(&sent, choice).is_ok_and(|trace| portolan_trace::compare(&trace, seen).is_empty())
            };
            let observation = live::observe(&agents, &sent, &predicted, is_complete).await?;
            // The kernel chose an endpoint: the prediction must hold for that one.
            if let Some(endpoint) = live::endpoint(&observation.sightings, &predicted) {
                predicted = cluster.predict(&sent, Choice::Endpoint(endpoint))?;
            }
            let sightings: Vec<Sighting> = observation.sightings.clone();
            differences = portolan_trace::compare(&predicted, &sightings);
            differences.extend(observation.contradiction(&predicted));
            observed = Some(observation);
        }
        let report = Report { from: sent.from_text, to: sent.to_text, predicted, live: observed, differences };
        report.print(arguments.output)?;
        let is_delivered = matches!(report.predicted.end, End::Delivered { .. });
        Ok(if is_delivered && report.differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
    })
}

impl Report {
    fn print(&self, format: Format) -> Result<(), Failure> {
        if format != Format::Text {
            return print_value(self, format);
        }
        print!("{}", portolan_trace::render(&self.predicted, &self.from, &self.to));
        if let Some(live) = &self.live {
            print!("{}", live.render());
            for difference in &self.differences {
                println!(
                    "   difference on {}: predicted {}, seen {}",
                    difference.node, difference.predicted, difference.seen
                );
            }
            if self.differences.is_empty() {
                println!("   live: the packet went as predicted");
            }
        }
        Ok(())
    }
}

/// A question that is ready to be asked: who sends which packet.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) from_text: String,
    pub(crate) to_text: String,
    pub(crate) sender: Sender,
    pub(crate) packet: Packet,
}

/// The cluster as the walk sees it: each agent answers for its node.
#[derive(Debug)]
pub(crate) struct AgentCluster {
    clients: BTreeMap<NodeName, AgentClient>,
    pub(crate) nodes: BTreeMap<NodeName, NodeInformation>,
    pub(crate) outside: BTreeMap<IpAddr, String>,
}

impl AgentCluster {
    async fn connect(agents: &Agents) -> Result<AgentCluster, Failure> {
        let mut cluster = AgentCluster { clients: BTreeMap::new(), nodes: BTreeMap::new(), outside: BTreeMap::new() };
        for (name, client) in agents.all() {
            let information: NodeInformation = client.get("/node").await.map_err(anyhow::Error::from)?;
            cluster.nodes.insert(name.clone(), information);
            cluster.clients.insert(name.clone(), client.clone());
        }
        if let Some(lab) = &agents.lab {
            // The lab's own calls wait for themselves.
            for client in tokio::task::block_in_place(|| portolan_lab::status(lab))?.clients {
                for address in client.addresses {
                    cluster.outside.insert(address, client.name.clone());
                }
            }
        }
        Ok(cluster)
    }

    fn predict(&mut self, sent: &Sent, choice: Choice) -> Result<Trace, Failure> {
        let failed = |error: &dyn std::error::Error| Failure::Environment(anyhow!("{error}"));
        match &sent.sender {
            Sender::Agent(node, ingress) => {
                walk(self, node, sent.packet, ingress.clone(), choice).map_err(|error| failed(&error))
            }
            Sender::Outside(name) => {
                let first = Hop {
                    node: name.clone(),
                    stage: Stage::Outside,
                    by: String::new(),
                    before: sent.packet,
                    after: sent.packet,
                    detail: String::new(),
                    origins: Vec::new(),
                    alternatives: Vec::new(),
                };
                let Some(node) = self.node_at(sent.packet.destination) else {
                    return Err(Failure::No(anyhow!(
                        "{} is not an address of a node: machines outside the cluster reach pods through a NodePort",
                        sent.packet.destination
                    )));
                };
                let mut trace =
                    walk(self, &node, sent.packet, Ingress::Network, choice).map_err(|error| failed(&error))?;
                trace.hops.insert(0, first);
                Ok(trace)
            }
        }
    }
}

impl Cluster for AgentCluster {
    type Error = ClientError;

    fn node(
        &mut self,
        node: &NodeName,
        packet: Packet,
        ingress: Ingress,
        choice: Choice,
    ) -> Result<NodeTrace, ClientError> {
        let Some(client) = self.clients.get(node) else {
            return Err(ClientError::Refused { status: 404, message: format!("no agent of {node} is known here") });
        };
        let question = TraceQuestion { packet, ingress, choice };
        // The walk is pure and so is not async; the runtime has another thread for the answer.
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(client.post::<NodeTrace>("/trace", &question))
        })
    }

    fn node_at(&self, address: IpAddr) -> Option<NodeName> {
        self.nodes.iter().find(|(_, node)| node.addresses.contains(&address)).map(|(name, _)| name.clone())
    }

    fn outside_name(&self, address: IpAddr) -> String {
        self.outside.get(&address).cloned().unwrap_or_else(|| address.to_string())
    }
}
