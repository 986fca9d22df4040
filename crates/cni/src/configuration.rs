//! The network configuration that the runtime writes to standard input ("Network configuration
//! format", "Deriving execution configuration from plugin configuration").

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::net::IpAddr;

use portolan_net::MacAddress;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::parameters::is_identifier;
use crate::{AddResult, CniError, Command, DEFAULT_SOCKET, Version};

/// What one call is told about the network. Fields that mean nothing here are kept, not refused:
/// the specification lets runtimes add keys.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkConfiguration {
    /// The version of the specification, as written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cni_version: Option<String>,
    /// The network's name; GC is confined to it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The plugin's executable.
    #[serde(default, rename = "type", skip_serializing_if = "String::is_empty")]
    pub plugin_type: String,
    /// Where the agent listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// The MTU that the writer of the configuration expects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// What ADD's result passes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<Dns>,
    /// Read for the sake of old configurations; the agent masquerades as its own configuration says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_masq: Option<bool>,
    /// What the runtime fills in for the capabilities that the configuration declares.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime_config: Option<RuntimeConfiguration>,
    /// The result so far in a chain, or of the ADD that a DEL or CHECK is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prev_result: Option<Value>,
    /// GC: what must stay.
    #[serde(rename = "cni.dev/valid-attachments", skip_serializing_if = "Option::is_none")]
    pub valid_attachments: Option<Vec<ValidAttachment>>,
    /// Everything else.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Name resolution for the container. It is passed on as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search domains.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Dns::default()
    }
}

/// `runtimeConfig`: what the runtime fills in (CONVENTIONS.md, "Dynamic plugin specific fields").
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RuntimeConfiguration {
    /// Capability `mac`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Capability `dns`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<RuntimeDns>,
    /// Every other capability.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Capability `dns`, whose keys differ from those of the configuration's own `dns`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeDns {
    /// Name servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<IpAddr>,
    /// Search domains.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub searches: Vec<String>,
    /// Options of the resolver.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// One entry of `cni.dev/valid-attachments`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ValidAttachment {
    /// The container.
    #[serde(rename = "containerID")]
    pub container: String,
    /// The interface's name in it.
    #[serde(rename = "ifname")]
    pub interface: String,
}

/// Capabilities that would change what is wired, and that are not honoured. To drop them silently
/// would leave a person with a port that is not open or an address that is another.
const UNSUPPORTED_CAPABILITIES: [&str; 6] =
    ["portMappings", "ipRanges", "bandwidth", "ips", "infinibandGUID", "deviceID"];

impl NetworkConfiguration {
    /// Reads standard input: code 6 where it is not such a JSON object.
    pub fn parse(bytes: &[u8]) -> Result<NetworkConfiguration, CniError> {
        serde_json::from_slice(bytes).map_err(|error| {
            CniError::decode(format!("the network configuration on standard input cannot be read: {error}"))
                .with_details(
                    "it must be one JSON object, as in the CNI specification, \"Network configuration format\"",
                )
        })
    }

    /// The version that is asked for.
    pub fn version(&self) -> Result<Version, CniError> {
        Version::parse(self.cni_version.as_deref())
    }

    /// Where the agent listens.
    pub fn socket(&self) -> &str {
        self.socket.as_deref().unwrap_or(DEFAULT_SOCKET)
    }

    /// Whether the configuration can serve a verb: version, name, socket, and no capability that
    /// would be dropped.
    pub fn validate(&self, command: Command) -> Result<Version, CniError> {
        let version = self.version()?;
        if !version.allows(command) {
            let since = command.since();
            return Err(CniError::incompatible_version(format!(
                "{command} needs cniVersion {since} or newer, not {version}"
            ))
            .with_details(format!("set cniVersion in the network configuration to {}", Version::NEWEST)));
        }
        if !is_identifier(&self.name) {
            let name = self.name.escape_debug();
            return Err(CniError::invalid_configuration(format!(
                "name `{name}` must be letters, digits, `_`, `.` and `-`, and start with a letter or digit"
            )));
        }
        if !self.socket().starts_with('/') {
            let socket = self.socket().escape_debug();
            return Err(CniError::invalid_configuration(format!("socket `{socket}` must be an absolute path")));
        }
        if command == Command::Add {
            self.refuse_unsupported_capabilities()?;
        }
        Ok(version)
    }

    fn refuse_unsupported_capabilities(&self) -> Result<(), CniError> {
        let Some(runtime) = &self.runtime_config else { return Ok(()) };
        for name in UNSUPPORTED_CAPABILITIES {
            let Some(value) = runtime.other.get(name).filter(|value| !is_blank(value)) else { continue };
            return Err(CniError::unsupported_field(format!("runtimeConfig.{name}={value} is not supported"))
                .with_details(format!(
                    "remove `{name}` from the plugin's `capabilities`, or chain a plugin that has it"
                )));
        }
        Ok(())
    }

