//! What to change so that the sets hold what they must.

use imbl::ordmap::DiffItem;
use serde::{Deserialize, Serialize};

use super::{Entry, Program, SetKey, SetKind};

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Deletes a set of another kind, so that it can be made anew. It cannot be while a rule looks it up.
    Clear(SetKey),
    /// Makes a set without entries.
    Create(SetKey, SetKind),
    /// Adds an entry.
    Add(SetKey, Entry),
    /// Removes an entry.
    Remove(SetKey, Entry),
    /// Removes all entries.
    Flush(SetKey),
    /// Deletes a set. It cannot be while a rule looks it up.
    Destroy(SetKey),
}

/// The order of changes. Sets are made before the rules that look them up, and deleted after those are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Sets that cannot be brought up to date go.
    Clear,
    /// Sets are made.
    Create,
    /// Entries come.
    Fill,
    /// Entries go.
    Empty,
    /// Sets go.
    Delete,
}

impl Change {
    /// When it is its turn.
    pub fn phase(&self) -> Phase {
        match self {
            Change::Clear(_) => Phase::Clear,
            Change::Create(..) => Phase::Create,
            Change::Add(..) => Phase::Fill,
            Change::Remove(..) | Change::Flush(_) => Phase::Empty,
            Change::Destroy(_) => Phase::Delete,
        }
    }
}

/// The changes that lead from what was observed to what is desired, in order of application.
pub fn diff(observed: &Program, desired: &Program) -> Vec<Change> {
    let mut changes = Vec::new();
    for (key, set) in &desired.sets {
        let there = observed.sets.get(key).filter(|there| there.kind == set.kind);
        match there {
            Some(there) if set.entries.is_empty() && there.entries.len() > 1 => changes.push(Change::Flush(*key)),
            Some(there) => {
                for item in there.entries.diff(&set.entries) {
                    match item {
                        DiffItem::Add(entry, _) => changes.push(Change::Add(*key, *entry)),
                        DiffItem::Remove(entry, _) => changes.push(Change::Remove(*key, *entry)),
                        // Only the cause is another.
                        DiffItem::Update { .. } => {}
                    }
                }
            }
            None => {
                if observed.sets.contains_key(key) {
                    changes.push(Change::Clear(*key));
                }
                changes.push(Change::Create(*key, set.kind.clone()));
                changes.extend(set.entries.keys().map(|entry| Change::Add(*key, *entry)));
            }
        }
    }
    changes.extend(observed.sets.keys().filter(|key| !desired.sets.contains_key(key)).copied().map(Change::Destroy));
    changes.sort_by_key(Change::phase);
    changes
}
