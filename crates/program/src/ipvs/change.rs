//! One change of what the kernel holds, and in which order changes are made.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{RealKey, RealServer, ServerKey, Timeouts, VirtualServer};

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Sets a sysctl.
    SetSysctl(String, String),
    /// Sets how long connections are remembered.
    SetTimeouts(Timeouts),
    /// Makes the dummy link.
    CreateDevice,
    /// Makes a virtual server. Its real servers come by changes of their own.
    AddServer(ServerKey, Arc<VirtualServer>),
    /// Changes the settings of a virtual server.
    SetServer(ServerKey, Arc<VirtualServer>),
    /// Adds a real server.
    AddReal(ServerKey, RealServer),
    /// Changes the settings of a real server, such as its weight.
    SetReal(ServerKey, RealServer),
    /// Puts an address on the dummy link: from here on its packets come to IPVS.
    AddAddress(IpAddr),
    /// Takes an address off the dummy link.
    RemoveAddress(IpAddr),
    /// Removes a real server, with its connections.
    RemoveReal(ServerKey, RealKey),
    /// Removes a virtual server and its real servers.
    RemoveServer(ServerKey),
    /// Deletes the dummy link.
    DeleteDevice,
}

/// The order of changes: traffic is sent to a thing only when it is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Settings and the link.
    Prepare,
    /// Virtual servers.
    Servers,
    /// Real servers that come, or get another weight.
    Fill,
    /// Addresses that come.
    Dispatch,
    /// Addresses that go.
    Withdraw,
    /// Real servers that go.
    Empty,
    /// Virtual servers that go, and the link.
    Delete,
}

impl Change {
    /// When it is its turn.
    pub fn phase(&self) -> Phase {
        match self {
            Change::SetSysctl(..) | Change::SetTimeouts(_) | Change::CreateDevice => Phase::Prepare,
            Change::AddServer(..) | Change::SetServer(..) => Phase::Servers,
            Change::AddReal(..) | Change::SetReal(..) => Phase::Fill,
            Change::AddAddress(_) => Phase::Dispatch,
            Change::RemoveAddress(_) => Phase::Withdraw,
            Change::RemoveReal(..) => Phase::Empty,
            Change::RemoveServer(_) | Change::DeleteDevice => Phase::Delete,
        }
    }
}
