//! The process that holds a pod's namespaces, as Kubernetes' pause container does.
//!
//! It makes the namespaces, so the pod has them before its first container runs and keeps them when
//! one dies; says that they are there; and then only waits. Network and host name are the pod's own.
//! The mount namespace is a copy of the machine's in which `/etc/resolv.conf` and `/etc/hosts` are
//! the pod's. It holds no copy of `/run/netns`: those would keep other pods' namespaces alive.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::sethostname;
use portolan_kernel::link::Links;

use crate::inside::{Entry, die_with};
use crate::topology::namespace;

/// What the pod's sandbox is made of.
#[derive(Debug, Clone)]
pub struct Sandbox {
    /// The network: a new one with this name, or one that exists.
    pub network: Network,
    /// The pod's host name.
    pub hostname: String,
    /// The file to put at `/etc/resolv.conf`.
    pub resolver: PathBuf,
    /// The file to put at `/etc/hosts`.
    pub hosts: PathBuf,
    /// The process to die with.
    pub parent: u32,
}

/// The network of a pod.
#[derive(Debug, Clone)]
pub enum Network {
    /// A new namespace, to be named so.
    New(String),
    /// The node's namespace (`hostNetwork`).
    Existing(PathBuf),
}

/// As containerd sets it: a container's server may have a low port without a capability.
const SYSCTLS: &[(&str, &str)] = &[("net/ipv4/ip_unprivileged_port_start", "0")];

/// Makes the sandbox, writes a line `ready` to stdout, and waits to be killed.
pub fn pause(sandbox: &Sandbox) -> anyhow::Result<()> {
    die_with(sandbox.parent)?;
    match &sandbox.network {
        Network::New(name) => {
            namespace::unshare_named(name, SYSCTLS)?;
            // Container runtimes do this with the plugin `loopback`; it is no network's business.
            Links::current().and_then(|mut links| links.set_up("lo")).context("setting `lo` up")?;
        }
        Network::Existing(path) => Entry::network(path.clone()).enter()?,
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS).context("creating a mount and a UTS namespace")?;
    sethostname(&sandbox.hostname).context("setting the pod's host name")?;
    // Unmounting is heard from the machine, never told to it.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
        .context("making the pod's mounts its own")?;
    let _ = umount2(namespace::DIRECTORY, MntFlags::MNT_DETACH);
    bind(&sandbox.resolver, "/etc/resolv.conf")?;
    bind(&sandbox.hosts, "/etc/hosts")?;
    let mut report = std::io::stdout();
    report.write_all(b"ready\n").and_then(|()| report.flush()).context("reporting that the sandbox is ready")?;
    loop {
        nix::unistd::pause();
    }
}

fn bind(file: &Path, target: &str) -> anyhow::Result<()> {
    mount(Some(file), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mounting {} over {target}, which must exist", file.display()))
}
