//! Which etcd to use, and how: endpoints, TLS, user, and the part of the keys that is ours.
//!
//! As text it is `etcd=URL[,URL…]`, where the last URL may end with a key prefix and options:
//! `etcd=https://10.0.0.1:2379,https://10.0.0.2:2379/portolan?ca=/etc/ca.crt&certificate=/etc/me.crt&key=/etc/me.key`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::error::StoreError;
use crate::limits::ETCD_REQUEST_TIMEOUT;

/// The port of etcd's clients when a URL names none.
const CLIENT_PORT: u16 = 2379;

/// One member's address for clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdEndpoint {
    /// Whether it speaks TLS.
    pub is_tls: bool,
    /// Host and port; an IPv6 address in brackets.
    pub authority: String,
}

impl fmt::Display for EtcdEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.is_tls { "https" } else { "http" }, self.authority)
    }
}

/// Files for TLS, in PEM form.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EtcdTls {
    /// Who signs the members' certificates; without it whom the system trusts.
    pub authority: Option<PathBuf>,
    /// Our certificate, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A user of etcd's own accounts.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdCredentials {
    /// The name.
    pub user: String,
    /// The password.
    pub password: String,
}

impl fmt::Debug for EtcdCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdCredentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// Which etcd to use, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// The members, in the order in which they are tried.
    pub endpoints: Vec<EtcdEndpoint>,
    /// Files for TLS.
    pub tls: EtcdTls,
    /// The user, where etcd has accounts.
    pub credentials: Option<EtcdCredentials>,
    /// How long a request may take, with all its retries.
    pub request_timeout: Duration,
    /// What every key begins with in etcd, and nothing outside sees. Empty for none.
    pub prefix: String,
}

impl EtcdConfig {
    /// The usual settings for some endpoints.
    pub fn new(endpoints: Vec<EtcdEndpoint>) -> Self {
        Self {
            endpoints,
            tls: EtcdTls::default(),
            credentials: None,
            request_timeout: ETCD_REQUEST_TIMEOUT,
            prefix: String::new(),
        }
    }

    fn set(&mut self, option: &str) -> Result<(), StoreError> {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let value = decode(value)?;
        if value.is_empty() {
            return Err(refused(format!("the option {name:?} has no value")));
        }
        let identity = self.tls.identity.get_or_insert_default();
        match name {
            "ca" => self.tls.authority = Some(value.into()),
            "certificate" => identity.0 = value.into(),
            "key" => identity.1 = value.into(),
            "user" => self.credentials_mut().user = value,
            "password-file" => {
                let read = std::fs::read_to_string(&value);
                let read = read.map_err(|error| refused(format!("the password file {value:?}: {error}")))?;
                read.trim_end_matches(['\r', '\n']).clone_into(&mut self.credentials_mut().password);
            }
            "timeout" => {
                let seconds = value.strip_suffix('s').unwrap_or(&value).parse::<u64>().ok().filter(|it| *it > 0);
                let seconds = seconds.ok_or_else(|| refused(format!("timeout={value}: use whole seconds, as 5s")))?;
                self.request_timeout = Duration::from_secs(seconds);
            }
            _ => {
                return Err(refused(format!(
                    "the option {name:?} is not known; there are ca, certificate, key, user, password-file, timeout"
                )));
            }
        }
        Ok(())
    }

    fn credentials_mut(&mut self) -> &mut EtcdCredentials {
        let nobody = EtcdCredentials { user: String::new(), password: String::new() };
        self.credentials.get_or_insert(nobody)
    }

    /// Drops what was not given, and looks whether the rest fits together.
    fn settle(mut self) -> Result<Self, StoreError> {
        let is_empty = |path: &Path| path.as_os_str().is_empty();
        match &self.tls.identity {
            Some((certificate, key)) if is_empty(certificate) && is_empty(key) => self.tls.identity = None,
            Some((certificate, key)) if is_empty(certificate) || is_empty(key) => {
                return Err(refused("certificate and key are needed both, or neither".to_owned()));
            }
            _ => {}
        }
        if self.credentials.as_ref().is_some_and(|it| it.user.is_empty()) {
            return Err(refused("there is a password and no user".to_owned()));
        }
        let wants_tls = self.tls != EtcdTls::default();
        if wants_tls && self.endpoints.iter().all(|endpoint| !endpoint.is_tls) {
            return Err(refused("certificates are given, and no URL is https".to_owned()));
        }
        Ok(self)
    }
}

impl FromStr for EtcdConfig {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let text = text.strip_prefix("etcd=").unwrap_or(text);
        let has_password = text.contains('@');
        let (text, options) = text.split_once('?').unwrap_or((text, ""));
        let mut config = Self::new(Vec::new());
        let urls: Vec<&str> = text.split(',').collect();
        for (index, url) in urls.iter().enumerate() {
            let shown = |part: &str| shown(part, index, has_password);
            let (scheme, rest) = url.split_once("://").ok_or_else(|| {
                refused(format!("{} is no URL; use http://HOST:PORT or https://HOST:PORT", shown(url)))
            })?;
            let is_tls = match scheme {
                "http" => false,
                "https" => true,
                _ => return Err(refused(format!("the scheme of {} is neither http nor https", shown(url)))),
            };
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let path = path.trim_end_matches('/');
            if !path.is_empty() && index + 1 < urls.len() {
                return Err(refused(format!("the key prefix in {} belongs behind the last URL", shown(url))));
            }
            config.prefix = decode(path)?;
            let (user, authority) = authority.rsplit_once('@').map_or((None, authority), |(user, it)| (Some(user), it));
            if let Some(user) = user {
                let (user, password) = user.split_once(':').unwrap_or((user, ""));
                *config.credentials_mut() = EtcdCredentials { user: decode(user)?, password: decode(password)? };
            }
            config.endpoints.push(EtcdEndpoint { is_tls, authority: with_port(authority, &shown(authority))? });
        }
        for option in options.split('&').filter(|option| !option.is_empty()) {
            config.set(option).map_err(|error| if has_password { bad_option() } else { error })?;
        }
        config.settle()
    }
}

