//! What the runtime says through the environment ("Parameters").

use alloc::borrow::ToOwned;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use portolan_net::{MacAddress, ObjectKey};
use serde::{Deserialize, Serialize};

use crate::limits::{CONTAINER_ID_BYTES_MAX, INTERFACE_NAME_BYTES_MAX};
use crate::{CniError, Version};

/// A verb: `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Command {
    /// Make an interface.
    Add,
    /// Remove it.
    Del,
    /// Say whether it is as it was made.
    Check,
    /// Remove all that the runtime does not know.
    Gc,
    /// Say whether ADD would be served.
    Status,
    /// List the versions.
    Version,
}

impl Command {
    /// Every verb.
    pub const ALL: [Command; 6] =
        [Command::Add, Command::Del, Command::Check, Command::Gc, Command::Status, Command::Version];

    /// The verb as `CNI_COMMAND` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Gc => "GC",
            Command::Status => "STATUS",
            Command::Version => "VERSION",
        }
    }

    /// The first version that has the verb.
    pub fn since(self) -> Version {
        match self {
            Command::Add | Command::Del | Command::Version => Version::V0_3_1,
            Command::Check => Version::V0_4_0,
            Command::Gc | Command::Status => Version::V1_1_0,
        }
    }

    /// Whether the verb is about one interface of one container.
    fn names_an_attachment(self) -> bool {
        matches!(self, Command::Add | Command::Del | Command::Check)
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the environment of one call says. GC, STATUS and VERSION leave all but the verb empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    /// `CNI_COMMAND`.
    pub command: Command,
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_NETNS`: the path of the network namespace; DEL may leave it empty.
    pub namespace_path: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `K8S_POD_NAMESPACE` and `K8S_POD_NAME` of `CNI_ARGS`.
    pub pod: Option<ObjectKey>,
    /// `MAC` of `CNI_ARGS`.
    pub mac: Option<MacAddress>,
}

impl Parameters {
    /// The variables that are read.
    pub const VARIABLES: [&'static str; 5] = ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"];

    /// Reads the environment. The error (code 4) names every variable that is missing or bad, not
    /// only the first.
    pub fn from_environment(environment: &BTreeMap<String, String>) -> Result<Parameters, CniError> {
        let mut reader = Reader { environment, problems: Vec::new() };
        let verb = reader.get("CNI_COMMAND").to_owned();
        let command = Command::ALL.into_iter().find(|command| command.as_str() == verb);
        if command.is_none() {
            let expected = "ADD, DEL, CHECK, GC, STATUS or VERSION";
            reader.problem("CNI_COMMAND", &verb, &format!("is not {expected}"));
        }
        let mut parameters = Parameters {
            command: command.unwrap_or(Command::Version),
            container: String::new(),
            namespace_path: String::new(),
            interface: String::new(),
            pod: None,
            mac: None,
        };
        if parameters.command.names_an_attachment() {
            reader.read_attachment(&mut parameters);
        }
        if reader.problems.is_empty() {
            return Ok(parameters);
        }
        Err(CniError::invalid_environment(reader.problems.join("; "))
            .with_details("a container runtime sets these variables; see the CNI specification, \"Parameters\""))
    }
}

struct Reader<'a> {
    environment: &'a BTreeMap<String, String>,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    fn get(&self, name: &str) -> &'a str {
        self.environment.get(name).map_or("", String::as_str)
    }

    fn problem(&mut self, name: &str, value: &str, why: &str) {
        self.problems.push(if value.is_empty() {
            format!("{name} is missing")
        } else {
            format!("{name}=`{}` {why}", value.escape_debug())
        });
    }

    fn read_attachment(&mut self, parameters: &mut Parameters) {
        let container = self.get("CNI_CONTAINERID");
        if !is_identifier(container) {
            self.problem(
                "CNI_CONTAINERID",
                container,
                "must be letters, digits, `_`, `.` and `-`, and start with a letter or digit",
            );
        }
        let interface = self.get("CNI_IFNAME");
        if !is_interface_name(interface) {
            self.problem(
                "CNI_IFNAME",
                interface,
                "must be 1 to 15 bytes without `/`, `:` and white space, and not `.` or `..`",
            );
        }
        let namespace_path = self.get("CNI_NETNS");
        let required = parameters.command != Command::Del;
        if (required || !namespace_path.is_empty()) && !namespace_path.starts_with('/') {
            self.problem("CNI_NETNS", namespace_path, "must be an absolute path");
        }
        parameters.container = container.to_owned();
        parameters.interface = interface.to_owned();
        parameters.namespace_path = namespace_path.to_owned();
        self.read_arguments(parameters);
    }

    /// `CNI_ARGS`: `KEY=VALUE` pairs with semicolons between. A key that means nothing here is an
    /// error unless `IgnoreUnknown` is set, as in the specification's own library: an argument
    /// that a person wrote must not be dropped without a word.
    fn read_arguments(&mut self, parameters: &mut Parameters) {
        let text = self.get("CNI_ARGS");
        let mut unknown = Vec::new();
        let (mut ignore_unknown, mut namespace, mut name) = (false, "", "");
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                self.problem("CNI_ARGS", pair, "is not KEY=VALUE");
                continue;
            };
            match key {
                "IgnoreUnknown" => ignore_unknown = matches!(value, "1" | "true" | "True" | "TRUE" | "t" | "T"),
                "K8S_POD_NAMESPACE" => namespace = value,
                "K8S_POD_NAME" => name = value,
                "K8S_POD_INFRA_CONTAINER_ID" | "K8S_POD_UID" => {}
                "MAC" => match value.parse() {
                    Ok(mac) => parameters.mac = Some(mac),
                    Err(_) => self.problem("CNI_ARGS", pair, "does not hold a MAC address"),
                },
                _ => unknown.push(key),
            }
        }
        if !namespace.is_empty() && !name.is_empty() {
            parameters.pod = Some(ObjectKey::new(namespace, name));
        }
        if !ignore_unknown {
            for key in unknown {
                self.problem("CNI_ARGS", key, "is not known; IgnoreUnknown=1 lets it pass");
            }
        }
    }
}

/// The specification's form of container IDs and network names.
pub(crate) fn is_identifier(text: &str) -> bool {
    text.len() <= CONTAINER_ID_BYTES_MAX
        && text.starts_with(|character: char| character.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn is_interface_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= INTERFACE_NAME_BYTES_MAX
        && text != "."
        && text != ".."
        && !text.contains(|character: char| {
            character == '/' || character == ':' || character.is_whitespace() || character.is_control()
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use proptest::prelude::*;

    fn environment(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    const ADD: [(&str, &str); 4] =
        [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c0ffee"), ("CNI_NETNS", "/run/netns/a"), ("CNI_IFNAME", "eth0")];

    #[test]
    fn every_missing_variable_is_named() {
        let error = Parameters::from_environment(&environment(&[("CNI_COMMAND", "ADD")])).unwrap_err();
        assert_eq!(error.code.number(), 4);
        assert_eq!(error.message, "CNI_CONTAINERID is missing; CNI_IFNAME is missing; CNI_NETNS is missing");
        let error = Parameters::from_environment(&environment(&[])).unwrap_err();
        assert_eq!(error.message, "CNI_COMMAND is missing");
    }

    #[test]
    fn del_needs_no_namespace_and_status_needs_nothing() {
        let parameters = Parameters::from_environment(&environment(&[
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", "c0ffee"),
            ("CNI_IFNAME", "eth0"),
        ]));
        assert_eq!(parameters.unwrap().namespace_path, "");
        for verb in ["STATUS", "GC", "VERSION"] {
            assert!(Parameters::from_environment(&environment(&[("CNI_COMMAND", verb)])).is_ok());
        }
    }

    #[test]
    fn bad_names_are_refused() {
        for (name, value) in [
            ("CNI_CONTAINERID", "-a"),
            ("CNI_CONTAINERID", "a/b"),
            ("CNI_IFNAME", ".."),
            ("CNI_IFNAME", "sixteen-bytes-xx"),
            ("CNI_IFNAME", "a b"),
            ("CNI_IFNAME", "a:b"),
            ("CNI_NETNS", "relative"),
            ("CNI_ARGS", "novalue"),
            ("CNI_ARGS", "FOO=1"),
            ("CNI_ARGS", "MAC=zz"),
        ] {
            let mut environment = environment(&ADD);
            environment.insert(name.to_owned(), value.to_owned());
            let error = Parameters::from_environment(&environment).unwrap_err();
            assert!(error.message.contains(name), "{name}={value}: {error}");
        }
    }

    #[test]
    fn the_pod_is_read_from_the_arguments() {
        let mut environment = environment(&ADD);
        let arguments =
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-1;K8S_POD_UID=u;X=y;MAC=02:00:00:00:00:01";
        environment.insert("CNI_ARGS".to_owned(), arguments.to_owned());
        let parameters = Parameters::from_environment(&environment).unwrap();
        assert_eq!(parameters.pod, Some(ObjectKey::new("shop", "cart-1")));
        assert_eq!(parameters.mac.map(|mac| mac.to_string()), Some("02:00:00:00:00:01".to_owned()));
    }

    proptest! {
        #[test]
        fn any_environment_is_read_or_refused(
            verb in "(ADD|DEL|CHECK|GC|STATUS|VERSION|add|)",
            container: String, namespace: String, interface: String, arguments in "[A-Z8_=;a-z0-9:]*",
        ) {
            let environment = environment(&[
                ("CNI_COMMAND", &verb), ("CNI_CONTAINERID", &container), ("CNI_NETNS", &namespace),
                ("CNI_IFNAME", &interface), ("CNI_ARGS", &arguments),
            ]);
            match Parameters::from_environment(&environment) {
                Ok(parameters) => prop_assert_eq!(parameters.command.as_str(), verb),
                Err(error) => prop_assert_eq!(error.code, crate::ErrorCode::InvalidEnvironment),
            }
        }
    }
}
