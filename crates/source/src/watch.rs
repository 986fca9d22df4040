//! One task per table: list, watch, and again after a failure.
//!
//! ```text
//!            ┌────────── backoff ◀── Disconnected ◀─┐
//!            ▼                                      │ any failure
//!   list, page by page ──▶ Connected, Replace ──▶ watch ──▶ Upsert, Delete, Reject
//! ```
//!
//! A list is kept back until it is complete: half of one must never look like deletions. While the
//! server is away nothing is sent but that it is away.

use std::pin::pin;

use futures::{Stream, StreamExt};
use kube::runtime::watcher::{self, Event, InitialListStrategy, ListSemantic};
use kube::{Api, Client};
use portolan_net::ObjectKind;
use portolan_state::{Change, Object, ObjectRef, Problem};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::backoff::Backoff;
use crate::convert::{Converted, Table};
use crate::limits::{BACKOFF_MAX, LIST_SILENCE_MAX, PAGE_SIZE};
use crate::outbox::{Outbox, SharedNames};
use crate::{SourceEvent, explain};

/// What a table's task is told.
pub(crate) struct TableTask {
    /// The client.
    pub(crate) client: Client,
    /// Which objects, as a field selector.
    pub(crate) fields: Option<String>,
    /// Whether objects that a label leaves to another proxy are kept.
    pub(crate) keep_other_proxies: bool,
    /// Where the changes go.
    pub(crate) sender: mpsc::Sender<SourceEvent>,
    /// Of the waits' jitter.
    pub(crate) seed: u64,
}

/// Why a watch is given up.
enum Ended {
    /// The receiver is gone: there is nobody to watch for.
    NoReceiver,
    /// Start over with a list.
    Failed,
}

struct Watch {
    task: TableTask,
    kind: ObjectKind,
    outbox: Outbox,
    names: SharedNames,
    backoff: Backoff,
    /// Whether the receiver was told that the server is there, or away; neither at first.
    connected: Option<bool>,
    /// Whether the watch broke off and has brought nothing since.
    broke_off: bool,
    /// When the last list was complete.
    listed_at: Option<Instant>,
}

/// Runs until the receiver is gone.
pub(crate) async fn run<T: Table>(task: TableTask) {
    let backoff = Backoff::new(task.seed);
    let (outbox, names) = (Outbox::default(), SharedNames::default());
    let kind = T::KIND;
    let mut watch = Watch { task, kind, outbox, names, backoff, connected: None, broke_off: false, listed_at: None };
    loop {
        match watch.list_and_watch::<T>().await {
            Ended::NoReceiver => return,
            Ended::Failed => {
                // A list alone is no success: else a server that lists but does not watch would be
                // asked for everything ten times a second.
                if watch.listed_at.take().is_some_and(|at| at.elapsed() > BACKOFF_MAX) {
                    watch.backoff.reset();
                }
                let wait = watch.backoff.next_wait();
                debug!(table = %watch.kind, ?wait, "waiting before the next list");
                if watch.deliver_until(Instant::now() + wait).await.is_err() {
                    return;
                }
            }
        }
    }
}

impl Watch {
    /// One list and the watch after it, until either fails.
    async fn list_and_watch<T: Table>(&mut self) -> Ended {
        let api: Api<Converted<T>> = Api::all(self.task.client.clone());
        let mut events = pin!(watcher::watcher(api, self.configuration()));
        let mut listed: Option<Listed> = Some(Listed::default());
        loop {
            let silence = Instant::now() + LIST_SILENCE_MAX;
            let listing = listed.is_some();
            let sender = self.task.sender.clone();
            tokio::select! {
                // Everything that the server has sent is merged before the receiver is given any.
                biased;
                event = next(&mut events), if !self.outbox.is_full() => {
                    if self.take(event, &mut listed).is_err() {
                        return Ended::Failed;
                    }
                }
                permit = sender.reserve(), if !self.outbox.is_empty() => {
                    let Ok(permit) = permit else { return Ended::NoReceiver };
                    if let Some(event) = self.outbox.pop() {
                        permit.send(event);
                    }
                }
                () = sender.closed() => return Ended::NoReceiver,
                () = tokio::time::sleep_until(silence), if listing => {
                    let reason = format!("no answer to the list within {} s", LIST_SILENCE_MAX.as_secs());
                    self.disconnected(reason, "look at the server's load and log".to_owned());
                    return Ended::Failed;
                }
            }
        }
    }

    fn configuration(&self) -> watcher::Config {
        watcher::Config {
            field_selector: self.task.fields.clone(),
            page_size: Some(PAGE_SIZE),
            list_semantic: ListSemantic::MostRecent,
            // Servers before 1.27 answer 422 to a streaming list.
            initial_list_strategy: InitialListStrategy::ListWatch,
            ..watcher::Config::default()
        }
    }

