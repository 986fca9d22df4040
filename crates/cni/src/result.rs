//! The result of ADD ("ADD Success"), in memory as version 1.1.0 has it, rendered for any version.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portolan_net::Family;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{CniError, Dns, Version};

/// What ADD made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddResult {
    /// The interfaces, on the node and in the container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// The addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<IpConfiguration>,
    /// The container's routes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Name resolution.
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
}

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address. Text, because a plugin before us in a chain may have one of 20 bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Its MTU in bytes (1.1.0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The path of the network namespace; empty for an interface on the node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// The path of a socket that stands for the interface (1.1.0).
    #[serde(rename = "socketPath", skip_serializing_if = "Option::is_none")]
    pub socket_path: Option<String>,
    /// The PCI device behind it (1.1.0).
    #[serde(rename = "pciID", skip_serializing_if = "Option::is_none")]
    pub pci_id: Option<String>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpConfiguration {
    /// The address with the length of its prefix.
    pub address: IpNet,
    /// The gateway of its prefix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into the interfaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// A route in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    pub dst: IpNet,
    /// By which way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// MTU of the route (1.1.0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Largest TCP segment to advertise (1.1.0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    /// Metric (1.1.0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// Routing table (1.1.0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// Scope (1.1.0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
}

impl Route {
    /// The default route of a gateway's family.
    pub fn default_via(gateway: IpAddr) -> Route {
        let dst = match Family::of(gateway) {
            Family::V4 => IpNet::V4(Ipv4Net::default()),
            Family::V6 => IpNet::V6(Ipv6Net::default()),
        };
        Route { dst, gw: Some(gateway), ..PLAIN_ROUTE }
    }
}

impl AddResult {
    /// Reads a result of any version from 0.3.1 on. Code 6 where it is none, or where an address
    /// points to an interface that is not listed.
    pub fn parse(value: &Value) -> Result<AddResult, CniError> {
        let result = AddResult::deserialize(value)
            .map_err(|error| CniError::decode(format!("prevResult is not a result of ADD: {error}")))?;
        for ip in &result.ips {
            if let Some(index) = ip.interface.filter(|index| *index >= result.interfaces.len()) {
                let (address, count) = (ip.address, result.interfaces.len());
                return Err(CniError::decode(format!(
                    "prevResult: the address {address} belongs to interface {index}, of {count}"
                )));
            }
        }
        Ok(result)
    }

    /// The JSON of a version: addresses carry their family before 1.0.0, and the fields that 1.1.0
    /// brought are left out of all before.
    pub fn render(&self, version: Version) -> Value {
        let mut shown = self.clone();
        if version < Version::V1_1_0 {
            for interface in &mut shown.interfaces {
                (interface.mtu, interface.socket_path, interface.pci_id) = (None, None, None);
            }
            for route in &mut shown.routes {
                *route = Route { dst: route.dst, gw: route.gw, ..PLAIN_ROUTE };
            }
        }
        let ips: Vec<Value> = shown.ips.iter().map(|ip| render_ip(ip, version)).collect();
        json!({
            "cniVersion": version,
            "interfaces": shown.interfaces,
            "ips": ips,
            "routes": shown.routes,
            "dns": shown.dns,
        })
    }

    /// This result after that of the plugins before us in a chain: theirs come first, and the
    /// indexes of our addresses move by the number of their interfaces. Their resolver settings
    /// stay where we have none.
    #[must_use]
    pub fn after(mut self, mut previous: AddResult) -> AddResult {
        let moved = previous.interfaces.len();
        for ip in &mut self.ips {
            ip.interface = ip.interface.map(|index| index + moved);
        }
        previous.interfaces.append(&mut self.interfaces);
        previous.ips.append(&mut self.ips);
        previous.routes.append(&mut self.routes);
        if !self.dns.is_empty() {
            previous.dns = self.dns;
        }
        previous
    }

    /// Where this result, given back as `prevResult`, no longer says what `made` says: one sentence
    /// each. What other plugins of the chain added is not looked at (CHECK: "the plugin must allow
    /// for a later chained plugin to have modified networking resources").
    pub fn differences(&self, made: &AddResult) -> Vec<String> {
        let mut differences = Vec::new();
        for expected in &made.interfaces {
            let (name, sandbox) = (&expected.name, &expected.sandbox);
            match self.interfaces.iter().find(|had| had.name == *name && had.sandbox == *sandbox) {
                None => differences.push(format!("prevResult has no interface `{name}` in `{sandbox}`")),
                Some(had) if !had.mac.is_empty() && !had.mac.eq_ignore_ascii_case(&expected.mac) => differences.push(
                    format!("interface `{name}` has the address {} in prevResult, but is {}", had.mac, expected.mac),
                ),
                Some(_) => {}
            }
        }
        for expected in &made.ips {
            if !self.ips.iter().any(|had| had.address == expected.address) {
                differences.push(format!("prevResult has no address {}", expected.address));
            }
        }
        differences
    }
}

const PLAIN_ROUTE: Route = Route {
    dst: IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)),
    gw: None,
    mtu: None,
    advmss: None,
    priority: None,
    table: None,
    scope: None,
};

