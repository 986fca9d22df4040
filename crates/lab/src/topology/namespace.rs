//! Network namespaces that are named in `/run/netns`, as `ip netns` does it, and what lives in them.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Layout;

/// Where named namespaces are.
pub(crate) const DIRECTORY: &str = "/run/netns";

/// What every namespace of a lab is told. Nobody else can have the addresses that a lab gives, so
/// nothing waits for duplicate address detection, which takes a second for link-local addresses too
/// (RFC 4862 §5.4), and nobody listens to router advertisements.
const SYSCTLS: [(&str, &str); 4] = [
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
];

/// The path of a named namespace.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// Makes `/run/netns` a shared mount point, as `ip netns add` does, so that a namespace that is
/// unmounted here is unmounted in every mount namespace that was copied from this one.
pub(crate) fn prepare_directory() -> anyhow::Result<()> {
    fs::create_dir_all(DIRECTORY).context("creating /run/netns")?;
    let share = || mount(None::<&str>, DIRECTORY, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    if share().is_err() {
        mount(Some(DIRECTORY), DIRECTORY, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
            .context("making /run/netns a mount point")?;
        share().context("sharing the mount /run/netns")?;
    }
    Ok(())
}

/// Moves this process into a namespace of its own, named so.
pub(crate) fn unshare_named(name: &str, sysctls: &[(&str, &str)]) -> anyhow::Result<()> {
    let path = path(name);
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .with_context(|| format!("creating {}; `ip netns del {name}` removes it if nobody uses it", path.display()))?;
    let bound = unshare(CloneFlags::CLONE_NEWNET).context("creating a network namespace").and_then(|()| {
        for (key, value) in SYSCTLS.iter().chain(sysctls) {
            write_sysctl(key, value)?;
        }
        let own = Path::new("/proc/thread-self/ns/net");
        mount(Some(own), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("mounting a network namespace at {}", path.display()))
    });
    if bound.is_err() {
        let _ = fs::remove_file(&path);
    }
    bound
}

/// Notes that a namespace of this name is the lab's, before it is made: what stands nowhere is never
/// removed, and what a crash leaves is found.
///
/// # Errors
/// If a namespace of this name is there already, which then is somebody else's.
pub(crate) fn claim(layout: &Layout, name: &str) -> anyhow::Result<()> {
    let claims = layout.claims();
    fs::create_dir_all(&claims).with_context(|| format!("creating {}", claims.display()))?;
    let claim = claims.join(name);
    if path(name).exists() && !claim.exists() {
        bail!("the network namespace `{name}` is there already and not this lab's; `ip netns del {name}` removes it");
    }
    fs::write(&claim, "").with_context(|| format!("writing {}", claim.display()))
}

/// The names that this lab has claimed.
pub(crate) fn claimed(layout: &Layout) -> Vec<String> {
    let prefix = layout.namespace("");
    let entries = fs::read_dir(layout.claims()).into_iter().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    // Whatever else lies in the directory, only names of this lab's form are its.
    names.retain(|name| name.starts_with(&prefix));
    names.sort();
    names
}

/// Creates a namespace of the lab with this name and these sysctls. The calling thread stays where it
/// is.
pub(crate) fn create(layout: &Layout, name: &str, sysctls: &[(&str, &str)]) -> anyhow::Result<()> {
    claim(layout, name)?;
    let made = in_thread(|| unshare_named(name, sysctls));
    if let Err(error) = &made
        && error.downcast_ref::<io::Error>().is_some_and(|cause| cause.kind() == io::ErrorKind::AlreadyExists)
    {
        // Somebody was faster: it is theirs.
        let _ = fs::remove_file(layout.claims().join(name));
    }
    made
}

/// Removes a namespace of the lab and kills what lives in it.
pub(crate) fn evict(layout: &Layout, name: &str) -> anyhow::Result<()> {
    if layout.claims().join(name).exists() {
        kill_processes(&[path(name)]);
    }
    release(layout, name)
}

/// Removes a namespace of the lab and gives its name back. It goes when its last process does.
pub(crate) fn release(layout: &Layout, name: &str) -> anyhow::Result<()> {
    let claim = layout.claims().join(name);
    if !claim.exists() {
        return Ok(());
    }
    remove(name)?;
    crate::down::gone(fs::remove_file(&claim)).with_context(|| format!("removing {}", claim.display()))
}

/// Runs something in a thread that is in a namespace.
pub(crate) fn within<T: Send>(namespace: &Path, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    in_thread(|| {
        let file = fs::File::open(namespace).with_context(|| format!("opening {}", namespace.display()))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {}", namespace.display()))?;
        work()
    })
}

fn in_thread<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        scope.spawn(work).join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread in a namespace panicked")))
    })
}

/// Writes a sysctl of the calling thread's namespace. One that this kernel lacks is skipped.
fn write_sysctl(key: &str, value: &str) -> anyhow::Result<()> {
    match fs::write(Path::new("/proc/sys").join(key), value) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).with_context(|| format!("setting {key}")),
        _ => Ok(()),
    }
}

/// Kills every process that lives in one of these namespaces. Processes are found by the namespace
/// that they are in, not by a remembered number, so this is right also after a crash.
pub(crate) fn kill_processes(namespaces: &[PathBuf]) -> usize {
    let inodes: Vec<(u64, u64)> =
        namespaces.iter().filter_map(|path| fs::metadata(path).ok()).map(|it| (it.dev(), it.ino())).collect();
    if inodes.is_empty() {
        return 0;
    }
    let own = std::process::id();
    let Ok(processes) = fs::read_dir("/proc") else { return 0 };
    let mut killed = 0;
    for pid in processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok()) {
        let Ok(namespace) = fs::metadata(format!("/proc/{pid}/ns/net")) else { continue };
        if pid != own && inodes.contains(&(namespace.dev(), namespace.ino())) {
            let process = Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX));
            killed += usize::from(kill(process, Signal::SIGKILL).is_ok());
        }
    }
    killed
}

/// Takes a namespace's name away. The namespace goes when its last process does.
fn remove(name: &str) -> anyhow::Result<()> {
    let path = path(name);
    if !path.exists() {
        return Ok(());
    }
    // The file may be there without the mount, after a crash between the two.
    let _ = umount2(&path, MntFlags::MNT_DETACH);
    crate::down::gone(fs::remove_file(&path)).with_context(|| format!("removing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_lab_count_as_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::within(directory.path(), "a").unwrap();
        assert_eq!(claimed(&layout), Vec::<String>::new());
        claim(&layout, "portolan-a-node-1").unwrap();
        for foreign in ["cni-1", "portolan-b-node-1", "portolan-a"] {
            fs::write(layout.claims().join(foreign), "").unwrap();
        }
        assert_eq!(claimed(&layout), ["portolan-a-node-1"]);
        // A name that was never claimed is left alone, whoever's it is.
        release(&layout, "portolan-a-node-2").unwrap();
    }
}
