//! Services and masquerading as nftables tables.
//!
//! Two tables per family, `portolan-services` and `portolan-masquerade`: named sets and maps with
//! concatenated keys, and a handful of chains whose number depends neither on Services nor on
//! endpoints. It needs Linux 5.6 (concatenated keys with data, and with intervals); it owns
//! the tables of these names in the families `ip` and `ip6`, whole, and nothing else.
//!
//! - [`program`]: the typed program. [`compile`]: from intent, incrementally or from nothing.
//! - [`diff`]: what to change in the kernel. [`render`]: the text that `nft list` prints.
//! - [`interpret`]: what the kernel would do to a packet.
//!
//! Why this shape and not one chain per Service: `docs/design/nftables.md`.

mod chains;
mod change;
mod compile;
mod diff;
mod elements;
mod interpret;
mod layout;
mod program;
mod render;
pub mod sample;
#[cfg(test)]
mod tests;

pub use change::{Change, Phase, sort_balancing};
pub use compile::{Compiler, compile};
pub use diff::{diff, diff_each};
pub use elements::{BACKENDS_MAX, slot_offset};
pub use interpret::{Alternative, Choice, Environment, Outcome, Step, Verdict, What, interpret};
pub use layout::blank;
pub use program::{
    BaseHook, CLIENTS_MAX, Chain, ChainKind, Element, Hook, Key, KeyExpression, Learned, Match, Name, Program,
    Rejection, Rule, Set, SetKind, Statement, Table, TableKey, TableName,
};
pub use render::{render, render_changes, render_element, render_rule, render_table};
