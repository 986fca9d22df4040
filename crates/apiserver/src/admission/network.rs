//! Endpoints, EndpointSlices, Ingresses and NetworkPolicies.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{Causes, names};
use crate::fields::{at, items, set, set_default, text, texts};
use crate::selector::LabelSelector;

/// How many endpoints one slice may hold, as in kube-apiserver.
const ENDPOINTS_MAX: usize = 1000;
/// How many ports one slice may hold.
const PORTS_MAX: usize = 100;

/// Whether an address must not be an endpoint: it would lead a client to itself or to its own link.
pub(super) fn is_unusable(address: &IpAddr) -> bool {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.segments()[0] & 0xffc0 == 0xfe80,
    };
    address.is_loopback() || address.is_unspecified() || address.is_multicast() || is_link_local
}

const UNUSABLE: &str =
    "may not be loopback (127.0.0.0/8, ::1), link-local (169.254.0.0/16, fe80::/10), multicast or unspecified";

pub(super) fn endpoints(new: &mut Value, causes: &mut Causes) {
    let subsets = new.get_mut("subsets").and_then(Value::as_array_mut);
    for port in subsets.into_iter().flatten().filter_map(|subset| subset.get_mut("ports")?.as_array_mut()).flatten() {
        set_default(port, "protocol", "TCP");
    }
    for (index, subset) in items(new, "subsets").iter().enumerate() {
        for list in ["addresses", "notReadyAddresses"] {
            for (position, address) in items(subset, list).iter().enumerate() {
                let field = format!("subsets[{index}].{list}[{position}].ip");
                match text(address, "ip").parse::<IpAddr>() {
                    Err(_) => causes.invalid(field, at(address, "ip"), "must be a valid IP address"),
                    Ok(ip) if is_unusable(&ip) => causes.invalid(field, at(address, "ip"), UNUSABLE),
                    Ok(_) => {}
                }
            }
        }
        for (position, port) in items(subset, "ports").iter().enumerate() {
            causes.port(format!("subsets[{index}].ports[{position}].port"), at(port, "port"), false);
        }
    }
}

pub(super) fn endpoint_slice(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    for port in new.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        set_default(port, "protocol", "TCP");
        set_default(port, "name", "");
    }
    if at(new, "endpoints").is_null() {
        set(new, "endpoints", json!([]));
    }
    let family = text(new, "addressType").to_owned();
    if family.is_empty() {
        causes.required("addressType", "IPv4, IPv6 or FQDN");
    }
    causes.one_of("addressType", at(new, "addressType"), &["FQDN", "IPv4", "IPv6"]);
    let endpoints = items(new, "endpoints");
    if endpoints.len() > ENDPOINTS_MAX {
        causes.invalid("endpoints", &json!(endpoints.len()), &format!("must have at most {ENDPOINTS_MAX} items"));
    }
    for (index, endpoint) in endpoints.iter().enumerate() {
        let addresses: Vec<&str> = texts(endpoint, "addresses").collect();
        if addresses.is_empty() {
            causes.required(format!("endpoints[{index}].addresses"), "must contain at least 1 address");
        }
        for (position, address) in addresses.into_iter().enumerate() {
            let field = format!("endpoints[{index}].addresses[{position}]");
            let value = json!(address);
            match (family.as_str(), address.parse::<IpAddr>()) {
                ("IPv4" | "IPv6", Ok(ip)) if is_unusable(&ip) => causes.invalid(field, &value, UNUSABLE),
                ("IPv4", Ok(ip)) if ip.is_ipv4() => {}
                ("IPv6", Ok(ip)) if ip.is_ipv6() => {}
                ("IPv4" | "IPv6", _) => causes.invalid(field, &value, &format!("must be an {family} address")),
                ("FQDN", _) if !names::is_dns_subdomain(address) => {
                    causes.invalid(field, &value, names::SUBDOMAIN_FORM);
                }
                _ => {}
            }
        }
    }
    let ports = items(new, "ports");
    if ports.len() > PORTS_MAX {
        causes.invalid("ports", &json!(ports.len()), &format!("must have at most {PORTS_MAX} items"));
    }
    for (index, port) in ports.iter().enumerate() {
        // No number means every port; that is legal and of use to custom consumers.
        if !at(port, "port").is_null() {
            causes.port(format!("ports[{index}].port"), at(port, "port"), false);
        }
        causes.one_of(format!("ports[{index}].protocol"), at(port, "protocol"), &["SCTP", "TCP", "UDP"]);
        if ports[..index].iter().any(|other| text(other, "name") == text(port, "name")) {
            causes.duplicate(format!("ports[{index}].name"), at(port, "name"), "");
        }
    }
    if let Some(old) = old {
        causes.immutable("addressType", old, new);
    }
}

