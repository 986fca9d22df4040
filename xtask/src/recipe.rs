//! Programs of Kubernetes for tests and benches, built once by `recipes/kubernetes.sh` and kept.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

/// Builds a program into a directory, if it is not there already, and returns its path.
pub(crate) fn build(program: &str, directory: &Path) -> anyhow::Result<PathBuf> {
    let recipe = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("recipes/kubernetes.sh");
    let status = Command::new(&recipe).arg(program).arg(directory).status();
    let status = status.with_context(|| format!("cannot start {}", recipe.display()))?;
    ensure!(status.success(), "the recipe {} failed: {status}", recipe.display());
    Ok(directory.join(program))
}

/// Tells a path to whoever called.
#[expect(clippy::print_stdout, reason = "this is the command's output")]
pub(crate) fn say(path: &Path) {
    println!("{}", path.display());
}
