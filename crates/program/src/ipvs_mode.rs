//! The `ipvs` mode as a whole: its chains, sets and virtual servers, in the order in which the kernel asks them.
//!
//! ```text
//!  arrives    PREROUTING ─▶ INPUT ───────────┐
//!                                            ├─▶ IPVS ─▶ OUTPUT, but nat ─▶ POSTROUTING
//!  is sent    OUTPUT raw, mangle, nat ───────┘
//! ```
//!
//! IPVS looks at packets for this node behind `filter` of `INPUT`, and at those that the node sends behind `nat` of
//! `OUTPUT` (`ip_vs_ops4` in `net/netfilter/ipvs/ip_vs_core.c`: `NF_IP_PRI_NAT_SRC - 1`, `NF_IP_PRI_NAT_DST + 2`).
//! What it sends to a real server leaves as if the node had sent it (`ip_vs_nat_send_or_cont`): it does not meet
//! `FORWARD`, and not `nat` of `OUTPUT` either, since where the connection goes is settled.
//!
//! Rooms do not know each other. This is what they are together, for the tests' judge and for the tracer.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use portolan_net::{Family, ObjectKind, Origin, Packet, Protocol};

use crate::iptables::{self, NotUnderstood, SetPart, TableName};
use crate::{ipset, ipvs};

/// Built-in chains that a packet which arrives meets before IPVS.
const ARRIVING: &[(TableName, &str)] = &[
    (TableName::Raw, "PREROUTING"),
    (TableName::Mangle, "PREROUTING"),
    (TableName::Nat, "PREROUTING"),
    (TableName::Mangle, "INPUT"),
    (TableName::Filter, "INPUT"),
    (TableName::Security, "INPUT"),
];

/// Built-in chains that a packet which the node sends meets before IPVS.
const SENT: &[(TableName, &str)] =
    &[(TableName::Raw, "OUTPUT"), (TableName::Mangle, "OUTPUT"), (TableName::Nat, "OUTPUT")];

/// Built-in chains that every packet meets behind IPVS.
const BEHIND: &[(TableName, &str)] = &[
    (TableName::Raw, "OUTPUT"),
    (TableName::Mangle, "OUTPUT"),
    (TableName::Filter, "OUTPUT"),
    (TableName::Security, "OUTPUT"),
    (TableName::Mangle, "POSTROUTING"),
    (TableName::Nat, "POSTROUTING"),
];

/// The chain that drops clients whom a load balancer's source ranges do not hold.
const SOURCE_RANGES: &str = "KUBE-SOURCE-RANGES-FIREWALL";

/// The programs of the mode.
#[derive(Debug, Clone, Copy)]
pub struct Programs<'a> {
    /// Who is masqueraded, refused and dropped.
    pub chains: &'a iptables::Program,
    /// What the chains look packets up in.
    pub sets: &'a ipset::Program,
    /// Who serves.
    pub servers: &'a ipvs::Program,
}

/// What is true around a packet and not in it.
#[derive(Debug, Clone, Copy)]
pub struct Environment<'a> {
    /// The interface that it comes by; nothing where this node sends it.
    pub in_interface: Option<&'a str>,
    /// The interface that it leaves by, where that is known.
    pub out_interface: Option<&'a str>,
    /// The node's own addresses, besides those of the dummy link.
    pub own_addresses: &'a [IpAddr],
}

/// What becomes of the first packet of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// What becomes of it.
    pub verdict: Verdict,
    /// The Service that it is for.
    pub origin: Option<Origin>,
    /// Rules that it met and that were passed over. The outcome is only certain where there are none.
    pub not_understood: BTreeSet<NotUnderstood>,
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is no business of IPVS, and goes where it was sent.
    Pass {
        /// Whether its source becomes the node's.
        masqueraded: bool,
    },
    /// IPVS sends it to one of these.
    Forward {
        /// All real servers that could be chosen, in the order of their addresses.
        ways: Vec<Way>,
        /// Whether the client is sent to the same one for some time.
        keeps_endpoint: bool,
    },
    /// It ends here.
    Refused(Refusal),
}

