//! The agent's configuration: one YAML file, every field named as users write it.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::IpNet;
use portolan_intent::services::ProxySettings;
use portolan_intent::{FabricMode, FabricSettings};
use portolan_net::{Family, NodeName};
use portolan_program::ipvs::IpvsSettings;
use serde::Deserialize;

use crate::fabric_config::{self, FabricConfigError, HostGwConfig, IpipConfig, VxlanConfig};
use crate::proxy::{Document, Note, ProxyOptions};

/// Where the cluster's objects are read from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KubernetesConfig {
    /// A Unix socket that serves the Kubernetes API in plain HTTP.
    pub socket: Option<PathBuf>,
    /// A kubeconfig file. Without either, the pod's service account is used.
    pub kubeconfig: Option<PathBuf>,
}

impl KubernetesConfig {
    /// How to reach the API.
    pub fn connection(&self) -> portolan_source::Connection {
        use portolan_source::Connection;
        match (&self.socket, &self.kubeconfig) {
            (Some(socket), _) => Connection::Socket(socket.clone()),
            (None, Some(kubeconfig)) => Connection::Kubeconfig(kubeconfig.clone()),
            (None, None) => Connection::InCluster,
        }
    }
}

/// How Services are programmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServicesMode {
    /// Our nftables tables, over netlink.
    Nftables,
    /// kube-proxy's chains of iptables.
    Iptables,
    /// Virtual servers in the kernel (IPVS), as kube-proxy has them.
    Ipvs,
}

impl ServicesMode {
    /// The name, as kube-proxy's `mode`.
    pub fn name(self) -> &'static str {
        match self {
            ServicesMode::Nftables => "nftables",
            ServicesMode::Iptables => "iptables",
            ServicesMode::Ipvs => "ipvs",
        }
    }
}

impl fmt::Display for ServicesMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that is no mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a mode of Services: use nftables, iptables or ipvs")]
pub struct UnknownMode(String);

impl FromStr for ServicesMode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<ServicesMode, UnknownMode> {
        let known = [ServicesMode::Nftables, ServicesMode::Iptables, ServicesMode::Ipvs];
        known.into_iter().find(|mode| mode.name() == text).ok_or_else(|| UnknownMode(text.to_owned()))
    }
}

/// The node agent's configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentConfig {
    /// The name of this node in the cluster; `hostnameOverride` where it is not given.
    #[serde(default = "unnamed")]
    pub node: NodeName,
    /// Where the cluster's objects are read from; `clientConnection.kubeconfig` where it is not given.
    #[serde(default)]
    pub kubernetes: Option<KubernetesConfig>,
    /// How pods on other nodes are reached.
    #[serde(default = "default_fabric")]
    pub fabric: FabricMode,
    /// How Services are programmed; [`AgentConfig::services_mode`] says what it comes to.
    pub services: Option<ServicesMode>,
    /// A `KubeProxyConfiguration` file, as kube-proxy reads it. A relative path begins where this file is.
    pub kube_proxy_configuration: Option<PathBuf>,
    /// Fields of a `KubeProxyConfiguration`, which are right where that file says otherwise.
    #[serde(default)]
    pub proxy: serde_json::Value,
    /// The same as `vxlan.vni`.
    pub vni: Option<u32>,
    /// The same as `vxlan.port`.
    pub vxlan_port: Option<u16>,
    /// What is set for the fabric `vxlan`, also where another one falls back to it.
    #[serde(default)]
    pub vxlan: VxlanConfig,
    /// What is set for the fabric `ipip`.
    #[serde(default)]
    pub ipip: IpipConfig,
    /// What is set for the fabric `host-gw`.
    #[serde(default, alias = "host-gw")]
    pub host_gw: HostGwConfig,
    /// The prefixes that hold all pods of the cluster, at most one per family; `clusterCIDR` where they are not
    /// given.
    #[serde(default)]
    pub cluster_prefixes: Vec<IpNet>,
    /// The prefixes that hold all ClusterIPs.
    #[serde(default)]
    pub service_prefixes: Vec<IpNet>,
    /// Whether pods leave the cluster with the node's address.
    #[serde(default = "default_masquerade")]
    pub masquerade: bool,
    /// The link that leads to the other nodes; by default the one that holds the node's address.
    pub underlay_interface: Option<String>,
    /// The bridge that joins the node's pods.
    #[serde(default = "default_bridge")]
    pub bridge: String,
    /// What must outlive the process: the records of pod interfaces.
    #[serde(default = "default_state_directory")]
    pub state_directory: PathBuf,
    /// The sockets `agent.sock` (administration) and `cni.sock` (for the CNI plugin).
    #[serde(default = "default_runtime_directory")]
    pub runtime_directory: PathBuf,
    /// Where metrics and health are served over HTTP; not at all by default.
    pub metrics_address: Option<SocketAddr>,
    /// What `kubeProxyConfiguration` and `proxy` come to.
    #[serde(skip)]
    pub proxy_options: ProxyOptions,
}

