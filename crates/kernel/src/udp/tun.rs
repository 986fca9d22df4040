//! The TUN device (Linux `Documentation/networking/tuntap.rst`): several queues, each a descriptor, and before each
//! packet a header that says how it is to be divided.
//!
//! The device outlives the process that made it: routes into it stay, and packets to other nodes' pods are dropped
//! while nobody forwards them, instead of leaving unencapsulated by the default route.

use std::fs::OpenOptions;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;

use crate::error::KernelError;

/// Offers to the kernel, best first: each older kernel takes a later one. Divided TCP; UDP since Linux 6.2.
const OFFERS: [libc::c_uint; 4] = [
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN | libc::TUN_F_USO4 | libc::TUN_F_USO6,
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN,
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6,
    0,
];

/// One queue of the device.
#[derive(Debug)]
pub(super) struct Queue {
    descriptor: OwnedFd,
}

/// The device.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) queues: Vec<Queue>,
    /// Whether the kernel gives and takes UDP packets that are to be divided.
    pub(super) divides_udp: bool,
}

/// Opens a device with some queues, and makes it if there is none of that name.
pub(super) fn open(name: &str, queues: usize) -> Result<Device, KernelError> {
    let queues = (0..queues.max(1)).map(|_| open_queue(name)).collect::<Result<Vec<_>, _>>()?;
    let mut divides_udp = false;
    if let Some(first) = queues.first() {
        control(first, libc::TUNSETPERSIST, 1).map_err(|errno| failed(name, "keep", errno))?;
        let taken = OFFERS.into_iter().find(|offer| control(first, libc::TUNSETOFFLOAD, u64::from(*offer)).is_ok());
        divides_udp = taken.is_some_and(|offer| offer & libc::TUN_F_USO4 != 0);
    }
    Ok(Device { queues, divides_udp })
}

fn failed(name: &str, what: &str, errno: Errno) -> KernelError {
    let hint = match errno {
        Errno::EINVAL | Errno::EBUSY => {
            "; a device of that name is there that is none of ours, or another program forwards on it: \
             stop that, or delete it (`ip link delete`)"
        }
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
            "; this needs /dev/net/tun and CONFIG_TUN: load it with `modprobe tun`"
        }
        Errno::EPERM | Errno::EACCES => "; this needs CAP_NET_ADMIN",
        _ => "",
    };
    KernelError::system(format!("{what} the TUN device {name}{hint}"), errno)
}

fn open_queue(name: &str) -> Result<Queue, KernelError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|error| failed(name, "open", Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))?;
    // SAFETY: all bytes zero are a valid value of this structure of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(failed(name, "open", Errno::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE) as libc::c_short;
    // SAFETY: `TUNSETIFF` reads and writes a `struct ifreq`, which `request` is, and which lives through the call.
    let outcome = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(outcome).map_err(|errno| failed(name, "open", errno))?;
    Ok(Queue { descriptor: file.into() })
}

/// A request whose argument is a number.
fn control(queue: &Queue, request: libc::Ioctl, argument: u64) -> Result<(), Errno> {
    // SAFETY: both requests that are made this way take a number, and no memory.
    let outcome = unsafe { libc::ioctl(queue.descriptor.as_raw_fd(), request, argument as libc::c_ulong) };
    Errno::result(outcome).map(drop)
}

impl Queue {
    /// Reads one packet with the header before it. `EAGAIN` if there is none.
    pub(super) fn read(&self, vnet: &mut [u8], packet: &mut [u8]) -> Result<usize, Errno> {
        let mut parts = [IoSliceMut::new(vnet), IoSliceMut::new(packet)];
        nix::sys::uio::readv(&self.descriptor, &mut parts)
    }

    /// Writes one packet, which lies in parts.
    pub(super) fn write(&self, parts: &[IoSlice<'_>]) -> Result<usize, Errno> {
        nix::sys::uio::writev(&self.descriptor, parts)
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
