//! Targets of `lab exec`: `pod/[NS/]NAME`, `deploy/[NS/]NAME`, `node/NAME`, `client/NAME`.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::str::FromStr;

use crate::description::Description;
use crate::inside::Entry;
use crate::kubelet::PodRecord;
use crate::topology::namespace;
use crate::{LabError, Layout, Result};

/// Where a command runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A pod by its whole name.
    Pod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// The first pod of a Deployment.
    Deployment {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A node.
    Node(String),
    /// A machine outside the cluster.
    Client(String),
}

/// A text that is no target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a target: write pod/[NAMESPACE/]NAME, deploy/[NAMESPACE/]NAME, node/NAME or client/NAME")]
pub struct InvalidTarget(pub String);

impl FromStr for Target {
    type Err = InvalidTarget;

    fn from_str(text: &str) -> Result<Target, InvalidTarget> {
        let parts: Vec<&str> = text.split('/').collect();
        if parts.iter().any(|part| part.is_empty()) {
            return Err(InvalidTarget(text.to_owned()));
        }
        let owned = |namespace: &str, name: &str| (namespace.to_owned(), name.to_owned());
        match parts.as_slice() {
            ["node", name] => Ok(Target::Node((*name).to_owned())),
            ["client", name] => Ok(Target::Client((*name).to_owned())),
            [kind, rest @ ..] if !rest.is_empty() && rest.len() <= 2 => {
                let (namespace, name) = match rest {
                    [namespace, name] => owned(namespace, name),
                    _ => owned("default", rest[0]),
                };
                match *kind {
                    "pod" | "pods" => Ok(Target::Pod { namespace, name }),
                    "deploy" | "deployment" => Ok(Target::Deployment { namespace, name }),
                    _ => Err(InvalidTarget(text.to_owned())),
                }
            }
            _ => Err(InvalidTarget(text.to_owned())),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Pod { namespace, name } => write!(f, "pod/{namespace}/{name}"),
            Target::Deployment { namespace, name } => write!(f, "deploy/{namespace}/{name}"),
            Target::Node(name) => write!(f, "node/{name}"),
            Target::Client(name) => write!(f, "client/{name}"),
        }
    }
}

impl Target {
    /// The namespaces of the target in a lab.
    ///
    /// # Errors
    /// If the lab has no such target.
    pub fn entry(&self, layout: &Layout, description: &Description) -> Result<Entry> {
        let member = |name: &str, known: bool| {
            if known { Ok(Entry::network(namespace::path(&layout.namespace(name)))) } else { Err(self.missing(layout)) }
        };
        match self {
            Target::Node(name) => member(name, description.topology.nodes.iter().any(|node| node.name == *name)),
            Target::Client(name) => member(name, description.topology.clients.iter().any(|it| it.name == *name)),
            Target::Pod { .. } | Target::Deployment { .. } => {
                let record = self.record(layout)?;
                if !is_same(&Entry::of_process(record.sandbox), &record.network) {
                    return Err(LabError::negative(
                        format!("{self} has no process any more"),
                        format!("`portolan lab status --name {}` shows what runs", layout.name()),
                    ));
                }
                Ok(Entry::of_process(record.sandbox))
            }
        }
    }

    /// The record of the pod that this target means.
    pub fn record(&self, layout: &Layout) -> Result<PodRecord> {
        let records = PodRecord::all(layout);
        let found = records.into_iter().find(|record| match self {
            Target::Pod { namespace, name } => record.namespace == *namespace && record.name == *name,
            Target::Deployment { namespace, name } => {
                record.namespace == *namespace && deployment_of(&record.name) == Some(name)
            }
            _ => false,
        });
        found.ok_or_else(|| self.missing(layout))
    }

    fn missing(&self, layout: &Layout) -> LabError {
        LabError::negative(
            format!("lab `{}` has no {self}", layout.name()),
            format!("`portolan lab status --name {}` shows what there is", layout.name()),
        )
    }
}

/// The Deployment of a pod by the pod's name: NAME-REPLICASET-POD.
fn deployment_of(pod: &str) -> Option<&str> {
    Some(pod.rsplit_once('-')?.0.rsplit_once('-')?.0)
}

/// Whether a process is in the network namespace of a file: its number may be another process's by now.
fn is_same(process: &Entry, network: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|it| (it.dev(), it.ino())).ok();
    let own = process.network.as_deref().and_then(identity);
    own.is_some() && own == identity(network)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn targets_read_as_they_print() {
        for (text, shown) in [
            ("pod/cart", "pod/default/cart"),
            ("pod/shop/cart-1", "pod/shop/cart-1"),
            ("deploy/cart", "deploy/default/cart"),
            ("deployment/shop/cart", "deploy/shop/cart"),
            ("node/node-1", "node/node-1"),
            ("client/client-1", "client/client-1"),
        ] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), shown);
            assert_eq!(shown.parse(), Ok(target));
        }
        for text in ["", "pod", "pod/", "/a", "moon/a", "node/a/b", "pod/a/b/c"] {
            assert_eq!(text.parse::<Target>(), Err(InvalidTarget(text.to_owned())));
        }
    }

    #[test]
    fn a_pods_name_tells_its_deployment() {
        assert_eq!(deployment_of("cart-5d9c-x2x"), Some("cart"));
        assert_eq!(deployment_of("cart-db-5d9c-x2x"), Some("cart-db"));
        assert_eq!(deployment_of("cart"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_a_target_or_refused(text: String) {
            let _ = text.parse::<Target>();
        }
    }
}
