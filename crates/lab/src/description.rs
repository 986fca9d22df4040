//! What a lab is: the file `lab.json`, written before anything of the lab is made.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use ipnet::IpNet;
use portolan_apiserver::StoreLocation;
use portolan_net::Family;
use serde::{Deserialize, Serialize};

use crate::topology::{Topology, overlap};
use crate::{LabError, Layout, Result};

/// The domain of the cluster's names.
pub const CLUSTER_DOMAIN: &str = "cluster.local";

/// Which families the cluster has; the first is the primary one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpFamilies {
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// Both, IPv4 first.
    Dual,
}

impl IpFamilies {
    /// The families, in order.
    pub fn list(self) -> &'static [Family] {
        match self {
            IpFamilies::Ipv4 => &[Family::V4],
            IpFamilies::Ipv6 => &[Family::V6],
            IpFamilies::Dual => &[Family::V4, Family::V6],
        }
    }

    /// Whether a family is one of them.
    pub fn has(self, family: Family) -> bool {
        self.list().contains(&family)
    }
}

/// Everything that has to be known to run a lab, or to remove one whose supervisor is gone.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Description {
    /// The lab's name.
    pub name: String,
    /// The binary that runs agents, pods and DNS servers.
    pub program: PathBuf,
    /// Nodes, clients and the network between them.
    pub topology: Topology,
    /// How pods reach pods on other nodes.
    pub fabric: String,
    /// What is set for the fabric's modes, as the sections of an agent's configuration.
    #[serde(default)]
    pub fabric_options: serde_json::Map<String, serde_json::Value>,
    /// How Services are proxied.
    pub services: String,
    /// The cluster's families.
    pub ip_families: IpFamilies,
    /// Where pod addresses come from, at most one prefix per family.
    pub cluster_prefixes: Vec<IpNet>,
    /// Where ClusterIPs come from, at most one prefix per family.
    pub service_prefixes: Vec<IpNet>,
    /// The lengths of the nodes' parts of the cluster prefixes, in their order.
    pub node_prefix_lengths: Vec<u8>,
    /// An API server that is there already; the lab's own one if none.
    pub api_socket: Option<PathBuf>,
    /// The etcd that the lab's own API server uses, as `etcd=URL`; memory if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
}

impl Description {
    /// A lab with the usual prefixes.
    pub fn new(
        name: &str,
        program: PathBuf,
        topology: Topology,
        fabric: &str,
        services: &str,
        families: IpFamilies,
    ) -> Result<Description> {
        let both = |v4: &str, v6: &str| -> anyhow::Result<Vec<IpNet>> {
            families
                .list()
                .iter()
                .map(|family| match family {
                    Family::V4 => v4.parse().context("an IPv4 prefix"),
                    Family::V6 => v6.parse().context("an IPv6 prefix"),
                })
                .collect()
        };
        Ok(Description {
            name: name.to_owned(),
            program,
            topology: topology.of_families(families),
            fabric: fabric.to_owned(),
            fabric_options: serde_json::Map::new(),
            services: services.to_owned(),
            ip_families: families,
            cluster_prefixes: both("10.42.0.0/16", "fd00:42::/56")?,
            service_prefixes: both("10.96.0.0/16", "fd00:96::/112")?,
            node_prefix_lengths: families
                .list()
                .iter()
                .map(|family| match family {
                    Family::V4 => 24,
                    Family::V6 => 64,
                })
                .collect(),
            api_socket: None,
            store: None,
        })
    }