/// A part of a URL for an error message, which others may see. Where somebody logs in, no part is shown: with a
/// password in which `/`, `?` or `,` is not percent-encoded, a part of the password may be what is taken for a host.
fn shown(part: &str, index: usize, has_password: bool) -> String {
    if has_password { format!("URL {}, which has a password in it,", index + 1) } else { format!("{part:?}") }
}

/// What is said of an option where nothing may be shown.
fn bad_option() -> StoreError {
    refused(
        "an option behind the ? is not known or has a bad value; percent-encode / ? , and @ in a password".to_owned(),
    )
}

fn with_port(authority: &str, shown: &str) -> Result<String, StoreError> {
    let parsed = http::uri::Authority::from_str(authority);
    let parsed = parsed.map_err(|error| refused(format!("{shown} is no host and port: {error}")))?;
    let port = authority.strip_prefix(parsed.host()).unwrap_or_default();
    match parsed.port_u16() {
        _ if parsed.host().is_empty() => Err(refused(format!("{shown} names no host and port"))),
        Some(_) => Ok(authority.to_owned()),
        None if port.is_empty() => Ok(format!("{authority}:{CLIENT_PORT}")),
        None => Err(refused(format!("{shown} is no host and port: the port is no number up to 65535"))),
    }
}

/// Undoes percent-encoding (RFC 3986 section 2.1).
fn decode(text: &str) -> Result<String, StoreError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or_else(|| refused("a % is not followed by two hexadecimal digits".to_owned()))?);
        rest = &after[2..];
    }
    String::from_utf8(bytes).map_err(|_| refused("what is percent-encoded is not UTF-8".to_owned()))
}

pub(super) fn refused(reason: String) -> StoreError {
    StoreError::Configuration { reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> EtcdConfig {
        text.parse().unwrap()
    }

    #[test]
    fn everything_can_be_said_in_one_line() {
        let config = parse("etcd=https://me:p%40ss@one:1,https://[::1]/a/b/?ca=/ca&certificate=/c&key=/k&timeout=7s");
        let endpoints: Vec<String> = config.endpoints.iter().map(ToString::to_string).collect();
        assert_eq!(endpoints, ["https://one:1", "https://[::1]:2379"]);
        assert_eq!(config.prefix, "/a/b");
        assert_eq!(config.credentials, Some(EtcdCredentials { user: "me".into(), password: "p@ss".into() }));
        assert_eq!(config.tls, EtcdTls { authority: Some("/ca".into()), identity: Some(("/c".into(), "/k".into())) });
        assert_eq!(config.request_timeout, Duration::from_secs(7));
        assert!(!format!("{config:?}").contains("p@ss"));
    }

    #[test]
    fn little_is_enough() {
        let config = parse("http://127.0.0.1:2379");
        assert_eq!((config.prefix.as_str(), config.credentials, config.tls), ("", None, EtcdTls::default()));
    }

    #[test]
    fn a_password_may_be_in_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "secret\n").unwrap();
        let config = parse(&format!("etcd=http://h?user=me&password-file={}", file.path().display()));
        assert_eq!(config.credentials.unwrap().password, "secret");
    }

    #[test]
    fn what_cannot_work_is_refused_with_a_reason() {
        for (text, reason) in [
            ("etcd=", "is no URL"),
            ("etcd=ftp://h", "neither http nor https"),
            ("etcd=http://", "no host and port"),
            ("etcd=http://h:x", "no host"),
            ("etcd=http://h/a,http://i", "behind the last URL"),
            ("etcd=https://h?certificate=/c", "needed both"),
            ("etcd=http://h?ca=/c", "no URL is https"),
            ("etcd=http://h?colour=red", "not known"),
            ("etcd=http://h?timeout=soon", "whole seconds"),
            ("etcd=http://h?user=%4", "hexadecimal"),
            ("etcd=http://h?password-file=/nowhere", "/nowhere"),
        ] {
            let error = text.parse::<EtcdConfig>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn no_part_of_a_password_is_told() {
        for text in [
            "https://me:top/secret@h",
            "https://me:top?secret@h",
            "https://me:top,secret@h",
            "me:topsecret@h",
            "etcd=https://me:topsecret@h:port",
            "etcd=http://a/b,https://me:topsecret@h",
        ] {
            let error = text.parse::<EtcdConfig>().unwrap_err().to_string();
            assert!(!error.contains("top") && !error.contains("secret"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "(etcd=)?(https?://)?[a-z:@/?&=,%0-9\\[\\]]{0,40}") {
            if let Ok(config) = text.parse::<EtcdConfig>() {
                prop_assert!(!config.endpoints.is_empty());
            }
        }
    }
}
