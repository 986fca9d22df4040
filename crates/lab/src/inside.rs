//! Running something inside namespaces, and dying with the process that asked for it.
//!
//! A process of the lab that lives elsewhere starts as `portolan lab inside …`: it enters the
//! namespaces itself, while it still has one thread, and then becomes the command. So nothing has to
//! run between fork and exec, and the parent stays where it is.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// Which namespaces to enter; those that are not named stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// The network namespace.
    pub network: Option<PathBuf>,
    /// The mount namespace.
    pub mount: Option<PathBuf>,
    /// The namespace of the host name.
    pub uts: Option<PathBuf>,
}

impl Entry {
    /// A named network namespace only.
    pub fn network(path: PathBuf) -> Entry {
        Entry { network: Some(path), ..Entry::default() }
    }

    /// All namespaces of a process.
    pub fn of_process(pid: u32) -> Entry {
        let path = |kind: &str| Some(PathBuf::from(format!("/proc/{pid}/ns/{kind}")));
        Entry { network: path("net"), mount: path("mnt"), uts: path("uts") }
    }

    /// The arguments that say the same to a hidden command.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments = Vec::new();
        for (flag, path) in [("--network", &self.network), ("--mount", &self.mount), ("--uts", &self.uts)] {
            if let Some(path) = path {
                arguments.extend([flag.into(), path.clone().into_os_string()]);
            }
        }
        arguments
    }

    /// Enters the namespaces. The process must have one thread, or the mount namespace is refused
    /// (setns(2)).
    pub fn enter(&self) -> anyhow::Result<()> {
        let wanted = [
            (&self.network, CloneFlags::CLONE_NEWNET),
            (&self.uts, CloneFlags::CLONE_NEWUTS),
            (&self.mount, CloneFlags::CLONE_NEWNS),
        ];
        // All files are opened first: /proc is another one in another mount namespace.
        let mut files = Vec::new();
        for (path, kind) in wanted {
            if let Some(path) = path {
                let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
                files.push((path, file, kind));
            }
        }
        for (path, file, kind) in files {
            setns(file, kind).with_context(|| format!("entering {}", path.display()))?;
        }
        Ok(())
    }
}

/// Asks the kernel to kill this process when its parent ends.
///
/// # Errors
/// If the parent ended already: this process has another parent than it was told.
pub fn die_with(parent: u32) -> anyhow::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("asking to die with the parent")?;
    if getppid() != Pid::from_raw(i32::try_from(parent).unwrap_or(0)) {
        bail!("the process {parent} that started this one has ended");
    }
    Ok(())
}

/// Becomes a command, in other namespaces.
///
/// # Errors
/// Only returns if that failed.
pub fn become_command(entry: &Entry, parent: Option<u32>, command: &[OsString]) -> anyhow::Result<()> {
    if let Some(parent) = parent {
        die_with(parent)?;
    }
    let Some((program, arguments)) = command.split_first() else { bail!("there is no command to run") };
    entry.enter()?;
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("running `{}`", Path::new(program).display()))
}

/// The command that runs `command` inside namespaces as a child of this process.
pub(crate) fn child(portolan: &Path, entry: &Entry, command: &[OsString]) -> tokio::process::Command {
    let mut child = tokio::process::Command::new(portolan);
    child.args(["lab", "inside"]).args(entry.arguments()).arg("--die-with").arg(std::process::id().to_string());
    child.arg("--").args(command);
    child
}
