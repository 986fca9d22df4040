//! What a lab is made of and how to reach it.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;

use crate::client::Client;
use crate::description::Description;
use crate::{Layout, Result};

/// A lab, as `portolan lab status -o json` prints it.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// The lab's name.
    pub name: String,
    /// Whether its supervisor runs.
    pub running: bool,
    /// The file for `KUBECONFIG`.
    pub kubeconfig: PathBuf,
    /// The cluster's nodes.
    pub nodes: Vec<MemberStatus>,
    /// The machines outside the cluster.
    pub clients: Vec<MemberStatus>,
    /// The pods that have a node.
    pub pods: Vec<PodStatus>,
}

/// A machine.
#[derive(Debug, Clone, Serialize)]
pub struct MemberStatus {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its network namespace, as `ip netns` knows it.
    pub netns: String,
}

/// A pod.
#[derive(Debug, Clone, Serialize)]
pub struct PodStatus {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether it is ready.
    pub ready: bool,
}

/// Reads a lab's status.
///
/// # Errors
/// If there is no such lab.
pub fn status(name: &str) -> Result<Status> {
    let layout = Layout::new(name)?;
    let description = Description::load(&layout)?;
    let running = UnixStream::connect(layout.control_socket()).is_ok();
    let member = |member: &crate::topology::Member| MemberStatus {
        name: member.name.clone(),
        addresses: member.addresses.clone(),
        netns: layout.namespace(&member.name),
    };
    let pods = if running { pods(&layout, &description)? } else { Vec::new() };
    Ok(Status {
        name: name.to_owned(),
        running,
        kubeconfig: layout.kubeconfig(),
        nodes: description.topology.nodes.iter().map(member).collect(),
        clients: description.topology.clients.iter().map(member).collect(),
        pods,
    })
}

fn pods(layout: &Layout, description: &Description) -> Result<Vec<PodStatus>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    let client = Client::new(description.api(layout));
    let objects = runtime.block_on(client.list("/api/v1/pods")).context("listing pods")?;
    let mut pods: Vec<PodStatus> = objects.iter().filter_map(pod).collect();
    pods.sort_by(|left, right| (&left.namespace, &left.name).cmp(&(&right.namespace, &right.name)));
    Ok(pods)
}

fn pod(object: &Value) -> Option<PodStatus> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    let addresses = object.pointer("/status/podIPs").and_then(Value::as_array).cloned().unwrap_or_default();
    Some(PodStatus {
        namespace: text("/metadata/namespace")?,
        name: text("/metadata/name")?,
        node: text("/spec/nodeName")?,
        addresses: addresses.iter().filter_map(|entry| entry.get("ip")?.as_str()?.parse().ok()).collect(),
        ready: is_ready(object),
    })
}

/// Whether a pod has the condition Ready.
pub(crate) fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    conditions.is_some_and(|conditions| {
        conditions.iter().any(|condition| {
            condition.get("type").and_then(Value::as_str) == Some("Ready")
                && condition.get("status").and_then(Value::as_str) == Some("True")
        })
    })
}

impl Status {
    /// The text for people.
    pub fn text(&self) -> String {
        let mut text = format!("lab {}: {}\n", self.name, if self.running { "up" } else { "its supervisor has ended" });
        let _ = writeln!(text, "export KUBECONFIG={}", self.kubeconfig.display());
        let mut rows = Vec::new();
        let members = self.nodes.iter().map(|node| ("node", node)).chain(self.clients.iter().map(|it| ("client", it)));
        for (kind, member) in members {
            rows.push([
                format!("{kind}/{}", member.name),
                list(&member.addresses),
                member.netns.clone(),
                String::new(),
            ]);
        }
        for pod in &self.pods {
            let ready = if pod.ready { "ready" } else { "not ready" };
            rows.push([
                format!("pod/{}/{}", pod.namespace, pod.name),
                list(&pod.addresses),
                pod.node.clone(),
                ready.to_owned(),
            ]);
        }
        text.push('\n');
        text.push_str(&columns(&rows));
        text
    }
}

fn list(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return "-".to_owned();
    }
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Rows with their columns aligned, two spaces between.
pub(crate) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
