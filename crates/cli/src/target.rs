//! What a user means by FROM and TO.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use portolan_net::ObjectKey;

/// A place in the cluster or outside it, as the user typed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// `pod/[NS/]NAME`: a pod, or the first whose name begins so.
    Pod(ObjectKey),
    /// `svc/[NS/]NAME[:PORT]`: a Service, by a port's number or name.
    Service(ObjectKey, Option<String>),
    /// `node/NAME`.
    Node(String),
    /// `client/NAME`: a machine outside the cluster, in a lab.
    Client(String),
    /// `IP[:PORT]`.
    Address(IpAddr, Option<u16>),
    /// `http://HOST[:PORT]/PATH`.
    Url {
        /// The host: a name of the cluster's DNS, or an address.
        host: String,
        /// The port; 80 by default.
        port: u16,
    },
}

/// A text that is no target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NotATarget(String);

impl std::fmt::Display for NotATarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}` is not a target: use pod/[NAMESPACE/]NAME, svc/[NAMESPACE/]NAME[:PORT], node/NAME, client/NAME, \
             IP[:PORT] or http://HOST/PATH",
            self.0
        )
    }
}

impl std::error::Error for NotATarget {}

impl FromStr for Target {
    type Err = NotATarget;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotATarget(text.to_owned());
        if let Some(rest) = text.strip_prefix("http://") {
            return url(rest).ok_or_else(wrong);
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Target::Address(address, None));
        }
        if let Ok(socket) = text.parse::<SocketAddr>() {
            return Ok(Target::Address(socket.ip(), Some(socket.port())));
        }
        let (kind, rest) = text.split_once('/').filter(|(_, rest)| !rest.is_empty()).ok_or_else(wrong)?;
        match kind {
            "pod" | "pods" | "po" => Ok(Target::Pod(key(rest).ok_or_else(wrong)?)),
            "svc" | "service" | "services" => {
                let (name, port) = match rest.split_once(':') {
                    Some((name, port)) if !port.is_empty() => (name, Some(port.to_owned())),
                    Some(_) => return Err(wrong()),
                    None => (rest, None),
                };
                Ok(Target::Service(key(name).ok_or_else(wrong)?, port))
            }
            "node" | "nodes" | "no" => Ok(Target::Node(rest.to_owned())),
            "client" => Ok(Target::Client(rest.to_owned())),
            _ => Err(wrong()),
        }
    }
}

fn key(text: &str) -> Option<ObjectKey> {
    match text.split('/').collect::<Vec<_>>().as_slice() {
        [name] if !name.is_empty() => Some(ObjectKey::new("default", *name)),
        [namespace, name] if !namespace.is_empty() && !name.is_empty() => Some(ObjectKey::new(*namespace, *name)),
        _ => None,
    }
}

fn url(rest: &str) -> Option<Target> {
    let authority = rest.split('/').next().filter(|authority| !authority.is_empty())?;
    if let Ok(socket) = authority.parse::<SocketAddr>() {
        return Some(Target::Url { host: socket.ip().to_string(), port: socket.port() });
    }
    let bare = authority.trim_start_matches('[').trim_end_matches(']');
    if bare.parse::<IpAddr>().is_ok() {
        return Some(Target::Url { host: bare.to_owned(), port: 80 });
    }
    match authority.split_once(':') {
        Some((host, port)) => Some(Target::Url { host: host.to_owned(), port: port.parse().ok()? }),
        None => Some(Target::Url { host: authority.to_owned(), port: 80 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read() {
        let key = |namespace: &str, name: &str| ObjectKey::new(namespace, name);
        let cases = [
            ("pod/web-1", Target::Pod(key("default", "web-1"))),
            ("pod/shop/web-1", Target::Pod(key("shop", "web-1"))),
            ("svc/cart", Target::Service(key("default", "cart"), None)),
            ("svc/shop/cart:http", Target::Service(key("shop", "cart"), Some("http".into()))),
            ("node/node-1", Target::Node("node-1".into())),
            ("client/client-1", Target::Client("client-1".into())),
            ("10.0.0.1", Target::Address("10.0.0.1".parse().unwrap(), None)),
            ("10.0.0.1:80", Target::Address("10.0.0.1".parse().unwrap(), Some(80))),
            ("fd00::1", Target::Address("fd00::1".parse().unwrap(), None)),
            ("[fd00::1]:80", Target::Address("fd00::1".parse().unwrap(), Some(80))),
            ("http://cart.default/x", Target::Url { host: "cart.default".into(), port: 80 }),
            ("http://cart:7070", Target::Url { host: "cart".into(), port: 7070 }),
            ("http://[fd00::1]:8080/", Target::Url { host: "fd00::1".into(), port: 8080 }),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_none_is_refused_with_the_forms() {
        for text in ["", "pod/", "pod//x", "svc/cart:", "pods", "http://", "a/b/c/d", "deploy/x"] {
            let error = text.parse::<Target>().unwrap_err().to_string();
            assert!(error.contains("svc/[NAMESPACE/]NAME[:PORT]"), "{error}");
        }
    }
}
