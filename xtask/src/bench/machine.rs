//! The machine that is measured on, and the programs that are measured.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

/// What a figure depends on.
#[derive(Debug)]
pub(super) struct Machine {
    processor: String,
    cores: usize,
    memory_mib: u64,
    kernel: String,
    load: String,
    date: String,
}

impl Machine {
    pub(super) fn read() -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kilobytes: u64 = memory.split_whitespace().next().and_then(|it| it.parse().ok()).unwrap_or(0);
        Machine {
            processor: field(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: kilobytes / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: read("/proc/loadavg").split_whitespace().next().unwrap_or_default().to_owned(),
            date: output(Command::new("date").arg("+%Y-%m-%d")).unwrap_or_default().trim().to_owned(),
        }
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "processor": self.processor, "cores": self.cores, "memoryMiB": self.memory_mib, "kernel": self.kernel,
            "loadBefore": self.load, "date": self.date,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {} cores, {} MiB, Linux {}, load {} before, {}",
            self.processor, self.cores, self.memory_mib, self.kernel, self.load, self.date
        )
    }
}

/// The programs that are measured.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) portolan: PathBuf,
    pub(super) plugin: PathBuf,
    pub(super) scale: PathBuf,
    pub(super) flood: PathBuf,
    pub(super) root: PathBuf,
}

/// Where they are; they are built first unless the caller knows that they are there.
pub(super) fn built(first: bool) -> anyhow::Result<Built> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?.to_path_buf();
    if first {
        // One command, so that all of it shares one set of features, and nothing is compiled twice.
        let status = Command::new(env!("CARGO"))
            .args(["build", "--release", "--package", "portolan", "--bin", "portolan"])
            .args(["--package", "portolan-agent", "--example", "scale"])
            .args(["--package", "portolan-dns", "--example", "flood"])
            .args(["--package", "portolan-kernel", "--example", "udp_forwarder"])
            .current_dir(&root)
            .status()?;
        ensure!(status.success(), "cargo build --release failed");
        let status = Command::new("make").arg("plugin").current_dir(&root).status()?;
        ensure!(status.success(), "make plugin failed");
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let release = root.join(target).join("release");
    Ok(Built {
        portolan: release.join("portolan"),
        plugin: release.join("portolan-cni"),
        scale: release.join("examples/scale"),
        flood: release.join("examples/flood"),
        root,
    })
}

/// Runs a command to its end and returns what it printed.
pub(super) fn output(command: &mut Command) -> anyhow::Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A named network namespace, which goes with this value.
#[derive(Debug)]
pub(super) struct NetworkNamespace(pub(super) String);

impl NetworkNamespace {
    pub(super) fn create(name: &str) -> anyhow::Result<NetworkNamespace> {
        output(Command::new("ip").args(["netns", "add", name]))?;
        Ok(NetworkNamespace(name.to_owned()))
    }

    /// A command that runs inside.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).arg(program);
        command
    }
}

impl Drop for NetworkNamespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

/// A directory that goes with this value.
#[derive(Debug)]
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    pub(super) fn create(name: &str) -> anyhow::Result<Scratch> {
        let path = std::env::temp_dir().join(format!("portolan-bench-{name}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
