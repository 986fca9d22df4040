//! UDP sockets of the underlay: many datagrams in one call, and several in one (`UDP_SEGMENT`, `UDP_GRO`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};

use crate::error::KernelError;

/// What each socket holds that was not read yet, in bytes: 20 ms at 1.6 Gbit/s. Beyond it the kernel drops.
const BUFFER_BYTES: libc::c_int = 4 << 20;
/// How long a full underlay may hold a thread up before its packets are dropped.
const SEND_TIMEOUT_MS: libc::suseconds_t = 100;
/// How often a port that is taken is tried again, and when.
const BIND_ATTEMPTS: u32 = 20;
const BIND_WAIT: Duration = Duration::from_millis(10);
/// Room for the one control message that is sent or received with a datagram.
const CONTROL_BYTES: usize = 64;

/// A socket.
#[derive(Debug)]
pub(super) struct Socket {
    descriptor: OwnedFd,
    is_v6: bool,
    /// Whether one call may carry several datagrams of one length.
    pub(super) divides: bool,
}

impl Socket {
    /// Opens a socket on an address. Several on one address share what comes in, by who sent it.
    pub(super) fn open(local: SocketAddr) -> Result<Socket, KernelError> {
        let opened = Socket::plain(local, true)?;
        opened.bind(local)?;
        opened.tune();
        let divides = get_option(&opened.descriptor, libc::SOL_UDP, libc::UDP_SEGMENT).is_ok();
        Ok(Socket { divides, ..opened })
    }

    /// Makes sure that nobody else receives on an address: sockets of one user that share a port would share what comes
    /// in, and each would get half of it.
    pub(super) fn check_free(local: SocketAddr) -> Result<(), KernelError> {
        Socket::plain(local, false)?.bind(local)
    }

    /// Binds to an address. A socket that was just closed may hold it for a moment: a process that is being started
    /// elsewhere in this program has a copy of every descriptor until it runs its own program.
    fn bind(&self, local: SocketAddr) -> Result<(), KernelError> {
        let address = SockaddrStorage::from(local);
        let mut outcome = bind(self.descriptor.as_raw_fd(), &address);
        for _ in 0..BIND_ATTEMPTS {
            if outcome != Err(Errno::EADDRINUSE) {
                break;
            }
            std::thread::sleep(BIND_WAIT);
            outcome = bind(self.descriptor.as_raw_fd(), &address);
        }
        outcome.map_err(|errno| {
            let hint = match errno {
                Errno::EADDRINUSE => "; another program has the port: stop it, or give the fabric another port",
                Errno::EADDRNOTAVAIL => "; the node has no such address",
                _ => "",
            };
            KernelError::system(format!("receive datagrams on {local}{hint}"), errno)
        })
    }

    fn plain(local: SocketAddr, shares: bool) -> Result<Socket, KernelError> {
        let is_v6 = local.is_ipv6();
        let family = if is_v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let descriptor = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| KernelError::system("open a UDP socket", errno))?;
        let set = |level, name, value| {
            set_option(&descriptor, level, name, &value)
                .map_err(|errno| KernelError::system("set up a UDP socket", errno))
        };
        if shares {
            set(libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        if is_v6 {
            set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
        }
        let opened = Socket { descriptor, is_v6, divides: false };
        opened.divide_outside(false).map_err(|errno| KernelError::system("set up a UDP socket", errno))?;
        Ok(opened)
    }

    /// What only makes it faster: a kernel that refuses is not asked again.
    fn tune(&self) {
        let set = |level, name, value: libc::c_int| set_option(&self.descriptor, level, name, &value);
        let _ = set(libc::SOL_UDP, libc::UDP_GRO, 1);
        // Beyond the limit of others needs CAP_NET_ADMIN.
        for (forced, asked) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
            if set(libc::SOL_SOCKET, forced, BUFFER_BYTES).is_err() {
                let _ = set(libc::SOL_SOCKET, asked, BUFFER_BYTES);
            }
        }
        let timeout = libc::timeval { tv_sec: 0, tv_usec: SEND_TIMEOUT_MS * 1000 };
        let _ = set_option(&self.descriptor, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &timeout);
    }

    /// Whether the kernel divides datagrams that are larger than the path. It does not, as a rule: it says so, and the
    /// packets' own senders are told.
    pub(super) fn divide_outside(&self, divides: bool) -> Result<(), Errno> {
        let (level, name, value) = match (self.is_v6, divides) {
            (false, false) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
            (false, true) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT),
            (true, false) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO),
            (true, true) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT),
        };
        set_option(&self.descriptor, level, name, &value)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The largest IP packet that the kernel knows to pass to a peer.
