//! Health and counters of the DNS role over HTTP, under the same paths as the agent's.

use std::fmt::Write as _;
use std::sync::Arc;

use hyper::{Method, StatusCode};
use portolan_dns::metrics::{Metrics, Sample, SampleKind};
use portolan_net::ObjectKind;
use portolan_state::Snapshot;
use tokio::sync::watch;

use crate::admin_socket::{AdminAnswer, AdminHandler, AdminRequest};

/// Answers `/healthz`, `/readyz` and `/metrics`.
pub(crate) struct DnsAdministration {
    /// The server's counters.
    pub(crate) metrics: Arc<Metrics>,
    /// The tables that names are answered from.
    pub(crate) tables: watch::Receiver<Snapshot>,
    /// Those that must have been listed before answers are whole.
    pub(crate) needed: Vec<ObjectKind>,
}

impl AdminHandler for DnsAdministration {
    async fn handle(&self, request: AdminRequest) -> AdminAnswer {
        match (&request.method, request.path.as_str()) {
            (&Method::GET, "/healthz" | "/livez") => AdminAnswer::text(StatusCode::OK, "ok\n"),
            (&Method::GET, "/readyz") => self.ready(),
            (&Method::GET, "/metrics") => AdminAnswer::text(StatusCode::OK, render(&self.metrics.samples())),
            _ => AdminAnswer::text(StatusCode::NOT_FOUND, "only /healthz, /readyz and /metrics"),
        }
    }
}

impl DnsAdministration {
    fn ready(&self) -> AdminAnswer {
        let tables = self.tables.borrow();
        let missing = self.needed.iter().filter(|table| !tables.in_sync.contains(*table));
        let missing = missing.map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if missing.is_empty() {
            return AdminAnswer::text(StatusCode::OK, "ok\n");
        }
        let reason = format!("these tables have not been listed in full yet: {missing}; is the API server reachable?");
        AdminAnswer::text(StatusCode::SERVICE_UNAVAILABLE, reason)
    }
}

/// Samples in the Prometheus text format, version 0.0.4. The parts of a histogram follow each other.
fn render(samples: &[Sample]) -> String {
    let mut text = String::new();
    let mut announced = "";
    for sample in samples {
        let (family, kind) = family_of(sample);
        if family != announced {
            let _ = writeln!(text, "# TYPE {family} {kind}");
            announced = family;
        }
        text.push_str(sample.name);
        for (index, (label, value)) in sample.labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(text, "{}{label}=\"{value}\"", if index == 0 { "{" } else { "," });
        }
        let _ = writeln!(text, "{} {}", if sample.labels.is_empty() { "" } else { "}" }, sample.value);
    }
    text
}

/// What a sample belongs to: a histogram's buckets, sum and count are one family.
fn family_of(sample: &Sample) -> (&'static str, &'static str) {
    const DURATION: &str = "coredns_dns_request_duration_seconds";
    if sample.name.starts_with(DURATION) {
        return (DURATION, "histogram");
    }
    let of_summary = sample.name.strip_suffix("_sum").or_else(|| sample.name.strip_suffix("_count"));
    match (of_summary, sample.kind) {
        (Some(family), _) => (family, "summary"),
        (None, SampleKind::Counter) => (sample.name, "counter"),
        (None, SampleKind::Gauge) => (sample.name, "gauge"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_announced_once_and_every_line_is_a_sample() {
        let text = render(&Metrics::default().samples());
        let announced: Vec<&str> = text.lines().filter(|line| line.starts_with('#')).collect();
        let unique: std::collections::BTreeSet<&&str> = announced.iter().collect();
        assert_eq!(announced.len(), unique.len(), "{announced:?}");
        assert!(announced.contains(&"# TYPE coredns_dns_request_duration_seconds histogram"), "{announced:?}");
        assert!(text.contains("coredns_dns_requests_total{proto=\"udp\",family=\"1\",type=\"A\"} 0\n"), "{text}");
        assert!(text.contains("coredns_dns_request_duration_seconds_bucket{le=\"+Inf\"} 0\n"), "{text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let value = line.rsplit_once(' ').map(|(_, value)| value.parse::<f64>());
            assert!(matches!(value, Some(Ok(_))), "{line}");
        }
    }

    #[tokio::test]
    async fn it_is_ready_once_the_tables_were_listed() {
        let (sender, tables) = watch::channel(Snapshot::default());
        let handler = DnsAdministration { metrics: Arc::default(), tables, needed: vec![ObjectKind::Service] };
        let ask = |path: &str| AdminRequest {
            method: Method::GET,
            path: path.to_owned(),
            body: bytes::Bytes::new(),
            trusted: false,
        };
        let status = |answer| match answer {
            AdminAnswer::Whole(status, _, _) => status,
            AdminAnswer::Lines(_) => panic!("no lines were asked for"),
        };
        assert_eq!(status(handler.handle(ask("/readyz")).await), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(status(handler.handle(ask("/healthz")).await), StatusCode::OK);
        sender.send_modify(|tables| tables.in_sync = [ObjectKind::Service].into_iter().collect());
        assert_eq!(status(handler.handle(ask("/readyz")).await), StatusCode::OK);
        assert_eq!(status(handler.handle(ask("/tables/services")).await), StatusCode::NOT_FOUND);
    }
}
