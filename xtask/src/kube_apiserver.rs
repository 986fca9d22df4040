//! `cargo xtask kube-apiserver`: a real API server for tests, built once and kept.
//!
//! ```text
//! cargo xtask kube-apiserver [--out DIR]        builds it, if DIR does not hold it already
//! cargo xtask kube-apiserver run --dir DIR      runs it with an etcd of its own until it is killed
//! ```
//!
//! `run` prints the path of a kubeconfig and stays in the foreground. Network namespaces reach it
//! over a Unix socket: `kubectl --kubeconfig DIR/kubeconfig proxy --unix-socket=PATH`.

mod process;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::recipe;
use process::{Binaries, Cluster};

const USAGE: &str = "usage: cargo xtask kube-apiserver [--out DIR] | run --dir DIR";

/// Builds or runs it, as the arguments after `kube-apiserver` say.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => build(&process::default_directory()),
        ["--out", directory] => build(Path::new(directory)),
        ["run", "--dir", directory] => serve(Path::new(directory)),
        _ => bail!(USAGE),
    }
}

fn build(directory: &Path) -> anyhow::Result<()> {
    recipe::say(&recipe::build("kube-apiserver", directory)?);
    Ok(())
}

fn serve(directory: &Path) -> anyhow::Result<()> {
    const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
    let binaries = Binaries::find().map_err(anyhow::Error::msg)?;
    let mut cluster = Cluster::start(binaries, directory).context("cannot start the server")?;
    recipe::say(&cluster.kubeconfig());
    while !cluster.has_ended()? {
        std::thread::sleep(LOOK_AGAIN_AFTER);
    }
    bail!("the server ended: see kube-apiserver.log and etcd.log in {}", directory.display())
}
