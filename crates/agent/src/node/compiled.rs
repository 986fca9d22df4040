//! Intent and programs of one view, kept between cycles.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use portolan_intent::services::ServicesCompiler;
use portolan_intent::{Encapsulation, NodeView, Segment, fabric, masquerade, wiring};
use portolan_net::Port;
use portolan_program::netlink::{self, Surroundings};
use portolan_program::{ipvs, nftables};
use portolan_state::{Dirty, Node, Problem, Snapshot};

use super::engine::Waiting;
use super::port::KernelPort;
use super::rooms::{KeptRoom, NodeFacts, Steps};
use crate::config::{AgentConfig, ServicesMode};

/// How many frontends are compiled at a time where nobody asks for each one's changes.
pub(super) const FRONTENDS_PER_STEP: usize = 256;

/// Everything that follows from a view. A new view starts it anew.
pub(super) struct Compiled<P> {
    pub(super) view: NodeView,
    pub(super) services: ServicesCompiler,
    /// How Services are served.
    pub(super) mode: ServicesMode,
    /// The masquerading of pods in every mode, and Services in its own.
    pub(super) nftables: nftables::Compiler,
    /// The other rooms: first those that serve Services, then those in which nothing is wanted.
    pub(super) rooms: Vec<Box<dyn KeptRoom<P> + Send>>,
    /// Whether what other modes left behind has been looked for, and nothing is left.
    pub(super) is_alone: bool,
    pub(super) facts: NodeFacts,
    /// What rtnetlink must hold, and is believed to hold between readings.
    pub(super) wanted: netlink::Program,
    pub(super) problems: Vec<Problem>,
}

impl<P: KernelPort> Compiled<P> {
    pub(super) fn new(view: NodeView, config: &AgentConfig, port: &mut P) -> Compiled<P> {
        let mode = config.services_mode();
        let families = view.families();
        Compiled {
            services: ServicesCompiler::new(view.node.clone(), view.proxy.clone()),
            nftables: match mode {
                ServicesMode::Nftables => nftables::Compiler::new(&view, &families),
                _ => nftables::Compiler::without_services(&view, &families),
            },
            rooms: P::used_rooms(config, &view, &families).into_iter().chain(port.unused_rooms(Some(mode))).collect(),
            is_alone: false,
            facts: NodeFacts::default(),
            mode,
            wanted: netlink::Program::default(),
            problems: Vec::new(),
            view,
        }
    }

    /// Takes a view that differs in nothing, or in who shares the node's link: that decides the netlink room alone.
    /// Returns whether it was taken.
    pub(super) fn take_view(&mut self, view: &NodeView) -> bool {
        self.view.segment.clone_from(&view.segment);
        self.view == *view
    }

    /// Compiles all of the netlink room, and returns what it was.
    pub(super) fn compile_netlink(&mut self, snapshot: &Snapshot) -> netlink::Program {
        let (fabric, problems) = fabric::compile(snapshot, &self.view);
        let wiring = wiring::compile(snapshot, &self.view);
        self.problems = problems;
        std::mem::replace(&mut self.wanted, netlink::compile(&fabric, &wiring, &self.view))
    }

    /// Compiles the pod interfaces that changed, and returns the steps: a pod that comes or goes costs
    /// the same whatever the number of pods and nodes.
    pub(super) fn compile_pods(&mut self, snapshot: &Snapshot, dirty: &Dirty) -> Vec<netlink::Change> {
        let wiring = wiring::compile_some(snapshot, &self.view, &dirty.attachments);
        let mut is = netlink::Program::default();
        for key in &dirty.attachments {
            is.pods.extend(self.wanted.pods.remove_entry(key));
        }
        let want = netlink::Program { pods: netlink::compile_pods(&wiring, &self.view), ..netlink::Program::default() };
        self.wanted.pods.extend(want.pods.iter().map(|(key, pod)| (key.clone(), pod.clone())));
        netlink::diff(&want, &is, &Surroundings::default())
    }

    /// Follows the tables. Where the kernel is compared as a whole, nobody wants each change. Returns the
    /// changes of the nftables room, and what the other rooms did.
    pub(super) fn compile_services(
        &mut self,
        snapshot: &Snapshot,
        dirty: &Dirty,
        is_nftables_compared: bool,
        port: &mut P,
        is_compared: bool,
    ) -> (Vec<nftables::Change>, Vec<Steps>) {
        let masquerade = masquerade::compile(snapshot, &self.view);
        let updates = self.services.update(snapshot, dirty);
        self.facts.health_ports = health_ports(&self.services);
        let mut steps = Vec::new();
        for room in self.rooms.iter_mut().filter(|room| room.is_used()) {
            if is_compared {
                room.learn(&updates, &self.facts);
            } else {
                steps.push(room.follow(port, &updates, &self.facts));
            }
        }
        let mut changes = self.nftables.set_node_addresses(&self.facts.addresses);
        changes.extend(self.nftables.set_node_prefixes(&self.facts.prefixes));
        if self.mode == ServicesMode::Nftables {
            for part in updates.chunks(FRONTENDS_PER_STEP) {
                let made = self.nftables.update_services(part);
                changes.extend(if is_nftables_compared { Vec::new() } else { made });
            }
        }
        changes.extend(self.nftables.set_masquerade(&masquerade));
        (if is_nftables_compared { Vec::new() } else { changes }, steps)
    }
}

