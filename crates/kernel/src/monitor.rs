//! Hearing of changes that others make: rtnetlink and nftables notifications.
//!
//! It tells what kind of thing changed, so that its owner reads it back and repairs it. It promises no
//! complete history: an [`Event::Overrun`] means that something was lost and all must be read again.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use portolan_net::Family;
use portolan_program::iptables::TableName;

use crate::error::KernelError;
use crate::nftables;
use crate::rawnetlink::{OwnedMessage, Protocol, Socket};

/// `RTNLGRP_…`: links, neighbours, addresses and routes of both families.
const ROUTE_GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// `NFNLGRP_NFTABLES`.
const NETFILTER_GROUPS: [u32; 1] = [7];

/// Events that wait to be taken. More than that are an overrun: reading all again is cheaper.
const EVENTS_MAX: usize = 4096;

/// Datagrams that are thrown away after an overrun: more than any receive buffer holds.
const DRAINED_MAX: usize = 1 << 20;

const IFLA_IFNAME: u16 = 3;
const LINK_HEADER: usize = 16;
const NUD_PERMANENT: u16 = 0x80;
const AF_BRIDGE: u8 = 7;
const NTF_SELF: u8 = 2;

/// Something changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A link of this name.
    Link(String),
    /// An address.
    Address,
    /// A route.
    Route,
    /// A permanent neighbour, one that someone set, one that went, or a forwarding entry of a tunnel.
    Neighbour,
    /// Rules of one chain in a table of iptables' programs, by the backend that makes nftables of them.
    Rules(ChainName),
    /// Something else in an nftables table.
    Ruleset,
    /// Notifications were lost.
    Overrun,
}

/// A chain in a table of iptables' programs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChainName {
    /// Which of the two programs.
    pub family: Family,
    /// The table.
    pub table: TableName,
    /// The chain.
    pub chain: String,
}

/// Hears notifications in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Monitor {
    route: Socket,
    netfilter: Option<Socket>,
    epoll: Epoll,
    own_ports: BTreeSet<u32>,
    waiting: VecDeque<Event>,
}

impl Monitor {
    /// Opens the monitor. A kernel without nftables is heard for the rest.
    pub fn open() -> Result<Monitor, KernelError> {
        let route = Socket::open(Protocol::Route, &ROUTE_GROUPS)?;
        let netfilter = Socket::open(Protocol::Netfilter, &NETFILTER_GROUPS).ok();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| KernelError::system("open an epoll descriptor", errno))?;
        for socket in [Some(&route), netfilter.as_ref()].into_iter().flatten() {
            epoll
                .add(socket.fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))
                .map_err(|errno| KernelError::system("watch a netlink socket", errno))?;
        }
        Ok(Monitor { route, netfilter, epoll, own_ports: BTreeSet::new(), waiting: VecDeque::new() })
    }

    /// Leaves out what the requests of one of our own sockets cause, as far as the kernel says it.
    pub fn ignore_port(&mut self, port: u32) {
        self.own_ports.insert(port);
    }

    /// A descriptor that is readable when there may be an event.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Waits until there may be an event, or the time is over. For callers with a thread of their own.
    pub fn wait(&self, milliseconds: u16) {
        let mut events = [EpollEvent::empty()];
        // An interrupted wait is a short one: the caller looks and comes back.
        let _ = self.epoll.wait(&mut events, milliseconds);
    }

    /// The next event, if there is one now. It never waits.
    pub fn next_event(&mut self) -> Option<Event> {
        while self.waiting.is_empty() {
            // Changes come in bursts of one kind: the second socket is looked at when the first is empty.
            let route = receive(&mut self.route);
            if !matches!(route, Ok(None)) {
                self.take(route, route_event);
                continue;
            }
            let netfilter = self.netfilter.as_mut().map_or(Ok(None), receive);
            if matches!(netfilter, Ok(None)) {
                return None;
            }
            self.take(netfilter, |message, _| nftables::chain_event(message));
        }
        self.waiting.pop_front()
    }

    fn take(
        &mut self,
        received: Result<Option<Vec<(u32, OwnedMessage)>>, KernelError>,
        event: impl Fn(&OwnedMessage, u32) -> Option<Event>,
    ) {
        let Ok(messages) = received else {
            // Whatever is wrong with the socket, what we know may be stale.
            self.waiting.clear();
            self.waiting.push_back(Event::Overrun);
            return;
        };
        for (port, message) in messages.unwrap_or_default() {
            let is_own = port != 0 && self.own_ports.contains(&port);
            let Some(event) = event(&message, port).filter(|_| !is_own) else { continue };
            if self.waiting.back() != Some(&event) {
                self.waiting.push_back(event);
            }
        }
        if self.waiting.len() > EVENTS_MAX {
            self.waiting.clear();
            self.waiting.push_back(Event::Overrun);
        }
    }
}

