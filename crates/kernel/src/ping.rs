//! One ICMP echo request and what comes of it (RFC 792; RFC 4443 §4): the probe of a live trace.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, recv, send, socket,
};

use crate::error::KernelError;

/// The longest message that is read: an answer has what the request had, and an IPv4 header before it.
const MESSAGE_LENGTH_MAX: usize = 2048;

/// What came of an echo request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Echo {
    /// It was answered, after so long.
    Answered(Duration),
    /// It was refused, for this reason: no route, host unreachable, not permitted.
    Refused(Errno),
    /// Nothing came back in time.
    Silence,
}

/// Types of a request and of its answer.
struct Types {
    request: u8,
    reply: u8,
}

const ICMP: Types = Types { request: 8, reply: 0 };
const ICMP_V6: Types = Types { request: 128, reply: 129 };

/// Sends one echo request from the calling thread's namespace and waits for its answer. An unspecified
/// source lets the routes choose.
pub fn echo(
    source: IpAddr,
    destination: IpAddr,
    identifier: u16,
    payload: &[u8],
    wait: Duration,
) -> Result<Echo, KernelError> {
    let (family, protocol, types) = match destination {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, ICMP),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, ICMP_V6),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Raw, flags, protocol)
        .map_err(|errno| KernelError::system("open a raw socket (needs CAP_NET_RAW)", errno))?;
    if !source.is_unspecified() {
        bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(source, 0)))
            .map_err(|errno| KernelError::system(format!("send from {source}"), errno))?;
    }
    let request = request(&types, identifier, payload, destination.is_ipv4());
    let begin = Instant::now();
    let sent = connect(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(destination, 0)))
        .and_then(|()| send(socket.as_raw_fd(), &request, MsgFlags::empty()));
    if let Err(errno) = sent {
        return Ok(Echo::Refused(errno));
    }
    loop {
        match receive(&socket, &types, identifier, payload) {
            Ok(true) => return Ok(Echo::Answered(begin.elapsed())),
            // Other people's messages.
            Ok(false) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let left = wait.saturating_sub(begin.elapsed());
                if left.is_zero() {
                    return Ok(Echo::Silence);
                }
                let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
                // An interrupted wait is a short one.
                let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout);
            }
            Err(errno) => return Ok(Echo::Refused(errno)),
        }
    }
}

/// Whether the next message is the answer.
fn receive(socket: &OwnedFd, types: &Types, identifier: u16, payload: &[u8]) -> Result<bool, Errno> {
    let mut buffer = [0; MESSAGE_LENGTH_MAX];
    let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    let bytes = buffer.get(..length).unwrap_or_default();
    // IPv4 gives its own header too, IPv6 does not.
    let header =
        if types.reply == ICMP.reply { bytes.first().map_or(0, |first| usize::from(first & 0x0f) * 4) } else { 0 };
    Ok(bytes.get(header..).is_some_and(|message| is_reply(message, types, identifier, payload)))
}

fn is_reply(message: &[u8], types: &Types, identifier: u16, payload: &[u8]) -> bool {
    let Some((head, rest)) = message.split_first_chunk::<8>() else { return false };
    head[0] == types.reply && head[1] == 0 && head[4..6] == identifier.to_be_bytes() && rest == payload
}

/// The message. The kernel writes the checksum of IPv6, which covers addresses that it chooses.
fn request(types: &Types, identifier: u16, payload: &[u8], with_checksum: bool) -> Vec<u8> {
    let [high, low] = identifier.to_be_bytes();
    let mut message = vec![types.request, 0, 0, 0, high, low, 0, 1];
    message.extend_from_slice(payload);
    if with_checksum {
        let sum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
    }
    message
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u32 = bytes.chunks(2).map(word).fold(0, u32::wrapping_add);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Links;
    use crate::netns::{Namespace, in_namespace};

    #[test]
    fn the_checksum_of_a_message_with_its_checksum_is_zero() {
        for payload in [&b""[..], b"x", b"portolan"] {
            assert_eq!(checksum(&request(&ICMP, 0xbeef, payload, true)), 0);
        }
    }

    #[test]
    fn an_echo_is_answered_or_refused() {
        let Ok(inside) = Namespace::create_unnamed() else { return println!("skipped: needs CAP_SYS_ADMIN") };
        let ping = |source: &str, destination: &str| {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            in_namespace(&inside, || echo(source, destination, 7, b"a cookie", Duration::from_millis(500)))
                .unwrap()
                .unwrap()
        };
        assert_eq!(ping("0.0.0.0", "127.0.0.1"), Echo::Refused(Errno::ENETUNREACH));
        Links::open(&inside).unwrap().set_up("lo").unwrap();
        for (source, destination) in [("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.1"), ("::", "::1")] {
            assert!(matches!(ping(source, destination), Echo::Answered(_)), "{source} {destination}");
        }
        assert_eq!(ping("0.0.0.0", "192.0.2.1"), Echo::Refused(Errno::ENETUNREACH));
    }
}
