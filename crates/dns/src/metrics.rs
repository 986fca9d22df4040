//! Counters under CoreDNS's names, so that its dashboards and alerts keep working; what CoreDNS does
//! not count begins with `portolan_dns_`.
//!
//! They are plain atomics: counting costs one addition, and whoever exposes them reads
//! [`Metrics::samples`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use portolan_net::Family;

use crate::wire::{RecordType, ResponseCode};

/// A number that only grows, or one that is set.
pub type Counter = AtomicU64;

/// Over what a query came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// UDP.
    Udp,
    /// TCP.
    Tcp,
}

/// Types with a counter of their own; all others are counted together, so that clients cannot make
/// counters.
const TYPES: [(RecordType, &str); 9] = [
    (RecordType::A, "A"),
    (RecordType::AAAA, "AAAA"),
    (RecordType::CNAME, "CNAME"),
    (RecordType::NS, "NS"),
    (RecordType::PTR, "PTR"),
    (RecordType::SOA, "SOA"),
    (RecordType::SRV, "SRV"),
    (RecordType::TXT, "TXT"),
    (RecordType::ANY, "ANY"),
];

const CODES: [ResponseCode; 7] = [
    ResponseCode::NO_ERROR,
    ResponseCode::FORMAT_ERROR,
    ResponseCode::SERVER_FAILURE,
    ResponseCode::NO_SUCH_NAME,
    ResponseCode::NOT_IMPLEMENTED,
    ResponseCode::REFUSED,
    ResponseCode::BAD_VERSION,
];

/// The bounds of the duration buckets in microseconds: CoreDNS's, 0.25 ms doubled 15 times.
const DURATION_BUCKETS: usize = 16;
const DURATION_FIRST_MICROSECONDS: u64 = 250;

/// All counters.
#[derive(Debug, Default)]
pub struct Metrics {
    /// By transport and family (UDP and IPv4, UDP and IPv6, TCP and IPv4, TCP and IPv6), then by type.
    requests: [[Counter; TYPES.len() + 1]; 4],
    responses: [Counter; CODES.len() + 1],
    durations: [Counter; DURATION_BUCKETS + 1],
    duration_sum_microseconds: Counter,
    request_bytes: Counter,
    response_bytes: Counter,
    /// Answers from the cache.
    pub cache_hits_success: Counter,
    /// Denials from the cache.
    pub cache_hits_denial: Counter,
    /// Questions that the cache could not answer.
    pub cache_misses: Counter,
    /// Answers in the cache.
    pub cache_entries: Counter,
    /// Answers that went since the cache was full.
    pub cache_evictions: Counter,
    /// Questions sent to upstreams, attempts counted each.
    pub forward_requests: Counter,
    /// Attempts that failed.
    pub forward_failures: Counter,
    /// Questions refused since too many were waiting.
    pub forward_rejects: Counter,
    /// TCP connections closed at once since there were too many.
    pub connection_rejects: Counter,
    /// Queries whose handling panicked.
    pub panics: Counter,
}

/// What a sample is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleKind {
    /// It only grows.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// One line of an exposition. Histograms are given as their `_bucket`, `_sum` and `_count`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: &'static str,
    /// What it is.
    pub kind: SampleKind,
    /// The labels.
    pub labels: Vec<(&'static str, String)>,
    /// The value.
    pub value: f64,
}

/// Adds one.
pub fn increment(counter: &Counter) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Sets a gauge.
pub fn set(gauge: &Counter, value: u64) {
    gauge.store(value, Ordering::Relaxed);
}

#[expect(
    clippy::cast_precision_loss,
    reason = "expositions hold floating-point numbers; above 2^53 the last digits go"
)]
fn number(value: u64) -> f64 {
    value as f64
}

