//! What each kernel subsystem must hold: typed programs, one room per subsystem.
//!
//! - [`netlink`]: links, addresses, routes, neighbours, forwarding entries, sysctls.
//! - [`nftables`]: our nftables tables.
//! - [`iptables`]: kube-proxy's iptables chains.
//! - [`ipset`]: sets of addresses and ports.
//! - [`ipvs`]: virtual servers, and the addresses of the dummy link.
//! - [`udp`]: the forwarder of the `udp` fabric.
//! - [`ipvs_mode`]: what the three rooms of the `ipvs` mode do to a packet together.
//! - [`layout`]: what the rooms share, and the contract with other software on the node.
//! - [`sample`]: frontends for tests.
//!
//! Every room has the same furniture: `program` (typed), `compile` (from intent), `diff`, `render`
//! (the text a person knows), `interpret` (what the kernel would do to a packet). Rooms never import
//! each other. Everything here is pure.

pub mod ipset;
pub mod iptables;
pub mod ipvs;
pub mod ipvs_mode;
pub mod layout;
pub mod netlink;
pub mod nftables;
mod pairs;
pub mod sample;
pub mod udp;
