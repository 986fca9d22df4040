//! Makes the kernel hold a program, reads it back, watches it.
//!
//! - [`Kernel`]: one handle on all that we program. [`netlink`], [`nftables`], [`iptables`], [`ipvs`] and
//!   [`ipset`] are the twins of the rooms of those names.
//! - [`udp`]: the forwarder of the `udp` fabric.
//! - [`monitor`]: hears of changes that others make.
//! - [`capture`]: sees packets.
//! - [`conntrack`]: the connections that the kernel tracks.
//! - [`netns`], [`process`], [`link`], [`sysctl`]: namespaces, programs inside them, topologies, settings.
//! - [`fake`]: a kernel in memory, for tests.
//! - [`rawnetlink`]: messages on a netlink socket, and nothing of their meaning.
//!
//! This is the one crate that speaks to the kernel, and the one that may use `unsafe`. Everything is
//! synchronous. What is ours is recognised by what the kernel itself holds (`layout` in the `program`
//! crate), never by memory, so that a restart adopts what it finds.

pub mod capture;
pub mod conntrack;
mod error;
pub mod fake;
mod index;
pub mod ipset;
pub mod iptables;
pub mod ipvs;
mod kernel;
pub mod link;
pub mod monitor;
pub mod netlink;
pub mod netns;
pub mod nftables;
pub mod ping;
pub mod process;
pub mod rawnetlink;
pub mod sysctl;
pub mod udp;

pub use error::{KernelError, Refusal};
pub use fake::FakeKernel;
pub use kernel::Kernel;
pub use nix::errno::Errno;