pub(super) fn health_ports(services: &ServicesCompiler) -> BTreeSet<Port> {
    services.health_checks().values().map(|check| check.port).collect()
}

/// The node's addresses: first those that the cluster knows it by, then all others that its links have.
pub(super) fn node_addresses(node: &Node, others: &Surroundings) -> Vec<IpAddr> {
    let mut addresses = node.addresses.clone();
    // The dummy link's addresses are the Services'.
    let own = others.addresses.iter().filter(|(link, _)| *link != ipvs::DEVICE);
    for address in own.map(|(_, prefix)| prefix.addr()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// Who this node is, from its configuration, its entry in the cluster, and its links.
pub(super) fn view(config: &AgentConfig, node: &Node, others: &Surroundings) -> Result<NodeView, Waiting> {
    let underlay = if let Some(name) = &config.underlay_interface {
        others.link(name).ok_or_else(|| Waiting::NoSuchLink(name.clone()))?
    } else {
        let holder = others.addresses.iter().find(|(_, prefix)| node.addresses.contains(&prefix.addr()));
        holder.and_then(|(link, _)| others.link(link)).ok_or_else(|| Waiting::NoUnderlay {
            node: node.name.to_string(),
            addresses: node.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        })?
    };
    // The configuration was checked when it was read.
    let fabric_settings = config.fabric_settings().map_err(|error| Waiting::Kernel(error.to_string()))?;
    let mut view = NodeView {
        node: config.node.clone(),
        fabric: config.fabric,
        fabric_settings,
        cluster_prefixes: config.cluster_prefixes.clone(),
        service_prefixes: config.service_prefixes.clone(),
        masquerade: config.masquerade,
        underlay_interface: underlay.name.clone(),
        underlay_mtu: underlay.mtu,
        segment: Segment::default(),
        bridge: config.bridge.clone(),
        proxy: config.proxy_settings(),
    };
    // IPv6 in IP in IP asks too: what is near goes as it is.
    if view.routes_directly() || view.encapsulation() == Some(Encapsulation::Ipip) {
        view.segment = segment(&view.underlay_interface, others);
    }
    Ok(view)
}

/// Who shares a link with this node, by the routes that others made, the kernel above all: it makes one of each
/// address's prefix.
fn segment(link: &str, others: &Surroundings) -> Segment {
    // Of equal destinations, the one of the lowest metric is taken.
    let mut best: BTreeMap<IpNet, (u32, bool)> = BTreeMap::new();
    for route in &others.routes {
        let destination = route.destination;
        let is_link_local = match destination.network() {
            IpAddr::V4(address) => address.is_link_local() || address.is_multicast(),
            IpAddr::V6(address) => address.is_unicast_link_local() || address.is_multicast(),
        };
        if is_link_local {
            continue;
        }
        let entry = (route.metric, route.device == link && route.gateway.is_none());
        best.entry(destination).and_modify(|known| *known = entry.min(*known)).or_insert(entry);
    }
    let (on_link, beyond): (Vec<_>, Vec<_>) = best.into_iter().partition(|(_, (_, is_on_link))| *is_on_link);
    let prefixes = |found: Vec<(IpNet, (u32, bool))>| found.into_iter().map(|(prefix, _)| prefix).collect();
    Segment::new(prefixes(on_link), prefixes(beyond))
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_program::netlink::ForeignRoute;

    #[test]
    fn the_segment_is_what_the_link_reaches_without_a_next_hop() {
        let route = |destination: &str, gateway: Option<&str>, device: &str, metric| ForeignRoute {
            destination: destination.parse().unwrap(),
            device: device.into(),
            gateway: gateway.map(|it| it.parse().unwrap()),
            onlink: false,
            metric,
            protocol: 2,
        };
        let routes = vec![
            route("192.168.64.0/24", None, "eth0", 100),
            // A second link on the same prefix, which is taken only when the first is gone.
            route("192.168.64.0/24", None, "eth1", 200),
            route("192.168.70.0/24", None, "eth1", 0),
            route("192.168.70.0/24", None, "eth0", 10),
            route("0.0.0.0/0", Some("192.168.64.1"), "eth0", 0),
            route("192.168.64.200/32", Some("192.168.64.1"), "eth0", 0),
            route("fe80::/64", None, "eth0", 256),
            route("fd00:64::/64", None, "eth0", 256),
        ];
        let segment = segment("eth0", &Surroundings { routes, ..Surroundings::default() });
        let is_near = |address: &str| segment.has(address.parse().unwrap());
        assert!(is_near("192.168.64.12") && is_near("fd00:64::12"));
        assert!(!is_near("192.168.64.200") && !is_near("192.168.70.1") && !is_near("192.168.65.1"));
        assert_eq!(segment.prefixes().len(), 2);
    }
}
