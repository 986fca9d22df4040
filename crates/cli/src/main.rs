//! The one binary: `portolan`, and the CNI plugin when it is called as one.
//!
//! stdout is data, stderr is talk. Exit codes: 0 yes, 1 no, 2 usage, 3 environment, 4 internal.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the program that talks to people")]

mod agents;
mod lab;
mod output;
mod roles;
mod show;
mod target;
mod trace;

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::output::Failure;

/// The whole network of a Kubernetes cluster in one binary.
#[derive(Debug, Parser)]
#[command(name = "portolan", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Clusters on one machine, to try, test and teach
    Lab(lab::LabArguments),
    /// Show a packet's way from FROM to TO, with every rewrite and the object that caused it
    Trace(trace::TraceArguments),
    /// Show a table: services, endpoints, nodes, pods, attachments, routes, names, problems
    Show(show::ShowArguments),
    /// Show what would change in the kernel, as the commands a person would type
    Plan(show::PlanArguments),
    /// Say what is wrong, why, and what to do
    Doctor(show::DoctorArguments),
    /// Run the node's agent
    Agent(RoleArguments),
    /// Run the cluster's DNS server
    Dns(RoleArguments),
    /// Run the embedded control plane: a subset of the Kubernetes API
    Apiserver(roles::ApiserverArguments),
    /// Remove what is ours from this node's kernel, and nothing else
    Clean(RoleArguments),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version,
}

/// A long-running role takes one configuration file.
#[derive(Debug, clap::Args)]
struct RoleArguments {
    /// The configuration file (YAML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    // First of all: a CNI call must not pay for anything that the plugin does not use.
    if is_cni_plugin() {
        let variables =
            portolan_plugin::variables(std::env::vars_os().map(|(name, value)| (name.into_vec(), value.into_vec())));
        return portolan_plugin::run(&variables, std::io::stdin(), std::io::stdout(), std::io::stderr()).into();
    }
    let arguments = Arguments::parse();
    match run(arguments.command) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

/// Whether this process was started as the plugin: by its name, or by a runtime's environment.
fn is_cni_plugin() -> bool {
    std::env::var_os("CNI_COMMAND").is_some() || std::env::args_os().next().is_some_and(|name| is_plugin_name(&name))
}

fn is_plugin_name(name: &std::ffi::OsStr) -> bool {
    std::path::Path::new(name).file_name().is_some_and(|name| name == portolan_plugin::PLUGIN_NAME)
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Lab(arguments) => lab::run(arguments),
        Command::Trace(arguments) => trace::run(&arguments),
        Command::Show(arguments) => show::run(&arguments),
        Command::Plan(arguments) => show::plan(&arguments),
        Command::Doctor(arguments) => show::doctor(&arguments),
        Command::Agent(arguments) => roles::agent(&arguments.config),
        Command::Dns(arguments) => roles::dns(&arguments.config),
        Command::Apiserver(arguments) => roles::apiserver(arguments),
        Command::Clean(arguments) => roles::clean(&arguments.config),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "portolan", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Version => {
            println!("portolan {}", env!("CARGO_PKG_VERSION"));
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_program_decides() {
        for (name, expected) in
            [("/opt/cni/bin/portolan-cni", true), ("portolan-cni", true), ("/usr/bin/portolan", false), ("", false)]
        {
            assert_eq!(is_plugin_name(name.as_ref()), expected, "{name}");
        }
    }
}
