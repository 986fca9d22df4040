//! The socket: requests, dumps, batches, notifications.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::message::stamp;
use super::{Attributes, Message, Messages, OwnedMessage, aligned};
use crate::error::{KernelError, Refusal};

/// Receive buffer, in bytes: an acknowledgement takes about 1 KiB of it, so a batch of
/// [`BATCH_MESSAGES_MAX`] fits many times, and so does a burst of notifications.
const RECEIVE_BUFFER: libc::c_int = 8 << 20;

/// Send buffer for a start, in bytes; it grows to what a message needs.
const SEND_BUFFER: usize = 1 << 20;

/// The largest datagram that is sent: a whole ruleset of 10,000 Services takes about 20 MiB.
const SEND_MAX: usize = 256 << 20;

/// Messages in one `send` of [`Socket::batch`].
const BATCH_MESSAGES_MAX: usize = 512;

/// How often a dump is tried again that was changed under our hands (`NLM_F_DUMP_INTR`).
const DUMP_ATTEMPTS_MAX: u32 = 8;

/// The largest datagram that the kernel sends in a dump is 32 KiB; an acknowledgement that quotes a
/// long request may be longer, which `MSG_TRUNC` tells.
const RECEIVE_LENGTH: usize = 128 << 10;

const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLM_F_REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const NLM_F_ACK: u16 = libc::NLM_F_ACK as u16;
const NLM_F_DUMP: u16 = libc::NLM_F_DUMP as u16;
const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const NLMSG_DONE: u16 = libc::NLMSG_DONE as u16;
const NLMSG_OVERRUN: u16 = libc::NLMSG_OVERRUN as u16;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSGERR_ATTR_OFFS: u16 = 2;
const NETLINK_GET_STRICT_CHK: libc::c_int = 12;

/// A netlink protocol: which part of the kernel the socket speaks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `NETLINK_ROUTE`: links, addresses, routes, neighbours.
    Route,
    /// `NETLINK_NETFILTER`: nftables, connection tracking.
    Netfilter,
    /// `NETLINK_GENERIC`: families by name, such as IPVS.
    Generic,
}

impl Protocol {
    fn number(self) -> libc::c_int {
        match self {
            Protocol::Route => libc::NETLINK_ROUTE,
            Protocol::Netfilter => libc::NETLINK_NETFILTER,
            Protocol::Generic => libc::NETLINK_GENERIC,
        }
    }
}

/// A netlink socket in the network namespace of the thread that opened it, where it stays.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    port: u32,
    sequence: u32,
    send_buffer: usize,
    buffer: Vec<u8>,
    sent: usize,
}

/// Part of the answer to a dump.
#[derive(Debug)]
pub enum DumpPart<'a> {
    /// All that came before does not count: the first objects come now.
    Begin,
    /// One object.
    Object(&'a Message<'a>),
}

