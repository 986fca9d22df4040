//! The two ends of a watch, the same for every driver.
//!
//! A driver first hands over the backlog (changes between the wanted revision and now), then feeds a
//! bounded queue. A watcher that lets the queue fill is cut off, so that it never holds up writers or
//! memory; it learns the revision to resume from.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

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
    #[error(
        "the watch fell {WATCH_BUFFER_MESSAGES} or more messages behind and was cancelled: resume from revision {resume}"
    )]
    TooSlow {
        /// The first revision that was not delivered.
        resume: Revision,
    },
    /// What would come next was compacted while the connection to the store was lost.
    #[error("revision {resume} was compacted before it was delivered, the oldest left is {compacted}: list again")]
    Compacted {
        /// The first revision that was not delivered.
        resume: Revision,
        /// The oldest revision that can still be read.
        compacted: Revision,
    },
    /// Another store was put in the place of the one that was watched.
    #[error("revision {resume} is in the future of the store, which is at {current}; was it replaced? list again")]
    Replaced {
        /// The first revision that was not delivered.
        resume: Revision,
        /// The store's newest revision.
        current: Revision,
    },
    /// The store was shut down.
    #[error("the store was closed: resume from revision {resume}")]
    Closed {
        /// The first revision that was not delivered.
        resume: Revision,
    },
}

#[derive(Debug, Default)]
struct Shared {
    /// Why the driver ended the watch; not set while it did not.
    end: OnceLock<WatchCancelled>,
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
    let (sender, watcher) = watch_channel_of(WATCH_BUFFER_MESSAGES, resume);
    (sender, Watcher { backlog, ..watcher })
}

/// Makes the two ends, with a queue of another length and no backlog.
pub(crate) fn watch_channel_of(capacity: usize, resume: Revision) -> (WatchSender, Watcher) {
    let (sender, queue) = mpsc::channel(capacity);
    let shared = Arc::new(Shared::default());
    let driver = WatchSender { queue: sender, shared: Arc::clone(&shared) };
    (driver, Watcher { backlog: VecDeque::new(), queue, shared, resume })
}

impl WatchSender {
    /// Delivers the changes of one revision. `false` when the watch is over: drop the sender.
    pub fn send_events(&self, revision: Revision, events: Vec<Event>) -> bool {
        match self.queue.try_send(WatchMessage::Events { revision, events }) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                // Everything queued before is delivered, so nothing lies between.
                self.end(WatchCancelled::TooSlow { resume: revision });
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }

    /// Delivers a progress mark if there is room; a mark that is lost is no harm.
    pub fn send_progress(&self, revision: Revision) {
        let _ = self.queue.try_send(WatchMessage::Progress { revision });
    }

    /// Says why the watch ends, for when the sender is dropped. The first reason counts.
    pub(crate) fn end(&self, reason: WatchCancelled) {
        let _ = self.shared.end.set(reason);
    }

    /// Waits until the reader is gone.
    pub(crate) async fn closed(&self) {
        self.queue.closed().await;
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
        self.shared.end.get().cloned().unwrap_or(WatchCancelled::Closed { resume: self.resume })
    }
}