impl Metrics {
    /// Counts a request: its transport, family and length, and its type if it could be read.
    pub fn request(&self, transport: Transport, family: Family, bytes: usize, record_type: Option<RecordType>) {
        let row = usize::from(transport == Transport::Tcp) * 2 + usize::from(family == Family::V6);
        let column = TYPES.iter().position(|(it, _)| Some(*it) == record_type).unwrap_or(TYPES.len());
        increment(&self.requests[row][column]);
        self.request_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts a response: its code, its length, and how long it took.
    pub fn response(&self, code: ResponseCode, bytes: usize, duration: Duration) {
        let row = CODES.iter().position(|it| *it == code).unwrap_or(CODES.len());
        increment(&self.responses[row]);
        self.response_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let microseconds = duration.as_micros() as u64;
        let bucket = (0..DURATION_BUCKETS).find(|it| microseconds <= DURATION_FIRST_MICROSECONDS << it);
        increment(&self.durations[bucket.unwrap_or(DURATION_BUCKETS)]);
        self.duration_sum_microseconds.fetch_add(microseconds, Ordering::Relaxed);
    }

    /// Every counter, by name.
    pub fn samples(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        let mut add = |name, kind, labels: &[(&'static str, &str)], value: f64| {
            let labels = labels.iter().map(|(label, value)| (*label, (*value).to_owned())).collect();
            samples.push(Sample { name, kind, labels, value });
        };
        let read = |counter: &Counter| number(counter.load(Ordering::Relaxed));
        let origins = [("udp", "1"), ("udp", "2"), ("tcp", "1"), ("tcp", "2")];
        let mut requests = 0.0;
        for ((protocol, family), row) in origins.into_iter().zip(&self.requests) {
            let types = TYPES.iter().map(|(_, name)| *name).chain(["other"]);
            for (name, counter) in types.zip(row) {
                let labels = [("proto", protocol), ("family", family), ("type", name)];
                add("coredns_dns_requests_total", SampleKind::Counter, &labels, read(counter));
                requests += read(counter);
            }
        }
        let codes = CODES.iter().map(|code| code.name()).chain(["other"]);
        for (name, counter) in codes.zip(&self.responses) {
            add("coredns_dns_responses_total", SampleKind::Counter, &[("rcode", name)], read(counter));
        }
        let mut count = 0.0;
        for (index, counter) in self.durations.iter().enumerate() {
            count += read(counter);
            let bound = match index {
                DURATION_BUCKETS => "+Inf".to_owned(),
                _ => (number(DURATION_FIRST_MICROSECONDS << index) / 1e6).to_string(),
            };
            add("coredns_dns_request_duration_seconds_bucket", SampleKind::Counter, &[("le", &bound)], count);
        }
        let sum = read(&self.duration_sum_microseconds) / 1e6;
        let plain = [
            ("coredns_dns_request_duration_seconds_sum", sum),
            ("coredns_dns_request_duration_seconds_count", count),
            ("coredns_dns_request_size_bytes_sum", read(&self.request_bytes)),
            ("coredns_dns_request_size_bytes_count", requests),
            ("coredns_dns_response_size_bytes_sum", read(&self.response_bytes)),
            ("coredns_dns_response_size_bytes_count", count),
            ("coredns_cache_misses_total", read(&self.cache_misses)),
            ("coredns_cache_evictions_total", read(&self.cache_evictions)),
            ("coredns_forward_requests_total", read(&self.forward_requests)),
            ("portolan_dns_forward_failures_total", read(&self.forward_failures)),
            ("coredns_forward_max_concurrent_rejects_total", read(&self.forward_rejects)),
            ("portolan_dns_connection_rejects_total", read(&self.connection_rejects)),
            ("coredns_panics_total", read(&self.panics)),
        ];
        for (name, value) in plain {
            add(name, SampleKind::Counter, &[], value);
        }
        for (kind, counter) in [("success", &self.cache_hits_success), ("denial", &self.cache_hits_denial)] {
            add("coredns_cache_hits_total", SampleKind::Counter, &[("type", kind)], read(counter));
        }
        add("coredns_cache_entries", SampleKind::Gauge, &[], read(&self.cache_entries));
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_and_its_response_are_counted_once() {
        let metrics = Metrics::default();
        metrics.request(Transport::Tcp, Family::V6, 40, Some(RecordType::SRV));
        metrics.response(ResponseCode::NO_SUCH_NAME, 100, Duration::from_millis(3));
        let value = |name: &str, labels: &[&str]| {
            let samples = metrics.samples();
            let has = |sample: &Sample, label: &str| sample.labels.iter().any(|(_, value)| value == label);
            samples.iter().find(|it| it.name == name && labels.iter().all(|label| has(it, label))).unwrap().value
        };
        let is = |name: &str, labels: &[&str], expected: f64| assert!((value(name, labels) - expected).abs() < 0.5);
        is("coredns_dns_requests_total", &["tcp", "2", "SRV"], 1.0);
        is("coredns_dns_requests_total", &["udp", "2", "SRV"], 0.0);
        is("coredns_dns_request_size_bytes_sum", &[], 40.0);
        is("coredns_dns_responses_total", &["NXDOMAIN"], 1.0);
        is("coredns_dns_request_duration_seconds_bucket", &["0.002"], 0.0);
        is("coredns_dns_request_duration_seconds_bucket", &["0.004"], 1.0);
        is("coredns_dns_request_duration_seconds_count", &[], 1.0);
    }
}
