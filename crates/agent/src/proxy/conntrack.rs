//! Which UDP flows are stale, after what changed.
//!
//! A UDP client goes on sending from the same port, and the kernel goes on sending its packets where the first
//! one went, whatever the rules say by now. So a flow is cut, and its next packet is new to the rules, when
//!
//! - its destination is a frontend, and who answers is not an endpoint that serves there, also where none does;
//! - its destination is a frontend, and it was never translated, since it began before the frontend was there;
//! - its destination was a frontend, and it is translated to an endpoint which that had.
//!
//! Every other flow keeps its endpoint: no change of a policy or of a hint moves a flow, and neither does a
//! restart of the agent. This part is pure; the worker lists and deletes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use portolan_intent::services::{Backend, Frontend, FrontendKey, ServicesIntent};
use portolan_kernel::conntrack::Entry;
use portolan_net::{Family, Port, Protocol};

/// What flows are judged by.
#[derive(Debug, Clone, Default)]
pub struct Judge {
    /// Every frontend that there is. A copy shares all that is large.
    frontends: ServicesIntent,
    /// The endpoints of UDP frontends that went away since flows were last judged.
    gone: BTreeMap<FrontendKey, BTreeSet<SocketAddr>>,
    /// Where nobody but the proxy translates, so that what is translated and no frontend is stale. Only after
    /// a start, when nobody knows what went away before.
    abandoned: Vec<IpNet>,
    /// The families in which something changed.
    families: BTreeSet<Family>,
}

impl Judge {
    /// Whether flows must be looked at.
    pub fn is_needed(&self) -> bool {
        !self.families.is_empty()
    }

    /// The families whose flows must be looked at.
    pub fn families(&self) -> &BTreeSet<Family> {
        &self.families
    }

    /// A judge of what a later one knows, and of what has not been judged by this one.
    #[must_use]
    pub fn followed_by(mut self, later: Judge) -> Judge {
        for (key, endpoints) in later.gone {
            self.gone.entry(key).or_default().extend(endpoints);
        }
        self.families.extend(later.families);
        if self.abandoned.is_empty() {
            self.abandoned = later.abandoned;
        }
        self.frontends = later.frontends;
        self
    }

    /// Whether a flow must be cut. `node_addresses` are those at which node ports answer.
    pub fn is_stale(&self, entry: &Entry, node_addresses: &BTreeSet<IpAddr>) -> bool {
        let destination = entry.original.destination;
        let Some([at_address, at_node_port]) = keys_of(destination) else { return false };
        let is_at_node = node_addresses.contains(&destination.ip());
        let held = |key: &FrontendKey| self.frontends.get(key);
        if let Some(frontend) = held(&at_address).or_else(|| held(&at_node_port).filter(|_| is_at_node)) {
            return !serves(frontend, entry.reply.source);
        }
        let had = |key: &FrontendKey| self.gone.get(key).is_some_and(|had| had.contains(&entry.reply.source));
        if had(&at_address) || is_at_node && had(&at_node_port) {
            return true;
        }
        let is_translated = entry.reply.source != destination;
        is_translated && self.abandoned.iter().any(|prefix| prefix.contains(&destination.ip()))
    }
}

/// The frontends that a UDP packet may be for.
fn keys_of(destination: SocketAddr) -> Option<[FrontendKey; 2]> {
    let port = Port::try_from(destination.port()).ok()?;
    let (address, protocol) = (destination.ip(), Protocol::Udp);
    let family = Family::of(address);
    Some([FrontendKey::Address { address, protocol, port }, FrontendKey::NodePort { family, protocol, port }])
}

/// Whether an endpoint of a UDP frontend serves.
fn serves(frontend: &Frontend, source: SocketAddr) -> bool {
    frontend.endpoints.serving.binary_search_by_key(&source, Backend::socket).is_ok()
}

/// Follows the frontends and gathers what flows must be judged by.
#[derive(Debug)]
pub struct Tracker {
    pending: Judge,
}

impl Tracker {
    /// A tracker that has just started: all flows are judged once.
    pub fn new(service_prefixes: Vec<IpNet>) -> Tracker {
        let families = Family::ALL.into_iter().collect();
        Tracker { pending: Judge { abandoned: service_prefixes, families, ..Judge::default() } }
    }

    /// A frontend changed, appeared or went away.
    pub fn follow(&mut self, key: &FrontendKey, old: Option<&Arc<Frontend>>, new: Option<&Arc<Frontend>>) {
        if key.protocol() != Protocol::Udp {
            return;
        }
        match (old, new) {
            (Some(old), Some(new)) if !loses(old, new) => return,
            (Some(old), None) => {
                let gone = self.pending.gone.entry(*key).or_default();
                let endpoints = &old.endpoints;
                let all = endpoints.serving.iter().chain(endpoints.cluster.iter()).chain(endpoints.local.iter());
                gone.extend(all.map(Backend::socket));
            }
            _ => {}
        }
        self.pending.families.insert(key.family());
    }

    /// The node's addresses changed: flows to node ports are judged anew.
    pub fn addresses_changed(&mut self) {
        self.pending.families.extend(Family::ALL);
    }

    /// Whether flows must be looked at.
    pub fn has_work(&self) -> bool {
        self.pending.is_needed()
    }

    /// Takes the judge of all flows, if any must be looked at.
    pub fn take(&mut self, frontends: &ServicesIntent) -> Option<Judge> {
        if !self.pending.is_needed() {
            return None;
        }
        Some(Judge { frontends: frontends.clone(), ..std::mem::take(&mut self.pending) })
    }
}

/// Whether a flow may be stale that was not: an endpoint serves no more, or the first one begins to.
fn loses(old: &Frontend, new: &Frontend) -> bool {
    let (before, after) = (&old.endpoints.serving, &new.endpoints.serving);
    if Arc::ptr_eq(before, after) {
        return false;
    }
    before.is_empty() && !after.is_empty() || before.iter().any(|backend| !serves(new, backend.socket()))
}

#[cfg(test)]
mod tests;
