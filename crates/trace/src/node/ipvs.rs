//! The `ipvs` mode's share: where IPVS sends a packet, and what the mode's chains make of it.

use std::net::{IpAddr, SocketAddr};

use portolan_net::Origin;
use portolan_program::ipvs;
use portolan_program::ipvs_mode::{self, Programs, Refusal as Why, Verdict, Way};
use portolan_program::nftables::Hook;

use super::{Refusal, Tracer};
use crate::hop::{Choice, Stage};

impl Tracer<'_> {
    /// Chains and IPVS together. IPVS takes packets for the node only behind all filters of its input; what it sends
    /// on leaves as the node's own packets do, and is not forwarded.
    pub(super) fn through_ipvs(&mut self, programs: &Programs<'_>, hook: Hook) -> Result<(), Refusal> {
        let in_interface = (hook == Hook::Prerouting).then(|| self.came_by());
        let own = self.own_addresses();
        let environment =
            ipvs_mode::Environment { in_interface: in_interface.as_deref(), out_interface: None, own_addresses: &own };
        let outcome = ipvs_mode::interpret(programs, &self.packet, &environment);
        self.origin.clone_from(&outcome.origin);
        match outcome.verdict {
            Verdict::Pass { masqueraded } => {
                self.is_marked_by_chains = masqueraded;
                Ok(())
            }
            Verdict::Refused(why) => Err(self.refused(why)),
            Verdict::Forward { ways, keeps_endpoint } => {
                if hook == Hook::Prerouting {
                    self.filter(Hook::Input, None)?;
                }
                let wanted = |way: &&Way| match self.choice {
                    Choice::First => true,
                    Choice::Endpoint(endpoint) => way.endpoint == endpoint,
                };
                match ways.iter().find(wanted).or(ways.first()) {
                    Some(way) => self.balance(way, &ways, keeps_endpoint),
                    None => Err(self.refused(Why::NoEndpoint)),
                }
            }
        }
    }

    /// IPVS rewrites the destination.
    fn balance(&mut self, way: &Way, ways: &[Way], keeps_endpoint: bool) -> Result<(), Refusal> {
        let before = self.packet;
        (self.packet.destination, self.packet.destination_port) = (way.endpoint.ip(), way.endpoint.port());
        self.is_marked_by_chains = way.masqueraded;
        self.is_balanced = true;
        let number = ways.iter().position(|it| it.endpoint == way.endpoint).map_or(1, |position| position + 1);
        let kept = if keeps_endpoint { ", and the client keeps it" } else { "" };
        let mut origins: Vec<Origin> = self.origin.clone().into_iter().chain(way.origin.clone()).collect();
        origins.dedup();
        self.hop(Stage::Services, "ipvs", before, format!("{number} of {}{kept}", ways.len()), origins);
        if let Some(hop) = self.hops.last_mut() {
            hop.alternatives = ways.iter().map(|it| it.endpoint).collect::<Vec<SocketAddr>>();
        }
        way.refusal.map_or(Ok(()), |why| Err(self.refused(why)))
    }

    fn refused(&self, why: Why) -> Refusal {
        let how = if why.is_told() { "rejected with ICMP port unreachable" } else { "dropped" };
        let cause = self.origin.as_ref().map(|origin| format!(" by {origin}")).unwrap_or_default();
        let why = match why {
            Why::NoEndpoint => "it has no endpoints that serve",
            Why::NoSuchPort => "not a port of the Service",
            Why::SourceRanges => "its source ranges do not hold this client",
            Why::NoLocalEndpoint => "its policy is Local, and this node has no endpoint that serves",
        };
        Refusal { how: how.to_owned(), reason: format!("{how}{cause}: {why}"), origin: self.origin.clone() }
    }

    /// The node's addresses without the Services', which the dummy link has.
    fn own_addresses(&self) -> Vec<IpAddr> {
        let foreign = self.programs.surroundings.addresses.iter();
        let foreign = foreign.filter(|(link, _)| link != ipvs::DEVICE).map(|(_, prefix)| prefix.addr());
        foreign.chain(self.programs.netlink.addresses.keys().map(|(_, prefix)| prefix.addr())).collect()
    }
}
