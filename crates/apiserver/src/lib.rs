//! The embedded control plane: a subset of the Kubernetes API on the store, with small controllers.
//!
//! It serves what this project, its agents and `kubectl` use: discovery, get, list with paging, watch
//! with resume and bookmarks, create, update, the four kinds of patch, delete, the status and scale
//! parts, tables; and it allocates addresses, makes pods of Deployments, places them and keeps
//! EndpointSlices. It does not pretend to be more: no authorization, no webhooks, no conversion, no
//! schemas of custom objects.
//!
//! ```text
//!   listen ──▶ serve ──▶ api ──▶ admission ──▶ store
//!                         ▲                      │ watch
//!                         └── runner ◀── controllers
//! ```
//!
//! Several servers may share one etcd: each serves everything, and one at a time runs the controllers.
//!
//! `admission`, `controllers`, `patch`, `selector` and `table` are pure.

pub mod admission;
pub mod controllers;
pub mod limits;
pub mod patch;
pub mod selector;
pub mod table;

mod api;
mod config;
mod election;
mod error;
mod fields;
mod listen;
mod resources;
mod runner;
mod serve;
mod server;
mod status;
mod tls;

pub use config::{Config, ETCD_PREFIX, StoreLocation};
pub use error::Error;
pub use resources::{BuiltInKind, built_in_kinds};
pub use server::{Server, clear, start};
