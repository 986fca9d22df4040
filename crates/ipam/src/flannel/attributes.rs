//! The value of a lease: who has the subnet, and how it is reached.
//!
//! ```json
//! {"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:…"}}
//! ```
//!
//! Written byte for byte as flanneld does: an address that there is not is `"0.0.0.0"` or `null`, and
//! parts without a value are left out. The udp and alloc backends write no `BackendType` at all.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use portolan_net::{Family, MacAddress};
use serde_json::{Value, json};

use super::backend::{BackendKind, is_key};
use super::json::{Fields, WrongType, compact, shorten};
use super::key::Subnet;

/// The value of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// `PublicIP`: where other nodes send to, over IPv4.
    pub public_v4: Option<Ipv4Addr>,
    /// `PublicIPv6`: where other nodes send to, over IPv6.
    pub public_v6: Option<Ipv6Addr>,
    /// `BackendType`; empty for the backends that write none.
    pub backend: Arc<str>,
    /// `BackendData`, as compact JSON.
    pub data_v4: Option<Arc<str>>,
    /// `BackendV6Data`, as compact JSON.
    pub data_v6: Option<Arc<str>>,
}

/// `BackendData` of the vxlan backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanData {
    /// The network identifier's lower 16 bits: flanneld keeps no more, and reads no more.
    pub vni: Option<u16>,
    /// The hardware address of the node's tunnel device.
    pub vtep_mac: MacAddress,
}

/// `BackendData` of the wireguard backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireguardData {
    /// The node's public key, in base64.
    pub public_key: Arc<str>,
}

/// What another node needs to know to send to a subnet, by backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tunnel {
    /// Per family, as far as the subnet has it.
    Vxlan {
        /// The IPv4 device.
        v4: Option<VxlanData>,
        /// The IPv6 device.
        v6: Option<VxlanData>,
    },
    /// Per family, as far as the subnet has it.
    Wireguard {
        /// The IPv4 device, or the only one.
        v4: Option<WireguardData>,
        /// The IPv6 device.
        v6: Option<WireguardData>,
    },
    /// Nothing but the public address.
    HostGateway,
    /// Nothing but the public address.
    Ipip,
    /// Nothing but the public address. Leases of the alloc backend look the same.
    Udp,
    /// What the node's start command printed, as JSON.
    Extension {
        /// `BackendData`.
        data: Option<Arc<str>>,
    },
}

/// What is wrong with a lease's value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttributesError {
    /// Not JSON, or not an object.
    #[error("the value is not a JSON object: {0}")]
    NotJson(String),
    /// A field has the wrong type.
    #[error("{field} is {found}: it must be {wanted}")]
    WrongType {
        /// The field.
        field: &'static str,
        /// What it should be.
        wanted: &'static str,
        /// What it is.
        found: String,
    },
    /// The public address is missing or none that a node can have.
    #[error("{field} {found} is not the address of a node")]
    PublicAddress {
        /// `PublicIP` or `PublicIPv6`.
        field: &'static str,
        /// What it is.
        found: String,
    },
    /// A backend that nobody here knows.
    #[error("BackendType `{found}` is unknown: known are {known}")]
    UnknownBackend {
        /// The name.
        found: String,
        /// The names that exist.
        known: String,
    },
    /// The backend's own data is missing or malformed.
    #[error("{field} of the {backend} backend is {found}: it must hold {wanted}")]
    BackendData {
        /// `BackendData` or `BackendV6Data`.
        field: &'static str,
        /// The backend.
        backend: BackendKind,
        /// What it is.
        found: String,
        /// What it should hold.
        wanted: &'static str,
    },
}

impl From<WrongType> for AttributesError {
    fn from(WrongType { field, wanted, found }: WrongType) -> Self {
        AttributesError::WrongType { field, wanted, found }
    }
}

impl VxlanData {
    fn text(self) -> Arc<str> {
        let vtep_mac = self.vtep_mac.to_string();
        compact(&json!({ "VNI": self.vni.unwrap_or(0), "VtepMAC": vtep_mac })).into()
    }
}

impl WireguardData {
    fn text(&self) -> Arc<str> {
        compact(&json!({ "PublicKey": &*self.public_key })).into()
    }
}

