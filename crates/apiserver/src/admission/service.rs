//! Services: types, ports, families, ClusterIPs and NodePorts. Who gets which traffic is in `traffic`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::allocate::{Taken, protocol, service_addresses};
use super::{CauseReason, Causes, ClusterView, check_labels, names, traffic};
use crate::fields::{at, flag, items, name, namespace, number, remove, set, set_default, text, texts};

const TYPES: &[&str] = &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];

pub(super) fn admit(old: Option<&Value>, new: &mut Value, cluster: &ClusterView<'_>, causes: &mut Causes) {
    set_default(new, "spec.type", "ClusterIP");
    causes.one_of("spec.type", at(new, "spec.type"), TYPES);
    check_labels("spec.selector", at(new, "spec.selector"), causes);
    if let Some(old) = old {
        traffic::drop_dependent(old, new);
    }
    traffic::affinity(new, causes);
    ports(new, causes);
    traffic::policies(new, causes);
    traffic::load_balancer(old, new, causes);
    traffic::external_addresses(old, new, causes);
    traffic::load_balancer_status(old, new, causes);
    if text(new, "spec.type") == "ExternalName" {
        external_name(old, new, causes);
        return;
    }
    set_default(new, "status.loadBalancer", json!({}));
    let own = (namespace(new), name(new));
    let mut taken = Taken::by_others(cluster.holders, own);
    addresses(old, new, cluster, &taken, causes);
    if matches!(text(new, "spec.type"), "NodePort" | "LoadBalancer") {
        node_ports(old, new, cluster, &mut taken, causes);
    } else {
        release_node_ports(old, new, causes);
    }
    health_check_port(old, new, cluster, &mut taken, causes);
}

fn external_name(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    let external = text(new, "spec.externalName").trim_end_matches('.').to_ascii_lowercase();
    if external.is_empty() {
        causes.required("spec.externalName", "an ExternalName Service needs the name it stands for");
    } else if !names::is_dns_subdomain(&external) {
        causes.invalid("spec.externalName", at(new, "spec.externalName"), names::SUBDOMAIN_FORM);
    }
    release_node_ports(old, new, causes);
    for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        let field = format!("spec.{field}");
        let value = at(new, &field);
        let is_set =
            !value.is_null() && value != "" && value != "None" && *value != json!([]) && *value != json!(["None"]);
        // What the Service had as another type goes with that type.
        if is_set && old.is_none_or(|old| at(old, &field) != value) {
            causes.forbidden(field, "may not be set for ExternalName services");
        } else {
            remove(new, &field);
        }
    }
}

fn ports(new: &mut Value, causes: &mut Causes) {
    let is_required = text(new, "spec.type") != "ExternalName" && text(new, "spec.clusterIP") != "None";
    if let Some(list) = new.pointer_mut("/spec/ports").and_then(Value::as_array_mut) {
        for port in list {
            set_default(port, "protocol", "TCP");
            if at(port, "targetPort").is_null() || at(port, "targetPort") == 0 || at(port, "targetPort") == "" {
                let number = at(port, "port").clone();
                set(port, "targetPort", number);
            }
        }
    }
    let ports = items(new, "spec.ports");
    if ports.is_empty() && is_required {
        causes.required("spec.ports", "a Service needs at least one port");
    }
    let (mut seen_names, mut seen_ports) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in ports.iter().enumerate() {
        let field = |field: &str| format!("spec.ports[{index}].{field}");
        if at(port, "port").is_null() {
            causes.required(field("port"), "the port on which the Service answers");
        } else {
            causes.port(field("port"), at(port, "port"), false);
            causes.port(field("targetPort"), at(port, "targetPort"), true);
        }
        causes.one_of(field("protocol"), at(port, "protocol"), &["SCTP", "TCP", "UDP"]);
        let port_name = text(port, "name");
        if port_name.is_empty() && ports.len() > 1 {
            causes.required(field("name"), "each of several ports needs a name");
        } else if !port_name.is_empty() && !names::is_dns_label(port_name) {
            causes.invalid(field("name"), at(port, "name"), names::LABEL_FORM);
        }
        if !port_name.is_empty() && !seen_names.insert(port_name.to_owned()) {
            causes.duplicate(field("name"), at(port, "name"), "");
        }
        if !seen_ports.insert((number(port, "port"), protocol(port).to_owned())) {
            let value = json!({"port": at(port, "port"), "protocol": protocol(port)});
            causes.duplicate(format!("spec.ports[{index}]"), &value, "");
        }
    }
}

