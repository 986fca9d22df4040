//! Labs as users run them: the built binary, real namespaces, real packets.
//!
//! Skipped without root and where the binary is not built.
#![expect(clippy::print_stdout, clippy::expect_used, reason = "helpers of tests fail by panic, and say what they skip")]

mod bad_input;
mod cluster;
mod common;
