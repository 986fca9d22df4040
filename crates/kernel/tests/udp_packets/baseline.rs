//! A plain forwarder of Flannel's wire format: one packet a call, one thread, no offloads, a list of routes, IPv4 only.
//!
//! It is what the benchmark measures against, and a stranger for ours to speak to. It shares no code with ours.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::{PollFd, PollFlags, poll};

/// How long it waits before it looks whether it is to stop, in milliseconds.
const WAIT_MS: u16 = 50;

/// A prefix and the peer behind it.
pub(crate) type Way = (Ipv4Addr, u8, SocketAddrV4);

/// A device and a socket.
pub(crate) struct Baseline {
    tun: File,
    socket: UdpSocket,
    ways: Vec<Way>,
}

impl Baseline {
    /// Opens both in the calling thread's namespace.
    pub(crate) fn open(device: &str, local: SocketAddr, ways: Vec<Way>) -> std::io::Result<Baseline> {
        let tun = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        // SAFETY: all bytes zero are a valid value of this structure of numbers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(device.bytes().take(15)) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: `TUNSETIFF` reads and writes a `struct ifreq`, which lives through the call.
        if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let socket = UdpSocket::bind(local)?;
        socket.set_nonblocking(true)?;
        Ok(Baseline { tun, socket, ways })
    }

    /// Forwards until it is told to stop.
    pub(crate) fn run(&mut self, stop: &AtomicBool) -> std::io::Result<()> {
        let mut buffer = vec![0; 1 << 16];
        while !stop.load(Ordering::Relaxed) {
            let mut descriptors =
                [PollFd::new(self.tun.as_fd(), PollFlags::POLLIN), PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            poll(&mut descriptors, WAIT_MS)?;
            while self.outward(&mut buffer)? | self.inward(&mut buffer)? {}
        }
        Ok(())
    }

    fn outward(&mut self, buffer: &mut [u8]) -> std::io::Result<bool> {
        let length = match self.tun.read(buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        let packet = &mut buffer[..length];
        if let Some(destination) = destination(packet)
            && let Some((.., peer)) = self.ways.iter().find(|(base, length, _)| holds(*base, *length, destination))
            && take_hop(packet)
        {
            let _ = self.socket.send_to(packet, peer);
        }
        Ok(true)
    }

    fn inward(&mut self, buffer: &mut [u8]) -> std::io::Result<bool> {
        let length = match self.socket.recv(buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        let packet = &mut buffer[..length];
        if destination(packet).is_some() && take_hop(packet) {
            let _ = self.tun.write(packet);
        }
        Ok(true)
    }
}

fn destination(packet: &[u8]) -> Option<Ipv4Addr> {
    let head = packet.first_chunk::<20>()?;
    (head[0] >> 4 == 4).then(|| Ipv4Addr::new(head[16], head[17], head[18], head[19]))
}

fn holds(base: Ipv4Addr, length: u8, address: Ipv4Addr) -> bool {
    let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
    u32::from(base) & mask == u32::from(address) & mask
}

/// Takes a hop, and says whether one is left (RFC 1141 for the checksum).
fn take_hop(packet: &mut [u8]) -> bool {
    packet[8] = packet[8].wrapping_sub(1);
    let sum = u32::from(u16::from_be_bytes([packet[10], packet[11]])) + 0x100;
    let sum = (sum + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet[8] > 0
}