/// The notifications of one datagram.
///
/// The kernel says once that it dropped some, and goes on to drop in silence until the queue is empty
/// (`NETLINK_S_CONGESTED` in af_netlink.c). So the queue is emptied before the overrun is told: whoever then
/// reads everything misses nothing.
fn receive(socket: &mut Socket) -> Result<Option<Vec<(u32, OwnedMessage)>>, KernelError> {
    let received = socket.notifications();
    if received.is_err() {
        for _ in 0..DRAINED_MAX {
            if matches!(socket.notifications(), Ok(None)) {
                break;
            }
        }
    }
    received
}

/// What a notification is of. The port is that of the request that caused it, and 0 where the kernel did it itself.
fn route_event(message: &OwnedMessage, port: u32) -> Option<Event> {
    match message.kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => {
            let name = message.attributes(LINK_HEADER).get(IFLA_IFNAME)?;
            Some(Event::Link(name.text()?.to_owned()))
        }
        libc::RTM_NEWADDR | libc::RTM_DELADDR => Some(Event::Address),
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => Some(Event::Route),
        libc::RTM_DELNEIGH => Some(Event::Neighbour),
        // The kernel's own neighbours come and go with traffic, and are no concern of ours; a bridge's forwarding
        // entries too. What someone puts in the place of a permanent neighbour need not be permanent.
        libc::RTM_NEWNEIGH => {
            let header: &[u8; 12] = message.header()?;
            let state = u16::from_ne_bytes([header[8], header[9]]);
            let is_of_tunnel = header[0] == AF_BRIDGE && header[10] & NTF_SELF != 0;
            (state & NUD_PERMANENT != 0 || is_of_tunnel || port != 0).then_some(Event::Neighbour)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_replaces_what_was_known() {
        let mut monitor = Monitor::open().unwrap();
        let message = |kind| OwnedMessage { kind, flags: 0, payload: vec![0; 12] };
        let routes = vec![(0, message(libc::RTM_NEWROUTE)), (0, message(libc::RTM_DELROUTE))];
        monitor.take(Ok(Some(routes.clone())), route_event);
        assert_eq!(monitor.waiting, [Event::Route]);
        monitor.take(Err(KernelError::Overrun), route_event);
        assert_eq!(monitor.waiting, [Event::Overrun]);
        monitor.waiting.clear();
        monitor.waiting.extend((0..=EVENTS_MAX).map(|number| Event::Link(number.to_string())));
        monitor.take(Ok(Some(routes)), route_event);
        assert_eq!(monitor.waiting, [Event::Overrun]);
    }

    /// What was dropped while the queue was still being read must not be missed either.
    #[test]
    fn an_overrun_is_told_when_nothing_more_can_be_lost() {
        use crate::netns::{Namespace, in_namespace};
        use crate::rawnetlink::MessageBuilder;
        use nix::sys::socket::{setsockopt, sockopt};

        let Ok(namespace) = Namespace::create_unnamed() else {
            println!("skipped: making network namespaces needs root");
            return;
        };
        let events = in_namespace(&namespace, || {
            let mut monitor = Monitor::open().unwrap();
            setsockopt(&monitor.route.fd(), sockopt::RcvBuf, &4096).unwrap();
            let mut socket = Socket::open(Protocol::Route, &[]).unwrap();
            let address = |last| {
                let mut builder = MessageBuilder::new(libc::RTM_NEWADDR, 0);
                // `struct ifaddrmsg`: IPv4, /32, on the loopback interface, which is the first.
                builder.header(&[2, 32, 0, 0, 1, 0, 0, 0]);
                builder.put_bytes(2, &[127, 1, 0, last]);
                builder.finish()
            };
            assert!(socket.batch((1..200).map(address).collect()).iter().all(Result::is_ok));
            std::iter::from_fn(|| monitor.next_event()).collect::<Vec<_>>()
        });
        assert_eq!(events.unwrap().last(), Some(&Event::Overrun));
    }

    #[test]
    fn neighbours_that_come_with_traffic_are_no_event() {
        let mut header = vec![0; 12];
        let message = |payload: &Vec<u8>| OwnedMessage { kind: libc::RTM_NEWNEIGH, flags: 0, payload: payload.clone() };
        header[8] = 2;
        assert_eq!(route_event(&message(&header), 0), None);
        // Someone set it, whatever its state.
        assert_eq!(route_event(&message(&header), 7), Some(Event::Neighbour));
        header[8] = 0x80;
        assert_eq!(route_event(&message(&header), 0), Some(Event::Neighbour));
    }
}