fn family_of(address: &IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn prefix_of<'a>(cluster: &ClusterView<'a>, family: &str) -> Option<&'a IpNet> {
    cluster.service_prefixes.iter().find(|prefix| family_of(&prefix.addr()) == family)
}

/// Decides the families (KEP-563) and gives each an address.
fn addresses(old: Option<&Value>, new: &mut Value, cluster: &ClusterView<'_>, taken: &Taken<'_>, causes: &mut Causes) {
    let old = old.filter(|old| text(old, "spec.type") != "ExternalName");
    if let Some(old) = old {
        // A client that sends back an object without what was filled in keeps it.
        for field in ["spec.clusterIP", "spec.clusterIPs", "spec.ipFamilyPolicy", "spec.ipFamilies"] {
            if matches!(at(new, field), Value::Null) || at(new, field) == "" {
                let kept = at(old, field).clone();
                if !kept.is_null() {
                    set(new, field, kept);
                }
            }
        }
        let was = text(old, "spec.clusterIP");
        if !was.is_empty() && was != text(new, "spec.clusterIP") {
            causes.invalid(
                "spec.clusterIP",
                at(new, "spec.clusterIP"),
                "may not change once set; delete the Service and create it again",
            );
            return;
        }
    }
    set_default(new, "spec.ipFamilyPolicy", "SingleStack");
    if let Some(old) = old
        && text(new, "spec.ipFamilyPolicy") == "SingleStack"
        && text(old, "spec.ipFamilyPolicy") != "SingleStack"
    {
        // Going back to one family gives the second address back, if the client left the lists alone.
        for field in ["spec.ipFamilies", "spec.clusterIPs"] {
            if at(new, field) == at(old, field) {
                let first: Vec<Value> = items(new, field).iter().take(1).cloned().collect();
                set(new, field, Value::Array(first));
            }
        }
    }
    let policies = &["PreferDualStack", "RequireDualStack", "SingleStack"];
    causes.one_of("spec.ipFamilyPolicy", at(new, "spec.ipFamilyPolicy"), policies);
    let mut wanted: Vec<String> = texts(new, "spec.clusterIPs").map(str::to_owned).collect();
    let first = text(new, "spec.clusterIP").to_owned();
    if wanted.is_empty() && !first.is_empty() {
        wanted.push(first.clone());
    }
    if !first.is_empty() && wanted.first() != Some(&first) {
        causes.invalid("spec.clusterIPs", at(new, "spec.clusterIPs"), "first value must match `clusterIP`");
        return;
    }
    let is_headless = wanted.first().is_some_and(|address| address == "None");
    let families = families(new, cluster, &wanted, is_headless, causes);
    if families.is_empty() {
        return;
    }
    set(new, "spec.ipFamilies", json!(families));
    if is_headless {
        set(new, "spec.clusterIP", json!("None"));
        set(new, "spec.clusterIPs", json!(["None"]));
        return;
    }
    let held = old.map(service_addresses).unwrap_or_default();
    let mut given = Vec::new();
    for (index, family) in families.iter().enumerate() {
        let Some(prefix) = prefix_of(cluster, family) else { continue };
        let field = format!("spec.clusterIPs[{index}]");
        let Some(text) = wanted.get(index) else {
            match taken.free_address(prefix) {
                Some(address) => given.push(address.to_string()),
                None => causes.push(field, CauseReason::Invalid, format!("range is full: no free address is left in {prefix}; delete a Service or configure a larger service range")),
            }
            continue;
        };
        let value = Value::from(text.as_str());
        match text.parse::<IpAddr>() {
            Err(_) => causes.invalid(field, &value, "must be an IP address, \"None\" or empty"),
            Ok(address) if family_of(&address) != family => {
                causes.invalid(
                    field,
                    &value,
                    &format!("expected an {family} value as indicated by `ipFamilies[{index}]`"),
                );
            }
            Ok(address) if !prefix.contains(&address) && !held.contains(&address) => {
                causes.invalid(
                    field,
                    &value,
                    &format!("provided IP is not in the valid range. The range of valid IPs is {prefix}"),
                );
            }
            Ok(address) => match taken.address_holder(&address) {
                Some(holder) => {
                    causes.invalid(field, &value, &format!("provided IP is already allocated to Service {holder}"));
                }
                None => given.push(address.to_string()),
            },
        }
    }
    if let Some(first) = given.first() {
        set(new, "spec.clusterIP", json!(first));
        set(new, "spec.clusterIPs", json!(given));
    }
}

