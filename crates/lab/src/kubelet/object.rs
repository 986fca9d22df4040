//! The fields of a Pod that the kubelet reads, and the record of a pod that commands read.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Layout;

/// The annotation that gives a command to every container without one of its own.
const RUN_ANNOTATION: &str = "portolan.dev/run";

/// The longest host name: a DNS label, and one less than the kernel's bound (HOST_NAME_MAX).
const HOSTNAME_LENGTH_MAX: usize = 63;

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Pod {
    pub(crate) metadata: Metadata,
    #[serde(default)]
    pub(crate) spec: Spec,
    #[serde(default)]
    pub(crate) status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Metadata {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) uid: String,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) deletion_timestamp: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Spec {
    pub(crate) node_name: Option<String>,
    pub(crate) containers: Vec<Container>,
    pub(crate) host_network: bool,
    pub(crate) hostname: Option<String>,
    pub(crate) dns_policy: Option<String>,
    pub(crate) dns_config: Option<DnsConfig>,
    pub(crate) restart_policy: Option<String>,
    pub(crate) host_aliases: Vec<HostAlias>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Status {
    #[serde(default)]
    pub(crate) phase: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Container {
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) ports: Vec<ContainerPort>,
    pub(crate) env: Vec<Variable>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ContainerPort {
    pub(crate) container_port: u16,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) value: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct DnsConfig {
    pub(crate) nameservers: Vec<String>,
    pub(crate) searches: Vec<String>,
    pub(crate) options: Vec<Variable>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct HostAlias {
    pub(crate) ip: String,
    pub(crate) hostnames: Vec<String>,
}

impl Pod {
    /// Whether it has run to its end.
    pub(crate) fn is_finished(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// Whether directories and files may be named after it. Every API server makes sure of that; this
    /// one process is root, and does not take it on trust.
    pub(crate) fn has_safe_names(&self) -> bool {
        let safe =
            |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        safe(&self.metadata.uid) && self.spec.containers.iter().all(|container| safe(&container.name))
    }

    /// The path of its object in the API.
    pub(crate) fn path(&self) -> String {
        format!("/api/v1/namespaces/{}/pods/{}", self.metadata.namespace, self.metadata.name)
    }

    /// The host name that its containers see: a pod's name may be longer than one, and is cut then as
    /// Kubernetes' kubelet does.
    pub(crate) fn hostname(&self) -> &str {
        let whole = self.spec.hostname.as_deref().unwrap_or(&self.metadata.name);
        let cut = whole.get(..HOSTNAME_LENGTH_MAX).unwrap_or(whole);
        cut.trim_end_matches(['-', '.'])
    }

    /// The command of a container, if it has one instead of the echo server: the annotation
    /// `portolan.dev/run.CONTAINER`, or `portolan.dev/run` for all containers.
    pub(crate) fn command(&self, container: &Container) -> Option<&str> {
        let annotations = &self.metadata.annotations;
        annotations
            .get(&format!("{RUN_ANNOTATION}.{}", container.name))
            .or_else(|| annotations.get(RUN_ANNOTATION))
            .map(String::as_str)
    }

    /// Containers share one network: the first port that two of them want, and their names.
    pub(crate) fn port_conflict(&self) -> Option<(u16, &str, &str)> {
        let mut taken: BTreeMap<u16, &str> = BTreeMap::new();
        for container in &self.spec.containers {
            for port in container.ports() {
                match taken.insert(port, &container.name) {
                    Some(other) if other != container.name => return Some((port, other, &container.name)),
                    _ => {}
                }
            }
        }
        None
    }
}

impl Container {
    /// Its ports, each once, sorted.
    pub(crate) fn ports(&self) -> Vec<u16> {
        let mut ports: Vec<u16> = self.ports.iter().map(|port| port.container_port).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }
}

/// What the kubelet notes of a pod in `pods/UID/pod.json`, for the commands that enter pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRecord {
    /// Its namespace in the cluster.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its unique id.
    pub uid: String,
    /// Its node.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The file of its network namespace.
    pub network: PathBuf,
    /// The process that holds its namespaces.
    pub sandbox: u32,
    /// Its containers.
    pub containers: Vec<RecordedContainer>,
}

/// A container of a [`PodRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecordedContainer {
    /// Its name.
    pub name: String,
    /// The ports that it serves.
    pub ports: Vec<u16>,
}

impl PodRecord {
    /// The pods that run in a lab, sorted by namespace and name.
    pub fn all(layout: &Layout) -> Vec<PodRecord> {
        let Ok(entries) = std::fs::read_dir(layout.pods()) else { return Vec::new() };
        let mut records: Vec<PodRecord> = entries
            .filter_map(|entry| std::fs::read(entry.ok()?.path().join("pod.json")).ok())
            .filter_map(|text| serde_json::from_slice(&text).ok())
            .collect();
        records.sort_by(|left, right| (&left.namespace, &left.name).cmp(&(&right.namespace, &right.name)));
        records
    }

    /// Writes the record, whole or not at all.
    pub(crate) fn save(&self, layout: &Layout) -> std::io::Result<()> {
        let file = layout.pod(&self.uid).join("pod.json");
        let draft = file.with_extension("draft");
        std::fs::write(&draft, serde_json::to_vec(self)?)?;
        std::fs::rename(draft, file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_annotation_of_a_container_comes_before_that_of_the_pod() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "a", "annotations": {"portolan.dev/run": "one", "portolan.dev/run.b": "two"}},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}]},
        }))
        .unwrap();
        let commands: Vec<_> = pod.spec.containers.iter().map(|container| pod.command(container)).collect();
        assert_eq!(commands, [Some("one"), Some("two")]);
    }

    #[test]
    fn a_long_name_is_cut_to_a_host_name() {
        let pod = |name: String| -> Pod { serde_json::from_value(json!({"metadata": {"name": name}})).unwrap() };
        assert_eq!(pod("cart-1".into()).hostname(), "cart-1");
        assert_eq!(pod("a".repeat(100)).hostname(), "a".repeat(63));
        assert_eq!(pod(format!("{}-.bc", "a".repeat(61))).hostname(), "a".repeat(61));
    }

    #[test]
    fn a_uid_is_one_part_of_a_path() {
        let pod = |uid: &str| -> Pod {
            serde_json::from_value(
                json!({"metadata": {"name": "a", "uid": uid}, "spec": {"containers": [{"name": "c"}]}}),
            )
            .unwrap()
        };
        assert!(pod("0a1b2c3d-4e5f-6071").has_safe_names());
        for uid in ["", "..", "../../etc", "a/b"] {
            assert!(!pod(uid).has_safe_names(), "{uid}");
        }
        let mut evil = pod("0a1b");
        evil.spec.containers[0].name = "../../x".into();
        assert!(!evil.has_safe_names());
    }

    #[test]
    fn two_containers_cannot_have_one_port() {
        let pod = |second: u16| -> Pod {
            serde_json::from_value(json!({
                "metadata": {"name": "a"},
                "spec": {"containers": [
                    {"name": "a", "ports": [{"containerPort": 80}, {"containerPort": 80, "protocol": "UDP"}]},
                    {"name": "b", "ports": [{"containerPort": second}]},
                ]},
            }))
            .unwrap()
        };
        assert_eq!(pod(80).port_conflict(), Some((80, "a", "b")));
        assert_eq!(pod(81).port_conflict(), None);
    }
}
