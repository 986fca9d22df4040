//! The embedded control plane: a subset of the Kubernetes API on the store.

pub mod admission;
pub mod controllers;
mod fields;
pub mod patch;
pub mod selector;
pub mod table;
