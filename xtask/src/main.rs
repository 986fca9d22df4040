//! Tasks of this repository that are more than one cargo command.

mod bench;
mod kube_apiserver;
mod test;

use anyhow::bail;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((task, rest)) if task == "kube-apiserver" => kube_apiserver::run(rest),
        Some((task, rest)) if task == "test" => test::run(rest),
        Some((task, rest)) if task == "bench" => bench::run(rest),
        _ => bail!("usage: cargo xtask bench … | kube-apiserver … | test …"),
    }
}
