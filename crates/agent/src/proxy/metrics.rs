//! What is counted under kube-proxy's names (prefix `kubeproxy_`), as far as it means something here.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portolan_net::Family as IpFamily;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::limits::TRIGGERS_MAX;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FamilyLabel {
    ip_family: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TableLabel {
    table: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabel {
    traffic_policy: &'static str,
}

type Seconds = Gauge<f64, AtomicU64>;

/// Every metric of kube-proxy's that has a meaning here.
#[derive(Debug)]
pub struct ProxyMetrics {
    sync: Histogram,
    sync_full: Histogram,
    sync_partial: Histogram,
    last: Seconds,
    last_queued: Seconds,
    endpoint_changes: Counter,
    endpoint_changes_pending: Gauge,
    service_changes: Counter,
    service_changes_pending: Gauge,
    network_programming: Family<FamilyLabel, Histogram>,
    iptables_total: Family<TableLabel, Gauge>,
    iptables_last: Family<TableLabel, Gauge>,
    iptables_failures: Counter,
    nftables_failures: Counter,
    no_local_endpoints: Family<PolicyLabel, Gauge>,
    conntrack_seconds: Family<FamilyLabel, Histogram>,
    conntrack_deleted: Family<FamilyLabel, Counter>,
    healthz: Family<CodeLabel, Counter>,
    livez: Family<CodeLabel, Counter>,
    /// Whether the kernel was read in full since the last sync.
    is_full: AtomicBool,
    /// When the changes were made that wait for a sync.
    triggers: Mutex<Triggers>,
}

/// Times of changes, by family.
#[derive(Debug, Default)]
struct Triggers {
    /// Their changes come next.
    announced: Vec<(IpFamily, SystemTime)>,
    /// Their changes came, and wait for a sync.
    waiting: Vec<(IpFamily, SystemTime)>,
}

/// kube-proxy's buckets for a sync: 1 ms to 16 s.
fn sync_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// kube-proxy's buckets for the time from a change to the kernel.
fn programming_buckets() -> Histogram {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    Histogram::new([0.25, 0.5].into_iter().chain(seconds.map(f64::from)))
}

impl Default for ProxyMetrics {
    fn default() -> ProxyMetrics {
        ProxyMetrics {
            sync: sync_buckets(),
            sync_full: sync_buckets(),
            sync_partial: sync_buckets(),
            last: Seconds::default(),
            last_queued: Seconds::default(),
            endpoint_changes: Counter::default(),
            endpoint_changes_pending: Gauge::default(),
            service_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            network_programming: Family::new_with_constructor(programming_buckets),
            iptables_total: Family::default(),
            iptables_last: Family::default(),
            iptables_failures: Counter::default(),
            nftables_failures: Counter::default(),
            no_local_endpoints: Family::default(),
            conntrack_seconds: Family::new_with_constructor(sync_buckets),
            conntrack_deleted: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            is_full: AtomicBool::default(),
            triggers: Mutex::default(),
        }
    }
}

impl ProxyMetrics {
    /// Registers everything below `kubeproxy_`. A counter's name gets `_total` when it is written.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("kubeproxy");
        let mut histogram = |name: &str, help: &str, it: &Histogram| registry.register(name, help, it.clone());
        histogram("sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds", &self.sync);
        histogram("sync_full_proxy_rules_duration_seconds", "Latency of full resyncs in seconds", &self.sync_full);
        histogram(
            "sync_partial_proxy_rules_duration_seconds",
            "Latency of partial syncs in seconds",
            &self.sync_partial,
        );
        let mut seconds = |name: &str, help: &str, it: &Seconds| registry.register(name, help, it.clone());
        seconds("sync_proxy_rules_last_timestamp_seconds", "The last time rules were synced", &self.last);
        seconds("sync_proxy_rules_last_queued_timestamp_seconds", "The last time a sync was queued", &self.last_queued);
        let mut counter = |name: &str, help: &str, it: &Counter| registry.register(name, help, it.clone());
        counter("sync_proxy_rules_endpoint_changes", "Changes of EndpointSlices", &self.endpoint_changes);
        counter("sync_proxy_rules_service_changes", "Changes of Services", &self.service_changes);
        counter("sync_proxy_rules_iptables_restore_failures", "Failed iptables-restore", &self.iptables_failures);
        counter("sync_proxy_rules_nftables_sync_failures", "Failed nftables syncs", &self.nftables_failures);
        let mut gauge = |name: &str, help: &str, it: &Gauge| registry.register(name, help, it.clone());
        gauge("sync_proxy_rules_endpoint_changes_pending", "Changes that wait", &self.endpoint_changes_pending);
        gauge("sync_proxy_rules_service_changes_pending", "Changes that wait", &self.service_changes_pending);
        let mut gauges =
            |name: &str, help: &str, it: &Family<TableLabel, Gauge>| registry.register(name, help, it.clone());
        gauges("sync_proxy_rules_iptables_total", "Rules of iptables that are ours", &self.iptables_total);
        gauges("sync_proxy_rules_iptables_last", "Rules of iptables written by the last sync", &self.iptables_last);
        registry.register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with a Local policy and endpoints on other nodes only",
            self.no_local_endpoints.clone(),
        );
        registry.register(
            "network_programming_duration_seconds",
            "Time from a change of endpoints until the kernel holds it",
            self.network_programming.clone(),
        );
        registry.register(
            "conntrack_reconciler_sync_duration_seconds",
            "Time to look through connection tracking",
            self.conntrack_seconds.clone(),
        );
        registry.register(
            "conntrack_reconciler_deleted_entries",
            "Flows that were cut",
            self.conntrack_deleted.clone(),
        );
        registry.register("proxy_healthz", "Answers of /healthz", self.healthz.clone());
        registry.register("proxy_livez", "Answers of /livez", self.livez.clone());
        for policy in ["internal", "external"] {
            self.set_no_local_endpoints(policy, 0);
        }
    }

    /// Changes were heard of, and wait.
    pub fn queued(&self, services: usize, slices: usize, now: SystemTime) {
        self.service_changes.inc_by(services as u64);
        self.service_changes_pending.inc_by(count(services));
        self.endpoint_changes.inc_by(slices as u64);
        self.endpoint_changes_pending.inc_by(count(slices));
        self.last_queued.set(timestamp(now));
        let mut triggers = self.lock_triggers();
        let Triggers { announced, waiting } = &mut *triggers;
        waiting.append(announced);
        waiting.truncate(TRIGGERS_MAX);
    }

    /// Endpoints were changed at that time, by a slice's annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`; the next sync tells how long it took.
    pub fn triggered(&self, family: IpFamily, at: SystemTime) {
        let announced = &mut self.lock_triggers().announced;
        if announced.len() < TRIGGERS_MAX {
            announced.push((family, at));
        }
    }

    /// What a thread left behind that ended early is still true.
    fn lock_triggers(&self) -> MutexGuard<'_, Triggers> {
        self.triggers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel is to be read in full: the sync under way is a full one.
    pub(crate) fn full(&self) {
        self.is_full.store(true, Ordering::Relaxed);
    }

    /// A sync is over.
    pub(crate) fn synced(&self, took: Duration) {
        let is_full = self.is_full.swap(false, Ordering::Relaxed);
        let seconds = took.as_secs_f64();
        self.sync.observe(seconds);
        if is_full { self.sync_full.observe(seconds) } else { self.sync_partial.observe(seconds) }
    }

    /// The kernel holds all that was heard of.
    pub fn updated(&self, now: SystemTime) {
        self.service_changes_pending.set(0);
        self.endpoint_changes_pending.set(0);
        self.last.set(timestamp(now));
        let waiting = std::mem::take(&mut self.lock_triggers().waiting);
        for (family, at) in waiting {
            // A clock that is ahead of ours would make it negative.
            let took = now.duration_since(at).unwrap_or_default();
            self.network_programming.get_or_create(&family_label(family)).observe(took.as_secs_f64());
        }
    }

    /// A room refused changes.
    pub(crate) fn refused(&self, room: &str) {
        match room {
            "iptables" => drop(self.iptables_failures.inc()),
            "nftables" => drop(self.nftables_failures.inc()),
            _ => {}
        }
    }

    /// How many rules of iptables are ours, and how many of them the last sync wrote.
    pub fn set_iptables_rules(&self, table: &str, total: usize, last: usize) {
        let label = TableLabel { table: table.to_owned() };
        self.iptables_total.get_or_create(&label).set(count(total));
        self.iptables_last.get_or_create(&label).set(count(last));
    }

    /// How many Service ports have a Local policy and endpoints on other nodes only.
    pub fn set_no_local_endpoints(&self, policy: &'static str, ports: usize) {
        self.no_local_endpoints.get_or_create(&PolicyLabel { traffic_policy: policy }).set(count(ports));
    }

    /// Connection tracking was looked through.
    pub fn conntrack_reconciled(&self, family: IpFamily, took: Duration, deleted: usize) {
        let label = family_label(family);
        self.conntrack_seconds.get_or_create(&label).observe(took.as_secs_f64());
        self.conntrack_deleted.get_or_create(&label).inc_by(deleted as u64);
    }

    /// `/healthz` was answered.
    pub fn healthz(&self, code: u16) {
        self.healthz.get_or_create(&CodeLabel { code }).inc();
    }

    /// `/livez` was answered.
    pub fn livez(&self, code: u16) {
        self.livez.get_or_create(&CodeLabel { code }).inc();
    }
}

fn family_label(family: IpFamily) -> FamilyLabel {
    FamilyLabel {
        ip_family: match family {
            IpFamily::V4 => "IPv4",
            IpFamily::V6 => "IPv6",
        },
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn timestamp(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
