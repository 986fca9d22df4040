//! Observe and apply.

use std::net::SocketAddr;
use std::sync::Arc;

use portolan_program::udp::{Change, Program, Tunnel};

use super::counters::Counters;
use super::forwarder::Forwarder;
use super::table::{Shared, Table};
use crate::error::KernelError;
use crate::link::Links;

/// The forwarder of one network namespace: that of the thread which starts the tunnel.
///
/// What it holds is in this process, and goes with it, but for the device, which stays. A process that starts again
/// finds an empty program, and starts anew on the device that is there.
#[derive(Debug, Default)]
pub struct UdpRoom {
    program: Program,
    shared: Arc<Shared>,
    forwarder: Option<Forwarder>,
    /// What forwarders counted that have ended.
    before: Counters,
}

/// What became of changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The changes that were not made, by their position, and why. All others were made.
    pub failed: Vec<(usize, KernelError)>,
}

impl UdpRoom {
    /// A room without a tunnel.
    pub fn new() -> UdpRoom {
        UdpRoom::default()
    }

    /// What is forwarded now. A tunnel whose device was deleted is none.
    pub fn observe(&mut self) -> Program {
        if self.forwarder.as_ref().is_some_and(|forwarder| forwarder.lost().is_some()) {
            self.stop();
        }
        self.program.clone()
    }

    /// Makes changes. All changes of routes take effect at once, as one new table, before a tunnel starts.
    pub fn apply(&mut self, changes: &[Change]) -> Report {
        let mut report = Report::default();
        let mut has_routes = false;
        for change in changes {
            match change {
                Change::SetRoute(prefix, route) => {
                    self.program.routes.insert(*prefix, route.clone());
                    has_routes = true;
                }
                Change::RemoveRoute(prefix) => {
                    self.program.routes.remove(prefix);
                    has_routes = true;
                }
                Change::Stop | Change::Start(_) | Change::Update(_) => {}
            }
        }
        if has_routes {
            let before = self.shared.get();
            self.shared.set(Arc::new(Table::build(&self.program.routes, &before)));
        }
        for (position, change) in changes.iter().enumerate() {
            match change {
                Change::Stop => self.stop(),
                Change::Start(tunnel) => {
                    if let Err(error) = self.start(tunnel) {
                        report.failed.push((position, error));
                    }
                }
                Change::Update(tunnel) => self.update(tunnel),
                Change::SetRoute(..) | Change::RemoveRoute(_) => {}
            }
        }
        report
    }

    fn start(&mut self, tunnel: &Tunnel) -> Result<(), KernelError> {
        self.stop();
        self.forwarder = Some(Forwarder::start(tunnel, self.shared.clone())?);
        self.program.tunnel = Some(tunnel.clone());
        Ok(())
    }

    fn update(&mut self, tunnel: &Tunnel) {
        if let Some(forwarder) = &self.forwarder {
            forwarder.set_mtu(tunnel.mtu);
            self.program.tunnel = Some(tunnel.clone());
        }
    }

    /// Ends the tunnel, and keeps its routes and its device.
    pub fn stop(&mut self) {
        if let Some(forwarder) = self.forwarder.take() {
            forwarder.count(&mut self.before);
        }
        self.program.tunnel = None;
    }

    /// Ends the tunnel, and deletes a device of this name in the calling thread's namespace.
    pub fn clean(&mut self, device: &str) -> Result<(), KernelError> {
        self.stop();
        let mut links = Links::current()?;
        if links.exists(device) { links.delete(device) } else { Ok(()) }
    }

    /// What was counted since the room was made.
    pub fn counters(&self) -> Counters {
        let mut total = self.before.clone();
        if let Some(forwarder) = &self.forwarder {
            forwarder.count(&mut total);
        }
        total
    }

    /// The peers to which the path is narrower than the tunnel, and the largest packet that it carries inside.
    pub fn narrow_paths(&self) -> Vec<(SocketAddr, u32)> {
        let Some(forwarder) = &self.forwarder else { return Vec::new() };
        let now_ms = forwarder.now_ms();
        let table = self.shared.get();
        table.peers().iter().filter_map(|peer| Some((peer.address, peer.inside_max(now_ms)?))).collect()
    }
}
