//! Flannel's leases from outside: golden files of both directions, decisions, the table, and a
//! simulation of many nodes over one store.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

mod acquire;
mod codecs;
mod model;
mod simulation;
mod table;
