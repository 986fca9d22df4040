//! `cargo xtask guest`: a command in a kernel that has what this machine's kernel may lack.
//!
//! Debian's stock kernel boots in QEMU on top of this machine's own root file system, and runs the command as
//! root, in the same directory, with the same environment. The guest sees the machine's files and writes to a
//! layer in its memory: nothing of what it does remains. Its standard output and error are passed on apart, its
//! exit status is the command's. It has no network but `lo`.
//!
//! - [`kernel`]: fetches Debian's kernel package without installing it, and keeps it unpacked.
//! - [`initramfs`]: the archive that the kernel starts from. [`machine`]: QEMU.
//!
//! Exit status 124 says that the time was up, 125 that the guest itself failed.

mod initramfs;
mod kernel;
mod machine;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, bail};

/// This program, also where cargo has put another in its place meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";

const USAGE: &str = "usage: cargo xtask guest [--timeout SECONDS] [--memory MIB] [--cpus N] [--verbose] -- COMMAND…";

/// The time was up.
const STATUS_TIMEOUT: u8 = 124;

/// The guest did not run the command to its end.
const STATUS_FAILED: u8 = 125;

/// What is needed of this machine, and the Debian packages that bring it.
const TOOLS: [(&str, &str); 6] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("zstd", "zstd"),
    ("xz", "xz-utils"),
    ("setpriv", "util-linux"),
];

/// What is run, and with how much.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Options {
    timeout: Duration,
    memory_mib: u32,
    cpus: u32,
    verbose: bool,
    command: Vec<String>,
}

impl Options {
    fn parse(arguments: &[String]) -> anyhow::Result<Options> {
        let mut options = Options {
            timeout: Duration::from_mins(10),
            memory_mib: 2048,
            cpus: 1,
            verbose: false,
            command: Vec::new(),
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut number = || -> anyhow::Result<u32> {
                let value = arguments.next().and_then(|value| value.parse().ok()).filter(|value| *value > 0);
                value.with_context(|| format!("{argument} needs a number above 0; {USAGE}"))
            };
            match argument.as_str() {
                "--timeout" => options.timeout = Duration::from_secs(number()?.into()),
                "--memory" => options.memory_mib = number()?,
                "--cpus" => options.cpus = number()?,
                "--verbose" => options.verbose = true,
                "--" => options.command.extend(arguments.by_ref().cloned()),
                other => bail!("`{other}` is not an option; {USAGE}"),
            }
        }
        if options.command.is_empty() {
            bail!("there is no command; {USAGE}");
        }
        Ok(options)
    }
}

/// Runs a command in the guest.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let options = Options::parse(arguments)?;
    Ok(match boot(&options) {
        Ok(Some(status)) => ExitCode::from(status),
        Ok(None) => {
            say(&format!("the time limit of {} s was exceeded", options.timeout.as_secs()));
            ExitCode::from(STATUS_TIMEOUT)
        }
        Err(error) => {
            say(&format!("{error:#}"));
            ExitCode::from(STATUS_FAILED)
        }
    })
}

/// What is missing on this machine, as an instruction; nothing if a guest can run.
pub(crate) fn missing() -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some("the guest runs on x86_64 only".to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let directories: Vec<PathBuf> = std::env::split_paths(&path).chain(usual).collect();
    let is_there = |tool: &str| directories.iter().any(|directory| directory.join(tool).exists());
    let missing: Vec<&str> = TOOLS.iter().filter(|(tool, _)| !is_there(tool)).map(|(_, package)| *package).collect();
    (!missing.is_empty()).then(|| format!("a guest kernel needs more: apt-get install {}", missing.join(" ")))
}

/// How a guest is started from another task: its output can be read then.
pub(crate) fn command(timeout_seconds: u64, memory_mib: u32, cpus: u32) -> Command {
    let mut command = Command::new(THIS_PROGRAM);
    command.arg("guest");
    let options = [("--timeout", timeout_seconds), ("--memory", memory_mib.into()), ("--cpus", cpus.into())];
    for (option, value) in options {
        command.args([option, &value.to_string()]);
    }
    command.arg("--");
    command
}

fn boot(options: &Options) -> anyhow::Result<Option<u8>> {
    if let Some(missing) = missing() {
        bail!("{missing}");
    }
    let cache = cache_directory()?;
    let kernel = kernel::prepare(&cache)?;
    machine::run(&cache, &kernel, options)
}

/// Kernel, modules and initramfs are kept here (170 MB). Deleting it fetches a newer kernel.
fn cache_directory() -> anyhow::Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(directory) if !directory.is_empty() => PathBuf::from(directory),
        _ => PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache"),
    };
    let cache = base.join("portolan/guest");
    std::fs::create_dir_all(&cache).with_context(|| format!("{} cannot be made", cache.display()))?;
    cache.canonicalize().with_context(|| format!("{} cannot be found", cache.display()))
}

#[expect(clippy::print_stderr, reason = "a task talks to the person who runs it")]
fn say(text: &str) {
    eprintln!("guest: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<Options> {
        Options::parse(&text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn another_task_starts_it_as_a_user_would() {
        let command = command(900, 4000, 2);
        let arguments: Vec<String> = command.get_args().map(|it| it.to_string_lossy().into_owned()).collect();
        let (task, rest) = arguments.split_first().unwrap();
        assert_eq!(task, "guest");
        let options = parse(&format!("{} true", rest.join(" "))).unwrap();
        assert_eq!((options.timeout, options.memory_mib, options.cpus), (Duration::from_mins(15), 4000, 2));
    }

    #[test]
    fn what_follows_the_dashes_is_the_command() {
        let options = parse("--timeout 5 --memory 512 -- ls --timeout 7").unwrap();
        assert_eq!((options.timeout, options.memory_mib), (Duration::from_secs(5), 512));
        assert_eq!(options.command, ["ls", "--timeout", "7"]);
    }

    #[test]
    fn a_command_is_needed_and_options_are_checked() {
        for wrong in ["", "--timeout 5", "--timeout x -- ls", "--memory 0 -- ls", "ls"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