pub(super) fn path_mtu(local: IpAddr, peer: SocketAddr) -> Result<u32, KernelError> {
    let doing = || format!("read the path MTU to {peer}");
    let socket = Socket::plain(SocketAddr::new(local, 0), false)?;
    let descriptor = socket.descriptor.as_raw_fd();
    bind(descriptor, &SockaddrStorage::from(SocketAddr::new(local, 0)))
        .and_then(|()| connect(descriptor, &SockaddrStorage::from(peer)))
        .map_err(|errno| KernelError::system(doing(), errno))?;
    let (level, name) =
        if peer.is_ipv6() { (libc::IPPROTO_IPV6, libc::IPV6_MTU) } else { (libc::IPPROTO_IP, libc::IP_MTU) };
    let bytes = get_option(&socket.descriptor, level, name).map_err(|errno| KernelError::system(doing(), errno))?;
    Ok(bytes.unsigned_abs())
}

fn set_option<T>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> Result<(), Errno> {
    // SAFETY: the pointer and the length are those of `value`, which is a plain number or structure of numbers at every
    // caller and lives through the call.
    let outcome = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), size_of::<T>() as u32)
    };
    Errno::result(outcome).map(drop)
}

fn get_option(socket: &OwnedFd, level: libc::c_int, name: libc::c_int) -> Result<libc::c_int, Errno> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` has the length that is given, and both live through the call.
    let outcome =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length) };
    Errno::result(outcome).map(|_| value)
}

/// Control data, aligned as the kernel wants it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

impl Control {
    /// One message: `UDP_SEGMENT` with the length of each datagram. Its length in the buffer comes with it.
    fn segment(bytes: u16) -> (Control, usize) {
        // `CMSG_LEN` and `CMSG_SPACE` of two bytes: a header, and data that are padded to its alignment.
        let head = size_of::<libc::cmsghdr>();
        let mut control = Control([0; CONTROL_BYTES]);
        control.0[..8].copy_from_slice(&(head + 2).to_ne_bytes());
        control.0[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
        control.0[12..16].copy_from_slice(&libc::UDP_SEGMENT.to_ne_bytes());
        control.0[head..head + 2].copy_from_slice(&bytes.to_ne_bytes());
        (control, head + 8)
    }

    /// The length of each datagram, where the kernel joined several.
    fn joined(&self, length: usize) -> Option<usize> {
        let mut rest = self.0.get(..length)?;
        let head = size_of::<libc::cmsghdr>();
        while let Some(header) = rest.first_chunk::<16>() {
            let size = usize::from_ne_bytes(*header.first_chunk()?);
            let number = |at: usize| header.get(at..at + 4).and_then(|it| it.first_chunk()).copied();
            let is_gro = number(8)? == libc::SOL_UDP.to_ne_bytes() && number(12)? == libc::UDP_GRO.to_ne_bytes();
            if is_gro {
                let value = rest.get(head..head + 4)?.first_chunk()?;
                return usize::try_from(libc::c_int::from_ne_bytes(*value)).ok().filter(|size| *size > 0);
            }
            rest = rest.get(size.max(head).next_multiple_of(8)..)?;
        }
        None
    }
}

/// One call's datagrams: to whom, the parts, and the length of each if there are several in one message.
#[derive(Default)]
pub(super) struct Sending {
    addresses: Vec<SockaddrStorage>,
    controls: Vec<(Control, usize)>,
    /// For each message, how many parts it has.
    parts_of: Vec<usize>,
    parts: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

impl Sending {
    /// Forgets all messages.
    pub(super) fn clear(&mut self) {
        self.addresses.clear();
        self.controls.clear();
        self.parts_of.clear();
        self.parts.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.parts_of.len()
    }

    /// Begins a message. `each`: how long each datagram of it is, if there are several.
    pub(super) fn begin(&mut self, to: SocketAddr, each: Option<usize>) {
        self.addresses.push(SockaddrStorage::from(to));
        self.controls.push(each.map_or((Control([0; CONTROL_BYTES]), 0), |bytes| Control::segment(bytes as u16)));
        self.parts_of.push(0);
    }

    /// Adds a part to the last message.
    ///
    /// # Safety
    ///
    /// The part must stay where it is, and unchanged, until [`Sending::clear`].
    pub(super) unsafe fn part(&mut self, bytes: &[u8]) {
        if let Some(count) = self.parts_of.last_mut().filter(|_| !bytes.is_empty()) {
            *count += 1;
            self.parts.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
        }
    }

    /// Sends the messages from the given one on, in one call. How many went; or why the first of them did not.
    pub(super) fn send(&mut self, socket: &Socket, from: usize) -> Result<usize, Errno> {
        use nix::sys::socket::SockaddrLike;
        self.headers.clear();
        let mut part = 0;
        // One pointer for all of them: each message has its own stretch of the list.
        let all_parts = self.parts.as_mut_ptr();
        let messages = self.addresses.iter().zip(&self.controls).zip(&self.parts_of);
        for ((address, (control, control_length)), parts) in messages {
            // SAFETY: all bytes zero are a valid value of this structure of numbers and pointers.
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            header.msg_hdr.msg_name = address.as_ptr().cast_mut().cast();
            header.msg_hdr.msg_namelen = address.len();
            header.msg_hdr.msg_iov = all_parts.wrapping_add(part);
            header.msg_hdr.msg_iovlen = *parts;
            if *control_length > 0 {
                header.msg_hdr.msg_control = control.0.as_ptr().cast_mut().cast();
                header.msg_hdr.msg_controllen = *control_length;
            }
            part += parts;
            self.headers.push(header);
        }
        let headers = self.headers.get_mut(from..).unwrap_or_default();
        if headers.is_empty() {
            return Ok(0);
        }
        let descriptor = socket.descriptor.as_raw_fd();
        // SAFETY: the pointers in the headers lead into `addresses`, `controls` and `parts`, which are not changed until
        // the call returns, and from there to parts that live as long as `part` demands. The kernel reads through them
        // and writes only the headers' lengths, for as many headers as are given.
        let sent = unsafe { libc::sendmmsg(descriptor, headers.as_mut_ptr(), headers.len() as libc::c_uint, 0) };
        Errno::result(sent).map(i32::unsigned_abs).map(|sent| sent as usize)
    }
}

/// What one call receives.
pub(super) struct Receiving {
    buffer: Vec<u8>,
    addresses: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    parts: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

/// The longest message: what the kernel joins is no longer than an IP packet.
pub(super) const MESSAGE_MAX: usize = 1 << 16;

/// A received message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    /// Who sent it. `None` if that cannot be read.
    pub(super) source: Option<SocketAddr>,
    /// Where it begins in the buffer.
    pub(super) begin: usize,
    /// How long it is.
    pub(super) length: usize,
    /// How long each datagram of it is; the last may be shorter.
    pub(super) each: usize,
    /// Whether it was longer than the buffer.
    pub(super) is_cut: bool,
}

impl Receiving {
    pub(super) fn new(messages: usize) -> Receiving {
        // SAFETY: all bytes zero are a valid value of this structure of numbers.
        let address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        Receiving {
            buffer: vec![0; messages * MESSAGE_MAX],
            addresses: vec![address; messages],
            controls: vec![Control([0; CONTROL_BYTES]); messages],
            parts: Vec::with_capacity(messages),
            headers: Vec::with_capacity(messages),
        }
    }

    /// Receives up to so many messages, and does not wait.
    pub(super) fn receive(&mut self, socket: &Socket, most: usize) -> Result<usize, Errno> {
        self.headers.clear();
        self.parts.clear();
        for slot in self.buffer.chunks_exact_mut(MESSAGE_MAX).take(most) {
            self.parts.push(libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() });
        }
        let slots = self.parts.iter_mut().zip(&mut self.addresses).zip(&mut self.controls);
        for ((part, address), control) in slots {
            // SAFETY: all bytes zero are a valid value of this structure of numbers and pointers.
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            header.msg_hdr.msg_name = std::ptr::from_mut(address).cast();
            header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = CONTROL_BYTES;
            self.headers.push(header);
        }
        let descriptor = socket.descriptor.as_raw_fd();
        let count = self.headers.len() as libc::c_uint;
        // SAFETY: each header's pointers lead to an address, a control buffer and a slot of the buffer of its own, of the
        // lengths given with them. `self` is borrowed until the call returns, so that none of them moves.
        let received = unsafe {
            let headers = self.headers.as_mut_ptr();
            libc::recvmmsg(descriptor, headers, count, libc::MSG_DONTWAIT, std::ptr::null_mut())
        };
        Errno::result(received).map(i32::unsigned_abs).map(|received| received as usize)
    }

    /// All that was received lies here.
    pub(super) fn buffer(&self) -> &[u8] {
        &self.buffer
    }

    /// One of the messages that the last call received.
    pub(super) fn message(&self, index: usize) -> Option<Message> {
        let header = self.headers.get(index)?;
        let length = (header.msg_len as usize).min(MESSAGE_MAX);
        let joined = self.controls.get(index)?.joined(header.msg_hdr.msg_controllen);
        Some(Message {
            source: self.addresses.get(index).and_then(socket_address),
            begin: index * MESSAGE_MAX,
            length,
            each: joined.unwrap_or(length),
            is_cut: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
        })
    }
}

fn socket_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the kernel wrote a `sockaddr_in`, as the family says, and the storage is larger and aligned for it.
            let address = unsafe { &*std::ptr::from_ref(storage).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
            Some(SocketAddr::new(ip.into(), u16::from_be(address.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: the kernel wrote a `sockaddr_in6`, as the family says, and the storage is larger and aligned for
            // it.
            let address = unsafe { &*std::ptr::from_ref(storage).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
            Some(SocketAddr::new(ip.into(), u16::from_be(address.sin6_port)))
        }
        _ => None,
    }
}
