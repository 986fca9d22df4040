//! Services as kube-proxy's iptables rules: the same chains, names, order and comments.
//!
//! It needs `ip_tables` or `nf_tables` behind the programs `iptables-restore` and `iptables-save` of 1.8 or
//! newer, with the matches addrtype, comment, conntrack, mark, recent and statistic. It owns the chains that
//! [`layout::is_our_chain`](crate::layout::is_our_chain) names, and the jumps to them from built-in chains;
//! every other rule of the tables stays as it is.
//!
//! - [`program`](Program): the typed program. [`chains_for_ipvs`]: the chains of the IPVS mode.
//! - [`compile`](compile()): from intent, incrementally or from nothing. [`diff`](diff()): what to change.
//! - [`render`](render()): the text of `iptables-save`; [`render_restore`]: the input of `iptables-restore`.
//! - [`parse`](parse()): reads `iptables-save`, ours, a kube-proxy's or anybody's.
//! - [`interpret`](interpret()): what would happen to the first packet of a connection. [`names`]: the hashes.
//!
//! The chains as a diagram: `docs/design/iptables.md`.

mod base;
mod batch;
mod builder;
mod chain_name;
mod change;
mod compile;
mod diff;
mod for_ipvs;
mod interpret;
pub mod names;
mod parse;
mod port;
mod program;
mod render;
mod rules;
pub mod sample;
#[cfg(test)]
mod tests;

pub use batch::split;
pub use builder::{COMMENT_LENGTH_MAX, RuleBuilder};
pub use chain_name::{ChainName, ChainText};
pub use change::Change;
pub use compile::{COMMENTED_ENDPOINTS_MAX, Compiler, compile};
pub use diff::{diff, is_left_alone};
pub use for_ipvs::chains_for_ipvs;
pub use interpret::{BRANCHES_MAX, Branch, Environment, NotUnderstood, Outcome, SetPart, Step, Verdict, interpret};
pub use parse::{ParseError, Reader, parse, parse_family};
pub use program::{
    Chain, End, Match, Name, Policy, Probability, Program, Recent, RecentAction, Rejection, Rule, SetMatch, States,
    Table, TableKey, TableName, Target,
};
pub use render::{BUILT_IN, is_built_in, render, render_restore, render_rule, render_target};
pub use rules::Rules;
