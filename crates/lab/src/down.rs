//! Takes a lab down, however far it came and however it ended.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;

use crate::description::{Description, no_such_lab, unreadable};
use crate::limits::STOP_TIME_MAX;
use crate::topology::namespace;
use crate::{DIRECTORY_VARIABLE, LabError, Layout, Result};

/// How often it is looked whether killed processes are gone.
const EXIT_PERIOD: Duration = Duration::from_millis(2);

/// Stops a lab's supervisor and removes everything of the lab.
///
/// # Errors
/// If there is no such lab, or something of it cannot be removed.
pub fn down(name: &str) -> Result<()> {
    let layout = Layout::new(name)?;
    let directory = layout.directory();
    if !directory.is_dir() {
        return Err(no_such_lab(&layout));
    }
    if !layout.description().try_exists().map_err(|error| unreadable(&layout, &error))? {
        // The directory is made before the description, so a lab has nothing else yet. What is not
        // empty is no lab, and nobody's to remove but its owner's.
        return std::fs::remove_dir(directory).map_err(|error| {
            LabError::environment(
                format!("{} is not a lab: it has no lab.json, and cannot be removed: {error}", directory.display()),
                format!("look what it is, or set {DIRECTORY_VARIABLE} to the directory of your labs"),
            )
        });
    }
    // One that is garbled is no reason to keep the rest.
    let description = Description::load(&layout).ok();
    stop_supervisor(&layout)?;
    remove(&layout)?;
    // Last, as etcd may be gone: the next lab of this name clears its place, too.
    Ok(description.as_ref().map_or(Ok(()), crate::control_plane::clear)?)
}

/// Asks the supervisor to stop, waits until it did, and kills it if it does not.
fn stop_supervisor(layout: &Layout) -> Result<()> {
    let Ok(mut stream) = UnixStream::connect(layout.control_socket()) else { return Ok(()) };
    let peer = getsockopt(&stream, sockopt::PeerCredentials).context("asking who supervises the lab")?.pid();
    stream.set_read_timeout(Some(STOP_TIME_MAX)).context("waiting for the supervisor")?;
    let asked = stream.write_all(b"stop\n");
    // The connection ends with the process, so reading to its end is waiting for that.
    let mut rest = Vec::new();
    if asked.is_err() || stream.read_to_end(&mut rest).is_err_and(|error| is_timeout(&error)) {
        tracing::warn!(peer, "the supervisor does not stop and is killed");
        let _ = kill(Pid::from_raw(peer), Signal::SIGKILL);
        let _ = stream.read_to_end(&mut rest);
    }
    Ok(())
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

/// Removes everything of a lab whose supervisor is gone: the namespaces that it claimed, what lives in
/// them, and its directory. What cannot be removed does not keep the rest; the first error is returned.
pub(crate) fn remove(layout: &Layout) -> Result<()> {
    let names = namespace::claimed(layout);
    let paths: Vec<PathBuf> = names.iter().map(|name| namespace::path(name)).collect();
    // A killed process is in its namespace until the kernel has taken it down.
    let until = Instant::now() + STOP_TIME_MAX;
    while namespace::kill_processes(&paths) > 0 && Instant::now() < until {
        std::thread::sleep(EXIT_PERIOD);
    }
    let mut first = Ok(());
    for name in &names {
        first = first.and(namespace::release(layout, name));
    }
    let _ = umount2(&layout.api_data(), MntFlags::MNT_DETACH);
    // While a namespace stays, so does the note that it is ours: `lab down` can be tried again.
    first?;
    remove_directory(layout.directory()).with_context(|| format!("removing {}", layout.directory().display()))?;
    Ok(())
}

/// A supervisor that had just begun may still write here while this removes. It finds its parent gone and
/// ends by itself, so that this comes to an end, too.
fn remove_directory(directory: &Path) -> std::io::Result<()> {
    let until = Instant::now() + STOP_TIME_MAX;
    loop {
        match gone(std::fs::remove_dir_all(directory)) {
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty && Instant::now() < until => {
                std::thread::sleep(EXIT_PERIOD);
            }
            result => return result,
        }
    }
}

/// What another has removed meanwhile is as gone: a supervisor whose parent died removes its lab, too.
pub(crate) fn gone(removed: std::io::Result<()>) -> std::io::Result<()> {
    match removed {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_whose_description_is_garbled_is_removed_as_any_other() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::within(directory.path(), "a").unwrap();
        std::fs::create_dir_all(layout.pods()).unwrap();
        std::fs::write(layout.description(), "{\"name\":").unwrap();
        remove(&layout).unwrap();
        assert!(!layout.directory().exists());
    }
}
