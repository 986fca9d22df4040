//! Services: affinity, traffic policies, and what concerns load balancers and external addresses.
//!
//! Defaults are those of `pkg/apis/core/v1/defaults.go`, rules and words those of
//! `pkg/apis/core/validation/validation.go`, and what goes with a type that is left is what
//! `pkg/registry/core/service/strategy.go` drops.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Causes, names};
use crate::fields::{at, items, number, remove, set, set_default, text, texts};

/// The longest affinity: a day (`MaxClientIPServiceAffinitySeconds`).
const AFFINITY_SECONDS_MAX: i64 = 86_400;

/// The older place of `loadBalancerSourceRanges`.
const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";

/// Whether a Service has use for a field.
type Condition = fn(&Value) -> bool;

const FOR_LOAD_BALANCERS: &str = "may only be used when `type` is 'LoadBalancer'";

/// Whether clients outside the cluster may have a way in.
fn is_external(service: &Value) -> bool {
    match text(service, "spec.type") {
        "NodePort" | "LoadBalancer" => true,
        "ClusterIP" => !items(service, "spec.externalIPs").is_empty(),
        _ => false,
    }
}

fn is_load_balancer(service: &Value) -> bool {
    text(service, "spec.type") == "LoadBalancer"
}

/// Whether a load balancer needs to know which nodes have endpoints.
pub(super) fn needs_health_check(service: &Value) -> bool {
    is_load_balancer(service) && text(service, "spec.externalTrafficPolicy") == "Local"
}

/// A Service that leaves a type leaves what only that type has, unless the client says otherwise.
pub(super) fn drop_dependent(old: &Value, new: &mut Value) {
    let dependent: [(&str, Condition); 4] = [
        // In this order: whether a health check is needed depends on the policy.
        ("spec.healthCheckNodePort", needs_health_check),
        ("spec.externalTrafficPolicy", is_external),
        ("spec.allocateLoadBalancerNodePorts", is_load_balancer),
        ("spec.loadBalancerClass", is_load_balancer),
    ];
    for (field, needs) in dependent {
        if needs(old) && !needs(new) && at(old, field) == at(new, field) {
            remove(new, field);
        }
    }
    if is_load_balancer(old) && !is_load_balancer(new) {
        set(new, "status.loadBalancer", json!({}));
    }
}

pub(super) fn affinity(new: &mut Value, causes: &mut Causes) {
    set_default(new, "spec.sessionAffinity", "None");
    causes.one_of("spec.sessionAffinity", at(new, "spec.sessionAffinity"), &["ClientIP", "None"]);
    if text(new, "spec.sessionAffinity") != "ClientIP" {
        remove(new, "spec.sessionAffinityConfig");
        return;
    }
    let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
    set_default(new, field, 10_800);
    if !number(new, field).is_some_and(|seconds| (1..=AFFINITY_SECONDS_MAX).contains(&seconds)) {
        causes.invalid(field, at(new, field), &format!("must be greater than 0 and less than {AFFINITY_SECONDS_MAX}"));
    }
}

pub(super) fn policies(new: &mut Value, causes: &mut Causes) {
    let policies = &["Cluster", "Local"];
    let (internal, external) = ("spec.internalTrafficPolicy", "spec.externalTrafficPolicy");
    if text(new, "spec.type") != "ExternalName" {
        set_default(new, internal, "Cluster");
    }
    causes.one_of(internal, at(new, internal), policies);
    if is_external(new) {
        if text(new, external).is_empty() {
            set(new, external, json!("Cluster"));
        }
        causes.one_of(external, at(new, external), policies);
    } else if !text(new, external).is_empty() {
        causes.invalid(external, at(new, external), "may only be set for externally-accessible services");
    }
    let distributions = &["PreferClose", "PreferSameNode", "PreferSameZone"];
    causes.one_of("spec.trafficDistribution", at(new, "spec.trafficDistribution"), distributions);
}

pub(super) fn load_balancer(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    let (allocate, class) = ("spec.allocateLoadBalancerNodePorts", "spec.loadBalancerClass");
    if is_load_balancer(new) {
        set_default(new, allocate, true);
        if !at(new, class).is_null() && !names::is_label_key(text(new, class)) {
            causes.invalid(class, at(new, class), names::KEY_FORM);
        }
        if old.is_some_and(|old| is_load_balancer(old) && at(old, class) != at(new, class)) {
            causes.invalid(class, at(new, class), "may not change once set");
        }
    } else {
        for field in [allocate, class] {
            if !at(new, field).is_null() {
                causes.forbidden(field, FOR_LOAD_BALANCERS);
            }
        }
    }
    source_ranges(new, causes);
}

