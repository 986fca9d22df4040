//! Clusters as users run them: the built binary, real namespaces, real packets.
//!
//! Each test brings up labs of its own and takes them down, also when it fails. What this machine
//! lacks is said, and the test skipped.
#![expect(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "helpers of tests fail by panic, and say what they skip"
)]

mod bad_input;
mod balancer;
mod cluster;
mod cni;
mod common;
mod crash;
mod environment;
mod etcd;
mod field;
mod kube_apiserver;
mod kube_proxy;
mod modes;
mod paths;
mod podman;
mod repair;
mod restart;
mod segments;
mod trace;
mod traffic;
