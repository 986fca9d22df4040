//! Namespaces: only that they exist.

use k8s_openapi::api::core::v1;
use portolan_net::{ObjectKey, ObjectKind};
use portolan_state::{Namespace, Object, ObjectRef};
use serde::Deserialize;

use super::{Metadata, Outcome, Problems, Table};
use crate::lenient::Part;

/// The table of namespaces.
pub(crate) struct Namespaces;

/// Nothing but the metadata is read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct NamespaceView {
    metadata: Part<Metadata>,
}

impl Table for Namespaces {
    type Kubernetes = v1::Namespace;
    type View = NamespaceView;
    const KIND: ObjectKind = ObjectKind::Namespace;

    fn reference(key: ObjectKey) -> ObjectRef {
        ObjectRef::Namespace(key.name)
    }

    fn metadata(view: &mut NamespaceView) -> Metadata {
        std::mem::take(&mut view.metadata.0)
    }

    fn convert(metadata: &Metadata, _: NamespaceView, _: &mut Problems) -> Outcome {
        Outcome::Keep(Object::Namespace(Namespace { name: metadata.key().name }))
    }
}
