//! What the server is told at start.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use ipnet::IpNet;

use crate::admission::NodePrefixLengths;

/// How to run the server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the store, the certificates and the kubeconfig live. Made when missing.
    pub data_directory: PathBuf,
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
    /// How many writes back a watch can resume.
    pub history_revisions: u64,
}

impl Config {
    /// Kubernetes' usual ranges, IPv4 only, everything below one directory.
    pub fn new(data_directory: impl Into<PathBuf>) -> Self {
        let data_directory = data_directory.into();
        Self {
            unix_socket: data_directory.join("api.sock"),
            data_directory,
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

    /// The kubeconfig that the server writes.
    pub fn kubeconfig_path(&self) -> PathBuf {
        self.data_directory.join("kubeconfig")
    }
}