    /// Takes one event. `listed` holds the objects of a list that is not complete yet.
    fn take<T: Table>(
        &mut self,
        event: Result<Event<Converted<T>>, watcher::Error>,
        listed: &mut Option<Listed>,
    ) -> Result<(), Failed> {
        if matches!(event, Ok(Event::Apply(_) | Event::Delete(_))) {
            self.broke_off = false;
            self.backoff.reset();
        }
        match event {
            Ok(Event::Init) => *listed = Some(Listed::default()),
            Ok(Event::InitApply(object)) => {
                if let Some(listed) = listed {
                    self.add(listed, object);
                }
            }
            Ok(Event::InitDone) => {
                let listed = listed.take().unwrap_or_default();
                self.listed_at = Some(Instant::now());
                self.connected();
                debug!(table = %self.kind, objects = listed.objects.len(), "listed");
                self.outbox.push_replace(Change::Replace(self.kind, listed.objects, listed.rejected));
            }
            Ok(Event::Apply(object)) => self.upsert(object),
            Ok(Event::Delete(object)) => {
                if let Some(reference) = object.reference {
                    self.outbox.push_change(reference.clone(), Change::Delete(reference));
                }
            }
            Err(error) => return self.failed(&error),
        }
        Ok(())
    }

    fn add<T>(&mut self, listed: &mut Listed, converted: Converted<T>) {
        match self.change_of(converted) {
            Some((_, Change::Upsert(object, problems))) => listed.objects.push((object, problems)),
            Some((_, Change::Reject(problem))) => listed.rejected.push(problem),
            _ => {}
        }
    }

    fn upsert<T>(&mut self, converted: Converted<T>) {
        let trigger = converted.trigger;
        if let Some((reference, change)) = self.change_of(converted) {
            if let (Some(at), Change::Upsert(Object::EndpointSlice(slice), _)) = (trigger, &change) {
                self.outbox.push_trigger(slice.family, at);
            }
            self.outbox.push_change(reference, change);
        }
    }

    fn change_of<T>(&mut self, converted: Converted<T>) -> Option<(ObjectRef, Change)> {
        let (reference, mut change) = converted.into_change(self.task.keep_other_proxies)?;
        if let Change::Upsert(object, _) = &mut change {
            self.names.share(object);
        }
        Some((reference, change))
    }

    /// A watch that breaks off is resumed where it was, once. Everything else starts over, because an
    /// event may have been lost.
    fn failed(&mut self, error: &watcher::Error) -> Result<(), Failed> {
        if let watcher::Error::WatchFailed(cause) = error
            && !matches!(cause, kube::Error::SerdeError(_) | kube::Error::Api(_))
            && !std::mem::replace(&mut self.broke_off, true)
        {
            debug!(table = %self.kind, error = %explain::chain(cause), "the watch broke off; resuming it");
            return Ok(());
        }
        if explain::watch_code(error) == Some(410) {
            debug!(table = %self.kind, "the server has forgotten our revision; listing again");
            return Err(Failed);
        }
        let (reason, hint) = explain::failure(self.kind, error);
        self.disconnected(reason, hint);
        Err(Failed)
    }

    fn connected(&mut self) {
        if self.connected != Some(true) {
            info!(table = %self.kind, "connected");
            self.connected = Some(true);
            self.outbox.push_event(SourceEvent::Connected { table: self.kind });
        }
    }

    fn disconnected(&mut self, reason: String, hint: String) {
        if self.connected != Some(false) {
            warn!(table = %self.kind, %reason, %hint, "disconnected");
            self.connected = Some(false);
            self.outbox.push_event(SourceEvent::Disconnected { table: self.kind, reason, hint });
        }
    }

    /// Goes on delivering while it waits.
    async fn deliver_until(&mut self, end: Instant) -> Result<(), Failed> {
        loop {
            let sender = self.task.sender.clone();
            tokio::select! {
                permit = sender.reserve(), if !self.outbox.is_empty() => {
                    let permit = permit.map_err(|_| Failed)?;
                    if let Some(event) = self.outbox.pop() {
                        permit.send(event);
                    }
                }
                () = sender.closed() => return Err(Failed),
                () = tokio::time::sleep_until(end) => return Ok(()),
            }
        }
    }
}

struct Failed;

/// The objects of a list so far.
#[derive(Default)]
struct Listed {
    objects: Vec<(Object, Vec<Problem>)>,
    rejected: Vec<Problem>,
}

/// The stream of a watcher does not end; if it did, nobody would be woken.
async fn next<S: Stream + Unpin>(stream: &mut S) -> S::Item {
    match stream.next().await {
        Some(item) => item,
        None => std::future::pending().await,
    }
}
