//! Takes a lab down when the command that still needs it is interrupted: an unfinished `lab up`, and a
//! demo.
//!
//! A guard is made before anything of the lab is, and hears signals from the moment at which
//! [`Guard::new`] returns: not even one that comes at once is missed, also where the command was started
//! with SIGINT ignored, as shells start what runs in the background (POSIX, Shell Command Language §2.11).

use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// The exit code of a command that was interrupted, as shells know it: 128 and the number of SIGINT.
const EXIT_CODE: i32 = 130;

/// While it lives, SIGINT and SIGTERM take the lab down and end the process.
pub(crate) struct Guard {
    _done: oneshot::Sender<()>,
    shared: Arc<Mutex<Shared>>,
}

/// What the guard's thread and the command's know of each other.
#[derive(Default)]
struct Shared {
    /// Whether the thread has begun to take the lab down.
    is_interrupted: bool,
    /// The supervisor, until it is ready to be asked to stop.
    supervisor: Option<Pid>,
}

impl Guard {
    /// Hears signals from now on.
    pub(crate) fn new(lab: &str) -> anyhow::Result<Guard> {
        let (done, is_done) = oneshot::channel();
        let (listening, is_listening) = mpsc::sync_channel(1);
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (lab, told) = (lab.to_owned(), Arc::clone(&shared));
        std::thread::Builder::new()
            .name("interrupt".to_owned())
            .spawn(move || {
                if !is_interrupted(is_done, &listening) {
                    return;
                }
                {
                    let mut shared = lock(&told);
                    shared.is_interrupted = true;
                    if let Some(supervisor) = shared.supervisor {
                        // This process's child, for which nobody has waited, so that the number is its own.
                        let _ = kill(supervisor, Signal::SIGKILL);
                    }
                }
                // Nobody waits for the result any more; what is left is found by `lab down`.
                let _ = crate::down(&lab);
                std::process::exit(EXIT_CODE);
            })
            .context("starting the thread that waits for an interruption")?;
        is_listening
            .recv()
            .context("the thread that waits for an interruption ended")?
            .context("waiting for signals")?;
        Ok(Guard { _done: done, shared })
    }

    /// Starts the supervisor, unless the lab is being taken down. It cannot be asked to stop yet, and is
    /// killed instead.
    pub(crate) fn start<E>(&self, spawn: impl FnOnce() -> Result<Child, E>) -> Result<Child, E> {
        let mut shared = self.uninterrupted();
        let child = spawn()?;
        shared.supervisor = i32::try_from(child.id()).ok().map(Pid::from_raw);
        Ok(child)
    }

    /// The supervisor can be asked to stop, or has ended.
    pub(crate) fn has_started(&self) {
        self.uninterrupted().supervisor = None;
    }

    /// Waits for the end of the process, where the lab is being taken down.
    fn uninterrupted(&self) -> MutexGuard<'_, Shared> {
        loop {
            let shared = lock(&self.shared);
            if !shared.is_interrupted {
                return shared;
            }
            drop(shared);
            std::thread::park();
        }
    }
}

impl Drop for Guard {
    /// A command whose lab is being taken down under it fails in some way. That is not its result: the
    /// process ends as an interrupted one, when the lab is down.
    fn drop(&mut self) {
        drop(self.uninterrupted());
    }
}

/// Nothing is left half-changed by a panic: each change is one assignment.
fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a signal or the end; says first whether it hears signals.
fn is_interrupted(done: oneshot::Receiver<()>, listening: &mpsc::SyncSender<std::io::Result<()>>) -> bool {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = listening.send(Err(error));
            return false;
        }
    };
    runtime.block_on(async {
        let signals = signal(SignalKind::interrupt()).and_then(|it| Ok((it, signal(SignalKind::terminate())?)));
        let (mut interrupt, mut terminate) = match signals {
            Ok(signals) => signals,
            Err(error) => {
                let _ = listening.send(Err(error));
                return false;
            }
        };
        let _ = listening.send(Ok(()));
        tokio::select! {
            _ = interrupt.recv() => true,
            _ = terminate.recv() => true,
            _ = done => false,
        }
    })
}
