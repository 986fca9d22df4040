//! Single objects as JSON: what a file or a test holds, through the same conversion as what is watched.

use portolan_state::Change;
use serde_json::Value;

use crate::convert::{Converted, EndpointSlices, Namespaces, Nodes, Pods, Services, Table};

/// Why a document is no change of a table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// No table holds objects of this kind.
    #[error("no table holds {kind} ({api_version}); use Namespace, Node, Service, EndpointSlice or Pod")]
    UnknownKind {
        /// `kind`.
        kind: String,
        /// `apiVersion`.
        api_version: String,
    },
    /// Nothing names the object.
    #[error("this {0} has no metadata.name; every object needs one")]
    NoName(String),
    /// It is not even an object.
    #[error("this {kind} cannot be read: {reason}")]
    Unreadable {
        /// `kind`.
        kind: String,
        /// Why.
        reason: String,
    },
}

/// The change that the server's word about this object makes to the tables. Objects that a label leaves
/// to another proxy are absent, as they are for a node.
///
/// # Errors
///
/// If the document is of no kind that a table holds, or has no name. What is wrong inside of it is
/// reported with the change, as it is for an object that was watched.
pub fn change_from_json(document: &Value) -> Result<Change, DocumentError> {
    let text = |field: &str| document.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    match (api_version.as_str(), kind.as_str()) {
        ("v1", "Namespace") => convert::<Namespaces>(document, kind),
        ("v1", "Node") => convert::<Nodes>(document, kind),
        ("v1", "Service") => convert::<Services>(document, kind),
        ("v1", "Pod") => convert::<Pods>(document, kind),
        ("discovery.k8s.io/v1", "EndpointSlice") => convert::<EndpointSlices>(document, kind),
        _ => Err(DocumentError::UnknownKind { kind, api_version }),
    }
}

fn convert<T: Table>(document: &Value, kind: String) -> Result<Change, DocumentError> {
    let converted: Converted<T> = serde_json::from_value(document.clone())
        .map_err(|error| DocumentError::Unreadable { kind: kind.clone(), reason: error.to_string() })?;
    converted.into_change(false).map(|(_, change)| change).ok_or(DocumentError::NoName(kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_state::{Object, ObjectRef};
    use serde_json::json;

    #[test]
    fn a_document_is_converted_as_a_watched_object_is() {
        let service = |spec: Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "a"}, "spec": spec});
        let good = service(json!({"clusterIP": "10.96.0.10", "ports": [{"port": 80}, {"port": 0}]}));
        let Ok(Change::Upsert(Object::Service(web), problems)) = change_from_json(&good) else { panic!("no service") };
        assert_eq!((web.ports.len(), problems.len()), (1, 1));
        let mut elsewhere = good.clone();
        elsewhere["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "other"});
        let key = portolan_net::ObjectKey::new("a", "web");
        assert_eq!(change_from_json(&elsewhere), Ok(Change::Delete(ObjectRef::Service(key))));
    }

    #[test]
    fn what_no_table_holds_is_named() {
        let error = change_from_json(&json!({"apiVersion": "apps/v1", "kind": "Deployment"})).unwrap_err();
        assert!(error.to_string().starts_with("no table holds Deployment (apps/v1)"), "{error}");
        let error = change_from_json(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {}})).unwrap_err();
        assert_eq!(error.to_string(), "this Node has no metadata.name; every object needs one");
    }
}