fn families(
    new: &Value,
    cluster: &ClusterView<'_>,
    wanted: &[String],
    is_headless: bool,
    causes: &mut Causes,
) -> Vec<String> {
    let mut families: Vec<String> = texts(new, "spec.ipFamilies").map(str::to_owned).collect();
    for (index, family) in families.iter().enumerate() {
        if prefix_of(cluster, family).is_none() && !is_headless {
            causes.invalid(format!("spec.ipFamilies[{index}]"), &json!(family), "not configured on this cluster");
            return Vec::new();
        }
    }
    if families.len() == 2 && families[0] == families[1] {
        causes.duplicate("spec.ipFamilies[1]", &json!(families[1]), "");
        return Vec::new();
    }
    for address in wanted.iter().filter_map(|address| address.parse::<IpAddr>().ok()).skip(families.len()) {
        families.push(family_of(&address).to_owned());
    }
    let configured: Vec<&str> = cluster.service_prefixes.iter().map(|prefix| family_of(&prefix.addr())).collect();
    if families.is_empty() {
        families.extend(configured.first().map(|family| (*family).to_owned()));
    }
    let policy = text(new, "spec.ipFamilyPolicy");
    if policy == "SingleStack" {
        if families.len() > 1 {
            causes.invalid(
                "spec.ipFamilyPolicy",
                &json!(policy),
                "must be RequireDualStack or PreferDualStack when `ipFamilies` or `clusterIPs` holds two",
            );
            return Vec::new();
        }
        return families;
    }
    if let Some(second) = configured.iter().find(|family| !families.iter().any(|have| have == **family)) {
        families.push((*second).to_owned());
    }
    if policy == "RequireDualStack" && families.len() < 2 {
        causes.invalid("spec.ipFamilyPolicy", &json!(policy), "this cluster is not configured for dual-stack services");
        return Vec::new();
    }
    families
}

fn node_ports(
    old: Option<&Value>,
    new: &mut Value,
    cluster: &ClusterView<'_>,
    taken: &mut Taken<'_>,
    causes: &mut Causes,
) {
    if text(new, "spec.clusterIP") == "None" {
        let why = format!("may not be set to 'None' for {} services", text(new, "spec.type"));
        causes.invalid("spec.clusterIPs[0]", &json!("None"), &why);
    }
    let own = format!("{}/{}", namespace(new), name(new));
    let is_wanted = text(new, "spec.type") == "NodePort" || flag(new, "spec.allocateLoadBalancerNodePorts");
    let range = &cluster.node_port_range;
    let mut ports = items(new, "spec.ports").to_vec();
    let same_port =
        |left: &Value, right: &Value| at(left, "port") == at(right, "port") && protocol(left) == protocol(right);
    // Asked-for ports first: an automatic one must not take what a later port of the same Service names.
    for (index, port) in ports.iter_mut().enumerate() {
        if number(port, "nodePort").unwrap_or(0) == 0 {
            let before =
                old.map_or(&[][..], |old| items(old, "spec.ports")).iter().find(|other| same_port(other, port));
            match before.and_then(|before| number(before, "nodePort")).filter(|_| is_wanted) {
                Some(kept) => set(port, "nodePort", json!(kept)),
                None => remove(port, "nodePort"),
            }
        }
        let value = at(port, "nodePort").clone();
        if value.is_null() {
            continue;
        }
        let field = format!("spec.ports[{index}].nodePort");
        let was_held =
            old.is_some_and(|old| items(old, "spec.ports").iter().any(|other| at(other, "nodePort") == &value));
        let asked = value.as_i64().and_then(|asked| u16::try_from(asked).ok());
        match asked.filter(|asked| range.contains(asked) || was_held) {
            None => causes.invalid(field, &value, &not_in(range)),
            Some(asked) => match taken.port_holder(asked, protocol(port)) {
                Some(holder) => {
                    let why = format!("provided port is already allocated to Service {holder}");
                    causes.invalid(field, &value, &why);
                }
                None => taken.take_port(asked, protocol(port), &own),
            },
        }
    }
    for (index, port) in ports.iter_mut().enumerate().filter(|_| is_wanted) {
        if !at(port, "nodePort").is_null() {
            continue;
        }
        let seed = format!("{own}:{}", at(port, "port"));
        match taken.free_port(range, protocol(port), &seed) {
            Some(found) => {
                taken.take_port(found, protocol(port), &own);
                set(port, "nodePort", json!(found));
            }
            None => causes.push(format!("spec.ports[{index}].nodePort"), CauseReason::Invalid, no_port_left(range)),
        }
    }
    set(new, "spec.ports", Value::Array(ports));
}

