//! Takes a lab down when the command that still needs it is interrupted: an unfinished `lab up --wait`,
//! and a demo.

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// The exit code of a command that was interrupted, as shells know it: 128 and the number of SIGINT.
const EXIT_CODE: i32 = 130;

/// While it lives, SIGINT and SIGTERM take the lab down and end the process.
pub(crate) struct Guard {
    _done: oneshot::Sender<()>,
}

impl Guard {
    pub(crate) fn new(lab: &str) -> anyhow::Result<Guard> {
        let (done, is_done) = oneshot::channel();
        let lab = lab.to_owned();
        std::thread::Builder::new()
            .name("interrupt".to_owned())
            .spawn(move || {
                if matches!(is_interrupted(is_done), Ok(true)) {
                    // Nobody waits for the result any more; what is left is found by `lab down`.
                    let _ = crate::down(&lab);
                    std::process::exit(EXIT_CODE);
                }
            })
            .context("starting the thread that waits for an interruption")?;
        Ok(Guard { _done: done })
    }
}

fn is_interrupted(done: oneshot::Receiver<()>) -> std::io::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        tokio::select! {
            _ = interrupt.recv() => Ok(true),
            _ = terminate.recv() => Ok(true),
            _ = done => Ok(false),
        }
    })
}
