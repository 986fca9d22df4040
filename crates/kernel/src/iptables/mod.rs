//! iptables by its own programs: makes the kernel hold the program, and reads it back.
//!
//! Reading is one `iptables-save` per family, writing one `iptables-restore --noflush` per family, which makes each
//! table's changes at once. There are two backends, the programs `iptables-legacy-…` and `iptables-nft-…`: the one
//! that the node uses already is taken, and a node that uses both has a [`Mix`].

mod backend;
mod command;
mod entries;
mod room;

pub use backend::{Backend, Mix};
pub use room::{IptablesRoom, Report};