fn unnamed() -> NodeName {
    NodeName::from("")
}

fn default_fabric() -> FabricMode {
    FabricMode::Vxlan
}

fn default_masquerade() -> bool {
    true
}

fn default_bridge() -> String {
    "cni0".into()
}

fn default_state_directory() -> PathBuf {
    "/var/lib/portolan".into()
}

fn default_runtime_directory() -> PathBuf {
    "/run/portolan".into()
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("the configuration {path} does not parse: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A field has a value that cannot be used.
    #[error("the configuration {path}: {field}: {reason}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong and what to do.
        reason: String,
    },
}

/// Reads a YAML file of a role's configuration.
pub fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
    serde_saphyr::from_str(&text)
        .map_err(|error| ConfigError::Parse { path: path.to_path_buf(), reason: error.to_string() })
}

impl AgentConfig {
    /// Reads and checks a configuration file, and the `KubeProxyConfiguration` that it names.
    pub fn load(path: &Path) -> Result<AgentConfig, ConfigError> {
        let mut config: AgentConfig = read(path)?;
        config.read_proxy_options(path)?;
        config.check(path)?;
        Ok(config)
    }

    /// How Services are served.
    pub fn proxy_settings(&self) -> ProxySettings {
        self.proxy_options.settings.clone()
    }

    /// What only the IPVS mode is told.
    pub fn ipvs_settings(&self) -> IpvsSettings {
        self.proxy_options.ipvs.clone()
    }

    /// How Services are programmed.
    pub fn services_mode(&self) -> ServicesMode {
        self.services.or(self.proxy_options.mode).unwrap_or(ServicesMode::Nftables)
    }

    /// How to reach the cluster's API.
    pub fn connection(&self) -> portolan_source::Connection {
        self.kubernetes.as_ref().map_or(portolan_source::Connection::InCluster, KubernetesConfig::connection)
    }

    /// Reads what kube-proxy would read, and fills in what this file leaves to it.
    fn read_proxy_options(&mut self, path: &Path) -> Result<(), ConfigError> {
        let mut document = match &self.kube_proxy_configuration {
            Some(file) => Document::load(&path.parent().unwrap_or(Path::new("")).join(file), path)?,
            None => Document::empty(path),
        };
        if !self.proxy.is_null() && !self.proxy.is_object() {
            let reason = "it is not a mapping: give fields of a KubeProxyConfiguration".to_owned();
            return Err(ConfigError::Field { path: path.to_path_buf(), field: "proxy".to_owned(), reason });
        }
        document.overlay(&self.proxy);
        let mut options = ProxyOptions::of(document, self.services)?;
        let own = "the agent's own file says otherwise";
        match &options.hostname_override {
            Some(name) if self.node.as_str().is_empty() => self.node = name.clone(),
            Some(name) if *name != self.node => {
                let reason = format!("{own}: node is {}", self.node);
                options.notes.push(Note::new("hostnameOverride", reason, "let both say the same"));
            }
            _ => {}
        }
        if self.cluster_prefixes.is_empty() {
            self.cluster_prefixes.clone_from(&options.cluster_prefixes);
        } else if !options.cluster_prefixes.is_empty() && options.cluster_prefixes != self.cluster_prefixes {
            let reason = format!("{own}: clusterPrefixes");
            options.notes.push(Note::new("clusterCIDR", reason, "let both say the same"));
        }
        match (&options.kubeconfig, &self.kubernetes) {
            (Some(kubeconfig), None) => {
                self.kubernetes = Some(KubernetesConfig { socket: None, kubeconfig: Some(kubeconfig.clone()) });
            }
            (Some(kubeconfig), Some(own_way)) if own_way.kubeconfig.as_ref() != Some(kubeconfig) => {
                let reason = format!("{own}: kubernetes");
                options.notes.push(Note::new("clientConnection.kubeconfig", reason, "let both say the same"));
            }
            _ => {}
        }
        self.proxy_options = options;
        Ok(())
    }

