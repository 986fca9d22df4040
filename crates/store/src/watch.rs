//! The two ends of a watch, the same for every driver.
//!
//! A driver first hands over the backlog (changes between the wanted revision and now), then feeds a
//! bounded queue. A watcher that lets the queue fill is cut off, so that it never holds up writers or
//! memory; it learns the revision to resume from.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use crate::limits::WATCH_BUFFER_MESSAGES;
use crate::types::{Event, Revision};

/// What a watch delivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchMessage {
    /// All changes of one revision within the range.
    Events {
        /// The revision.
        revision: Revision,
        /// Its changes, in key order.
        events: Vec<Event>,
    },
    /// Every change up to and including this revision has been delivered.
    Progress {
        /// The revision.
        revision: Revision,
    },
}

/// Why a watch ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WatchCancelled {
    /// The reader left its queue full.
    #[error("the watch fell {WATCH_BUFFER_MESSAGES} messages behind and was cancelled: resume from revision {resume}")]
    TooSlow {
        /// The first revision that was not delivered.
        resume: Revision,
    },
    /// The store was shut down, or the connection to it lost.
    #[error("the store was closed: resume from revision {resume}")]
    Closed {
        /// The first revision that was not delivered.
        resume: Revision,
    },
}

#[derive(Debug, Default)]
struct Shared {
    /// The revision that found the queue full; 0 while none did.
    overrun: AtomicU64,
}

/// The driver's end.
#[derive(Debug)]
pub struct WatchSender {
    queue: mpsc::Sender<WatchMessage>,
    shared: Arc<Shared>,
}

/// The reader's end.
#[derive(Debug)]
pub struct Watcher {
    backlog: VecDeque<WatchMessage>,
    queue: mpsc::Receiver<WatchMessage>,
    shared: Arc<Shared>,
    /// The first revision that the reader has not got.
    resume: Revision,
}

/// Makes the two ends. `resume` is the first revision that the reader wants.
pub fn watch_channel(backlog: VecDeque<WatchMessage>, resume: Revision) -> (WatchSender, Watcher) {
    let (sender, receiver) = mpsc::channel(WATCH_BUFFER_MESSAGES);
    let shared = Arc::new(Shared::default());
    let driver = WatchSender { queue: sender, shared: Arc::clone(&shared) };
    (driver, Watcher { backlog, queue: receiver, shared, resume })
}

impl WatchSender {
    /// Delivers the changes of one revision. `false` when the watch is over: drop the sender.
    pub fn send_events(&self, revision: Revision, events: Vec<Event>) -> bool {
        match self.queue.try_send(WatchMessage::Events { revision, events }) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.shared.overrun.store(revision, Ordering::Release);
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }

    /// Delivers a progress mark if there is room; a mark that is lost is no harm.
    pub fn send_progress(&self, revision: Revision) {
        let _ = self.queue.try_send(WatchMessage::Progress { revision });
    }

    /// Whether the reader is gone.
    pub fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }
}

impl Watcher {
    /// The next message. After an error there are no more.
    ///
    /// Cancel safe: no message is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<WatchMessage, WatchCancelled> {
        let message = match self.backlog.pop_front() {
            Some(message) => message,
            None => match self.queue.recv().await {
                Some(message) => message,
                None => return Err(self.ended()),
            },
        };
        let (WatchMessage::Events { revision, .. } | WatchMessage::Progress { revision }) = &message;
        self.resume = self.resume.max(revision + 1);
        Ok(message)
    }

    /// The first revision that has not been delivered: where a new watch goes on.
    pub fn resume_revision(&self) -> Revision {
        self.resume
    }

    fn ended(&self) -> WatchCancelled {
        match self.shared.overrun.load(Ordering::Acquire) {
            0 => WatchCancelled::Closed { resume: self.resume },
            // Everything queued before the overrun was delivered, so nothing lies between.
            revision => WatchCancelled::TooSlow { resume: revision },
        }
    }
}
