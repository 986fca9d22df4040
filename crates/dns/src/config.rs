//! The configuration, and what it says once it is checked.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use portolan_intent::names::{DomainName, InvalidDomainName, PodNames, reverse_name};
use serde::{Deserialize, Serialize};

use crate::limits::{TTL_MAX, UPSTREAMS_MAX};

/// What the user writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// The cluster's domain.
    pub zone: String,
    /// Addresses to answer on, each over UDP and TCP.
    pub listen: Vec<SocketAddr>,
    /// Servers to ask for names outside the zone, in this order. Empty: such names are refused.
    pub forward: Vec<SocketAddr>,
    /// Names with fixed addresses, as in `/etc/hosts`.
    pub hosts: Vec<(String, IpAddr)>,
    /// The time to live of the cluster's records, in seconds.
    pub ttl: u32,
    /// Which names of pods exist.
    pub pods: PodNames,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            zone: "cluster.local".to_owned(),
            // On Linux this one socket serves both families (`net.ipv6.bindv6only` is 0).
            listen: vec![SocketAddr::from(([0u16; 8], 53))],
            forward: Vec::new(),
            hosts: Vec::new(),
            ttl: 5,
            pods: PodNames::default(),
        }
    }
}

/// A configuration that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A name is no domain name.
    #[error("`{field}`: `{value}` is no domain name: {reason}")]
    Name {
        /// The field.
        field: &'static str,
        /// What was given.
        value: String,
        /// Why.
        reason: InvalidDomainName,
    },
    /// The zone is the root.
    #[error("`zone` is the root of all names: give the cluster's domain, such as cluster.local")]
    RootZone,
    /// A number is too large.
    #[error("`ttl` is {0} s: use 0 to {TTL_MAX}")]
    TimeToLive(u32),
    /// No address to listen on.
    #[error("`listen` is empty: give at least one address, such as 0.0.0.0:53")]
    NowhereToListen,
    /// Too many upstreams.
    #[error("`forward` has {0} servers: use at most {UPSTREAMS_MAX}")]
    TooManyUpstreams(usize),
    /// Queries would come back for ever.
    #[error(
        "`forward` names {0}, where this server itself listens, so that queries would go in a circle: name the servers of the site (often those of the host's /etc/resolv.conf)"
    )]
    Loop(SocketAddr),
}

/// The configuration, checked.
#[derive(Debug, Clone)]
pub struct Settings {
    pub(crate) zone: DomainName,
    pub(crate) pods: PodNames,
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) upstreams: Vec<SocketAddr>,
    pub(crate) hosts: BTreeMap<DomainName, Vec<IpAddr>>,
    pub(crate) hosts_reverse: BTreeMap<DomainName, Vec<DomainName>>,
    pub(crate) ttl: u32,
}

impl TryFrom<Config> for Settings {
    type Error = ConfigError;

    fn try_from(config: Config) -> Result<Settings, ConfigError> {
        let zone = parse("zone", &config.zone)?;
        if zone.is_root() {
            return Err(ConfigError::RootZone);
        }
        if config.ttl > TTL_MAX {
            return Err(ConfigError::TimeToLive(config.ttl));
        }
        if config.listen.is_empty() {
            return Err(ConfigError::NowhereToListen);
        }
        if config.forward.len() > UPSTREAMS_MAX {
            return Err(ConfigError::TooManyUpstreams(config.forward.len()));
        }
        if let Some(own) =
            config.forward.iter().find(|upstream| config.listen.iter().any(|it| reaches(**upstream, *it)))
        {
            return Err(ConfigError::Loop(*own));
        }
        let mut hosts: BTreeMap<DomainName, Vec<IpAddr>> = BTreeMap::new();
        let mut hosts_reverse: BTreeMap<DomainName, Vec<DomainName>> = BTreeMap::new();
        for (host, address) in &config.hosts {
            let name = parse("hosts", host)?;
            hosts_reverse.entry(reverse_name(*address)).or_default().push(name.clone());
            hosts.entry(name).or_default().push(*address);
        }
        Ok(Settings {
            zone,
            pods: config.pods,
            listen: config.listen,
            upstreams: config.forward,
            hosts,
            hosts_reverse,
            ttl: config.ttl,
        })
    }
}

/// Whether what is sent to `upstream` arrives at a socket bound to `listen`, as far as addresses
/// alone can tell: a wildcard socket has the loopback addresses at least.
fn reaches(upstream: SocketAddr, listen: SocketAddr) -> bool {
    let (to, at) = (upstream.ip().to_canonical(), listen.ip());
    let here = to == at || (at.is_unspecified() && (to.is_loopback() || to.is_unspecified()));
    upstream.port() == listen.port() && listen.port() != 0 && here
}

fn parse(field: &'static str, value: &str) -> Result<DomainName, ConfigError> {
    value.parse().map_err(|reason| ConfigError::Name { field, value: value.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut Config)) -> Result<Settings, ConfigError> {
        let mut config = Config::default();
        change(&mut config);
        Settings::try_from(config)
    }

    #[test]
    fn the_default_works() {
        let settings = check(|_| ()).expect("the default");
        assert_eq!(settings.zone.to_string(), "cluster.local.");
        assert_eq!(settings.ttl, 5);
    }

    #[test]
    fn a_circle_is_refused() {
        for own in ["127.0.0.1:53", "[::1]:53", "0.0.0.0:53"] {
            let error = check(|config| config.forward = vec![own.parse().unwrap()]).unwrap_err();
            assert_eq!(error, ConfigError::Loop(own.parse().unwrap()));
        }
        assert!(check(|config| config.forward = vec!["127.0.0.1:5353".parse().unwrap()]).is_ok());
        assert!(check(|config| config.forward = vec!["192.0.2.1:53".parse().unwrap()]).is_ok());
    }

    #[test]
    fn a_wrong_value_is_named() {
        let error = check(|config| config.zone = "a..b".to_owned()).unwrap_err();
        assert!(error.to_string().starts_with("`zone`: `a..b` is no domain name"), "{error}");
        assert_eq!(check(|config| config.zone = ".".to_owned()).unwrap_err(), ConfigError::RootZone);
        assert_eq!(check(|config| config.ttl = 3601).unwrap_err(), ConfigError::TimeToLive(3601));
        assert_eq!(check(|config| config.listen.clear()).unwrap_err(), ConfigError::NowhereToListen);
    }
}