    /// What is set for each of the fabric's modes.
    ///
    /// # Errors
    ///
    /// The first field that cannot be used.
    pub fn fabric_settings(&self) -> Result<FabricSettings, FabricConfigError> {
        fabric_config::settings(&self.vxlan, &self.ipip, &self.host_gw, self.vni, self.vxlan_port)
    }

    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let wrong = |field: &str, reason: String| ConfigError::Field {
            path: path.to_path_buf(),
            field: field.to_owned(),
            reason,
        };
        if self.node.as_str().is_empty() {
            return Err(wrong("node", "it is not given: give this node's name in the cluster".into()));
        }
        if self.kubernetes.is_none() && self.kube_proxy_configuration.is_none() {
            return Err(wrong("kubernetes", "it is not given: give `{}`, or a kubeconfig, or a socket".into()));
        }
        self.fabric_settings().map_err(|FabricConfigError { field, reason }| wrong(field, reason))?;
        for (field, prefixes) in
            [("clusterPrefixes", &self.cluster_prefixes), ("servicePrefixes", &self.service_prefixes)]
        {
            for family in Family::ALL {
                let count = prefixes.iter().filter(|prefix| Family::of_prefix(prefix) == family).count();
                if count > 1 {
                    return Err(wrong(field, format!("{count} {family} prefixes: give at most one of each family")));
                }
            }
        }
        if self.cluster_prefixes.is_empty() {
            return Err(wrong("clusterPrefixes", "empty: give the prefix that holds all pods (--cluster-cidr)".into()));
        }
        for pods in &self.cluster_prefixes {
            for services in &self.service_prefixes {
                if pods.contains(services) || services.contains(pods) {
                    return Err(wrong("servicePrefixes", format!("{services} overlaps the pods' {pods}")));
                }
            }
        }
        // The kernel holds interface names in 16 bytes with their end (IFNAMSIZ).
        if self.bridge.is_empty() || self.bridge.len() > 15 {
            return Err(wrong("bridge", format!("`{}` is not a link name: use 1 to 15 characters", self.bridge)));
        }
        Ok(())
    }
}

