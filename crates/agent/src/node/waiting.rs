//! What keeps the engine from touching the kernel.

/// Why the engine waits although every table is in sync.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Waiting {
    /// Tables are missing.
    #[error("these tables have not been listed in full yet: {0}; is the API server reachable?")]
    NotInSync(String),
    /// The node is not registered.
    #[error("the cluster has no Node {0} yet: register the node, or set `node` in the configuration")]
    NoNode(String),
    /// The node has no addresses for pods.
    #[error("Node {0} has no pod prefix (spec.podCIDRs) yet: does the controller that hands them out run?")]
    NoPodPrefix(String),
    /// The way to other nodes cannot be found.
    #[error("no link holds an address of Node {node} ({addresses}): set underlayInterface, or mend status.addresses")]
    NoUnderlay {
        /// The node.
        node: String,
        /// Its addresses.
        addresses: String,
    },
    /// The configured link is not there.
    #[error("the link {0} does not exist: mend underlayInterface")]
    NoSuchLink(String),
    /// The kernel does not answer.
    #[error("the kernel cannot be read: {0}")]
    Kernel(String),
}