impl Socket {
    /// Opens a socket that also hears the multicast groups.
    pub fn open(protocol: Protocol, groups: &[u32]) -> Result<Socket, KernelError> {
        // SAFETY: `socket` takes three numbers; its result is checked before use.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol.number()) };
        if fd < 0 {
            return Err(KernelError::last("open a netlink socket"));
        }
        // SAFETY: `fd` was just opened and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut socket =
            Socket { fd, port: 0, sequence: 1, send_buffer: SEND_BUFFER, buffer: vec![0; RECEIVE_LENGTH], sent: 0 };
        socket.bind()?;
        // Each of these improves on what an old kernel or a smaller capability set does; none is needed.
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK] {
            let _ = socket.set_option(libc::SOL_NETLINK, option, 1);
        }
        if socket.set_option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER).is_err() {
            let _ = socket.set_option(libc::SOL_SOCKET, libc::SO_RCVBUF, RECEIVE_BUFFER);
        }
        socket.grow_send_buffer(SEND_BUFFER);
        for group in groups {
            socket.join(*group)?;
        }
        Ok(socket)
    }

    /// The port of the socket: it marks the notifications that its own requests cause.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// How many messages were sent since the socket was opened.
    pub fn sent(&self) -> usize {
        self.sent
    }

    /// The file descriptor, to poll it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.fd)
    }

    /// Hears another multicast group.
    pub fn join(&mut self, group: u32) -> Result<(), KernelError> {
        self.set_option(libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group.cast_signed())
            .map_err(|errno| KernelError::system(format!("join netlink group {group}"), errno))
    }

    /// Sends one request and waits until the kernel has done it.
    pub fn request(&mut self, message: Vec<u8>) -> Result<(), KernelError> {
        self.batch(vec![message]).pop().unwrap_or(Err(KernelError::Malformed("no acknowledgement")))
    }

    /// Sends one request that the kernel answers with messages, and returns those.
    pub fn query(&mut self, message: Vec<u8>) -> Result<Vec<OwnedMessage>, KernelError> {
        let mut found = Vec::new();
        let mut outcome = Err(KernelError::Malformed("no acknowledgement"));
        let base = self.stamp_and_send(&mut [message], NLM_F_REQUEST | NLM_F_ACK)?;
        self.drain(|reply| {
            if reply.sequence == base {
                match reply.kind {
                    NLMSG_ERROR => outcome = read_error(&reply),
                    _ => found.push(reply.to_owned()),
                }
            }
        })?;
        outcome.map(|()| found)
    }

    /// Asks for all objects of a kind. It is repeated, a bounded number of times, where the kernel says
    /// that the objects changed meanwhile.
    pub fn dump(&mut self, message: Vec<u8>) -> Result<Vec<OwnedMessage>, KernelError> {
        let mut found = Vec::new();
        self.dump_each(message, |part| match part {
            DumpPart::Begin => found.clear(),
            DumpPart::Object(message) => found.push(message.to_owned()),
        })?;
        Ok(found)
    }

    /// The same, one by one: a long answer is never in memory as a whole.
    pub fn dump_each(&mut self, message: Vec<u8>, mut visit: impl FnMut(DumpPart<'_>)) -> Result<(), KernelError> {
        let mut message = [message];
        for _ in 0..DUMP_ATTEMPTS_MAX {
            visit(DumpPart::Begin);
            let base = self.stamp_and_send(&mut message, NLM_F_REQUEST | NLM_F_DUMP)?;
            if self.receive_dump(base, &mut visit)? {
                return Ok(());
            }
        }
        Err(KernelError::Unstable(DUMP_ATTEMPTS_MAX))
    }

    /// Sends many requests with few system calls and returns one answer for each, in their order.
    /// A request that fails does not stop those after it.
    pub fn batch(&mut self, mut messages: Vec<Vec<u8>>) -> Vec<Result<(), KernelError>> {
        let mut outcomes = Vec::with_capacity(messages.len());
        for chunk in messages.chunks_mut(BATCH_MESSAGES_MAX) {
            let missing = KernelError::Malformed("an acknowledgement is missing");
            let start = outcomes.len();
            outcomes.resize(start + chunk.len(), Err(missing));
            let drained = self.stamp_and_send(chunk, NLM_F_REQUEST | NLM_F_ACK).and_then(|base| {
                let outcomes = &mut outcomes[start..];
                self.drain(|reply| {
                    let slot = outcomes.get_mut(reply.sequence.wrapping_sub(base) as usize);
                    if let (Some(slot), NLMSG_ERROR) = (slot, reply.kind) {
                        *slot = read_error(&reply);
                    }
                })
            });
            if let Err(error) = drained {
                for outcome in &mut outcomes[start..] {
                    if matches!(outcome, Err(KernelError::Malformed(_))) {
                        *outcome = Err(error.clone());
                    }
                }
            }
        }
        outcomes
    }

    /// Sends messages as one datagram, for families where it is all or nothing (nfnetlink batches).
    /// The flags are the caller's. Errors come with the index of the message that caused them.
    ///
    /// # Errors
    ///
    /// All errors that the kernel reported. An error of the socket itself has index 0.
    pub fn transaction(&mut self, messages: &mut [Vec<u8>]) -> Result<(), Vec<(usize, KernelError)>> {
        let mut errors = Vec::new();
        let base = self.stamp_and_send(messages, NLM_F_REQUEST).map_err(|error| vec![(0, error)])?;
        let drained = self.drain(|reply| {
            if reply.kind == NLMSG_ERROR
                && let Err(error) = read_error(&reply)
            {
                errors.push((reply.sequence.wrapping_sub(base) as usize, error));
            }
        });
        if let Err(error) = drained {
            errors.push((0, error));
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// The notifications that have arrived, at most one datagram's; `None` where there is none now.
    pub fn notifications(&mut self) -> Result<Option<Vec<(u32, OwnedMessage)>>, KernelError> {
        let Some(length) = self.receive(libc::MSG_DONTWAIT)? else { return Ok(None) };
        let messages = Messages::new(self.buffer.get(..length).unwrap_or_default());
        Ok(Some(messages.map(|message| (message.port, message.to_owned())).collect()))
    }

    /// Receives one answer to its end; `false` if the objects changed meanwhile.
    fn receive_dump(&mut self, sequence: u32, visit: &mut impl FnMut(DumpPart<'_>)) -> Result<bool, KernelError> {
        let mut is_whole = true;
        loop {
            let length = self.receive(0)?.ok_or(KernelError::Malformed("a dump has no end"))?;
            for message in Messages::new(self.buffer.get(..length).unwrap_or_default()) {
                if message.sequence != sequence {
                    continue;
                }
                is_whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => {
                        read_status(&message, &message.attributes(4))?;
                        return Ok(is_whole);
                    }
                    NLMSG_ERROR => read_error(&message)?,
                    NLMSG_OVERRUN => return Err(KernelError::Overrun),
                    _ => visit(DumpPart::Object(&message)),
                }
            }
        }
    }

    /// Numbers the messages, sends them as one datagram, and returns the first number.
    fn stamp_and_send(&mut self, messages: &mut [Vec<u8>], flags: u16) -> Result<u32, KernelError> {
        // Numbers of one datagram are consecutive, and zero marks notifications.
        let count = u32::try_from(messages.len()).unwrap_or(u32::MAX);
        let base = if self.sequence.checked_add(count).is_some() { self.sequence } else { 1 };
        self.sequence = base;
        let mut datagram = Vec::with_capacity(messages.iter().map(|message| aligned(message.len())).sum());
        for message in messages.iter_mut() {
            stamp(message, self.sequence, flags);
            self.sequence = self.sequence.wrapping_add(1);
            datagram.extend_from_slice(message);
            datagram.resize(aligned(datagram.len()), 0);
        }
        self.sent += messages.len();
        self.send(&datagram)?;
        Ok(base)
    }

    fn send(&mut self, datagram: &[u8]) -> Result<(), KernelError> {
        if datagram.len() > SEND_MAX {
            return Err(KernelError::system("send so long a netlink message", Errno::EMSGSIZE));
        }
        if datagram.len() * 2 > self.send_buffer {
            self.grow_send_buffer(datagram.len() * 2);
        }
        loop {
            // SAFETY: pointer and length are those of a live slice.
            let sent = unsafe { libc::send(self.fd.as_raw_fd(), datagram.as_ptr().cast(), datagram.len(), 0) };
            match Errno::result(sent) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(KernelError::system("send a netlink message", errno)),
            }
        }
    }

    /// Reads all answers that are there. The kernel handles requests inside `send`, so none comes later.
    fn drain(&mut self, mut handle: impl FnMut(Message<'_>)) -> Result<(), KernelError> {
        let mut overrun = false;
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(Some(length)) => {
                    Messages::new(self.buffer.get(..length).unwrap_or_default()).for_each(&mut handle);
                }
                Ok(None) if overrun => return Err(KernelError::Overrun),
                Ok(None) => return Ok(()),
                Err(KernelError::Overrun) => overrun = true,
                Err(error) => return Err(error),
            }
        }
    }

    /// Receives one datagram into the buffer; `None` where there is none and `MSG_DONTWAIT` is set.
    fn receive(&mut self, flags: libc::c_int) -> Result<Option<usize>, KernelError> {
        loop {
            // SAFETY: pointer and length are those of a live, writable buffer.
            let received = unsafe {
                let buffer = self.buffer.as_mut_ptr().cast();
                libc::recv(self.fd.as_raw_fd(), buffer, self.buffer.len(), flags | libc::MSG_TRUNC)
            };
            match Errno::result(received) {
                Ok(length) if length.cast_unsigned() > self.buffer.len() => {
                    return Err(KernelError::Malformed("a datagram is longer than the receive buffer"));
                }
                Ok(length) => return Ok(Some(length.cast_unsigned())),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::ENOBUFS) => return Err(KernelError::Overrun),
                Err(errno) => return Err(KernelError::system("receive from a netlink socket", errno)),
            }
        }
    }

    fn bind(&mut self) -> Result<(), KernelError> {
        // SAFETY: all bytes zero is a valid `sockaddr_nl`.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        let mut length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        let pointer = std::ptr::from_mut(&mut address).cast::<libc::sockaddr>();
        // SAFETY: `pointer` and `length` describe `address`, which lives through both calls.
        let outcome = unsafe {
            match libc::bind(self.fd.as_raw_fd(), pointer, length) {
                0 => libc::getsockname(self.fd.as_raw_fd(), pointer, &raw mut length),
                failed => failed,
            }
        };
        Errno::result(outcome).map_err(|errno| KernelError::system("bind a netlink socket", errno))?;
        self.port = address.nl_pid;
        Ok(())
    }

    fn grow_send_buffer(&mut self, length: usize) {
        let value = libc::c_int::try_from(length).unwrap_or(libc::c_int::MAX);
        if self.set_option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, value).is_err() {
            let _ = self.set_option(libc::SOL_SOCKET, libc::SO_SNDBUF, value);
        }
        self.send_buffer = length;
    }

    fn set_option(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> Result<(), Errno> {
        let fd: RawFd = self.fd.as_raw_fd();
        let length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the pointer is to a live `c_int`, and `length` is its size.
        let outcome = unsafe { libc::setsockopt(fd, level, option, std::ptr::from_ref(&value).cast(), length) };
        Errno::result(outcome).map(drop)
    }
}