    /// The result so far, whatever version it is written in.
    pub fn previous_result(&self) -> Result<Option<AddResult>, CniError> {
        self.prev_result.as_ref().filter(|value| !is_blank(value)).map(AddResult::parse).transpose()
    }

    /// The resolver settings that ADD's result passes on: the runtime's go before the configuration's.
    pub fn resolved_dns(&self) -> Dns {
        let mut dns = self.dns.clone().unwrap_or_default();
        if let Some(runtime) = self.runtime_config.as_ref().and_then(|runtime| runtime.dns.as_ref()) {
            if !runtime.servers.is_empty() {
                dns.nameservers = runtime.servers.iter().map(IpAddr::to_string).collect();
            }
            if !runtime.searches.is_empty() {
                dns.search.clone_from(&runtime.searches);
            }
            if !runtime.options.is_empty() {
                dns.options.clone_from(&runtime.options);
            }
        }
        dns
    }
}

/// Whether a value says nothing: runtimes send empty lists and objects for unused capabilities.
fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> NetworkConfiguration {
        NetworkConfiguration::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn unknown_fields_are_kept() {
        let text = r#"{"cniVersion":"1.0.0","name":"pods","type":"portolan-cni","socket":"/run/a.sock","mtu":1450,"ipam":{"type":"x"},"cni.dev/more":1}"#;
        let configuration = parse(text);
        assert_eq!(configuration.other.len(), 2);
        assert_eq!(serde_json::to_string(&configuration).unwrap(), text);
        assert_eq!(configuration.socket(), "/run/a.sock");
        assert_eq!(parse("{}").socket(), DEFAULT_SOCKET);
    }

    #[test]
    fn verbs_need_their_version() {
        for (version, command, code) in [
            ("0.3.1", Command::Check, Some(1)),
            ("0.4.0", Command::Check, None),
            ("1.0.0", Command::Gc, Some(1)),
            ("1.0.0", Command::Status, Some(1)),
            ("1.1.0", Command::Status, None),
            ("0.3.1", Command::Add, None),
            ("2.0.0", Command::Add, Some(1)),
        ] {
            let configuration = parse(&format!(r#"{{"cniVersion":"{version}","name":"pods"}}"#));
            let got = configuration.validate(command).err().map(|error| error.code.number());
            assert_eq!(got, code, "{version} {command}");
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let refused = |text: &str| parse(text).validate(Command::Add).unwrap_err();
        let ports = r#"{"cniVersion":"1.0.0","name":"pods","runtimeConfig":{"portMappings":[{"hostPort":80}]}}"#;
        assert_eq!(refused(ports).code.number(), 2);
        assert!(refused(ports).message.starts_with("runtimeConfig.portMappings=[{"));
        assert!(parse(ports).validate(Command::Del).is_ok());
        assert_eq!(refused(r#"{"cniVersion":"1.0.0"}"#).code.number(), 7);
        assert_eq!(refused(r#"{"cniVersion":"1.0.0","name":"a","socket":"b"}"#).code.number(), 7);
        let blank = r#"{"cniVersion":"1.0.0","name":"pods","runtimeConfig":{"portMappings":[],"bandwidth":{}}}"#;
        assert!(parse(blank).validate(Command::Add).is_ok());
    }

    #[test]
    fn the_runtime_s_resolver_settings_go_first() {
        let configuration = parse(
            r#"{"dns":{"nameservers":["10.0.0.1"],"domain":"d","search":["a"]},"runtimeConfig":{"dns":{"servers":["fd00::1"]}}}"#,
        );
        let dns = configuration.resolved_dns();
        assert_eq!((dns.nameservers, dns.domain, dns.search), (vec!["fd00::1".into()], "d".into(), vec!["a".into()]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = NetworkConfiguration::parse(&bytes);
        }

        #[test]
        fn any_values_are_read_or_refused(
            key in "(cniVersion|name|type|socket|mtu|dns|ipMasq|runtimeConfig|prevResult|cni.dev/valid-attachments|x)",
            value in r#"(null|1|-1|true|""|"1.1.0"|\[\]|\{\}|\{"mac":"x"\}|\{"ips":\[1\]\}|\[\{"containerID":"a","ifname":"b"\}\])"#,
        ) {
            if let Ok(configuration) = NetworkConfiguration::parse(format!(r#"{{"{key}":{value}}}"#).as_bytes()) {
                for command in Command::ALL {
                    let _ = configuration.validate(command);
                }
                let _ = configuration.previous_result();
                let again = NetworkConfiguration::parse(&serde_json::to_vec(&configuration).unwrap()).unwrap();
                prop_assert_eq!(configuration, again);
            }
        }
    }
}
