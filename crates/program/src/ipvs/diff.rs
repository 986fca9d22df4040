//! What to change so that the kernel holds what it must.

use std::cmp::Ordering;

use imbl::ordmap::DiffItem;

use super::{Change, Program, RealServer, ServerKey, VirtualServer};

/// The changes that lead from what was observed to what is desired, in order of application. Virtual servers that
/// are not ours stay as they are.
pub fn diff(observed: &Program, desired: &Program) -> Vec<Change> {
    let mut changes = Vec::new();
    for (path, value) in &desired.sysctls {
        if observed.sysctls.get(path) != Some(value) {
            changes.push(Change::SetSysctl(path.clone(), value.clone()));
        }
    }
    changes.extend(desired.timeouts.beyond(observed.timeouts).map(Change::SetTimeouts));
    if desired.device && !observed.device {
        changes.push(Change::CreateDevice);
    }
    for item in observed.servers.diff(&desired.servers) {
        match item {
            DiffItem::Add(key, new) => server(key, None, Some(new), &mut changes),
            DiffItem::Update { old: (key, old), new: (_, new) } => server(key, Some(old), Some(new), &mut changes),
            DiffItem::Remove(key, old) if desired.owns(key, old) => server(key, Some(old), None, &mut changes),
            DiffItem::Remove(..) => {}
        }
    }
    changes.extend(desired.addresses.difference(&observed.addresses).copied().map(Change::AddAddress));
    if observed.device && !desired.device {
        changes.push(Change::DeleteDevice);
    } else {
        changes.extend(observed.addresses.difference(&desired.addresses).copied().map(Change::RemoveAddress));
    }
    changes.sort_by_key(Change::phase);
    changes
}

/// The changes of one virtual server, not in order.
pub(super) fn server(
    key: &ServerKey,
    old: Option<&std::sync::Arc<VirtualServer>>,
    new: Option<&std::sync::Arc<VirtualServer>>,
    changes: &mut Vec<Change>,
) {
    let nobody: &[RealServer] = &[];
    match (old, new) {
        (None, None) => {}
        (Some(_), None) => changes.push(Change::RemoveServer(*key)),
        (None, Some(new)) => {
            changes.push(Change::AddServer(*key, new.clone()));
            real_servers(*key, nobody, &new.real, changes);
        }
        (Some(old), Some(new)) => {
            if !old.has_same_settings(new) {
                changes.push(Change::SetServer(*key, new.clone()));
            }
            real_servers(*key, &old.real, &new.real, changes);
        }
    }
}

/// Both lists are sorted.
fn real_servers(server: ServerKey, old: &[RealServer], new: &[RealServer], changes: &mut Vec<Change>) {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => return,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(old), Some(new)) => old.key.cmp(&new.key),
        };
        let before = if order == Ordering::Greater { None } else { old.next() };
        let after = if order == Ordering::Less { None } else { new.next() };
        match (before, after) {
            (Some(before), Some(after)) if before.is_same(after) => {}
            (Some(_), Some(after)) => changes.push(Change::SetReal(server, after.clone())),
            (None, Some(after)) => changes.push(Change::AddReal(server, after.clone())),
            (Some(before), None) => changes.push(Change::RemoveReal(server, before.key)),
            (None, None) => return,
        }
    }
}
