//! Watches that outlive their connection.
//!
//! Each watch is one stream and one task. The task knows the first revision that it has not handed
//! over; when the stream breaks, the next one begins there, at any member. etcd may cut a large
//! revision into fragments, and joins several revisions in one message: both are undone, so that a
//! message is a revision. What was delivered is never delivered again.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, watch as signal};

use super::client::{Client, Failure, Method, Opened, explain, pause_after};
use super::convert::{Keys, revision_of, signed, unsigned};
use super::messages::{self as wire, WatchCreateRequest, WatchRequestUnion, WatchResponse};
use super::{COMPACTED, FUTURE, plain};
use crate::error::StoreError;
use crate::limits::{ETCD_REQUEST_TIMEOUT, WATCH_BUFFER_MESSAGES, WATCH_REPLAY_MESSAGES};
use crate::types::{Event, KeyRange, Revision, WatchRequest};
use crate::watch::{WatchCancelled, WatchSender, Watcher, watch_channel_of};

type Stream = Opened<wire::WatchRequest, WatchResponse>;

/// What a watch needs as long as it lives.
pub(super) struct Context {
    pub(super) client: Arc<Client>,
    pub(super) keys: Keys,
    pub(super) request: WatchRequest,
    /// Counts among the watches of the driver.
    pub(super) permit: OwnedSemaphorePermit,
    /// Ends with the driver.
    pub(super) open: signal::Receiver<()>,
}

/// Opens a watch from `start`, and starts its task. `current` is the store's revision.
pub(super) async fn open(context: Context, start: Revision, current: Revision) -> Result<Watcher, StoreError> {
    let capacity = if start <= current { WATCH_REPLAY_MESSAGES } else { WATCH_BUFFER_MESSAGES };
    let (sender, watcher) = watch_channel_of(capacity, start);
    let stream = match context.keys.range(&context.request.range) {
        Some(range) => Some(connect(&context, range, start).await?),
        // Nothing is ever in the range, and etcd refuses to watch it.
        None => None,
    };
    let mut following = Following { context, sender, start, next: start, partial: Vec::new() };
    tokio::spawn(async move {
        // Kept apart from what the loop borrows mutably.
        let mut open = following.context.open.clone();
        tokio::select! {
            () = following.run(stream) => {}
            _ = open.changed() => {}
        }
        drop(following.context.permit);
    });
    Ok(watcher)
}

/// The oldest revision that can be read, when `requested` is older or the same: a watch from the very
/// first revision is told.
pub(super) async fn oldest_revision(client: &Client, keys: &Keys, requested: Revision) -> Result<Revision, StoreError> {
    let (key, range_end) = keys.range(&KeyRange::key("/")).unwrap_or_default();
    let create = WatchCreateRequest { key, range_end, start_revision: 1, ..WatchCreateRequest::default() };
    let told = async {
        let mut stream: Stream = client.open(Method::WATCH, created(create)).await.map_err(plain)?;
        let mut answer = std::mem::take(&mut stream.first);
        loop {
            if answer.compact_revision > 0 {
                return Ok(unsigned(answer.compact_revision));
            }
            if answer.canceled {
                return Err(StoreError::Backend { reason: answer.cancel_reason });
            }
            let lost = |reason: String| StoreError::Unreachable { reason };
            answer = match stream.answers.message().await {
                Ok(Some(answer)) => answer,
                Ok(None) => return Err(lost("the stream ended".to_owned())),
                Err(status) => return Err(lost(explain(&status))),
            };
        }
    };
    // A store that was compacted at its first revision can be watched from there, and says nothing.
    tokio::time::timeout(ETCD_REQUEST_TIMEOUT, told).await.unwrap_or(Ok(requested))
}

fn created(create: WatchCreateRequest) -> wire::WatchRequest {
    wire::WatchRequest { request_union: Some(WatchRequestUnion::Create(create)) }
}

/// Opens the stream of a watch and waits until etcd watches.
async fn connect(context: &Context, range: (Vec<u8>, Vec<u8>), start: Revision) -> Result<Stream, StoreError> {
    let (key, range_end) = range;
    let create = WatchCreateRequest {
        key,
        range_end,
        start_revision: signed(start),
        // Also where the reader does not want them: a resumed watch begins later then.
        progress_notify: true,
        prev_kv: context.request.previous,
        fragment: true,
    };
    let mut may_renew = true;
    loop {
        let opened: Result<Stream, Failure> = context.client.open(Method::WATCH, created(create.clone())).await;
        let stream = opened.map_err(plain)?;
        if !stream.first.canceled {
            return Ok(stream);
        }
        if stream.first.compact_revision > 0 {
            let compacted = unsigned(stream.first.compact_revision);
            return Err(StoreError::Compacted { requested: start, compacted });
        }
        // A token that does not hold any more is answered so, too.
        if may_renew && context.client.forget_token() {
            may_renew = false;
            continue;
        }
        return Err(StoreError::Denied { reason: stream.first.cancel_reason });
    }
}

/// The task of a watch.
struct Following {
    context: Context,
    sender: WatchSender,
    /// The first revision that the reader wanted.
    start: Revision,
    /// The first revision that was not handed over.
    next: Revision,
    /// The fragments so far.
    partial: Vec<wire::Event>,
}

/// Why a stream is left.
enum Left {
    /// The watch is over.
    Over,
    /// The stream broke.
    Broken(String),
}

