//! Pods, ReplicaSets and Deployments.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Causes, check_labels, names};
use crate::fields::{at, items, name, number, remove, set_default, text};
use crate::selector::LabelSelector;

pub(super) fn pod(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    default_pod_spec(new, "spec");
    if old.is_none() {
        set_default(new, "status.phase", "Pending");
        set_default(new, "status.qosClass", "BestEffort");
    }
    check_pod_spec(new, "spec", causes);
    if let Some(old) = old {
        check_pod_update(old, new, causes);
    }
}

/// What kube-apiserver fills in, as far as somebody here reads it.
fn default_pod_spec(object: &mut Value, path: &str) {
    let Some(spec) = object.pointer_mut(&format!("/{}", path.replace('.', "/"))) else { return };
    set_default(spec, "restartPolicy", "Always");
    set_default(spec, "dnsPolicy", "ClusterFirst");
    set_default(spec, "schedulerName", "default-scheduler");
    set_default(spec, "terminationGracePeriodSeconds", 30);
    set_default(spec, "enableServiceLinks", true);
    set_default(spec, "securityContext", json!({}));
    for list in ["containers", "initContainers"] {
        let Some(containers) = spec.get_mut(list).and_then(Value::as_array_mut) else { continue };
        for container in containers.iter_mut().filter(|container| container.is_object()) {
            let image = text(container, "image");
            let tag = image.rsplit('/').next().unwrap_or("").split_once(':').map(|(_, tag)| tag);
            let is_latest = !image.contains('@') && matches!(tag, None | Some("latest"));
            set_default(container, "imagePullPolicy", if is_latest { "Always" } else { "IfNotPresent" });
            set_default(container, "resources", json!({}));
            set_default(container, "terminationMessagePath", "/dev/termination-log");
            set_default(container, "terminationMessagePolicy", "File");
            if let Some(ports) = container.get_mut("ports").and_then(Value::as_array_mut) {
                for port in ports.iter_mut().filter(|port| port.is_object()) {
                    set_default(port, "protocol", "TCP");
                }
            }
        }
    }
}

fn check_pod_spec(object: &Value, path: &str, causes: &mut Causes) {
    let spec = at(object, path);
    let containers = items(spec, "containers");
    if containers.is_empty() {
        causes.required(format!("{path}.containers"), "a pod has at least one container");
    }
    causes.one_of(format!("{path}.restartPolicy"), at(spec, "restartPolicy"), &["Always", "Never", "OnFailure"]);
    let policies = &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    causes.one_of(format!("{path}.dnsPolicy"), at(spec, "dnsPolicy"), policies);
    if text(spec, "dnsPolicy") == "None" && items(spec, "dnsConfig.nameservers").is_empty() {
        let field = format!("{path}.dnsConfig.nameservers");
        causes.required(field, "must provide at least one DNS nameserver when `dnsPolicy` is None");
    }
    for field in ["hostname", "subdomain"] {
        let value = text(spec, field);
        if !value.is_empty() && !names::is_dns_label(value) {
            causes.invalid(format!("{path}.{field}"), at(spec, field), names::LABEL_FORM);
        }
    }
    let (mut seen, mut seen_ports) = (BTreeSet::new(), BTreeSet::new());
    for list in ["initContainers", "containers"] {
        for (index, container) in items(spec, list).iter().enumerate() {
            let field = |field: &str| format!("{path}.{list}[{index}].{field}");
            let container_name = text(container, "name");
            if container_name.is_empty() {
                causes.required(field("name"), "");
            } else if !names::is_dns_label(container_name) {
                causes.invalid(field("name"), at(container, "name"), names::LABEL_FORM);
            } else if !seen.insert(container_name.to_owned()) {
                causes.duplicate(field("name"), at(container, "name"), "");
            }
            if text(container, "image").is_empty() {
                causes.required(field("image"), "");
            }
            for (position, port) in items(container, "ports").iter().enumerate() {
                let field = |name: &str| format!("{path}.{list}[{index}].ports[{position}].{name}");
                if at(port, "containerPort").is_null() {
                    causes.required(field("containerPort"), "");
                } else {
                    causes.port(field("containerPort"), at(port, "containerPort"), false);
                }
                if !matches!(at(port, "hostPort"), Value::Null) && at(port, "hostPort") != 0 {
                    causes.port(field("hostPort"), at(port, "hostPort"), false);
                }
                causes.one_of(field("protocol"), at(port, "protocol"), &["SCTP", "TCP", "UDP"]);
                let port_name = text(port, "name");
                if !port_name.is_empty() {
                    if !names::is_port_name(port_name) {
                        causes.invalid(field("name"), at(port, "name"), names::PORT_NAME_FORM);
                    } else if !seen_ports.insert((index, list, port_name.to_owned())) {
                        causes.duplicate(field("name"), at(port, "name"), "");
                    }
                }
            }
        }
    }
}

