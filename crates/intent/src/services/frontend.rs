//! The intent's values.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::OrdMap;
use portolan_net::{Family, Origin, Port, Protocol};
use serde::{Deserialize, Serialize};

/// What a client connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FrontendKey {
    /// A virtual address, such as a ClusterIP.
    Address {
        /// The address.
        address: IpAddr,
        /// The protocol.
        protocol: Protocol,
        /// The port.
        port: Port,
    },
    /// A port at every address of the node.
    NodePort {
        /// The family.
        family: Family,
        /// The protocol.
        protocol: Protocol,
        /// The port.
        port: Port,
    },
}

impl FrontendKey {
    /// The family of the frontend and so of all its backends.
    pub fn family(&self) -> Family {
        match self {
            FrontendKey::Address { address, .. } => Family::of(*address),
            FrontendKey::NodePort { family, .. } => *family,
        }
    }

    /// The protocol.
    pub fn protocol(&self) -> Protocol {
        match self {
            FrontendKey::Address { protocol, .. } | FrontendKey::NodePort { protocol, .. } => *protocol,
        }
    }

    /// The port.
    pub fn port(&self) -> Port {
        match self {
            FrontendKey::Address { port, .. } | FrontendKey::NodePort { port, .. } => *port,
        }
    }
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrontendKey::Address { address, protocol, port } => {
                write!(f, "{}/{protocol}", SocketAddr::new(*address, port.get()))
            }
            FrontendKey::NodePort { family, protocol, port } => write!(f, "node port {port}/{protocol} ({family})"),
        }
    }
}

/// Which field of a Service a frontend stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `spec.ports[].nodePort`.
    NodePort,
}

/// Whose source address is replaced by the node's, so that answers come back the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Masquerade {
    /// Clients outside the cluster's pod prefixes.
    OffCluster,
    /// Every client.
    Always,
}

/// An address and port that stands for a set of endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frontend {
    /// The Service and the field that cause it.
    pub origin: Origin,
    /// The name of the Service's port.
    pub port_name: Arc<str>,
    /// Which field of the Service it stands for.
    pub kind: FrontendKind,
    /// Whose source address is replaced.
    pub masquerade: Masquerade,
    /// Where traffic goes, sorted by address and port, without duplicates. Empty: refused.
    pub backends: Arc<[Backend]>,
}

/// One endpoint of a frontend.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Backend {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: Port,
    /// Whether it runs on this node.
    pub local: bool,
    /// The EndpointSlice that names it.
    pub origin: Origin,
}

impl Backend {
    /// Address and port as a socket address.
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port.get())
    }
}

/// All frontends of the node.
pub type ServicesIntent = OrdMap<FrontendKey, Arc<Frontend>>;

/// One frontend that changed, appeared (`old` is `None`) or went away (`new` is `None`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontendUpdate {
    /// Which frontend.
    pub key: FrontendKey,
    /// What it was.
    pub old: Option<Arc<Frontend>>,
    /// What it is.
    pub new: Option<Arc<Frontend>>,
}
