//! The name of a lease: `10.5.34.0-24`, and with IPv6 `10.5.34.0-24&fd00:0:0:34::-64`.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portolan_net::Family;

/// What flanneld writes in the place of an IPv4 subnet where there is none.
const NO_V4: &str = "0.0.0.0-0";

/// A node's subnet: a prefix of each family that the network has, at least one.
///
/// The text form is the last part of the key in the store. Host bits are never set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
}

/// Why a key is not that of a lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not of the form.
    #[error("`{0}` is not a subnet's key, such as 10.5.34.0-24 or 10.5.34.0-24&fd00:0:0:34::-64")]
    NotASubnet(String),
    /// The address is one within the subnet, and not its first.
    #[error("`{0}` has bits set behind its length: the subnet is {1}")]
    HostBits(String, Subnet),
}

impl Subnet {
    /// A subnet of the given prefixes, without their host bits; none of no prefix.
    pub fn new(v4: Option<Ipv4Net>, v6: Option<Ipv6Net>) -> Option<Subnet> {
        (v4.is_some() || v6.is_some()).then(|| Subnet { v4: v4.map(|it| it.trunc()), v6: v6.map(|it| it.trunc()) })
    }

    /// The first prefix of each family in a list, if there is one.
    pub fn from_prefixes(prefixes: &[IpNet]) -> Option<Subnet> {
        let v4 = prefixes.iter().find_map(|it| if let IpNet::V4(it) = it { Some(*it) } else { None });
        let v6 = prefixes.iter().find_map(|it| if let IpNet::V6(it) = it { Some(*it) } else { None });
        Subnet::new(v4, v6)
    }

    /// The IPv4 prefix.
    pub fn v4(&self) -> Option<Ipv4Net> {
        self.v4
    }

    /// The IPv6 prefix.
    pub fn v6(&self) -> Option<Ipv6Net> {
        self.v6
    }

    /// The prefix of a family.
    pub fn of(&self, family: Family) -> Option<IpNet> {
        match family {
            Family::V4 => self.v4.map(IpNet::V4),
            Family::V6 => self.v6.map(IpNet::V6),
        }
    }

    /// Its prefixes, IPv4 first.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.v4.map(IpNet::V4).into_iter().chain(self.v6.map(IpNet::V6))
    }

    /// Whether the two share an address.
    pub fn overlaps(&self, other: &Subnet) -> bool {
        self.prefixes().any(|mine| other.prefixes().any(|theirs| overlap(mine, theirs)))
    }
}

/// Whether two prefixes share an address: then one contains the other.
pub(super) fn overlap(one: IpNet, other: IpNet) -> bool {
    one.contains(&other) || other.contains(&one)
}

/// The key's form of one prefix.
pub(super) fn prefix_text(prefix: IpNet) -> String {
    format!("{}-{}", prefix.addr(), prefix.prefix_len())
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.v4 {
            Some(v4) => f.write_str(&prefix_text(v4.into()))?,
            None => f.write_str(NO_V4)?,
        }
        match self.v6 {
            Some(v6) => write!(f, "&{}", prefix_text(v6.into())),
            None => Ok(()),
        }
    }
}

impl FromStr for Subnet {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Subnet, KeyError> {
        let invalid = || KeyError::NotASubnet(text.to_owned());
        let (v4_text, v6_text) = match text.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (text, None),
        };
        let v4 = match v4_text {
            NO_V4 => None,
            written => {
                let (address, length) = address_and_length::<Ipv4Addr>(written).ok_or_else(invalid)?;
                Some(Ipv4Net::new(address, length).map_err(|_| invalid())?)
            }
        };
        let v6 = match v6_text {
            None => None,
            Some(written) => {
                let (address, length) = address_and_length::<Ipv6Addr>(written).ok_or_else(invalid)?;
                Some(Ipv6Net::new(address, length).map_err(|_| invalid())?)
            }
        };
        let subnet = Subnet::new(v4, v6).ok_or_else(invalid)?;
        // A prefix of length 0 is the whole Internet and never a node's.
        if subnet.prefixes().any(|prefix| prefix.prefix_len() == 0) {
            return Err(invalid());
        }
        let has_host_bits = subnet.v4 != v4 || subnet.v6 != v6;
        if has_host_bits { Err(KeyError::HostBits(text.to_owned(), subnet)) } else { Ok(subnet) }
    }
}

