//! Finding the agents: those of a lab, or the one of this node.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, anyhow};
use portolan_agent::client::AgentClient;
use portolan_net::NodeName;

use crate::output::Failure;

/// Where the agents of a cluster answer.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ClusterArguments {
    /// The lab; by default the one called `lab`, or the only one that is up
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The directory of this node's agent, instead of a lab's
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "name")]
    runtime_directory: Option<PathBuf>,
}

/// The agents that can be asked from here.
#[derive(Debug)]
pub(crate) struct Agents {
    /// The lab, if it is one.
    pub(crate) lab: Option<String>,
    clients: BTreeMap<NodeName, AgentClient>,
}

/// What the default configuration calls the runtime directory.
const DEFAULT_RUNTIME_DIRECTORY: &str = "/run/portolan";

impl ClusterArguments {
    /// Finds the agents.
    pub(crate) async fn agents(&self) -> Result<Agents, Failure> {
        if self.runtime_directory.is_none()
            && let Some(name) = self.lab_name()?
        {
            let sockets = portolan_lab::agent_sockets(&name)?;
            let clients = sockets.into_iter().map(|(node, path)| (NodeName::from(node), AgentClient::new(path)));
            return Ok(Agents { lab: Some(name), clients: clients.collect() });
        }
        let directory = self.runtime_directory.clone().unwrap_or_else(|| DEFAULT_RUNTIME_DIRECTORY.into());
        let client = AgentClient::new(directory.join("agent.sock"));
        let node: portolan_agent::api::NodeInformation = client
            .get("/node")
            .await
            .context("no lab is up, and this node's agent does not answer")
            .map_err(Failure::Environment)?;
        Ok(Agents { lab: None, clients: BTreeMap::from([(node.name, client)]) })
    }

    /// The lab that is meant: the one named, the one of the default name, or the only one that is up.
    fn lab_name(&self) -> Result<Option<String>, Failure> {
        if let Some(name) = &self.name {
            return Ok(Some(name.clone()));
        }
        let labs = portolan_lab::names()?;
        match labs.as_slice() {
            [] => Ok(None),
            [only] => Ok(Some(only.clone())),
            several if several.iter().any(|name| name == portolan_lab::DEFAULT_NAME) => {
                Ok(Some(portolan_lab::DEFAULT_NAME.to_owned()))
            }
            several => {
                Err(Failure::Usage(anyhow!("several labs are up ({}): say which with --name", several.join(", "))))
            }
        }
    }
}

impl Agents {
    /// All of them, by the names of their nodes.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&NodeName, &AgentClient)> {
        self.clients.iter()
    }

    /// The agent of one node, or any one where none is named.
    pub(crate) fn one(&self, node: Option<&str>) -> Result<(&NodeName, &AgentClient), Failure> {
        let found = match node {
            Some(name) => self.clients.iter().find(|(node, _)| node.as_str() == name),
            None => self.clients.iter().next(),
        };
        found.ok_or_else(|| {
            let known = self.clients.keys().map(NodeName::as_str).collect::<Vec<_>>().join(", ");
            Failure::Usage(anyhow!("node {} is not known here; known are: {known}", node.unwrap_or("(any)")))
        })
    }
}
