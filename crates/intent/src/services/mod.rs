//! Services: which address and port stands for which endpoints.
//!
//! [`ServicesIntent`] is the value; [`ServicesCompiler`] keeps it current at a cost that follows the
//! change. Both are mode-neutral: nftables, iptables, IPVS and eBPF compile the same frontends.

mod compile;
mod frontend;
#[cfg(test)]
mod tests;

pub use compile::ServicesCompiler;
pub use frontend::{Backend, Frontend, FrontendKey, FrontendKind, FrontendUpdate, Masquerade, ServicesIntent};
