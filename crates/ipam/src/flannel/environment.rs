//! `subnet.env`: what the `flannel` CNI plugin reads, and where a node finds its previous subnet.
//!
//! ```text
//! FLANNEL_NETWORK=10.5.0.0/16
//! FLANNEL_SUBNET=10.5.34.1/24          the first address: that of the node's bridge
//! FLANNEL_IPV6_NETWORK=fd00:5::/48
//! FLANNEL_IPV6_SUBNET=fd00:5:0:34::1/64
//! FLANNEL_MTU=1450
//! FLANNEL_IPMASQ=true
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use portolan_net::Family;

use super::key::Subnet;

/// The content of `subnet.env`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// `FLANNEL_NETWORK` and `FLANNEL_SUBNET`.
    pub v4: Option<EnvironmentNetwork>,
    /// `FLANNEL_IPV6_NETWORK` and `FLANNEL_IPV6_SUBNET`.
    pub v6: Option<EnvironmentNetwork>,
    /// `FLANNEL_MTU`: that of pods.
    pub mtu: u32,
    /// `FLANNEL_IPMASQ`: whether the daemon masquerades, so that the plugin need not.
    pub masquerade: bool,
}

/// One family's part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvironmentNetwork {
    /// The network; several, separated by commas, where a cluster has several.
    pub networks: Vec<IpNet>,
    /// The node's subnet, without host bits.
    pub subnet: IpNet,
}

/// Why a file is not a `subnet.env`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvironmentError {
    /// A line is not of the form `NAME=VALUE`.
    #[error("line {line} of subnet.env is not of the form NAME=VALUE")]
    NotAnAssignment {
        /// The line's number, from 1.
        line: usize,
    },
    /// A value does not have the form.
    #[error("{name} of subnet.env is `{found}`: it must be {wanted}")]
    Value {
        /// The variable.
        name: &'static str,
        /// The value.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A variable is missing.
    #[error("{name} is missing in subnet.env: was the file written completely? restart the agent to write it anew")]
    Missing {
        /// The variable.
        name: &'static str,
    },
}

const NAMES_V4: [&str; 2] = ["FLANNEL_NETWORK", "FLANNEL_SUBNET"];
const NAMES_V6: [&str; 2] = ["FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"];
const MTU: &str = "FLANNEL_MTU";
const MASQUERADE: &str = "FLANNEL_IPMASQ";

impl Environment {
    /// Reads a file. Variables that are not Flannel's, comments and empty lines are passed over.
    pub fn parse(text: &str) -> Result<Environment, EnvironmentError> {
        let mut variables = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let line = line.strip_prefix("export ").unwrap_or(line);
            let assignment = line.split_once('=');
            let (name, value) = assignment.ok_or(EnvironmentError::NotAnAssignment { line: index + 1 })?;
            variables.push((name.trim(), value.trim().trim_matches('"')));
        }
        // Of several the last counts, as in a shell.
        let find = |name: &str| variables.iter().rev().find(|(it, _)| *it == name).map(|(_, value)| *value);
        let v4 = parse_network(Family::V4, NAMES_V4, find)?;
        let v6 = parse_network(Family::V6, NAMES_V6, find)?;
        if v4.is_none() && v6.is_none() {
            return Err(EnvironmentError::Missing { name: NAMES_V4[1] });
        }
        let mtu = find(MTU).ok_or(EnvironmentError::Missing { name: MTU })?;
        let mtu = mtu.parse().map_err(|_| wrong(MTU, mtu, "a number of bytes"))?;
        let masquerade = match find(MASQUERADE) {
            Some("true") => true,
            Some("false") | None => false,
            Some(other) => return Err(wrong(MASQUERADE, other, "true or false")),
        };
        Ok(Environment { v4, v6, mtu, masquerade })
    }

    /// The subnet that the node had.
    pub fn subnet(&self) -> Option<Subnet> {
        let prefixes: Vec<IpNet> = self.v4.iter().chain(&self.v6).map(|it| it.subnet).collect();
        Subnet::from_prefixes(&prefixes)
    }
}

