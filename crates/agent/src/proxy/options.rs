//! What a configuration comes to: the values that other parts of the agent use, and notes on the rest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use portolan_intent::services::{DetectLocal, NodePortAddresses, ProxySettings};
use portolan_net::{Family, NodeName};
use portolan_program::ipvs::{IpvsSettings, Scheduler, Timeouts};
use portolan_state::{ObjectRef, Problem};

use super::document::Document;
use super::fields::{SECTIONS, judge};
use crate::config::{ConfigError, ServicesMode};

/// kube-proxy's `masqueradeBit`.
const MASQUERADE_BIT: u8 = 14;

/// kube-proxy's `syncPeriod`.
const SYNC_PERIOD: Duration = Duration::from_secs(30);

const HEALTHZ_PORT: u16 = 10_256;
const METRICS_PORT: u16 = 10_249;

/// A field that has no effect, or not the one that its words promise.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    /// The field, by its path.
    pub field: String,
    /// Why.
    pub reason: String,
    /// What to do.
    pub hint: String,
}

impl Note {
    /// A note on a field.
    pub fn new(field: &str, reason: impl Into<String>, hint: &str) -> Note {
        Note { field: field.to_owned(), reason: reason.into(), hint: hint.to_owned() }
    }

    /// As a row of `portolan show problems`.
    pub fn problem(&self, node: &NodeName) -> Problem {
        Problem {
            object: ObjectRef::Node(node.clone()),
            field: self.field.as_str().into(),
            reason: self.reason.as_str().into(),
            hint: self.hint.as_str().into(),
        }
    }
}

/// The section `conntrack`: the kernel's settings for connection tracking. What is `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConntrackOptions {
    /// `maxPerCore`: connections for each processor.
    pub max_per_core: Option<u32>,
    /// `min`: connections at least, where `maxPerCore` is given.
    pub min: u32,
    /// `tcpEstablishedTimeout`.
    pub tcp_established_timeout: Option<Duration>,
    /// `tcpCloseWaitTimeout`.
    pub tcp_close_wait_timeout: Option<Duration>,
    /// `tcpBeLiberal`: packets outside the window are not invalid.
    pub tcp_be_liberal: bool,
    /// `udpTimeout`.
    pub udp_timeout: Option<Duration>,
    /// `udpStreamTimeout`.
    pub udp_stream_timeout: Option<Duration>,
}

/// All that a `KubeProxyConfiguration`, and the section `proxy` of the agent's file, say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyOptions {
    /// `mode`, where it is given.
    pub mode: Option<ServicesMode>,
    /// What decides intent.
    pub settings: ProxySettings,
    /// `masqueradeBit` of the mode.
    pub masquerade_bit: u8,
    /// The section `ipvs`.
    pub ipvs: IpvsSettings,
    /// The section `conntrack`.
    pub conntrack: ConntrackOptions,
    /// `healthzBindAddress`; health is not served without one.
    pub healthz_address: Option<SocketAddr>,
    /// `metricsBindAddress`; metrics are not served there without one.
    pub metrics_address: Option<SocketAddr>,
    /// `bindAddressHardFail`: an address that cannot be listened at ends the agent.
    pub bind_address_hard_fail: bool,
    /// `syncPeriod` of the mode: an update that waits for twice as long makes the proxy unhealthy.
    pub sync_period: Duration,
    /// `hostnameOverride`.
    pub hostname_override: Option<NodeName>,
    /// `clusterCIDR`.
    pub cluster_prefixes: Vec<IpNet>,
    /// `clientConnection.kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// Fields without effect, each with the reason.
    pub notes: Vec<Note>,
}

impl Default for ProxyOptions {
    fn default() -> ProxyOptions {
        ProxyOptions {
            mode: None,
            settings: ProxySettings::default(),
            masquerade_bit: MASQUERADE_BIT,
            ipvs: IpvsSettings::default(),
            conntrack: ConntrackOptions::default(),
            healthz_address: None,
            metrics_address: None,
            bind_address_hard_fail: false,
            sync_period: SYNC_PERIOD,
            hostname_override: None,
            cluster_prefixes: Vec::new(),
            kubeconfig: None,
            notes: Vec::new(),
        }
    }
}

