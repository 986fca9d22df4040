//! Intent to program. The cost of an update follows what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use portolan_intent::NodeView;
use portolan_intent::services::{Backend, Frontend, FrontendKey, FrontendUpdate, NodePortAddresses, ServicesIntent};
use portolan_net::{Family, Port, Protocol};
use portolan_state::{AffinityTimeout, TrafficPolicy};

use crate::layout::node_port_addresses;

use super::{
    Change, Forwarding, IpvsSettings, Program, RealKey, RealServer, Scheduler, ServerKey, SourceHash, VirtualServer,
    diff,
};

/// How many real servers may be on their way out. Beyond that the one that leaves longest goes at once.
pub const LEAVING_MAX: usize = 50_000;

/// How often the connections of leaving real servers should be counted. kube-proxy does it every minute.
pub const LEAVING_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The weight of an endpoint that serves: all are alike.
const WEIGHT: u32 = 1;

/// Sysctls of the mode, by path below `/proc/sys`.
///
/// `conn_reuse_mode` 1 is the kernel's own, and right since Linux 5.9; with it a client that reuses a port meets
/// neither a delay of one second nor an endpoint that is gone. `expire_nodest_conn` and `expire_quiescent_template`
/// end connections, and a client's bond, whose endpoint is gone.
const SYSCTLS: [(&str, &str); 5] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/vs/conn_reuse_mode", "1"),
    ("net/ipv4/vs/conntrack", "1"),
    ("net/ipv4/vs/expire_nodest_conn", "1"),
    ("net/ipv4/vs/expire_quiescent_template", "1"),
];

/// With [`IpvsSettings::strict_arp`].
const STRICT_ARP: [(&str, &str); 2] = [("net/ipv4/conf/all/arp_announce", "2"), ("net/ipv4/conf/all/arp_ignore", "1")];

/// Where there is IPv6.
const FORWARD_V6: (&str, &str) = ("net/ipv6/conf/all/forwarding", "1");

/// Every sysctl that the room may set, by path below `/proc/sys`.
pub fn sysctl_paths() -> impl Iterator<Item = &'static str> {
    SYSCTLS.into_iter().chain(STRICT_ARP).chain([FORWARD_V6]).map(|(path, _)| path)
}

/// The program of an intent, from nothing, with kube-proxy's settings.
pub fn compile(
    services: &ServicesIntent,
    health_ports: &BTreeSet<Port>,
    node_addresses: &[IpAddr],
    view: &NodeView,
) -> Program {
    compile_with(services, health_ports, node_addresses, view, &IpvsSettings::default())
}

/// The program of an intent, from nothing.
pub fn compile_with(
    services: &ServicesIntent,
    health_ports: &BTreeSet<Port>,
    node_addresses: &[IpAddr],
    view: &NodeView,
    settings: &IpvsSettings,
) -> Program {
    let mut compiler = Compiler::with_settings(view, &Family::ALL, settings.clone());
    compiler.set_node_addresses(node_addresses);
    compiler.set_health_ports(health_ports);
    compiler.update_services(&FrontendUpdate::everything(services));
    compiler.program
}

/// Keeps the program current.
///
/// A real server of a TCP service whose endpoint goes away stays with weight 0 until it has no connections left
/// ([`Compiler::leaving`], [`Compiler::settle`]). That is the one thing which the program has from the past.
#[derive(Debug, Clone)]
pub struct Compiler {
    program: Program,
    families: Vec<Family>,
    settings: IpvsSettings,
    node_ports_at: NodePortAddresses,
    frontends: ServicesIntent,
    /// How many frontends have this address.
    bound: BTreeMap<IpAddr, usize>,
    /// The node's own addresses, which the dummy link must not have too.
    own: BTreeSet<IpAddr>,
    /// Those of them where node ports answer.
    node_port_addresses: BTreeSet<IpAddr>,
    leaving: Leaving,
}

