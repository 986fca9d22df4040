//! Create and update.

use std::fmt::Write as _;

use portolan_store::{Compare, KeyRange, Operation, Relation, Target, Transaction};
use serde_json::{Value, json};

use super::allocation::{Admitted, Allocation};
use super::{Api, Place, encode, now_seconds, random, stamp};
use crate::admission::{self, ClusterView, Holders, Objects};
use crate::config::StoreLocation;
use crate::fields::{at, format_time, is_terminating, items, number, remove, set, suffix, text};
use crate::limits::{CONFLICT_RETRIES_MAX, NAME_RETRIES_MAX};
use crate::patch::record_update;
use crate::resources::{Resource, api_version};
use crate::status::ApiError;

/// How to write.
#[derive(Debug, Clone, Default)]
pub(crate) struct WriteOptions {
    /// Do everything but store it.
    pub(crate) is_dry_run: bool,
    /// Who owns the fields that are written.
    pub(crate) manager: String,
}

impl WriteOptions {
    /// For the server's own writes.
    pub(crate) fn internal() -> Self {
        Self { is_dry_run: false, manager: "portolan-apiserver".to_owned() }
    }
}

/// Which part of an object a write means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// All but the status, where the kind keeps it apart.
    Wanted,
    /// The status alone.
    Status,
}

impl Api {
    /// Creates an object. The place gives kind and namespace, and the name where it is known.
    pub(crate) async fn create(&self, place: &Place, body: Value, options: &WriteOptions) -> Result<Value, ApiError> {
        let mut object = body;
        settle_kind(place, &mut object)?;
        settle_place(place, &mut object)?;
        for field in ["resourceVersion", "selfLink", "deletionTimestamp", "deletionGracePeriodSeconds", "generation"] {
            remove(&mut object, &format!("metadata.{field}"));
        }
        set(&mut object, "metadata.uid", new_uid()?.into());
        set(&mut object, "metadata.creationTimestamp", format_time(now_seconds()).into());
        if place.resource.has_generation {
            set(&mut object, "metadata.generation", 1.into());
        }
        if place.resource.has_status && !keeps_status_at_creation(&place.resource) {
            remove(&mut object, "status");
        }
        let base = text(&object, "metadata.generateName").to_owned();
        let is_generated = text(&object, "metadata.name").is_empty() && !base.is_empty();
        for _ in 0..NAME_RETRIES_MAX {
            if is_generated {
                let seed = new_uid()?;
                set(&mut object, "metadata.name", format!("{base}{}", suffix(&seed, 5)).into());
            }
            match self.create_named(place, object.clone(), options).await {
                Err(error) if is_generated && error.reason == "AlreadyExists" => {}
                other => return other,
            }
        }
        Err(ApiError::already_exists(&place.resource, &base))
    }

    async fn create_named(&self, place: &Place, object: Value, options: &WriteOptions) -> Result<Value, ApiError> {
        let place = &Place { name: text(&object, "metadata.name").to_owned(), ..place.clone() };
        for _ in 0..CONFLICT_RETRIES_MAX {
            let namespace = self.check_namespace(place).await?;
            // A name that is tried again is admitted again: what it was given may be another's by now.
            let mut object = object.clone();
            let admitted = self.admit(place, None, &mut object).await?;
            settle_definition(&place.resource, &mut object);
            if options.is_dry_run {
                if self.item(&place.key()).await?.is_some() {
                    return Err(ApiError::already_exists(&place.resource, &place.name));
                }
                return Ok(object);
            }
            let mut transaction = Transaction::put(place.key(), encode(&object)).when(Compare::absent(place.key()));
            if let Some((key, revision)) = namespace {
                transaction = transaction.when(Compare::unchanged(key, revision));
            }
            let result = self.store.transaction(admitted.guarded(transaction)).await?;
            drop(admitted);
            if result.succeeded {
                stamp(&mut object, result.revision);
                self.written(&place.resource).await?;
                return Ok(object);
            }
            if self.item(&place.key()).await?.is_some() {
                return Err(ApiError::already_exists(&place.resource, &place.name));
            }
            // The namespace changed meanwhile, or another server gave out addresses: look again.
        }
        Err(ApiError::conflict(&place.resource, &place.name, "its namespace keeps changing; try again"))
    }

