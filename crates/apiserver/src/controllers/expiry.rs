//! Events go after an hour, or they would fill the store: a container that keeps ending writes one each
//! time.

use super::{Action, Mirror};
use crate::fields::{is_terminating, parse_time, text};

/// How long an Event stays after it was last seen: kube-apiserver's `--event-ttl`.
const LIFETIME_SECONDS: i64 = 3600;

pub(super) fn reconcile(view: &Mirror, now_seconds: i64, actions: &mut Vec<Action>) {
    // Those that did not change are looked at by the passes over everything, which come often enough.
    for event in view.due_events().into_iter().filter(|event| !is_terminating(event)) {
        let times = ["metadata.creationTimestamp", "lastTimestamp", "series.lastObservedTime"];
        let seen = times.iter().filter_map(|field| parse_time(text(event, field))).max();
        if seen.is_some_and(|seen| seen.saturating_add(LIFETIME_SECONDS) <= now_seconds) {
            actions.push(Action::delete(event));
        }
    }
}
