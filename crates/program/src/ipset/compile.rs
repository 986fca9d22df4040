//! Intent to program. The cost of an update follows what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portolan_intent::NodeView;
use portolan_intent::services::{
    Backend, Frontend, FrontendKey, FrontendKind, FrontendUpdate, NodePortAddresses, ServicesIntent,
};
use portolan_net::{Family, Origin, Port, Protocol};
use portolan_state::TrafficPolicy;

use super::{Change, Entry, IpSet, Program, SetKey, kind_of};
use crate::layout::{IpSetName, node_port_addresses};

/// The program of an intent, from nothing.
pub fn compile(
    services: &ServicesIntent,
    health_ports: &BTreeSet<Port>,
    node_addresses: &[IpAddr],
    view: &NodeView,
) -> Program {
    let mut compiler = Compiler::new(view, &Family::ALL);
    compiler.set_node_addresses(node_addresses);
    compiler.set_health_ports(health_ports);
    compiler.update_services(&FrontendUpdate::everything(services));
    compiler.program
}

/// An entry of a set.
type Place = (SetKey, Entry);

/// Keeps the program current.
#[derive(Debug, Clone)]
pub struct Compiler {
    program: Program,
    families: Vec<Family>,
    node_ports_at: NodePortAddresses,
    health_ports: BTreeSet<Port>,
    own: BTreeSet<IpAddr>,
    node_port_addresses: BTreeSet<IpAddr>,
    frontends: ServicesIntent,
    /// How many frontends have an entry, where more than one has it.
    shared: BTreeMap<Place, usize>,
}

impl Compiler {
    /// The program of a node without Services, in these families: all sets, empty.
    pub fn new(view: &NodeView, families: &[Family]) -> Compiler {
        let keys = families.iter().flat_map(|family| IpSetName::ALL.map(|name| SetKey { family: *family, name }));
        let empty = |key: SetKey| (key, IpSet { kind: kind_of(key.name), entries: imbl::OrdMap::new() });
        Compiler {
            program: Program { sets: keys.map(empty).collect() },
            families: families.to_vec(),
            node_ports_at: view.proxy.node_port_addresses.clone(),
            health_ports: BTreeSet::new(),
            own: BTreeSet::new(),
            node_port_addresses: BTreeSet::new(),
            frontends: ServicesIntent::new(),
            shared: BTreeMap::new(),
        }
    }

    /// The program as of the last update.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Follows frontends that changed, and returns what the kernel must change, in order.
    pub fn update_services(&mut self, updates: &[FrontendUpdate]) -> Vec<Change> {
        let mut net = Net::default();
        for update in updates {
            if !self.families.contains(&update.key.family()) {
                continue;
            }
            let old = match &update.new {
                Some(new) => self.frontends.insert(update.key, new.clone()),
                None => self.frontends.remove(&update.key),
            };
            let (old, new) = (self.entries(&update.key, old.as_ref()), self.entries(&update.key, update.new.as_ref()));
            self.replace(&old, new, &mut net);
        }
        net.changes()
    }

    /// Follows the ports of health checks, which are let in.
    pub fn set_health_ports(&mut self, ports: &BTreeSet<Port>) -> Vec<Change> {
        let entries = |ports: &BTreeSet<Port>, families: &[Family]| -> Entries {
            let origin = Origin::configuration("healthCheckNodePort");
            let of = |family: Family, port: Port| {
                ((SetKey { family, name: IpSetName::HealthCheckNodePort }, Entry::Port(port)), origin.clone())
            };
            families
                .iter()
                .flat_map(|family| ports.iter().map(move |port| (*family, *port)))
                .map(|(a, b)| of(a, b))
                .collect()
        };
        let (old, new) = (entries(&self.health_ports, &self.families), entries(ports, &self.families));
        self.health_ports.clone_from(ports);
        let mut net = Net::default();
        self.replace(&old, new, &mut net);
        net.changes()
    }

