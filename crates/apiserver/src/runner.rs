//! Runs the controllers: keeps their mirror from a watch, lets changes gather, does what they ask.
//!
//! ```text
//!   store watch ──▶ mirror ──▶ reconcile ──▶ actions ──▶ the same writes as clients' ──▶ store
//! ```
//!
//! An action that fails because the object changed meanwhile is forgotten: the change is on its way
//! to the mirror, and the next pass thinks again. What is written is put into the mirror at once, so
//! that the next pass does not ask for it again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use portolan_store::{EventKind, KeyRange, RangeRequest, StoreError, WatchMessage, WatchRequest, Watcher};
use serde_json::Value;

use crate::api::{Api, DeleteOptions, Deleted, Part, WriteOptions, now_seconds};
use crate::config::StoreLocation;
use crate::controllers::{Action, Controllers, ControllersConfig, Mirror};
use crate::fields::{name, namespace, set, text};
use crate::limits::{CONTROLLER_COALESCE, CONTROLLER_COALESCE_MAX, CONTROLLER_RESYNC, CONTROLLER_ROUNDS_MAX};
use crate::resources::{REGISTRY_PREFIX, Resource, Resources};
use crate::status::ApiError;

/// How long to wait after the store could not be read.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);

pub(crate) struct Runner {
    api: Arc<Api>,
    controllers: Controllers,
    /// Whether other servers define kinds in the store.
    is_shared: bool,
}

/// The mirror with the watch that keeps it.
struct Followed {
    mirror: Mirror,
    watcher: Watcher,
}

impl Runner {
    pub(crate) fn new(api: Arc<Api>) -> Self {
        let config = ControllersConfig {
            cluster_prefixes: api.config.cluster_prefixes.clone(),
            node_prefix_lengths: api.config.node_prefix_lengths,
            ..ControllersConfig::default()
        };
        let is_shared = api.config.store != StoreLocation::Embedded;
        Self { api, controllers: Controllers::new(config), is_shared }
    }

    /// Runs until it is dropped.
    pub(crate) async fn run(self) {
        loop {
            if let Err(error) = self.follow().await {
                tracing::warn!(%error, "the controllers begin anew");
                tokio::time::sleep(FAILURE_PAUSE).await;
            }
        }
    }

    /// Follows the store from a full reading until the watch ends.
    async fn follow(&self) -> Result<(), ApiError> {
        let mut followed = self.read_all().await?;
        loop {
            let started = Instant::now();
            let mut rounds = 0;
            while followed.mirror.is_dirty() && rounds < CONTROLLER_ROUNDS_MAX {
                self.round(&mut followed.mirror).await?;
                rounds += 1;
                while self.take_waiting(&mut followed)? {}
            }
            let busy = started.elapsed();
            let message = tokio::time::timeout(CONTROLLER_RESYNC, followed.watcher.next()).await;
            match message {
                Err(_) => followed.mirror.mark_all_dirty(),
                // The mirror is of the kinds that were known when it was read.
                Ok(Ok(message)) if self.is_shared && defines_a_kind(&message) => {
                    self.api.load_definitions().await?;
                    return Ok(());
                }
                Ok(Ok(message)) => {
                    self.take(&mut followed.mirror, message)?;
                    // The longer a pass takes, the more changes share one: half the time is for others.
                    tokio::time::sleep(busy.clamp(CONTROLLER_COALESCE, CONTROLLER_COALESCE_MAX)).await;
                    while self.take_waiting(&mut followed)? {}
                }
                Ok(Err(cancelled)) => return ended(&cancelled),
            }
        }
    }

    async fn read_all(&self) -> Result<Followed, ApiError> {
        let resources = self.api.resources();
        let mut mirror = Mirror::new(resources.all().map(|resource| resource.table()));
        let range = KeyRange::prefix(REGISTRY_PREFIX);
        let read = self.api.store.range(RangeRequest::new(range.clone())).await?;
        for item in &read.items {
            if let Some(resource) = resource_of(&resources, &item.key) {
                mirror.upsert(decode(resource, item)?);
            }
        }
        mirror.mark_all_dirty();
        let watcher = self.api.store.watch(WatchRequest::new(range, read.revision + 1)).await?;
        Ok(Followed { mirror, watcher })
    }

    /// Takes one message that is there already; `false` when there is none.
    fn take_waiting(&self, followed: &mut Followed) -> Result<bool, ApiError> {
        use futures::FutureExt;
        match followed.watcher.next().now_or_never() {
            None => Ok(false),
            Some(Ok(message)) if self.is_shared && defines_a_kind(&message) => Err(ApiError::expired("kinds changed")),
            Some(Ok(message)) => self.take(&mut followed.mirror, message).map(|()| true),
            Some(Err(cancelled)) => ended(&cancelled).map(|()| false),
        }
    }

