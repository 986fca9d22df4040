//! Made-up clusters: for measurements, and for tests of what loads programs into a kernel.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use portolan_intent::masquerade::MasqueradeIntent;
use portolan_intent::services::{
    Backend, Endpoints, Frontend, FrontendKey, FrontendKind, FrontendUpdate, Masquerade, ProxySettings,
};
use portolan_net::{Family, ObjectKey, ObjectKind, Origin, Port, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};

use super::{Change, Compiler};

/// Port of every Service and of every endpoint of a sample.
pub const PORT: u16 = 80;

/// What makes a Service's frontend different from a plain one.
#[derive(Debug, Clone, Default)]
pub struct Traits {
    /// It is for clients outside: an address of a load balancer, or a node port.
    pub is_external: bool,
    /// Clients outside get endpoints of this node only; of a cluster address, all clients do.
    pub is_local: bool,
    /// For how many seconds a client keeps its endpoint.
    pub affinity_seconds: Option<u32>,
    /// Who may connect.
    pub sources: Option<Vec<ipnet::IpNet>>,
}

/// A node of a made-up cluster, whose Services come and go.
#[derive(Debug, Clone)]
pub struct Sample {
    compiler: Compiler,
    frontends: BTreeMap<FrontendKey, Arc<Frontend>>,
}

impl Sample {
    /// A node without Services. Pods are in 10.42.0.0/16 and fd42::/48, those of the node itself in
    /// 10.42.1.0/24 and fd42:0:0:1::/64, where masquerading is on.
    pub fn new(families: &[Family]) -> Sample {
        let parse = |text: &str| text.parse().ok();
        let both = |v4: &str, v6: &str| [parse(v4), parse(v6)].into_iter().flatten().collect::<Vec<ipnet::IpNet>>();
        let cluster_prefixes = both("10.42.0.0/16", "fd42::/48");
        let mut compiler = Compiler::with_settings(&ProxySettings::default(), &cluster_prefixes, families);
        compiler.set_masquerade(&MasqueradeIntent {
            sources: both("10.42.1.0/24", "fd42:0:0:1::/64"),
            except: cluster_prefixes,
            origin: Origin::configuration("masquerade"),
        });
        Sample { compiler, frontends: BTreeMap::new() }
    }

    /// The compiler with the program.
    pub fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// Gives a frontend these backends, or takes it away, and returns what the kernel must change.
    pub fn set(&mut self, key: FrontendKey, name: &str, backends: Option<&[SocketAddr]>) -> Vec<Change> {
        self.set_with(key, name, backends, &Traits::default())
    }

    /// As [`set`](Self::set), for a frontend that is not plain.
    pub fn set_with(
        &mut self,
        key: FrontendKey,
        name: &str,
        backends: Option<&[SocketAddr]>,
        traits: &Traits,
    ) -> Vec<Change> {
        let new = backends.map(|backends| frontend(&key, name, backends, traits));
        let old = match &new {
            Some(new) => self.frontends.insert(key, new.clone()),
            None => self.frontends.remove(&key),
        };
        self.compiler.update_services(&[FrontendUpdate { key, old, new }])
    }

    /// As [`set`](Self::set), for a ClusterIP.
    pub fn set_address(
        &mut self,
        address: IpAddr,
        protocol: Protocol,
        port: Port,
        name: &str,
        backends: Option<&[SocketAddr]>,
    ) -> Vec<Change> {
        self.set(FrontendKey::Address { address, protocol, port }, name, backends)
    }

    /// As [`set`](Self::set), for a node port.
    pub fn set_node_port(
        &mut self,
        family: Family,
        protocol: Protocol,
        port: Port,
        name: &str,
        backends: Option<&[SocketAddr]>,
    ) -> Vec<Change> {
        self.set(FrontendKey::NodePort { family, protocol, port }, name, backends)
    }

