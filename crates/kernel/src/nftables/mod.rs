//! nftables over nfnetlink: makes the kernel hold the program, and reads it back.
//!
//! It writes and reads the kernel's own messages and never runs `nft`. It touches only the tables that
//! `layout` names as ours. A transaction is atomic: packets meet the old rules or the new ones.

mod composite;
mod constants;
mod decode;
mod encode;
mod expression;
mod foreign;
mod room;
mod rules;
mod set_types;

pub(crate) use foreign::event as chain_event;
pub use room::{NftablesRoom, Report};