/// Reads `struct nlmsgerr` and what follows it (netlink(7); the kernel's `netlink_ack`).
fn read_error(message: &Message<'_>) -> Result<(), KernelError> {
    let attributes = if message.flags & NLM_F_ACK_TLVS == 0 {
        Attributes::new(&[])
    } else if message.flags & NLM_F_CAPPED == 0 {
        let quoted: [u8; 8] = message.header().copied().unwrap_or_default();
        message.attributes(4 + u32::from_ne_bytes([quoted[4], quoted[5], quoted[6], quoted[7]]) as usize)
    } else {
        message.attributes(4 + 16)
    };
    read_status(message, &attributes)
}

fn read_status(message: &Message<'_>, attributes: &Attributes<'_>) -> Result<(), KernelError> {
    let status: [u8; 4] = message.header().copied().unwrap_or_default();
    match i32::from_ne_bytes(status) {
        status if status >= 0 => Ok(()),
        status => Err(KernelError::Refused(Refusal {
            errno: Errno::from_raw(status.saturating_neg()),
            message: attributes.get(NLMSGERR_ATTR_MSG).and_then(|it| it.text().map(str::to_owned)),
            offset: attributes.get(NLMSGERR_ATTR_OFFS).and_then(|it| it.u32()),
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::super::MessageBuilder;
    use super::*;
    use proptest::prelude::*;

    const RTM_GETLINK: u16 = libc::RTM_GETLINK;
    const RTM_DELLINK: u16 = libc::RTM_DELLINK;

    fn delete_link(index: i32) -> Vec<u8> {
        let mut builder = MessageBuilder::new(RTM_DELLINK, 0);
        let mut header = [0; 16];
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        builder.header(&header);
        builder.finish()
    }

    proptest! {
        #[test]
        fn any_error_message_is_read(flags: u16, payload in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = read_error(&Message { kind: NLMSG_ERROR, flags, sequence: 1, port: 1, payload: &payload });
        }
    }

    #[test]
    fn a_dump_of_links_has_the_loopback() {
        let mut socket = Socket::open(Protocol::Route, &[]).unwrap();
        let mut builder = MessageBuilder::new(RTM_GETLINK, 0);
        builder.header(&[0; 16]);
        let links = socket.dump(builder.finish()).unwrap();
        let names: Vec<_> = links.iter().filter_map(|link| link.attributes(16).get(3)?.text()).collect();
        assert!(names.contains(&"lo"), "{names:?}");
    }

    #[test]
    fn each_request_of_a_batch_has_its_own_answer() {
        let mut socket = Socket::open(Protocol::Route, &[]).unwrap();
        let answers = socket.batch((0..1200).map(|_| delete_link(0x7fff_0000)).collect());
        assert_eq!(answers.len(), 1200);
        for answer in answers {
            let errno = answer.unwrap_err().errno();
            assert!(matches!(errno, Some(Errno::ENODEV | Errno::EPERM)), "{errno:?}");
        }
        assert_eq!(socket.sent(), 1200);
    }
}
