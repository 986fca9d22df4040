//! Frontends for tests of rooms and of kernels, without a cluster behind them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
pub use portolan_intent::NodeView;
use portolan_intent::services::{
    Backend, Endpoints, Frontend, FrontendKey, FrontendKind, FrontendUpdate, Masquerade, ProxySettings,
};
use portolan_intent::{FabricMode, FabricSettings, Segment};
use portolan_net::{Family, ObjectKey, ObjectKind, Origin, Port, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};

/// The view of a node whose cluster has these pod prefixes.
pub fn view(cluster_prefixes: &[IpNet]) -> Option<NodeView> {
    Some(NodeView {
        node: "node-1".into(),
        fabric: FabricMode::HostGw,
        fabric_settings: FabricSettings::default(),
        cluster_prefixes: cluster_prefixes.to_vec(),
        service_prefixes: Vec::new(),
        masquerade: true,
        underlay_interface: "eth0".into(),
        underlay_mtu: 1500,
        segment: Segment::default(),
        bridge: "cni0".into(),
        proxy: ProxySettings::default(),
    })
}

/// One frontend of a Service.
#[derive(Debug, Clone)]
pub struct Sample {
    key: FrontendKey,
    kind: FrontendKind,
    name: String,
    policy: TrafficPolicy,
    affinity: Option<AffinityTimeout>,
    sources: Option<Arc<[IpNet]>>,
    backends: Vec<(SocketAddr, bool)>,
}

impl Sample {
    /// A cluster address, an external address or one of a load balancer. There is none with port 0.
    pub fn address(kind: FrontendKind, protocol: Protocol, at: SocketAddr, name: &str) -> Option<Sample> {
        let port = Port::try_from(at.port()).ok()?;
        Some(Sample::new(FrontendKey::Address { address: at.ip(), protocol, port }, kind, name))
    }

    /// A cluster address.
    pub fn cluster_ip(protocol: Protocol, at: SocketAddr, name: &str) -> Option<Sample> {
        Sample::address(FrontendKind::ClusterIp, protocol, at, name)
    }

    /// An address of a load balancer.
    pub fn load_balancer(protocol: Protocol, at: SocketAddr, name: &str) -> Option<Sample> {
        Sample::address(FrontendKind::LoadBalancer, protocol, at, name)
    }

    /// A node port.
    pub fn node_port(family: Family, protocol: Protocol, port: Port, name: &str) -> Sample {
        Sample::new(FrontendKey::NodePort { family, protocol, port }, FrontendKind::NodePort, name)
    }

    fn new(key: FrontendKey, kind: FrontendKind, name: &str) -> Sample {
        Sample {
            key,
            kind,
            name: name.to_owned(),
            policy: TrafficPolicy::Cluster,
            affinity: None,
            sources: None,
            backends: Vec::new(),
        }
    }

    /// With an endpoint on another node.
    #[must_use]
    pub fn backend(mut self, at: SocketAddr) -> Sample {
        self.backends.push((at, false));
        self
    }

    /// With an endpoint on this node.
    #[must_use]
    pub fn local_backend(mut self, at: SocketAddr) -> Sample {
        self.backends.push((at, true));
        self
    }

    /// With the policy `Local`.
    #[must_use]
    pub fn local(mut self) -> Sample {
        self.policy = TrafficPolicy::Local;
        self
    }

    /// With `sessionAffinity: ClientIP`, if Kubernetes allows so many seconds.
    #[must_use]
    pub fn affinity(mut self, seconds: u32) -> Sample {
        self.affinity = AffinityTimeout::new(seconds);
        self
    }

    /// With `loadBalancerSourceRanges`.
    #[must_use]
    pub fn sources(mut self, sources: &[IpNet]) -> Sample {
        self.sources = Some(sources.into());
        self
    }

    /// What the frontend is called.
    pub fn key(&self) -> FrontendKey {
        self.key
    }

    /// The frontend.
    pub fn frontend(&self) -> Frontend {
        let origin = Origin::object(ObjectKind::EndpointSlice, ObjectKey::new("default", &*format!("{}-1", self.name)));
        let backend = |(at, local): &(SocketAddr, bool)| {
            let port = Port::try_from(at.port()).ok()?;
            Some(Backend { address: at.ip(), port, local: *local, origin: origin.clone() })
        };
        let endpoints = Endpoints::all(self.backends.iter().filter_map(backend).collect());
        let masquerade = match (self.kind.is_external(), self.policy) {
            (true, TrafficPolicy::Cluster) => Masquerade::Always,
            (true, TrafficPolicy::Local) => Masquerade::Node,
            (false, _) => Masquerade::OffCluster,
        };
        Frontend {
            origin: Origin::object(ObjectKind::Service, ObjectKey::new("default", &*self.name)),
            port_name: "http".into(),
            kind: self.kind,
            policy: self.policy,
            masquerade,
            affinity: self.affinity,
            sources: self.sources.clone(),
            endpoints: Arc::new(endpoints),
        }
    }
}

/// Frontends that come, change and go.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    frontends: BTreeMap<FrontendKey, Arc<Frontend>>,
}

impl Samples {
    /// Puts frontends there, or replaces them.
    pub fn put(&mut self, samples: impl IntoIterator<Item = Sample>) -> Vec<FrontendUpdate> {
        let put = |sample: Sample| {
            let new = Arc::new(sample.frontend());
            let old = self.frontends.insert(sample.key, new.clone());
            FrontendUpdate { key: sample.key, old, new: Some(new) }
        };
        samples.into_iter().map(put).collect()
    }

    /// Takes a frontend away.
    pub fn remove(&mut self, key: FrontendKey) -> Vec<FrontendUpdate> {
        let old = self.frontends.remove(&key);
        old.map(|old| FrontendUpdate { key, old: Some(old), new: None }).into_iter().collect()
    }

    /// All frontends that are there.
    pub fn iter(&self) -> impl Iterator<Item = (&FrontendKey, &Arc<Frontend>)> {
        self.frontends.iter()
    }
}
