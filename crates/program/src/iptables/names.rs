//! The names of chains, as kube-proxy makes them (`pkg/proxy/iptables/proxier.go`).

use std::net::SocketAddr;

use portolan_net::{ObjectKey, Protocol};
use sha2::{Digest, Sha256};

use super::ChainName;

/// How kube-proxy names one port of a Service: `namespace/name:port`, or `namespace/name` where the port has none.
pub fn service_port_name(service: &ObjectKey, port: &str) -> String {
    if port.is_empty() { service.to_string() } else { format!("{service}:{port}") }
}

/// The chain of endpoints anywhere: `KUBE-SVC-…`.
pub fn cluster_chain(service_port: &str, protocol: Protocol) -> ChainName {
    named("KUBE-SVC-", &[service_port, protocol.name()])
}

/// The chain of endpoints of this node: `KUBE-SVL-…`.
pub fn local_chain(service_port: &str, protocol: Protocol) -> ChainName {
    named("KUBE-SVL-", &[service_port, protocol.name()])
}

/// The chain of traffic from outside: `KUBE-EXT-…`.
pub fn external_chain(service_port: &str, protocol: Protocol) -> ChainName {
    named("KUBE-EXT-", &[service_port, protocol.name()])
}

/// The chain of who may connect: `KUBE-FW-…`.
pub fn firewall_chain(service_port: &str, protocol: Protocol) -> ChainName {
    named("KUBE-FW-", &[service_port, protocol.name()])
}

/// The chain of one endpoint: `KUBE-SEP-…`.
pub fn endpoint_chain(service_port: &str, protocol: Protocol, endpoint: &str) -> ChainName {
    named("KUBE-SEP-", &[service_port, protocol.name(), endpoint])
}

/// As [`endpoint_chain`], of a socket.
pub fn endpoint_chain_of(service_port: &str, protocol: Protocol, endpoint: SocketAddr) -> ChainName {
    endpoint_chain(service_port, protocol, &endpoint.to_string())
}

/// A prefix, and the first characters of the SHA-256 of all parts in Base32.
fn named(prefix: &'static str, parts: &[&str]) -> ChainName {
    let mut hasher = Sha256::new();
    parts.iter().for_each(|part| hasher.update(part.as_bytes()));
    let digest = hasher.finalize();
    let mut first = [0; 10];
    first.iter_mut().zip(digest).for_each(|(byte, it)| *byte = it);
    ChainName::of_hash(prefix, first)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names that are printed in many published `iptables-save`s.
    #[test]
    fn names_are_those_of_kube_proxy() {
        let chain = |service: ObjectKey, port: &str, protocol| {
            cluster_chain(&service_port_name(&service, port), protocol).to_string()
        };
        let dns = || ObjectKey::new("kube-system", "kube-dns");
        assert_eq!(chain(dns(), "dns", Protocol::Udp), "KUBE-SVC-TCOU7JCQXEZGVUNU");
        assert_eq!(chain(dns(), "dns-tcp", Protocol::Tcp), "KUBE-SVC-ERIFXISQEP7F7OF4");
        assert_eq!(chain(dns(), "metrics", Protocol::Tcp), "KUBE-SVC-JD5MR3NA4I4DYORP");
        let api = ObjectKey::new("default", "kubernetes");
        assert_eq!(chain(api, "https", Protocol::Tcp), "KUBE-SVC-NPX46M4PTMTKRN6Y");
    }

    #[test]
    fn a_port_without_a_name_has_no_colon() {
        let service = ObjectKey::new("default", "web");
        assert_eq!(service_port_name(&service, ""), "default/web");
        assert_eq!(cluster_chain("default/web", Protocol::Tcp).text().len(), 25);
    }
}
