//! Versions of the specification.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::{CniError, Command};

/// A version of the specification that is spoken here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Version {
    /// Lists of plugins, and results with interfaces.
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// Adds CHECK, and the previous result on DEL.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// Drops `version` from the addresses of a result.
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// Adds GC and STATUS, and more fields to interfaces and routes.
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    /// Every version, oldest first: what VERSION answers.
    pub const ALL: [Version; 4] = [Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

    /// The newest version.
    pub const NEWEST: Version = Version::V1_1_0;

    /// The version as `cniVersion` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    /// Reads `cniVersion`. A configuration without one means 0.1.0, as in the specification's own
    /// library, and that is too old.
    pub fn parse(text: Option<&str>) -> Result<Version, CniError> {
        let text = text.unwrap_or("0.1.0");
        Version::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            CniError::incompatible_version(format!("cniVersion `{text}` is not supported"))
                .with_details("set cniVersion in the network configuration to 0.3.1, 0.4.0, 1.0.0 or 1.1.0")
        })
    }

    /// Whether a verb exists in this version.
    pub fn allows(self, command: Command) -> bool {
        self >= command.since()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    #[test]
    fn a_configuration_without_a_version_is_refused_with_code_1() {
        assert_eq!(Version::parse(None).unwrap_err().code.number(), 1);
        assert_eq!(Version::parse(Some("0.2.0")).unwrap_err().code.number(), 1);
        assert_eq!(Version::parse(Some("1.1.0")), Ok(Version::V1_1_0));
    }

    proptest! {
        #[test]
        fn any_text_is_a_version_or_refused(text: String) {
            let parsed = Version::parse(Some(&text));
            prop_assert_eq!(parsed.is_ok(), Version::ALL.iter().any(|version| version.as_str() == text));
        }
    }
}