    /// Checks that nodes, pods and Services have addresses of their own.
    ///
    /// # Errors
    /// With the segment and the prefix that share an address.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let ranges = [("pods", &self.cluster_prefixes), ("Services", &self.service_prefixes)];
        for pool in &self.topology.load_balancers {
            for (whose, ranges) in ranges {
                if let Some(range) = ranges.iter().find(|range| overlap(range, pool)) {
                    return Err(format!("loadBalancers: {pool} overlaps with {range}, the range of {whose}"));
                }
            }
        }
        for segment in &self.topology.segments {
            for prefix in &segment.router {
                for (whose, ranges) in ranges {
                    if let Some(range) = ranges.iter().find(|range| overlap(range, prefix)) {
                        let name = &segment.name;
                        return Err(format!(
                            "segment `{name}`: router {prefix} overlaps with {range}, the range of {whose}"
                        ));
                    }
                }
            }
        }
        self.topology.check()
    }

    /// The addresses of the cluster's DNS Service: the tenth of each Service prefix.
    pub fn dns_addresses(&self) -> Vec<IpAddr> {
        self.service_prefixes
            .iter()
            .map(|prefix| match prefix.network() {
                IpAddr::V4(first) => IpAddr::V4((u32::from(first) + 10).into()),
                IpAddr::V6(first) => IpAddr::V6((u128::from(first) + 10).into()),
            })
            .collect()
    }

    /// The socket on which the API is served.
    pub fn api(&self, layout: &Layout) -> PathBuf {
        self.api_socket.clone().unwrap_or_else(|| layout.api_socket())
    }

    /// Where the lab's own API server keeps its objects. In an etcd it is a place that is this lab's alone.
    pub(crate) fn store_location(&self) -> anyhow::Result<StoreLocation> {
        let Some(store) = &self.store else { return Ok(StoreLocation::Embedded) };
        let mut location: StoreLocation = store.parse()?;
        if let StoreLocation::Etcd(config) = &mut location {
            config.prefix = format!("{}/lab/{}", config.prefix, self.name);
        }
        Ok(location)
    }

    /// Writes the file.
    pub fn save(&self, layout: &Layout) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).context("writing a lab's description")?;
        std::fs::write(layout.description(), text)
            .with_context(|| format!("writing {}", layout.description().display()))?;
        Ok(())
    }

    /// Reads the file.
    ///
    /// # Errors
    /// If there is no such lab.
    pub fn load(layout: &Layout) -> Result<Description> {
        let text = match std::fs::read(layout.description()) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(no_such_lab(layout)),
            Err(error) => return Err(unreadable(layout, &error)),
        };
        serde_json::from_slice(&text).map_err(|error| {
            LabError::environment(
                format!("{} cannot be read: {error}", layout.description().display()),
                format!("take the lab down: `portolan lab down --name {}`", layout.name()),
            )
        })
    }
}

/// The error for a lab that this user may not look at.
pub(crate) fn unreadable(layout: &Layout, error: &std::io::Error) -> LabError {
    LabError::environment(
        format!("{} cannot be read: {error}", layout.description().display()),
        "run the command as the user who brought the lab up, which is root",
    )
}

/// The error for a name that is no lab's, with the names that are.
pub(crate) fn no_such_lab(layout: &Layout) -> LabError {
    let others = Layout::existing();
    let hint = if others.is_empty() {
        "bring one up with `portolan lab up -f MANIFEST --wait`".to_owned()
    } else {
        format!("labs that are up: {}; choose one with --name", others.join(", "))
    };
    LabError::negative(format!("there is no lab `{}`", layout.name()), hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dns_service_has_the_tenth_address_of_each_prefix() {
        let lab =
            Description::new("x", "p".into(), Topology::standard(3), "vxlan", "nftables", IpFamilies::Dual).unwrap();
        let addresses: Vec<String> = lab.dns_addresses().iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.96.0.10", "fd00:96::a"]);
    }

    #[test]
    fn a_lab_in_an_etcd_has_a_place_of_its_own() {
        let mut lab =
            Description::new("x", "p".into(), Topology::standard(1), "vxlan", "nftables", IpFamilies::Ipv4).unwrap();
        assert_eq!(lab.store_location().unwrap(), StoreLocation::Embedded);
        for (store, prefix) in [("etcd=http://h", "/portolan/lab/x"), ("etcd=http://h/mine", "/mine/lab/x")] {
            lab.store = Some(store.to_owned());
            let StoreLocation::Etcd(config) = lab.store_location().unwrap() else { panic!("{store} is embedded") };
            assert_eq!(config.prefix, prefix);
        }
        lab.store = Some("etcd=h".to_owned());
        assert!(lab.store_location().is_err());
    }

    #[test]
    fn a_segment_may_not_have_the_addresses_of_pods_or_services() {
        let lab = |router: &str| {
            let mut topology = Topology::standard(1);
            topology.segments[1].router[0] = router.parse().unwrap();
            let lab = Description::new("x", "p".into(), topology, "vxlan", "nftables", IpFamilies::Ipv4).unwrap();
            lab.check().unwrap_err()
        };
        assert_eq!(
            lab("10.42.7.1/24"),
            "segment `outside`: router 10.42.7.1/24 overlaps with 10.42.0.0/16, the range of pods"
        );
        assert!(lab("10.0.0.1/8").contains("overlaps with"));
        assert!(lab("10.96.0.1/24").ends_with("the range of Services"));
        let mut topology = Topology::standard(1);
        topology.load_balancers[0] = "10.42.0.0/24".parse().unwrap();
        let lab = Description::new("x", "p".into(), topology, "vxlan", "nftables", IpFamilies::Ipv4).unwrap();
        assert_eq!(
            lab.check().unwrap_err(),
            "loadBalancers: 10.42.0.0/24 overlaps with 10.42.0.0/16, the range of pods"
        );
    }

    #[test]
    fn a_lab_of_one_family_has_no_address_of_the_other() {
        let lab =
            Description::new("x", "p".into(), Topology::standard(2), "vxlan", "nftables", IpFamilies::Ipv6).unwrap();
        assert!(lab.topology.members().all(|member| member.addresses.iter().all(IpAddr::is_ipv6)));
        assert_eq!(lab.node_prefix_lengths, [64]);
    }
}
