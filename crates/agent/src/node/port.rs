//! The kernel as the engine sees it.

use portolan_intent::NodeView;
use portolan_kernel::KernelError;
use portolan_kernel::ipset::IpsetRoom;
use portolan_kernel::iptables::IptablesRoom;
use portolan_kernel::ipvs::IpvsRoom;
use portolan_kernel::netlink::{Netlink, Observed};
use portolan_kernel::nftables::NftablesRoom;
use portolan_net::Family;
use portolan_program::{netlink, nftables};

use super::rooms::KeptRoom;
use super::service_rooms;
use crate::config::{AgentConfig, ServicesMode};

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
    /// The rooms beside nftables that the configured mode of Services uses, in the order of their application.
    fn used_rooms(_config: &AgentConfig, _view: &NodeView, _families: &[Family]) -> Vec<Box<dyn KeptRoom<Self> + Send>>
    where
        Self: Sized,
    {
        Vec::new()
    }
    /// Those that a mode does not use, or no mode at all, in the order in which they are emptied.
    fn unused_rooms(&mut self, _mode: Option<ServicesMode>) -> Vec<Box<dyn KeptRoom<Self> + Send>>
    where
        Self: Sized,
    {
        Vec::new()
    }
}

/// The real kernel, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct RealKernel {
    netlink: Netlink,
    nftables: NftablesRoom,
    /// Opened when a mode asks for it.
    iptables: Option<IptablesRoom>,
    ipvs: Option<IpvsRoom>,
    ipset: Option<IpsetRoom>,
}

impl RealKernel {
    /// Opens the sockets. Fails where capabilities or kernel features are missing.
    pub fn open() -> Result<RealKernel, KernelError> {
        Ok(RealKernel {
            netlink: Netlink::open()?,
            nftables: NftablesRoom::open()?,
            iptables: None,
            ipvs: None,
            ipset: None,
        })
    }

    /// The ports of the sockets, which mark the kernel's notifications of our own changes.
    pub fn ports(&self) -> [u32; 2] {
        [self.netlink.port(), self.nftables.port()]
    }

    pub(super) fn nftables(&mut self) -> &mut NftablesRoom {
        &mut self.nftables
    }

    pub(super) fn iptables(&mut self) -> Result<&mut IptablesRoom, KernelError> {
        let room = match self.iptables.take() {
            Some(room) => room,
            None => IptablesRoom::open(&Family::ALL)?,
        };
        Ok(self.iptables.insert(room))
    }

    pub(super) fn ipvs(&mut self) -> Result<&mut IpvsRoom, KernelError> {
        let room = match self.ipvs.take() {
            Some(room) => room,
            None => IpvsRoom::open()?,
        };
        Ok(self.ipvs.insert(room))
    }

    pub(super) fn ipset(&mut self) -> Result<&mut IpsetRoom, KernelError> {
        let room = match self.ipset.take() {
            Some(room) => room,
            None => IpsetRoom::open()?,
        };
        Ok(self.ipset.insert(room))
    }
}

impl<C: Clone> Applied<C> {
    /// From a report that names changes by their position.
    fn numbered(changes: &[C], failed: Vec<(usize, KernelError)>, messages: usize) -> Applied<C> {
        let named = |(index, error): (usize, KernelError)| changes.get(index).map(|change| (change.clone(), error));
        Applied { failed: failed.into_iter().filter_map(named).collect(), messages }
    }

    /// By a room of the kernel, which says what failed and how many messages it took. Without the room nothing can
    /// even be tried.
    pub(super) fn by<R>(
        room: Result<R, KernelError>,
        changes: &[C],
        apply: impl FnOnce(R) -> (Vec<(usize, KernelError)>, usize),
    ) -> Applied<C> {
        match room.map(apply) {
            Ok((failed, messages)) => Applied::numbered(changes, failed, messages),
            Err(error) => {
                Applied { failed: changes.iter().map(|change| (change.clone(), error.clone())).collect(), messages: 0 }
            }
        }
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
        Applied::numbered(changes, report.failed, report.messages)
    }

    fn used_rooms(config: &AgentConfig, view: &NodeView, families: &[Family]) -> Vec<Box<dyn KeptRoom<Self> + Send>> {
        service_rooms::used(config, view, families)
    }

    fn unused_rooms(&mut self, mode: Option<ServicesMode>) -> Vec<Box<dyn KeptRoom<Self> + Send>> {
        // What the kernel or the node cannot do was not done.
        let possible =
            [("ipvs", self.ipvs().is_ok()), ("iptables", self.iptables().is_ok()), ("ipset", self.ipset().is_ok())];
        let is_possible = |name: &str| possible.contains(&(name, true));
        service_rooms::unused(mode).into_iter().filter(|room| is_possible(room.name())).collect()
    }
}
