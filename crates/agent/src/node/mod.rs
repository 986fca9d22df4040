//! The node's agent: one loop that keeps the kernel as the cluster wants it.
//!
//! ```text
//!  source ─┐                                        ┌▶ nftables │ iptables │ ipvs
//!  CNI ────┼─▶ role (one loop) ─▶ state ─▶ intent ─▶ programs ─▶ kernel
//!  monitor ┤        │                               └▶ netlink
//!  socket ─┘        └▶ answers: tables, plan, trace, metrics
//! ```
//!
//! - [`role`] is the loop: it waits for events, gathers them, and lets the engine run a cycle.
//! - [`engine`] is the cycle: tables to intent to programs to kernel, and what failed stays dirty;
//!   [`refusals`] says what and why.
//! - [`verbs`] answers CNI calls, [`answers`] the administration socket.
//! - [`rooms`] are the subsystems that serve Services in a mode other than nftables.
//! - `mending` puts single chains back that others changed.
//! - [`port`] is the kernel as the engine sees it, so that a fake one can stand in.
//!
//! It promises: nothing in the kernel changes before every table is in sync; a restart adopts what it
//! finds; stopping leaves the data plane forwarding; what others break is mended on notification.

mod answers;
mod compiled;
pub mod engine;
mod mending;
pub mod port;
mod refusals;
mod role;
pub mod rooms;
mod service_rooms;
mod stale;
mod verbs;
mod waiting;
mod watch;

#[cfg(test)]
mod tests;

pub use answers::table;
pub use role::{RunError, clean, clean_kernel, run};
