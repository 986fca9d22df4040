//! Takes a lab down when the command that still needs it is interrupted: an unfinished `lab up`, and a
//! demo.
//!
//! A guard is made before anything of the lab is, and hears signals from the moment at which
//! [`Guard::new`] returns: not even one that comes at once is missed, also where the command was started
//! with SIGINT ignored, as shells start what runs in the background (POSIX, Shell Command Language §2.11).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc;

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
    shared: Arc<Shared>,
}

/// What the guard's thread and the command's know of each other.
#[derive(Default)]
struct Shared {
    /// Whether the thread has begun to take the lab down.
    is_interrupted: AtomicBool,
    /// The supervisor's process id until it is ready to be asked to stop; zero otherwise.
    supervisor: AtomicI32,
}

impl Guard {
    /// Hears signals from now on.
    pub(crate) fn new(lab: &str) -> anyhow::Result<Guard> {
        let (done, is_done) = oneshot::channel();
        let (listening, is_listening) = mpsc::sync_channel(1);
        let shared = Arc::new(Shared::default());
        let (lab, told) = (lab.to_owned(), Arc::clone(&shared));
        std::thread::Builder::new()
            .name("interrupt".to_owned())
            .spawn(move || {
                if !is_interrupted(is_done, &listening) {
                    return;
                }
                told.is_interrupted.store(true, Ordering::SeqCst);
                let supervisor = told.supervisor.load(Ordering::SeqCst);
                if supervisor > 0 {
                    // It is this process's child that nobody has waited for, so the number is still its own.
                    let _ = kill(Pid::from_raw(supervisor), Signal::SIGKILL);
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

    /// This supervisor is starting: it cannot be asked to stop yet, and is killed instead.
    pub(crate) fn supervisor_starts(&self, process: u32) {
        self.shared.supervisor.store(i32::try_from(process).unwrap_or(0), Ordering::SeqCst);
    }

    /// The supervisor can be asked to stop, or has ended.
    pub(crate) fn supervisor_started(&self) {
        self.shared.supervisor.store(0, Ordering::SeqCst);
    }
}

impl Drop for Guard {
    /// A command whose lab is being taken down under it fails in some way. That is not its result: the
    /// process ends as an interrupted one, when the lab is down.
    fn drop(&mut self) {
        while self.shared.is_interrupted.load(Ordering::SeqCst) {
            std::thread::park();
        }
    }
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
