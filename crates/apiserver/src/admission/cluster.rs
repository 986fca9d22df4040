//! Namespaces, Nodes and CustomResourceDefinitions.

use ipnet::IpNet;
use serde_json::{Value, json};

use super::allocate::{overlaps, pod_prefixes};
use super::{Causes, ClusterView, names};
use crate::fields::{at, flag, items, name, set, set_default, text, texts};
use crate::resources::is_built_in_group;

/// A Namespace carries the finalizer that holds it until its objects are gone.
pub(super) fn namespace(old: Option<&Value>, new: &mut Value) {
    if old.is_none() {
        set_default(new, "spec.finalizers", json!(["kubernetes"]));
        set_default(new, "status.phase", "Active");
        let own = name(new).to_owned();
        if let Some(metadata) = new.get_mut("metadata").filter(|metadata| metadata.is_object()) {
            let labels = &mut metadata["labels"];
            if labels.is_null() {
                *labels = json!({});
            }
            if labels.is_object() {
                labels["kubernetes.io/metadata.name"] = json!(own);
            }
        }
    }
}

pub(super) fn node(old: Option<&Value>, new: &mut Value, cluster: &ClusterView<'_>, causes: &mut Causes) {
    // Two spellings of one thing: the first of the list is the single field.
    let single = at(new, "spec.podCIDR").clone();
    if items(new, "spec.podCIDRs").is_empty() && single.as_str().is_some_and(|single| !single.is_empty()) {
        set(new, "spec.podCIDRs", json!([single]));
    } else if let Some(first) = items(new, "spec.podCIDRs").first().cloned() {
        set_default(new, "spec.podCIDR", first);
    }
    if at(new, "spec.podCIDR") != items(new, "spec.podCIDRs").first().unwrap_or(&Value::Null) {
        causes.invalid("spec.podCIDRs", at(new, "spec.podCIDRs"), "first value must match `podCIDR`");
    }
    let old_prefixes = old.map(pod_prefixes).unwrap_or_default();
    if !old_prefixes.is_empty() && old_prefixes != pod_prefixes(new) {
        causes.forbidden("spec.podCIDRs", "node updates may not change podCIDR except from \"\" to valid");
    }
    let mut families = Vec::new();
    for (index, written) in texts(new, "spec.podCIDRs").enumerate() {
        let field = format!("spec.podCIDRs[{index}]");
        let Ok(prefix) = written.parse::<IpNet>() else {
            causes.invalid(field, &json!(written), "must be a valid CIDR value, as 10.42.1.0/24");
            continue;
        };
        if families.contains(&prefix.addr().is_ipv4()) {
            causes.invalid(field.clone(), &json!(written), "may specify no more than one CIDR for each IP family");
        }
        families.push(prefix.addr().is_ipv4());
        let others = cluster.nodes.values().filter(|other| name(other) != name(new));
        for other in others {
            if let Some(taken) = pod_prefixes(other).iter().find(|taken| overlaps(taken, &prefix)) {
                let why = format!("overlaps with {taken} of Node {}; give each node its own", name(other));
                causes.invalid(field.clone(), &json!(written), &why);
            }
        }
        if let Some(range) = cluster.service_prefixes.iter().find(|range| overlaps(range, &prefix)) {
            causes.invalid(field, &json!(written), &format!("overlaps with the service range {range}"));
        }
    }
    for (index, taint) in items(new, "spec.taints").iter().enumerate() {
        if !names::is_label_key(text(taint, "key")) {
            causes.invalid(format!("spec.taints[{index}].key"), at(taint, "key"), names::KEY_FORM);
        }
        let effects = &["NoExecute", "NoSchedule", "PreferNoSchedule"];
        causes.one_of(format!("spec.taints[{index}].effect"), at(taint, "effect"), effects);
    }
}

pub(super) fn custom_resource_definition(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    let (plural, group) = (text(new, "spec.names.plural").to_owned(), text(new, "spec.group").to_owned());
    for field in ["spec.group", "spec.names.plural", "spec.names.kind"] {
        if text(new, field).is_empty() {
            causes.required(field, "");
        }
    }
    // Without the dot it could have the keys of a group of Kubernetes' own.
    let is_domain = group.contains('.') && names::is_dns_subdomain(&group);
    if !group.is_empty() && !is_domain {
        causes.invalid("spec.group", at(new, "spec.group"), "should be a domain with at least one dot");
    } else if is_built_in_group(&group) && old.is_none() {
        causes.invalid("spec.group", at(new, "spec.group"), "is served by this server itself; choose another group");
    }
    if name(new) != format!("{plural}.{group}") {
        causes.invalid("metadata.name", at(new, "metadata.name"), "must be spec.names.plural+\".\"+spec.group");
    }
    if !names::is_dns_label(&plural) && !plural.is_empty() {
        causes.invalid("spec.names.plural", at(new, "spec.names.plural"), names::LABEL_FORM);
    }
    set_default(new, "spec.names.singular", text(new, "spec.names.kind").to_lowercase());
    let list_kind = format!("{}List", text(new, "spec.names.kind"));
    set_default(new, "spec.names.listKind", list_kind);
    set_default(new, "spec.conversion.strategy", "None");
    if at(new, "spec.scope").is_null() {
        causes.required("spec.scope", "Namespaced or Cluster");
    }
    causes.one_of("spec.scope", at(new, "spec.scope"), &["Cluster", "Namespaced"]);
    let versions = items(new, "spec.versions");
    if versions.is_empty() {
        causes.required("spec.versions", "at least one version");
    }
    let stored = versions.iter().filter(|version| flag(version, "storage")).count();
    if !versions.is_empty() && stored != 1 {
        causes.invalid("spec.versions", &json!(stored), "must have exactly one version marked as storage version");
    }
    for (index, version) in versions.iter().enumerate() {
        let field = format!("spec.versions[{index}].name");
        if !names::is_dns_label(text(version, "name")) {
            causes.invalid(field, at(version, "name"), names::LABEL_FORM);
        } else if versions[..index].iter().any(|other| at(other, "name") == at(version, "name")) {
            causes.duplicate(field, at(version, "name"), "");
        }
    }
    if let Some(old) = old {
        causes.immutable("spec.group", old, new);
        causes.immutable("spec.scope", old, new);
        causes.immutable("spec.names.plural", old, new);
    }
}
