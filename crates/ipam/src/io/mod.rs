//! What talks to a store: not part of the pure core, and the only place here that waits.

pub mod flannel;
