//! What the loop tells of its doing, and who is told: health, metrics, health checks, connection tracking.
//!
//! The loop calls [`Attendant::queued`] with what it hears and [`Attendant::synced`] after each cycle. What
//! changed is found by comparing with the frontends of the last cycle, which share what is equal, so that it
//! costs what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use ipnet::IpNet;
use portolan_intent::services::{Frontend, FrontendKey, HealthCheck, NodePortAddresses, ServicesIntent};
use portolan_net::{Family, NodeName, ObjectKey, ObjectKind, Protocol};
use portolan_state::{Change, Node, Object, ObjectRef, TrafficPolicy};
use tokio::sync::watch;

use super::board::ProblemBoard;
use super::conntrack::Tracker;
use super::conntrack_worker::{NodePortPlaces, Worker};
use super::health::{Now, ProxyHealth};
use super::http::Task;
use super::options::ConntrackOptions;
use super::service_health::Plan;
use super::{servers, service_health, sysctls};
use crate::config::AgentConfig;
use crate::metrics::Metrics;
use crate::node::RunError;

/// What the loop knows after a cycle that ran.
#[derive(Debug, Clone, Copy)]
pub struct Synced<'a> {
    /// Every frontend.
    pub frontends: &'a ServicesIntent,
    /// What load balancers may ask.
    pub health_checks: &'a OrdMap<ObjectKey, HealthCheck>,
    /// This node.
    pub node: &'a Node,
    /// The addresses of its links, as far as they are not ours, in any order.
    pub link_addresses: &'a [(String, IpNet)],
    /// Changes that the cycle made or tried.
    pub changes: usize,
    /// How many of them the kernel refused.
    pub failures: usize,
}

/// All that lies around the data plane. It ends with this value.
pub struct Attendant {
    node: NodeName,
    metrics: Arc<Metrics>,
    health: Arc<ProxyHealth>,
    board: Arc<ProblemBoard>,
    places: NodePortPlaces,
    link_addresses: BTreeSet<IpAddr>,
    /// The frontends of the last cycle.
    frontends: ServicesIntent,
    tracker: Tracker,
    worker: Worker,
    /// Whether flows were judged while the kernel did not hold all rules.
    is_premature: bool,
    no_local: NoLocalEndpoints,
    plans: watch::Sender<Plan>,
    conntrack_options: Option<ConntrackOptions>,
    _tasks: Vec<Task>,
}

impl Attendant {
    /// Starts servers and threads. Nothing in the kernel changes yet.
    pub async fn start(config: &AgentConfig, metrics: Arc<Metrics>) -> Result<Attendant, RunError> {
        let options = &config.proxy_options;
        let board = Arc::new(ProblemBoard::default());
        board.set("configuration", options.problems(&config.node));
        let health = Arc::new(ProxyHealth::new(options.sync_period));
        let mut tasks = servers::start(config, &health, &metrics, &board).await?;
        let (plans, followed) = watch::channel(Plan::default());
        tasks.push(Task::spawn(service_health::run(followed, health.clone(), board.clone())));
        let worker = Worker::start(config.node.clone(), metrics.clone(), board.clone())?;
        Ok(Attendant {
            node: config.node.clone(),
            metrics,
            health,
            board,
            places: NodePortPlaces { settings: config.proxy_settings(), node: Vec::new() },
            link_addresses: BTreeSet::new(),
            frontends: ServicesIntent::new(),
            tracker: Tracker::new(config.service_prefixes.clone()),
            worker,
            is_premature: false,
            no_local: NoLocalEndpoints::default(),
            plans,
            conntrack_options: Some(options.conntrack.clone()),
            _tasks: tasks,
        })
    }

    /// Where problems stand.
    pub fn board(&self) -> Arc<ProblemBoard> {
        self.board.clone()
    }

    /// Changes of the tables were heard of.
    pub fn queued(&self, changes: &[Change]) {
        let services = changes.iter().map(|change| concerned(change, ObjectKind::Service)).sum();
        let slices = changes.iter().map(|change| concerned(change, ObjectKind::EndpointSlice)).sum();
        if services + slices > 0 {
            let now = Now::read();
            self.health.queued(now);
            self.metrics.proxy.queued(services, slices, now.time);
        }
    }

    /// Endpoints of a family were changed at these times, of which the next changes tell.
    pub fn triggered(&self, triggers: &[(Family, SystemTime)]) {
        for (family, at) in triggers {
            self.metrics.proxy.triggered(*family, *at);
        }
    }

    /// A cycle ran.
    pub fn synced(&mut self, synced: &Synced<'_>) {
        if let Some(options) = self.conntrack_options.take() {
            let notes = sysctls::apply(&options);
            self.board.set("sysctls", notes.iter().map(|note| note.problem(&self.node)).collect());
        }
        self.health.set_eligible(!synced.node.leaving);
        // One item that the kernel refuses for ever must not take the node out of every load balancer.
        if synced.failures == 0 || synced.failures < synced.changes {
            let now = Now::read();
            self.health.updated(now);
            self.metrics.proxy.updated(now.time);
        }
        self.follow_addresses(synced);
        self.follow_frontends(synced.frontends);
        self.follow_health_checks(synced);
        self.judge_flows(synced.failures > 0);
    }

