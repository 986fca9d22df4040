//! Services as IPVS virtual servers, and their addresses on a dummy link, as kube-proxy's `ipvs` mode has them.
//!
//! Each frontend is a virtual server, its endpoints are the real servers. IPVS takes only packets that are for
//! this node, so every Service address is an address of the link `kube-ipvs0`; node ports are virtual servers at the
//! node's own addresses. It needs Linux 4.1 with `ip_vs`, `dummy` and the scheduler's module; it owns the link, the
//! addresses on it, and the virtual servers that forward by masquerading and are not excluded
//! ([`IpvsSettings::exclude`]).
//!
//! IPVS balances and nothing else. Who is masqueraded, refused or dropped is in sets and chains, which are rooms of
//! their own: `ipset`, and `iptables` for this mode.
//!
//! - [`program`]: the typed program. [`compile`]: from intent, incrementally or from nothing.
//! - [`diff`]: what to change in the kernel. [`render`]: the text of `ipvsadm -S -n` and `ip address`.
//! - [`interpret`]: what IPVS would do to a packet.

mod change;
mod compile;
mod diff;
mod interpret;
mod program;
mod render;
mod settings;
#[cfg(test)]
mod tests;

pub use change::{Change, Phase};
pub use compile::{Compiler, LEAVING_CHECK_INTERVAL, LEAVING_MAX, compile, compile_with, sysctl_paths};
pub use diff::diff;
pub use interpret::{Alternative, Outcome, Verdict, interpret};
pub use program::{
    DEVICE, Forwarding, Program, RealKey, RealServer, Scheduler, ServerKey, SourceHash, Timeouts, VirtualServer,
};
pub use render::{render, render_change, render_server};
pub use settings::IpvsSettings;