    /// The namespace's key and revision; an error when nothing may be created in it.
    async fn check_namespace(&self, place: &Place) -> Result<Option<(String, u64)>, ApiError> {
        if !place.resource.is_namespaced {
            return Ok(None);
        }
        let resources = self.resources();
        let namespaces = resources.find("", "v1", "namespaces").ok_or_else(ApiError::no_such_path)?;
        let key = namespaces.key("", &place.namespace);
        let item = self.item(&key).await?.ok_or_else(|| ApiError::namespace_not_found(&place.namespace))?;
        if is_terminating(&super::decode(namespaces, "v1", &item)?) {
            return Err(ApiError::namespace_terminating(&place.resource, &place.name, &place.namespace));
        }
        Ok(Some((key, item.mod_revision)))
    }

    /// Changes an object that exists. `change` gets the present one and may run more than once.
    pub(crate) async fn update(
        &self,
        place: &Place,
        part: Part,
        options: &WriteOptions,
        change: impl Fn(&Value) -> Result<Value, ApiError> + Send + Sync,
    ) -> Result<Value, ApiError> {
        for _ in 0..CONFLICT_RETRIES_MAX {
            let item = self.item(&place.key()).await?.ok_or_else(|| place.not_found())?;
            let live = place.decode(&item)?;
            let mut object = settle_update(place, part, &live, change(&live)?)?;
            let admitted = self.admit(place, Some(&live), &mut object).await?;
            settle_definition(&place.resource, &mut object);
            count_generation(&place.resource, &live, &mut object);
            if object == live {
                return Ok(live);
            }
            let has_owners = !items(&live, "metadata.managedFields").is_empty();
            if has_owners && at(&object, "metadata.managedFields") == at(&live, "metadata.managedFields") {
                let now = format_time(now_seconds());
                record_update(&place.resource.kind, Some(&live), &mut object, &options.manager, &now);
            }
            if options.is_dry_run {
                return Ok(object);
            }
            let unchanged = Compare::unchanged(place.key(), item.mod_revision);
            let transaction = if is_over(&object) {
                Transaction::delete(KeyRange::key(place.key())).when(unchanged)
            } else {
                Transaction::put(place.key(), encode(&object)).when(unchanged)
            };
            let result = self.store.transaction(admitted.guarded(transaction)).await?;
            drop(admitted);
            if result.succeeded {
                stamp(&mut object, result.revision);
                if is_over(&object) {
                    self.removed(&place.resource, &object).await?;
                } else {
                    self.written(&place.resource).await?;
                }
                return Ok(object);
            }
        }
        Err(ApiError::changed_meanwhile(&place.resource, &place.name))
    }

    /// Replaces an object by what the client sent.
    pub(crate) async fn replace(
        &self,
        place: &Place,
        part: Part,
        body: &Value,
        options: &WriteOptions,
    ) -> Result<Value, ApiError> {
        let mut body = body.clone();
        settle_kind(place, &mut body)?;
        if text(&body, "metadata.name").is_empty() {
            return Err(ApiError::bad_request(
                "the name of the object is missing: metadata.name must be that of the path",
            ));
        }
        settle_place(place, &mut body)?;
        self.update(place, part, options, |_| Ok(body.clone())).await
    }

