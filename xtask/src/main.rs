//! Tasks of this repository that are more than one cargo command.

mod bench;
mod guest;
mod kube_apiserver;
mod kube_proxy;
mod recipe;
mod test;

use std::process::ExitCode;

use anyhow::bail;

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((task, rest)) if task == "guest" => return guest::run(rest),
        Some((task, rest)) if task == "kube-apiserver" => kube_apiserver::run(rest)?,
        Some((task, rest)) if task == "kube-proxy" => kube_proxy::run(rest)?,
        Some((task, rest)) if task == "test" => test::run(rest)?,
        Some((task, rest)) if task == "bench" => bench::run(rest)?,
        _ => bail!("usage: cargo xtask bench … | guest … | kube-apiserver … | kube-proxy … | test …"),
    }
    Ok(ExitCode::SUCCESS)
}
