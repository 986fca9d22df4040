//! What other commands need of a lab: its agents and its machines.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::description::Description;
use crate::target::Target;
use crate::topology::namespace;
use crate::{Layout, Result};

/// The names of the labs that are up, sorted.
pub fn names() -> Result<Vec<String>> {
    Ok(Layout::existing())
}

/// The administration socket of each node's agent.
///
/// # Errors
/// If there is no such lab.
pub fn agent_sockets(lab: &str) -> Result<BTreeMap<String, PathBuf>> {
    let layout = Layout::new(lab)?;
    let description = Description::load(&layout)?;
    let socket = |node: &str| (node.to_owned(), layout.node(node).join("agent.sock"));
    Ok(description.topology.nodes.iter().map(|node| socket(&node.name)).collect())
}

/// Runs something in a thread that is on a machine outside the cluster.
///
/// # Errors
/// If there is no such lab or machine.
pub fn in_client<T: Send>(lab: &str, client: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    let layout = Layout::new(lab)?;
    let description = Description::load(&layout)?;
    let entry = Target::Client(client.to_owned()).entry(&layout, &description)?;
    let path = entry.network.unwrap_or_else(|| namespace::path(&layout.namespace(client)));
    Ok(namespace::within(&path, || Ok(work()))?)
}