impl ProxyOptions {
    /// Reads every field. The agent's own `services` decides the mode where it is given.
    pub fn of(mut document: Document, services: Option<ServicesMode>) -> Result<ProxyOptions, ConfigError> {
        let has_file = document.has_file();
        let mut options = ProxyOptions { mode: mode(&mut document, services)?, ..ProxyOptions::default() };
        if has_file && services.is_none() && options.mode.is_none() {
            options.mode = Some(ServicesMode::Iptables);
            let reason = "it is not given, which to kube-proxy means iptables";
            options.notes.push(Note::new(
                "mode",
                reason,
                "give it, or `services` in the agent's file; nftables is the fastest",
            ));
        }
        let mode = services.or(options.mode).unwrap_or(ServicesMode::Nftables);
        options.read_rules(&mut document, mode)?;
        options.read_detect_local(&mut document)?;
        options.read_node_ports(&mut document, mode)?;
        options.read_servers(&mut document)?;
        options.ipvs = ipvs(&mut document)?;
        options.conntrack = conntrack(&mut document)?;
        options.settings.tcp_be_liberal = options.conntrack.tcp_be_liberal;
        options.hostname_override = document.chosen("hostnameOverride", "a node's name", |name| Some(name.into()))?;
        options.kubeconfig = document.text("clientConnection.kubeconfig")?.map(PathBuf::from);
        options.read_rest(document)?;
        Ok(options)
    }

    /// The notes as rows of `portolan show problems`.
    pub fn problems(&self, node: &NodeName) -> Vec<Problem> {
        self.notes.iter().map(|note| note.problem(node)).collect()
    }

    /// What each mode has in a section of its own.
    fn read_rules(&mut self, document: &mut Document, mode: ServicesMode) -> Result<(), ConfigError> {
        for section in [ServicesMode::Iptables, ServicesMode::Ipvs, ServicesMode::Nftables] {
            let period_path = format!("{}.syncPeriod", section.name());
            let period = document.duration(&period_path)?.filter(|period| !period.is_zero());
            if let Some(period) = period.filter(|_| section == mode) {
                self.sync_period = period;
            }
        }
        // IPVS leaves masquerading to iptables, and its settings with it.
        for section in ["iptables", "nftables"] {
            let bit = document.number(&format!("{section}.masqueradeBit"), 0, 31)?;
            let all = document.flag(&format!("{section}.masqueradeAll"))?;
            if (section == "nftables") != (mode == ServicesMode::Nftables) {
                continue;
            }
            self.settings.masquerade_all = all.unwrap_or(self.settings.masquerade_all);
            if let Some(bit) = bit.and_then(|bit| u8::try_from(bit).ok()) {
                self.masquerade_bit = bit;
            }
            if self.masquerade_bit != MASQUERADE_BIT {
                self.notes.push(Note::new(
                    &format!("{section}.masqueradeBit"),
                    format!("packets are marked with bit {MASQUERADE_BIT} (0x4000) in every mode"),
                    "let other software on the node keep clear of that bit of the mark",
                ));
                self.masquerade_bit = MASQUERADE_BIT;
            }
        }
        Ok(())
    }

    fn read_detect_local(&mut self, document: &mut Document) -> Result<(), ConfigError> {
        let expected = "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix";
        let known = ["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"];
        let mode =
            document.chosen("detectLocalMode", expected, |text| known.into_iter().find(|known| *known == text))?;
        let mut link = |name: &str, is_needed: bool| -> Result<String, ConfigError> {
            let path = format!("detectLocal.{name}");
            let given = document.text(&path)?.unwrap_or_default();
            // The kernel holds interface names in 16 bytes with their end (IFNAMSIZ).
            if is_needed && (given.is_empty() || given.len() > 15) {
                let reason = "detectLocalMode needs it: give a link's name of 1 to 15 characters".to_owned();
                return Err(document.wrong(&path, false, reason));
            }
            Ok(given)
        };
        let bridge = link("bridgeInterface", mode == Some("BridgeInterface"))?;
        let prefix = link("interfaceNamePrefix", mode == Some("InterfaceNamePrefix"))?;
        self.settings.detect_local = match mode {
            Some("NodeCIDR") => DetectLocal::NodePrefixes,
            Some("BridgeInterface") => DetectLocal::Bridge(bridge),
            Some("InterfaceNamePrefix") => DetectLocal::InterfacePrefix(prefix),
            _ => DetectLocal::ClusterPrefixes,
        };
        let expected = "a prefix such as 10.42.0.0/16, or one of each family with a comma between";
        let prefixes = document.chosen("clusterCIDR", expected, |text| {
            text.split(',').map(|part| part.trim().parse().ok()).collect::<Option<Vec<IpNet>>>()
        })?;
        self.cluster_prefixes = prefixes.unwrap_or_default();
        Ok(())
    }

