//! The network config: `<prefix>/config` in etcd, `net-conf.json` of kube-flannel.
//!
//! Names, defaults and checks are Flannel's (Documentation/configuration.md). What Flannel takes and
//! ignores, an unknown field, comes back as a note.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use portolan_net::Family;
use serde_json::Value;

use super::backend::{self, Backend};
use super::json::{Fields, WrongType};
use super::key::Subnet;

/// A network config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The IPv4 network; `None` where `EnableIPv4` is false.
    pub v4: Option<Pool>,
    /// The IPv6 network; `None` unless `EnableIPv6` is true.
    pub v6: Option<Pool>,
    /// `EnableNFTables`.
    pub enable_nftables: bool,
    /// `Backend`.
    pub backend: Backend,
}

/// The subnets of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// `Network`.
    pub network: IpNet,
    /// `SubnetLen`.
    pub subnet_length: u8,
    /// `SubnetMin`: the first subnet that is given out.
    pub first: IpNet,
    /// `SubnetMax`: the last one.
    pub last: IpNet,
}

/// A config and what is worth saying about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedConfig {
    /// The config.
    pub config: NetworkConfig,
    /// Fields that have no effect.
    pub notes: Vec<ConfigNote>,
}

/// Something in a config that has no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigNote {
    /// The field.
    pub field: String,
    /// What is to be said, to follow the field's name.
    pub text: String,
}

/// Where a config comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkSource {
    /// Subnets are leased from the config's pools, which must hold at least four.
    Leases,
    /// Subnets come from `spec.podCIDRs` of nodes; pools are not used, and their size is not checked.
    Kubernetes,
}

