//! `cargo xtask kube-proxy [--out DIR]`: a real kube-proxy 1.20.2, the peer of tests and benches, built once and kept.

mod place;
pub(crate) mod process;

use std::path::Path;

use anyhow::bail;

use crate::recipe;

/// Builds it, as the arguments after `kube-proxy` say.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let default = place::default_directory();
    let directory = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => default.as_path(),
        ["--out", directory] => Path::new(directory),
        _ => bail!("usage: cargo xtask kube-proxy [--out DIR]"),
    };
    recipe::say(&recipe::build("kube-proxy", directory)?);
    Ok(())
}