    /// Defaults, checks and allocates. What comes back is held until the object is written, where
    /// two writers could be given the same address.
    async fn admit(&self, place: &Place, old: Option<&Value>, object: &mut Value) -> Result<Admitted<'_>, ApiError> {
        if !Allocation::concerns(&place.resource) {
            self.admit_with(place, old, object, (&Holders::default(), &Objects::new()))?;
            return Ok(Admitted::default());
        }
        let given = object.clone();
        let mut allocation = self.allocation.lock().await;
        allocation.refresh(&self.store, &self.resources()).await?;
        let view = (allocation.holders(), allocation.nodes());
        let is_shared = self.config.store != StoreLocation::Embedded;
        if let Err(error) = self.admit_with(place, old, object, view) {
            if !is_shared {
                return Err(error);
            }
            object.clone_from(&given);
            allocation.reread(&self.store, &self.resources()).await?;
            self.admit_with(place, old, object, (allocation.holders(), allocation.nodes()))?;
        }
        let mut guard = None;
        // Also with a store of one's own: a client that goes away takes the lock with it, while its write may be under way.
        if admission::takes_more(old, object) {
            let (at, is_changed) = allocation.guard(&self.store, &place.resource).await?;
            guard = Some(at);
            if is_changed {
                object.clone_from(&given);
                self.admit_with(place, old, object, (allocation.holders(), allocation.nodes()))?;
            }
        }
        Ok(Admitted { _lock: Some(allocation), guard })
    }

    fn admit_with(
        &self,
        place: &Place,
        old: Option<&Value>,
        object: &mut Value,
        (holders, nodes): (&Holders, &Objects),
    ) -> Result<(), ApiError> {
        let view = ClusterView {
            holders,
            nodes,
            service_prefixes: &self.config.service_prefixes,
            node_port_range: self.config.node_port_range.clone(),
            cluster_prefixes: &self.config.cluster_prefixes,
            node_prefix_lengths: self.config.node_prefix_lengths,
        };
        // A custom kind may have the name of a built-in one, and none of its rules.
        let kind = if place.resource.is_custom { "" } else { place.resource.kind.as_str() };
        admission::admit(kind, old, object, &view)
            .map_err(|causes| ApiError::invalid(&place.resource, &place.name, &causes))
    }

    /// Follows up a write of a kind that others depend on.
    pub(super) async fn written(&self, resource: &Resource) -> Result<(), ApiError> {
        if resource.is("apiextensions.k8s.io", "CustomResourceDefinition") {
            self.load_definitions().await?;
        }
        Ok(())
    }

    /// Removes an object at the revision that was read. `false` when it changed since.
    pub(super) async fn remove_at(&self, key: &str, revision: u64) -> Result<Option<u64>, ApiError> {
        let compare = Compare { key: key.into(), relation: Relation::Equal, target: Target::ModRevision(revision) };
        let transaction =
            Transaction { success: vec![Operation::Delete(KeyRange::key(key))], ..Transaction::default() };
        let result = self.store.transaction(transaction.when(compare)).await?;
        Ok(result.succeeded.then_some(result.revision))
    }
}

/// Whether the object's deletion was asked for and nothing holds it any more.
pub(crate) fn is_over(object: &Value) -> bool {
    is_terminating(object)
        && items(object, "metadata.finalizers").is_empty()
        && items(object, "spec.finalizers").is_empty()
        && number(object, "metadata.deletionGracePeriodSeconds").unwrap_or(0) == 0
}

/// A status that comes with the object describes what made it: a node registers itself.
fn keeps_status_at_creation(resource: &Resource) -> bool {
    resource.is("", "Node") || resource.is("", "Namespace")
}

/// The body's kind and version are those of the path; where it names none it gets them.
pub(super) fn settle_kind(place: &Place, object: &mut Value) -> Result<(), ApiError> {
    if !object.is_object() {
        return Err(ApiError::bad_request("the body is not an object"));
    }
    let expected = api_version(&place.resource.group, &place.version);
    for (field, expected) in [("apiVersion", expected.as_str()), ("kind", place.resource.kind.as_str())] {
        let given = text(object, field);
        if !given.is_empty() && given != expected {
            return Err(ApiError::bad_request(format!(
                "{field} in the data ({given}) does not match the expected one of the path ({expected})"
            )));
        }
        set(object, field, expected.into());
    }
    Ok(())
}

