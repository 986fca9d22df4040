//! The typed program: virtual servers, their real servers, the addresses of the dummy link.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use portolan_net::{Family, Origin, Port, Protocol};
use serde::{Deserialize, Serialize};

/// The dummy link that every Service address is on, as kube-proxy names it.
pub const DEVICE: &str = "kube-ipvs0";

/// What IPVS and the dummy link must hold, or what they were seen to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Whether the dummy link is there.
    pub device: bool,
    /// The addresses on it.
    pub addresses: BTreeSet<IpAddr>,
    /// The virtual servers.
    #[serde(with = "crate::pairs")]
    pub servers: OrdMap<ServerKey, Arc<VirtualServer>>,
    /// How long IPVS remembers connections. What is not given is left as it is.
    pub timeouts: Timeouts,
    /// Sysctls by path below `/proc/sys`.
    pub sysctls: BTreeMap<String, String>,
    /// Virtual servers at these addresses are not ours.
    pub excluded: Vec<IpNet>,
}

impl Program {
    /// Whether a virtual server of the kernel is ours to change. Ours forward by masquerading; whoever uses
    /// another way, such as keepalived with direct routing, is somebody else.
    pub fn owns(&self, key: &ServerKey, server: &VirtualServer) -> bool {
        let is_excluded = self.excluded.iter().any(|prefix| prefix.contains(&key.address));
        !is_excluded && server.real.iter().all(|it| it.forwarding == Forwarding::Masquerade)
    }
}

/// What a client connects to. They are in the order in which `ipvsadm` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServerKey {
    /// The protocol.
    pub protocol: Protocol,
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: Port,
}

impl ServerKey {
    /// The family of the address.
    pub fn family(&self) -> Family {
        Family::of(self.address)
    }
}

impl fmt::Display for ServerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.address, self.port.get()), self.protocol)
    }
}

/// Which real server of a virtual server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RealKey {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: Port,
}

impl RealKey {
    /// Address and port as a socket address.
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port.get())
    }
}

/// A virtual server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualServer {
    /// How a real server is chosen.
    pub scheduler: Scheduler,
    /// How long a client keeps its real server, in seconds.
    pub persistence_seconds: Option<u32>,
    /// How many leading bits of a client's address count as the client. All of them, in ours.
    pub client_bits: u8,
    /// What schedulers that hash a client's address do besides.
    pub source_hash: SourceHash,
    /// The real servers, sorted by address and port.
    pub real: Arc<[RealServer]>,
    /// What caused it. The kernel does not hold it.
    pub origin: Option<Origin>,
}

impl VirtualServer {
    /// The real server of a key.
    pub fn real(&self, key: &RealKey) -> Option<&RealServer> {
        let position = self.real.binary_search_by_key(key, |it| it.key).ok()?;
        self.real.get(position)
    }

    /// Whether the kernel holds the same for both, but for the real servers.
    pub fn has_same_settings(&self, other: &VirtualServer) -> bool {
        (&self.scheduler, self.persistence_seconds, self.client_bits, self.source_hash)
            == (&other.scheduler, other.persistence_seconds, other.client_bits, other.source_hash)
    }
}

/// The scheduler's own flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceHash {
    /// `sh-fallback`, `mh-fallback`: another real server is taken where the hashed one has no weight.
    pub fallback: bool,
    /// `sh-port`, `mh-port`: the client's port is hashed too.
    pub port: bool,
}

/// A real server: an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RealServer {
    /// Address and port.
    pub key: RealKey,
    /// Its share of new connections. With 0 it gets none, and keeps those that it has.
    pub weight: u32,
    /// How packets get to it.
    pub forwarding: Forwarding,
    /// What caused it. The kernel does not hold it.
    pub origin: Option<Origin>,
}

impl RealServer {
    /// Whether the kernel holds the same for both.
    pub fn is_same(&self, other: &RealServer) -> bool {
        (self.key, self.weight, self.forwarding) == (other.key, other.weight, other.forwarding)
    }
}

/// How packets get to a real server (`IP_VS_CONN_F_FWD_MASK`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Forwarding {
    /// By translation of the destination. Ours are all so.
    Masquerade,
    /// To a process of this node. It is only ever observed.
    Local,
    /// In a tunnel. It is only ever observed.
    Tunnel,
    /// By the link address. It is only ever observed.
    Direct,
    /// By another way. It is only ever observed.
    Other(u32),
}