impl Compiler {
    /// The program of a node without Services, in these families, with kube-proxy's settings.
    pub fn new(view: &NodeView, families: &[Family]) -> Compiler {
        Compiler::with_settings(view, families, IpvsSettings::default())
    }

    /// The program of a node without Services, in these families.
    pub fn with_settings(view: &NodeView, families: &[Family], settings: IpvsSettings) -> Compiler {
        let arp = STRICT_ARP.into_iter().filter(|_| settings.strict_arp);
        let v6 = [FORWARD_V6].into_iter().filter(|_| families.contains(&Family::V6));
        let sysctls = SYSCTLS.into_iter().chain(arp).chain(v6);
        let program = Program {
            device: true,
            timeouts: settings.timeouts,
            sysctls: sysctls.map(|(path, value)| (path.to_owned(), value.to_owned())).collect(),
            excluded: settings.exclude.clone(),
            ..Program::default()
        };
        Compiler {
            program,
            families: families.to_vec(),
            settings,
            node_ports_at: view.proxy.node_port_addresses.clone(),
            frontends: ServicesIntent::new(),
            bound: BTreeMap::new(),
            own: BTreeSet::new(),
            node_port_addresses: BTreeSet::new(),
            leaving: Leaving::default(),
        }
    }

    /// The program as of the last update.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Follows frontends that changed, and returns what the kernel must change, in order.
    pub fn update_services(&mut self, updates: &[FrontendUpdate]) -> Vec<Change> {
        let mut touched = BTreeSet::new();
        let mut moved = BTreeSet::new();
        for update in updates {
            if !self.families.contains(&update.key.family()) {
                continue;
            }
            let before = match &update.new {
                Some(new) => self.frontends.insert(update.key, new.clone()),
                None => self.frontends.remove(&update.key),
            };
            self.servers_of(&update.key, &mut touched);
            let FrontendKey::Address { address, .. } = update.key else { continue };
            match (before.is_some(), update.new.is_some()) {
                (false, true) => *self.bound.entry(address).or_default() += 1,
                (true, false) => self.unbind(address),
                (false, false) | (true, true) => continue,
            }
            moved.insert(address);
        }
        self.refresh(touched, moved)
    }

    /// Ports of health checks are let in by sets and chains; nothing of this room changes.
    pub fn set_health_ports(&mut self, _ports: &BTreeSet<Port>) -> Vec<Change> {
        Vec::new()
    }

    /// Follows the node's own addresses, without those of the dummy link, the first of each family first.
    pub fn set_node_addresses(&mut self, addresses: &[IpAddr]) -> Vec<Change> {
        let own: BTreeSet<IpAddr> = addresses.iter().copied().collect();
        let ports_at = node_port_addresses(addresses, &self.node_ports_at);
        let moved: BTreeSet<IpAddr> = own.symmetric_difference(&self.own).copied().collect();
        let changed: BTreeSet<IpAddr> = ports_at.symmetric_difference(&self.node_port_addresses).copied().collect();
        self.own = own;
        self.node_port_addresses = ports_at;
        let mut touched = BTreeSet::new();
        for key in self.frontends.keys() {
            let FrontendKey::NodePort { family, protocol, port } = *key else { continue };
            let servers = changed.iter().filter(|address| Family::of(**address) == family);
            touched.extend(servers.map(|address| ServerKey { protocol, address: *address, port }));
        }
        self.refresh(touched, moved)
    }

