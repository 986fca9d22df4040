//! Objects as the Kubernetes API writes them, for a kube-proxy that knows no newer version than 1.20.

use portolan_net::ObjectKey;
use portolan_state::{Endpoint, EndpointSlice, Node, Service, ServicePort, ServiceType, TrafficPolicy};
use serde_json::{Value, json};

/// The name of an object in a table.
pub(crate) fn name(key: &ObjectKey) -> String {
    format!("{}/{}", key.namespace, key.name)
}

fn metadata(key: &ObjectKey) -> Value {
    json!({"name": &*key.name, "namespace": &*key.namespace, "uid": name(key), "resourceVersion": "1"})
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

pub(crate) fn node(node: &Node) -> Value {
    let addresses: Vec<Value> =
        node.addresses.iter().map(|address| json!({"type": "InternalIP", "address": address.to_string()})).collect();
    let prefixes = texts(&node.pod_prefixes);
    let zone = node.zone.as_deref().unwrap_or_default();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": node.name.as_str(), "uid": node.name.as_str(), "resourceVersion": "1",
            "labels": {"kubernetes.io/hostname": node.name.as_str(), "topology.kubernetes.io/zone": zone},
        },
        "spec": {"podCIDR": prefixes.first(), "podCIDRs": prefixes},
        "status": {"addresses": addresses},
    })
}

pub(crate) fn service(service: &Service) -> Value {
    let (service_type, external_name) = match &service.service_type {
        ServiceType::ClusterIp => ("ClusterIP", None),
        ServiceType::NodePort => ("NodePort", None),
        ServiceType::LoadBalancer => ("LoadBalancer", None),
        ServiceType::ExternalName(name) => ("ExternalName", Some(name.to_string())),
    };
    let addresses = if service.headless { vec!["None".to_owned()] } else { texts(&service.cluster_addresses) };
    let families: Vec<&str> =
        service.cluster_addresses.iter().map(|it| if it.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
    let traffic = &service.traffic;
    let policy = |policy| if policy == TrafficPolicy::Local { "Local" } else { "Cluster" };
    let ingress: Vec<Value> =
        traffic.load_balancer_addresses.iter().map(|address| json!({"ip": address.to_string()})).collect();
    let mut spec = json!({
        "type": service_type, "clusterIP": addresses.first(), "clusterIPs": addresses, "ipFamilies": families,
        "ports": service.ports.iter().map(port).collect::<Vec<_>>(),
        "publishNotReadyAddresses": service.publish_not_ready,
        "externalIPs": texts(&traffic.external_addresses),
        "sessionAffinity": if traffic.affinity.is_some() { "ClientIP" } else { "None" },
        "externalName": external_name,
    });
    if matches!(service_type, "NodePort" | "LoadBalancer") {
        spec["externalTrafficPolicy"] = json!(policy(traffic.external_policy));
    }
    if let Some(timeout) = traffic.affinity {
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": timeout.seconds()}});
    }
    if let Some(ranges) = &traffic.load_balancer_sources {
        spec["loadBalancerSourceRanges"] = json!(texts(ranges));
    }
    if let Some(port) = traffic.health_check_port {
        spec["healthCheckNodePort"] = json!(port.get());
    }
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata(&service.key), "spec": spec,
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}

fn port(port: &ServicePort) -> Value {
    let mut value = json!({
        "name": &*port.name, "protocol": port.protocol.name().to_uppercase(), "port": port.port.get(),
        "targetPort": port.port.get(),
    });
    if let Some(node_port) = port.node_port {
        value["nodePort"] = json!(node_port.get());
    }
    value
}

pub(crate) fn slice(slice: &EndpointSlice) -> Value {
    let mut metadata = metadata(&slice.key);
    metadata["labels"] = json!({"kubernetes.io/service-name": &*slice.service.name});
    if slice.headless {
        metadata["labels"]["service.kubernetes.io/headless"] = json!("");
    }
    let ports: Vec<Value> = slice
        .ports
        .iter()
        .map(|it| json!({"name": &*it.name, "protocol": it.protocol.name().to_uppercase(), "port": it.port.get()}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1beta1", "kind": "EndpointSlice", "metadata": metadata,
        "addressType": slice.family.to_string(), "ports": ports,
        "endpoints": slice.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

fn endpoint(endpoint: &Endpoint) -> Value {
    let mut value = json!({
        "addresses": [endpoint.address.to_string()],
        "conditions": {"ready": endpoint.ready, "serving": endpoint.serving, "terminating": endpoint.terminating},
    });
    if let Some(node) = &endpoint.node {
        value["topology"] = json!({"kubernetes.io/hostname": node.as_str()});
    }
    value
}