    /// Follows the node's own addresses, without those of the dummy link, the first of each family first.
    pub fn set_node_addresses(&mut self, addresses: &[IpAddr]) -> Vec<Change> {
        let frontends = self.frontends.clone();
        let of_all = |compiler: &Compiler| -> Vec<Entries> {
            frontends.iter().map(|(key, frontend)| compiler.entries(key, Some(frontend))).collect()
        };
        let before = of_all(self);
        self.own = addresses.iter().copied().collect();
        self.node_port_addresses = node_port_addresses(addresses, &self.node_ports_at);
        let after = of_all(self);
        let mut net = Net::default();
        for (old, new) in before.into_iter().zip(after) {
            self.replace(&old, new, &mut net);
        }
        net.changes()
    }

    /// Exchanges the entries of one frontend.
    fn replace(&mut self, old: &Entries, new: Entries, net: &mut Net) {
        for place in old.keys().filter(|place| !new.contains_key(*place)) {
            if let Some(count) = self.shared.get_mut(place) {
                *count -= 1;
                if *count < 2 {
                    self.shared.remove(place);
                }
                continue;
            }
            let Some(set) = self.program.sets.get_mut(&place.0) else { continue };
            if set.entries.remove(&place.1).is_some() {
                net.removed(*place);
            }
        }
        for (place, origin) in new {
            let Some(set) = self.program.sets.get_mut(&place.0) else { continue };
            let is_new_here = !old.contains_key(&place);
            if set.entries.contains_key(&place.1) {
                if is_new_here {
                    *self.shared.entry(place).or_insert(1) += 1;
                }
            } else {
                set.entries.insert(place.1, Some(origin));
                net.added(place);
            }
        }
    }

    /// All entries that one frontend needs.
    fn entries(&self, key: &FrontendKey, frontend: Option<&Arc<Frontend>>) -> Entries {
        let Some(frontend) = frontend else { return Entries::new() };
        let mut into = Into { family: key.family(), origin: &frontend.origin, entries: Entries::new() };
        let protocol = key.protocol();
        let family = key.family();
        for backend in own_clients(frontend).filter(|it| Family::of(it.address) == family) {
            into.add(IpSetName::LoopBack, Entry::IpPortIp(backend.address, protocol, backend.port, backend.address));
        }
        let is_local = frontend.policy == TrafficPolicy::Local;
        match *key {
            FrontendKey::Address { address, port, .. } => {
                let at = Entry::IpPort(address, protocol, port);
                match frontend.kind {
                    FrontendKind::ClusterIp | FrontendKind::NodePort => into.add(IpSetName::ClusterIp, at),
                    FrontendKind::ExternalIp if is_local => into.add(IpSetName::ExternalIpLocal, at),
                    FrontendKind::ExternalIp => into.add(IpSetName::ExternalIp, at),
                    FrontendKind::LoadBalancer => {
                        into.add(IpSetName::LoadBalancer, at);
                        if is_local {
                            into.add(IpSetName::LoadBalancerLocal, at);
                        }
                    }
                }
                // Where nobody serves, everyone is told so.
                if let Some(sources) = frontend.sources.as_ref().filter(|_| frontend.endpoints.anywhere) {
                    into.add(IpSetName::LoadBalancerFw, at);
                    sources.iter().for_each(|source| into.add_source(address, protocol, port, source));
                }
                if !self.own.contains(&address) {
                    into.add(IpSetName::IpvsIps, Entry::Ip(address));
                }
                if let Some(set) = dropped(frontend) {
                    into.add(set, at);
                }
            }
            FrontendKey::NodePort { family, port, .. } => {
                let addresses = || self.node_port_addresses.iter().filter(move |it| Family::of(**it) == family);
                let sets = match protocol {
                    Protocol::Tcp => [IpSetName::NodePortTcp, IpSetName::NodePortLocalTcp],
                    Protocol::Udp => [IpSetName::NodePortUdp, IpSetName::NodePortLocalUdp],
                    Protocol::Sctp | Protocol::Icmp => [IpSetName::NodePortSctp, IpSetName::NodePortLocalSctp],
                };
                for set in sets.into_iter().take(if is_local { 2 } else { 1 }) {
                    if kind_of(set) == super::SetKind::BitmapPort {
                        into.add(set, Entry::Port(port));
                    } else {
                        addresses().for_each(|address| into.add(set, Entry::IpPort(*address, protocol, port)));
                    }
                }
                if let Some(set) = dropped(frontend) {
                    addresses().for_each(|address| into.add(set, Entry::IpPort(*address, protocol, port)));
                }
            }
        }
        into.entries
    }
}