/// The configuration file of the `dns` role.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DnsRoleConfig {
    /// Where the cluster's objects are read from; without it only `server` answers.
    pub kubernetes: Option<KubernetesConfig>,
    /// The server itself.
    pub server: portolan_dns::Config,
    /// Where metrics and health are served over HTTP; not at all by default.
    pub metrics_address: Option<SocketAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<AgentConfig, String> {
        let config: AgentConfig = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        config.check(Path::new("agent.yaml")).map_err(|error| error.to_string())?;
        Ok(config)
    }

    const SMALL: &str = "node: node-1\nkubernetes: {socket: /run/api.sock}\nclusterPrefixes: [10.42.0.0/16]\n";

    #[test]
    fn what_is_not_said_has_flannels_defaults() {
        let config = parse(SMALL).unwrap();
        assert_eq!(config.fabric, FabricMode::Vxlan);
        let vxlan = config.fabric_settings().unwrap().vxlan;
        assert_eq!((vxlan.vni.get(), vxlan.port, vxlan.direct_routing, vxlan.mtu), (1, 8472, false, None));
        assert_eq!(config.bridge, "cni0");
    }

    #[test]
    fn a_kube_proxy_configuration_fills_in_what_is_not_said() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        let fields = "mode: ipvs\nhostnameOverride: node-7\nclusterCIDR: 10.244.0.0/16\n\
                      clientConnection: {kubeconfig: /etc/kubeconfig}\n";
        write("config.conf", &format!("{head}{fields}"));
        let load = |text: &str| {
            write("agent.yaml", text);
            AgentConfig::load(&directory.path().join("agent.yaml")).unwrap()
        };
        let config = load("kubeProxyConfiguration: config.conf\n");
        assert_eq!((config.node.as_str(), config.services_mode()), ("node-7", ServicesMode::Ipvs));
        assert_eq!(config.cluster_prefixes, ["10.244.0.0/16".parse::<IpNet>().unwrap()]);
        assert_eq!(config.kubernetes.unwrap().kubeconfig, Some("/etc/kubeconfig".into()));
        assert_eq!(config.proxy_options.notes, []);
        let config = load(&format!("{SMALL}services: nftables\nkubeProxyConfiguration: config.conf\n"));
        assert_eq!((config.node.as_str(), config.services_mode()), ("node-1", ServicesMode::Nftables));
        let fields: Vec<String> = config.proxy_options.notes.into_iter().map(|note| note.field).collect();
        assert_eq!(fields, ["hostnameOverride", "clusterCIDR", "clientConnection.kubeconfig"]);
    }

    #[test]
    fn each_fabric_has_a_section_of_its_own() {
        let settings = |extra: &str| parse(&format!("{SMALL}{extra}")).unwrap().fabric_settings().unwrap();
        let fields = "{vni: 7, port: 4789, gbp: true, learning: true, directRouting: true, mtu: 9000}";
        let vxlan = settings(&format!("vxlan: {fields}\n")).vxlan;
        assert_eq!((vxlan.vni.get(), vxlan.port, vxlan.mtu), (7, 4789, Some(9000)));
        assert!(vxlan.gbp && vxlan.learning && vxlan.direct_routing);
        let flannels = "{VNI: 7, Port: 4789, GBP: true, Learning: true, DirectRouting: true, MTU: 9000}";
        assert_eq!(settings(&format!("vxlan: {flannels}\n")).vxlan, vxlan);
        let by_old_keys = settings("vni: 7\nvxlanPort: 4789\nvxlan: {vni: 7}\n").vxlan;
        assert_eq!((by_old_keys.vni, by_old_keys.port), (vxlan.vni, vxlan.port));
        assert!(settings("fabric: ipip\nipip: {directRouting: true}\n").ipip.direct_routing);
        let beyond = settings("fabric: host-gw\nhostGw: {beyond: ipip}\n").host_gw.beyond;
        assert_eq!(beyond, Some(portolan_intent::Encapsulation::Ipip));
    }

    #[test]
    fn errors_name_the_field() {
        for (extra, expected) in [
            ("vni: 16777216\n", "vni: 16777216 does not fit 24 bits"),
            ("vni: 1\nvxlan: {vni: 2}\n", "vni: 1, and the section vxlan says 2"),
            ("vxlan: {port: 0}\n", "vxlan.port: 0 is no port"),
            ("vxlan: {mtu: 100}\n", "vxlan.mtu: 100 is not between 1350 and 65535"),
            ("vxlan: {macPrefix: 0E-2A}\n", "macPrefix"),
            ("hostGw: {beyond: bgp}\n", "bgp"),
            ("fabric: geneve\n", "geneve"),
            ("servicePrefixes: [10.42.96.0/24]\n", "servicePrefixes: 10.42.96.0/24 overlaps the pods' 10.42.0.0/16"),
            ("bridge: a-name-that-is-too-long\n", "bridge: `a-name-that-is-too-long` is not a link name"),
            ("fabrik: vxlan\n", "fabrik"),
            ("services: userspace\n", "userspace"),
        ] {
            let error = parse(&format!("{SMALL}{extra}")).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let error = parse("node: a\nkubernetes: {}\nclusterPrefixes: [10.0.0.0/8, 10.1.0.0/16]\n").unwrap_err();
        assert!(error.contains("2 IPv4 prefixes"), "{error}");
    }
}