    fn follow_addresses(&mut self, synced: &Synced<'_>) {
        let links: BTreeSet<IpAddr> = synced.link_addresses.iter().map(|(_, prefix)| prefix.addr()).collect();
        if links != self.link_addresses || self.places.node != synced.node.addresses {
            self.link_addresses = links;
            self.places.node.clone_from(&synced.node.addresses);
            self.tracker.addresses_changed();
        }
    }

    fn follow_frontends(&mut self, frontends: &ServicesIntent) {
        let before = std::mem::replace(&mut self.frontends, frontends.clone());
        let mut is_changed = false;
        for item in before.diff(frontends) {
            let (key, old, new) = match item {
                DiffItem::Add(key, new) => (key, None, Some(new)),
                DiffItem::Update { old: (key, old), new: (_, new) } => (key, Some(old), Some(new)),
                DiffItem::Remove(key, old) => (key, Some(old), None),
            };
            self.tracker.follow(key, old, new);
            self.no_local.follow(key, old, new);
            is_changed = true;
        }
        if is_changed {
            self.metrics.proxy.set_no_local_endpoints("internal", self.no_local.internal.len());
            self.metrics.proxy.set_no_local_endpoints("external", self.no_local.external.len());
        }
    }

    fn follow_health_checks(&mut self, synced: &Synced<'_>) {
        let addresses = match self.places.settings.node_port_addresses {
            NodePortAddresses::All => None,
            NodePortAddresses::Primary | NodePortAddresses::Within(_) => {
                let local = self.link_addresses.iter().chain(&synced.node.addresses).copied().collect();
                Some(self.places.among(&local).into_iter().collect())
            }
        };
        self.plans.send_if_modified(|plan| {
            let differs = plan.addresses != addresses || plan.checks.diff(synced.health_checks).next().is_some();
            if differs {
                *plan = Plan { checks: synced.health_checks.clone(), addresses };
            }
            differs
        });
    }

    /// Flows are judged after the rules, so that no new one is stale at once. Where the kernel refused some of
    /// them, flows are judged now and again when it holds all.
    fn judge_flows(&mut self, is_premature: bool) {
        if self.is_premature && !is_premature {
            self.tracker.addresses_changed();
        }
        self.is_premature = is_premature && (self.is_premature || self.tracker.has_work());
        if let Some(judge) = self.tracker.take(&self.frontends) {
            self.worker.judge(judge, self.places.clone());
        }
    }
}

/// How many objects of a kind a change is about.
fn concerned(change: &Change, kind: ObjectKind) -> usize {
    let is_of_kind = |reference: &ObjectRef| match reference {
        ObjectRef::Service(_) => kind == ObjectKind::Service,
        ObjectRef::EndpointSlice(_) => kind == ObjectKind::EndpointSlice,
        _ => false,
    };
    let is_about = match change {
        Change::Upsert(Object::Service(_), _) => kind == ObjectKind::Service,
        Change::Upsert(Object::EndpointSlice(_), _) => kind == ObjectKind::EndpointSlice,
        Change::Upsert(..) => false,
        Change::Delete(reference) => is_of_kind(reference),
        Change::Reject(problem) => is_of_kind(&problem.object),
        Change::Replace(replaced, objects, rejected) => {
            return if *replaced == kind { objects.len() + rejected.len() } else { 0 };
        }
    };
    usize::from(is_about)
}

/// A port of a Service in one family.
type PortKey = (ObjectKey, Arc<str>, Protocol, Family);

/// Service ports whose traffic must stay on the node that it came to, and that have endpoints on others only;
/// with the number of their frontends.
#[derive(Debug, Default)]
struct NoLocalEndpoints {
    internal: BTreeMap<PortKey, usize>,
    external: BTreeMap<PortKey, usize>,
}

impl NoLocalEndpoints {
    fn follow(&mut self, key: &FrontendKey, old: Option<&Arc<Frontend>>, new: Option<&Arc<Frontend>>) {
        let lacks = |frontend: &&Arc<Frontend>| {
            let endpoints = &frontend.endpoints;
            frontend.policy == TrafficPolicy::Local && endpoints.anywhere && endpoints.local.is_empty()
        };
        let port = |frontend: &Frontend| {
            (frontend.service().clone(), frontend.port_name.clone(), key.protocol(), key.family())
        };
        if let Some(old) = old.filter(lacks) {
            let (ports, port) = (self.ports(old), port(old));
            let left = ports.remove(&port).unwrap_or_default().saturating_sub(1);
            if left > 0 {
                ports.insert(port, left);
            }
        }
        if let Some(new) = new.filter(lacks) {
            *self.ports(new).entry(port(new)).or_default() += 1;
        }
    }

    fn ports(&mut self, frontend: &Frontend) -> &mut BTreeMap<PortKey, usize> {
        if frontend.kind.is_external() { &mut self.external } else { &mut self.internal }
    }
}

#[cfg(test)]
mod tests;
