//! The kernel in memory as the engine's port, and what somebody else does to it.

use std::collections::VecDeque;

use portolan_agent::node::port::{Applied, KernelPort};
use portolan_kernel::monitor::Event;
use portolan_kernel::netlink::Observed;
use portolan_kernel::{FakeKernel, KernelError};
use portolan_net::{Family, IpNet};
use portolan_program::netlink::{self, Change, ForeignLink, ForeignRoute, Surroundings};
use portolan_program::nftables;

use super::format::Act;

/// A kernel in memory, which can also fail to be read.
#[derive(Debug, Clone, Default)]
pub struct FakePort {
    pub kernel: FakeKernel,
    /// Whether each of the next readings fails.
    pub unreadable: VecDeque<bool>,
}

impl FakePort {
    fn read(&mut self) -> Result<(), KernelError> {
        if self.unreadable.pop_front().unwrap_or_default() { Err(KernelError::Unstable(8)) } else { Ok(()) }
    }
}

impl KernelPort for FakePort {
    fn observe_netlink(&mut self) -> Result<Observed, KernelError> {
        self.read()?;
        Ok(self.kernel.observe_netlink())
    }

    fn apply_netlink(&mut self, changes: &[netlink::Change]) -> Applied<netlink::Change> {
        let report = self.kernel.apply_netlink(changes);
        Applied { failed: report.failed, messages: report.messages }
    }

    fn check_pod(&mut self, _pod: &netlink::PodLink) -> Vec<String> {
        Vec::new()
    }

    fn observe_nftables(&mut self) -> Result<nftables::Program, KernelError> {
        self.read()?;
        Ok(without_origins(self.kernel.observe_nftables()))
    }

    fn apply_nftables(&mut self, changes: &[nftables::Change]) -> Applied<nftables::Change> {
        let report = self.kernel.apply_nftables(changes);
        let failed = report.failed.into_iter().map(|(index, error)| (changes[index].clone(), error)).collect();
        Applied { failed, messages: report.messages }
    }
}

/// The kernel holds no origins.
fn without_origins(mut program: nftables::Program) -> nftables::Program {
    for table in program.tables.values_mut() {
        for set in table.sets.values_mut() {
            let bare = |(key, element): (&_, &nftables::Element)| {
                (*key, nftables::Element { origin: None, ..element.clone() })
            };
            set.elements = set.elements.iter().map(bare).collect();
        }
        for rule in table.chains.values_mut().flat_map(|chain| &mut chain.rules) {
            rule.origin = None;
        }
    }
    program
}

/// What a machine has before the agent comes: one link with addresses, and a default route.
pub fn underlay(prefixes: &[IpNet]) -> Surroundings {
    let mut routes = Vec::new();
    for prefix in prefixes {
        let mut add = |destination: IpNet, gateway| {
            let device = "eth0".to_owned();
            routes.push(ForeignRoute { destination, device, gateway, onlink: false, metric: 0, protocol: 2 });
        };
        add(prefix.trunc(), None);
        // The first address of an IPv6 prefix is every router's (RFC 4291 §2.6.1).
        let router = prefix.hosts().nth(usize::from(prefix.addr().is_ipv6()));
        let default = match Family::of_prefix(prefix) {
            Family::V4 => "0.0.0.0/0",
            Family::V6 => "::/0",
        };
        add(default.parse().unwrap(), router);
    }
    let link = ForeignLink { name: "eth0".into(), kind: "veth".into(), detail: None, mac: None, mtu: 1500, up: true };
    let addresses = prefixes.iter().map(|prefix| ("eth0".to_owned(), *prefix)).collect();
    Surroundings { addresses, routes, links: vec![link] }
}

