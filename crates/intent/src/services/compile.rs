//! Services and their endpoint slices to frontends, incrementally.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use portolan_net::{Family, NodeName, ObjectKey, ObjectKind, Origin, Port, Protocol};
use portolan_state::{Dirty, EndpointSlice, ObjectRef, Problem, Service, ServicePort, ServiceType, Snapshot};

use super::{Backend, Frontend, FrontendKey, FrontendKind, FrontendUpdate, Masquerade, ServicesIntent};

/// What one Service wants, sorted by key: a list takes less memory than a small tree.
type Wanted = Box<[(FrontendKey, Arc<Frontend>)]>;

/// Keeps the frontends of a node current. The cost of an update follows the Services that changed.
///
/// Two Services may claim one address and port, or one node port. The Service whose key sorts first
/// holds it; the other has a [`Problem`] until the first lets go.
#[derive(Debug)]
pub struct ServicesCompiler {
    node: NodeName,
    /// What each Service wants, sorted. Lists, since nearly all have one entry: a tree of one takes as much
    /// memory as a tree of eleven.
    wanted: BTreeMap<ObjectKey, Wanted>,
    /// Who wants each frontend, sorted. The first holds it.
    claims: BTreeMap<FrontendKey, Vec<ObjectKey>>,
    intent: ServicesIntent,
}

impl ServicesCompiler {
    /// A compiler that has seen nothing yet.
    pub fn new(node: NodeName) -> ServicesCompiler {
        ServicesCompiler { node, wanted: BTreeMap::new(), claims: BTreeMap::new(), intent: ServicesIntent::new() }
    }

    /// The frontends as of the last update.
    pub fn intent(&self) -> &ServicesIntent {
        &self.intent
    }

    /// Brings the frontends up to the snapshot, given the keys that changed since the last call.
    /// Returns the frontends that are different, sorted by key.
    pub fn update(&mut self, snapshot: &Snapshot, dirty: &Dirty) -> Vec<FrontendUpdate> {
        let mut touched = BTreeSet::new();
        for key in &dirty.services {
            let new = snapshot
                .services
                .get(key)
                .map(|service| frontends_of(service, snapshot, &self.node))
                .unwrap_or_default();
            self.replace_service(key, new, &mut touched);
        }
        touched.into_iter().filter_map(|key| self.settle(key)).collect()
    }

    /// Frontends that a Service wants and another one holds.
    pub fn problems(&self) -> Vec<Problem> {
        let contested = self.claims.iter().filter(|(_, claimants)| claimants.len() > 1);
        let mut problems = Vec::new();
        for (frontend, claimants) in contested {
            let Some(holder) = claimants.first() else { continue };
            for loser in claimants.iter().skip(1) {
                problems.push(Problem {
                    object: ObjectRef::Service(loser.clone()),
                    field: field_of(frontend).into(),
                    reason: format!("{frontend} is taken by Service {holder}").into(),
                    hint: "give one of the two another address or port".into(),
                });
            }
        }
        problems
    }

    fn replace_service(
        &mut self,
        service: &ObjectKey,
        new: BTreeMap<FrontendKey, Arc<Frontend>>,
        touched: &mut BTreeSet<FrontendKey>,
    ) {
        let old = self.wanted.remove(service).unwrap_or_default();
        for (key, _) in old.iter().filter(|(key, _)| !new.contains_key(key)) {
            if let Some(claimants) = self.claims.get_mut(key) {
                claimants.retain(|claimant| claimant != service);
                if claimants.is_empty() {
                    self.claims.remove(key);
                }
            }
            touched.insert(*key);
        }
        for (key, frontend) in &new {
            if find(&old, key) != Some(frontend) {
                let claimants = self.claims.entry(*key).or_default();
                if let Err(position) = claimants.binary_search(service) {
                    claimants.reserve_exact(1);
                    claimants.insert(position, service.clone());
                }
                touched.insert(*key);
            }
        }
        if !new.is_empty() {
            self.wanted.insert(service.clone(), new.into_iter().collect());
        }
    }

