//! Services and their endpoint slices to frontends, incrementally.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use portolan_net::{Family, NodeName, ObjectKey, ObjectKind, Origin, Port};
use portolan_state::{
    Dirty, EndpointSlice, ObjectRef, Problem, Service, ServicePort, ServiceType, Snapshot, TrafficPolicy, by_halves,
};

use super::choose::{Place, Wanted, endpoints_of};
use super::{
    DetectLocal, Endpoints, Frontend, FrontendKey, FrontendKind, FrontendUpdate, HealthCheck, Masquerade,
    ProxySettings, ServicesIntent,
};

/// What one Service wants, sorted by key: a list takes less memory than a small tree.
type FrontendList = Box<[(FrontendKey, Arc<Frontend>)]>;

/// Keeps the frontends of a node current. The cost of an update follows the Services that changed.
///
/// Two Services may claim one address and port, or one node port. The Service whose key sorts first
/// holds it; the other has a [`Problem`] until the first lets go.
#[derive(Debug)]
pub struct ServicesCompiler {
    settings: ProxySettings,
    place: Place,
    /// What each Service wants, sorted. Lists, since nearly all have one entry: a tree of one takes as much
    /// memory as a tree of eleven.
    wanted: BTreeMap<ObjectKey, FrontendList>,
    /// Who wants each frontend, sorted. The first holds it.
    claims: BTreeMap<FrontendKey, Vec<ObjectKey>>,
    /// Services that have endpoints and do not exist.
    orphans: BTreeSet<ObjectKey>,
    health_checks: OrdMap<ObjectKey, HealthCheck>,
    intent: ServicesIntent,
}

impl ServicesCompiler {
    /// A compiler that has seen nothing yet.
    pub fn new(node: NodeName, settings: ProxySettings) -> ServicesCompiler {
        ServicesCompiler {
            settings,
            place: Place { node, zone: None },
            wanted: BTreeMap::new(),
            claims: BTreeMap::new(),
            orphans: BTreeSet::new(),
            health_checks: OrdMap::new(),
            intent: ServicesIntent::new(),
        }
    }

    /// The frontends as of the last update.
    pub fn intent(&self) -> &ServicesIntent {
        &self.intent
    }

    /// What load balancers may ask this node, by Service, as of the last update.
    pub fn health_checks(&self) -> &OrdMap<ObjectKey, HealthCheck> {
        &self.health_checks
    }

    /// Brings the frontends up to the snapshot, given the keys that changed since the last call.
    /// Returns the frontends that are different, sorted by key.
    pub fn update(&mut self, snapshot: &Snapshot, dirty: &Dirty) -> Vec<FrontendUpdate> {
        let mut touched = BTreeSet::new();
        if dirty.nodes.contains(&self.place.node) {
            // Its zone decides which endpoints are near, its addresses who may connect. It changes rarely.
            self.place.zone = snapshot.nodes.get(&self.place.node).and_then(|node| node.zone.clone());
            for key in Dirty::everything(snapshot).services.union(&dirty.services) {
                self.refresh(key, snapshot, &mut touched);
            }
        } else {
            for key in &dirty.services {
                self.refresh(key, snapshot, &mut touched);
            }
        }
        let mut updates: Vec<FrontendUpdate> = by_halves(touched).filter_map(|key| self.settle(key)).collect();
        updates.sort_unstable_by_key(|update| update.key);
        updates
    }

    fn refresh(&mut self, key: &ObjectKey, snapshot: &Snapshot, touched: &mut BTreeSet<FrontendKey>) {
        let service = snapshot.services.get(key);
        if service.is_none() && snapshot.slices_of(key).next().is_some() {
            self.orphans.insert(key.clone());
        } else {
            self.orphans.remove(key);
        }
        let new =
            service.map(|service| frontends_of(service, snapshot, &self.settings, &self.place)).unwrap_or_default();
        match new.health_check_port {
            Some(port) => {
                let check = HealthCheck { port, local_endpoints: new.local_addresses.len() };
                self.health_checks.insert(key.clone(), check);
            }
            None => {
                self.health_checks.remove(key);
            }
        }
        self.replace_service(key, new.frontends, touched);
    }