impl Following {
    async fn run(&mut self, stream: Option<Stream>) {
        let (Some(mut stream), Some(range)) = (stream, self.context.keys.range(&self.context.request.range)) else {
            return self.sender.closed().await;
        };
        loop {
            let reason = match self.follow(stream).await {
                Left::Over => return,
                Left::Broken(reason) => reason,
            };
            tracing::debug!(reason, resume = self.next, "a watch is resumed");
            self.partial.clear();
            stream = match self.reconnect(&range).await {
                Some(stream) => stream,
                None => return,
            };
        }
    }

    /// Takes what comes until the stream ends.
    async fn follow(&mut self, mut stream: Stream) -> Left {
        let mut answer = std::mem::take(&mut stream.first);
        loop {
            if let Some(left) = self.take(answer) {
                return left;
            }
            let next = tokio::select! {
                () = self.sender.closed() => return Left::Over,
                next = stream.answers.message() => next,
            };
            answer = match next {
                Ok(Some(answer)) => answer,
                Ok(None) => return Left::Broken("the stream ended".to_owned()),
                Err(status) => return Left::Broken(explain(&status)),
            };
        }
    }

    fn take(&mut self, answer: WatchResponse) -> Option<Left> {
        if answer.compact_revision > 0 {
            let compacted = unsigned(answer.compact_revision);
            self.sender.end(WatchCancelled::Compacted { resume: self.next, compacted });
            return Some(Left::Over);
        }
        if answer.canceled {
            return Some(Left::Broken(answer.cancel_reason));
        }
        let is_mark = answer.events.is_empty() && !answer.created && !answer.fragment;
        self.partial.extend(answer.events);
        if answer.fragment {
            return None;
        }
        if is_mark && self.partial.is_empty() {
            self.mark(revision_of(answer.header.as_ref()));
            return None;
        }
        let events = std::mem::take(&mut self.partial);
        (!self.deliver(events)).then_some(Left::Over)
    }

    /// Everything up to a revision was delivered.
    fn mark(&mut self, revision: Revision) {
        // Some versions mark a watch that begins in the future with what is before it.
        if revision + 1 < self.next {
            return;
        }
        self.next = revision + 1;
        if self.context.request.progress {
            self.sender.send_progress(revision);
        }
    }

    /// Hands events over, a message for each revision. `false` when the watch is over.
    fn deliver(&mut self, events: Vec<wire::Event>) -> bool {
        let events = events.into_iter().filter_map(|event| self.context.keys.event(event));
        let mut events: Vec<Event> = events.filter(|event| event.current.mod_revision >= self.next).collect();
        // Within a revision etcd has the order of the operations; here it is that of the keys.
        events.sort_by(|left, right| {
            let key = |event: &Event| (event.current.mod_revision, event.current.key.clone());
            key(left).cmp(&key(right))
        });
        for events in events.chunk_by(|left, right| left.current.mod_revision == right.current.mod_revision) {
            let revision = events[0].current.mod_revision;
            if !self.sender.send_events(revision, events.to_vec()) {
                return false;
            }
            self.next = revision + 1;
        }
        true
    }

    /// Opens a stream where the last one broke. `None` when the watch is over.
    async fn reconnect(&mut self, range: &(Vec<u8>, Vec<u8>)) -> Option<Stream> {
        let mut rounds = 0;
        loop {
            let opened = tokio::select! {
                () = self.sender.closed() => return None,
                opened = connect(&self.context, range.clone(), self.next) => opened,
            };
            match opened {
                Ok(stream) => match self.check(&stream).await {
                    Ok(None) => return Some(stream),
                    Ok(Some(cancelled)) => {
                        self.sender.end(cancelled);
                        return None;
                    }
                    Err(error) => tracing::debug!(%error, "a resumed watch cannot be checked"),
                },
                Err(StoreError::Compacted { compacted, .. }) => {
                    self.sender.end(WatchCancelled::Compacted { resume: self.next, compacted });
                    return None;
                }
                // For as long as the reader wants: it hears nothing, as from a store without changes.
                Err(error) => {
                    tracing::warn!(%error, resume = self.next, "a watch cannot be resumed; it is tried again");
                }
            }
            rounds += 1;
            tokio::select! {
                () = self.sender.closed() => return None,
                () = tokio::time::sleep(pause_after(rounds)) => {}
            }
        }
    }

    /// Why a stream that was opened anew does not bring all that follows, if it does not.
    ///
    /// The store went back behind what was delivered, as one that was put in the place of another does:
    /// the watch would wait for a future that is another's. (A member that is only behind is no such
    /// case.) Or the store was compacted at the very revision that comes next, whose
    /// removals etcd forgets in many versions (etcd issue 18089).
    async fn check(&self, stream: &Stream) -> Result<Option<WatchCancelled>, StoreError> {
        let resume = self.next;
        let (key, range_end) = self.context.keys.range(&KeyRange::key("/")).unwrap_or_default();
        let revision = signed(resume - 1);
        let request =
            wire::RangeRequest { key, range_end, revision, count_only: true, ..wire::RangeRequest::default() };
        let read: Result<wire::RangeResponse, Failure> = self.context.client.call(Method::RANGE, request).await;
        match read {
            Ok(_) => Ok(None),
            Err(Failure::Refused { status, .. }) if status.message() == COMPACTED => {
                let compacted = oldest_revision(&self.context.client, &self.context.keys, resume - 1).await?;
                Ok(Some(WatchCancelled::Compacted { resume, compacted }))
            }
            Err(Failure::Refused { status, .. }) if status.message() == FUTURE => {
                // A watch that began in the future may wait for it.
                let current = revision_of(stream.first.header.as_ref());
                Ok((resume > self.start).then_some(WatchCancelled::Replaced { resume, current }))
            }
            Err(failure) => Err(plain(failure)),
        }
    }
}