impl Attributes {
    /// What a node with this tunnel writes. `alloc` writes what `udp` does.
    pub fn new(public_v4: Option<Ipv4Addr>, public_v6: Option<Ipv6Addr>, tunnel: &Tunnel) -> Attributes {
        let (backend, data_v4, data_v6) = match tunnel {
            Tunnel::Vxlan { v4, v6 } => (BackendKind::Vxlan.name(), v4.map(VxlanData::text), v6.map(VxlanData::text)),
            Tunnel::Wireguard { v4, v6 } => {
                let text = |data: &Option<WireguardData>| data.as_ref().map(WireguardData::text);
                (BackendKind::Wireguard.name(), text(v4), text(v6))
            }
            Tunnel::HostGateway => (BackendKind::HostGateway.name(), None, None),
            Tunnel::Ipip => (BackendKind::Ipip.name(), None, None),
            Tunnel::Udp => ("", None, None),
            Tunnel::Extension { data } => (BackendKind::Extension.name(), data.clone(), None),
        };
        Attributes { public_v4, public_v6, backend: backend.into(), data_v4, data_v6 }
    }

    /// Reads a value. What its parts mean is asked of [`Attributes::tunnel`].
    pub fn parse(text: &[u8]) -> Result<Attributes, AttributesError> {
        let value = serde_json::from_slice(text).map_err(|error| AttributesError::NotJson(error.to_string()))?;
        let Value::Object(map) = value else { return Err(AttributesError::NotJson(shorten(&value))) };
        let mut fields = Fields::new(map);
        let public_v4 = match fields.text("PublicIP")? {
            None => None,
            Some(written) => match written.parse::<IpAddr>().map(|it| it.to_canonical()) {
                Ok(IpAddr::V4(address)) => Some(address).filter(|it| !it.is_unspecified()),
                _ => return Err(AttributesError::PublicAddress { field: "PublicIP", found: quoted(&written) }),
            },
        };
        let public_v6 = match fields.text("PublicIPv6")? {
            None => None,
            Some(written) => match written.parse::<Ipv6Addr>() {
                Ok(address) => Some(address).filter(|it| !it.is_unspecified()),
                Err(_) => return Err(AttributesError::PublicAddress { field: "PublicIPv6", found: quoted(&written) }),
            },
        };
        let backend = fields.text("BackendType")?.unwrap_or_default().into();
        let mut data = |name| fields.take(name).map(|value| Arc::from(compact(&value)));
        Ok(Attributes { public_v4, public_v6, backend, data_v4: data("BackendData"), data_v6: data("BackendV6Data") })
    }

    /// The value's text.
    pub fn render(&self) -> String {
        let mut text = format!("{{\"PublicIP\":\"{}\"", self.public_v4.unwrap_or(Ipv4Addr::UNSPECIFIED));
        // Writing to a string cannot fail.
        let _ = match self.public_v6 {
            Some(address) => write!(text, ",\"PublicIPv6\":\"{address}\""),
            None => write!(text, ",\"PublicIPv6\":null"),
        };
        if !self.backend.is_empty() {
            let _ = write!(text, ",\"BackendType\":{}", compact(&Value::from(&*self.backend)));
        }
        for (name, data) in [("BackendData", &self.data_v4), ("BackendV6Data", &self.data_v6)] {
            if let Some(data) = data {
                let _ = write!(text, ",\"{name}\":{data}");
            }
        }
        text.push('}');
        text
    }

