//! One handle on all of the kernel's subsystems that we program.

use crate::error::KernelError;
use crate::netlink::Netlink;
use crate::netns::{Namespace, in_namespace};

/// The kernel, in one network namespace.
#[derive(Debug)]
pub struct Kernel {
    netlink: Netlink,
}

impl Kernel {
    /// Binds to the calling thread's network namespace.
    pub fn open() -> Result<Kernel, KernelError> {
        Ok(Kernel { netlink: Netlink::open()? })
    }

    /// Binds to another network namespace. Sysctls are still those of the thread that applies.
    pub fn open_in(namespace: &Namespace) -> Result<Kernel, KernelError> {
        in_namespace(namespace, Kernel::open)?
    }

    /// Links, addresses, routes, neighbours, pod interfaces and sysctls.
    pub fn netlink(&mut self) -> &mut Netlink {
        &mut self.netlink
    }
}
