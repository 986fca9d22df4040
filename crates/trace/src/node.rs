//! One node's share of a trace: what its rooms' programs do to a packet, in the kernel's order.
//!
//! ```text
//!  pod or network ─▶ prerouting ─▶ route ─┬▶ input ─▶ this node
//!  this node ─▶ route ─▶ output ─▶ route ─┴▶ forward ─▶ postrouting ─▶ pod, tunnel or link
//! ```
//!
//! IPVS takes packets behind input and at output; what it sends to an endpoint goes by postrouting.

mod ipvs;

use std::net::{IpAddr, SocketAddr};

use portolan_net::{Family, NodeName, ObjectKind, Origin, Packet};
use portolan_program::netlink::{self, RouteDecision, Surroundings, ViaKind};
use portolan_program::nftables::{self, Environment, Hook, Outcome, Rejection, Verdict, What};
use portolan_program::{iptables, ipvs_mode};

use crate::hop::{Choice, Exit, Hop, Ingress, NodeTrace, Stage};

/// What a node's kernel holds, as far as it decides a packet's way.
#[derive(Debug)]
pub struct NodePrograms<'a> {
    /// The node.
    pub node: &'a NodeName,
    /// The netlink room's program.
    pub netlink: &'a netlink::Program,
    /// The nftables room's program.
    pub nftables: &'a nftables::Program,
    /// What serves Services.
    pub services: ServicesPrograms<'a>,
    /// What the node holds beside it.
    pub surroundings: &'a Surroundings,
}

/// What serves Services on a node.
#[derive(Debug, Clone, Copy, Default)]
pub enum ServicesPrograms<'a> {
    /// The nftables room's program, which is there in any mode.
    #[default]
    Nftables,
    /// The iptables room's program.
    Iptables(&'a iptables::Program),
    /// The programs of the `ipvs` mode.
    Ipvs(ipvs_mode::Programs<'a>),
}

/// What happens to a packet on this node.
pub fn trace_node(programs: &NodePrograms<'_>, packet: Packet, ingress: &Ingress, choice: Choice) -> NodeTrace {
    let in_interface = match ingress {
        Ingress::Pod => programs.netlink.pod_of(packet.source).map(in_interface_of),
        Ingress::Node | Ingress::Network => None,
    };
    let mut tracer = Tracer {
        programs,
        choice,
        hops: Vec::new(),
        packet,
        sent: packet,
        in_interface,
        origin: None,
        is_marked_by_chains: false,
        is_balanced: false,
    };
    let exit = match tracer.run(ingress) {
        Ok(exit) => exit,
        Err(refusal) => {
            tracer.hop(Stage::Refused, "", tracer.packet, refusal.reason.clone(), refusal.origin.iter().cloned());
            Exit::Refused { how: refusal.how, reason: refusal.reason, origin: refusal.origin }
        }
    };
    // Marks are a node's own.
    tracer.packet.mark = 0;
    for hop in &mut tracer.hops {
        (hop.before.mark, hop.after.mark) = (0, 0);
    }
    NodeTrace { hops: tracer.hops, packet: tracer.packet, exit }
}

/// The packet ends here.
struct Refusal {
    how: String,
    reason: String,
    origin: Option<Origin>,
}

struct Tracer<'a> {
    programs: &'a NodePrograms<'a>,
    choice: Choice,
    hops: Vec<Hop>,
    packet: Packet,
    /// The packet as it came to this node.
    sent: Packet,
    /// The link that it came by, as far as it is known.
    in_interface: Option<String>,
    /// The Service that the packet was meant for, once it is known.
    origin: Option<Origin>,
    /// Whether the iptables room's chains replace its source when it leaves.
    is_marked_by_chains: bool,
    /// Whether IPVS sent it to an endpoint.
    is_balanced: bool,
}