    /// The public address of a family.
    pub fn public(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.public_v4.map(IpAddr::V4),
            Family::V6 => self.public_v6.map(IpAddr::V6),
        }
    }

    /// Whether the value names one of these public addresses: flanneld's idea of who a node is.
    pub fn shares_public_address(&self, other: &Attributes) -> Option<IpAddr> {
        // Where both have an IPv4 address that decides, as in flanneld.
        match (self.public_v4, other.public_v4) {
            (Some(one), Some(another)) => (one == another).then_some(IpAddr::V4(one)),
            _ => self.public_v6.filter(|it| other.public_v6 == Some(*it)).map(IpAddr::V6),
        }
    }

    /// Whether the value carries the same hardware address or public key: then it is the same node.
    pub fn is_same_device(&self, other: &Attributes) -> bool {
        let is_same = |one: &Option<Arc<str>>, another: &Option<Arc<str>>| one.is_some() && one == another;
        let has_identity = [BackendKind::Vxlan, BackendKind::Wireguard].iter().any(|it| it.name() == &*self.backend);
        let is_either = is_same(&self.data_v4, &other.data_v4) || is_same(&self.data_v6, &other.data_v6);
        has_identity && self.backend == other.backend && is_either
    }

    /// How the subnet is reached, or what is wrong with the value.
    pub fn tunnel(&self, subnet: &Subnet) -> Result<Tunnel, AttributesError> {
        self.check_public_addresses(subnet)?;
        let kind = if self.backend.is_empty() {
            BackendKind::Udp
        } else {
            BackendKind::from_name(&self.backend).ok_or_else(|| AttributesError::UnknownBackend {
                found: self.backend.to_string(),
                known: BackendKind::names(),
            })?
        };
        let wanted = |family| subnet.of(family).is_some();
        Ok(match kind {
            BackendKind::Vxlan => {
                let read = |family| wanted(family).then(|| self.vxlan(family)).transpose();
                Tunnel::Vxlan { v4: read(Family::V4)?, v6: read(Family::V6)? }
            }
            BackendKind::Wireguard => {
                let read = |family| wanted(family).then(|| self.wireguard(family)).transpose();
                Tunnel::Wireguard { v4: read(Family::V4)?, v6: read(Family::V6)? }
            }
            BackendKind::HostGateway => Tunnel::HostGateway,
            BackendKind::Ipip => Tunnel::Ipip,
            BackendKind::Udp | BackendKind::Alloc => Tunnel::Udp,
            BackendKind::Extension => Tunnel::Extension { data: self.data_v4.clone() },
        })
    }

    /// At least one address, and each of them one that packets can be sent to. A tunnel may carry one
    /// family over the other, so a subnet's family alone does not demand an address.
    fn check_public_addresses(&self, subnet: &Subnet) -> Result<(), AttributesError> {
        if self.public_v4.is_none() && self.public_v6.is_none() {
            let field = if subnet.v4().is_some() { "PublicIP" } else { "PublicIPv6" };
            return Err(AttributesError::PublicAddress { field, found: "(none)".to_owned() });
        }
        if let Some(address) = self.public_v4
            && (address.is_loopback() || address.is_multicast() || address.octets()[0] == 0 || address.is_broadcast())
        {
            return Err(AttributesError::PublicAddress { field: "PublicIP", found: address.to_string() });
        }
        if let Some(address) = self.public_v6
            && (address.is_loopback() || address.is_multicast())
        {
            return Err(AttributesError::PublicAddress { field: "PublicIPv6", found: address.to_string() });
        }
        // A public address inside the node's own subnet would be reached through itself.
        for prefix in subnet.prefixes() {
            if let Some(address) = self.public(Family::of_prefix(&prefix)).filter(|address| prefix.contains(address)) {
                let field = if address.is_ipv4() { "PublicIP" } else { "PublicIPv6" };
                return Err(AttributesError::PublicAddress { field, found: address.to_string() });
            }
        }
        Ok(())
    }

    fn data(&self, family: Family) -> (&'static str, Option<&Arc<str>>) {
        match family {
            Family::V4 => ("BackendData", self.data_v4.as_ref()),
            Family::V6 => ("BackendV6Data", self.data_v6.as_ref()),
        }
    }

    fn data_fields(&self, family: Family) -> Option<Fields> {
        match serde_json::from_str(self.data(family).1?) {
            Ok(Value::Object(map)) => Some(Fields::new(map)),
            _ => None,
        }
    }

    fn vxlan(&self, family: Family) -> Result<VxlanData, AttributesError> {
        let read = |mut fields: Fields| {
            let mac = fields.text("VtepMAC").ok()??.parse::<MacAddress>().ok()?;
            // A frame to a group address would not reach the node alone.
            let is_unicast = mac.0[0] & 1 == 0 && mac.0 != [0; 6];
            let number = fields.number("VNI").ok()?;
            let vni = number.and_then(|number| u32::try_from(number).ok()).map(|number| number as u16);
            is_unicast.then_some(VxlanData { vni, vtep_mac: mac })
        };
        let wanted = "VNI, and in VtepMAC the hardware address of one device";
        let wrong = || self.wrong_data(BackendKind::Vxlan, family, wanted);
        self.data_fields(family).and_then(read).ok_or_else(wrong)
    }

    fn wireguard(&self, family: Family) -> Result<WireguardData, AttributesError> {
        let read = |mut fields: Fields| {
            let public_key = fields.text("PublicKey").ok()??;
            is_key(&public_key).then(|| WireguardData { public_key: public_key.into() })
        };
        let wanted = "in PublicKey the base64 of 32 bytes";
        let wrong = || self.wrong_data(BackendKind::Wireguard, family, wanted);
        self.data_fields(family).and_then(read).ok_or_else(wrong)
    }

    fn wrong_data(&self, backend: BackendKind, family: Family, wanted: &'static str) -> AttributesError {
        let (field, data) = self.data(family);
        let found = data.map_or_else(|| "(none)".to_owned(), |data| data.chars().take(80).collect());
        AttributesError::BackendData { field, backend, found, wanted }
    }
}

fn quoted(text: &str) -> String {
    shorten(&Value::from(text))
}
