//! Seeing every packet that crosses any interface of a namespace: what a live trace reads.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::KernelError;
use crate::index;

/// The longest packet that is taken whole: 64 KiB, and room for the headers of a link.
const PACKET_LENGTH: usize = (64 << 10) + 64;

/// Receive buffer in bytes: a burst must not be lost while the reader is busy.
const RECEIVE_BUFFER: libc::c_int = 4 << 20;

/// `ETH_P_ALL` in network byte order, as the socket wants it.
const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// Which way a packet crossed an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// It came in.
    In,
    /// It went out.
    Out,
}

/// A packet that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// When, since 1970 (UTC), by the kernel's clock: comparable between namespaces of one machine.
    pub time: Duration,
    /// The interface.
    pub interface: String,
    /// Which way.
    pub direction: Direction,
    /// From the link's header on.
    pub bytes: Vec<u8>,
}

/// Sees packets on all interfaces of the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Capture {
    fd: OwnedFd,
    names: BTreeMap<u32, String>,
    buffer: Vec<u8>,
}

impl Capture {
    /// Starts to capture. What comes from now on is kept until it is read, as far as there is room.
    pub fn open() -> Result<Capture, KernelError> {
        // SAFETY: `socket` takes three numbers; its result is checked before use.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(ALL)) };
        if fd < 0 {
            return Err(KernelError::last("open a packet socket (needs CAP_NET_RAW)"));
        }
        // SAFETY: `fd` was just opened and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        set_option(fd.as_fd(), libc::SO_RCVBUFFORCE, RECEIVE_BUFFER).ok();
        set_option(fd.as_fd(), libc::SO_TIMESTAMPNS, 1)
            .map_err(|errno| KernelError::system("ask for packets' times", errno))?;
        Ok(Capture { fd, names: BTreeMap::new(), buffer: vec![0; PACKET_LENGTH] })
    }

    /// A descriptor that is readable when there is a packet.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The next packet; `None` if none came until the deadline.
    pub fn next_until(&mut self, deadline: Instant) -> Result<Option<Captured>, KernelError> {
        loop {
            if let Some(captured) = self.receive()? {
                return Ok(Some(captured));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            // Rounded up, so as not to spin through the last millisecond.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(KernelError::system("wait for a packet", errno)),
            }
        }
    }

    fn receive(&mut self) -> Result<Option<Captured>, KernelError> {
        // SAFETY: all bytes zero is a valid `sockaddr_ll`, and a valid `msghdr`.
        let (mut from, mut message): (libc::sockaddr_ll, libc::msghdr) = unsafe { std::mem::zeroed() };
        // Aligned as `cmsghdr` wants it, and room for one timestamp.
        let mut control = [0_u64; 8];
        let mut part = libc::iovec { iov_base: self.buffer.as_mut_ptr().cast(), iov_len: self.buffer.len() };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        // SAFETY: every pointer in `message` is to a live, writable value of the length given with it.
        let received = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let length = match Errno::result(received) {
            Ok(length) => length.cast_unsigned(),
            // An interface that went down while it was captured says so once.
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN) => return Ok(None),
            Err(errno) => return Err(KernelError::system("receive a packet", errno)),
        };
        let time = timestamp(&message);
        let index = from.sll_ifindex.cast_unsigned();
        let fd = self.fd.as_fd();
        let name = self.names.entry(index).or_insert_with(|| index::name(fd, index).unwrap_or_default());
        Ok(Some(Captured {
            time,
            interface: name.clone(),
            direction: if from.sll_pkttype == libc::PACKET_OUTGOING { Direction::Out } else { Direction::In },
            bytes: self.buffer.get(..length).unwrap_or_default().to_vec(),
        }))
    }
}

/// The kernel's time of a received packet.
fn timestamp(message: &libc::msghdr) -> Duration {
    // SAFETY: `message` was filled by `recvmsg`, and its control buffer lives.
    let header = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() };
    let Some(header) = header.filter(|it| (it.cmsg_level, it.cmsg_type) == (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS))
    else {
        return Duration::ZERO;
    };
    // SAFETY: a control message of this type holds a `timespec`; it may be unaligned.
    let time: libc::timespec = unsafe { libc::CMSG_DATA(header).cast::<libc::timespec>().read_unaligned() };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn set_option(fd: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> Result<(), Errno> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointer is to a live `c_int`, and `length` is its size.
    let outcome = unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, std::ptr::from_ref(&value).cast(), length)
    };
    Errno::result(outcome).map(drop)
}