    fn settle(&mut self, key: FrontendKey) -> Option<FrontendUpdate> {
        let holder = self.claims.get(&key).and_then(|claimants| claimants.first());
        let new = holder.and_then(|holder| self.wanted.get(holder)).and_then(|wanted| find(wanted, &key)).cloned();
        let old = match &new {
            Some(frontend) => self.intent.insert(key, frontend.clone()),
            None => self.intent.remove(&key),
        };
        (old != new).then_some(FrontendUpdate { key, old, new })
    }
}

/// The frontend of a key in a sorted list.
fn find<'a>(list: &'a [(FrontendKey, Arc<Frontend>)], key: &FrontendKey) -> Option<&'a Arc<Frontend>> {
    let position = list.binary_search_by_key(key, |(key, _)| *key).ok()?;
    list.get(position).map(|(_, frontend)| frontend)
}

fn field_of(key: &FrontendKey) -> &'static str {
    match key {
        FrontendKey::Address { .. } => "spec.clusterIPs",
        FrontendKey::NodePort { .. } => "spec.ports[].nodePort",
    }
}

/// What one Service wants, by the rules of `Service` and `EndpointSlice` (KEP-752, KEP-1669).
fn frontends_of(service: &Service, snapshot: &Snapshot, node: &NodeName) -> BTreeMap<FrontendKey, Arc<Frontend>> {
    let mut frontends = BTreeMap::new();
    if service.headless || matches!(service.service_type, ServiceType::ExternalName(_)) {
        return frontends;
    }
    let slices: Vec<&Arc<EndpointSlice>> = snapshot.slices_of(&service.key).collect();
    let families: BTreeSet<Family> = service.cluster_addresses.iter().map(|address| Family::of(*address)).collect();
    for port in &service.ports {
        for family in families.iter().copied() {
            let backends = backends_of(&slices, port, family, node);
            let frontend = |kind: FrontendKind, masquerade: Masquerade, field: String| {
                Arc::new(Frontend {
                    origin: Origin::field(ObjectKind::Service, service.key.clone(), field),
                    port_name: port.name.clone(),
                    kind,
                    masquerade,
                    backends: backends.clone(),
                })
            };
            for address in service.cluster_addresses.iter().copied().filter(|it| Family::of(*it) == family) {
                let key = FrontendKey::Address { address, protocol: port.protocol, port: port.port };
                let field = format!("spec.ports[{}]", port_label(port));
                frontends.insert(key, frontend(FrontendKind::ClusterIp, Masquerade::OffCluster, field));
            }
            if let Some(node_port) = port.node_port {
                let key = FrontendKey::NodePort { family, protocol: port.protocol, port: node_port };
                let field = format!("spec.ports[{}].nodePort", port_label(port));
                frontends.insert(key, frontend(FrontendKind::NodePort, Masquerade::Always, field));
            }
        }
    }
    frontends
}

fn port_label(port: &ServicePort) -> String {
    if port.name.is_empty() { port.port.to_string() } else { port.name.to_string() }
}

/// The endpoints of one port: the ready ones, or if there are none, those that still serve while
/// they terminate (KEP-1669).
fn backends_of(slices: &[&Arc<EndpointSlice>], port: &ServicePort, family: Family, node: &NodeName) -> Arc<[Backend]> {
    let mut ready = BTreeMap::new();
    let mut draining = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let origin = Origin::object(ObjectKind::EndpointSlice, slice.key.clone());
        for number in numbers_of(slice, &port.name, port.protocol) {
            for endpoint in &slice.endpoints {
                let into = match (endpoint.ready, endpoint.serving && endpoint.terminating) {
                    (true, _) => &mut ready,
                    (false, true) => &mut draining,
                    (false, false) => continue,
                };
                // One address may stand in two slices while it moves; the first slice by name counts.
                into.entry((endpoint.address, number)).or_insert_with(|| Backend {
                    address: endpoint.address,
                    port: number,
                    local: endpoint.node.as_ref() == Some(node),
                    origin: origin.clone(),
                });
            }
        }
    }
    let chosen = if ready.is_empty() { draining } else { ready };
    chosen.into_values().collect()
}

fn numbers_of<'a>(slice: &'a EndpointSlice, name: &'a str, protocol: Protocol) -> impl Iterator<Item = Port> + 'a {
    slice.ports.iter().filter(move |it| *it.name == *name && it.protocol == protocol).map(|it| it.port)
}
