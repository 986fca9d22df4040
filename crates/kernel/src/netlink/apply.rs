//! Doing the steps: one batch per phase; what fails does not stop what does not depend on it.

use std::collections::BTreeMap;

use nix::errno::Errno;
use portolan_program::layout::ROUTE_PROTOCOL;
use portolan_program::netlink::{Change, Link, LinkKind, Route};

use super::wire::{self, Existing, RouteSpec, Settings};
use super::{Netlink, observe, pod};
use crate::error::KernelError;
use crate::sysctl;

/// What came of some steps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How many steps were done.
    pub applied: usize,
    /// The steps that were not, and why.
    pub failed: Vec<(Change, KernelError)>,
    /// How many netlink messages it took.
    pub messages: usize,
}

impl Report {
    pub(crate) fn record(&mut self, change: &Change, outcome: Result<(), KernelError>) {
        match outcome {
            Ok(()) => self.applied += 1,
            Err(error) => self.failed.push((change.clone(), error)),
        }
    }
}

pub(super) fn apply(netlink: &mut Netlink, changes: &[Change]) -> Report {
    let mut report = Report::default();
    let before = netlink.socket.sent();
    let mut ordered: Vec<&Change> = changes.iter().collect();
    ordered.sort_by_key(|change| change.phase());
    // Links that we could not make, or that are not ours: nothing may be hung on them.
    let mut blocked: BTreeMap<String, KernelError> = BTreeMap::new();
    for phase in ordered.chunk_by(|a, b| a.phase() == b.phase()) {
        let mut batch = Vec::new();
        let mut batched = Vec::new();
        for change in phase {
            if let Some(error) = change.device().and_then(|device| blocked.get(device)) {
                report.failed.push(((*change).clone(), error.clone()));
                continue;
            }
            match encode(netlink, change) {
                Ok(Some(message)) => {
                    batch.push(message);
                    batched.push(*change);
                }
                Ok(None) => {
                    let outcome = perform(netlink, change);
                    if let (Err(error), Change::CreateLink(link)) = (&outcome, change) {
                        blocked.insert(link.name.clone(), error.clone());
                    }
                    report.record(change, outcome);
                }
                // What hung on a link that is gone is gone.
                Err(KernelError::NoSuchLink(_)) if is_removal(change) => report.applied += 1,
                Err(error) => report.failed.push(((*change).clone(), error)),
            }
        }
        let answers = netlink.socket.batch(batch);
        for (change, answer) in batched.into_iter().zip(answers) {
            let outcome = settle(netlink, change, answer);
            report.record(change, outcome);
        }
    }
    report.messages = netlink.socket.sent() - before;
    report
}

fn is_removal(change: &Change) -> bool {
    matches!(
        change,
        Change::RemoveRoute(_)
            | Change::RemoveForwarding(_)
            | Change::RemoveNeighbour(_)
            | Change::RemoveAddress(_)
            | Change::RemovePod(_)
            | Change::RemoveLink(_)
    )
}

/// The one message that does a step; `None` for the steps that take more than one.
fn encode(netlink: &Netlink, change: &Change) -> Result<Option<Vec<u8>>, KernelError> {
    Ok(Some(match change {
        Change::RemoveRoute(route) => wire::remove_route(&spec(netlink, route)?),
        Change::AddRoute(route) => wire::add_route(&spec(netlink, route)?, Existing::Refuse),
        Change::ReplaceRoute(route) => wire::add_route(&spec(netlink, route)?, Existing::Replace),
        Change::RemoveForwarding(it) => wire::remove_forwarding(netlink.index(&it.device)?, it.mac, it.remote),
        Change::SetForwarding(it) => wire::set_forwarding(netlink.index(&it.device)?, it.mac, it.remote),
        Change::RemoveNeighbour(it) => wire::remove_neighbour(netlink.index(&it.device)?, it.address),
        Change::SetNeighbour(it) => wire::set_neighbour(netlink.index(&it.device)?, it.address, it.mac),
        Change::RemoveAddress(it) => wire::remove_address(netlink.index(&it.device)?, &it.prefix),
        Change::AddAddress(it) => wire::add_address(netlink.index(&it.device)?, &it.prefix, true),
        Change::RemovePod(pod) => wire::delete_link(&pod.host_interface),
        Change::RemoveLink(link) => wire::delete_link(&link.name),
        Change::CreateLink(_)
        | Change::AdjustLink(_)
        | Change::SetSysctl { .. }
        | Change::CreatePod(_)
        | Change::AdjustPod(_) => {
            return Ok(None);
        }
    }))
}

fn spec(netlink: &Netlink, route: &Route) -> Result<RouteSpec, KernelError> {
    Ok(RouteSpec {
        destination: route.destination,
        index: netlink.index(&route.device)?,
        // One that was read without a next hop has none to be removed with.
        gateway: Some(route.gateway).filter(|gateway| !gateway.is_unspecified()),
        onlink: route.onlink,
        protocol: ROUTE_PROTOCOL,
    })
}