fn address_and_length<A: FromStr>(text: &str) -> Option<(A, u8)> {
    let (address, length) = text.split_once('-')?;
    // flanneld's pattern takes digits alone: `+24` and an empty length are not its.
    let is_number = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
    Some((address.parse().ok()?, length.parse().ok().filter(|_| is_number)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_are_those_that_flanneld_writes() {
        let subnet = Subnet::from_prefixes(&["10.5.34.0/24".parse().unwrap()]).unwrap();
        assert_eq!(subnet.to_string(), "10.5.34.0-24");
        let prefixes = ["10.5.34.0/24".parse().unwrap(), "fd00:0:0:34::/64".parse().unwrap()];
        let dual = Subnet::from_prefixes(&prefixes).unwrap();
        assert_eq!(dual.to_string(), "10.5.34.0-24&fd00:0:0:34::-64");
        let v6 = Subnet::from_prefixes(&prefixes[1..]).unwrap();
        assert_eq!(v6.to_string(), "0.0.0.0-0&fd00:0:0:34::-64");
        assert!(Subnet::from_prefixes(&[]).is_none());
    }

    #[test]
    fn what_is_not_a_key_is_refused() {
        for text in [
            "",
            "10.5.34.0",
            "10.5.34.0/24",
            "10.5.34.0-33",
            "10.5.34.0-",
            "10.5.34.0-+24",
            "10.5.34-24",
            "0.0.0.0-0",
            "10.5.34.0-24&",
            "10.5.34.0-24&fd00--1-64",
            "fd00::-64",
            "10.5.34.0-24&::-0",
            "10.5.34.0-24&fd00::-129",
            "10.05.34.0-24",
            "config",
        ] {
            assert_eq!(text.parse::<Subnet>(), Err(KeyError::NotASubnet(text.to_owned())), "{text}");
        }
        let truncated = "10.5.34.0-24".parse().unwrap();
        let written = "10.5.34.7-24".to_owned();
        assert_eq!("10.5.34.7-24".parse::<Subnet>(), Err(KeyError::HostBits(written, truncated)));
    }

    #[test]
    fn subnets_overlap_where_one_family_does() {
        let parse = |text: &str| text.parse::<Subnet>().unwrap();
        assert!(parse("10.5.34.0-24").overlaps(&parse("10.5.34.64-26")));
        assert!(!parse("10.5.34.0-24").overlaps(&parse("10.5.35.0-24")));
        assert!(parse("10.5.34.0-24&fd00:1::-64").overlaps(&parse("10.5.35.0-24&fd00:1::-64")));
        assert!(!parse("0.0.0.0-0&fd00:1::-64").overlaps(&parse("10.5.35.0-24")));
    }

    pub(crate) fn any_subnet() -> impl Strategy<Value = Subnet> {
        let v4 = (any::<u32>(), 1u8..=32).prop_map(|(bits, length)| Ipv4Net::new(bits.into(), length).unwrap());
        let v6 = (any::<u128>(), 1u8..=128).prop_map(|(bits, length)| Ipv6Net::new(bits.into(), length).unwrap());
        (proptest::option::of(v4), proptest::option::of(v6))
            .prop_filter_map("of no prefix", |(v4, v6)| Subnet::new(v4, v6))
    }

    proptest! {
        #[test]
        fn every_subnet_comes_back_from_its_key(subnet in any_subnet()) {
            prop_assert_eq!(subnet.to_string().parse(), Ok(subnet));
        }

        #[test]
        fn no_text_panics(text in "[0-9a-f.:&-]{0,40}") {
            if let Ok(subnet) = text.parse::<Subnet>() {
                let again: Subnet = subnet.to_string().parse().unwrap();
                prop_assert_eq!(again, subnet);
            }
        }
    }
}
