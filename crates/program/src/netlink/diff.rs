//! From what the kernel holds to what it must hold, in as few steps as can be.

use std::collections::{BTreeMap, BTreeSet};

use super::{Change, Link, LinkKind, PodLink, Program, Surroundings};

/// The steps that turn `observed` into `desired`, in the order in which they must be done.
///
/// What others have made that is equal to what we need is adopted. What others have made that is in the
/// way yields a step that the kernel will refuse, so that the conflict is reported where it is found.
pub fn diff(desired: &Program, observed: &Program, others: &Surroundings) -> Vec<Change> {
    let mut changes = Vec::new();
    let gone = diff_links(desired, observed, &mut changes);
    let stays = |device: &str| !gone.contains(device);
    diff_addresses(desired, observed, others, &stays, &mut changes);
    // A link that is given another hardware address forgets its neighbours (`neigh_changeaddr`).
    let is_another = |(name, want): &(&String, &Link)| {
        observed.links.get(*name).is_some_and(|is| want.kind != LinkKind::Bridge && want.mac != is.mac)
    };
    let forgetful: BTreeSet<&str> = desired.links.iter().filter(is_another).map(|(name, _)| name.as_str()).collect();
    let keeps = |device: &str| stays(device) && !forgetful.contains(device);
    diff_neighbours(desired, observed, &keeps, &mut changes);
    diff_forwarding(desired, observed, &stays, &mut changes);
    diff_routes(desired, observed, others, &stays, &mut changes);
    diff_pods(desired, observed, &stays, &mut changes);
    for (path, sysctl) in &desired.sysctls {
        // A link that is made anew has its sysctls anew; those of one that goes for good go with it.
        let of_gone = path.split('/').find(|part| gone.contains(part));
        if of_gone.is_some_and(|link| !desired.links.contains_key(link)) {
            continue;
        }
        if of_gone.is_some() || observed.sysctls.get(path).is_none_or(|is| is.value != sysctl.value) {
            changes.push(Change::SetSysctl { path: path.clone(), value: sysctl.value.clone() });
        }
    }
    changes.sort_by_key(Change::phase);
    changes
}

/// Returns the links that will be gone or new: what hung on them in the kernel is gone with them.
fn diff_links<'a>(desired: &'a Program, observed: &'a Program, changes: &mut Vec<Change>) -> BTreeSet<&'a str> {
    let mut gone = BTreeSet::new();
    for (name, is) in &observed.links {
        if desired.links.get(name).is_none_or(|want| !same_identity(want, is)) {
            changes.push(Change::RemoveLink(is.clone()));
            gone.insert(name.as_str());
        }
    }
    for (name, want) in &desired.links {
        match observed.links.get(name).filter(|_| !gone.contains(name.as_str())) {
            None => {
                changes.push(Change::CreateLink(want.clone()));
            }
            Some(is) if !same_settings(want, is) => changes.push(Change::AdjustLink(want.clone())),
            Some(_) => {}
        }
    }
    gone
}

/// What cannot be changed on a link that exists.
fn same_identity(want: &Link, is: &Link) -> bool {
    want.kind == is.kind
}

/// What can be. A bridge keeps the hardware address it has: its pods hold it in their caches.
fn same_settings(want: &Link, is: &Link) -> bool {
    (want.mtu, &want.alias, want.up) == (is.mtu, &is.alias, is.up)
        && (want.kind == LinkKind::Bridge || want.mac == is.mac)
}

fn diff_addresses(
    desired: &Program,
    observed: &Program,
    others: &Surroundings,
    stays: &impl Fn(&str) -> bool,
    changes: &mut Vec<Change>,
) {
    let is = observed.addresses.iter().filter(|((device, _), _)| stays(device));
    changes.extend(
        is.filter(|(key, _)| !desired.addresses.contains_key(key))
            .map(|(_, address)| Change::RemoveAddress(address.clone())),
    );
    for (key, want) in &desired.addresses {
        let is_there = observed.addresses.contains_key(key) || others.has_address(want);
        if !(is_there && stays(&key.0)) {
            changes.push(Change::AddAddress(want.clone()));
        }
    }
}

fn diff_neighbours(desired: &Program, observed: &Program, stays: &impl Fn(&str) -> bool, changes: &mut Vec<Change>) {
    for (key, is) in observed.neighbours.iter().filter(|((device, _), _)| stays(device)) {
        if !desired.neighbours.contains_key(key) {
            changes.push(Change::RemoveNeighbour(is.clone()));
        }
    }
    for (key, want) in &desired.neighbours {
        let is = observed.neighbours.get(key).filter(|is| stays(&is.device));
        if is.is_none_or(|is| is.mac != want.mac) {
            changes.push(Change::SetNeighbour(want.clone()));
        }
    }
}

fn diff_forwarding(desired: &Program, observed: &Program, stays: &impl Fn(&str) -> bool, changes: &mut Vec<Change>) {
    for (key, is) in observed.forwarding.iter().filter(|((device, _), _)| stays(device)) {
        if !desired.forwarding.contains_key(key) {
            changes.push(Change::RemoveForwarding(is.clone()));
        }
    }
    for (key, want) in &desired.forwarding {
        let is = observed.forwarding.get(key).filter(|is| stays(&is.device));
        if is.is_none_or(|is| is.remote != want.remote) {
            changes.push(Change::SetForwarding(want.clone()));
        }
    }
}

fn diff_routes(
    desired: &Program,
    observed: &Program,
    others: &Surroundings,
    stays: &impl Fn(&str) -> bool,
    changes: &mut Vec<Change>,
) {
    for (destination, is) in observed.routes.iter().filter(|(_, is)| stays(&is.device)) {
        if !desired.routes.contains_key(destination) {
            changes.push(Change::RemoveRoute(is.clone()));
        }
    }
    for (destination, want) in &desired.routes {
        match observed.routes.get(destination).filter(|is| stays(&is.device)) {
            Some(is) if is.same(want) => {}
            // Linux refuses an IPv6 next hop with `onlink` while another link's route holds its address, and
            // the route to be replaced does (`ip6_route_check_nh_onlink`).
            Some(is) if want.onlink && want.gateway.is_ipv6() && is.device != want.device => {
                changes.push(Change::RemoveRoute(is.clone()));
                changes.push(Change::AddRoute(want.clone()));
            }
            Some(_) => changes.push(Change::ReplaceRoute(want.clone())),
            None if others.has_route(want) && stays(&want.device) => changes.push(Change::ReplaceRoute(want.clone())),
            None => changes.push(Change::AddRoute(want.clone())),
        }
    }
}

fn diff_pods(desired: &Program, observed: &Program, stays: &impl Fn(&str) -> bool, changes: &mut Vec<Change>) {
    let mut kept: BTreeMap<_, &PodLink> = BTreeMap::new();
    for (key, is) in &observed.pods {
        match desired.pods.get(key) {
            Some(want) if want.host_interface == is.host_interface => {
                kept.insert(key, is);
            }
            _ => changes.push(Change::RemovePod(is.clone())),
        }
    }
    for (key, want) in &desired.pods {
        match kept.get(key) {
            None => changes.push(Change::CreatePod(want.clone())),
            // A bridge that goes lets go of its ports.
            Some(is) if !is.same_port(want) || !stays(&want.bridge) => changes.push(Change::AdjustPod(want.clone())),
            Some(_) => {}
        }
    }
}