impl Tracer<'_> {
    fn run(&mut self, ingress: &Ingress) -> Result<Exit, Refusal> {
        match ingress {
            Ingress::Pod => {
                let pod = self.programs.netlink.pod_of(self.packet.source);
                let interface = pod.map_or_else(|| "eth0".to_owned(), |pod| pod.key.interface.to_string());
                self.hop(Stage::PodEgress, &interface, self.packet, String::new(), []);
                self.translate(Hook::Prerouting, None)?;
            }
            Ingress::Node => {
                self.choose_source()?;
                self.hop(Stage::NodeEgress, "", self.packet, String::new(), []);
                self.translate(Hook::Output, None)?;
            }
            Ingress::Network => self.translate(Hook::Prerouting, None)?,
        }
        match self.route(self.packet.destination) {
            RouteDecision::Local { device, .. } => {
                // IPVS has it behind this hook.
                if !self.is_balanced || *ingress == Ingress::Node {
                    self.filter(Hook::Input, None)?;
                }
                self.hop(Stage::NodeIngress, &device, self.packet, "delivered".to_owned(), []);
                Ok(Exit::Node)
            }
            RouteDecision::Unreachable { reason } => Err(Refusal {
                how: "no route".to_owned(),
                reason: format!("{reason}; see portolan show routes and portolan show problems"),
                origin: self.origin.clone(),
            }),
            RouteDecision::Via { device, gateway, kind, origin } => {
                // What the node itself sends has passed its output hook already; so has what IPVS sends.
                if *ingress != Ingress::Node && !self.is_balanced {
                    self.filter(Hook::Forward, Some(&device))?;
                }
                self.leave(&device, gateway, kind, origin)
            }
        }
    }

    /// The node's own packets take the address of the link that their first route leads to.
    fn choose_source(&mut self) -> Result<(), Refusal> {
        if !self.packet.source.is_unspecified() {
            return Ok(());
        }
        self.packet.source = match self.route(self.packet.destination) {
            RouteDecision::Local { address, .. } => address,
            RouteDecision::Via { device, gateway, .. } => {
                let towards = gateway.unwrap_or(self.packet.destination);
                self.address_on(&device, towards).ok_or_else(|| Refusal {
                    how: "no address".to_owned(),
                    reason: format!("{device} has no {} address to send from", self.packet.family()),
                    origin: None,
                })?
            }
            RouteDecision::Unreachable { reason } => {
                return Err(Refusal { how: "no route".to_owned(), reason: reason.to_string(), origin: None });
            }
        };
        self.sent.source = self.packet.source;
        Ok(())
    }

    /// A hook that may rewrite the destination.
    fn translate(&mut self, hook: Hook, out: Option<&str>) -> Result<(), Refusal> {
        match self.programs.services {
            ServicesPrograms::Nftables => {}
            ServicesPrograms::Iptables(chains) => return self.through_chains(chains, hook),
            ServicesPrograms::Ipvs(programs) => return self.through_ipvs(&programs, hook),
        }
        let before = self.packet;
        let outcome = self.at(hook, out);
        self.packet = outcome.packet;
        let chosen = outcome.steps.iter().find_map(|step| match &step.what {
            What::DestinationTranslated { chosen, of, .. } => Some((*chosen, *of)),
            _ => None,
        });
        // The element that the destination was found under is the Service's.
        let is_service = |origin: &&Origin| origin.kind == ObjectKind::Service;
        let service = outcome.steps.iter().filter_map(|step| step.origin.as_ref()).find(is_service).cloned();
        if service.is_some() {
            self.origin.clone_from(&service);
        }
        if let Some((chosen, of)) = chosen {
            let taken = SocketAddr::new(self.packet.destination, self.packet.destination_port);
            let endpoint = outcome.alternatives.iter().find(|it| it.socket == taken).and_then(|it| it.origin.clone());
            let mut origins: Vec<Origin> = service.into_iter().chain(endpoint).collect();
            origins.dedup();
            let kept = if outcome.keeps_endpoint { ", and the client keeps it" } else { "" };
            let detail = format!("{chosen} of {of}{kept}");
            self.hop(Stage::Services, "nftables", before, detail, origins);
            if let Some(hop) = self.hops.last_mut() {
                hop.alternatives = outcome.alternatives.iter().map(|it| it.socket).collect();
            }
        }
        self.verdict(&outcome)
    }

    /// The iptables room's chains, all of them at once: what it does on the way in decides what it does later.
    fn through_chains(&mut self, chains: &iptables::Program, hook: Hook) -> Result<(), Refusal> {
        let before = self.packet;
        let environment = iptables::Environment {
            in_interface: (hook == Hook::Prerouting).then(|| self.came_by()),
            local_addresses: self.environment(None).local_addresses,
            ..iptables::Environment::default()
        };
        let outcome = iptables::interpret(chains, &before, &environment);
        let wanted = |branch: &&iptables::Branch| match self.choice {
            Choice::First => true,
            Choice::Endpoint(endpoint) => branch.backend == Some(endpoint),
        };
        let Some(branch) = outcome.branches.iter().find(wanted).or(outcome.branches.first()) else { return Ok(()) };
        let mut origins: Vec<Origin> = branch.steps.iter().filter_map(|step| step.origin.clone()).collect();
        origins.dedup();
        let service = origins.iter().find(|origin| origin.kind == ObjectKind::Service).cloned();
        if service.is_some() {
            self.origin.clone_from(&service);
        }
        self.is_marked_by_chains = branch.masqueraded;
        if let Some(backend) = branch.backend {
            (self.packet.destination, self.packet.destination_port) = (backend.ip(), backend.port());
            let alternatives: Vec<SocketAddr> = outcome.backends().into_iter().collect();
            let number = alternatives.iter().position(|it| *it == backend).map_or(1, |position| position + 1);
            let kept = if keeps_endpoint(chains, branch) { ", and the client keeps it" } else { "" };
            let detail = format!("{number} of {}{kept}", alternatives.len());
            let endpoint = origins.iter().find(|origin| origin.kind == ObjectKind::EndpointSlice).cloned();
            self.hop(Stage::Services, "iptables", before, detail, service.into_iter().chain(endpoint));
            if let Some(hop) = self.hops.last_mut() {
                hop.alternatives = alternatives;
            }
        }
        let (how, why) = match branch.verdict {
            iptables::Verdict::Accept => return Ok(()),
            iptables::Verdict::Drop => ("dropped", "no endpoint serves this client"),
            iptables::Verdict::Reject => ("rejected", "it has no endpoints that serve"),
        };
        let rule = branch.steps.last().and_then(|step| step.comment.clone());
        let cause = rule.map(|comment| format!(" by the rule \"{comment}\"")).unwrap_or_default();
        let origin = self.origin.clone();
        Err(Refusal { how: how.to_owned(), reason: format!("{how}{cause}: {why}"), origin })
    }

    /// The link that the packet comes by: where a pod's is not known, the one that leads back to its source.
    fn came_by(&self) -> String {
        if let Some(interface) = &self.in_interface {
            return interface.clone();
        }
        match self.route(self.packet.source) {
            RouteDecision::Via { device, .. } | RouteDecision::Local { device, .. } => device,
            RouteDecision::Unreachable { .. } => String::new(),
        }
    }

    /// Where the node would send a packet. The dummy link's addresses are the node's own, too.
    fn route(&self, destination: IpAddr) -> RouteDecision {
        match self.programs.services {
            ServicesPrograms::Ipvs(programs) if programs.servers.addresses.contains(&destination) => {
                RouteDecision::Local { address: destination, device: portolan_program::ipvs::DEVICE.to_owned() }
            }
            _ => netlink::route(self.programs.netlink, self.programs.surroundings, destination),
        }
    }

    /// A hook that only lets pass or refuses.
    fn filter(&mut self, hook: Hook, out: Option<&str>) -> Result<(), Refusal> {
        let outcome = self.at(hook, out);
        self.packet = outcome.packet;
        self.verdict(&outcome)
    }

    fn verdict(&self, outcome: &Outcome) -> Result<(), Refusal> {
        let how = match outcome.verdict {
            Verdict::Accept => return Ok(()),
            Verdict::Drop => "dropped",
            Verdict::Reject(Rejection::TcpReset) => "rejected with a TCP reset",
            Verdict::Reject(Rejection::PortUnreachable) => "rejected with ICMP port unreachable",
        };
        let origin = outcome.steps.iter().rev().find_map(|step| step.origin.clone()).or_else(|| self.origin.clone());
        let cause = origin.as_ref().map(|origin| format!(" by {origin}")).unwrap_or_default();
        let why = outcome.steps.iter().rev().find_map(|step| match &step.what {
            What::Dropped(why) => Some(why.as_str()),
            // The reject chain's sender says why: the condition that led there.
            What::Matched { condition, .. } if condition.contains("@cluster-ips") => Some("not a port of the Service"),
            _ => None,
        });
        let why = why.unwrap_or("it has no endpoints that serve");
        Err(Refusal { how: how.to_owned(), reason: format!("{how}{cause}: {why}"), origin })
    }

    /// Postrouting, and out of the node.
    fn leave(
        &mut self,
        device: &str,
        gateway: Option<IpAddr>,
        kind: ViaKind,
        origin: Option<Origin>,
    ) -> Result<Exit, Refusal> {
        let route = self.route_text(device, gateway, &kind);
        let to_pod = match &kind {
            ViaKind::Bridge { pod: None } => {
                return Err(Refusal {
                    how: "nobody".to_owned(),
                    reason: format!(
                        "no pod of this node holds {}: it is gone, or was never wired",
                        self.packet.destination
                    ),
                    origin: self.origin.clone(),
                });
            }
            ViaKind::Bridge { pod: Some(key) } => self.programs.netlink.pods.get(key),
            ViaKind::Vxlan { .. } | ViaKind::Ipip { .. } | ViaKind::Link => None,
        };
        if to_pod.is_none() {
            self.hop(Stage::Route, "", self.packet, route, origin);
        }
        self.masquerade(device, gateway)?;
        Ok(match (kind, to_pod) {
            (ViaKind::Vxlan { remote } | ViaKind::Ipip { remote }, _) => {
                Exit::Underlay { next: remote, device: device.to_owned(), tunnelled: true }
            }
            (_, Some(pod)) => {
                let interface = pod.key.interface.to_string();
                self.hop(Stage::PodIngress, &interface, self.packet, format!("delivered to {}", pod.origin), []);
                Exit::Pod { origin: Some(pod.origin.clone()), interface: pod.host_interface.to_string() }
            }
            (ViaKind::Link | ViaKind::Bridge { .. }, None) => Exit::Underlay {
                next: gateway.unwrap_or(self.packet.destination),
                device: device.to_owned(),
                tunnelled: false,
            },
        })
    }

    fn masquerade(&mut self, device: &str, gateway: Option<IpAddr>) -> Result<(), Refusal> {
        let before = self.packet;
        let towards = gateway.unwrap_or(before.destination);
        if self.is_marked_by_chains {
            self.packet.source = self.address_on(device, towards).unwrap_or(before.source);
            let detail = "the kernel chooses the port".to_owned();
            self.hop(Stage::Masquerade, "iptables", before, detail, self.origin.clone());
            return Ok(());
        }
        let mut environment = self.environment(Some(device));
        environment.out_address = self.address_on(device, towards);
        let outcome = nftables::interpret(
            self.programs.nftables,
            before,
            Hook::Postrouting,
            &environment,
            self.nftables_choice(),
        );
        self.packet = outcome.packet;
        let masqueraded = outcome.steps.iter().find(|step| matches!(step.what, What::Masqueraded { .. }));
        if let Some(step) = masqueraded {
            let detail = "the kernel chooses the port".to_owned();
            self.hop(Stage::Masquerade, "nftables", before, detail, step.origin.clone());
        }
        self.verdict(&outcome)
    }

    fn at(&self, hook: Hook, out: Option<&str>) -> Outcome {
        let environment = self.environment(out);
        nftables::interpret(self.programs.nftables, self.packet, hook, &environment, self.nftables_choice())
    }

    fn environment(&self, out: Option<&str>) -> Environment {
        let foreign = self.programs.surroundings.addresses.iter().map(|(_, prefix)| prefix.addr());
        let own = self.programs.netlink.addresses.keys().map(|(_, prefix)| prefix.addr());
        let sent = (self.sent.destination, self.sent.destination_port);
        Environment {
            local_addresses: foreign.chain(own).collect(),
            in_interface: self.in_interface.clone(),
            out_interface: out.map(str::to_owned),
            destination_translated: sent != (self.packet.destination, self.packet.destination_port),
            original_destination: Some(sent.into()),
            ..Environment::default()
        }
    }

    fn nftables_choice(&self) -> nftables::Choice {
        match self.choice {
            Choice::First => nftables::Choice::First,
            Choice::Endpoint(endpoint) => nftables::Choice::Prefer(endpoint),
        }
    }

    /// The address that the kernel would send from: one whose prefix holds the next hop, else the first.
    fn address_on(&self, device: &str, towards: IpAddr) -> Option<IpAddr> {
        let family = Family::of(towards);
        let foreign = self.programs.surroundings.addresses.iter().map(|(link, prefix)| (link, prefix));
        let own = self.programs.netlink.addresses.keys().map(|(link, prefix)| (link, prefix));
        let here: Vec<_> = own
            .chain(foreign)
            .filter(|(link, prefix)| *link == device && Family::of_prefix(prefix) == family)
            .map(|(_, prefix)| *prefix)
            .filter(|prefix| !is_link_local(prefix.addr()))
            .collect();
        let near = here.iter().find(|prefix| prefix.contains(&towards));
        near.or(here.first()).map(ipnet::IpNet::addr)
    }

    fn route_text(&self, device: &str, gateway: Option<IpAddr>, kind: &ViaKind) -> String {
        let destination = self.packet.destination;
        let ours = self.programs.netlink.routes.keys().filter(|prefix| prefix.contains(&destination));
        let foreign = self.programs.surroundings.routes.iter().map(|route| &route.destination);
        let best = ours.chain(foreign.filter(|prefix| prefix.contains(&destination))).max_by_key(|it| it.prefix_len());
        let prefix = match best {
            Some(prefix) if prefix.prefix_len() == 0 => "default".to_owned(),
            Some(prefix) => prefix.to_string(),
            None => destination.to_string(),
        };
        match (kind, gateway) {
            (ViaKind::Vxlan { remote } | ViaKind::Ipip { remote }, _) => format!("{prefix} via {device} → {remote}"),
            (_, Some(gateway)) => format!("{prefix} via {gateway} dev {device}"),
            (_, None) => format!("{prefix} dev {device}"),
        }
    }

    fn hop(
        &mut self,
        stage: Stage,
        by: &str,
        before: Packet,
        detail: String,
        origins: impl IntoIterator<Item = Origin>,
    ) {
        self.hops.push(Hop {
            node: self.programs.node.to_string(),
            stage,
            by: by.to_owned(),
            before,
            after: self.packet,
            detail,
            origins: origins.into_iter().collect(),
            alternatives: Vec::new(),
        });
    }
}

/// Whether a chain that the packet came through remembers which endpoint a client had.
fn keeps_endpoint(chains: &iptables::Program, branch: &iptables::Branch) -> bool {
    let met = branch.steps.iter().filter_map(|step| chains.chain(step.table, &step.chain));
    let mut conditions = met.flat_map(|chain| chain.rules.list().into_owned()).flat_map(|rule| rule.matches.to_vec());
    conditions.any(|condition| matches!(condition, iptables::Match::Recent(_)))
}

/// What a pod's packets come by: the bridge that its interface is on.
fn in_interface_of(pod: &netlink::PodLink) -> String {
    if pod.bridge.is_empty() { pod.host_interface.to_string() } else { pod.bridge.clone() }
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}