    fn take(&self, mirror: &mut Mirror, message: WatchMessage) -> Result<(), ApiError> {
        let WatchMessage::Events { events, .. } = message else { return Ok(()) };
        let resources = self.api.resources();
        for event in events {
            let Some(resource) = resource_of(&resources, &event.current.key) else { continue };
            match (event.kind, &event.previous) {
                (EventKind::Put, _) => {
                    let object = decode(resource, &event.current)?;
                    let known = mirror.get(&resource.table(), namespace(&object), name(&object));
                    // An own write comes back, perhaps after newer ones of ours.
                    if known.is_none_or(|known| revision(known) < revision(&object)) {
                        mirror.upsert(object);
                    }
                }
                (EventKind::Delete, Some(previous)) => {
                    let object = decode(resource, previous)?;
                    let known = mirror.get(&resource.table(), namespace(&object), name(&object));
                    if known.is_some_and(|known| revision(known) < event.current.mod_revision) {
                        mirror.remove(&resource.table(), namespace(&object), name(&object));
                    }
                }
                (EventKind::Delete, None) => return Err(ApiError::internal("a removal without what was removed")),
            }
        }
        Ok(())
    }

    /// One pass and its writes.
    async fn round(&self, mirror: &mut Mirror) -> Result<(), ApiError> {
        let actions = self.controllers.reconcile(mirror, now_seconds());
        mirror.take_dirty();
        for action in actions {
            let described = describe(&action);
            match self.execute(mirror, action).await {
                Ok(()) => {}
                // Thought on an old view: what changed is on its way.
                Err(error) if matches!(error.code, 404 | 409) => {
                    tracing::debug!(action = described, %error, "an action came too late");
                }
                Err(error) if error.code == 503 => return Err(error),
                Err(error) => {
                    tracing::warn!(action = described, %error, "an action was refused; it is tried again later");
                }
            }
        }
        Ok(())
    }

    async fn execute(&self, mirror: &mut Mirror, action: Action) -> Result<(), ApiError> {
        let options = WriteOptions::internal();
        match action {
            Action::Create(object) => mirror.upsert(self.api.create_object(object).await?),
            Action::Update(object) => self.replace(mirror, &object, Part::Wanted, &options).await?,
            Action::UpdateStatus(object) => self.replace(mirror, &object, Part::Status, &options).await?,
            Action::Delete { kind, namespace, name, uid } => {
                let known = mirror.get(&kind, &namespace, &name).cloned().ok_or_else(ApiError::no_such_path)?;
                let place = self.api.place_of(&known)?;
                match self.api.delete(&place, &DeleteOptions { uid, ..DeleteOptions::default() }).await? {
                    Deleted::Gone(_) => {
                        mirror.remove(&kind, &namespace, &name);
                    }
                    Deleted::Marked(object) => mirror.upsert(object),
                }
            }
        }
        Ok(())
    }

    async fn replace(
        &self,
        mirror: &mut Mirror,
        object: &Value,
        part: Part,
        options: &WriteOptions,
    ) -> Result<(), ApiError> {
        let place = self.api.place_of(object)?;
        let written = self.api.replace(&place, part, object, options).await?;
        let table = place.resource.table();
        if crate::api::is_over(&written) {
            mirror.remove(&table, &place.namespace, &place.name);
        } else if mirror.get(&table, &place.namespace, &place.name) != Some(&written) {
            mirror.upsert(written);
        }
        Ok(())
    }
}

fn ended(cancelled: &portolan_store::WatchCancelled) -> Result<(), ApiError> {
    match cancelled {
        portolan_store::WatchCancelled::Closed { .. } => Err(StoreError::Closed.into()),
        // What was missed is read anew.
        _ => Ok(()),
    }
}

/// Whether a message is about a definition of a kind.
fn defines_a_kind(message: &WatchMessage) -> bool {
    const DEFINITIONS: &[u8] = b"/registry/apiextensions.k8s.io/customresourcedefinitions/";
    matches!(message, WatchMessage::Events { events, .. } if events.iter().any(|event| event.current.key.starts_with(DEFINITIONS)))
}

/// The kind of the object at a key: `/registry/GROUP/PLURAL/…`.
fn resource_of<'table>(resources: &'table Resources, key: &[u8]) -> Option<&'table Arc<Resource>> {
    let key = std::str::from_utf8(key).ok()?.strip_prefix(REGISTRY_PREFIX)?;
    let mut parts = key.split('/');
    let group = parts.next().map(|group| if group == "core" { "" } else { group })?;
    resources.of_plural(group, parts.next()?)
}

/// An object as the controllers want it: with its kind, by which the mirror is sorted.
fn decode(resource: &Resource, item: &portolan_store::KeyValue) -> Result<Value, ApiError> {
    let mut object = crate::api::decode(resource, resource.versions.first().map_or("v1", String::as_str), item)?;
    set(&mut object, "kind", resource.kind.as_str().into());
    Ok(object)
}

fn revision(object: &Value) -> u64 {
    text(object, "metadata.resourceVersion").parse().unwrap_or(0)
}

/// What an action is, for logs.
fn describe(action: &Action) -> String {
    let about =
        |verb: &str, object: &Value| format!("{verb} {} {}/{}", text(object, "kind"), namespace(object), name(object));
    match action {
        Action::Create(object) => about("create", object),
        Action::Update(object) => about("update", object),
        Action::UpdateStatus(object) => about("update status of", object),
        Action::Delete { kind, namespace, name, .. } => format!("delete {kind} {namespace}/{name}"),
    }
}
