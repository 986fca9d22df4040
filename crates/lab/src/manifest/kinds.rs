//! The kinds that the lab's API serves, and how their requests are addressed.

use portolan_apiserver::{BuiltInKind, built_in_kinds};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A kind of object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kind {
    /// `apiVersion`.
    pub group_version: String,
    /// `kind`.
    pub kind: String,
    /// The word in the path of a request.
    pub plural: String,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
}

impl Kind {
    /// The path of the objects of this kind, in a namespace or in all of them.
    pub fn collection(&self, namespace: Option<&str>) -> String {
        let root = if self.group_version.contains('/') { "/apis" } else { "/api" };
        match namespace {
            Some(namespace) if self.namespaced => {
                format!("{root}/{}/namespaces/{namespace}/{}", self.group_version, self.plural)
            }
            _ => format!("{root}/{}/{}", self.group_version, self.plural),
        }
    }
}

/// The kinds that are known: the built-in ones and those that the manifests themselves define.
#[derive(Debug)]
pub struct Kinds(Vec<Kind>);

impl Kinds {
    /// The built-in kinds.
    pub fn built_in() -> Kinds {
        let kind = |kind: BuiltInKind| Kind {
            group_version: kind.api_version,
            kind: kind.kind.to_owned(),
            plural: kind.plural.to_owned(),
            namespaced: kind.is_namespaced,
        };
        Kinds(built_in_kinds().map(kind).collect())
    }

    /// The built-in kinds and those of the CustomResourceDefinitions among these objects.
    pub fn with_definitions<'a>(objects: impl Iterator<Item = &'a Value>) -> Kinds {
        let mut kinds = Kinds::built_in();
        for object in objects {
            if object.get("kind").and_then(Value::as_str) == Some("CustomResourceDefinition") {
                kinds.0.extend(defined(object).unwrap_or_default());
            }
        }
        kinds
    }

    /// The kind with this `apiVersion` and `kind`.
    pub fn find(&self, group_version: &str, kind: &str) -> Option<Kind> {
        self.0.iter().find(|known| known.group_version == group_version && known.kind == kind).cloned()
    }

    /// What to write instead of a kind that is not known.
    pub fn suggestion(&self, kind: &str) -> String {
        if let Some(known) = self.0.iter().find(|known| known.kind.eq_ignore_ascii_case(kind)) {
            return format!("write kind `{}` of apiVersion `{}`", known.kind, known.group_version);
        }
        let kinds: Vec<&str> = self.0.iter().map(|known| known.kind.as_str()).collect();
        format!("the lab knows {}; add a CustomResourceDefinition for a kind of your own", kinds.join(", "))
    }
}

fn defined(definition: &Value) -> Option<Vec<Kind>> {
    let spec = definition.get("spec")?;
    let text = |pointer: &str| spec.pointer(pointer).and_then(Value::as_str);
    let (group, kind, plural) = (text("/group")?, text("/names/kind")?, text("/names/plural")?);
    let namespaced = text("/scope")? == "Namespaced";
    let versions = spec.get("versions")?.as_array()?;
    let names = versions.iter().filter_map(|version| version.get("name")?.as_str());
    let of_version = |version: &str| Kind {
        group_version: format!("{group}/{version}"),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
        namespaced,
    };
    Some(names.map(of_version).collect())
}

/// What is created earlier has the lower number.
pub(super) fn creation_order(kind: &str) -> u8 {
    match kind {
        "Namespace" | "CustomResourceDefinition" => 0,
        "Node" | "ConfigMap" | "Secret" | "ServiceAccount" | "IngressClass" => 1,
        "Service" => 2,
        _ => 3,
    }
}
