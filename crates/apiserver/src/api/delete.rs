//! Delete: at once, after the grace period of a pod, or when the last finalizer is gone.

use portolan_store::{Compare, KeyRange, Transaction};
use serde_json::Value;

use super::{Api, List, ListRequest, Place, encode, now_seconds, stamp};
use crate::fields::{at, format_time, is_terminating, items, number, set, text};
use crate::limits::CONFLICT_RETRIES_MAX;
use crate::resources::Resource;
use crate::status::ApiError;

/// A pod's time to end when neither it nor the request says: Kubernetes' default.
const POD_GRACE_SECONDS: i64 = 30;

/// What becomes of the objects that a deleted one owns: Kubernetes' propagation policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Dependents {
    /// `Background`: they go after it.
    #[default]
    After,
    /// `Foreground`: they go before it.
    First,
    /// `Orphan`: they stay, without an owner.
    Orphaned,
}

impl Dependents {
    /// What holds the object until the controllers have dealt with what it owns.
    fn finalizer(self) -> Option<&'static str> {
        match self {
            Self::After => None,
            Self::First => Some("foregroundDeletion"),
            Self::Orphaned => Some("orphan"),
        }
    }
}

/// How to delete.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeleteOptions {
    /// For pods; 0 removes the object at once.
    pub(crate) grace_seconds: Option<i64>,
    /// What becomes of the objects that it owns.
    pub(crate) dependents: Dependents,
    /// Only if it is this very object.
    pub(crate) uid: String,
    /// Only if it is unchanged.
    pub(crate) resource_version: String,
    pub(crate) is_dry_run: bool,
}

impl DeleteOptions {
    /// Reads a `DeleteOptions` object.
    pub(crate) fn from_object(object: &Value) -> Self {
        Self {
            grace_seconds: number(object, "gracePeriodSeconds"),
            dependents: match text(object, "propagationPolicy") {
                "Orphan" => Dependents::Orphaned,
                "Foreground" => Dependents::First,
                _ if at(object, "orphanDependents").as_bool() == Some(true) => Dependents::Orphaned,
                _ => Dependents::After,
            },
            uid: text(object, "preconditions.uid").to_owned(),
            resource_version: text(object, "preconditions.resourceVersion").to_owned(),
            is_dry_run: !items(object, "dryRun").is_empty(),
        }
    }
}

/// What became of an object that was to be deleted.
#[derive(Debug)]
pub(crate) enum Deleted {
    /// It is gone; this is what it was.
    Gone(Value),
    /// It is marked, and goes when its grace period is over or its finalizers are gone.
    Marked(Value),
}

impl Api {
    pub(crate) async fn delete(&self, place: &Place, options: &DeleteOptions) -> Result<Deleted, ApiError> {
        for _ in 0..CONFLICT_RETRIES_MAX {
            let item = self.item(&place.key()).await?.ok_or_else(|| place.not_found())?;
            let live = place.decode(&item)?;
            check_preconditions(place, &live, options)?;
            if place.resource.is("", "Namespace") && matches!(place.name.as_str(), "default" | "kube-system") {
                return Err(ApiError::forbidden(&place.resource, &place.name, "this namespace may not be deleted"));
            }
            let grace = grace_seconds(&place.resource, &live, options);
            let is_held = !items(&live, "metadata.finalizers").is_empty()
                || !items(&live, "spec.finalizers").is_empty()
                || options.dependents.finalizer().is_some();
            if grace == 0 && !is_held {
                if options.is_dry_run {
                    return Ok(Deleted::Gone(live));
                }
                if let Some(revision) = self.remove_at(&place.key(), item.mod_revision).await? {
                    let mut gone = live;
                    stamp(&mut gone, revision);
                    self.removed(&place.resource, &gone).await?;
                    return Ok(Deleted::Gone(gone));
                }
                continue;
            }
            let mut marked = live.clone();
            mark(&place.resource, &mut marked, grace, options.dependents);
            if marked == live || options.is_dry_run {
                return Ok(Deleted::Marked(marked));
            }
            let put = Transaction::put(place.key(), encode(&marked));
            let result = self.store.transaction(put.when(Compare::unchanged(place.key(), item.mod_revision))).await?;
            if result.succeeded {
                stamp(&mut marked, result.revision);
                return Ok(Deleted::Marked(marked));
            }
        }
        Err(ApiError::changed_meanwhile(&place.resource, &place.name))
    }

