//! Errors with the specification's codes ("Error").

use alloc::borrow::ToOwned;
use alloc::string::String;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What a runtime can tell errors apart by. 1 to 99 belong to the specification, the rest to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "u32", into = "u32")]
pub enum ErrorCode {
    /// 1: the version, or a verb that this version does not have.
    IncompatibleVersion,
    /// 2: a field that is valid but cannot be honoured.
    UnsupportedField,
    /// 3: the container is unknown or gone; the runtime need not call DEL.
    UnknownContainer,
    /// 4: an environment variable is missing or bad.
    InvalidEnvironment,
    /// 5: reading or writing failed.
    Io,
    /// 6: content cannot be decoded.
    Decode,
    /// 7: the network configuration is invalid.
    InvalidConfiguration,
    /// 11: a condition that should clear up; try again.
    TryAgainLater,
    /// 50: ADD cannot be served now.
    NotAvailable,
    /// 51: ADD cannot be served now, and containers that exist may be cut off.
    LimitedConnectivity,
    /// 100: the same container and interface exist with another network namespace.
    AttachmentExists,
    /// 101: the interface is not as ADD's result said.
    AttachmentDiffers,
    /// 102: the node's pod prefix has no free address.
    AddressesExhausted,
    /// 103: the kernel refused the interface.
    WiringFailed,
    /// Any other number.
    Other(u32),
}

impl ErrorCode {
    /// The number.
    pub fn number(self) -> u32 {
        match self {
            ErrorCode::IncompatibleVersion => 1,
            ErrorCode::UnsupportedField => 2,
            ErrorCode::UnknownContainer => 3,
            ErrorCode::InvalidEnvironment => 4,
            ErrorCode::Io => 5,
            ErrorCode::Decode => 6,
            ErrorCode::InvalidConfiguration => 7,
            ErrorCode::TryAgainLater => 11,
            ErrorCode::NotAvailable => 50,
            ErrorCode::LimitedConnectivity => 51,
            ErrorCode::AttachmentExists => 100,
            ErrorCode::AttachmentDiffers => 101,
            ErrorCode::AddressesExhausted => 102,
            ErrorCode::WiringFailed => 103,
            ErrorCode::Other(number) => number,
        }
    }
}

impl From<u32> for ErrorCode {
    fn from(number: u32) -> ErrorCode {
        match number {
            1 => ErrorCode::IncompatibleVersion,
            2 => ErrorCode::UnsupportedField,
            3 => ErrorCode::UnknownContainer,
            4 => ErrorCode::InvalidEnvironment,
            5 => ErrorCode::Io,
            6 => ErrorCode::Decode,
            7 => ErrorCode::InvalidConfiguration,
            11 => ErrorCode::TryAgainLater,
            50 => ErrorCode::NotAvailable,
            51 => ErrorCode::LimitedConnectivity,
            100 => ErrorCode::AttachmentExists,
            101 => ErrorCode::AttachmentDiffers,
            102 => ErrorCode::AddressesExhausted,
            103 => ErrorCode::WiringFailed,
            other => ErrorCode::Other(other),
        }
    }
}

impl From<ErrorCode> for u32 {
    fn from(code: ErrorCode) -> u32 {
        code.number()
    }
}

/// Why a call failed: a code for the runtime, a message and what to do for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct CniError {
    /// What the runtime tells errors apart by.
    pub code: ErrorCode,
    /// What happened, and why.
    pub message: String,
    /// What to do about it; may be empty.
    #[serde(default)]
    pub details: String,
}

/// One constructor per code, so that a call site reads like the specification.
macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $code:ident;)*) => {
        $($(#[$doc])*
        pub fn $name(message: impl Into<String>) -> CniError {
            CniError { code: ErrorCode::$code, message: message.into(), details: String::new() }
        })*
    };
}

impl CniError {
    constructors! {
        /// Code 1.
        incompatible_version => IncompatibleVersion;
        /// Code 2.
        unsupported_field => UnsupportedField;
        /// Code 3.
        unknown_container => UnknownContainer;
        /// Code 4.
        invalid_environment => InvalidEnvironment;
        /// Code 5.
        io => Io;
        /// Code 6.
        decode => Decode;
        /// Code 7.
        invalid_configuration => InvalidConfiguration;
        /// Code 11.
        try_again_later => TryAgainLater;
        /// Code 50.
        not_available => NotAvailable;
        /// Code 51.
        limited_connectivity => LimitedConnectivity;
        /// Code 100.
        attachment_exists => AttachmentExists;
        /// Code 101.
        attachment_differs => AttachmentDiffers;
        /// Code 102.
        addresses_exhausted => AddressesExhausted;
        /// Code 103.
        wiring_failed => WiringFailed;
    }

    /// The same error with advice.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> CniError {
        self.details = details.into();
        self
    }

    /// The JSON that a plugin prints. `version` is what the configuration asked for, even where it
    /// is one that is not spoken here.
    pub fn render(&self, version: &str) -> Value {
        let mut object = json!({ "cniVersion": version, "code": self.code.number(), "msg": self.message });
        if let (Value::Object(fields), false) = (&mut object, self.details.is_empty()) {
            fields.insert("details".to_owned(), Value::String(self.details.clone()));
        }
        object
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn codes_round_trip(number: u32) {
            prop_assert_eq!(ErrorCode::from(number).number(), number);
        }
    }

    #[test]
    fn renders_as_the_specification_says() {
        let error =
            CniError::unsupported_field("runtimeConfig.ips=10.0.0.1 is not supported").with_details("remove it");
        assert_eq!(
            error.render("1.0.0").to_string(),
            r#"{"cniVersion":"1.0.0","code":2,"msg":"runtimeConfig.ips=10.0.0.1 is not supported","details":"remove it"}"#
        );
    }
}
