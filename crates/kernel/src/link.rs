//! Building topologies: veth pairs across namespaces, bridges, addresses, routes. For the lab and tests.
//!
//! A [`Links`] acts in the namespace that it was opened for, whatever thread uses it.

use std::net::IpAddr;

use nix::errno::Errno;
use portolan_net::{IpNet, MacAddress};
use portolan_program::netlink::LinkKind;

use crate::error::KernelError;
use crate::index;
use crate::netlink::wire::{self, Existing, Peer, RouteSpec, Settings};
use crate::netns::{Namespace, in_namespace};
use crate::rawnetlink::{Protocol, Socket};

/// `RTPROT_STATIC`: what `ip route` names `static`, so that routes of a topology are nobody's program.
const STATIC: u8 = 4;

/// The links of one namespace.
#[derive(Debug)]
pub struct Links {
    socket: Socket,
}

impl Links {
    /// The links of a namespace.
    pub fn open(namespace: &Namespace) -> Result<Links, KernelError> {
        in_namespace(namespace, Links::current)?
    }

    /// The links of the calling thread's namespace.
    pub fn current() -> Result<Links, KernelError> {
        Ok(Links { socket: Socket::open(Protocol::Route, &[])? })
    }

    /// Makes a veth pair: `name` here, and `peer_name` in another namespace. Both are down.
    pub fn create_veth(
        &mut self,
        name: &str,
        peer_name: &str,
        peer_namespace: &Namespace,
        mtu: Option<u32>,
    ) -> Result<(), KernelError> {
        let peer = Peer { name: peer_name, mac: None, namespace: peer_namespace.fd() };
        self.socket.request(wire::create_veth(name, mtu, None, peer))
    }

    /// Makes a bridge, which is down.
    pub fn create_bridge(&mut self, name: &str) -> Result<(), KernelError> {
        self.socket.request(wire::create_link(name, &LinkKind::Bridge, None, None))
    }

    /// Brings a link up.
    pub fn set_up(&mut self, name: &str) -> Result<(), KernelError> {
        self.set(name, Settings { up: Some(true), ..Settings::default() })
    }

    /// Waits until packets pass a link whose carrier came just now, as when the other end of a veth pair
    /// was brought up: what is sent before that is lost.
    pub fn settle(&mut self, name: &str) -> Result<(), KernelError> {
        let index = index::of(self.socket.fd(), name)?;
        self.socket.request(wire::get_link(index))
    }

    /// Takes a link down.
    pub fn set_down(&mut self, name: &str) -> Result<(), KernelError> {
        self.set(name, Settings { up: Some(false), ..Settings::default() })
    }

    /// Makes a link a port of a bridge.
    pub fn set_master(&mut self, name: &str, bridge: &str) -> Result<(), KernelError> {
        let master = index::of(self.socket.fd(), bridge)?;
        self.set(name, Settings { master: Some(master), ..Settings::default() })
    }

    /// Sets a link's MTU.
    pub fn set_mtu(&mut self, name: &str, mtu: u32) -> Result<(), KernelError> {
        self.set(name, Settings { mtu: Some(mtu), ..Settings::default() })
    }

    /// Sets a link's hardware address.
    pub fn set_mac(&mut self, name: &str, mac: MacAddress) -> Result<(), KernelError> {
        self.set(name, Settings { mac: Some(mac), ..Settings::default() })
    }

    /// Sets a link's alias: a text of up to 255 bytes that says whose it is.
    pub fn set_alias(&mut self, name: &str, alias: &str) -> Result<(), KernelError> {
        self.set(name, Settings { alias: Some(alias), ..Settings::default() })
    }

    /// Gives a link an address, which is usable at once.
    pub fn add_address(&mut self, name: &str, prefix: IpNet) -> Result<(), KernelError> {
        let index = index::of(self.socket.fd(), name)?;
        self.socket.request(wire::add_address(index, &prefix, false))
    }

    /// Adds a route, or replaces the one of the same destination.
    pub fn add_route(&mut self, name: &str, destination: IpNet, gateway: Option<IpAddr>) -> Result<(), KernelError> {
        let index = index::of(self.socket.fd(), name)?;
        let spec = RouteSpec { destination, index, gateway, onlink: false, protocol: STATIC };
        self.socket.request(wire::add_route(&spec, Existing::Replace))
    }

    /// Removes a route that [`Links::add_route`] added. One that is gone already is none.
    pub fn remove_route(&mut self, name: &str, destination: IpNet, gateway: Option<IpAddr>) -> Result<(), KernelError> {
        let index = index::of(self.socket.fd(), name)?;
        let spec = RouteSpec { destination, index, gateway, onlink: false, protocol: STATIC };
        match self.socket.request(wire::remove_route(&spec)) {
            Err(error) if error.errno() == Some(Errno::ESRCH) => Ok(()),
            outcome => outcome,
        }
    }

    /// Deletes a link, and the other end of a veth pair with it.
    pub fn delete(&mut self, name: &str) -> Result<(), KernelError> {
        self.socket.request(wire::delete_link(name))
    }

    /// Whether a link exists.
    pub fn exists(&self, name: &str) -> bool {
        index::of(self.socket.fd(), name).is_ok()
    }

    fn set(&mut self, name: &str, settings: Settings<'_>) -> Result<(), KernelError> {
        let index = index::of(self.socket.fd(), name)?;
        self.socket.request(wire::set_link(index, settings))
    }
}
