//! Holding the own lease: acquire, renew before its end, look when somebody touches its key.

use std::time::Duration;

use portolan_store::{KeyRange, WatchMessage, WatchRequest, Watcher};
use tokio::sync::{mpsc, watch};

use super::manager::within;
use super::{Held, Manager, Message, OwnProblem, Renewal};
use crate::flannel::{Attributes, Subnet};
use crate::limits::LEASE_CHECK_MAX;

/// What is being told of the own lease.
struct Reporter<'reporter> {
    messages: &'reporter mpsc::Sender<Message>,
    told: Option<Vec<OwnProblem>>,
    /// Stays until the agent restarts.
    moved: Option<OwnProblem>,
}

impl Reporter<'_> {
    async fn tell(&mut self, problems: Vec<OwnProblem>) {
        let problems: Vec<OwnProblem> = self.moved.iter().cloned().chain(problems).collect();
        if self.told.as_ref() != Some(&problems) {
            self.told = Some(problems.clone());
            // A reader that is gone ends the task elsewhere.
            let _ = self.messages.send(Message::Own(problems)).await;
        }
    }
}

/// Runs until it is dropped, or until another run of the same node has taken over.
pub(super) async fn hold(
    mut manager: Manager,
    messages: &mpsc::Sender<Message>,
    mut attributes: watch::Receiver<Attributes>,
    own: watch::Sender<Option<Subnet>>,
) {
    let mut reporter = Reporter { messages, told: None, moved: None };
    let mut before: Option<Subnet> = None;
    loop {
        let mut held = acquire(&mut manager, &mut reporter, &attributes).await;
        let subnet = held.subnet();
        if let Some(from) = before.filter(|before| *before != subnet) {
            reporter.moved = Some(OwnProblem::Moved { from, to: subnet });
        }
        before = Some(subnet);
        own.send_replace(Some(subnet));
        let _ = messages.send(Message::Held(Box::new(held.clone()))).await;
        reporter.tell(held.take.shared.clone().map(OwnProblem::Shared).into_iter().collect()).await;
        if !keep(&mut manager, &mut reporter, &mut held, &mut attributes).await {
            // The reader keeps the subnet that it knows, and the problem that says so.
            std::future::pending::<()>().await;
        }
    }
}

async fn acquire(manager: &mut Manager, reporter: &mut Reporter<'_>, attributes: &watch::Receiver<Attributes>) -> Held {
    let mut backoff = manager.backoff();
    loop {
        manager.set_attributes(attributes.borrow().clone());
        match manager.acquire().await {
            Ok(held) => return held,
            Err(error) => {
                reporter.tell(vec![OwnProblem::Unavailable(error.to_string())]).await;
                tokio::time::sleep(backoff.next_wait()).await;
            }
        }
    }
}

/// Keeps a lease; `true` when it was lost and must be acquired anew, `false` when it is another's now.
async fn keep(
    manager: &mut Manager,
    reporter: &mut Reporter<'_>,
    held: &mut Held,
    attributes: &mut watch::Receiver<Attributes>,
) -> bool {
    let mut backoff = manager.backoff();
    let mut watcher = None;
    let mut is_due = false;
    let mut is_open = true;
    let mut pause = Duration::ZERO;
    loop {
        if watcher.is_none() {
            watcher = watch_own(manager, held).await;
            // Between the taking and the watch anything may have happened.
            is_due |= watcher.is_some();
        }
        let until_renewal = manager.until_renewal(held);
        let wait = if is_due { pause } else { until_renewal.min(LEASE_CHECK_MAX) };
        let has_attributes = tokio::select! {
            () = tokio::time::sleep(wait) => false,
            changed = attributes.changed(), if is_open && pause.is_zero() => {
                // Without a sender the attributes stay as they are.
                is_open = changed.is_ok();
                is_open
            }
            touched = touched(&mut watcher), if !is_due => {
                if !touched {
                    watcher = None;
                }
                is_due = true;
                continue;
            }
        };
        if !is_due && !has_attributes && !manager.until_renewal(held).is_zero() {
            continue;
        }
        let outcome = if has_attributes || *attributes.borrow() != *manager.attributes() {
            let attributes = attributes.borrow_and_update().clone();
            manager.publish(held, attributes).await.map(|()| Renewal::Renewed)
        } else if manager.until_renewal(held).is_zero() {
            manager.renew(held).await
        } else {
            manager.verify(held).await
        };
        match outcome {
            Ok(Renewal::Lost) => return true,
            Ok(Renewal::Superseded(by)) => {
                let (node, subnet) = (by.node, held.subnet());
                reporter.tell(vec![OwnProblem::Superseded { node, subnet }]).await;
                return false;
            }
            Ok(renewal) => {
                (is_due, pause) = (false, Duration::ZERO);
                backoff.reset();
                reporter.tell(problems(manager, held, &renewal).await).await;
            }
            Err(error) => {
                (is_due, pause) = (true, backoff.next_wait());
                reporter.tell(vec![OwnProblem::Unavailable(error.to_string())]).await;
            }
        }
    }
}

async fn problems(manager: &Manager, held: &Held, renewal: &Renewal) -> Vec<OwnProblem> {
    let subnet = held.subnet();
    let mut problems: Vec<OwnProblem> = held.take.shared.clone().map(OwnProblem::Shared).into_iter().collect();
    if let Renewal::Contested(attributes) = renewal {
        let found = attributes.as_ref().map_or_else(|| "nothing readable".to_owned(), |it| it.render());
        problems.push(OwnProblem::Contested { subnet, found });
    }
    // A config that cannot be read is said when somebody needs it.
    if manager.fits(held).await.is_ok_and(|fits| !fits) {
        problems.push(OwnProblem::Misfit { subnet });
    }
    problems
}

/// Watches the own key, without which only a renewal would show that somebody touched it.
async fn watch_own(manager: &Manager, held: &Held) -> Option<Watcher> {
    let range = KeyRange::key(manager.layout().subnet(&held.subnet()));
    let request = WatchRequest { previous: false, ..WatchRequest::new(range, 0) };
    within(manager.store().watch(request)).await.ok()
}

/// `true` when the own key was touched, `false` when the watch has ended.
async fn touched(watcher: &mut Option<Watcher>) -> bool {
    let Some(open) = watcher else { return std::future::pending().await };
    loop {
        match open.next().await {
            Ok(WatchMessage::Events { .. }) => return true,
            Ok(WatchMessage::Progress { .. }) => {}
            Err(_) => return false,
        }
    }
}
