//! Services: which address and port stands for which endpoints.
//!
//! [`ServicesIntent`] is the value; [`ServicesCompiler`] keeps it current at a cost that follows the
//! change. Both are mode-neutral: nftables, iptables, IPVS and eBPF compile the same frontends.

mod choose;
mod compile;
mod frontend;
mod settings;
#[cfg(test)]
mod tests;

pub use compile::ServicesCompiler;
pub use frontend::{
    Backend, Client, Decision, Endpoints, Frontend, FrontendKey, FrontendKind, FrontendUpdate, HealthCheck, Masquerade,
    ServicesIntent,
};
pub use settings::{DetectLocal, NodePortAddresses, ProxySettings};
