//! Labs as users run them: the built binary, real namespaces, real packets.
//!
//! Skipped without root and where the binary is not built.

mod bad_input;
mod cluster;
mod common;