/// Does what somebody else does, to the kernel and to what is known to be theirs. Returns what the
/// kernel would tell of it.
pub fn perform(act: &Act, kernel: &mut FakeKernel, theirs: &mut Surroundings) -> Result<Event, String> {
    let held = kernel.observe_netlink().ours;
    let absent = || format!("this node has nothing for {act:?}");
    let remove = |kernel: &mut FakeKernel, change: Option<Change>, event: Event| {
        kernel.apply_netlink(&[change.ok_or_else(absent)?]);
        Ok(event)
    };
    match act {
        Act::RemoveLink(name) => {
            let change = held.links.get(name).cloned().map(Change::RemoveLink);
            remove(kernel, change, Event::Link(name.clone()))
        }
        Act::RemoveRoute(prefix) => {
            remove(kernel, held.routes.get(prefix).cloned().map(Change::RemoveRoute), Event::Route)
        }
        Act::RemoveAddress(prefix) => {
            let address = held.addresses.values().find(|it| it.prefix == *prefix);
            remove(kernel, address.cloned().map(Change::RemoveAddress), Event::Address)
        }
        Act::RemoveNeighbour(address) => {
            let neighbour = held.neighbours.values().find(|it| it.address == *address);
            remove(kernel, neighbour.cloned().map(Change::RemoveNeighbour), Event::Neighbour)
        }
        Act::RemoveForwarding(mac) => {
            let entry = held.forwarding.values().find(|it| it.mac == *mac);
            remove(kernel, entry.cloned().map(Change::RemoveForwarding), Event::Neighbour)
        }
        Act::RemovePod(pod) => {
            let link = held.pods.values().find(|it| it.origin.key == *pod);
            let event = Event::Link(link.map(|it| it.host_interface.to_string()).unwrap_or_default());
            remove(kernel, link.cloned().map(Change::RemovePod), event)
        }
        Act::SetMtu(name, mtu) => {
            let link = kernel.netlink_mut().0.links.get_mut(name).ok_or_else(absent)?;
            link.mtu = *mtu;
            Ok(Event::Link(name.clone()))
        }
        Act::SetMac(name, mac) => {
            let link = kernel.netlink_mut().0.links.get_mut(name).ok_or_else(absent)?;
            link.mac = Some(*mac);
            Ok(Event::Link(name.clone()))
        }
        Act::Redirect(mac, remote) => {
            let mut entries = kernel.netlink_mut().0.forwarding.values_mut();
            entries.find(|it| it.mac == *mac).ok_or_else(absent)?.remote = *remote;
            Ok(Event::Neighbour)
        }
        Act::SetSysctl(path, value) => {
            let sysctl = kernel.netlink_mut().0.sysctls.get_mut(path).ok_or_else(absent)?;
            sysctl.value.clone_from(value);
            // The kernel tells nobody of sysctls: the next full reading finds it.
            Ok(Event::Overrun)
        }
        Act::RemoveTable(..) | Act::EmptySet(..) | Act::FlushChain(..) => {
            perform_on_tables(act, kernel.nftables_mut()).ok_or_else(absent)?;
            Ok(Event::Ruleset)
        }
        Act::AddRoute(..) | Act::DropRoute(_) | Act::Readdress(..) => {
            let event = perform_on_surroundings(act, theirs).ok_or_else(absent)?;
            perform_on_surroundings(act, kernel.netlink_mut().1).ok_or_else(absent)?;
            Ok(event)
        }
    }
}

fn perform_on_tables(act: &Act, held: &mut nftables::Program) -> Option<()> {
    match act {
        Act::RemoveTable(family, name) => {
            let key = *held.tables.keys().find(|key| key.family == *family && key.name.as_str() == name)?;
            held.tables.remove(&key).map(|_| ())
        }
        Act::EmptySet(family, name) => {
            let mut tables = held.tables.iter_mut().filter(|(key, _)| key.family == *family);
            let set = tables.find_map(|(_, table)| table.sets.get_mut(name.as_str()))?;
            set.elements.clear();
            Some(())
        }
        Act::FlushChain(family, name) => {
            let mut tables = held.tables.iter_mut().filter(|(key, _)| key.family == *family);
            let chain = tables.find_map(|(_, table)| table.chains.get_mut(name.as_str()))?;
            chain.rules.clear();
            Some(())
        }
        _ => None,
    }
}

fn perform_on_surroundings(act: &Act, theirs: &mut Surroundings) -> Option<Event> {
    match act {
        Act::AddRoute(destination, gateway, device) => {
            theirs.routes.push(ForeignRoute {
                destination: *destination,
                device: device.clone(),
                gateway: Some(*gateway),
                onlink: false,
                metric: 0,
                protocol: 4,
            });
            Some(Event::Route)
        }
        Act::DropRoute(prefix) => {
            let at = theirs.routes.iter().position(|route| route.destination == *prefix)?;
            theirs.routes.remove(at);
            Some(Event::Route)
        }
        Act::Readdress(from, to) => {
            let (_, prefix) = theirs.addresses.iter_mut().find(|(_, prefix)| prefix == from)?;
            *prefix = *to;
            // The kernel moves the route of the address's prefix.
            let is_of_prefix = |route: &&mut ForeignRoute| route.destination == from.trunc() && route.gateway.is_none();
            if let Some(route) = theirs.routes.iter_mut().find(is_of_prefix) {
                route.destination = to.trunc();
            }
            Some(Event::Address)
        }
        _ => None,
    }
}