fn parse_network<'text>(
    family: Family,
    [network_name, subnet_name]: [&'static str; 2],
    find: impl Fn(&str) -> Option<&'text str>,
) -> Result<Option<EnvironmentNetwork>, EnvironmentError> {
    let Some(subnet) = find(subnet_name).filter(|value| !value.is_empty()) else { return Ok(None) };
    let wanted = match family {
        Family::V4 => "an IPv4 prefix",
        Family::V6 => "an IPv6 prefix",
    };
    let parse = |name, text: &str| {
        let prefix = text.trim().parse::<IpNet>().ok().filter(|it| Family::of_prefix(it) == family);
        prefix.map(|it| it.trunc()).ok_or_else(|| wrong(name, text, wanted))
    };
    let networks = find(network_name).ok_or(EnvironmentError::Missing { name: network_name })?;
    let networks = networks.split(',').map(|text| parse(network_name, text)).collect::<Result<_, _>>()?;
    Ok(Some(EnvironmentNetwork { networks, subnet: parse(subnet_name, subnet)? }))
}

fn wrong(name: &'static str, found: &str, wanted: &'static str) -> EnvironmentError {
    EnvironmentError::Value { name, found: found.to_owned(), wanted }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (network, names) in [(&self.v4, NAMES_V4), (&self.v6, NAMES_V6)] {
            let Some(network) = network else { continue };
            let networks: Vec<String> = network.networks.iter().map(ToString::to_string).collect();
            let first = first_address(network.subnet.network());
            writeln!(f, "{}={}", names[0], networks.join(","))?;
            writeln!(f, "{}={first}/{}", names[1], network.subnet.prefix_len())?;
        }
        writeln!(f, "{MTU}={}", self.mtu)?;
        writeln!(f, "{MASQUERADE}={}", self.masquerade)
    }
}

fn first_address(base: IpAddr) -> IpAddr {
    match base {
        IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from(u32::from(v4).wrapping_add(1))),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6).wrapping_add(1))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn broken_files_say_where() {
        let error = |text: &str| Environment::parse(text).unwrap_err().to_string();
        assert!(error("").contains("FLANNEL_SUBNET is missing"));
        assert!(error("FLANNEL_SUBNET=10.5.34.1/24\n").contains("FLANNEL_NETWORK is missing"));
        assert!(error("hello\n").contains("line 1 "));
        let half = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\n";
        assert!(error(half).contains("FLANNEL_MTU is missing"));
        assert!(error(&format!("{half}FLANNEL_MTU=many\n")).contains("`many`"));
        assert!(error(&format!("{half}FLANNEL_MTU=1450\nFLANNEL_IPMASQ=yes\n")).contains("true or false"));
        assert!(error("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=fd00::1/64\n").contains("an IPv4 prefix"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(bits in any::<u32>(), low in any::<u128>(), length in 8u8..=30, mtu in 576u32..9000,
                                   families in 1u8..4, masquerade in any::<bool>()) {
            let v4 = IpNet::new(Ipv4Addr::from(bits).into(), length).unwrap().trunc();
            let v6 = IpNet::new(Ipv6Addr::from(low).into(), length + 64).unwrap().trunc();
            let part = |subnet: IpNet| EnvironmentNetwork { networks: vec![subnet], subnet };
            let environment = Environment {
                v4: (families & 1 != 0).then(|| part(v4)),
                v6: (families & 2 != 0).then(|| part(v6)),
                mtu,
                masquerade,
            };
            prop_assert_eq!(Environment::parse(&environment.to_string()), Ok(environment));
        }

        #[test]
        fn no_text_panics(text in "(FLANNEL_(SUBNET|NETWORK|MTU|IPMASQ)|=|[0-9a-f.:/,]|\n| ){0,60}") {
            let _ = Environment::parse(&text);
        }
    }
}