fn source_ranges(new: &Value, causes: &mut Causes) {
    let ranges: Vec<(String, &str)> = if items(new, "spec.loadBalancerSourceRanges").is_empty() {
        let annotation = at(new, "metadata.annotations").get(SOURCE_RANGES).and_then(Value::as_str);
        let list =
            annotation.map(str::trim).filter(|list| !list.is_empty()).into_iter().flat_map(|list| list.split(','));
        list.map(|range| (format!("metadata.annotations[{SOURCE_RANGES}]"), range)).collect()
    } else {
        // Kubernetes itself names the field with a capital letter here.
        let list = items(new, "spec.loadBalancerSourceRanges").iter().enumerate();
        list.map(|(index, range)| (format!("spec.LoadBalancerSourceRanges[{index}]"), range.as_str().unwrap_or("")))
            .collect()
    };
    if let Some((field, _)) = ranges.first().filter(|_| !is_load_balancer(new)) {
        causes.forbidden(field.split("[0]").next().unwrap_or_default(), FOR_LOAD_BALANCERS);
    }
    for (field, range) in ranges {
        if range.trim().parse::<IpNet>().is_err() {
            let why = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
            causes.invalid(field, &json!(range.trim()), why);
        }
    }
}

pub(super) fn external_addresses(old: Option<&Value>, new: &Value, causes: &mut Causes) {
    // What is there already stays, so that an object from elsewhere can be changed in its other fields.
    let known: Vec<&str> = old.map(|old| texts(old, "spec.externalIPs").collect()).unwrap_or_default();
    for (index, written) in items(new, "spec.externalIPs").iter().enumerate() {
        let field = format!("spec.externalIPs[{index}]");
        let text = written.as_str().unwrap_or("");
        match text.parse::<IpAddr>() {
            Ok(_) | Err(_) if known.contains(&text) => {}
            Err(_) => causes.invalid(field, written, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"),
            Ok(address) => {
                if let Some(why) = unusable(&address) {
                    causes.invalid(field, written, why);
                }
            }
        }
    }
}

/// Why nobody outside can reach an address (`ValidateEndpointIP`).
fn unusable(address: &IpAddr) -> Option<&'static str> {
    let is_v4 = address.is_ipv4();
    if address.is_unspecified() {
        return Some(if is_v4 { "may not be unspecified (0.0.0.0)" } else { "may not be unspecified (::)" });
    }
    if address.is_loopback() {
        return Some("may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    if address.is_multicast() {
        let is_link_local = match address {
            IpAddr::V4(address) => address.octets()[..3] == [224, 0, 0],
            IpAddr::V6(address) => address.segments()[0] & 0xff0f == 0xff02,
        };
        return is_link_local.then_some("may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    }
    super::network::is_unusable(address).then_some("may not be in the link-local range (169.254.0.0/16, fe80::/10)")
}

/// What a status may say of a load balancer (`ValidateLoadBalancerStatus`), with the default of `ipMode`.
pub(super) fn load_balancer_status(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    let field = "status.loadBalancer.ingress";
    if old.is_some_and(|old| at(old, field) == at(new, field)) {
        return;
    }
    if !is_load_balancer(new) && !items(new, field).is_empty() {
        causes.forbidden(field, "may only be used when `spec.type` is \"LoadBalancer\"");
        return;
    }
    let Some(list) = new.pointer_mut("/status/loadBalancer/ingress").and_then(Value::as_array_mut) else { return };
    for (index, ingress) in list.iter_mut().enumerate() {
        let within = |name: &str| format!("{field}[{index}].{name}");
        let address = text(ingress, "ip").to_owned();
        if address.is_empty() {
            if !at(ingress, "ipMode").is_null() {
                causes.forbidden(within("ipMode"), "may not be specified when `ip` is not set");
            }
        } else {
            if address.parse::<IpAddr>().is_err() {
                let why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
                causes.invalid(within("ip"), &json!(address), why);
            }
            set_default(ingress, "ipMode", "VIP");
            causes.one_of(within("ipMode"), at(ingress, "ipMode"), &["Proxy", "VIP"]);
        }
        let host = text(ingress, "hostname");
        if !host.is_empty() && host.parse::<IpAddr>().is_ok() {
            causes.invalid(within("hostname"), at(ingress, "hostname"), "must be a DNS name, not an IP address");
        } else if !host.is_empty() && !names::is_dns_subdomain(host) {
            causes.invalid(within("hostname"), at(ingress, "hostname"), names::SUBDOMAIN_FORM);
        }
    }
}