/// A real server, and what becomes of a packet that is sent there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// Where the packet goes.
    pub endpoint: SocketAddr,
    /// The real server's share.
    pub weight: u32,
    /// The object that names the endpoint.
    pub origin: Option<Origin>,
    /// Whether the packet's source becomes the node's when it leaves.
    pub masqueraded: bool,
    /// What ends it behind IPVS. Nothing of ours does.
    pub refusal: Option<Refusal>,
}

/// Why a packet ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// The virtual server has no real server: ICMP port unreachable.
    NoEndpoint,
    /// The address is a Service's and the port is not: rejected.
    NoSuchPort,
    /// The client is in none of the load balancer's source ranges: dropped.
    SourceRanges,
    /// The policy is `Local`, and this node has no endpoint: dropped.
    NoLocalEndpoint,
}

impl Refusal {
    /// Whether the sender is told.
    pub fn is_told(self) -> bool {
        matches!(self, Refusal::NoEndpoint | Refusal::NoSuchPort)
    }
}

/// What becomes of the first packet of a connection. It is assumed that there is a route to every real server.
pub fn interpret(programs: &Programs<'_>, packet: &Packet, environment: &Environment<'_>) -> Outcome {
    let mut run = Run::new(programs, packet, environment);
    let arrives = environment.in_interface.is_some();
    let before = run.chains(Some(if arrives { ARRIVING } else { SENT }), packet, environment.in_interface);
    let served = ipvs::interpret(programs.servers, &before.packet, environment.own_addresses);
    if let Some(refusal) = refusal_of(&before) {
        let origin = served.origin.or_else(|| service_at(programs.servers, packet.destination));
        return run.outcome(Verdict::Refused(refusal), origin);
    }
    let verdict = match served.verdict {
        ipvs::Verdict::Pass => {
            let whole = run.chains(None, packet, environment.in_interface);
            match refusal_of(&whole) {
                Some(refusal) => {
                    let origin = service_at(programs.servers, packet.destination);
                    return run.outcome(Verdict::Refused(refusal), origin);
                }
                None => Verdict::Pass { masqueraded: whole.masqueraded },
            }
        }
        ipvs::Verdict::Reject => Verdict::Refused(Refusal::NoEndpoint),
        ipvs::Verdict::Forward => Verdict::Forward {
            ways: served.alternatives.into_iter().map(|chosen| run.way(&before.packet, chosen)).collect(),
            keeps_endpoint: served.keeps_endpoint,
        },
    };
    run.outcome(verdict, served.origin)
}

struct Run<'a> {
    chains: &'a iptables::Program,
    environment: iptables::Environment,
    not_understood: BTreeSet<NotUnderstood>,
}

impl<'a> Run<'a> {
    fn new(programs: &Programs<'a>, packet: &Packet, environment: &Environment<'_>) -> Run<'a> {
        let served = ipvs::interpret(programs.servers, packet, environment.own_addresses);
        let environment = iptables::Environment {
            out_interface: environment.out_interface.map(str::to_owned),
            local_addresses: environment.own_addresses.iter().chain(&programs.servers.addresses).copied().collect(),
            sets: members(programs.sets, packet, served.alternatives.iter().map(|it| it.socket)),
            ..iptables::Environment::default()
        };
        Run { chains: programs.chains, environment, not_understood: BTreeSet::new() }
    }

    /// What the chains do to a packet; of the built-in ones either all or only some.
    fn chains(
        &mut self,
        built_in: Option<&[(TableName, &str)]>,
        packet: &Packet,
        in_interface: Option<&str>,
    ) -> iptables::Branch {
        self.environment.in_interface = in_interface.map(str::to_owned);
        let outcome = match built_in {
            Some(built_in) => iptables::interpret(&only(self.chains, built_in), packet, &self.environment),
            None => iptables::interpret(self.chains, packet, &self.environment),
        };
        self.not_understood.extend(outcome.not_understood);
        // Chains of this mode leave nothing to chance: there is one way through them.
        outcome.branches.into_iter().next().unwrap_or_else(|| iptables::Branch {
            packet: *packet,
            verdict: iptables::Verdict::Accept,
            backend: None,
            masqueraded: false,
            steps: Vec::new(),
        })
    }

    fn way(&mut self, packet: &Packet, chosen: ipvs::Alternative) -> Way {
        let endpoint = chosen.socket;
        let rewritten = Packet { destination: endpoint.ip(), destination_port: endpoint.port(), ..*packet };
        let behind = self.chains(Some(BEHIND), &rewritten, None);
        Way {
            endpoint,
            weight: chosen.weight,
            origin: chosen.origin,
            masqueraded: behind.masqueraded,
            refusal: refusal_of(&behind),
        }
    }

    fn outcome(self, verdict: Verdict, origin: Option<Origin>) -> Outcome {
        Outcome { verdict, origin, not_understood: self.not_understood }
    }
}

