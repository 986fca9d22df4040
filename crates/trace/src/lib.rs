//! A packet's way through the cluster, hop by hop, with every rewrite and the object that caused it.
//!
//! - [`node`] is one node's share: given what the node's rooms hold, what happens to this packet here?
//! - [`walk`] follows the packet from node to node by asking each for its share.
//! - [`compare`] holds a prediction against what was seen of a real packet.
//! - [`render`] prints a trace as people read it.
//!
//! All of it is pure. Who asks the nodes, over which socket, is the caller's business.

pub mod compare;
pub mod hop;
pub mod node;
pub mod render;
pub mod walk;

pub use compare::{Difference, Sighting, compare};
pub use hop::{Choice, End, Exit, Hop, Ingress, NodeTrace, Stage, Trace};
pub use node::{NodePrograms, ServicesPrograms, trace_node};
pub use render::render;
pub use walk::{Cluster, HOPS_MAX, WalkError, walk};
