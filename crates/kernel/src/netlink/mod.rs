//! Links, addresses, routes, neighbours and pod interfaces in the kernel, over rtnetlink.
//!
//! The twin of `portolan_program::netlink`: it observes and applies, and decides nothing.

mod apply;
mod observe;
mod pod;
pub(crate) mod wire;

#[cfg(test)]
mod tests;

use portolan_program::netlink::{Change, PodLink};

pub use apply::Report;
pub use observe::Observed;
pub use pod::{Difference, Differences};

use crate::error::KernelError;
use crate::index;
use crate::rawnetlink::{Protocol, Socket};

/// rtnetlink in the namespace of the thread that opened it. Sysctls are those of the thread that calls:
/// keep to threads of one namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
}

impl Netlink {
    /// Opens rtnetlink in the calling thread's namespace.
    pub fn open() -> Result<Netlink, KernelError> {
        Ok(Netlink { socket: Socket::open(Protocol::Route, &[])? })
    }

    /// What the kernel holds.
    pub fn observe(&mut self) -> Result<Observed, KernelError> {
        observe::observe(&mut self.socket)
    }

    /// Does the steps, as far as they can be done. No step takes no message.
    pub fn apply(&mut self, changes: &[Change]) -> Report {
        apply::apply(self, changes)
    }

    /// Reads a pod's interface back, on the node and inside the pod.
    ///
    /// # Errors
    ///
    /// Everything that differs.
    pub fn check_pod(&mut self, pod: &PodLink) -> Result<(), Vec<Difference>> {
        pod::check(self, pod)
    }

    /// The port that marks notifications of our own requests.
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    fn index(&self, name: &str) -> Result<u32, KernelError> {
        index::of(self.socket.fd(), name)
    }
}
