//! IPVS in a real kernel: what we write is what `ipvsadm` reads, and packets go where they shall.
//!
//! ```text
//!  client ── 192.0.2.0/24 ── node ── 10.42.2.0/24 ── server
//!  (.5)                   (.1)  (.1)                 (.2, .3)
//! ```
//!
//! and the same with IPv6. Each of the three is a network namespace without a name. Few kernels of build machines
//! have IPVS: `cargo xtask guest` boots one that has.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a test fails by panicking and says what it skips")]

mod chains;
mod servers;
mod sets;
mod world;
