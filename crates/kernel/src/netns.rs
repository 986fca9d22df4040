//! Network namespaces: opening, making, deleting, and working inside them.
//!
//! A thread that enters another namespace never comes back: work inside a namespace runs on a thread
//! of its own, which ends with the work, so that no other work ever finds itself in a wrong one.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::error::KernelError;

/// Where named namespaces live, as ip-netns(8) has it.
const NAMED: &str = "/run/netns";

/// The network namespace of the thread that reads it.
const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace. It stays alive as long as this value, whatever becomes of its name.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// The calling thread's namespace.
    pub fn current() -> Result<Namespace, KernelError> {
        Namespace::open(Path::new(OWN))
    }

    /// The namespace at a path: `/run/netns/NAME`, `/proc/PID/ns/net`, `CNI_NETNS`.
    ///
    /// # Errors
    ///
    /// [`KernelError::NoNamespace`] also for a file that is left where a namespace was mounted.
    pub fn open(path: &Path) -> Result<Namespace, KernelError> {
        let none = |errno| KernelError::NoNamespace { path: path.to_owned(), errno };
        let doing = || format!("open the network namespace {}", path.display());
        let file = File::open(path).map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
            Some(errno @ (Errno::ENOENT | Errno::ENOTDIR | Errno::ESRCH)) => none(errno),
            _ => KernelError::file(doing(), &error),
        })?;
        let system = fstatfs(&file).map_err(|errno| KernelError::system(doing(), errno))?;
        if system.filesystem_type() == NSFS_MAGIC { Ok(Namespace { file }) } else { Err(none(Errno::EINVAL)) }
    }

    /// Makes a namespace with a name that ip-netns(8) knows too.
    ///
    /// # Errors
    ///
    /// `EEXIST` if the name is taken.
    pub fn create_named(name: &str) -> Result<Namespace, KernelError> {
        prepare_directory()?;
        let path = named_path(name);
        let doing = || format!("make the network namespace {}", path.display());
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| KernelError::file(doing(), &error))?;
        let made = on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| KernelError::system(doing(), errno))?;
            mount(Some(OWN), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(|errno| KernelError::system(doing(), errno))?;
            Namespace::current()
        });
        if made.is_err() {
            // The name is ours and stands for nothing yet.
            let _ = std::fs::remove_file(&path);
        }
        made
    }

    /// Deletes a name. The namespace itself goes when nothing uses it any more. A name that does not
    /// exist is fine.
    pub fn delete_named(name: &str) -> Result<(), KernelError> {
        let path = named_path(name);
        let doing = || format!("delete the network namespace {}", path.display());
        match umount2(&path, MntFlags::MNT_DETACH) {
            // Not mounted: left behind by a crash between making the file and the mount.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(KernelError::system(doing(), errno)),
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(KernelError::file(doing(), &error)),
            _ => Ok(()),
        }
    }

    /// Makes a namespace without a name: it is gone when this value and all that run in it are gone,
    /// also after a crash.
    pub fn create_unnamed() -> Result<Namespace, KernelError> {
        on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|errno| KernelError::system("make a network namespace", errno))?;
            Namespace::current()
        })
    }

    /// The path under which this process, and others that may read its `/proc`, can open it.
    pub fn path(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }

    /// The descriptor, to name the namespace in a request.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Moves the calling thread into the namespace for the rest of its life.
    pub(crate) fn enter(&self) -> Result<(), KernelError> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .map_err(|errno| KernelError::system("enter a network namespace", errno))
    }
}

/// Runs a closure inside a namespace, on a thread of its own, and returns what it returns.
pub fn in_namespace<T: Send>(namespace: &Namespace, work: impl FnOnce() -> T + Send) -> Result<T, KernelError> {
    on_own_thread(|| {
        namespace.enter()?;
        Ok(work())
    })
}

/// Runs one closure inside a namespace, as [`in_namespace`] does, while another runs here.
pub(crate) fn in_namespace_while<T: Send, U>(
    namespace: &Namespace,
    inside: impl FnOnce() -> T + Send,
    here: impl FnOnce() -> U,
) -> (Result<T, KernelError>, U) {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| namespace.enter().map(|()| inside()));
        let outcome = here();
        (worker.join().unwrap_or(Err(KernelError::ThreadLost)), outcome)
    })
}

/// The path of a named namespace.
pub fn named_path(name: &str) -> PathBuf {
    Path::new(NAMED).join(name)
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T, KernelError> + Send) -> Result<T, KernelError> {
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or(Err(KernelError::ThreadLost))
}

/// Makes `/run/netns` a shared mount, as ip-netns(8) does, so that deleting a name in one mount
/// namespace deletes it in all.
fn prepare_directory() -> Result<(), KernelError> {
    let doing = "prepare /run/netns";
    std::fs::create_dir_all(NAMED).map_err(|error| KernelError::file(doing, &error))?;
    let none = None::<&str>;
    let share = || mount(none, NAMED, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    if share() == Err(Errno::EINVAL) {
        mount(Some(NAMED), NAMED, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .and_then(|()| share())
            .map_err(|errno| KernelError::system(doing, errno))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::fs::MetadataExt;

    fn inode(namespace: &Namespace) -> u64 {
        namespace.file.metadata().unwrap().st_ino()
    }

    #[test]
    fn work_runs_inside_and_the_caller_stays_outside() {
        let Ok(inside) = Namespace::create_unnamed() else { return println!("skipped: needs CAP_SYS_ADMIN") };
        let outside = Namespace::current().unwrap();
        let seen = in_namespace(&inside, || inode(&Namespace::current().unwrap())).unwrap();
        assert_eq!(seen, inode(&inside));
        assert_ne!(seen, inode(&outside));
        assert_eq!(inode(&Namespace::current().unwrap()), inode(&outside));
        assert_eq!(inode(&Namespace::open(&inside.path()).unwrap()), inode(&inside));
    }

    #[test]
    fn a_name_is_taken_once_and_can_be_deleted_twice() {
        let name = format!("portolan-test-{}", std::process::id());
        let Ok(made) = Namespace::create_named(&name) else { return println!("skipped: needs CAP_SYS_ADMIN") };
        let again = Namespace::create_named(&name).unwrap_err();
        let opened = Namespace::open(&named_path(&name)).map(|opened| inode(&opened));
        Namespace::delete_named(&name).unwrap();
        Namespace::delete_named(&name).unwrap();
        assert_eq!(again.errno(), Some(Errno::EEXIST));
        assert_eq!(opened.unwrap(), inode(&made));
        assert!(Namespace::open(&named_path(&name)).is_err());
    }

    #[test]
    fn a_file_that_is_no_namespace_is_told_from_one() {
        for (path, expected) in [("/nonexistent/netns", Errno::ENOENT), ("/proc/self/status", Errno::EINVAL)] {
            let error = Namespace::open(Path::new(path)).unwrap_err();
            assert_eq!(error, KernelError::NoNamespace { path: path.into(), errno: expected });
        }
    }

    #[test]
    fn a_panic_inside_is_an_error_outside() {
        let Ok(inside) = Namespace::create_unnamed() else { return println!("skipped: needs CAP_SYS_ADMIN") };
        let outcome = in_namespace(&inside, || panic!("on purpose"));
        assert_eq!(outcome, Err::<(), _>(KernelError::ThreadLost));
    }
}
