//! The long-running roles, each one loop.

pub mod attachments;
pub mod cni_socket;