/// A pod's spec stands, but for images, the node of an unscheduled pod, tolerations and the deadline.
fn check_pod_update(old: &Value, new: &Value, causes: &mut Causes) {
    let (mut before, mut after) = (at(old, "spec").clone(), at(new, "spec").clone());
    if text(old, "spec.nodeName").is_empty() {
        remove(&mut after, "nodeName");
        remove(&mut before, "nodeName");
    }
    for spec in [&mut before, &mut after] {
        for field in [
            "activeDeadlineSeconds",
            "tolerations",
            "terminationGracePeriodSeconds",
            "schedulingGates",
            "ephemeralContainers",
        ] {
            remove(spec, field);
        }
        for list in ["containers", "initContainers"] {
            for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                remove(container, "image");
                remove(container, "imagePullPolicy");
            }
        }
    }
    if before != after {
        let why = "pod updates may not change fields other than `spec.containers[*].image`, `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations`, `spec.terminationGracePeriodSeconds`";
        causes.forbidden("spec", why);
    }
}

pub(super) fn replica_set(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    template_owner(old, new, causes);
}

pub(super) fn deployment(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    set_default(new, "spec.strategy.type", "RollingUpdate");
    if text(new, "spec.strategy.type") == "RollingUpdate" {
        set_default(new, "spec.strategy.rollingUpdate.maxSurge", "25%");
        set_default(new, "spec.strategy.rollingUpdate.maxUnavailable", "25%");
        let is_zero = |field: &str| {
            matches!(at(new, field), Value::Number(number) if number.as_i64() == Some(0)) || at(new, field) == "0%"
        };
        let unavailable = "spec.strategy.rollingUpdate.maxUnavailable";
        if is_zero(unavailable) && is_zero("spec.strategy.rollingUpdate.maxSurge") {
            causes.invalid(unavailable, at(new, unavailable), "may not be 0 when `maxSurge` is 0");
        }
        for field in [unavailable, "spec.strategy.rollingUpdate.maxSurge"] {
            if !is_number_or_percent(at(new, field)) {
                causes.invalid(field, at(new, field), "must be a number from 0 on or a percentage, as \"25%\"");
            }
        }
    } else if !at(new, "spec.strategy.rollingUpdate").is_null() {
        causes.forbidden("spec.strategy.rollingUpdate", "may not be specified when strategy `type` is 'Recreate'");
    }
    causes.one_of("spec.strategy.type", at(new, "spec.strategy.type"), &["Recreate", "RollingUpdate"]);
    set_default(new, "spec.revisionHistoryLimit", 10);
    set_default(new, "spec.progressDeadlineSeconds", 600);
    template_owner(old, new, causes);
}

fn is_number_or_percent(value: &Value) -> bool {
    let percent = |text: &str| text.strip_suffix('%').is_some_and(|digits| digits.parse::<u16>().is_ok());
    value.as_u64().is_some() || value.as_str().is_some_and(percent)
}

/// What Deployments and ReplicaSets have in common.
fn template_owner(old: Option<&Value>, new: &mut Value, causes: &mut Causes) {
    set_default(new, "spec.replicas", 1);
    default_pod_spec(new, "spec.template.spec");
    if number(new, "spec.replicas").is_none_or(|replicas| !(0..=i64::from(i32::MAX)).contains(&replicas)) {
        causes.invalid("spec.replicas", at(new, "spec.replicas"), "must be greater than or equal to 0");
    }
    if number(new, "spec.minReadySeconds").is_some_and(|seconds| seconds < 0) {
        causes.invalid("spec.minReadySeconds", at(new, "spec.minReadySeconds"), "must be greater than or equal to 0");
    }
    // Pods are named after their owner: what is fine for an object must leave room for the suffix.
    check_labels("spec.template.metadata.labels", at(new, "spec.template.metadata.labels"), causes);
    if at(new, "spec.template").is_null() {
        causes.required("spec.template", &format!("the pods of {} are made from it", name(new)));
    } else {
        check_pod_spec(new, "spec.template.spec", causes);
        if !matches!(text(new, "spec.template.spec.restartPolicy"), "Always" | "") {
            causes.one_of("spec.template.spec.restartPolicy", at(new, "spec.template.spec.restartPolicy"), &["Always"]);
        }
    }
    let selector = at(new, "spec.selector");
    match LabelSelector::from_object(selector) {
        _ if selector.is_null() => causes.required("spec.selector", ""),
        Err(error) => causes.invalid("spec.selector", selector, &error.to_string()),
        Ok(parsed) if parsed.is_everything() => {
            causes.invalid("spec.selector", selector, "empty selector is invalid for deployment");
        }
        Ok(parsed) => {
            let labels = at(new, "spec.template.metadata.labels");
            if !parsed.matches(labels) {
                causes.invalid("spec.template.metadata.labels", labels, "`selector` does not match template `labels`");
            }
        }
    }
    if let Some(old) = old {
        causes.immutable("spec.selector", old, new);
    }
}
