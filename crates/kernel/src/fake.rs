//! A kernel in memory: it takes the same steps and is observed the same way. For tests of whole
//! scenarios, which need no rights and touch nothing.

use portolan_program::netlink::{Change, Program, Surroundings};

use crate::error::{KernelError, Refusal};
use crate::netlink::{Observed, Report};

/// What a node's kernel holds, in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FakeKernel {
    netlink: Program,
    others: Surroundings,
    refusals: usize,
}

impl FakeKernel {
    /// A kernel that holds nothing of ours.
    pub fn new(others: Surroundings) -> FakeKernel {
        FakeKernel { others, ..FakeKernel::default() }
    }

    /// What rtnetlink holds.
    pub fn observe_netlink(&self) -> Observed {
        Observed { ours: self.netlink.clone(), others: self.others.clone() }
    }

    /// What rtnetlink holds, to be changed behind our back.
    pub fn netlink_mut(&mut self) -> (&mut Program, &mut Surroundings) {
        (&mut self.netlink, &mut self.others)
    }

    /// Refuses the next steps, as a kernel without memory would.
    pub fn refuse_next(&mut self, steps: usize) {
        self.refusals = steps;
    }

    /// Does the steps.
    pub fn apply_netlink(&mut self, changes: &[Change]) -> Report {
        let mut report = Report::default();
        let mut ordered: Vec<&Change> = changes.iter().collect();
        ordered.sort_by_key(|change| change.phase());
        for change in ordered {
            report.messages += 1;
            let outcome = self.step(change);
            report.record(change, outcome);
        }
        report
    }

    fn step(&mut self, change: &Change) -> Result<(), KernelError> {
        if self.refusals > 0 {
            self.refusals -= 1;
            let refusal = Refusal { errno: nix::errno::Errno::ENOMEM, message: None, offset: None };
            return Err(KernelError::Refused(refusal));
        }
        if let Some(device) = change.device().filter(|device| !self.has_link(device)) {
            return Err(KernelError::NoSuchLink(device.to_owned()));
        }
        let held = &mut self.netlink;
        match change.clone() {
            Change::RemoveRoute(it) => drop(held.routes.remove(&it.destination)),
            Change::RemoveForwarding(it) => drop(held.forwarding.remove(&(it.device, it.mac))),
            Change::RemoveNeighbour(it) => drop(held.neighbours.remove(&(it.device, it.address))),
            Change::RemoveAddress(it) => drop(held.addresses.remove(&(it.device, it.prefix))),
            Change::RemovePod(it) => drop(held.pods.remove(&it.key)),
            Change::RemoveLink(it) => self.remove_link(&it.name),
            Change::CreateLink(it) | Change::AdjustLink(it) => {
                self.others.links.retain(|other| other.name != it.name);
                held.links.insert(it.name.clone(), it);
            }
            Change::SetSysctl { path, value } => {
                let origin = portolan_net::Origin::configuration("kernel");
                held.sysctls.insert(path, portolan_program::netlink::Sysctl { value, origin });
            }
            Change::AddAddress(it) => drop(held.addresses.insert((it.device.clone(), it.prefix), it)),
            Change::SetNeighbour(it) => drop(held.neighbours.insert((it.device.clone(), it.address), it)),
            Change::SetForwarding(it) => drop(held.forwarding.insert((it.device.clone(), it.mac), it)),
            Change::AddRoute(it) => {
                let taken = |other: &&portolan_program::netlink::ForeignRoute| {
                    other.destination == it.destination
                        && (other.device != it.device || other.gateway != Some(it.gateway))
                };
                if self.others.routes.iter().find(taken).is_some() {
                    let wanted = Change::AddRoute(it.clone()).to_string();
                    return Err(KernelError::RouteTaken { destination: it.destination, wanted });
                }
                held.routes.insert(it.destination, it);
            }
            Change::ReplaceRoute(it) => {
                self.others.routes.retain(|other| other.destination != it.destination);
                held.routes.insert(it.destination, it);
            }
            Change::CreatePod(it) | Change::AdjustPod(it) => drop(held.pods.insert(it.key.clone(), it)),
        }
        Ok(())
    }

    fn has_link(&self, name: &str) -> bool {
        self.netlink.links.contains_key(name) || self.others.link(name).is_some()
    }

    /// What hangs on a link goes with it.
    fn remove_link(&mut self, name: &str) {
        let held = &mut self.netlink;
        held.links.remove(name);
        held.addresses.retain(|(device, _), _| device != name);
        held.neighbours.retain(|(device, _), _| device != name);
        held.forwarding.retain(|(device, _), _| device != name);
        held.routes.retain(|_, route| route.device != name);
        held.sysctls.retain(|path, _| !path.split('/').any(|part| part == name));
        for pod in held.pods.values_mut().filter(|pod| pod.bridge == name) {
            pod.bridge.clear();
        }
    }
}
