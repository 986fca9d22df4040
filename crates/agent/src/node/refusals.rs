//! What the kernel refused, room by room: rows for the user, and the reason to try again.
//!
//! A refusal stands until its room was read and written anew, or what it is about went away. It is
//! logged once, when it is news, however often it is tried again.

use std::collections::{BTreeMap, BTreeSet};

use portolan_kernel::KernelError;
use portolan_net::NodeName;
use portolan_program::netlink;
use portolan_state::{AttachmentKey, ObjectRef, Problem};

use crate::limits::REFUSALS_MAX;

/// The refusals that stand.
#[derive(Debug)]
pub(super) struct Refusals {
    node: NodeName,
    netlink: Room,
    /// The rooms that serve Services, by name.
    services: BTreeMap<&'static str, Room>,
    has_news: bool,
}

/// The refusals of one room.
#[derive(Debug, Default)]
struct Room {
    now: BTreeSet<Problem>,
    /// Those of the reading before, which are no news if they come again.
    before: BTreeSet<Problem>,
}

impl Refusals {
    pub(super) fn new(node: NodeName) -> Refusals {
        Refusals { node, netlink: Room::default(), services: BTreeMap::new(), has_news: false }
    }

    /// The netlink room is about to be written anew: what is refused then is said again.
    pub(super) fn forget_netlink(&mut self) {
        self.netlink.before = std::mem::take(&mut self.netlink.now);
    }

    /// A room that serves Services is about to be written anew.
    pub(super) fn forget_services(&mut self, room: &'static str) {
        let room = self.services.entry(room).or_default();
        room.before = std::mem::take(&mut room.now);
    }

    /// These attachments changed or went: nothing is known of them until they are tried.
    pub(super) fn forget_attachments(&mut self, keys: &BTreeSet<AttachmentKey>) {
        let is_other = |problem: &Problem| !matches!(&problem.object, ObjectRef::Attachment(key) if keys.contains(key));
        self.netlink.now.retain(is_other);
    }

    /// A step was refused. Returns whether it is worth another try of its own.
    pub(super) fn netlink(&mut self, change: &netlink::Change, error: &KernelError) -> bool {
        let is_lost = is_namespace_gone(change, error);
        let (object, field, hint) = match pod_of(change) {
            Some(pod) if is_lost => (
                ObjectRef::Attachment(pod.key.clone()),
                "CNI_NETNS",
                "the container is gone without DEL: let the runtime call DEL or GC for it, or restart the runtime",
            ),
            Some(pod) => (
                ObjectRef::Attachment(pod.key.clone()),
                "interface",
                "it is tried again; delete the pod if it does not mend",
            ),
            None => (ObjectRef::Node(self.node.clone()), "kernel", "it is tried again; do what the reason says"),
        };
        let reason = format!("`{change}`: {error}");
        self.has_news |= self.netlink.note(object, field, reason, hint);
        !is_lost
    }

    /// A change of a room that serves Services was refused; `change` is its text.
    pub(super) fn services(&mut self, room: &'static str, change: &str, error: &KernelError) {
        let object = ObjectRef::Node(self.node.clone());
        let reason = format!("`{}`: {error}", change.trim_end());
        let hint = "it is tried again; do what the reason says";
        self.has_news |= self.services.entry(room).or_default().note(object, "kernel", reason, hint);
    }

    /// All that stand.
    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.netlink.now.iter().chain(self.services.values().flat_map(|room| &room.now))
    }

    /// How many stand.
    pub(super) fn count(&self) -> usize {
        self.netlink.now.len() + self.services.values().map(|room| room.now.len()).sum::<usize>()
    }

    /// Whether something was refused since the last call that was not refused before.
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.has_news)
    }
}

impl Room {
    /// Keeps a refusal. Returns whether it is news.
    fn note(&mut self, object: ObjectRef, field: &str, reason: String, hint: &str) -> bool {
        let problem = Problem { object, field: field.into(), reason: reason.into(), hint: hint.into() };
        let is_news = !self.before.contains(&problem) && !self.now.contains(&problem);
        if is_news {
            tracing::warn!(%problem, "the kernel refused a change");
        }
        if self.now.len() < REFUSALS_MAX {
            self.now.insert(problem);
        }
        is_news
    }
}

/// The pod interface that a step is about.
pub(super) fn pod_of(change: &netlink::Change) -> Option<&netlink::PodLink> {
    match change {
        netlink::Change::CreatePod(pod) | netlink::Change::AdjustPod(pod) | netlink::Change::RemovePod(pod) => {
            Some(pod)
        }
        _ => None,
    }
}

/// Whether a pod's interface cannot be made since its namespace is gone. A namespace does not come
/// back, so that another try is only worth its while when the kernel is read anyway.
fn is_namespace_gone(change: &netlink::Change, error: &KernelError) -> bool {
    matches!((change, error), (netlink::Change::CreatePod(_), KernelError::NoNamespace { .. }))
}
