//! What is asked of a node, and what it answers.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use portolan_net::{Family, Packet, Port, Protocol};

/// By which way a packet comes to the node's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum From {
    /// By the bridge of this node's pods.
    Pod,
    /// From a process on the node.
    Node,
    /// By the uplink: other nodes, their pods, everybody else.
    Outside,
}

impl From {
    pub(crate) const ALL: [From; 3] = [From::Pod, From::Node, From::Outside];

    pub(crate) fn name(self) -> &'static str {
        match self {
            From::Pod => "pod",
            From::Node => "node",
            From::Outside => "outside",
        }
    }
}

/// The first packet of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Question {
    pub(crate) from: From,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) port: Port,
    pub(crate) protocol: Protocol,
}

impl Question {
    pub(crate) fn family(&self) -> Family {
        Family::of(self.destination)
    }

    pub(crate) fn packet(&self) -> Packet {
        Packet {
            source: self.source,
            destination: self.destination,
            protocol: self.protocol,
            source_port: 41_022,
            destination_port: self.port.get(),
            mark: 0,
        }
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let to = SocketAddr::new(self.destination, self.port.get());
        write!(f, "from {} {} to {to}/{}", self.from.name(), self.source, self.protocol)
    }
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// No Service is meant, and no rule of a Service touches it.
    Untouched,
    /// The sender is told.
    Reject,
    /// It is lost without a word.
    Drop,
    /// It goes to one of these; with each, whether the endpoint sees the node's address instead of the client's.
    Forward(BTreeMap<SocketAddr, bool>),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints = match self {
            Answer::Untouched => return f.write_str("untouched"),
            Answer::Reject => return f.write_str("reject"),
            Answer::Drop => return f.write_str("drop"),
            Answer::Forward(endpoints) => endpoints,
        };
        let all = endpoints.values().all(|masquerade| *masquerade);
        let one = |(endpoint, masquerade): (&SocketAddr, &bool)| match (*masquerade && !all, endpoints.len()) {
            (true, _) => format!("{endpoint}(masquerade)"),
            (false, _) => endpoint.to_string(),
        };
        let list: Vec<String> = endpoints.iter().map(one).collect();
        write!(f, "forward {}{}", list.join(","), if all { " masquerade" } else { "" })
    }
}
