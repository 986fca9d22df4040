//! Kubernetes' error shape: a `Status` with a reason that programs read and a message for people.

use portolan_store::StoreError;
use serde_json::{Map, Value, json};

use crate::admission::Cause;
use crate::patch::{ApplyConflict, PatchError};
use crate::resources::Resource;
use crate::selector::SelectorError;

/// A refused request.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) code: u16,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    details: Map<String, Value>,
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Map::new() }
    }

    fn about(mut self, resource: &Resource, name: &str) -> Self {
        if !name.is_empty() {
            self.details.insert("name".to_owned(), name.into());
        }
        if !resource.group.is_empty() {
            self.details.insert("group".to_owned(), resource.group.as_str().into());
        }
        self.details.insert("kind".to_owned(), resource.plural.as_str().into());
        self
    }

    fn because(mut self, causes: impl IntoIterator<Item = Value>) -> Self {
        self.details.insert("causes".to_owned(), causes.into_iter().collect());
        self
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    pub(crate) fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// A path that stands for nothing.
    pub(crate) fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    pub(crate) fn not_found(resource: &Resource, name: &str) -> Self {
        let message = format!("{} {name:?} not found", resource.qualified());
        Self::new(404, "NotFound", message).about(resource, name)
    }

    pub(crate) fn namespace_not_found(namespace: &str) -> Self {
        let mut error = Self::new(404, "NotFound", format!("namespaces {namespace:?} not found"));
        error.details.insert("name".to_owned(), namespace.into());
        error.details.insert("kind".to_owned(), "namespaces".into());
        error
    }

    pub(crate) fn namespace_terminating(resource: &Resource, name: &str, namespace: &str) -> Self {
        let because = format!("namespace {namespace} is being terminated");
        let message = format!(
            "{} {name:?} is forbidden: unable to create new content in namespace {namespace} because it is being terminated",
            resource.qualified(),
        );
        Self::new(403, "Forbidden", message)
            .about(resource, name)
            .because([json!({"reason": "NamespaceTerminating", "message": because, "field": "metadata.namespace"})])
    }

    pub(crate) fn forbidden(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!("{} {name:?} is forbidden: {why}", resource.qualified());
        Self::new(403, "Forbidden", message).about(resource, name)
    }

    pub(crate) fn already_exists(resource: &Resource, name: &str) -> Self {
        let message = format!("{} {name:?} already exists", resource.qualified());
        Self::new(409, "AlreadyExists", message).about(resource, name)
    }

    pub(crate) fn conflict(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} {name:?}: {why}", resource.qualified());
        Self::new(409, "Conflict", message).about(resource, name)
    }

    pub(crate) fn changed_meanwhile(resource: &Resource, name: &str) -> Self {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(resource, name, why)
    }

    pub(crate) fn apply_conflict(resource: &Resource, name: &str, conflict: &ApplyConflict) -> Self {
        let causes = conflict.conflicts.iter().map(|conflict| {
            let message = format!("conflict with {:?} using {}", conflict.manager, conflict.api_version);
            json!({"reason": "FieldManagerConflict", "message": message, "field": conflict.field})
        });
        Self::new(409, "Conflict", conflict.to_string()).about(resource, name).because(causes)
    }

    pub(crate) fn invalid(resource: &Resource, name: &str, causes: &[Cause]) -> Self {
        let mut texts: Vec<String> = causes.iter().map(ToString::to_string).collect();
        let text = if texts.len() == 1 { texts.remove(0) } else { format!("[{}]", texts.join(", ")) };
        let message = format!("{} {name:?} is invalid: {text}", resource.qualified_kind());
        let values = causes
            .iter()
            .map(|cause| json!({"reason": cause.reason.as_str(), "message": cause.message, "field": cause.field}));
        let mut error = Self::new(422, "Invalid", message).about(resource, name).because(values);
        error.details.insert("kind".to_owned(), resource.kind.as_str().into());
        error
    }

    pub(crate) fn unprocessable(resource: &Resource, name: &str, error: &PatchError) -> Self {
        let (code, reason) = match error {
            PatchError::Malformed(_) => (400, "BadRequest"),
            PatchError::NotSupported(_) => (415, "UnsupportedMediaType"),
            _ => (422, "Invalid"),
        };
        Self::new(code, reason, error.to_string()).about(resource, name)
    }

    /// A place in a list or watch that the store no longer has.
    pub(crate) fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    pub(crate) fn method_not_allowed() -> Self {
        Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    }

    pub(crate) fn not_acceptable() -> Self {
        let message = "only the following media types are accepted: application/json";
        Self::new(406, "NotAcceptable", message)
    }

    pub(crate) fn too_large(limit: usize) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("the request body is over the limit of {limit} bytes"))
    }

    pub(crate) fn unsupported_media_type(given: &str, accepted: &str) -> Self {
        let message = format!(
            "the body of the request was in an unknown format ({given:?}) - accepted media types include: {accepted}"
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {}", message.into()))
    }

    fn too_large_revision(requested: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {requested}, current: {current}");
        let cause = json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"});
        Self::new(504, "Timeout", message).because([cause])
    }

    /// The `Status` object.
    pub(crate) fn to_value(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
        });
        if !self.details.is_empty() {
            status["details"] = Value::Object(self.details.clone());
        }
        status["code"] = self.code.into();
        status
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Compacted { requested, compacted } => {
                Self::expired(format!("too old resource version: {requested} ({compacted})"))
            }
            StoreError::FutureRevision { requested, current } => Self::too_large_revision(requested, current),
            StoreError::TooLarge { .. } => Self::new(413, "RequestEntityTooLarge", error.to_string()),
            StoreError::Unreachable { .. } => Self::new(503, "ServiceUnavailable", error.to_string()),
            StoreError::OutcomeUnknown { .. } => Self::new(504, "Timeout", error.to_string()),
            StoreError::Closed => Self::new(503, "ServiceUnavailable", "the server is shutting down"),
            other => Self::internal(other.to_string()),
        }
    }
}

impl From<SelectorError> for ApiError {
    fn from(error: SelectorError) -> Self {
        Self::bad_request(error.to_string())
    }
}