    /// Deletes all objects of a list, which is returned.
    pub(crate) async fn delete_collection(
        &self,
        place: &Place,
        request: &ListRequest,
        options: &DeleteOptions,
    ) -> Result<List, ApiError> {
        let list = self.list(place, request).await?;
        for object in &list.items {
            let place = Place { version: place.version.clone(), ..Place::of(&place.resource, object) };
            match self.delete(&place, options).await {
                Ok(_) => {}
                Err(error) if error.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(list)
    }

    /// Follows up a removal of a kind that others depend on.
    pub(super) async fn removed(&self, resource: &Resource, object: &Value) -> Result<(), ApiError> {
        if resource.is("apiextensions.k8s.io", "CustomResourceDefinition") {
            let resources = self.resources();
            let defined = resources.all().find(|defined| {
                defined.is_custom
                    && defined.group == text(object, "spec.group")
                    && defined.plural == text(object, "spec.names.plural")
            });
            if let Some(defined) = defined {
                self.store.transaction(Transaction::delete(KeyRange::prefix(defined.prefix()))).await?;
            }
        }
        self.written(resource).await
    }
}

fn check_preconditions(place: &Place, live: &Value, options: &DeleteOptions) -> Result<(), ApiError> {
    for (what, wanted, field) in [
        ("UID", &options.uid, "metadata.uid"),
        ("ResourceVersion", &options.resource_version, "metadata.resourceVersion"),
    ] {
        let found = text(live, field);
        if !wanted.is_empty() && wanted != found {
            let why = format!("Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}");
            return Err(ApiError::conflict(&place.resource, &place.name, &why));
        }
    }
    Ok(())
}

/// How long the object still has. Only a pod that runs on a node has time to end: its agent removes
/// it when it has.
fn grace_seconds(resource: &Resource, live: &Value, options: &DeleteOptions) -> i64 {
    let is_running =
        !text(live, "spec.nodeName").is_empty() && !matches!(text(live, "status.phase"), "Succeeded" | "Failed");
    if !resource.is("", "Pod") || !is_running {
        return 0;
    }
    let own = number(live, "spec.terminationGracePeriodSeconds").unwrap_or(POD_GRACE_SECONDS);
    let wanted = options.grace_seconds.unwrap_or(own).max(0);
    // A second request may shorten the time, and not lengthen it.
    match number(live, "metadata.deletionGracePeriodSeconds") {
        Some(before) if is_terminating(live) => wanted.min(before),
        _ => wanted,
    }
}

fn mark(resource: &Resource, object: &mut Value, grace: i64, dependents: Dependents) {
    let is_shorter = number(object, "metadata.deletionGracePeriodSeconds").is_some_and(|before| grace < before);
    if !is_terminating(object) || is_shorter {
        set(object, "metadata.deletionTimestamp", format_time(now_seconds() + grace).into());
        set(object, "metadata.deletionGracePeriodSeconds", grace.into());
    }
    if let Some(finalizer) = dependents.finalizer() {
        let mut finalizers = items(object, "metadata.finalizers").to_vec();
        if !finalizers.iter().any(|held| held == finalizer) {
            finalizers.push(finalizer.into());
            set(object, "metadata.finalizers", Value::Array(finalizers));
        }
    }
    if resource.is("", "Namespace") {
        set(object, "status.phase", "Terminating".into());
    }
}
