//! `Backend` of the network config: how nodes reach each other, with each kind's own options.

use std::fmt;

use portolan_net::{Port, Vni};
use serde_json::Value;

use super::config::{ConfigError, ConfigNote};
use super::json::{Fields, shorten};

/// The port of the udp backend where none is given.
const UDP_PORT: u16 = 8285;
/// The port of WireGuard's IPv4 device where none is given.
const WIREGUARD_PORT: u16 = 51820;
/// The port of WireGuard's IPv6 device where none is given.
const WIREGUARD_PORT_V6: u16 = 51821;
/// RFC 8200 §5 asks 1280 of a link; IPv4 can do with less, but no tunnel of use has less than this.
const MTU_MIN: i64 = 576;
/// The largest IP packet.
const MTU_MAX: i64 = 65_535;

/// How nodes reach each other's subnets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// Ethernet in UDP, by the kernel.
    Vxlan(Vxlan),
    /// Plain routes by way of the other nodes' addresses.
    HostGateway,
    /// IP in UDP, by this program and a TUN device.
    Udp {
        /// The port that every node listens on.
        port: Port,
    },
    /// IP in IP, by the kernel.
    Ipip {
        /// Plain routes to nodes on the same segment.
        direct_routing: bool,
    },
    /// Encrypted tunnels.
    Wireguard(Wireguard),
    /// Subnets are given out, and nothing else is done.
    Alloc,
    /// Commands of the user's.
    Extension(Extension),
}

/// Which backend it is, without its options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendKind {
    /// [`Backend::Vxlan`].
    Vxlan,
    /// [`Backend::HostGateway`].
    HostGateway,
    /// [`Backend::Udp`].
    Udp,
    /// [`Backend::Ipip`].
    Ipip,
    /// [`Backend::Wireguard`].
    Wireguard,
    /// [`Backend::Alloc`].
    Alloc,
    /// [`Backend::Extension`].
    Extension,
}

impl BackendKind {
    /// All of them, in the order in which they are listed to people.
    pub const ALL: [BackendKind; 7] = [
        BackendKind::Vxlan,
        BackendKind::HostGateway,
        BackendKind::Udp,
        BackendKind::Ipip,
        BackendKind::Wireguard,
        BackendKind::Alloc,
        BackendKind::Extension,
    ];

    /// Flannel's name.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Vxlan => "vxlan",
            BackendKind::HostGateway => "host-gw",
            BackendKind::Udp => "udp",
            BackendKind::Ipip => "ipip",
            BackendKind::Wireguard => "wireguard",
            BackendKind::Alloc => "alloc",
            BackendKind::Extension => "extension",
        }
    }

    /// The kind of this name, whatever its case.
    pub fn from_name(name: &str) -> Option<BackendKind> {
        Self::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(name))
    }

    /// All names, for messages.
    pub(super) fn names() -> String {
        Self::ALL.map(BackendKind::name).join(", ")
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Options of `vxlan`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// `VNI`, 1 where not given.
    pub vni: Vni,
    /// `Port`: the kernel's default, 8472, where not given.
    pub port: Option<Port>,
    /// `GBP`: the group policy extension.
    pub group_policy: bool,
    /// `Learning`: take hardware addresses from the traffic.
    pub learning: bool,
    /// `DirectRouting`: plain routes to nodes on the same segment.
    pub direct_routing: bool,
    /// `MTU` of the link below; that of the external interface where not given.
    pub mtu: Option<u16>,
}

/// Options of `wireguard`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wireguard {
    /// `PSK`.
    pub preshared_key: Option<PresharedKey>,
    /// `ListenPort`.
    pub listen_port: Port,
    /// `ListenPortV6`, of the second device in mode `separate`.
    pub listen_port_v6: Port,
    /// `MTU` of the link below; that of the external interface where not given.
    pub mtu: Option<u16>,
    /// `Mode`.
    pub mode: WireguardMode,
    /// `PersistentKeepaliveInterval`; off where 0 or not given.
    pub keepalive_s: Option<u16>,
}