fn perform(netlink: &mut Netlink, change: &Change) -> Result<(), KernelError> {
    match change {
        Change::CreateLink(link) => create_link(netlink, link),
        Change::AdjustLink(link) => adjust_link(netlink, link),
        Change::SetSysctl { path, value } => sysctl::write(path, value),
        Change::CreatePod(pod) => pod::create(netlink, pod),
        Change::AdjustPod(pod) => pod::adjust(netlink, pod),
        // `encode` has a message for each of these.
        _ => Ok(()),
    }
}

/// What an answer means for a step: what is already so is done.
fn settle(netlink: &mut Netlink, change: &Change, answer: Result<(), KernelError>) -> Result<(), KernelError> {
    let Err(error) = answer else { return Ok(()) };
    match (change, error.errno()) {
        (_, Some(Errno::ENOENT | Errno::ESRCH | Errno::ENODEV | Errno::EADDRNOTAVAIL)) if is_removal(change) => Ok(()),
        (Change::AddRoute(route), Some(Errno::EEXIST)) => adopt_route(netlink, route),
        _ => Err(error),
    }
}

/// A route of that destination is there. One that does the same is taken over.
fn adopt_route(netlink: &mut Netlink, route: &Route) -> Result<(), KernelError> {
    let wanted = spec(netlink, route)?;
    let family = wire::family_number(route.gateway);
    let there = observe::routes(&mut netlink.socket, family)?;
    let same = there.iter().any(|it| {
        (it.destination, it.index, it.gateway, it.onlink)
            == (wanted.destination.trunc(), wanted.index, wanted.gateway, wanted.onlink)
    });
    if same {
        return netlink.socket.request(wire::add_route(&wanted, Existing::Replace));
    }
    Err(KernelError::RouteTaken { destination: route.destination, wanted: Change::AddRoute(route.clone()).to_string() })
}

fn create_link(netlink: &mut Netlink, link: &Link) -> Result<(), KernelError> {
    let underlay = match &link.kind {
        LinkKind::Bridge | LinkKind::Ipip { .. } => None,
        LinkKind::Vxlan { underlay, .. } => Some(netlink.index(underlay)?),
    };
    match netlink.socket.request(wire::create_link(&link.name, &link.kind, link.mac, underlay)) {
        Err(error) if error.errno() == Some(Errno::EEXIST) => {
            check_adoptable(netlink, link, error)?;
            adjust_link(netlink, link)
        }
        outcome => outcome.and_then(|()| adjust_link(netlink, link)),
    }
}

/// A link of that name, or a tunnel of that identifier, is there: it may be taken over if it differs
/// only in what can be set.
fn check_adoptable(netlink: &mut Netlink, link: &Link, error: KernelError) -> Result<(), KernelError> {
    let links = observe::links(&mut netlink.socket)?;
    let Some(there) = links.iter().find(|it| it.name == link.name) else {
        // The kernel has one tunnel per identifier and port, or per pair of ends, whatever its name.
        let same_tunnel = links.iter().find_map(|it| match (&it.detail, &link.kind) {
            (Some(LinkKind::Vxlan { vni, port, .. }), LinkKind::Vxlan { vni: wanted, port: on, .. }) => {
                ((vni, port) == (wanted, on)).then_some((it, "identifier and port"))
            }
            (Some(held @ LinkKind::Ipip { .. }), wanted) => (held == wanted).then_some((it, "ends")),
            _ => None,
        });
        return Err(same_tunnel.map_or(error, |(it, what)| KernelError::Foreign {
            name: it.name.clone(),
            difference: format!("it holds the {what} that {} needs", link.name),
        }));
    };
    if there.detail.as_ref() == Some(&link.kind) {
        return Ok(());
    }
    let difference = match &there.detail {
        Some(is) => format!("it is {is:?}, and needed is {:?}", link.kind),
        None => format!("it is a `{}` link, and needed is {:?}", there.kind, link.kind),
    };
    Err(KernelError::Foreign { name: link.name.clone(), difference })
}

fn adjust_link(netlink: &mut Netlink, link: &Link) -> Result<(), KernelError> {
    let index = netlink.index(&link.name)?;
    // The pods of a bridge hold its hardware address in their caches. A tunnel is not told the one it has: with each
    // that it is told, the kernel forgets all neighbours on it.
    let is = netlink.socket.query(wire::get_link(index))?.iter().find_map(observe::link).and_then(|it| it.mac);
    let settings = Settings {
        mac: link.mac.filter(|mac| link.kind != LinkKind::Bridge && is != Some(*mac)),
        mtu: Some(link.mtu),
        alias: Some(&link.alias),
        up: Some(link.up),
        ..Settings::default()
    };
    netlink.socket.request(wire::set_link(index, settings))
}
