//! The CNI plugin as a program of its own: the same code that `portolan` runs when a runtime calls it.
//!
//! A runtime starts this process for every pod, and most of what a process costs is its start. glibc's asks
//! the processor some 75 times what it can do, and a virtual machine leaves to its hypervisor for each: that
//! alone takes longer than all else that happens here. musl's does not. Rust's standard library cannot be had
//! for it everywhere, so this does without: `make plugin` links what there is with musl, and what the standard
//! library would bring is below: an allocator, what happens on a panic, the way to the environment.
//!
//! This is the one file outside of the crate `kernel` that uses `unsafe`.

#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "the C library calls `main` by its name, and with pointers")]

use core::ffi::{CStr, c_char, c_int};
use core::fmt::{self, Write};
use core::iter;
use core::panic::PanicInfo;

use rustix::fd::BorrowedFd;
use rustix::stdio;

#[global_allocator]
static ALLOCATOR: rustix_dlmalloc::GlobalDlmalloc = rustix_dlmalloc::GlobalDlmalloc;

/// The exit code of a panic, as the standard library has it.
const PANIC_EXIT_CODE: c_int = 101;

/// The signal for a write that no one will read. As in every Rust program it is ignored, and the write fails.
const SIGPIPE: c_int = 13;
const SIG_IGN: usize = 1;

/// Runs the plugin and returns its exit code.
///
/// # Safety
///
/// `envp` must be the list of the environment: pointers to texts that end with a zero byte, up to a null
/// pointer, all of which stay unchanged to the end of the process.
#[unsafe(no_mangle)]
unsafe extern "C" fn main(_argc: c_int, _argv: *const *const c_char, envp: *const *const c_char) -> c_int {
    // SAFETY: this number and this value are Linux's on every architecture, and no handler is called.
    unsafe { signal(SIGPIPE, SIG_IGN) };
    // SAFETY: promised by the caller.
    let variables = portolan_plugin::variables(unsafe { environment(envp) });
    // SAFETY: nothing here closes them. Where the process was started without one of them, its number may become
    // that of the agent's socket, and this sees the socket; that is wrong, but not undefined.
    let (stdin, stdout, stderr) = unsafe { (stdio::stdin(), stdio::stdout(), stdio::stderr()) };
    portolan_plugin::run(&variables, stdin, stdout, stderr).into()
}

/// The entries of the environment that have a name and a value.
///
/// # Safety
///
/// As for [`main`].
unsafe fn environment(envp: *const *const c_char) -> impl Iterator<Item = (&'static [u8], &'static [u8])> {
    let mut next = envp;
    let entries = iter::from_fn(move || {
        // SAFETY: `next` has not passed the null pointer at the list's end: there this stops, without a step.
        let entry = unsafe { *next };
        if entry.is_null() {
            return None;
        }
        // SAFETY: there is at least one more pointer after one that is not null.
        next = unsafe { next.add(1) };
        // SAFETY: a text that ends with a zero byte and stays unchanged, as the caller promised.
        Some(unsafe { CStr::from_ptr(entry) }.to_bytes())
    });
    entries.filter_map(|entry| {
        let end = entry.iter().position(|byte| *byte == b'=')?;
        Some((entry.get(..end)?, entry.get(end + 1..)?))
    })
}

unsafe extern "C" {
    /// POSIX `_exit`: ends the process at once.
    safe fn _exit(code: c_int) -> !;
    /// C's `signal`: what a signal does from now on.
    fn signal(number: c_int, handler: usize) -> usize;
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    // SAFETY: as in `main`.
    let _ = writeln!(Stderr(unsafe { stdio::stderr() }), "{}: {info}", portolan_plugin::PLUGIN_NAME);
    _exit(PANIC_EXIT_CODE)
}

struct Stderr(BorrowedFd<'static>);

impl Write for Stderr {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        rustix::io::write(self.0, text.as_bytes()).map(|_| ()).map_err(|_| fmt::Error)
    }
}

/// The compiled `alloc` names this for unwinding, which nothing begins: a panic ends the process.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {
    _exit(PANIC_EXIT_CODE)
}

/// As [`rust_eh_personality`].
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() {
    _exit(PANIC_EXIT_CODE)
}
