//! The Container Network Interface: types, verbs, errors, and what a plugin says to its agent.
//!
//! It speaks versions 0.3.1, 0.4.0, 1.0.0 and 1.1.0 of the specification. Everything here is a pure
//! function of its input: [`plugin`] is the whole logic of the plugin process, and leaves reading the
//! environment, standard input and the agent's socket to its caller. It does not decide who gets
//! which address and makes no interface.

#![no_std]

#[macro_use]
extern crate alloc;
#[cfg(test)]
extern crate std;

mod configuration;
mod error;
pub mod limits;
mod parameters;
pub mod plugin;
mod result;
mod version;
mod wire;

pub use configuration::{Dns, NetworkConfiguration, RuntimeConfiguration, ValidAttachment};
pub use error::{CniError, ErrorCode};
pub use parameters::{Command, Parameters};
pub use result::{AddResult, Interface, IpConfiguration, Route};
pub use version::Version;
pub use wire::{Request, Response};

/// Where the agent listens unless the network configuration's `socket` says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/portolan/cni.sock";

/// The name of the plugin's executable, and so the `type` in a network configuration.
pub const PLUGIN_NAME: &str = "portolan-cni";
