//! Makes the kernel hold a program, reads it back, watches it.
//!
//! - [`rawnetlink`]: messages on a netlink socket, and nothing of their meaning.
//! - [`netns`]: network namespaces, and working inside them.
//!
//! This is the one crate that speaks to the kernel, and the one that may use `unsafe`. Everything is
//! synchronous. What is ours is recognised by what the kernel itself holds (`layout` in the `program`
//! crate), never by memory, so that a restart adopts what it finds.

mod error;
pub mod netns;
pub mod rawnetlink;

pub use error::{KernelError, Refusal};