/// A Service that was of type `NodePort` gives its ports back; one that never was may not ask for any.
fn release_node_ports(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    let before: Vec<Value> =
        old.map_or(&[][..], |old| items(old, "spec.ports")).iter().map(|port| at(port, "nodePort").clone()).collect();
    let kind = text(new, "spec.type").to_owned();
    let Some(ports) = new.pointer_mut("/spec/ports").and_then(Value::as_array_mut) else { return };
    for (index, port) in ports.iter_mut().enumerate() {
        let node_port = at(port, "nodePort").clone();
        if node_port.is_null() || node_port == 0 || before.contains(&node_port) {
            remove(port, "nodePort");
        } else {
            let why = format!("may not be used when `type` is '{kind}'");
            causes.forbidden(format!("spec.ports[{index}].nodePort"), &why);
        }
    }
}

/// The port at which nodes say whether they have endpoints, for load balancers that ask them.
fn health_check_port(
    old: Option<&Value>,
    new: &mut Value,
    cluster: &ClusterView<'_>,
    taken: &mut Taken<'_>,
    causes: &mut Causes,
) {
    let field = "spec.healthCheckNodePort";
    if number(new, field) == Some(0) {
        remove(new, field);
    }
    if !traffic::needs_health_check(new) {
        if !at(new, field).is_null() {
            let why = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
            causes.invalid(field, at(new, field), why);
        }
        return;
    }
    let held = old.filter(|old| traffic::needs_health_check(old)).and_then(|old| number(old, field));
    if let Some(held) = held {
        set_default(new, field, held);
        if number(new, field) != Some(held) {
            causes.forbidden(field, "field is immutable");
        }
        return;
    }
    let own = format!("{}/{}", namespace(new), name(new));
    let range = &cluster.node_port_range;
    let value = at(new, field).clone();
    if value.is_null() {
        match taken.free_port(range, "TCP", &format!("{own}:health")) {
            Some(found) => set(new, field, json!(found)),
            None => causes.push(field, CauseReason::Invalid, no_port_left(range)),
        }
        return;
    }
    match value.as_i64().and_then(|asked| u16::try_from(asked).ok()).filter(|asked| range.contains(asked)) {
        None => causes.invalid(field, &value, &not_in(range)),
        Some(asked) => {
            if let Some(holder) = taken.port_holder(asked, "TCP") {
                causes.invalid(field, &value, &format!("provided port is already allocated to Service {holder}"));
            }
        }
    }
}

fn not_in(range: &RangeInclusive<u16>) -> String {
    let (first, last) = (range.start(), range.end());
    format!("provided port is not in the valid range. The range of valid ports is {first}-{last}")
}

fn no_port_left(range: &RangeInclusive<u16>) -> String {
    let (first, last) = (range.start(), range.end());
    format!(
        "range is full: no free node port is left in {first}-{last}; delete a NodePort Service or configure a \
         larger range"
    )
}
