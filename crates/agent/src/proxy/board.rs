//! Problems of the parts that run beside the loop, where `portolan show problems` finds them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use portolan_state::Problem;

/// Problems that each part keeps of its own; a part bounds what it reports.
#[derive(Debug, Default)]
pub struct ProblemBoard {
    parts: Mutex<BTreeMap<String, Vec<Problem>>>,
}

impl ProblemBoard {
    /// What a part has to report now, instead of what it reported before. News are logged.
    pub fn set(&self, part: &str, problems: Vec<Problem>) {
        let mut parts = self.lock();
        for problem in &problems {
            if parts.get(part).is_none_or(|before| !before.contains(problem)) {
                tracing::warn!(%problem, "something has no effect");
            }
        }
        if problems.is_empty() {
            parts.remove(part);
        } else {
            parts.insert(part.to_owned(), problems);
        }
    }

    /// All that stand, sorted.
    pub fn all(&self) -> Vec<Problem> {
        let mut all: Vec<Problem> = self.lock().values().flatten().cloned().collect();
        all.sort();
        all
    }

    /// How many stand.
    pub fn count(&self) -> usize {
        self.lock().values().map(Vec::len).sum()
    }

    /// What a thread left behind that ended early is still true.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Problem>>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
