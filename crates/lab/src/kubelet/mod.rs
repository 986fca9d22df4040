//! A small kubelet: makes the pods of the lab's nodes real, as namespaces and processes.
//!
//! ```text
//!   API ──watch──▶ Kubelet ──▶ one task per pod
//!                                sandbox (pause) ─▶ CNI ADD ─▶ containers ─▶ status to the API
//!                                containers that die are started again
//!                                deletion: containers, CNI DEL, sandbox, the object
//! ```
//!
//! One process runs the pods of all nodes of a lab, so it watches pods once and not once per node.
//! It promises that no two sandboxes of a pod exist, that CNI DEL follows each ADD that was tried,
//! and that a pod's object goes only after everything of the pod is gone. It does not adopt pods:
//! when it ends, its pods end.

mod cni;
mod container;
mod node;
mod object;
mod pod;
mod resolver;
mod status;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::rc::Rc;

use tokio::sync::{Semaphore, watch};

use crate::Layout;
use crate::client::{Client, Event};
use crate::description::Description;
use crate::limits::POD_STARTS_MAX;
use crate::topology::namespace;

pub use cni::{Attachment, CniError};
pub use node::register;
use object::Pod;
pub use object::{PodRecord, RecordedContainer};

/// A node as its kubelet knows it.
#[derive(Debug, Clone)]
pub struct NodeContext {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its zone, if it has one.
    pub zone: Option<String>,
    /// Its network namespace.
    pub namespace: PathBuf,
    /// The socket on which its agent serves CNI.
    pub cni_socket: PathBuf,
    /// True once that socket answers.
    pub agent: watch::Receiver<bool>,
}

/// What every pod's task shares.
#[derive(Debug)]
pub struct Context {
    /// Where things are.
    pub layout: Layout,
    /// What the lab is.
    pub description: Description,
    /// The API.
    pub client: Client,
    /// The nodes by name.
    pub nodes: BTreeMap<String, NodeContext>,
    /// The program that is run as CNI plugin.
    pub plugin: PathBuf,
    /// Bounds how many pods start at once.
    pub starts: Semaphore,
}

impl Context {
    /// A context whose plugin is Portolan's own.
    pub fn new(layout: Layout, description: Description, agents: &BTreeMap<String, watch::Receiver<bool>>) -> Context {
        let client = Client::new(description.api(&layout));
        let nodes = description
            .topology
            .nodes
            .iter()
            .filter_map(|node| {
                let context = NodeContext {
                    name: node.name.clone(),
                    addresses: node.addresses.clone(),
                    zone: node.zone.clone(),
                    namespace: namespace::path(&layout.namespace(&node.name)),
                    cni_socket: layout.node(&node.name).join("cni.sock"),
                    agent: agents.get(&node.name)?.clone(),
                };
                Some((node.name.clone(), context))
            })
            .collect();
        let plugin = description.program.clone();
        Context { layout, description, client, nodes, plugin, starts: Semaphore::new(POD_STARTS_MAX) }
    }
}

/// What the API wants of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// It shall run.
    Running,
    /// It has a deletion timestamp.
    Terminating,
    /// Its object is gone.
    Gone,
}

/// Runs the pods of every node until the API's events end. Must run in a `LocalSet`, on the thread
/// that lives as long as the process: pods die with the thread that started them (prctl(2)).
pub async fn run(context: Rc<Context>) {
    let mut events = context.client.watch("/api/v1/pods");
    let mut tasks: BTreeMap<String, watch::Sender<Wanted>> = BTreeMap::new();
    while let Some(event) = events.recv().await {
        tasks.retain(|_, task| !task.is_closed());
        match event {
            Event::Replace(objects) => {
                let pods: Vec<Pod> = objects.into_iter().filter_map(read).collect();
                for (uid, task) in &tasks {
                    if !pods.iter().any(|pod| pod.metadata.uid == *uid) {
                        task.send_replace(Wanted::Gone);
                    }
                }
                for pod in pods {
                    update(&context, &mut tasks, pod);
                }
            }
            Event::Upsert(object) => {
                if let Some(pod) = read(object) {
                    update(&context, &mut tasks, pod);
                }
            }
            Event::Delete(object) => {
                if let Some(task) = read(object).and_then(|pod| tasks.remove(&pod.metadata.uid)) {
                    task.send_replace(Wanted::Gone);
                }
            }
        }
    }
}

fn read(object: serde_json::Value) -> Option<Pod> {
    let pod: Pod = serde_json::from_value(object)
        .map_err(|error| tracing::warn!(%error, "a pod of the API cannot be read and is left alone"))
        .ok()?;
    if !pod.has_safe_names() {
        tracing::warn!(pod = %pod.metadata.name, "a pod's uid or container cannot name a file; it is left alone");
        return None;
    }
    Some(pod)
}

fn update(context: &Rc<Context>, tasks: &mut BTreeMap<String, watch::Sender<Wanted>>, pod: Pod) {
    let wanted = if pod.metadata.deletion_timestamp.is_some() { Wanted::Terminating } else { Wanted::Running };
    if let Some(task) = tasks.get(&pod.metadata.uid) {
        task.send_if_modified(|now| std::mem::replace(now, wanted) != wanted);
        return;
    }
    let Some(node) = pod.spec.node_name.as_ref().and_then(|node| context.nodes.get(node)) else { return };
    if pod.is_finished() {
        return;
    }
    let (sender, receiver) = watch::channel(wanted);
    tasks.insert(pod.metadata.uid.clone(), sender);
    tokio::task::spawn_local(pod::run(Rc::clone(context), node.clone(), pod, receiver));
}