/// Why a config cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON.
    #[error("the network config is not JSON: {0}")]
    NotJson(String),
    /// JSON, but not an object.
    #[error("the network config is not a JSON object: write {{\"Network\": \"10.5.0.0/16\"}}")]
    NotAnObject,
    /// A field has the wrong type.
    #[error("{field} of the network config is {found}: it must be {wanted}")]
    WrongType {
        /// The field.
        field: String,
        /// What it should be.
        wanted: &'static str,
        /// What it is.
        found: String,
    },
    /// A number is out of its range.
    #[error("{field} of the network config is {found}: it must be {wanted}")]
    OutOfRange {
        /// The field.
        field: String,
        /// The number.
        found: i64,
        /// The range.
        wanted: &'static str,
    },
    /// Neither family is enabled.
    #[error("the network config enables no family: set EnableIPv4 or EnableIPv6 to true")]
    NoFamily,
    /// The network is missing.
    #[error("{field} is missing in the network config: set it to a prefix such as {example}, or {flag} to false")]
    NoNetwork {
        /// `Network` or `IPv6Network`.
        field: &'static str,
        /// What it could be.
        example: &'static str,
        /// What would make it unnecessary.
        flag: &'static str,
    },
    /// Text that is not a prefix or an address of the family.
    #[error("{field} of the network config, `{found}`, is not {wanted}")]
    NotAnAddress {
        /// The field.
        field: &'static str,
        /// The text.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// No room for four subnets: the first is not used, and one more would serve one node only.
    #[error("{field} {network} is too small for subnets of length {subnet_length}: it must hold at least four; {hint}")]
    TooSmall {
        /// `Network` or `IPv6Network`.
        field: &'static str,
        /// The network.
        network: IpNet,
        /// The subnets' length.
        subnet_length: u8,
        /// What to do.
        hint: String,
    },
    /// A subnet has no room for a node's bridge, tunnel and pods.
    #[error("{field} is {found}: a subnet that small has no room for pods; at most {longest} works")]
    TooLong {
        /// `SubnetLen` or `IPv6SubnetLen`.
        field: &'static str,
        /// The length.
        found: u8,
        /// The longest that works.
        longest: u8,
    },
    /// A bound of the pool is outside of the network.
    #[error("{field} {found} is not in the network {network}")]
    OutsideNetwork {
        /// The field.
        field: &'static str,
        /// The address.
        found: IpAddr,
        /// The network.
        network: IpNet,
    },
    /// A bound of the pool lies within a subnet.
    #[error("{field} {found} is not where a subnet of length {subnet_length} begins: the nearest is {nearest}")]
    NotAligned {
        /// The field.
        field: &'static str,
        /// The address.
        found: IpAddr,
        /// The subnets' length.
        subnet_length: u8,
        /// The beginning of the subnet that it is in.
        nearest: IpAddr,
    },
    /// The bounds are the wrong way round.
    #[error("{first_field} {first} is above {last_field} {last}: no subnet can be given out; swap them")]
    NothingBetween {
        /// `SubnetMin` or `IPv6SubnetMin`.
        first_field: &'static str,
        /// Its address.
        first: IpAddr,
        /// `SubnetMax` or `IPv6SubnetMax`.
        last_field: &'static str,
        /// Its address.
        last: IpAddr,
    },
    /// `Backend` without `Type`.
    #[error("Backend.Type is missing in the network config: use one of {known}")]
    NoBackendType {
        /// The names that exist.
        known: String,
    },
    /// A backend that there is not.
    #[error("Backend.Type `{name}` is not a backend of ours: use one of {known}")]
    UnknownBackend {
        /// The name.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// WireGuard's preshared key does not have the form.
    #[error("Backend.PSK is not a WireGuard key: make one with `wg genpsk`")]
    PresharedKey,
    /// WireGuard's mode is none.
    #[error("Backend.Mode `{found}` is not a mode of wireguard: use separate, auto, ipv4 or ipv6")]
    WireguardMode {
        /// The text.
        found: String,
    },
}

impl From<WrongType> for ConfigError {
    fn from(error: WrongType) -> ConfigError {
        ConfigError::WrongType { field: error.field.to_owned(), wanted: error.wanted, found: error.found }
    }
}

/// What is different between the families.
struct Names {
    family: Family,
    network: &'static str,
    length: &'static str,
    min: &'static str,
    max: &'static str,
    flag: &'static str,
    example: &'static str,
    /// The subnets' length where it is not given and the network is large enough.
    usual_length: u8,
}

const V4: Names = Names {
    family: Family::V4,
    network: "Network",
    length: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
    flag: "EnableIPv4",
    example: "10.5.0.0/16",
    usual_length: 24,
};

const V6: Names = Names {
    family: Family::V6,
    network: "IPv6Network",
    length: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
    flag: "EnableIPv6",
    example: "fd00:5::/48",
    usual_length: 64,
};

/// Reads a network config and fills in Flannel's defaults.
pub fn parse_network_config(text: &str, source: NetworkSource) -> Result<ParsedConfig, ConfigError> {
    let value: Value = serde_json::from_str(text).map_err(|error| ConfigError::NotJson(error.to_string()))?;
    let Value::Object(map) = value else { return Err(ConfigError::NotAnObject) };
    let mut fields = Fields::new(map);
    let mut notes = Vec::new();
    let is_v4 = fields.boolean(V4.flag)?.unwrap_or(true);
    let is_v6 = fields.boolean(V6.flag)?.unwrap_or(false);
    let enable_nftables = fields.boolean("EnableNFTables")?.unwrap_or(false);
    let v4 = pool(&mut fields, &V4, is_v4, source, &mut notes)?;
    let v6 = pool(&mut fields, &V6, is_v6, source, &mut notes)?;
    if v4.is_none() && v6.is_none() {
        return Err(ConfigError::NoFamily);
    }
    let backend = backend::parse(fields.take("Backend"), &mut notes)?;
    let text = || "is not a field of the network config and is not used".to_owned();
    notes.extend(fields.unknown().into_iter().map(|field| ConfigNote { field, text: text() }));
    Ok(ParsedConfig { config: NetworkConfig { v4, v6, enable_nftables, backend }, notes })
}

fn pool(
    fields: &mut Fields,
    names: &Names,
    is_enabled: bool,
    source: NetworkSource,
    notes: &mut Vec<ConfigNote>,
) -> Result<Option<Pool>, ConfigError> {
    let network = fields.text(names.network)?.filter(|text| !text.is_empty());
    let length = fields.number(names.length)?.unwrap_or(0);
    let min = fields.text(names.min)?.filter(|text| !text.is_empty());
    let max = fields.text(names.max)?.filter(|text| !text.is_empty());
    if !is_enabled {
        if network.is_some() {
            let text = format!("is not used while {} is not true", names.flag);
            notes.push(ConfigNote { field: names.network.to_owned(), text });
        }
        return Ok(None);
    }
    let missing = || ConfigError::NoNetwork { field: names.network, example: names.example, flag: names.flag };
    let network = parse_network(&network.ok_or_else(missing)?, names)?;
    let out_of_range = || ConfigError::OutOfRange {
        field: names.length.to_owned(),
        found: length,
        wanted: "a prefix length, or 0 for the usual one",
    };
    let length = u8::try_from(length).map_err(|_| out_of_range())?;
    if source == NetworkSource::Kubernetes {
        return Ok(Some(Pool { network, subnet_length: length, first: network, last: network }));
    }
    let subnet_length = subnet_length(network, length, names)?;
    let subnet = |address: IpAddr| IpNet::new(address, subnet_length).map_or(network, |it| it.trunc());
    let first = match min {
        // Not the very first: its address would be the network's own.
        None => subnet(address_of(names.family, bits(network.addr()) + size(names.family, subnet_length))),
        Some(text) => bound(&text, names.min, network, subnet_length, names)?,
    };
    let last = match max {
        None => subnet(network.broadcast()),
        Some(text) => bound(&text, names.max, network, subnet_length, names)?,
    };
    if bits(first.addr()) > bits(last.addr()) {
        let (first, last) = (first.addr(), last.addr());
        return Err(ConfigError::NothingBetween { first_field: names.min, first, last_field: names.max, last });
    }
    Ok(Some(Pool { network, subnet_length, first, last }))
}

fn parse_network(text: &str, names: &Names) -> Result<IpNet, ConfigError> {
    let wanted = match names.family {
        Family::V4 => "an IPv4 prefix such as 10.5.0.0/16",
        Family::V6 => "an IPv6 prefix such as fd00:5::/48",
    };
    let parsed = text.parse::<IpNet>().ok().filter(|it| Family::of_prefix(it) == names.family);
    let invalid = || ConfigError::NotAnAddress { field: names.network, found: text.to_owned(), wanted };
    // 0.0.0.0/0 is what flanneld takes for "not given".
    parsed.filter(|it| it.prefix_len() > 0).map(|it| it.trunc()).ok_or_else(invalid)
}

fn subnet_length(network: IpNet, given: u8, names: &Names) -> Result<u8, ConfigError> {
    let network_length = network.prefix_len();
    let longest = names.family.bits() - 2;
    if given > longest {
        return Err(ConfigError::TooLong { field: names.length, found: given, longest });
    }
    if given == 0 {
        let subnet_length = names.usual_length.max(network_length + 2);
        if subnet_length > longest {
            let hint = format!("use a {} of length {} or shorter", names.network, longest - 2);
            return Err(ConfigError::TooSmall { field: names.network, network, subnet_length: longest, hint });
        }
        return Ok(subnet_length);
    }
    if given < network_length + 2 {
        let hint = format!("use a {} of {} or more, or a larger network", names.length, network_length + 2);
        return Err(ConfigError::TooSmall { field: names.network, network, subnet_length: given, hint });
    }
    Ok(given)
}

fn bound(
    text: &str,
    field: &'static str,
    network: IpNet,
    subnet_length: u8,
    names: &Names,
) -> Result<IpNet, ConfigError> {
    let wanted = match names.family {
        Family::V4 => "an IPv4 address",
        Family::V6 => "an IPv6 address",
    };
    let invalid = || ConfigError::NotAnAddress { field, found: text.to_owned(), wanted };
    let found = text.parse::<IpAddr>().ok().filter(|it| Family::of(*it) == names.family).ok_or_else(invalid)?;
    if !network.contains(&found) {
        return Err(ConfigError::OutsideNetwork { field, found, network });
    }
    let subnet = IpNet::new(found, subnet_length).map_err(|_| invalid())?.trunc();
    if subnet.addr() != found {
        return Err(ConfigError::NotAligned { field, found, subnet_length, nearest: subnet.addr() });
    }
    Ok(subnet)
}

impl NetworkConfig {
    /// The pool of a family.
    pub fn pool(&self, family: Family) -> Option<&Pool> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// Whether a subnet has exactly the families, lengths and ranges of this config.
    pub fn fits(&self, subnet: &Subnet) -> bool {
        Family::ALL.into_iter().all(|family| match (self.pool(family), subnet.of(family)) {
            (None, None) => true,
            (Some(pool), Some(prefix)) => pool.has(prefix),
            _ => false,
        })
    }
}

impl Pool {
    /// Whether this is a prefix that the pool gives out.
    pub fn has(&self, prefix: IpNet) -> bool {
        let address = bits(prefix.addr());
        Family::of_prefix(&prefix) == Family::of_prefix(&self.network)
            && prefix.prefix_len() == self.subnet_length
            && prefix.trunc() == prefix
            && (bits(self.first.addr())..=bits(self.last.addr())).contains(&address)
    }

    /// The first `limit` prefixes that overlap none of those taken, which need no order.
    pub fn free(&self, taken: &[IpNet], limit: usize) -> Vec<IpNet> {
        let family = Family::of_prefix(&self.network);
        let mut ranges: Vec<(u128, u128)> = taken
            .iter()
            .filter(|prefix| Family::of_prefix(prefix) == family)
            .map(|prefix| (bits(prefix.network()), bits(prefix.broadcast())))
            .collect();
        ranges.sort_unstable();
        let mut ranges = ranges.into_iter().peekable();
        let size = size(family, self.subnet_length);
        let end = bits(self.last.addr());
        let mut next = Some(bits(self.first.addr()));
        let mut free = Vec::new();
        while let Some(start) = next.filter(|start| *start <= end && free.len() < limit) {
            // Ranges that end before this subnet are of no more interest.
            while ranges.next_if(|(_, last)| *last < start).is_some() {}
            let stop = start + (size - 1);
            next = match ranges.peek() {
                // The subnet behind the one that the range ends in.
                Some((first, last)) if *first <= stop => (*last / size + 1).checked_mul(size),
                _ => {
                    free.extend(IpNet::new(address_of(family, start), self.subnet_length).ok());
                    start.checked_add(size)
                }
            };
        }
        free
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn address_of(family: Family, bits: u128) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from(u32::try_from(bits).unwrap_or(u32::MAX))),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(bits)),
    }
}

/// How many addresses a prefix of this length has; lengths here are never 0.
fn size(family: Family, length: u8) -> u128 {
    1u128.checked_shl(u32::from(family.bits().saturating_sub(length))).unwrap_or(u128::MAX)
}