    fn read_node_ports(&mut self, document: &mut Document, mode: ServicesMode) -> Result<(), ConfigError> {
        let has_file = document.has_file();
        let at_loopback = document.flag("iptables.localhostNodePorts")?;
        let expected = "prefixes, `primary`, `localhost` and `all`";
        let items = document.list("nodePortAddresses", expected, NodePortItem::read)?.unwrap_or_default();
        let has = |item: NodePortItem| items.contains(&item);
        let prefixes: Vec<IpNet> = items.iter().filter_map(NodePortItem::prefix).collect();
        let is_default = items.is_empty();
        self.settings.node_port_addresses = if has(NodePortItem::All) {
            NodePortAddresses::All
        } else if !prefixes.is_empty() || has(NodePortItem::Localhost) && !has(NodePortItem::Primary) {
            if has(NodePortItem::Primary) {
                self.notes.push(Note::new(
                    "nodePortAddresses",
                    "`primary` has no effect beside prefixes: node ports answer at addresses within the prefixes",
                    "give a prefix that holds the node's address, or `primary` alone",
                ));
            }
            NodePortAddresses::Within(prefixes.clone())
        } else if has(NodePortItem::Primary) || has_file && is_default && mode == ServicesMode::Nftables {
            NodePortAddresses::Primary
        } else {
            NodePortAddresses::All
        };
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let names_loopback = has(NodePortItem::Localhost) || prefixes.iter().any(|prefix| prefix.contains(&loopback));
        if mode == ServicesMode::Iptables {
            let is_open = names_loopback || self.settings.node_port_addresses == NodePortAddresses::All;
            self.settings.localhost_node_ports = at_loopback.unwrap_or(has_file) && is_open;
        } else if has(NodePortItem::Localhost) {
            self.notes.push(Note::new(
                "nodePortAddresses",
                "`localhost` has no effect: node ports answer at loopback addresses in the iptables mode only",
                "use another of the node's addresses, or the iptables mode",
            ));
        }
        // Ours alone: kube-proxy always honours them.
        if let Some(external_ips) = document.flag("externalIPs")? {
            self.settings.external_ips = external_ips;
        }
        Ok(())
    }

    fn read_servers(&mut self, document: &mut Document) -> Result<(), ConfigError> {
        // It is looked at here, and then judged with the idle ones.
        let bind: Option<IpAddr> = document.clone().parsed("bindAddress", "an address")?;
        let is_v6 = bind.is_some_and(|address| Family::of(address) == Family::V6);
        let any = if is_v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
        let own = if is_v6 { IpAddr::V6(Ipv6Addr::LOCALHOST) } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
        let has_file = document.has_file();
        let mut address = |path: &str, default: IpAddr, port: u16| -> Result<Option<SocketAddr>, ConfigError> {
            let expected = format!("an address and port such as {}", SocketAddr::new(default, port));
            let given = document.chosen(path, &expected, |text| socket_address(text, port))?;
            Ok(given.or_else(|| has_file.then(|| SocketAddr::new(default, port))))
        };
        self.healthz_address = address("healthzBindAddress", any, HEALTHZ_PORT)?;
        self.metrics_address = address("metricsBindAddress", own, METRICS_PORT)?;
        self.bind_address_hard_fail = document.flag("bindAddressHardFail")?.unwrap_or_default();
        Ok(())
    }

    /// What is left is idle or unknown. In the agent's own file, unknown is wrong.
    fn read_rest(&mut self, document: Document) -> Result<(), ConfigError> {
        let place = document.clone();
        for (path, value, is_own) in document.rest() {
            if SECTIONS.contains(&path.as_str()) && value.as_array().is_none_or(|items| !items.is_empty()) {
                return Err(place.wrong(&path, is_own, "it is not a mapping of fields".to_owned()));
            }
            let shown = if is_own { format!("proxy.{path}") } else { path.clone() };
            match judge(&path, &value, &shown) {
                Some(note) if is_own => return Err(place.wrong(&path, true, note.reason)),
                Some(note) => self.notes.push(note),
                None => {}
            }
        }
        Ok(())
    }
}

