//! Made-up clusters: for measurements, and for tests of what loads programs into a kernel.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use portolan_intent::services::{Backend, Endpoints, Frontend, FrontendKind, FrontendUpdate, Masquerade};
use portolan_intent::{FabricMode, NodeView};
use portolan_net::{Family, ObjectKey, ObjectKind, Origin, Port, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};

use super::{Change, Compiler};

pub use portolan_intent::services::FrontendKey;

/// Port of every Service and of every endpoint of a sample.
pub const PORT: u16 = 80;

/// The view of a sample's node: pods in 10.42.0.0/16 and fd42::/48, Services in 10.96.0.0/12 and fd96::/108.
pub fn view() -> Option<NodeView> {
    let prefixes =
        |list: [&str; 2]| -> Vec<ipnet::IpNet> { list.iter().filter_map(|text| text.parse().ok()).collect() };
    let view = crate::sample::view(&prefixes(["10.42.0.0/16", "fd42::/48"]))?;
    Some(NodeView { fabric: FabricMode::Vxlan, service_prefixes: prefixes(["10.96.0.0/12", "fd96::/108"]), ..view })
}

/// What a Service of a sample is.
#[derive(Debug, Clone, Default)]
pub struct Wanted<'a> {
    /// Its name, in the namespace `default`.
    pub name: &'a str,
    /// Its endpoints. Those in 10.42.1.0/24 and fd42:0:0:1::/64 are of this node.
    pub backends: &'a [SocketAddr],
    /// Whether traffic from outside stays on this node.
    pub local: bool,
    /// Whether clients keep their endpoint.
    pub affinity: bool,
    /// Who may connect.
    pub sources: Option<&'a [ipnet::IpNet]>,
    /// Of which field the address is.
    pub external: Option<FrontendKind>,
}

/// A node of a made-up cluster, whose Services come and go.
#[derive(Debug, Clone)]
pub struct Sample {
    compiler: Compiler,
    frontends: BTreeMap<FrontendKey, Arc<Frontend>>,
}

impl Sample {
    /// The field of a load balancer's address, for [`Wanted::external`].
    pub const LOAD_BALANCER: FrontendKind = FrontendKind::LoadBalancer;

    /// A node without Services.
    pub fn new(view: &NodeView, families: &[Family]) -> Sample {
        Sample { compiler: Compiler::new(view, families), frontends: BTreeMap::new() }
    }

    /// The compiler with the program.
    pub fn compiler(&mut self) -> &mut Compiler {
        &mut self.compiler
    }

    /// Gives a frontend what is wanted, or takes it away, and returns what the kernel must change.
    pub fn set(&mut self, key: FrontendKey, wanted: Option<&Wanted<'_>>) -> Vec<Change> {
        let new = wanted.map(|wanted| frontend(&key, wanted));
        let old = match &new {
            Some(new) => self.frontends.insert(key, new.clone()),
            None => self.frontends.remove(&key),
        };
        self.compiler.update_services(&[FrontendUpdate { key, old, new }])
    }

    /// Adds TCP Services with that many endpoints each, at the addresses of [`service_address`].
    pub fn fill(&mut self, family: Family, services: u32, endpoints: u32) -> Vec<Change> {
        let Ok(port) = Port::try_from(PORT) else { return Vec::new() };
        let mut updates = Vec::new();
        for service in 0..services {
            let backends: Vec<_> = (0..endpoints).map(|it| endpoint(family, service * endpoints + it)).collect();
            let key = FrontendKey::Address { address: service_address(family, service), protocol: Protocol::Tcp, port };
            let name = format!("service-{service}");
            let new = frontend(&key, &Wanted { name: &name, backends: &backends, ..Wanted::default() });
            let old = self.frontends.insert(key, new.clone());
            updates.push(FrontendUpdate { key, old, new: Some(new) });
        }
        self.compiler.update_services(&updates)
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

fn frontend(key: &FrontendKey, wanted: &Wanted<'_>) -> Arc<Frontend> {
    let object = || ObjectKey::new("default", wanted.name);
    let origin = Origin::object(ObjectKind::EndpointSlice, object());
    let backends = wanted.backends.iter().filter_map(|socket| {
        let port = Port::try_from(socket.port()).ok()?;
        let local = match socket.ip() {
            IpAddr::V4(address) => address.octets().starts_with(&[10, 42, 1]),
            IpAddr::V6(address) => address.segments().starts_with(&[0xfd42, 0, 0, 1]),
        };
        Some(Backend { address: socket.ip(), port, local, origin: origin.clone() })
    });
    let kind = match key {
        FrontendKey::Address { .. } => wanted.external.unwrap_or(FrontendKind::ClusterIp),
        FrontendKey::NodePort { .. } => FrontendKind::NodePort,
    };
    let policy = if wanted.local && kind.is_external() { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
    let masquerade = match (kind.is_external(), policy) {
        (false, _) => Masquerade::OffCluster,
        (true, TrafficPolicy::Cluster) => Masquerade::Always,
        (true, TrafficPolicy::Local) => Masquerade::Node,
    };
    Arc::new(Frontend {
        origin: Origin::field(ObjectKind::Service, object(), "spec.ports[http]"),
        port_name: "http".into(),
        kind,
        policy,
        masquerade,
        affinity: wanted.affinity.then_some(AffinityTimeout::DEFAULT),
        sources: wanted.sources.map(Into::into),
        endpoints: Arc::new(Endpoints::all(backends.collect())),
    })
}