/// The body's name and namespace are those of the path.
pub(super) fn settle_place(place: &Place, object: &mut Value) -> Result<(), ApiError> {
    if !at(object, "metadata").is_object() {
        set(object, "metadata", json!({}));
    }
    for (field, expected) in [("metadata.name", &place.name), ("metadata.namespace", &place.namespace)] {
        let given = text(object, field);
        if !expected.is_empty() && !given.is_empty() && given != expected {
            return Err(ApiError::bad_request(format!(
                "{field} of the object ({given}) does not match the one of the path ({expected})"
            )));
        }
        if !expected.is_empty() {
            set(object, field, expected.as_str().into());
        }
    }
    if !place.resource.is_namespaced {
        remove(object, "metadata.namespace");
    }
    Ok(())
}

/// What an update may change of the live object, and what stays.
fn settle_update(place: &Place, part: Part, live: &Value, changed: Value) -> Result<Value, ApiError> {
    let mut object = changed;
    let revision = text(&object, "metadata.resourceVersion");
    if !revision.is_empty() && revision != text(live, "metadata.resourceVersion") {
        return Err(ApiError::changed_meanwhile(&place.resource, &place.name));
    }
    let uid = text(&object, "metadata.uid");
    if !uid.is_empty() && uid != text(live, "metadata.uid") {
        let why = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            text(live, "metadata.uid")
        );
        return Err(ApiError::conflict(&place.resource, &place.name, &why));
    }
    if part == Part::Status {
        let mut kept = live.clone();
        put_or_remove(&mut kept, "status", at(&object, "status"));
        // An apply says who owns the status now.
        let owners = at(&object, "metadata.managedFields");
        if !owners.is_null() {
            set(&mut kept, "metadata.managedFields", owners.clone());
        }
        return Ok(kept);
    }
    settle_kind(place, &mut object)?;
    settle_place(place, &mut object)?;
    remove(&mut object, "metadata.selfLink");
    for field in [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "resourceVersion",
        "name",
        "namespace",
    ] {
        let field = format!("metadata.{field}");
        put_or_remove(&mut object, &field, at(live, &field));
    }
    if place.resource.has_status {
        put_or_remove(&mut object, "status", at(live, "status"));
    }
    Ok(object)
}

fn put_or_remove(object: &mut Value, path: &str, value: &Value) {
    if value.is_null() {
        remove(object, path);
    } else if at(object, path) != value {
        set(object, path, value.clone());
    }
}

/// Raises `metadata.generation` when what is wanted changed.
fn count_generation(resource: &Resource, live: &Value, object: &mut Value) {
    let wanted = |object: &Value| {
        let fields = object.as_object().into_iter().flatten();
        let fields = fields.filter(|(name, _)| !matches!(name.as_str(), "metadata" | "status"));
        fields.map(|(name, value)| (name.clone(), value.clone())).collect::<serde_json::Map<_, _>>()
    };
    if resource.has_generation && wanted(live) != wanted(object) {
        let generation = number(live, "metadata.generation").unwrap_or(0) + 1;
        set(object, "metadata.generation", generation.into());
    }
}

/// A definition is accepted as soon as it is stored: what it defines is served from then on.
fn settle_definition(resource: &Resource, object: &mut Value) {
    if !resource.is("apiextensions.k8s.io", "CustomResourceDefinition") || is_terminating(object) {
        return;
    }
    let names = at(object, "spec.names").clone();
    let stored: Vec<Value> = items(object, "spec.versions")
        .iter()
        .filter(|version| crate::fields::flag(version, "storage"))
        .map(|version| at(version, "name").clone())
        .collect();
    let since = text(object, "metadata.creationTimestamp").to_owned();
    let condition = |kind: &str, reason: &str, message: &str| json!({"type": kind, "status": "True", "lastTransitionTime": since, "reason": reason, "message": message});
    let conditions = json!([
        condition("NamesAccepted", "NoConflicts", "no conflicts found"),
        condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
    ]);
    set(object, "status", json!({"acceptedNames": names, "storedVersions": stored, "conditions": conditions}));
}

/// A random UUID (RFC 9562 section 5.4).
fn new_uid() -> Result<String, ApiError> {
    let mut bytes = random()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut uid = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            uid.push('-');
        }
        // Writing to a String cannot fail.
        let _ = write!(uid, "{byte:02x}");
    }
    Ok(uid)
}
