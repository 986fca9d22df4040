//! What to change so that the forwarder does what it must.

use imbl::ordmap::DiffItem;
use ipnet::IpNet;

use super::{Program, Route, Tunnel};

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Ends the tunnel. The device stays, so that packets to pods of other nodes leave by no other way meanwhile.
    Stop,
    /// Starts the tunnel.
    Start(Tunnel),
    /// Sets the largest packet of a running tunnel, and what caused the tunnel.
    Update(Tunnel),
    /// Adds the route of a prefix, or replaces it.
    SetRoute(IpNet, Route),
    /// Removes the route of a prefix.
    RemoveRoute(IpNet),
}

/// The changes that lead from what was observed to what is desired, in order of application. Routes come first: a
/// tunnel that starts knows all peers from its first packet.
pub fn diff(observed: &Program, desired: &Program) -> Vec<Change> {
    let mut removed = Vec::new();
    let mut changes = Vec::new();
    for item in observed.routes.diff(&desired.routes) {
        match item {
            DiffItem::Add(prefix, route) | DiffItem::Update { new: (prefix, route), .. } => {
                changes.push(Change::SetRoute(*prefix, route.clone()));
            }
            DiffItem::Remove(prefix, _) => removed.push(Change::RemoveRoute(*prefix)),
        }
    }
    match (&observed.tunnel, &desired.tunnel) {
        (None, None) => {}
        (Some(_), None) => changes.push(Change::Stop),
        (None, Some(tunnel)) => changes.push(Change::Start(tunnel.clone())),
        (Some(there), Some(tunnel)) if there == tunnel => {}
        (Some(there), Some(tunnel)) if is_same_end(there, tunnel) => changes.push(Change::Update(tunnel.clone())),
        (Some(_), Some(tunnel)) => changes.extend([Change::Stop, Change::Start(tunnel.clone())]),
    }
    changes.append(&mut removed);
    changes
}

/// Whether one end can become the other while packets pass.
fn is_same_end(one: &Tunnel, other: &Tunnel) -> bool {
    (&one.device, &one.local, one.port) == (&other.device, &other.local, other.port)
}
