//! Names: what the cluster's DNS names stand for.