    /// As [`set_address`](Self::set_address), for a TCP frontend that is not plain.
    pub fn set_address_with(
        &mut self,
        address: SocketAddr,
        name: &str,
        backends: Option<&[SocketAddr]>,
        traits: &Traits,
    ) -> Vec<Change> {
        let Ok(port) = Port::try_from(address.port()) else { return Vec::new() };
        let key = FrontendKey::Address { address: address.ip(), protocol: Protocol::Tcp, port };
        self.set_with(key, name, backends, traits)
    }

    /// As [`set_node_port`](Self::set_node_port), for a TCP node port that is not plain.
    pub fn set_node_port_with(
        &mut self,
        family: Family,
        port: Port,
        name: &str,
        backends: Option<&[SocketAddr]>,
        traits: &Traits,
    ) -> Vec<Change> {
        self.set_with(FrontendKey::NodePort { family, protocol: Protocol::Tcp, port }, name, backends, traits)
    }

    /// Adds TCP Services with that many endpoints each, at the addresses of [`service_address`].
    pub fn fill(&mut self, family: Family, services: u32, endpoints: u32) {
        let Ok(port) = Port::try_from(PORT) else { return };
        let mut updates = Vec::new();
        for service in 0..services {
            let backends: Vec<_> = (0..endpoints).map(|it| endpoint(family, service * endpoints + it)).collect();
            let key = FrontendKey::Address { address: service_address(family, service), protocol: Protocol::Tcp, port };
            let new = frontend(&key, &format!("service-{service}"), &backends, &Traits::default());
            let old = self.frontends.insert(key, new.clone());
            updates.push(FrontendUpdate { key, old, new: Some(new) });
        }
        self.compiler.update_services(&updates);
    }
}

/// The address of a Service.
pub fn service_address(family: Family, index: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(0x0a60_0001 + index).into(),
        Family::V6 => Ipv6Addr::from((0xfd96_u128 << 112) + 1 + u128::from(index)).into(),
    }
}

/// An endpoint; all are different.
pub fn endpoint(family: Family, index: u32) -> SocketAddr {
    let address: IpAddr = match family {
        Family::V4 => Ipv4Addr::from(0x0b00_0001 + index).into(),
        Family::V6 => Ipv6Addr::from((0xfd43_u128 << 112) + 1 + u128::from(index)).into(),
    };
    SocketAddr::new(address, PORT)
}

fn frontend(key: &FrontendKey, name: &str, backends: &[SocketAddr], traits: &Traits) -> Arc<Frontend> {
    let key_of = |name: &str| ObjectKey::new("default", name);
    let origin = Origin::object(ObjectKind::EndpointSlice, key_of(name));
    let backends: Vec<Backend> = backends
        .iter()
        .filter_map(|socket| {
            let port = Port::try_from(socket.port()).ok()?;
            let local = match socket.ip() {
                IpAddr::V4(address) => address.octets().starts_with(&[10, 42, 1]),
                IpAddr::V6(address) => address.segments().starts_with(&[0xfd42, 0, 0, 1]),
            };
            Some(Backend { address: socket.ip(), port, local, origin: origin.clone() })
        })
        .collect();
    let kind = match key {
        FrontendKey::Address { .. } if traits.is_external => FrontendKind::LoadBalancer,
        FrontendKey::Address { .. } => FrontendKind::ClusterIp,
        FrontendKey::NodePort { .. } => FrontendKind::NodePort,
    };
    let masquerade = match (kind.is_external(), traits.is_local) {
        (false, _) => Masquerade::OffCluster,
        (true, true) => Masquerade::Node,
        (true, false) => Masquerade::Always,
    };
    Arc::new(Frontend {
        origin: Origin::field(ObjectKind::Service, key_of(name), "spec.ports[http]"),
        port_name: "http".into(),
        kind,
        policy: if traits.is_local { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
        masquerade,
        affinity: traits.affinity_seconds.and_then(AffinityTimeout::new),
        sources: traits.sources.clone().map(Into::into),
        endpoints: Arc::new(Endpoints::all(backends)),
    })
}
