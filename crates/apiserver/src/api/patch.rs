//! The four kinds of patch, and the scale of what has replicas.

use serde_json::{Value, json};

use super::write::{Part, WriteOptions, settle_kind, settle_place};
use super::{Api, Place, now_seconds};
use crate::fields::{at, format_time, items, number, set, text};
use crate::patch::{PatchError, json_merge, json_patch, server_side_apply, strategic_merge};
use crate::status::ApiError;

/// How a patch is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PatchKind {
    /// RFC 7396.
    Merge,
    /// Merge with Kubernetes' rules for lists.
    Strategic,
    /// RFC 6902.
    Json,
    /// Server-side apply; forced, it takes fields over from other managers.
    Apply { is_forced: bool },
}

/// What is asked of a scale.
#[derive(Debug)]
pub(crate) enum ScaleRequest<'body> {
    Get,
    Replace(&'body Value),
    Patch(PatchKind, &'body Value),
}

impl Api {
    pub(crate) async fn patch(
        &self,
        place: &Place,
        part: Part,
        kind: PatchKind,
        body: &Value,
        options: &WriteOptions,
    ) -> Result<Value, ApiError> {
        if let PatchKind::Apply { is_forced } = kind {
            return self.apply(place, part, body, options, is_forced).await;
        }
        let change = |live: &Value| {
            let mut object = live.clone();
            let kind_name = if place.resource.is_custom { "" } else { place.resource.kind.as_str() };
            apply_patch(kind, kind_name, &mut object, body)
                .map_err(|error| ApiError::unprocessable(&place.resource, &place.name, &error))?;
            Ok(object)
        };
        self.update(place, part, options, change).await
    }

    async fn apply(
        &self,
        place: &Place,
        part: Part,
        body: &Value,
        options: &WriteOptions,
        is_forced: bool,
    ) -> Result<Value, ApiError> {
        if options.manager.is_empty() {
            return Err(ApiError::bad_request("fieldManager is required for apply patch"));
        }
        if !items(body, "metadata.managedFields").is_empty() {
            return Err(ApiError::bad_request("metadata.managedFields must be nil in what is applied"));
        }
        let mut applied = body.clone();
        settle_kind(place, &mut applied)?;
        settle_place(place, &mut applied)?;
        let now = format_time(now_seconds());
        let merge = |live: Option<&Value>| {
            server_side_apply(&place.resource.kind, live, &applied, &options.manager, is_forced, &now)
                .map_err(|conflict| ApiError::apply_conflict(&place.resource, &place.name, &conflict))
        };
        match self.update(place, part, options, |live| merge(Some(live))).await {
            Err(error) if error.code == 404 && part == Part::Wanted => {
                let unnamed = Place { name: String::new(), ..place.clone() };
                match self.create(&unnamed, merge(None)?, options).await {
                    // Another created it between the two: now it is there to be changed.
                    Err(error) if error.reason == "AlreadyExists" => {
                        self.update(place, part, options, |live| merge(Some(live))).await
                    }
                    other => other,
                }
            }
            other => other,
        }
    }

    /// The `scale` part: how many replicas are wanted and there.
    pub(crate) async fn scale(
        &self,
        place: &Place,
        request: ScaleRequest<'_>,
        options: &WriteOptions,
    ) -> Result<Value, ApiError> {
        let live = self.get(place).await?;
        let wanted = match request {
            ScaleRequest::Get => return Ok(scale_of(&live)),
            ScaleRequest::Replace(body) => body.clone(),
            ScaleRequest::Patch(kind, body) => {
                let mut scale = scale_of(&live);
                apply_patch(kind, "Scale", &mut scale, body)
                    .map_err(|error| ApiError::unprocessable(&place.resource, &place.name, &error))?;
                // A patch means the present object, whatever its revision, unless it names one.
                if text(body, "metadata.resourceVersion").is_empty() {
                    set(&mut scale, "metadata.resourceVersion", Value::Null);
                }
                scale
            }
        };
        let replicas = match number(&wanted, "spec.replicas") {
            Some(replicas) => replicas,
            None if at(&wanted, "spec.replicas").is_null() => 0,
            None => return Err(ApiError::bad_request("spec.replicas is not a whole number")),
        };
        let revision = at(&wanted, "metadata.resourceVersion").clone();
        let change = |live: &Value| {
            let mut object = live.clone();
            set(&mut object, "spec.replicas", replicas.into());
            if revision.as_str().is_some_and(|revision| !revision.is_empty()) {
                set(&mut object, "metadata.resourceVersion", revision.clone());
            }
            Ok(object)
        };
        Ok(scale_of(&self.update(place, Part::Wanted, options, change).await?))
    }
}

fn apply_patch(kind: PatchKind, kind_name: &str, object: &mut Value, body: &Value) -> Result<(), PatchError> {
    match kind {
        PatchKind::Merge if !body.is_object() => Err(PatchError::Malformed("it is not an object".to_owned())),
        PatchKind::Merge | PatchKind::Apply { .. } => {
            json_merge(object, body);
            Ok(())
        }
        PatchKind::Json => json_patch(object, body),
        // The scale has no lists, so both merges are the same to it.
        PatchKind::Strategic if kind_name == "Scale" => {
            json_merge(object, body);
            Ok(())
        }
        PatchKind::Strategic if kind_name.is_empty() => Err(PatchError::NotSupported("a custom object".to_owned())),
        PatchKind::Strategic => strategic_merge(kind_name, object, body),
    }
}

fn scale_of(object: &Value) -> Value {
    let metadata = |field: &str| at(object, &format!("metadata.{field}")).clone();
    let labels = at(object, "spec.selector.matchLabels").as_object();
    let selector: Vec<String> =
        labels.into_iter().flatten().map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or(""))).collect();
    json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": metadata("name"),
            "namespace": metadata("namespace"),
            "uid": metadata("uid"),
            "resourceVersion": metadata("resourceVersion"),
            "creationTimestamp": metadata("creationTimestamp"),
        },
        "spec": {"replicas": number(object, "spec.replicas").unwrap_or(1)},
        "status": {
            "replicas": number(object, "status.replicas").unwrap_or(0),
            "selector": selector.join(","),
        },
    })
}