/// `Mode` of `wireguard`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireguardMode {
    /// A device per family, each over its own family.
    Separate,
    /// One device, over the family that is more likely to get through.
    Auto,
    /// One device, over IPv4.
    V4,
    /// One device, over IPv6.
    V6,
}

/// A preshared key: base64 of 32 bytes. It is not printed.
#[derive(Clone, PartialEq, Eq)]
pub struct PresharedKey(String);

impl PresharedKey {
    /// The key, if it has the form.
    pub fn new(text: &str) -> Option<PresharedKey> {
        is_key(text).then(|| PresharedKey(text.to_owned()))
    }

    /// The key itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(…)")
    }
}

/// Whether the text is base64 of 32 bytes: 43 characters and a `=`, the last with two zero bits.
pub(super) fn is_key(text: &str) -> bool {
    let Some(digits) = text.strip_suffix('=') else { return false };
    let is_digit = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/';
    digits.len() == 43 && digits.bytes().all(is_digit) && digits.ends_with(|last| "AEIMQUYcgkosw048".contains(last))
}

/// Options of `extension`: commands for `sh -c`, empty for none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extension {
    /// `PreStartupCommand`: its output is the lease's `BackendData`.
    pub before_start: String,
    /// `PostStartupCommand`.
    pub after_start: String,
    /// `SubnetAddCommand`.
    pub subnet_added: String,
    /// `SubnetRemoveCommand`.
    pub subnet_removed: String,
}

impl Backend {
    /// Which one it is.
    pub fn kind(&self) -> BackendKind {
        match self {
            Backend::Vxlan(_) => BackendKind::Vxlan,
            Backend::HostGateway => BackendKind::HostGateway,
            Backend::Udp { .. } => BackendKind::Udp,
            Backend::Ipip { .. } => BackendKind::Ipip,
            Backend::Wireguard(_) => BackendKind::Wireguard,
            Backend::Alloc => BackendKind::Alloc,
            Backend::Extension(_) => BackendKind::Extension,
        }
    }
}

/// Reads `Backend`. A config without it means `udp`, as in flanneld.
pub(super) fn parse(value: Option<Value>, notes: &mut Vec<ConfigNote>) -> Result<Backend, ConfigError> {
    let mut fields = match value {
        None => return Ok(Backend::Udp { port: port(None, "Backend.Port", UDP_PORT)? }),
        Some(Value::Object(map)) => Fields::new(map),
        Some(other) => {
            let (field, wanted) = ("Backend".to_owned(), "an object, such as {\"Type\": \"vxlan\"}");
            return Err(ConfigError::WrongType { field, wanted, found: shorten(&other) });
        }
    };
    let name = fields.text("Type").map_err(in_backend)?;
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Err(ConfigError::NoBackendType { known: BackendKind::names() });
    };
    let kind = BackendKind::from_name(&name)
        .ok_or_else(|| ConfigError::UnknownBackend { name: name.clone(), known: BackendKind::names() })?;
    let backend = options(kind, &mut fields)?;
    for name in fields.unknown() {
        let is_for_windows = kind == BackendKind::Vxlan && ["macprefix", "name"].contains(&&*name.to_lowercase());
        let text = if is_for_windows {
            "means something on Windows only".to_owned()
        } else {
            format!("is not an option of the {kind} backend and is not used")
        };
        notes.push(ConfigNote { field: format!("Backend.{name}"), text });
    }
    Ok(backend)
}

fn options(kind: BackendKind, fields: &mut Fields) -> Result<Backend, ConfigError> {
    Ok(match kind {
        BackendKind::Vxlan => Backend::Vxlan(vxlan(fields)?),
        BackendKind::HostGateway => Backend::HostGateway,
        BackendKind::Udp => {
            Backend::Udp { port: port(fields.number("Port").map_err(in_backend)?, "Backend.Port", UDP_PORT)? }
        }
        BackendKind::Ipip => Backend::Ipip { direct_routing: flag(fields, "DirectRouting")? },
        BackendKind::Wireguard => Backend::Wireguard(wireguard(fields)?),
        BackendKind::Alloc => Backend::Alloc,
        BackendKind::Extension => {
            let mut command = |name| fields.text(name).map_err(in_backend).map(Option::unwrap_or_default);
            Backend::Extension(Extension {
                before_start: command("PreStartupCommand")?,
                after_start: command("PostStartupCommand")?,
                subnet_added: command("SubnetAddCommand")?,
                subnet_removed: command("SubnetRemoveCommand")?,
            })
        }
    })
}

