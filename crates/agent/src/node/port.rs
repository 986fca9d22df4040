//! The kernel as the engine sees it.

use portolan_kernel::KernelError;
use portolan_kernel::netlink::{Netlink, Observed};
use portolan_kernel::nftables::NftablesRoom;
use portolan_program::{netlink, nftables};

/// What became of a list of changes.
#[derive(Debug)]
pub struct Applied<C> {
    /// What the kernel refused, and why.
    pub failed: Vec<(C, KernelError)>,
    /// Netlink messages that it took.
    pub messages: usize,
}

/// Observing and applying, room by room.
pub trait KernelPort {
    /// What rtnetlink holds: ours and others'.
    fn observe_netlink(&mut self) -> Result<Observed, KernelError>;
    /// Makes changes; one that fails does not stop unrelated ones.
    fn apply_netlink(&mut self, changes: &[netlink::Change]) -> Applied<netlink::Change>;
    /// What a pod's interface lacks, seen from inside the pod.
    fn check_pod(&mut self, pod: &netlink::PodLink) -> Vec<String>;
    /// What our nftables tables hold.
    fn observe_nftables(&mut self) -> Result<nftables::Program, KernelError>;
    /// Makes changes in one transaction, or a few.
    fn apply_nftables(&mut self, changes: &[nftables::Change]) -> Applied<nftables::Change>;
}

/// The real kernel, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct RealKernel {
    netlink: Netlink,
    nftables: NftablesRoom,
}

impl RealKernel {
    /// Opens the sockets. Fails where capabilities or kernel features are missing.
    pub fn open() -> Result<RealKernel, KernelError> {
        Ok(RealKernel { netlink: Netlink::open()?, nftables: NftablesRoom::open()? })
    }

    /// The ports of the sockets, which mark the kernel's notifications of our own changes.
    pub fn ports(&self) -> [u32; 2] {
        [self.netlink.port(), self.nftables.port()]
    }
}

impl KernelPort for RealKernel {
    fn observe_netlink(&mut self) -> Result<Observed, KernelError> {
        self.netlink.observe()
    }

    fn apply_netlink(&mut self, changes: &[netlink::Change]) -> Applied<netlink::Change> {
        let report = self.netlink.apply(changes);
        Applied { failed: report.failed, messages: report.messages }
    }

    fn check_pod(&mut self, pod: &netlink::PodLink) -> Vec<String> {
        let differences = self.netlink.check_pod(pod).err().unwrap_or_default();
        differences.iter().map(ToString::to_string).collect()
    }

    fn observe_nftables(&mut self) -> Result<nftables::Program, KernelError> {
        self.nftables.observe()
    }

    fn apply_nftables(&mut self, changes: &[nftables::Change]) -> Applied<nftables::Change> {
        let report = self.nftables.apply(changes);
        let named = |(index, error): (usize, KernelError)| changes.get(index).map(|change| (change.clone(), error));
        Applied { failed: report.failed.into_iter().filter_map(named).collect(), messages: report.messages }
    }
}
