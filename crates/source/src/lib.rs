//! Inputs: what the cluster's API says, as changes of the tables.
//!
//! It promises eventual convergence, and no more: changes may be duplicated or merged, but a list
//! reaches the receiver only when it is complete, and a server that is away changes nothing. It is
//! the only crate beside the embedded server that knows Kubernetes' types.
//!
//! ```text
//!  server ──▶ watcher ──▶ convert ──▶ outbox ──▶ one bounded channel ──▶ the agent's Writer
//!             one task per table          merged by object
//! ```
//!
//! Where subnets are leased as Flannel does, [`run_leases`] fills one more table from etcd, or from any
//! other store.

mod backoff;
mod connection;
mod convert;
mod document;
mod explain;
mod leases;
mod lenient;
pub mod limits;
mod outbox;
mod publish;
mod watch;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::SystemTime;

use portolan_net::{Family, NodeName, ObjectKind};
use portolan_state::Change;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

pub use connection::Connection;
pub use document::{DocumentError, change_from_json};
pub use kube::Client;
pub use leases::{OwnLease, run_leases};
pub use publish::{Published, publish_node_tunnel, set_network_unavailable_false, tunnel_annotations};

/// What a source cannot do at all.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The kubeconfig does not help.
    #[error("cannot use the kubeconfig {path}: {source}; correct the file, or name another one", path = path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: kube::config::KubeconfigError,
    },
    /// There is no service account here.
    #[error("this is not a pod with a service account: {source}; name a kubeconfig or a socket instead")]
    NotInCluster {
        /// Why.
        source: kube::config::InClusterError,
    },
    /// The connection's parts do not fit together.
    #[error("cannot make a client of this configuration: {source}; look at its certificates and address")]
    Client {
        /// Why.
        source: Box<kube::Error>,
    },
    /// A write that did not succeed, after retries where they could help.
    #[error("cannot {action}: {reason}; {hint}")]
    Write {
        /// What was tried.
        action: String,
        /// What the server, or the way to it, said.
        reason: String,
        /// What to do.
        hint: String,
        /// Of the last try.
        source: Box<kube::Error>,
    },
}

/// What a source says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEvent {
    /// Changes, to be applied in their order.
    Changes(Vec<Change>),
    /// When pods or Services changed such that slices among the next `Changes` were written: how long that
    /// took to reach the kernel is measured from then. Nothing else follows from it.
    Triggered(Vec<(Family, SystemTime)>),
    /// A table is no longer followed. What is known of it stays as it is.
    Disconnected {
        /// The table.
        table: ObjectKind,
        /// What happened.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// A table is followed, for the first time or again; its `Replace` comes next.
    Connected {
        /// The table.
        table: ObjectKind,
    },
}

/// Which objects a source follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The tables. Those that no Kubernetes kind fills are ignored.
    pub tables: BTreeSet<ObjectKind>,
    /// Only the pods of this node, where one is named. Other tables are always whole.
    pub pods_of: Option<NodeName>,
    /// Whether Services and slices with the label `service.kubernetes.io/service-proxy-name` are
    /// kept. A node's proxy leaves them to another one; names need them.
    pub keep_other_proxies: bool,
}

impl Default for Selection {
    fn default() -> Self {
        use ObjectKind::{EndpointSlice, Namespace, Node, Pod, Service};
        let tables = BTreeSet::from([Namespace, Node, Service, EndpointSlice, Pod]);
        Selection { tables, pods_of: None, keep_other_proxies: false }
    }
}

/// A running source. Dropping it ends its tasks.
#[derive(Debug)]
pub struct Handle {
    tasks: JoinSet<()>,
}

impl Handle {
    /// Ends the tasks and waits until they are gone.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Follows the selected tables until the handle is dropped or the receiver is gone.
///
/// Must be called within a tokio runtime. The seed spreads the waits after failures: a hash of the
/// node's name will do.
pub fn start(client: &Client, selection: &Selection, sender: &mpsc::Sender<SourceEvent>, seed: u64) -> Handle {
    let mut tasks = JoinSet::new();
    for (kind, table_seed) in selection.tables.iter().zip(seed..) {
        let fields = match (kind, &selection.pods_of) {
            (ObjectKind::Pod, Some(node)) => Some(format!("spec.nodeName={node}")),
            _ => None,
        };
        let task = watch::TableTask {
            client: client.clone(),
            fields,
            keep_other_proxies: selection.keep_other_proxies,
            sender: sender.clone(),
            seed: table_seed,
        };
        match kind {
            ObjectKind::Namespace => tasks.spawn(watch::run::<convert::Namespaces>(task)),
            ObjectKind::Node => tasks.spawn(watch::run::<convert::Nodes>(task)),
            ObjectKind::Service => tasks.spawn(watch::run::<convert::Services>(task)),
            ObjectKind::EndpointSlice => tasks.spawn(watch::run::<convert::EndpointSlices>(task)),
            ObjectKind::Pod => tasks.spawn(watch::run::<convert::Pods>(task)),
            ObjectKind::Attachment | ObjectKind::Subnet | ObjectKind::Configuration => continue,
        };
    }
    Handle { tasks }
}
