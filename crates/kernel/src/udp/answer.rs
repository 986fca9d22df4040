//! Sending ICMP errors, as the node's own messages: the kernel routes them to the sender, chooses the source address as
//! a router does, and undoes address translation in them.
//!
//! They do not go through the TUN device: what comes out of it with an address of the node as its source is dropped by
//! the kernel as forged.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket};
use portolan_program::udp::Answer;

use super::header::Header;
use super::icmp::{self, Limiter};
use crate::error::KernelError;

/// Not in the `libc` crate: `linux/icmp.h`, `linux/icmpv6.h`.
const ICMP_FILTER: libc::c_int = 1;
const ICMPV6_FILTER: libc::c_int = 1;

/// Tells senders why their packets went no further.
#[derive(Debug)]
pub(super) struct Answerer {
    v4: OwnedFd,
    /// None where the kernel has no IPv6.
    v6: Option<OwnedFd>,
    limiter: Limiter,
    message: Vec<u8>,
}

impl Answerer {
    pub(super) fn open() -> Result<Answerer, KernelError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let open = |family, protocol| socket(family, SockType::Raw, flags, protocol);
        let doing = "open a raw socket for ICMP (needs CAP_NET_RAW)";
        let v4 = open(AddressFamily::Inet, SockProtocol::Icmp).map_err(|errno| KernelError::system(doing, errno))?;
        let v6 = match open(AddressFamily::Inet6, SockProtocol::IcmpV6) {
            Ok(socket) => Some(socket),
            Err(Errno::EAFNOSUPPORT | Errno::EPROTONOSUPPORT) => None,
            Err(errno) => return Err(KernelError::system(doing, errno)),
        };
        // These sockets only send: a filter keeps everyone else's messages out of their buffers.
        block(&v4, libc::SOL_RAW, ICMP_FILTER, &[u32::MAX; 1])?;
        if let Some(v6) = &v6 {
            block(v6, libc::IPPROTO_ICMPV6, ICMPV6_FILTER, &[u32::MAX; 8])?;
        }
        Ok(Answerer { v4, v6, limiter: Limiter::new(), message: Vec::new() })
    }

    /// Tells the sender of a packet, unless nobody may be told, or was told too often. Whether it was.
    pub(super) fn answer(&mut self, answer: Answer, packet: &[u8], parsed: &Header, now_ms: u64) -> bool {
        let Some(sender) = icmp::error(answer, packet, parsed, &mut self.message) else { return false };
        if !self.limiter.allows(sender, now_ms) {
            return false;
        }
        let socket = match sender {
            IpAddr::V4(_) => Some(&self.v4),
            IpAddr::V6(_) => self.v6.as_ref(),
        };
        let to = SockaddrStorage::from(SocketAddr::new(sender, 0));
        socket.is_some_and(|socket| sendto(socket.as_raw_fd(), &self.message, &to, MsgFlags::empty()).is_ok())
    }
}

fn block<const N: usize>(
    socket: &OwnedFd,
    level: libc::c_int,
    name: libc::c_int,
    filter: &[u32; N],
) -> Result<(), KernelError> {
    // SAFETY: the pointer and the length are those of `filter`, which lives through the call.
    let outcome = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, filter.as_ptr().cast(), size_of_val(filter) as u32)
    };
    Errno::result(outcome).map(drop).map_err(|errno| KernelError::system("filter an ICMP socket", errno))
}
