//! Flannel's leases from outside: golden files of both directions, decisions, the table, and a
//! simulation of many nodes over one store.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

mod acquire;
mod codecs;
#[path = "../../../store/tests/common/mod.rs"]
#[expect(dead_code, reason = "the store's own tests need more of it")]
mod etcd;
mod manager;
mod model;
mod simulation;
mod table;
