//! Names of links to their numbers and back, in the namespace of a socket.
//!
//! An `ioctl` on the socket answers for the namespace in which the socket was opened, whatever thread
//! asks, and takes no netlink message.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use crate::error::KernelError;

/// The number of a link.
pub(crate) fn of(socket: BorrowedFd<'_>, name: &str) -> Result<u32, KernelError> {
    let missing = || KernelError::NoSuchLink(name.to_owned());
    // SAFETY: all bytes zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: it ends the name.
    let room = request.ifr_name.len() - 1;
    if name.is_empty() || name.len() > room {
        return Err(missing());
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte.cast_signed();
    }
    // SAFETY: the kernel reads a name from `request` and writes a number to it; it lives through the call.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request) };
    match Errno::result(outcome) {
        // SAFETY: the call succeeded, so the kernel wrote the number.
        Ok(_) => Ok(unsafe { request.ifr_ifru.ifru_ifindex }.cast_unsigned()),
        Err(Errno::ENODEV) => Err(missing()),
        Err(errno) => Err(KernelError::system(format!("find link {name}"), errno)),
    }
}

/// The name of a link; `None` where it is gone.
pub(crate) fn name(socket: BorrowedFd<'_>, index: u32) -> Option<String> {
    // SAFETY: all bytes zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_ifindex = index.cast_signed();
    // SAFETY: the kernel reads a number from `request` and writes a name to it; it lives through the call.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFNAME, &raw mut request) };
    Errno::result(outcome).ok()?;
    let bytes = request.ifr_name.iter().map(|byte| byte.cast_unsigned()).take_while(|byte| *byte != 0);
    String::from_utf8(bytes.collect()).ok()
}
