//! What the server is told at start.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;
use portolan_store::{EtcdConfig, StoreError};

use crate::admission::{NodePrefixLengths, overlaps};
use crate::error::Error;

/// What the keys of a cluster begin with in an etcd, when the configuration names no prefix: others keep
/// theirs there too, and kube-apiserver's begin with `/registry`.
pub const ETCD_PREFIX: &str = "/portolan";

/// Where the objects are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum StoreLocation {
    /// In a file of the data directory, for this server alone.
    #[default]
    Embedded,
    /// In an etcd, which several servers may share.
    Etcd(EtcdConfig),
}

impl FromStr for StoreLocation {
    type Err = StoreError;

    /// Reads `embedded` or `etcd=URL[,URL…]`.
    fn from_str(text: &str) -> Result<Self, StoreError> {
        if text == "embedded" {
            return Ok(Self::Embedded);
        }
        if !text.starts_with("etcd=") {
            // It may be a URL with a password in it.
            let what = if text.contains('@') { "this".to_owned() } else { format!("{text:?}") };
            let reason = format!("{what} is no store: use embedded or etcd=URL");
            return Err(StoreError::Configuration { reason });
        }
        let mut config: EtcdConfig = text.parse()?;
        if config.prefix.is_empty() {
            ETCD_PREFIX.clone_into(&mut config.prefix);
        }
        Ok(Self::Etcd(config))
    }
}

/// How to run the server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the embedded store, the certificates and the kubeconfig live. Made when missing.
    pub data_directory: PathBuf,
    /// Where the objects are kept.
    pub store: StoreLocation,
    /// The Unix socket, for this machine's own programs; only its owner may connect.
    pub unix_socket: PathBuf,
    /// The loopback address that TLS listens on.
    pub loopback_address: IpAddr,
    /// The port there; 0 takes any that is free.
    pub loopback_port: u16,
    /// The bearer token for it. `None` makes one, which the kubeconfig carries and which is kept.
    pub token: Option<String>,
    /// The ranges of ClusterIPs; the family of the first is the default one.
    pub service_prefixes: Vec<IpNet>,
    /// The ports that NodePort Services may take.
    pub node_port_range: RangeInclusive<u16>,
    /// The ranges of pod addresses; nodes get parts of them.
    pub cluster_prefixes: Vec<IpNet>,
    /// How long the nodes' parts are.
    pub node_prefix_lengths: NodePrefixLengths,
    /// How many writes back a watch can resume, in an embedded store.
    pub history_revisions: u64,
}

impl Config {
    /// Kubernetes' usual ranges, IPv4 only, everything below one directory.
    pub fn new(data_directory: impl Into<PathBuf>) -> Self {
        let data_directory = data_directory.into();
        Self {
            unix_socket: data_directory.join("api.sock"),
            data_directory,
            store: StoreLocation::default(),
            loopback_address: IpAddr::from([127, 0, 0, 1]),
            loopback_port: 0,
            token: None,
            service_prefixes: vec![IpNet::new_assert(IpAddr::from([10, 96, 0, 0]), 16)],
            node_port_range: 30_000..=32_767,
            cluster_prefixes: vec![IpNet::new_assert(IpAddr::from([10, 42, 0, 0]), 16)],
            node_prefix_lengths: NodePrefixLengths::default(),
            history_revisions: portolan_store::limits::HISTORY_REVISIONS_MAX,
        }
    }

    /// Looks whether the ranges fit together.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let refused = |field, reason| Err(Error::Config { field, reason });
        if self.token.as_deref().is_some_and(|token| token.trim().is_empty()) {
            return refused(
                "token",
                "it is empty, and so would let everybody in; leave it out to have one made".to_owned(),
            );
        }
        if self.service_prefixes.is_empty() {
            return refused("service_prefixes", "there is none; give one, such as 10.96.0.0/16".to_owned());
        }
        for (field, prefixes) in
            [("service_prefixes", &self.service_prefixes), ("cluster_prefixes", &self.cluster_prefixes)]
        {
            let v4 = prefixes.iter().filter(|prefix| prefix.addr().is_ipv4()).count();
            if v4 > 1 || prefixes.len() - v4 > 1 {
                return refused(field, format!("{prefixes:?} has two of one family; give one of each at most"));
            }
        }
        for cluster in &self.cluster_prefixes {
            if let Some(service) = self.service_prefixes.iter().find(|service| overlaps(service, cluster)) {
                let reason = format!("{cluster} overlaps with {service}, the range of Services; choose another");
                return refused("cluster_prefixes", reason);
            }
            let length = self.node_prefix_lengths.of(cluster);
            if length > cluster.max_prefix_len() || length < cluster.prefix_len() {
                let reason = format!("nodes cannot have parts of /{length} of {cluster}; choose a length between");
                return refused("node_prefix_lengths", reason);
            }
        }
        Ok(())
    }

    /// The kubeconfig that the server writes.
    pub fn kubeconfig_path(&self) -> PathBuf {
        self.data_directory.join("kubeconfig")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_embedded_or_an_etcd_with_a_prefix() {
        assert_eq!("embedded".parse::<StoreLocation>().unwrap(), StoreLocation::Embedded);
        let prefix = |text: &str| match text.parse::<StoreLocation>().unwrap() {
            StoreLocation::Etcd(config) => config.prefix,
            StoreLocation::Embedded => panic!("{text} is embedded"),
        };
        assert_eq!(prefix("etcd=http://127.0.0.1:2379"), "/portolan");
        assert_eq!(prefix("etcd=http://127.0.0.1:2379/mine"), "/mine");
        assert!("http://127.0.0.1".parse::<StoreLocation>().unwrap_err().to_string().contains("use embedded or etcd"));
    }

    #[test]
    fn ranges_that_do_not_fit_together_are_named() {
        let refused = |change: fn(&mut Config)| {
            let mut config = Config::new("/nowhere");
            assert!(config.check().is_ok());
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        let prefix = |text: &str| -> IpNet { text.parse().unwrap() };
        assert_eq!(prefix("10.0.0.0/8").max_prefix_len(), 32);
        assert_eq!(
            refused(|it| it.cluster_prefixes = vec!["10.96.4.0/22".parse().unwrap()]),
            "cluster_prefixes: 10.96.4.0/22 overlaps with 10.96.0.0/16, the range of Services; choose another"
        );
        assert!(refused(|it| it.token = Some(String::new())).starts_with("token: it is empty"));
        assert!(refused(|it| it.service_prefixes.clear()).starts_with("service_prefixes: there is none"));
        assert!(
            refused(|it| it.cluster_prefixes.push("10.43.0.0/16".parse().unwrap())).contains("has two of one family")
        );
        assert!(refused(|it| it.node_prefix_lengths.ipv4 = 33).starts_with("node_prefix_lengths: "));
        assert!(refused(|it| it.node_prefix_lengths.ipv4 = 15).starts_with("node_prefix_lengths: "));
    }
}