fn vxlan(fields: &mut Fields) -> Result<Vxlan, ConfigError> {
    let number = fields.number("VNI").map_err(in_backend)?.unwrap_or(1);
    let vni = u32::try_from(number).ok().filter(|number| *number > 0).and_then(Vni::new);
    let vni = vni.ok_or_else(|| out_of_range("Backend.VNI", number, "1 to 16777215"))?;
    let port = match fields.number("Port").map_err(in_backend)? {
        None | Some(0) => None,
        given => Some(self::port(given, "Backend.Port", 0)?),
    };
    Ok(Vxlan {
        vni,
        port,
        group_policy: flag(fields, "GBP")?,
        learning: flag(fields, "Learning")?,
        direct_routing: flag(fields, "DirectRouting")?,
        mtu: mtu(fields)?,
    })
}

fn wireguard(fields: &mut Fields) -> Result<Wireguard, ConfigError> {
    let preshared_key = match fields.text("PSK").map_err(in_backend)?.filter(|text| !text.is_empty()) {
        None => None,
        Some(text) => Some(PresharedKey::new(&text).ok_or(ConfigError::PresharedKey)?),
    };
    let mode = match fields.text("Mode").map_err(in_backend)?.as_deref() {
        None | Some("" | "separate") => WireguardMode::Separate,
        Some("auto") => WireguardMode::Auto,
        Some("ipv4") => WireguardMode::V4,
        Some("ipv6") => WireguardMode::V6,
        Some(other) => return Err(ConfigError::WireguardMode { found: other.to_owned() }),
    };
    let keepalive = fields.number("PersistentKeepaliveInterval").map_err(in_backend)?.unwrap_or(0);
    let keepalive_s = u16::try_from(keepalive)
        .map_err(|_| out_of_range("Backend.PersistentKeepaliveInterval", keepalive, "0 to 65535 seconds"))?;
    let listen_port = fields.number("ListenPort").map_err(in_backend)?;
    let listen_port_v6 = fields.number("ListenPortV6").map_err(in_backend)?;
    Ok(Wireguard {
        preshared_key,
        listen_port: port(listen_port, "Backend.ListenPort", WIREGUARD_PORT)?,
        listen_port_v6: port(listen_port_v6, "Backend.ListenPortV6", WIREGUARD_PORT_V6)?,
        mtu: mtu(fields)?,
        mode,
        keepalive_s: Some(keepalive_s).filter(|seconds| *seconds > 0),
    })
}

fn flag(fields: &mut Fields, name: &'static str) -> Result<bool, ConfigError> {
    Ok(fields.boolean(name).map_err(in_backend)?.unwrap_or(false))
}

fn mtu(fields: &mut Fields) -> Result<Option<u16>, ConfigError> {
    match fields.number("MTU").map_err(in_backend)? {
        None | Some(0) => Ok(None),
        Some(number) => {
            let fits = u16::try_from(number).ok().filter(|_| (MTU_MIN..=MTU_MAX).contains(&number));
            fits.map(Some).ok_or_else(|| out_of_range("Backend.MTU", number, "576 to 65535"))
        }
    }
}

fn port(number: Option<i64>, field: &'static str, default: u16) -> Result<Port, ConfigError> {
    let number = number.unwrap_or(i64::from(default));
    let port = u16::try_from(number).ok().and_then(|port| Port::try_from(port).ok());
    port.ok_or_else(|| out_of_range(field, number, "1 to 65535"))
}

fn out_of_range(field: &str, found: i64, wanted: &'static str) -> ConfigError {
    ConfigError::OutOfRange { field: field.to_owned(), found, wanted }
}

fn in_backend(error: super::json::WrongType) -> ConfigError {
    let super::json::WrongType { field, wanted, found } = error;
    ConfigError::WrongType { field: format!("Backend.{field}"), wanted, found }
}
