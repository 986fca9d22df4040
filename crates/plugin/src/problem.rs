//! Why the agent did not answer, in words. Without the C library no one else knows the words of an error number.

use core::fmt;

use rustix::io::Errno;

/// Why the agent did not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Problem {
    /// A timeout of the socket.
    #[error("it took longer than {} s", crate::ANSWER_TIMEOUT.as_secs())]
    TooLate,
    /// The line has no end.
    #[error("the connection closed before the answer was complete")]
    Incomplete,
    /// Any other error of the system.
    #[error("{0}")]
    System(Described),
}

impl From<Errno> for Problem {
    fn from(errno: Errno) -> Problem {
        // That is how a socket's timeouts end; it has been set to wait for everything else.
        if errno == Errno::AGAIN { Problem::TooLate } else { Problem::System(Described(errno)) }
    }
}

/// What connecting to a socket by its path, writing and reading can end with, in the C library's words.
const WORDS: [(Errno, &str); 16] = [
    (Errno::PERM, "Operation not permitted"),
    (Errno::NOENT, "No such file or directory"),
    (Errno::IO, "Input/output error"),
    (Errno::NOMEM, "Cannot allocate memory"),
    (Errno::ACCESS, "Permission denied"),
    (Errno::NOTDIR, "Not a directory"),
    (Errno::INVAL, "Invalid argument"),
    (Errno::NFILE, "Too many open files in system"),
    (Errno::MFILE, "Too many open files"),
    (Errno::PIPE, "Broken pipe"),
    (Errno::NAMETOOLONG, "File name too long"),
    (Errno::LOOP, "Too many levels of symbolic links"),
    (Errno::PROTOTYPE, "Protocol wrong type for socket"),
    (Errno::CONNRESET, "Connection reset by peer"),
    (Errno::NOBUFS, "No buffer space available"),
    (Errno::CONNREFUSED, "Connection refused"),
];

/// An error number with its words, as the standard library prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Described(Errno);

impl fmt::Display for Described {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.0.raw_os_error();
        match WORDS.iter().find(|(errno, _)| *errno == self.0) {
            Some((_, words)) => write!(f, "{words} (os error {number})"),
            None => write!(f, "os error {number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn errors_read_as_the_standard_library_s() {
        for (errno, _) in WORDS {
            let expected = std::io::Error::from_raw_os_error(errno.raw_os_error()).to_string();
            assert_eq!(Problem::from(errno).to_string(), expected);
        }
        assert_eq!(Problem::from(Errno::XFULL).to_string(), "os error 54");
        assert_eq!(Problem::from(Errno::AGAIN).to_string(), "it took longer than 90 s");
    }
}
