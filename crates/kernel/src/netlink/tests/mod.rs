//! Ring 1: the real kernel, in namespaces of the tests' own.

mod apply;
mod fake;
mod pods;
mod repair;
mod sample;