/// The program with only these of its built-in chains.
fn only(chains: &iptables::Program, built_in: &[(TableName, &str)]) -> iptables::Program {
    let mut program = chains.clone();
    for (key, table) in &mut program.tables {
        for chain in iptables::BUILT_IN {
            if !built_in.contains(&(key.name, chain)) {
                table.chains.remove(&iptables::ChainName::from(chain));
            }
        }
    }
    program
}

fn refusal_of(branch: &iptables::Branch) -> Option<Refusal> {
    let chain = branch.steps.last().map(|step| &*step.chain);
    match branch.verdict {
        iptables::Verdict::Accept => None,
        iptables::Verdict::Reject => Some(Refusal::NoSuchPort),
        iptables::Verdict::Drop if chain == Some(SOURCE_RANGES) => Some(Refusal::SourceRanges),
        iptables::Verdict::Drop => Some(Refusal::NoLocalEndpoint),
    }
}

/// The Service that an address is of, as a whole.
fn service_at(servers: &ipvs::Program, address: IpAddr) -> Option<Origin> {
    let (_, server) = servers.servers.iter().find(|(key, _)| key.address == address)?;
    let origin = server.origin.as_ref()?;
    (origin.kind == ObjectKind::Service).then(|| Origin::object(origin.kind, origin.key.clone()))
}

/// The sets' members as the chains' interpreter has them: of all those that the packet may be looked up in, also
/// after IPVS has sent it to one of the endpoints.
fn members(
    sets: &ipset::Program,
    packet: &Packet,
    endpoints: impl Iterator<Item = SocketAddr>,
) -> BTreeSet<(iptables::Name, Vec<SetPart>)> {
    let mut addresses = BTreeSet::from([packet.source, packet.destination]);
    let mut ports = BTreeSet::from([packet.source_port, packet.destination_port]);
    for endpoint in endpoints {
        addresses.insert(endpoint.ip());
        ports.insert(endpoint.port());
    }
    let mut members = BTreeSet::new();
    for (key, set) in sets.sets.iter().filter(|(key, _)| key.family == Family::of(packet.destination)) {
        let name: iptables::Name = key.name.name(key.family).into();
        for entry in set.entries.keys() {
            let parts = match *entry {
                ipset::Entry::Port(port) => {
                    let of = |protocol| (name.clone(), vec![SetPart::Port(protocol, port.get())]);
                    if ports.contains(&port.get()) {
                        members.extend([Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(of));
                    }
                    continue;
                }
                ipset::Entry::Ip(address)
                | ipset::Entry::IpPort(address, ..)
                | ipset::Entry::IpPortIp(address, ..)
                | ipset::Entry::IpPortNet(address, ..)
                    if !addresses.contains(&address) =>
                {
                    continue;
                }
                ipset::Entry::Ip(address) => vec![SetPart::Address(address)],
                ipset::Entry::IpPort(address, protocol, port) => {
                    vec![SetPart::Address(address), SetPart::Port(protocol, port.get())]
                }
                ipset::Entry::IpPortIp(address, protocol, port, second) => {
                    vec![SetPart::Address(address), SetPart::Port(protocol, port.get()), SetPart::Address(second)]
                }
                ipset::Entry::IpPortNet(address, protocol, port, prefix) => {
                    vec![SetPart::Address(address), SetPart::Port(protocol, port.get()), SetPart::Prefix(prefix)]
                }
            };
            members.insert((name.clone(), parts));
        }
    }
    members
}