fn mode(document: &mut Document, services: Option<ServicesMode>) -> Result<Option<ServicesMode>, ConfigError> {
    // A mode that is not used may be one that is not known.
    if services.is_some() {
        document.text("mode")?;
        return Ok(None);
    }
    document.parsed("mode", "iptables, ipvs or nftables")
}

/// One entry of `nodePortAddresses`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum NodePortItem {
    All,
    Primary,
    Localhost,
    Within(IpNet),
}

impl NodePortItem {
    fn read(text: &str) -> Option<NodePortItem> {
        match text {
            "all" => Some(NodePortItem::All),
            "primary" => Some(NodePortItem::Primary),
            "localhost" => Some(NodePortItem::Localhost),
            prefix => prefix.parse().ok().map(NodePortItem::Within),
        }
    }

    fn prefix(&self) -> Option<IpNet> {
        match self {
            NodePortItem::Within(prefix) => Some(prefix.trunc()),
            NodePortItem::All | NodePortItem::Primary | NodePortItem::Localhost => None,
        }
    }
}

/// An address with a port; the address alone has the usual port.
fn socket_address(text: &str, port: u16) -> Option<SocketAddr> {
    let whole = text.parse().ok();
    whole.or_else(|| text.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, port)))
}

fn ipvs(document: &mut Document) -> Result<IpvsSettings, ConfigError> {
    let names: Vec<&str> = Scheduler::ALL.iter().map(Scheduler::name).collect();
    let known = format!("a scheduler of IPVS: {}", names.join(", "));
    let mut seconds = |path: &str| -> Result<Option<u32>, ConfigError> {
        // What is less than a second is no time to the kernel, and 0 would be none given.
        let given = positive(document, path, None)?;
        Ok(given.map(|it| u32::try_from(it.as_secs()).unwrap_or(u32::MAX).max(1)))
    };
    let timeouts = Timeouts {
        tcp: seconds("ipvs.tcpTimeout")?,
        tcp_fin: seconds("ipvs.tcpFinTimeout")?,
        udp: seconds("ipvs.udpTimeout")?,
    };
    Ok(IpvsSettings {
        scheduler: document.parsed("ipvs.scheduler", &known)?.unwrap_or_default(),
        exclude: document.list("ipvs.excludeCIDRs", "prefixes", |text| text.parse().ok())?.unwrap_or_default(),
        strict_arp: document.flag("ipvs.strictARP")?.unwrap_or_default(),
        timeouts,
    })
}

/// Only a `KubeProxyConfiguration` brings kube-proxy's defaults with it.
fn conntrack(document: &mut Document) -> Result<ConntrackOptions, ConfigError> {
    let if_file = |value: u32| document.has_file().then_some(value);
    let (max_per_core, min) = (if_file(32_768), if_file(131_072));
    let [day, hour] = [86_400, 3600].map(|seconds| if_file(seconds).map(|it| Duration::from_secs(it.into())));
    let most = i32::MAX.unsigned_abs();
    let max_per_core = document.number("conntrack.maxPerCore", 0, most)?.or(max_per_core);
    Ok(ConntrackOptions {
        max_per_core: max_per_core.filter(|it| *it > 0),
        min: document.number("conntrack.min", 0, most)?.or(min).unwrap_or_default(),
        tcp_established_timeout: positive(document, "conntrack.tcpEstablishedTimeout", day)?,
        tcp_close_wait_timeout: positive(document, "conntrack.tcpCloseWaitTimeout", hour)?,
        tcp_be_liberal: document.flag("conntrack.tcpBeLiberal")?.unwrap_or_default(),
        udp_timeout: positive(document, "conntrack.udpTimeout", None)?,
        udp_stream_timeout: positive(document, "conntrack.udpStreamTimeout", None)?,
    })
}

/// A duration that must be greater than 0 to be set.
fn positive(document: &mut Document, path: &str, default: Option<Duration>) -> Result<Option<Duration>, ConfigError> {
    Ok(document.duration(path)?.or(default).filter(|it| !it.is_zero()))
}

#[cfg(test)]
mod tests;
