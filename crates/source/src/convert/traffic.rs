//! What a Service says of its traffic: policies, affinity, outer addresses, and who may connect.

use std::net::IpAddr;

use ipnet::IpNet;
use portolan_state::{AffinityTimeout, ServiceTraffic, TrafficPolicy};
use serde::Deserialize;

use super::Problems;
use crate::lenient::{Leaf, List, Part, shorten};

/// The fields of `spec`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct TrafficView {
    internal_traffic_policy: Leaf<String>,
    external_traffic_policy: Leaf<String>,
    session_affinity: Leaf<String>,
    session_affinity_config: Part<AffinityConfig>,
    #[serde(rename = "externalIPs")]
    external_ips: List<Leaf<String>>,
    load_balancer_source_ranges: List<Leaf<String>>,
    health_check_node_port: Leaf<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AffinityConfig {
    #[serde(rename = "clientIP")]
    client_ip: Part<ClientIp>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ClientIp {
    timeout_seconds: Leaf<i64>,
}

/// The fields of `status`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Status {
    load_balancer: Part<LoadBalancer>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LoadBalancer {
    ingress: List<Part<Ingress>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Ingress {
    ip: Leaf<String>,
    ip_mode: Leaf<String>,
}

pub(super) fn traffic(spec: &TrafficView, status: &Status, problems: &mut Problems) -> ServiceTraffic {
    let policy = |field: &str, written: &Leaf<String>, problems: &mut Problems| match written.text() {
        "Local" => TrafficPolicy::Local,
        "Cluster" => TrafficPolicy::Cluster,
        "" if !matches!(written, Leaf::Bad(_)) => TrafficPolicy::Cluster,
        other => {
            problems.note(field, format!("`{}` is not a traffic policy", shorten(other)), "use Cluster or Local");
            TrafficPolicy::Cluster
        }
    };
    ServiceTraffic {
        internal_policy: policy("spec.internalTrafficPolicy", &spec.internal_traffic_policy, problems),
        external_policy: policy("spec.externalTrafficPolicy", &spec.external_traffic_policy, problems),
        affinity: affinity(spec, problems),
        external_addresses: addresses("spec.externalIPs", &spec.external_ips, problems),
        load_balancer_addresses: load_balancer_addresses(status, problems),
        load_balancer_sources: sources(&spec.load_balancer_source_ranges, problems),
        // 0 is how a server writes "none".
        health_check_port: match spec.health_check_node_port {
            Leaf::Absent | Leaf::Good(0) => None,
            _ => problems.port("spec.healthCheckNodePort", &spec.health_check_node_port),
        },
    }
}

fn affinity(spec: &TrafficView, problems: &mut Problems) -> Option<AffinityTimeout> {
    match spec.session_affinity.text() {
        "ClientIP" => {}
        "None" => return None,
        "" if !matches!(spec.session_affinity, Leaf::Bad(_)) => return None,
        other => {
            let reason = format!("`{}` is not a session affinity", shorten(other));
            problems.note("spec.sessionAffinity", reason, "use None or ClientIP");
            return None;
        }
    }
    let timeout = &spec.session_affinity_config.0.client_ip.0.timeout_seconds;
    let written = match timeout {
        Leaf::Absent => return Some(AffinityTimeout::DEFAULT),
        Leaf::Good(seconds) => match u32::try_from(*seconds).ok().and_then(AffinityTimeout::new) {
            Some(timeout) => return Some(timeout),
            None => seconds.to_string(),
        },
        Leaf::Bad(written) => written.clone(),
    };
    problems.note(
        "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        format!("{} is not a number of seconds from 1 to {}", shorten(&written), AffinityTimeout::MAX),
        "clients are kept for the default, 10800 seconds, until it is corrected",
    );
    Some(AffinityTimeout::DEFAULT)
}

fn addresses(field: &str, list: &List<Leaf<String>>, problems: &mut Problems) -> Vec<IpAddr> {
    let read =
        list.0.iter().enumerate().filter_map(|(index, text)| problems.address(&format!("{field}[{index}]"), text));
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in read {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// Addresses of `ipMode: Proxy` are the load balancer's own: traffic must pass through it (KEP-1860).
fn load_balancer_addresses(status: &Status, problems: &mut Problems) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (index, Part(entry)) in status.load_balancer.0.ingress.0.iter().enumerate() {
        // An entry may have a name in place of an address.
        let is_vip = !matches!(entry.ip_mode.text(), "Proxy");
        if entry.ip.is_absent() || entry.ip.get().is_some_and(String::is_empty) || !is_vip {
            continue;
        }
        let address = problems.address(&format!("status.loadBalancer.ingress[{index}].ip"), &entry.ip);
        addresses.extend(address.filter(|address| !addresses.contains(address)));
    }
    addresses
}

/// A range that cannot be read admits nobody: where some are written, others must stay out.
fn sources(list: &List<Leaf<String>>, problems: &mut Problems) -> Option<Vec<IpNet>> {
    if list.0.is_empty() {
        return None;
    }
    let mut sources = Vec::new();
    for (index, leaf) in list.0.iter().enumerate() {
        let field = format!("spec.loadBalancerSourceRanges[{index}]");
        let text = match leaf {
            Leaf::Good(text) | Leaf::Bad(text) => text.trim(),
            Leaf::Absent => "",
        };
        if let Ok(prefix) = text.parse::<IpNet>() {
            sources.push(prefix.trunc());
        } else {
            let reason = format!("`{}` is not a prefix", shorten(text));
            problems.note(field, reason, "write an address and a length, such as 203.0.113.0/24");
        }
    }
    sources.sort();
    sources.dedup();
    Some(sources)
}