    /// Frontends that a Service wants and another one holds, and endpoints of no Service.
    pub fn problems(&self) -> Vec<Problem> {
        let contested = self.claims.iter().filter(|(_, claimants)| claimants.len() > 1);
        let mut problems: Vec<Problem> = self.orphans.iter().map(orphan).collect();
        for (frontend, claimants) in contested {
            let Some(holder) = claimants.first() else { continue };
            for loser in claimants.iter().skip(1) {
                let wanted = self.wanted.get(loser).and_then(|wanted| find(wanted, frontend));
                problems.push(Problem {
                    object: ObjectRef::Service(loser.clone()),
                    field: wanted.map_or("spec", |wanted| field_of(wanted.kind)).into(),
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

fn field_of(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "spec.clusterIPs",
        FrontendKind::ExternalIp => "spec.externalIPs",
        FrontendKind::LoadBalancer => "status.loadBalancer.ingress",
        FrontendKind::NodePort => "spec.ports[].nodePort",
    }
}

fn orphan(service: &ObjectKey) -> Problem {
    Problem {
        object: ObjectRef::Service(service.clone()),
        field: "metadata.name".into(),
        reason: "there are slices of endpoints for it, and no such Service".into(),
        hint: "make the Service, or delete the slices that name it".into(),
    }
}

/// What one Service wants, by the rules of `Service` and `EndpointSlice`.
fn frontends_of(service: &Service, snapshot: &Snapshot, settings: &ProxySettings, place: &Place) -> WantedByService {
    let mut wanted = WantedByService::default();
    if service.headless || matches!(service.service_type, ServiceType::ExternalName(_)) {
        return wanted;
    }
    let slices: Vec<&Arc<EndpointSlice>> = snapshot.slices_of(&service.key).collect();
    let families: BTreeSet<Family> = service.cluster_addresses.iter().map(|address| Family::of(*address)).collect();
    let outer = Outer::of(service, settings, snapshot, place);
    for port in &service.ports {
        for family in families.iter().copied() {
            let is_external = port.node_port.is_some() || outer.addresses(family).next().is_some();
            let traffic = &service.traffic;
            let choice = Wanted {
                // Also where the policy is local: the cluster's own clients are not bound by it.
                cluster: traffic.internal_policy == TrafficPolicy::Cluster || is_external,
                local: traffic.internal_policy == TrafficPolicy::Local
                    || is_external && traffic.external_policy == TrafficPolicy::Local,
            };
            let endpoints = endpoints_of(&slices, port, family, service.publish_not_ready, choice, place);
            let port_frontends = PortFrontends { service, port, settings, endpoints: Arc::new(endpoints) };
            for address in service.cluster_addresses.iter().copied().filter(|it| Family::of(*it) == family) {
                wanted.add(port_frontends.at(address), port_frontends.make(FrontendKind::ClusterIp, None));
            }
            for (address, kind) in outer.addresses(family) {
                let sources = if kind == FrontendKind::LoadBalancer { outer.sources(address) } else { None };
                wanted.add(port_frontends.at(address), port_frontends.make(kind, sources));
            }
            if let Some(node_port) = port.node_port {
                let key = FrontendKey::NodePort { family, protocol: port.protocol, port: node_port };
                wanted.add(key, port_frontends.make(FrontendKind::NodePort, None));
            }
            if is_external {
                wanted.local_addresses.extend(port_frontends.endpoints.local.iter().map(|backend| backend.address));
            }
        }
    }
    wanted.health_check_port = service.traffic.health_check_port.filter(|_| {
        service.service_type == ServiceType::LoadBalancer && service.traffic.external_policy == TrafficPolicy::Local
    });
    wanted
}

/// What one Service wants.
#[derive(Debug, Default)]
struct WantedByService {
    frontends: BTreeMap<FrontendKey, Arc<Frontend>>,
    health_check_port: Option<Port>,
    /// The endpoints of this node that outer traffic goes to.
    local_addresses: BTreeSet<IpAddr>,
}

impl WantedByService {
    /// An address may be given twice, as an external one and as the load balancer's: the first counts.
    fn add(&mut self, key: FrontendKey, frontend: Frontend) {
        self.frontends.entry(key).or_insert_with(|| Arc::new(frontend));
    }
}

/// A Service's addresses for clients outside.
struct Outer<'a> {
    external: &'a [IpAddr],
    load_balancer: &'a [IpAddr],
    sources: Option<&'a [IpNet]>,
    /// Whether this node's address is among the sources.
    admits_node: bool,
}

impl<'a> Outer<'a> {
    fn of(service: &'a Service, settings: &ProxySettings, snapshot: &Snapshot, place: &Place) -> Outer<'a> {
        let traffic = &service.traffic;
        let sources = traffic.load_balancer_sources.as_deref();
        let node = snapshot.nodes.get(&place.node);
        let admits = |address: &IpAddr| sources.is_some_and(|list| list.iter().any(|prefix| prefix.contains(address)));
        Outer {
            external: if settings.external_ips { &traffic.external_addresses } else { &[] },
            load_balancer: match service.service_type {
                ServiceType::LoadBalancer => &traffic.load_balancer_addresses,
                _ => &[],
            },
            sources,
            admits_node: node.is_some_and(|node| node.addresses.iter().any(admits)),
        }
    }

    fn addresses(&self, family: Family) -> impl Iterator<Item = (IpAddr, FrontendKind)> {
        let external = self.external.iter().map(|it| (*it, FrontendKind::ExternalIp));
        let load_balancer = self.load_balancer.iter().map(|it| (*it, FrontendKind::LoadBalancer));
        external.chain(load_balancer).filter(move |(address, _)| Family::of(*address) == family)
    }

    /// Who may connect to an address of the load balancer. Where the node may, so may the address itself: a
    /// packet from the node to an address that is bound to it has it as its source.
    fn sources(&self, address: IpAddr) -> Option<Arc<[IpNet]>> {
        let mut sources: Vec<IpNet> = self.sources?.to_vec();
        sources.retain(|prefix| Family::of_prefix(prefix) == Family::of(address));
        if self.admits_node {
            sources.push(IpNet::from(address));
        }
        sources.sort();
        sources.dedup();
        Some(sources.into())
    }
}

/// What the frontends of one port and family have in common.
struct PortFrontends<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    settings: &'a ProxySettings,
    endpoints: Arc<Endpoints>,
}

impl PortFrontends<'_> {
    fn at(&self, address: IpAddr) -> FrontendKey {
        FrontendKey::Address { address, protocol: self.port.protocol, port: self.port.port }
    }

    fn make(&self, kind: FrontendKind, sources: Option<Arc<[IpNet]>>) -> Frontend {
        let label = port_label(self.port);
        let field = match kind {
            FrontendKind::ClusterIp => format!("spec.ports[{label}]"),
            FrontendKind::NodePort => format!("spec.ports[{label}].nodePort"),
            FrontendKind::ExternalIp => "spec.externalIPs".to_owned(),
            FrontendKind::LoadBalancer => "status.loadBalancer.ingress".to_owned(),
        };
        let traffic = &self.service.traffic;
        let policy = if kind.is_external() { traffic.external_policy } else { traffic.internal_policy };
        let masquerade = match (kind.is_external(), policy) {
            (true, TrafficPolicy::Cluster) => Masquerade::Always,
            (true, TrafficPolicy::Local) => Masquerade::Node,
            (false, _) if self.settings.masquerade_all => Masquerade::Always,
            (false, _) if self.settings.detect_local == DetectLocal::Nothing => Masquerade::Never,
            (false, _) => Masquerade::OffCluster,
        };
        Frontend {
            origin: Origin::field(ObjectKind::Service, self.service.key.clone(), field),
            port_name: self.port.name.clone(),
            kind,
            policy,
            masquerade,
            affinity: traffic.affinity,
            sources,
            endpoints: self.endpoints.clone(),
        }
    }
}

fn port_label(port: &ServicePort) -> String {
    if port.name.is_empty() { port.port.to_string() } else { port.name.to_string() }
}
