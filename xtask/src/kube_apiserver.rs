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

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

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
    let recipe = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("recipes/kube-apiserver.sh");
    let status = Command::new(&recipe).arg(directory).status();
    let status = status.with_context(|| format!("cannot start {}", recipe.display()))?;
    ensure!(status.success(), "the recipe {} failed: {status}", recipe.display());
    say(&directory.join("kube-apiserver"));
    Ok(())
}

fn serve(directory: &Path) -> anyhow::Result<()> {
    const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
    let binaries = Binaries::find().map_err(anyhow::Error::msg)?;
    let mut cluster = Cluster::start(binaries, directory).context("cannot start the server")?;
    say(&cluster.kubeconfig());
    while !cluster.has_ended()? {
        std::thread::sleep(LOOK_AGAIN_AFTER);
    }
    bail!("the server ended: see kube-apiserver.log and etcd.log in {}", directory.display())
}

#[expect(clippy::print_stdout, reason = "this is the command's output")]
fn say(path: &Path) {
    println!("{}", path.display());
}