fn render_ip(ip: &IpConfiguration, version: Version) -> Value {
    let mut fields = serde_json::Map::new();
    if version < Version::V1_0_0 {
        let family = if ip.address.addr().is_ipv4() { "4" } else { "6" };
        fields.insert("version".to_owned(), json!(family));
    }
    fields.insert("address".to_owned(), json!(ip.address));
    if let Some(gateway) = ip.gateway {
        fields.insert("gateway".to_owned(), json!(gateway));
    }
    if let Some(interface) = ip.interface {
        fields.insert("interface".to_owned(), json!(interface));
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> AddResult {
        AddResult {
            interfaces: vec![
                Interface { name: "veth0badcafe".into(), mac: "02:00:00:00:00:02".into(), ..Interface::default() },
                Interface {
                    name: "eth0".into(),
                    mac: "02:00:00:00:00:01".into(),
                    mtu: Some(1450),
                    sandbox: "/run/netns/a".into(),
                    ..Interface::default()
                },
            ],
            ips: vec![ip("10.42.1.7/24", "10.42.1.1", 1), ip("fd00:42:1::7/64", "fd00:42:1::1", 1)],
            routes: vec![
                Route { mtu: Some(1400), ..Route::default_via("10.42.1.1".parse().unwrap()) },
                Route::default_via("fd00:42:1::1".parse().unwrap()),
            ],
            dns: Dns { nameservers: vec!["10.96.0.10".into()], ..Dns::default() },
        }
    }

    fn ip(address: &str, gateway: &str, interface: usize) -> IpConfiguration {
        IpConfiguration {
            address: address.parse().unwrap(),
            gateway: Some(gateway.parse().unwrap()),
            interface: Some(interface),
        }
    }

    #[test]
    fn each_version_has_its_own_form() {
        let newest = sample().render(Version::V1_1_0);
        assert_eq!(newest["cniVersion"], "1.1.0");
        assert_eq!(newest["interfaces"][1]["mtu"], 1450);
        assert_eq!(newest["routes"][0]["mtu"], 1400);
        assert_eq!(newest["routes"][1]["dst"], "::/0");
        let middle = sample().render(Version::V1_0_0);
        assert!(middle["interfaces"][1].get("mtu").is_none());
        assert!(middle["routes"][0].get("mtu").is_none());
        assert_eq!(middle["routes"][0]["gw"], "10.42.1.1");
        assert!(middle["ips"][0].get("version").is_none());
        let old = sample().render(Version::V0_4_0);
        assert_eq!(old["ips"][0]["version"], "4");
        assert_eq!(old["ips"][1]["version"], "6");
        assert_eq!(old["ips"][1]["interface"], 1);
    }

    #[test]
    fn every_version_reads_back() {
        let plain = AddResult::parse(&sample().render(Version::V1_0_0)).unwrap();
        for version in Version::ALL {
            let again = AddResult::parse(&sample().render(version)).unwrap();
            let expected = if version == Version::V1_1_0 { sample() } else { plain.clone() };
            assert_eq!(again, expected, "{version}");
            assert_eq!(again.differences(&sample()), Vec::<String>::new());
        }
    }

    #[test]
    fn a_chain_keeps_what_came_before() {
        let before = AddResult {
            interfaces: vec![Interface { name: "lo".into(), ..Interface::default() }],
            ..AddResult::default()
        };
        let result = sample().after(before);
        assert_eq!(result.interfaces[0].name, "lo");
        assert_eq!(result.ips[0].interface, Some(2));
        assert_eq!(result.interfaces[2].name, "eth0");
    }

    #[test]
    fn differences_are_named() {
        let mut had = sample();
        had.ips.remove(0);
        had.interfaces[1].mac = "02:00:00:00:00:09".into();
        let differences = had.differences(&sample());
        assert_eq!(differences.len(), 2, "{differences:?}");
        assert!(differences[1].contains("10.42.1.7/24"));
    }

    #[test]
    fn an_address_of_no_interface_is_refused() {
        let error = AddResult::parse(&json!({"ips": [{"address": "10.0.0.2/24", "interface": 3}]})).unwrap_err();
        assert_eq!(error.code.number(), 6);
    }

    proptest! {
        #[test]
        fn any_json_is_read_or_refused(
            name in "[a-z]{0,8}", address in "[0-9a-f.:/]{0,20}", index in -2i64..4,
            key in "(interfaces|ips|routes|dns)",
        ) {
            let _ = AddResult::parse(&json!({ key.clone(): [{ "name": name, "address": address, "dst": address, "interface": index }] }));
            let _ = AddResult::parse(&json!({ key: address }));
        }

        #[test]
        fn results_round_trip(v4: u32, length in 0u8..=32, v6: u128, mtu: Option<u32>, version in 0usize..4) {
            let mut result = sample();
            result.ips[0].address = IpNet::new(IpAddr::from(v4.to_be_bytes()), length).unwrap();
            result.ips[1].address = IpNet::new(IpAddr::from(v6.to_be_bytes()), 64).unwrap();
            result.interfaces[1].mtu = mtu;
            let again = AddResult::parse(&result.render(Version::ALL[version])).unwrap();
            prop_assert_eq!(again.ips, result.ips);
        }
    }
}
