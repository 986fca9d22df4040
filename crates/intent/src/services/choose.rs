//! Which endpoints traffic may go to: readiness, draining, topology, locality.
//!
//! It follows what kube-proxy does (`pkg/proxy/topology.go`): endpoints that are ready; if there are none, those
//! that still serve while they terminate (KEP-1669), separately for the cluster and for the node; hints narrow
//! the ready ones only (KEP-2433, KEP-3015).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use portolan_net::{Family, NodeName, ObjectKind, Origin, Port, Protocol};
use portolan_state::{Endpoint, EndpointSlice, ServicePort};

use super::{Backend, Endpoints};

/// Where this node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) node: NodeName,
    pub(super) zone: Option<Arc<str>>,
}

/// Which lists the Service's frontends ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) cluster: bool,
    pub(super) local: bool,
}

/// One endpoint of one port.
struct Candidate<'a> {
    backend: Backend,
    endpoint: &'a Endpoint,
    ready: bool,
}

impl Candidate<'_> {
    fn drains(&self) -> bool {
        !self.ready && self.endpoint.serving && self.endpoint.terminating
    }
}

/// The endpoints of one port in one family.
pub(super) fn endpoints_of(
    slices: &[&Arc<EndpointSlice>],
    port: &ServicePort,
    family: Family,
    publish_not_ready: bool,
    wanted: Wanted,
    place: &Place,
) -> Endpoints {
    let candidates = candidates(slices, port, family, publish_not_ready, place);
    let ready_or_draining = |local_only: bool, fits: &dyn Fn(&Candidate<'_>) -> bool| -> Arc<[Backend]> {
        let here = || candidates.iter().filter(move |it| !local_only || it.backend.local);
        let ready: Vec<Backend> = here().filter(|it| it.ready && fits(it)).map(|it| it.backend.clone()).collect();
        if ready.is_empty() {
            here().filter(|it| it.drains()).map(|it| it.backend.clone()).collect()
        } else {
            ready.into()
        }
    };
    let nobody: Arc<[Backend]> = Arc::default();
    let cluster = if wanted.cluster {
        let topology = topology(&candidates, place);
        ready_or_draining(false, &|it| topology.fits(it.endpoint, place))
    } else {
        nobody.clone()
    };
    let local = if wanted.local { ready_or_draining(true, &|_| true) } else { nobody.clone() };
    let serving = if port.protocol == Protocol::Udp {
        candidates.iter().filter(|it| it.ready || it.endpoint.serving).map(|it| it.backend.clone()).collect()
    } else {
        nobody
    };
    let anywhere = candidates.iter().any(|it| it.ready || it.drains());
    Endpoints { cluster, local, anywhere, serving }
}

/// Every endpoint of the port, by address and port.
fn candidates<'a>(
    slices: &[&'a Arc<EndpointSlice>],
    port: &ServicePort,
    family: Family,
    publish_not_ready: bool,
    place: &Place,
) -> Vec<Candidate<'a>> {
    let mut found: BTreeMap<(IpAddr, Port), Candidate<'a>> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.family == family && !slice.headless) {
        let origin = Origin::object(ObjectKind::EndpointSlice, slice.key.clone());
        let numbers = slice.ports.iter().filter(|it| it.name == port.name && it.protocol == port.protocol);
        for number in numbers.map(|it| it.port) {
            for endpoint in &slice.endpoints {
                let ready = endpoint.ready || publish_not_ready;
                let key = (endpoint.address, number);
                // One address may stand in two slices while it moves: the one that is ready counts, and among
                // equals the first slice by name.
                if found.get(&key).is_some_and(|known| known.ready || !ready) {
                    continue;
                }
                let local = endpoint.node.as_ref() == Some(&place.node);
                let backend = Backend { address: endpoint.address, port: number, local, origin: origin.clone() };
                found.insert(key, Candidate { backend, endpoint, ready });
            }
        }
    }
    found.into_values().collect()
}

/// How far hints narrow the choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Topology {
    Node,
    Zone,
    Anywhere,
}

impl Topology {
    fn fits(self, endpoint: &Endpoint, place: &Place) -> bool {
        let hints = endpoint.hints.as_deref();
        match self {
            Topology::Anywhere => true,
            Topology::Node => hints.is_some_and(|hints| hints.nodes.contains(&place.node)),
            Topology::Zone => hints.is_some_and(|hints| place.zone.as_ref().is_some_and(|it| hints.zones.contains(it))),
        }
    }
}

/// Hints count only where every ready endpoint has them, and one is meant for here.
fn topology(candidates: &[Candidate<'_>], place: &Place) -> Topology {
    let ready = || candidates.iter().filter(|it| it.ready).map(|it| it.endpoint);
    let usable = |topology: Topology, has: fn(&Endpoint) -> bool| {
        ready().all(has) && ready().any(|endpoint| topology.fits(endpoint, place))
    };
    if usable(Topology::Node, |it| it.hints.as_ref().is_some_and(|hints| !hints.nodes.is_empty())) {
        Topology::Node
    } else if usable(Topology::Zone, |it| it.hints.as_ref().is_some_and(|hints| !hints.zones.is_empty())) {
        Topology::Zone
    } else {
        Topology::Anywhere
    }
}
