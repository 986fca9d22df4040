//! A pod's `/etc/resolv.conf` and `/etc/hosts`, by `dnsPolicy` and `dnsConfig` as Kubernetes
//! documents them ("DNS for Services and Pods").

use std::fmt::Write as _;
use std::net::IpAddr;

use super::object::Pod;
use crate::description::CLUSTER_DOMAIN;

/// The text of `/etc/resolv.conf`.
pub(super) fn resolver(pod: &Pod, cluster: &[IpAddr], upstream: &[IpAddr]) -> String {
    let policy = pod.spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    // A pod of the node's network gets the node's resolver, unless it asks for the cluster's.
    let policy = if pod.spec.host_network && policy == "ClusterFirst" { "Default" } else { policy };
    let text = |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (mut servers, mut searches, mut options) = match policy {
        "None" => (Vec::new(), Vec::new(), Vec::new()),
        "Default" => (text(upstream), Vec::new(), Vec::new()),
        _ => {
            let namespace = &pod.metadata.namespace;
            let searches = [
                format!("{namespace}.svc.{CLUSTER_DOMAIN}"),
                format!("svc.{CLUSTER_DOMAIN}"),
                CLUSTER_DOMAIN.to_owned(),
            ];
            (text(cluster), searches.to_vec(), vec!["ndots:5".to_owned()])
        }
    };
    if let Some(config) = &pod.spec.dns_config {
        servers.extend(config.nameservers.iter().cloned());
        searches.extend(config.searches.iter().cloned());
        for option in &config.options {
            options.retain(|known| known.split(':').next() != Some(&option.name));
            options.push(match &option.value {
                Some(value) => format!("{}:{value}", option.name),
                None => option.name.clone(),
            });
        }
    }
    let mut file = String::new();
    for server in servers {
        let _ = writeln!(file, "nameserver {server}");
    }
    for (word, values) in [("search", searches), ("options", options)] {
        if !values.is_empty() {
            let _ = writeln!(file, "{word} {}", values.join(" "));
        }
    }
    file
}

/// The text of `/etc/hosts`. The pod's own addresses are not known before CNI ADD; they are added to
/// the same file then.
pub(super) fn hosts(pod: &Pod, addresses: &[IpAddr]) -> String {
    let mut file = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for address in addresses {
        let _ = writeln!(file, "{address}\t{}", pod.hostname());
    }
    for alias in &pod.spec.host_aliases {
        let _ = writeln!(file, "{}\t{}", alias.ip, alias.hostnames.join("\t"));
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn text(spec: &Value) -> String {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "a", "namespace": "shop"}, "spec": spec})).unwrap();
        resolver(&pod, &["10.96.0.10".parse().unwrap()], &["192.168.99.3".parse().unwrap()])
    }

    #[test]
    fn the_policy_chooses_the_servers() {
        let cluster = "nameserver 10.96.0.10\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\n\
                       options ndots:5\n";
        assert_eq!(text(&json!({})), cluster);
        assert_eq!(text(&json!({"dnsPolicy": "Default"})), "nameserver 192.168.99.3\n");
        assert_eq!(text(&json!({"hostNetwork": true})), "nameserver 192.168.99.3\n");
        assert_eq!(text(&json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"})), cluster);
    }

    #[test]
    fn the_configuration_adds_to_the_policy() {
        let config = json!({"nameservers": ["1.2.3.4"], "searches": ["x.test"],
                            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]});
        assert_eq!(
            text(&json!({"dnsPolicy": "None", "dnsConfig": config})),
            "nameserver 1.2.3.4\nsearch x.test\noptions ndots:2 edns0\n"
        );
        assert!(text(&json!({"dnsConfig": config})).ends_with(" x.test\noptions ndots:2 edns0\n"));
    }
}
