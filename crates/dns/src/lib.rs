//! The cluster DNS server: records, plugin chain, cache, forward, and io.
//!
//! ```text
//!            ┌────────────────────── pure ──────────────────────┐
//! bytes ──▶ wire::decode ──▶ chain: hosts ▸ kubernetes ▸ cache ▸ forward ──▶ wire::encode ──▶ bytes
//!            │                        │                     │
//!            │             intent::names + snapshot      Outcome::Forward ──▶ io::upstream ──▶ learn
//! ```
//!
//! - [`chain`]: the order of the plugins, one constant array, and [`chain::answer`].
//! - [`plugins`]: one file per plugin, with what it promises.
//! - [`wire`]: messages on the wire (RFC 1035, RFC 6891), over `hickory-proto`'s codec.
//! - [`io`]: sockets, clocks and randomness; all else is pure: time enters as `now`, randomness as
//!   a seed.
//!
//! It promises exact answers for the cluster's names (see [`portolan_intent::names`]), to tell
//! NXDOMAIN from NODATA, and never to panic on any bytes. It does not sign (DNSSEC), transfer zones
//! or recurse: other names are asked of the configured upstreams.

pub mod chain;
pub mod io;
pub mod limits;
pub mod metrics;
pub mod plugins;
pub mod wire;

mod config;

pub use config::{Config, ConfigError, Settings};
pub use io::{Error, Server, serve};