    /// Real servers that are on their way out, by the virtual server they leave. Their connections are to be
    /// counted every [`LEAVING_CHECK_INTERVAL`], and [`Compiler::settle`] told.
    pub fn leaving(&self) -> impl Iterator<Item = (ServerKey, RealKey)> + '_ {
        self.leaving.since.keys().copied()
    }

    /// Lets those go that have left: the connections of each, or `None` if the kernel has it no more.
    pub fn settle(&mut self, connections: &[(ServerKey, RealKey, Option<u32>)]) -> Vec<Change> {
        let idle = connections.iter().filter(|(.., count)| count.unwrap_or(0) == 0);
        let idle: Vec<(ServerKey, RealKey)> = idle.map(|(server, real, _)| (*server, *real)).collect();
        idle.into_iter().filter_map(|(server, real)| self.let_go(server, real)).collect()
    }

    /// Takes over what the kernel has at a start: real servers of ours that no endpoint stands behind any more leave
    /// as gracefully as if we had seen their endpoint go. Call it when the Services are known, before the first
    /// [`diff`].
    pub fn adopt(&mut self, observed: &Program) {
        for (key, there) in &observed.servers {
            let Some(server) = self.program.servers.get(key) else { continue };
            if key.protocol != Protocol::Tcp || !self.program.owns(key, there) {
                continue;
            }
            let merged = self.leaving.keep(*key, &there.real, &server.real);
            if merged.len() != server.real.len() {
                let server = VirtualServer { real: merged, ..(**server).clone() };
                self.program.servers.insert(*key, Arc::new(server));
            }
        }
        self.bound_leaving();
    }

    /// The virtual servers that a frontend may have.
    fn servers_of(&self, key: &FrontendKey, into: &mut BTreeSet<ServerKey>) {
        match *key {
            FrontendKey::Address { address, protocol, port } => {
                into.insert(ServerKey { protocol, address, port });
            }
            FrontendKey::NodePort { family, protocol, port } => {
                let addresses = self.node_port_addresses.iter().filter(|address| Family::of(**address) == family);
                into.extend(addresses.map(|address| ServerKey { protocol, address: *address, port }));
            }
        }
    }

    /// The frontend that a virtual server stands for. An address of a Service counts before a node port.
    fn frontend_of(&self, key: &ServerKey) -> Option<&Arc<Frontend>> {
        let ServerKey { protocol, address, port } = *key;
        self.frontends.get(&FrontendKey::Address { address, protocol, port }).or_else(|| {
            let node_port = FrontendKey::NodePort { family: key.family(), protocol, port };
            self.frontends.get(&node_port).filter(|_| self.node_port_addresses.contains(&address))
        })
    }

    fn unbind(&mut self, address: IpAddr) {
        if let Some(count) = self.bound.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.bound.remove(&address);
            }
        }
    }

    /// Brings virtual servers and addresses up to date.
    fn refresh(&mut self, touched: BTreeSet<ServerKey>, moved: BTreeSet<IpAddr>) -> Vec<Change> {
        let mut changes = Vec::new();
        for key in touched {
            self.refresh_server(key, &mut changes);
        }
        for address in moved {
            let is_wanted = self.bound.contains_key(&address) && !self.own.contains(&address);
            if is_wanted && self.program.addresses.insert(address) {
                changes.push(Change::AddAddress(address));
            } else if !is_wanted && self.program.addresses.remove(&address) {
                changes.push(Change::RemoveAddress(address));
            }
        }
        changes.extend(self.bound_leaving());
        changes.sort_by_key(Change::phase);
        changes
    }

    fn refresh_server(&mut self, key: ServerKey, changes: &mut Vec<Change>) {
        let old = self.program.servers.get(&key).cloned();
        let mut new = self.frontend_of(&key).map(|frontend| virtual_server(&key, frontend, &self.settings));
        match (&old, &mut new) {
            (Some(old), Some(new)) if key.protocol == Protocol::Tcp => {
                new.real = self.leaving.keep(key, &old.real, &new.real);
            }
            (Some(old), None) => self.leaving.forget(key, &old.real),
            _ => {}
        }
        let new = new.map(Arc::new);
        diff::server(&key, old.as_ref(), new.as_ref(), changes);
        match new {
            Some(new) => self.program.servers.insert(key, new),
            None => self.program.servers.remove(&key),
        };
    }

    /// Removes a real server that is leaving.
    fn let_go(&mut self, server: ServerKey, real: RealKey) -> Option<Change> {
        if !self.leaving.remove(server, real) {
            return None;
        }
        let old = self.program.servers.get(&server)?;
        let rest: Arc<[RealServer]> = old.real.iter().filter(|it| it.key != real).cloned().collect();
        let new = VirtualServer { real: rest, ..(**old).clone() };
        self.program.servers.insert(server, Arc::new(new));
        Some(Change::RemoveReal(server, real))
    }

    /// Lets those go that leave longest, where there are too many.
    fn bound_leaving(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        while self.leaving.since.len() > LEAVING_MAX {
            let Some((server, real)) = self.leaving.oldest() else { break };
            changes.extend(self.let_go(server, real));
        }
        changes
    }
}

