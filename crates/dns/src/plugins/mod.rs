//! The plugins, one file each. Their order is [`crate::chain::CHAIN`].
//!
//! Counting and the guard against panics stand around the whole chain, in [`crate::io`].

pub mod cache;
pub mod forward;
pub mod hosts;
pub mod kubernetes;
