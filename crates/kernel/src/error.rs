//! What can go wrong between us and the kernel, by what the reader can do about it.

use std::fmt;
use std::path::PathBuf;

use nix::errno::Errno;

/// Why the kernel does not hold what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The kernel answered a netlink request with an error.
    #[error("{0}")]
    Refused(Refusal),
    /// A socket's buffer ran over: messages were lost, so everything must be read again.
    #[error("netlink messages were lost because they came faster than they were read; read the whole state again")]
    Overrun,
    /// A dump was changed under our hands each time it was tried.
    #[error("the kernel's state changed during each of {0} attempts to read it; try again")]
    Unstable(u32),
    /// Bytes from the kernel that are no netlink message, or an answer that is missing.
    #[error("the kernel's answer is unreadable: {0}")]
    Malformed(&'static str),
    /// A system call failed.
    #[error("cannot {doing}: {errno}")]
    System {
        /// What was tried.
        doing: String,
        /// The error number.
        errno: Errno,
    },
    /// The pod already has an interface of that name.
    #[error(
        "interface {name} already exists in network namespace {namespace}; \
         choose another interface name, or delete the one that is there"
    )]
    InterfaceTaken {
        /// The interface.
        name: String,
        /// The path of the pod's namespace.
        namespace: String,
    },
    /// A link that we need has the name of one that is not ours and differs from what we need.
    #[error(
        "link {name} exists and is not ours: {difference}; \
         delete it (`ip link delete {name}`) or give it what is needed, and it will be taken over"
    )]
    Foreign {
        /// The link.
        name: String,
        /// What is different.
        difference: String,
    },
    /// A link that something refers to does not exist.
    #[error("link {0} does not exist; it will be tried again when it appears")]
    NoSuchLink(String),
    /// Someone else's route of the same destination leads elsewhere.
    #[error(
        "a route to {destination} that is not ours is in the way; delete it (`ip route del {destination}`) for: {wanted}"
    )]
    RouteTaken {
        /// The destination.
        destination: portolan_net::IpNet,
        /// The route that we need.
        wanted: String,
    },
    /// A path that leads to no network namespace: it is gone, or was never one.
    #[error("there is no network namespace at {} ({errno}); the container is gone, or has not been made yet", path.display())]
    NoNamespace {
        /// The path.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// A program that we need is not installed.
    #[error("cannot {doing}: `{program}` is not installed; install the Debian package `{package}`")]
    MissingProgram {
        /// The program.
        program: &'static str,
        /// The package that has it.
        package: &'static str,
        /// What cannot be done without it.
        doing: &'static str,
    },
    /// A program of iptables failed.
    #[error("{program} failed{}: {message}", at.as_ref().map(|line| format!(" at `{line}`")).unwrap_or_default())]
    Iptables {
        /// The program.
        program: String,
        /// The line of its input that it refused, where it said so.
        at: Option<String>,
        /// What it said.
        message: String,
    },
    /// A thread that worked inside another namespace ended without an answer.
    #[error("the thread that worked in the namespace ended without an answer")]
    ThreadLost,
}

impl KernelError {
    /// A failed system call, from the thread's `errno`.
    pub(crate) fn last(doing: impl Into<String>) -> KernelError {
        KernelError::System { doing: doing.into(), errno: Errno::last() }
    }

    /// A failed system call.
    pub(crate) fn system(doing: impl Into<String>, errno: Errno) -> KernelError {
        KernelError::System { doing: doing.into(), errno }
    }

    /// A failed file operation.
    pub(crate) fn file(doing: impl Into<String>, error: &std::io::Error) -> KernelError {
        KernelError::System { doing: doing.into(), errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)) }
    }

    /// The error number, where the kernel gave one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            KernelError::Refused(refusal) => Some(refusal.errno),
            KernelError::System { errno, .. } | KernelError::NoNamespace { errno, .. } => Some(*errno),
            KernelError::Overrun
            | KernelError::Unstable(_)
            | KernelError::Malformed(_)
            | KernelError::InterfaceTaken { .. }
            | KernelError::Foreign { .. }
            | KernelError::NoSuchLink(_)
            | KernelError::RouteTaken { .. }
            | KernelError::MissingProgram { .. }
            | KernelError::Iptables { .. }
            | KernelError::ThreadLost => None,
        }
    }
}

/// An error that the kernel answered with, and its own words where it gave any (extended ACK).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The error number.
    pub errno: Errno,
    /// The kernel's explanation.
    pub message: Option<String>,
    /// Where in the request the attribute lies that the kernel objects to, in bytes.
    pub offset: Option<u32>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the kernel refused: {}", self.errno.desc())?;
        if let Some(message) = &self.message {
            write!(f, " ({message})")?;
        }
        match self.errno {
            Errno::EPERM | Errno::EACCES => f.write_str("; run with CAP_NET_ADMIN"),
            Errno::EOPNOTSUPP => f.write_str("; this kernel lacks the feature"),
            _ => Ok(()),
        }
    }
}
