//! What the agent counts, in the Prometheus text format.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::proxy::ProxyMetrics;

/// Which room of the program.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoomLabel {
    room: &'static str,
}

/// Which CNI verb, and whether it succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerbLabel {
    verb: String,
    result: &'static str,
}

/// The agent's counters. Names are a contract with dashboards.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    apply_seconds: Histogram,
    changes: Family<RoomLabel, Counter>,
    failures: Family<RoomLabel, Counter>,
    messages: Family<RoomLabel, Counter>,
    resyncs: Counter,
    cni: Family<VerbLabel, Counter>,
    in_sync: Gauge,
    problems: Gauge<i64>,
    revision: Gauge<u64, AtomicU64>,
    /// What is counted under kube-proxy's names.
    pub proxy: ProxyMetrics,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let metrics = Metrics {
            registry: Mutex::default(),
            apply_seconds: Histogram::new(exponential_buckets(0.000_05, 2.0, 18)),
            changes: Family::default(),
            failures: Family::default(),
            messages: Family::default(),
            resyncs: Counter::default(),
            cni: Family::default(),
            in_sync: Gauge::default(),
            problems: Gauge::default(),
            revision: Gauge::default(),
            proxy: ProxyMetrics::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    /// Counters at zero.
    pub fn new() -> Metrics {
        Metrics::default()
    }

    fn register(&self) {
        let mut root = lock(&self.registry);
        self.proxy.register(&mut root);
        let registry = root.sub_registry_with_prefix("portolan");
        registry.register_with_unit(
            "apply",
            "Time from the first event of an apply cycle until the kernel holds its result",
            Unit::Seconds,
            self.apply_seconds.clone(),
        );
        registry.register("program_changes", "Changes applied to the kernel", self.changes.clone());
        registry.register("program_failures", "Changes that the kernel refused", self.failures.clone());
        registry.register("netlink_messages", "Netlink messages sent", self.messages.clone());
        registry.register("resyncs", "Times that the kernel was read back in full", self.resyncs.clone());
        registry.register("cni_requests", "CNI requests answered", self.cni.clone());
        registry.register("in_sync", "1 once every table was listed in full", self.in_sync.clone());
        registry.register("problems", "Objects and parts of objects that have no effect", self.problems.clone());
        registry.register("state_revision", "Writes to the tables that changed something", self.revision.clone());
    }

    /// A room's changes were applied.
    pub fn applied(&self, room: &'static str, changes: usize, failures: usize, messages: usize) {
        let label = RoomLabel { room };
        self.changes.get_or_create(&label).inc_by(changes as u64);
        self.failures.get_or_create(&label).inc_by(failures as u64);
        self.messages.get_or_create(&label).inc_by(messages as u64);
        if failures > 0 {
            self.proxy.refused(room);
        }
    }

    /// An apply cycle is over.
    pub fn cycle(&self, took: Duration, revision: u64, problems: usize) {
        self.apply_seconds.observe(took.as_secs_f64());
        self.proxy.synced(took);
        self.revision.set(revision);
        self.problems.set(i64::try_from(problems).unwrap_or(i64::MAX));
    }

    /// The kernel was read in full.
    pub fn resync(&self) {
        self.resyncs.inc();
        self.proxy.full();
    }

    /// A CNI call was answered.
    pub fn cni(&self, verb: &str, succeeded: bool) {
        let result = if succeeded { "success" } else { "error" };
        self.cni.get_or_create(&VerbLabel { verb: verb.to_owned(), result }).inc();
    }

    /// Every table was listed, and the kernel holds the result.
    pub fn set_in_sync(&self) {
        self.in_sync.set(1);
    }

    /// All metrics as text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &lock(&self.registry)).is_err() {
            text.push_str("# the metrics could not be written\n");
        }
        text
    }
}

/// A poisoned registry still holds its counters.
fn lock(registry: &Mutex<Registry>) -> std::sync::MutexGuard<'_, Registry> {
    registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_counted_until_the_kernel_holds_it() {
        use std::time::{SystemTime, UNIX_EPOCH};
        let metrics = Metrics::new();
        let at = |seconds| -> SystemTime { UNIX_EPOCH + Duration::from_secs(seconds) };
        metrics.proxy.triggered(portolan_net::Family::V6, at(98));
        metrics.proxy.updated(at(99));
        metrics.proxy.queued(1, 3, at(100));
        metrics.proxy.triggered(portolan_net::Family::V6, at(100));
        let text = metrics.render();
        assert!(text.contains("kubeproxy_sync_proxy_rules_endpoint_changes_total 3"), "{text}");
        assert!(text.contains("kubeproxy_sync_proxy_rules_endpoint_changes_pending 3"), "{text}");
        metrics.proxy.updated(at(101));
        let text = metrics.render();
        assert!(text.contains("kubeproxy_sync_proxy_rules_endpoint_changes_pending 0"), "{text}");
        assert!(text.contains("kubeproxy_sync_proxy_rules_last_timestamp_seconds 101.0"), "{text}");
        let programmed = "kubeproxy_network_programming_duration_seconds_sum{ip_family=\"IPv6\"} 3.0";
        assert!(text.contains(programmed), "{text}");
    }

    #[test]
    fn counters_appear_under_their_names() {
        let metrics = Metrics::new();
        metrics.applied("nftables", 3, 1, 5);
        metrics.cni("ADD", true);
        metrics.resync();
        metrics.cycle(Duration::from_millis(3), 7, 0);
        metrics.cycle(Duration::from_millis(1), 8, 0);
        let text = metrics.render();
        assert_eq!(text.matches("# EOF").count(), 1, "{text}");
        assert!(text.contains("portolan_state_revision 8"), "{text}");
        assert!(text.contains("kubeproxy_sync_proxy_rules_duration_seconds_count 2"), "{text}");
        assert!(text.contains("kubeproxy_sync_full_proxy_rules_duration_seconds_count 1"), "{text}");
        assert!(text.contains("kubeproxy_sync_proxy_rules_nftables_sync_failures_total 1"), "{text}");
        assert!(text.contains("portolan_program_changes_total{room=\"nftables\"} 3"), "{text}");
        assert!(text.contains("portolan_program_failures_total{room=\"nftables\"} 1"), "{text}");
        let local = "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"} 0";
        assert!(text.contains(local), "{text}");
        assert!(text.contains("portolan_cni_requests_total{verb=\"ADD\",result=\"success\"} 1"), "{text}");
    }
}
