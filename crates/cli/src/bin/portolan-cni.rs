//! The CNI plugin as a file of its own: the same code that `portolan` runs when a runtime calls it.
//!
//! A runtime starts this process for every pod. Small and without libraries to load it starts in half
//! the time of the whole program: see `make build`, which links it statically.

#![expect(clippy::print_stderr, reason = "people who run it by hand are told what it is for")]

use std::process::ExitCode;

#[path = "../cni_plugin.rs"]
mod cni_plugin;

fn main() -> ExitCode {
    cni_plugin::run()
}
