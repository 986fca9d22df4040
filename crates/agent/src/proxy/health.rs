//! Whether the proxy is healthy, as kube-proxy means it: no update waits for long.
//!
//! An update waits from when it is heard of until the kernel holds it. `/livez` tells that alone. `/healthz`,
//! which load balancers ask, also fails while the node is leaving (KEP-3836). A proxy that has not been in sync
//! yet is healthy.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hyper::StatusCode;

use super::clock;
use super::http::Answer;

/// The proxy's health. Times are given, so that it can be tried without waiting.
#[derive(Debug)]
pub struct ProxyHealth {
    /// How long an update may wait.
    patience: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    oldest_pending: Option<Instant>,
    last_updated: Option<SystemTime>,
    is_eligible: bool,
}

/// Now, by both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// To measure with.
    pub instant: Instant,
    /// To show.
    pub time: SystemTime,
}

impl Now {
    /// What the clocks say.
    pub fn read() -> Now {
        Now { instant: Instant::now(), time: SystemTime::now() }
    }
}

impl ProxyHealth {
    /// The health of a proxy that has just started.
    pub fn new(sync_period: Duration) -> ProxyHealth {
        let state = State { oldest_pending: None, last_updated: None, is_eligible: true };
        ProxyHealth { patience: sync_period * 2, state: Mutex::new(state) }
    }

    /// An update was heard of.
    pub fn queued(&self, now: Now) {
        self.lock().oldest_pending.get_or_insert(now.instant);
    }

    /// The kernel holds all that was heard of.
    pub fn updated(&self, now: Now) {
        let mut state = self.lock();
        state.oldest_pending = None;
        state.last_updated = Some(now.time);
    }

    /// Whether load balancers may send to the node.
    pub fn set_eligible(&self, is_eligible: bool) {
        self.lock().is_eligible = is_eligible;
    }

    /// Whether no update has waited for too long.
    pub fn is_healthy(&self, now: Now) -> bool {
        self.lock().is_healthy(now, self.patience)
    }

    /// The answer to `/healthz`.
    pub(super) fn healthz(&self, now: Now) -> Answer {
        let state = self.lock();
        let is_healthy = state.is_healthy(now, self.patience) && state.is_eligible;
        let (updated, current) = state.times(is_healthy, now);
        let eligible = state.is_eligible;
        let body = format!(r#"{{"lastUpdated": "{updated}","currentTime": "{current}", "nodeEligible": {eligible}}}"#);
        answer(is_healthy, body)
    }

    /// The answer to `/livez`.
    pub(super) fn livez(&self, now: Now) -> Answer {
        let state = self.lock();
        let is_healthy = state.is_healthy(now, self.patience);
        let (updated, current) = state.times(is_healthy, now);
        answer(is_healthy, format!(r#"{{"lastUpdated": "{updated}","currentTime": "{current}"}}"#))
    }

    /// What a thread left behind that ended early is still true.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_healthy(&self, now: Now, patience: Duration) -> bool {
        let waits = self.oldest_pending.map(|since| now.instant.saturating_duration_since(since));
        self.last_updated.is_none() || waits.is_none_or(|waits| waits < patience)
    }

    /// The last update, which is now where all is well: kube-proxy's readers are used to that.
    fn times(&self, is_healthy: bool, now: Now) -> (String, String) {
        let updated = if is_healthy { Some(now.time) } else { self.last_updated };
        (clock::render(updated), clock::render(Some(now.time)))
    }
}

fn answer(is_healthy: bool, body: String) -> Answer {
    let status = if is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Answer::json(status, body).with("x-content-type-options", "nosniff")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    struct Clock(Instant);

    impl Clock {
        fn at(&self, seconds: u64) -> Now {
            let since = Duration::from_secs(seconds);
            Now { instant: self.0 + since, time: UNIX_EPOCH + since }
        }
    }

    fn text(answer: Answer) -> (u16, String) {
        (answer.status.as_u16(), String::from_utf8(answer.body).unwrap())
    }

    #[test]
    fn an_update_that_waits_for_two_periods_is_unhealthy_until_the_kernel_holds_it() {
        let clock = Clock(Instant::now());
        let health = ProxyHealth::new(Duration::from_secs(30));
        health.queued(clock.at(0));
        assert!(health.is_healthy(clock.at(600)), "it has not been in sync yet");
        health.updated(clock.at(600));
        health.queued(clock.at(610));
        health.queued(clock.at(650));
        assert!(health.is_healthy(clock.at(669)));
        assert!(!health.is_healthy(clock.at(670)), "the oldest counts");
        let body = r#"{"lastUpdated": "1970-01-01 00:10:00 +0000 UTC","currentTime": "1970-01-01 00:11:10 +0000 UTC", "nodeEligible": true}"#;
        assert_eq!(text(health.healthz(clock.at(670))), (503, body.to_owned()));
        health.updated(clock.at(671));
        assert!(health.is_healthy(clock.at(9999)));
        let body = r#"{"lastUpdated": "1970-01-01 00:11:12 +0000 UTC","currentTime": "1970-01-01 00:11:12 +0000 UTC"}"#;
        assert_eq!(text(health.livez(clock.at(672))), (200, body.to_owned()));
    }

    #[test]
    fn a_node_that_leaves_is_alive_and_gets_no_more() {
        let clock = Clock(Instant::now());
        let health = ProxyHealth::new(Duration::from_secs(30));
        health.updated(clock.at(0));
        health.set_eligible(false);
        let (status, body) = text(health.healthz(clock.at(1)));
        assert!(status == 503 && body.ends_with(r#""nodeEligible": false}"#), "{body}");
        assert_eq!(text(health.livez(clock.at(1))).0, 200);
        assert!(health.is_healthy(clock.at(1)), "nor do health checks of Services fail for that");
    }
}
