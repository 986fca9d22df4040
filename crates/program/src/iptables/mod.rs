//! Services as kube-proxy's iptables rules: the same chains, names, order and comments.
//!
//! It needs `ip_tables` or `nf_tables` behind the programs `iptables-restore` and `iptables-save` of 1.8 or
//! newer, with the matches addrtype, comment, conntrack, mark, recent and statistic. It owns the chains that
//! [`layout::is_our_chain`](crate::layout::is_our_chain) names, and the jumps to them from built-in chains;
//! every other rule of the tables stays as it is.
//!
//! - [`program`](Program): the typed program, which the IPVS mode uses for its chains too.
//!
//! The chains as a diagram: `docs/design/iptables.md`.

mod change;
mod program;

pub use change::Change;
pub use program::{
    COMMENT_LENGTH_MAX, Chain, End, Match, Name, Policy, Probability, Program, Recent, RecentAction, Rejection, Rule,
    RuleBuilder, SetMatch, States, Table, TableKey, TableName, Target,
};