/// Real servers on their way out, and their order.
#[derive(Debug, Clone, Default)]
struct Leaving {
    since: BTreeMap<(ServerKey, RealKey), u64>,
    order: BTreeMap<u64, (ServerKey, RealKey)>,
    next: u64,
}

impl Leaving {
    /// The real servers that a virtual server has when `old` become `new`: those that are no more wanted stay
    /// without weight.
    fn keep(&mut self, server: ServerKey, old: &[RealServer], new: &Arc<[RealServer]>) -> Arc<[RealServer]> {
        let mut leaving = Vec::new();
        for before in old {
            if new.binary_search_by_key(&before.key, |it| it.key).is_ok() {
                self.remove(server, before.key);
            } else {
                self.add(server, before.key);
                leaving.push(RealServer { weight: 0, ..before.clone() });
            }
        }
        if leaving.is_empty() {
            return new.clone();
        }
        leaving.extend(new.iter().cloned());
        leaving.sort_by_key(|it| it.key);
        leaving.into()
    }

    fn add(&mut self, server: ServerKey, real: RealKey) {
        if let std::collections::btree_map::Entry::Vacant(entry) = self.since.entry((server, real)) {
            entry.insert(self.next);
            self.order.insert(self.next, (server, real));
            self.next += 1;
        }
    }

    fn remove(&mut self, server: ServerKey, real: RealKey) -> bool {
        let Some(number) = self.since.remove(&(server, real)) else { return false };
        self.order.remove(&number);
        true
    }

    fn oldest(&self) -> Option<(ServerKey, RealKey)> {
        self.order.first_key_value().map(|(_, key)| *key)
    }

    /// All of one virtual server.
    fn forget(&mut self, server: ServerKey, real: &[RealServer]) {
        for gone in real {
            self.remove(server, gone.key);
        }
    }
}

fn virtual_server(key: &ServerKey, frontend: &Frontend, settings: &IpvsSettings) -> VirtualServer {
    let family = key.family();
    let real = backends_of(frontend).iter().filter(|it| Family::of(it.address) == family).map(|backend| RealServer {
        key: RealKey { address: backend.address, port: backend.port },
        weight: WEIGHT,
        forwarding: Forwarding::Masquerade,
        origin: Some(backend.origin.clone()),
    });
    let is_maglev = settings.scheduler == Scheduler::Maglev;
    VirtualServer {
        scheduler: settings.scheduler.clone(),
        persistence_seconds: frontend.affinity.map(AffinityTimeout::seconds),
        client_bits: family.bits(),
        // As kube-proxy: without the port all connections of a client would meet one endpoint.
        source_hash: SourceHash { port: is_maglev, ..SourceHash::default() },
        real: real.collect(),
        origin: Some(frontend.origin.clone()),
    }
}

/// Who serves. A virtual server has one list for all clients. Where the policy is local and no endpoint is, an
/// external one has those of the cluster, for pods and the node; the chains drop what comes from outside.
fn backends_of(frontend: &Frontend) -> &Arc<[Backend]> {
    let endpoints = &frontend.endpoints;
    match frontend.policy {
        TrafficPolicy::Local if frontend.kind.is_external() && endpoints.local.is_empty() => &endpoints.cluster,
        policy => endpoints.of(policy),
    }
}