/// Entries and what causes each.
type Entries = BTreeMap<Place, Origin>;

/// Collects the entries of one frontend.
struct Into<'a> {
    family: Family,
    origin: &'a Origin,
    entries: Entries,
}

impl Into<'_> {
    fn add(&mut self, name: IpSetName, entry: Entry) {
        self.entries.insert((SetKey { family: self.family, name }, entry), self.origin.clone());
    }

    /// The address of a load balancer may be its own client: a process of this node has it as its source.
    fn add_source(&mut self, address: IpAddr, protocol: Protocol, port: Port, source: &IpNet) {
        if *source == IpNet::from(address) {
            self.add(IpSetName::LoadBalancerSourceIp, Entry::IpPortIp(address, protocol, port, address));
            return;
        }
        let family = self.family;
        for prefix in not_empty(source).into_iter().filter(|it| Family::of_prefix(it) == family) {
            self.add(IpSetName::LoadBalancerSourceCidr, Entry::IpPortNet(address, protocol, port, prefix));
        }
    }
}

/// Changes of several frontends: an entry may go from one to another.
#[derive(Debug, Default)]
struct Net {
    added: BTreeSet<Place>,
    removed: BTreeSet<Place>,
}

impl Net {
    fn added(&mut self, place: Place) {
        if !self.removed.remove(&place) {
            self.added.insert(place);
        }
    }

    fn removed(&mut self, place: Place) {
        if !self.added.remove(&place) {
            self.removed.insert(place);
        }
    }

    fn changes(self) -> Vec<Change> {
        let added = self.added.into_iter().map(|(set, entry)| Change::Add(set, entry));
        let removed = self.removed.into_iter().map(|(set, entry)| Change::Remove(set, entry));
        added.chain(removed).collect()
    }
}

/// The endpoints of this node, which may be their own clients.
fn own_clients(frontend: &Frontend) -> impl Iterator<Item = &Backend> {
    let endpoints = &frontend.endpoints;
    endpoints.cluster.iter().chain(endpoints.local.iter()).filter(|backend| backend.local)
}

/// Whether somebody is dropped since there is no endpoint for them while there is one elsewhere: the set for that.
fn dropped(frontend: &Frontend) -> Option<IpSetName> {
    let endpoints = &frontend.endpoints;
    if !endpoints.anywhere || !endpoints.of(frontend.policy).is_empty() {
        return None;
    }
    let others_are_served = frontend.kind.is_external() && !endpoints.cluster.is_empty();
    Some(if others_are_served { IpSetName::NoLocalOutside } else { IpSetName::NoLocal })
}

/// The kernel's sets hold no prefix of length 0: two halves do the same.
fn not_empty(prefix: &IpNet) -> Vec<IpNet> {
    if prefix.prefix_len() > 0 {
        return vec![prefix.trunc()];
    }
    let halves: [Option<IpNet>; 2] = match prefix {
        IpNet::V4(_) => [0, 1 << 31].map(|bits: u32| Ipv4Net::new(Ipv4Addr::from(bits), 1).ok().map(IpNet::from)),
        IpNet::V6(_) => [0, 1 << 127].map(|bits: u128| Ipv6Net::new(Ipv6Addr::from(bits), 1).ok().map(IpNet::from)),
    };
    halves.into_iter().flatten().collect()
}
