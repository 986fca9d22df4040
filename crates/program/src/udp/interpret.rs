//! What becomes of a packet that comes out of the device, and of a datagram that comes from the underlay.
//!
//! This is the forwarder's meaning without its speed: the forwarder's own tests hold it against this.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use portolan_net::{Family, Origin};
use serde::{Deserialize, Serialize};

use super::Program;

/// Why a packet or a datagram went no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DropReason {
    /// No peer has the destination.
    NoRoute,
    /// It had no hop left.
    TimeExceeded,
    /// It is larger than the path to the peer, and may not be divided.
    TooBig,
    /// It is no IP packet, or not as long as it says.
    Malformed,
    /// Its destination is a group of hosts: the tunnel has no way to one.
    NotUnicast,
    /// The datagram came from an address or port that is no peer's.
    UnknownPeer,
    /// The underlay took no more.
    UnderlayFull,
    /// The underlay has no way to the peer, or a firewall refused it.
    UnderlayRefused,
    /// The device is down, or its queue is full.
    DeviceRefused,
}

impl DropReason {
    /// All of them, in the order in which they are counted.
    pub const ALL: [DropReason; 9] = [
        DropReason::NoRoute,
        DropReason::TimeExceeded,
        DropReason::TooBig,
        DropReason::Malformed,
        DropReason::NotUnicast,
        DropReason::UnknownPeer,
        DropReason::UnderlayFull,
        DropReason::UnderlayRefused,
        DropReason::DeviceRefused,
    ];

    /// The name, as a label of a metric.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::NoRoute => "no-route",
            DropReason::TimeExceeded => "time-exceeded",
            DropReason::TooBig => "too-big",
            DropReason::Malformed => "malformed",
            DropReason::NotUnicast => "not-unicast",
            DropReason::UnknownPeer => "unknown-peer",
            DropReason::UnderlayFull => "underlay-full",
            DropReason::UnderlayRefused => "underlay-refused",
            DropReason::DeviceRefused => "device-refused",
        }
    }
}

/// What the sender of a packet is told (RFC 792, RFC 4443).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// No route to the network.
    NoRoute,
    /// The hops are used up.
    TimeExceeded,
    /// The packet is too big; this many bytes would pass (RFC 1191, RFC 8201).
    TooBig(u32),
}

/// What becomes of a packet from the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outward {
    /// It goes to a peer, with one hop less.
    Sent {
        /// The peer.
        peer: SocketAddr,
        /// The route that said so.
        prefix: IpNet,
        /// What caused the route.
        origin: Origin,
        /// Whether it is divided first (IPv4 without "don't fragment").
        fragmented: bool,
    },
    /// It goes no further.
    Dropped(DropReason, Option<Answer>),
}

/// What becomes of a datagram from the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inward {
    /// The packet in it comes out of the device.
    Delivered,
    /// It goes no further.
    Dropped(DropReason),
}

/// What becomes of a packet that the kernel routes into the device.
pub fn outward(program: &Program, destination: IpAddr, hops: u8, length: u32, may_be_divided: bool) -> Outward {
    let Some(tunnel) = &program.tunnel else { return Outward::Dropped(DropReason::DeviceRefused, None) };
    if destination.is_multicast() {
        return Outward::Dropped(DropReason::NotUnicast, None);
    }
    let covering = program.routes.iter().filter(|(prefix, _)| prefix.contains(&destination));
    let Some((prefix, route)) = covering.max_by_key(|(prefix, _)| prefix.prefix_len()) else {
        return Outward::Dropped(DropReason::NoRoute, Some(Answer::NoRoute));
    };
    if hops <= 1 {
        return Outward::Dropped(DropReason::TimeExceeded, Some(Answer::TimeExceeded));
    }
    let is_big = length > tunnel.mtu;
    let is_divided = is_big && may_be_divided && Family::of(destination) == Family::V4;
    if is_big && !is_divided {
        return Outward::Dropped(DropReason::TooBig, Some(Answer::TooBig(tunnel.mtu)));
    }
    Outward::Sent { peer: route.peer, prefix: *prefix, origin: route.origin.clone(), fragmented: is_divided }
}

/// What becomes of a datagram that comes to this node's port.
pub fn inward(program: &Program, source: SocketAddr) -> Inward {
    if program.tunnel.is_none() {
        return Inward::Dropped(DropReason::DeviceRefused);
    }
    let is_peer = program.routes.values().any(|route| route.peer == source);
    if is_peer { Inward::Delivered } else { Inward::Dropped(DropReason::UnknownPeer) }
}