/// How a real server is chosen, by the name of the kernel's module after `ip_vs_`.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Scheduler {
    /// `rr`: one after the other.
    #[default]
    RoundRobin,
    /// `wrr`: as `rr`, by weight.
    WeightedRoundRobin,
    /// `lc`: the one with the fewest connections.
    LeastConnection,
    /// `wlc`: as `lc`, by weight.
    WeightedLeastConnection,
    /// `lblc`: the same one for the same destination, unless it is overloaded.
    LocalityBasedLeastConnection,
    /// `lblcr`: as `lblc`, with a set of them for each destination.
    LocalityBasedLeastConnectionWithReplication,
    /// `sh`: by a hash of the client's address.
    SourceHashing,
    /// `dh`: by a hash of the destination's address.
    DestinationHashing,
    /// `sed`: the one that would answer first.
    ShortestExpectedDelay,
    /// `nq`: an idle one, else as `sed`.
    NeverQueue,
    /// `fo`: the one of the highest weight that is there.
    WeightedFailover,
    /// `ovf`: the one of the highest weight until its connections exceed it.
    WeightedOverflow,
    /// `mh`: by a consistent hash of the client's address (Maglev).
    Maglev,
    /// One that is not known here. It is only ever observed.
    Other(Arc<str>),
}

impl Scheduler {
    /// All that are known.
    pub const ALL: [Scheduler; 13] = [
        Scheduler::RoundRobin,
        Scheduler::WeightedRoundRobin,
        Scheduler::LeastConnection,
        Scheduler::WeightedLeastConnection,
        Scheduler::LocalityBasedLeastConnection,
        Scheduler::LocalityBasedLeastConnectionWithReplication,
        Scheduler::SourceHashing,
        Scheduler::DestinationHashing,
        Scheduler::ShortestExpectedDelay,
        Scheduler::NeverQueue,
        Scheduler::WeightedFailover,
        Scheduler::WeightedOverflow,
        Scheduler::Maglev,
    ];

    /// The name, as `ipvsadm` and the kernel have it.
    pub fn name(&self) -> &str {
        match self {
            Scheduler::RoundRobin => "rr",
            Scheduler::WeightedRoundRobin => "wrr",
            Scheduler::LeastConnection => "lc",
            Scheduler::WeightedLeastConnection => "wlc",
            Scheduler::LocalityBasedLeastConnection => "lblc",
            Scheduler::LocalityBasedLeastConnectionWithReplication => "lblcr",
            Scheduler::SourceHashing => "sh",
            Scheduler::DestinationHashing => "dh",
            Scheduler::ShortestExpectedDelay => "sed",
            Scheduler::NeverQueue => "nq",
            Scheduler::WeightedFailover => "fo",
            Scheduler::WeightedOverflow => "ovf",
            Scheduler::Maglev => "mh",
            Scheduler::Other(name) => name,
        }
    }

    /// The scheduler that the kernel calls so.
    pub fn observed(name: &str) -> Scheduler {
        name.parse().unwrap_or_else(|_| Scheduler::Other(name.into()))
    }
}

/// A text that is the name of no scheduler.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a scheduler of IPVS: use one of rr, wrr, lc, wlc, lblc, lblcr, sh, dh, sed, nq, fo, ovf, mh")]
pub struct UnknownScheduler(pub String);

impl FromStr for Scheduler {
    type Err = UnknownScheduler;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Scheduler::ALL.into_iter().find(|it| it.name() == text);
        known.ok_or_else(|| UnknownScheduler(text.to_owned()))
    }
}

impl From<String> for Scheduler {
    fn from(text: String) -> Scheduler {
        Scheduler::observed(&text)
    }
}

impl From<Scheduler> for String {
    fn from(scheduler: Scheduler) -> String {
        scheduler.name().to_owned()
    }
}

/// How long IPVS remembers connections without packets, in seconds; `None` leaves it as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// Established TCP connections.
    pub tcp: Option<u32>,
    /// TCP connections after a FIN.
    pub tcp_fin: Option<u32>,
    /// UDP flows.
    pub udp: Option<u32>,
}

impl Timeouts {
    /// What must be set so that `observed` becomes this; nothing where it is so.
    pub fn beyond(self, observed: Timeouts) -> Option<Timeouts> {
        let new = |wanted: Option<u32>, there: Option<u32>| wanted.filter(|_| wanted != there);
        let beyond = Timeouts {
            tcp: new(self.tcp, observed.tcp),
            tcp_fin: new(self.tcp_fin, observed.tcp_fin),
            udp: new(self.udp, observed.udp),
        };
        (beyond != Timeouts::default()).then_some(beyond)
    }
}
