//! The intent's values.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use portolan_net::{Family, ObjectKey, Origin, Port, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};
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
    /// `spec.externalIPs`.
    ExternalIp,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer,
    /// `spec.ports[].nodePort`.
    NodePort,
}

impl FrontendKind {
    /// Whether clients outside the cluster are meant: its traffic follows the external policy.
    pub fn is_external(self) -> bool {
        self != FrontendKind::ClusterIp
    }
}

/// Whose source address is replaced by the node's, so that answers come back the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Masquerade {
    /// Nobody's: the cluster cannot tell its own pods from others.
    Never,
    /// The node's own, which may be one that the endpoint cannot answer to.
    Node,
    /// Everyone's but pods'.
    OffCluster,
    /// Everyone's.
    Always,
}

impl Masquerade {
    /// Whether it applies to a client.
    pub fn applies(self, client: Client) -> bool {
        match self {
            Masquerade::Never => false,
            Masquerade::Node => client == Client::Node,
            Masquerade::OffCluster => client != Client::Pod,
            Masquerade::Always => true,
        }
    }
}

/// Who connects, as far as it makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Client {
    /// A pod of the cluster, as `detectLocal` tells them.
    Pod,
    /// This node: the packet has one of its addresses and does not come over a link.
    Node,
    /// Anyone else.
    Outside,
}

impl Client {
    /// All of them.
    pub const ALL: [Client; 3] = [Client::Pod, Client::Node, Client::Outside];
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
    /// The internal policy for a cluster address, the external one for all others.
    pub policy: TrafficPolicy,
    /// Whose source address is replaced.
    pub masquerade: Masquerade,
    /// How long a client keeps its endpoint.
    pub affinity: Option<AffinityTimeout>,
    /// Who may connect; everyone where it is `None`. Sorted.
    pub sources: Option<Arc<[IpNet]>>,
    /// Where traffic goes. All frontends of one port and family share it.
    pub endpoints: Arc<Endpoints>,
}

/// The endpoints of one port of a Service in one family. Each list is sorted by address and port, without
/// duplicates.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// Those for traffic that may go to any node. Empty where nothing of the Service asks for them.
    pub cluster: Arc<[Backend]>,
    /// Those of this node, for traffic that may not leave it. Empty where nothing asks for them.
    pub local: Arc<[Backend]>,
    /// Whether any endpoint anywhere serves: what is refused then is dropped, so that a client tries again.
    pub anywhere: bool,
    /// Every endpoint that serves at all. Only for UDP, whose flows end when their endpoint is not among them.
    pub serving: Arc<[Backend]>,
}

impl Endpoints {
    /// Endpoints of a port that all serve, and are all asked for.
    pub fn all(mut backends: Vec<Backend>) -> Endpoints {
        backends.sort();
        backends.dedup();
        let local = backends.iter().filter(|backend| backend.local).cloned().collect();
        let cluster: Arc<[Backend]> = backends.into();
        Endpoints { anywhere: !cluster.is_empty(), serving: Arc::default(), local, cluster }
    }

    /// Those of a policy.
    pub fn of(&self, policy: TrafficPolicy) -> &Arc<[Backend]> {
        match policy {
            TrafficPolicy::Cluster => &self.cluster,
            TrafficPolicy::Local => &self.local,
        }
    }
}

/// What becomes of a new connection to a frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision<'a> {
    /// It is refused: nobody serves.
    Reject,
    /// It vanishes: somebody serves, but not for this client.
    Drop,
    /// It goes to one of these, never an empty list, each as likely as the other.
    Forward {
        /// Which endpoints.
        backends: &'a Arc<[Backend]>,
        /// Whether the client's address is replaced by the node's. The endpoint's own always is.
        masquerade: bool,
    },
}

impl Frontend {
    /// What becomes of a new connection: the meaning of a Service in one place. Every room must act like this.
    pub fn decide(&self, client: Client, source: IpAddr) -> Decision<'_> {
        if !self.endpoints.anywhere {
            return Decision::Reject;
        }
        if !self.admits(source) {
            return Decision::Drop;
        }
        let backends = self.endpoints.of(self.policy_for(client));
        if backends.is_empty() {
            return Decision::Drop;
        }
        Decision::Forward { backends, masquerade: self.masquerade.applies(client) }
    }

    /// Whose endpoints a client gets. Within the cluster there is no need to go around by the outside: pods and
    /// the node itself reach every endpoint by an external address too.
    pub fn policy_for(&self, client: Client) -> TrafficPolicy {
        if self.kind.is_external() && client != Client::Outside { TrafficPolicy::Cluster } else { self.policy }
    }

    /// Whether a source address may connect.
    pub fn admits(&self, source: IpAddr) -> bool {
        self.sources.as_ref().is_none_or(|sources| sources.iter().any(|prefix| prefix.contains(&source)))
    }

    /// The Service that it belongs to.
    pub fn service(&self) -> &ObjectKey {
        &self.origin.key
    }
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

impl FrontendUpdate {
    /// Every frontend of an intent as one that appeared: what a compiler that starts from nothing is given.
    pub fn everything(intent: &ServicesIntent) -> Vec<FrontendUpdate> {
        let appeared = |(key, frontend): (&FrontendKey, &Arc<Frontend>)| FrontendUpdate {
            key: *key,
            old: None,
            new: Some(frontend.clone()),
        };
        intent.iter().map(appeared).collect()
    }
}

/// What a load balancer asks of a node at a Service's `healthCheckNodePort`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// The port.
    pub port: Port,
    /// Endpoints of this node that get the Service's external traffic.
    pub local_endpoints: usize,
}
