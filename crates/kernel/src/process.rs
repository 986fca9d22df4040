//! Running programs inside a network namespace.

use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;

use crate::error::KernelError;
use crate::netns::Namespace;

/// Makes a command start inside a namespace. The namespace is opened now and entered when the program
/// starts, so that a name that is deleted meanwhile does no harm.
pub fn enter_on_start(command: &mut Command, namespace: &Namespace) -> Result<(), KernelError> {
    let descriptor = namespace
        .fd()
        .try_clone_to_owned()
        .map_err(|error| KernelError::file("duplicate a namespace's descriptor", &error))?;
    let enter = move || {
        // SAFETY: `setns` takes two numbers, is async-signal-safe, and the descriptor is open: the closure
        // owns it.
        let outcome = unsafe { libc::setns(descriptor.as_raw_fd(), libc::CLONE_NEWNET) };
        Errno::result(outcome).map(drop).map_err(std::io::Error::from)
    };
    // SAFETY: the closure runs between fork and exec; it makes one system call, allocates nothing and
    // takes no lock.
    unsafe {
        command.pre_exec(enter);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_runs_inside() {
        let Ok(inside) = Namespace::create_unnamed() else { return println!("skipped: needs CAP_SYS_ADMIN") };
        let mut command = Command::new("cat");
        command.arg("/proc/self/net/dev");
        enter_on_start(&mut command, &inside).unwrap();
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        // Two lines of heading, and the loopback alone.
        assert_eq!(text.lines().count(), 3, "{text}");
    }
}