pub(super) fn ingress(new: &mut Value, causes: &mut Causes) {
    if at(new, "spec.rules").is_null() && at(new, "spec.defaultBackend").is_null() {
        causes.invalid("spec", &json!([]), "either `defaultBackend` or `rules` must be specified");
    }
    backend("spec.defaultBackend", at(new, "spec.defaultBackend"), causes);
    for (index, rule) in items(new, "spec.rules").iter().enumerate() {
        let host = text(rule, "host");
        if host.parse::<IpAddr>().is_ok() {
            causes.invalid(
                format!("spec.rules[{index}].host"),
                at(rule, "host"),
                "must be a DNS name, not an IP address",
            );
        } else if !host.is_empty() && !names::is_dns_subdomain(host.strip_prefix("*.").unwrap_or(host)) {
            causes.invalid(format!("spec.rules[{index}].host"), at(rule, "host"), names::SUBDOMAIN_FORM);
        }
        for (position, path) in items(rule, "http.paths").iter().enumerate() {
            let field = |name: &str| format!("spec.rules[{index}].http.paths[{position}].{name}");
            if at(path, "pathType").is_null() {
                causes.required(field("pathType"), "pathType must be specified");
            }
            causes.one_of(field("pathType"), at(path, "pathType"), &["Exact", "ImplementationSpecific", "Prefix"]);
            let is_strict = matches!(text(path, "pathType"), "Exact" | "Prefix");
            if is_strict && !text(path, "path").starts_with('/') {
                causes.invalid(field("path"), at(path, "path"), "must be an absolute path");
            }
            if at(path, "backend").is_null() {
                causes.required(field("backend"), "");
            }
            backend(&field("backend"), at(path, "backend"), causes);
        }
    }
    set_default(new, "status.loadBalancer", json!({}));
}

fn backend(field: &str, backend: &Value, causes: &mut Causes) {
    let service = at(backend, "service");
    if service.is_null() {
        if !backend.is_null() && at(backend, "resource").is_null() {
            causes.required(format!("{field}.service"), "a backend names a Service or a resource");
        }
        return;
    }
    if text(service, "name").is_empty() {
        causes.required(format!("{field}.service.name"), "");
    }
    match (at(service, "port.name").is_null(), at(service, "port.number").is_null()) {
        (true, true) => causes.required(format!("{field}.service.port"), "port name or number is required"),
        (false, false) => causes.invalid(
            format!("{field}.service.port"),
            at(service, "port"),
            "cannot set both port name & port number",
        ),
        (true, false) => causes.port(format!("{field}.service.port.number"), at(service, "port.number"), false),
        (false, true) => {}
    }
}

pub(super) fn network_policy(new: &mut Value, causes: &mut Causes) {
    if at(new, "spec.policyTypes").is_null() {
        let mut types = vec!["Ingress"];
        if !items(new, "spec.egress").is_empty() {
            types.push("Egress");
        }
        set(new, "spec.policyTypes", json!(types));
    }
    set_default(new, "spec.podSelector", json!({}));
    for (index, kind) in items(new, "spec.policyTypes").iter().enumerate() {
        causes.one_of(format!("spec.policyTypes[{index}]"), kind, &["Egress", "Ingress"]);
    }
    selector("spec.podSelector", at(new, "spec.podSelector"), causes);
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        let path = format!("spec.{direction}");
        if let Some(rules) = new.pointer_mut(&format!("/spec/{direction}")).and_then(Value::as_array_mut) {
            for port in rules.iter_mut().filter_map(|rule| rule.get_mut("ports")?.as_array_mut()).flatten() {
                set_default(port, "protocol", "TCP");
            }
        }
        for (index, rule) in items(new, &path).iter().enumerate() {
            for (position, peer) in items(rule, peers).iter().enumerate() {
                policy_peer(&format!("{path}[{index}].{peers}[{position}]"), peer, causes);
            }
            for (position, port) in items(rule, "ports").iter().enumerate() {
                policy_port(&format!("{path}[{index}].ports[{position}]"), port, causes);
            }
        }
    }
}

fn policy_peer(field: &str, peer: &Value, causes: &mut Causes) {
    let block = at(peer, "ipBlock");
    let has_selector = !at(peer, "podSelector").is_null() || !at(peer, "namespaceSelector").is_null();
    if block.is_null() && !has_selector {
        causes.required(field, "must specify a peer");
    }
    selector(&format!("{field}.podSelector"), at(peer, "podSelector"), causes);
    selector(&format!("{field}.namespaceSelector"), at(peer, "namespaceSelector"), causes);
    if block.is_null() {
        return;
    }
    if has_selector {
        causes.forbidden(field, "may not specify both ipBlock and another peer");
    }
    let Ok(whole) = text(block, "cidr").parse::<IpNet>() else {
        causes.invalid(format!("{field}.ipBlock.cidr"), at(block, "cidr"), "must be a valid CIDR value");
        return;
    };
    for (index, except) in texts(block, "except").enumerate() {
        let is_inside =
            except.parse::<IpNet>().is_ok_and(|it| whole.contains(&it) && it.prefix_len() > whole.prefix_len());
        if !is_inside {
            let field = format!("{field}.ipBlock.except[{index}]");
            causes.invalid(field, &json!(except), &format!("must be a strict subset of `cidr` ({whole})"));
        }
    }
}

fn policy_port(field: &str, port: &Value, causes: &mut Causes) {
    causes.one_of(format!("{field}.protocol"), at(port, "protocol"), &["SCTP", "TCP", "UDP"]);
    let (first, last) = (at(port, "port"), at(port, "endPort"));
    if !first.is_null() {
        causes.port(format!("{field}.port"), first, true);
    }
    if last.is_null() {
        return;
    }
    match (first.as_i64(), last.as_i64()) {
        (Some(first), Some(last)) if last >= first => causes.port(format!("{field}.endPort"), &json!(last), false),
        (Some(first), _) => {
            causes.invalid(
                format!("{field}.endPort"),
                last,
                &format!("must be greater than or equal to `port` ({first})"),
            );
        }
        (None, _) => causes.required(format!("{field}.port"), "a number is required when `endPort` is specified"),
    }
}

fn selector(field: &str, selector: &Value, causes: &mut Causes) {
    if let Err(error) = LabelSelector::from_object(selector) {
        causes.invalid(field, selector, &error.to_string());
    }
}
