//! The way of a packet through netfilter's hooks, for every room whose interpreter looks at one hook at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use portolan_net::{Packet, Protocol};

use crate::answer::{Answer, From, Question};
use crate::cluster::{BRIDGE, Cluster, UPLINK};

/// A hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// What is true around the packet.
#[derive(Debug, Clone)]
pub(super) struct Around {
    /// The node's own addresses.
    pub(super) local: Vec<IpAddr>,
    /// By which link it came.
    pub(super) came_by: Option<&'static str>,
    /// By which link it leaves, and the address that it would leave with.
    pub(super) leaves_by: Option<(&'static str, IpAddr)>,
    /// Whether its destination was translated before.
    pub(super) translated: bool,
    /// Where the packet went before that.
    pub(super) original: SocketAddr,
    /// The endpoint to choose, where there is a choice.
    pub(super) prefer: Option<SocketAddr>,
}

/// What a room says of it.
#[derive(Debug, Clone)]
pub(super) struct Passed {
    pub(super) verdict: Verdict,
    pub(super) packet: Packet,
    /// The endpoints that could have been chosen here.
    pub(super) possible: BTreeSet<SocketAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    Drop,
    Reject,
}

/// A room's interpreter.
pub(super) type Interpreter<'a> = dyn Fn(Hook, Packet, &Around) -> Passed + 'a;

/// The answer of a room: once to learn which endpoints are possible, and then once for each of them.
pub(super) fn answer(cluster: &Cluster, question: &Question, interpreter: &Interpreter<'_>) -> Answer {
    let first = walk(cluster, question, None, interpreter);
    let Way::Forwarded { possible, .. } = &first else { return first.without_endpoints() };
    let mut answers = BTreeMap::new();
    for endpoint in possible {
        match walk(cluster, question, Some(*endpoint), interpreter) {
            Way::Forwarded { to, masquerade, .. } if to == *endpoint => answers.insert(to, masquerade),
            // The comparison shows it: a way that depends on the endpoint is no answer of the specification.
            other => return other.without_endpoints(),
        };
    }
    Answer::Forward(answers)
}

enum Way {
    Untouched,
    Rejected,
    Dropped,
    Forwarded { to: SocketAddr, possible: BTreeSet<SocketAddr>, masquerade: bool },
}

impl Way {
    fn without_endpoints(self) -> Answer {
        match self {
            Way::Untouched => Answer::Untouched,
            Way::Rejected => Answer::Reject,
            Way::Dropped => Answer::Drop,
            Way::Forwarded { to, masquerade, .. } => Answer::Forward(BTreeMap::from([(to, masquerade)])),
        }
    }
}

fn walk(cluster: &Cluster, question: &Question, prefer: Option<SocketAddr>, interpreter: &Interpreter<'_>) -> Way {
    let local = cluster.local_addresses();
    // The address that a link would give; nobody asks under it.
    let own = if question.destination.is_ipv4() { "192.0.2.254" } else { "2001:db8:ffff::fe" };
    let own = own.parse().unwrap();
    let mut around = Around {
        local: local.clone(),
        came_by: match question.from {
            From::Pod => Some(BRIDGE),
            From::Outside => Some(UPLINK),
            From::Node => None,
        },
        leaves_by: None,
        translated: false,
        original: SocketAddr::new(question.destination, question.port.get()),
        prefer,
    };
    let original = question.packet();
    let start = if question.from == From::Node { Hook::Output } else { Hook::Prerouting };
    if start == Hook::Output {
        around.leaves_by = Some((UPLINK, own));
    }
    let first = interpreter(start, original, &around);
    let possible = first.possible;
    let mut packet = first.packet;
    let mut verdict = first.verdict;
    around.translated =
        (packet.destination, packet.destination_port) != (original.destination, original.destination_port);
    if start == Hook::Prerouting && verdict == Verdict::Accept {
        let is_local = local.contains(&packet.destination);
        if !is_local {
            around.leaves_by = Some((UPLINK, own));
        }
        let next = interpreter(if is_local { Hook::Input } else { Hook::Forward }, packet, &around);
        (packet, verdict) = (next.packet, next.verdict);
    }
    match verdict {
        Verdict::Accept => {}
        Verdict::Drop => return Way::Dropped,
        Verdict::Reject => return Way::Rejected,
    }
    // What is delivered to the node itself does not come by here; that it would be masqueraded is known all the same.
    around.leaves_by = Some((UPLINK, own));
    let left = interpreter(Hook::Postrouting, packet, &around);
    if left.verdict != Verdict::Accept {
        return Way::Dropped;
    }
    let masquerade = left.packet.source != original.source;
    if !around.translated {
        debug_assert!(question.protocol != Protocol::Icmp, "nobody asks by ICMP");
        return Way::Untouched;
    }
    let to = SocketAddr::new(left.packet.destination, left.packet.destination_port);
    Way::Forwarded { to, possible, masquerade }
}
