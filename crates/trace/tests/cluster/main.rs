//! Walks through a cluster of two nodes, compiled from tables: the way of a packet and its reasons, in every mode.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod ipvs;
mod modes;
mod nodes;
mod walks;
