//! Sockets, clock and randomness: the server that runs the chain.
//!
//! ```text
//! watch<Snapshot> ──▶ follow ──▶ Tables {snapshot, names}   (replaced as a whole)
//!                                   │ read per query
//! UDP sockets ──▶ udp ──┐           ▼
//!                       ├──▶ Service::handle ──▶ bytes
//! TCP sockets ──▶ tcp ──┘           └──▶ Pending ──▶ upstream ──▶ bytes
//! ```
//!
//! It promises that a query which the tables or the cache can answer never waits for one that an
//! upstream must, that the number of waiting queries and of connections is bounded, and that a panic
//! while one query is handled costs that query only.

mod holder;
mod server;
mod service;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod upstream;

pub use server::{Error, Server, serve};
