//! Which kinds are served: one table for those that are built in, and what
//! CustomResourceDefinitions add.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use crate::fields::{flag, items, text, texts};

/// One kind of object and how it is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resource {
    /// Empty for the core group.
    pub(crate) group: String,
    /// The served versions, the preferred one first.
    pub(crate) versions: Vec<String>,
    pub(crate) plural: String,
    pub(crate) singular: String,
    pub(crate) kind: String,
    pub(crate) short_names: Vec<String>,
    pub(crate) categories: Vec<String>,
    pub(crate) is_namespaced: bool,
    pub(crate) has_status: bool,
    pub(crate) has_scale: bool,
    /// Whether `metadata.generation` counts changes of what is wanted.
    pub(crate) has_generation: bool,
    /// Defined by a CustomResourceDefinition.
    pub(crate) is_custom: bool,
    /// A custom kind's `additionalPrinterColumns` by version.
    pub(crate) printer_columns: BTreeMap<String, Vec<Value>>,
}

impl Resource {
    /// `deployments.apps`, as in messages.
    pub(crate) fn qualified(&self) -> String {
        join(&self.plural, &self.group)
    }

    /// `Deployment.apps`, as in messages.
    pub(crate) fn qualified_kind(&self) -> String {
        join(&self.kind, &self.group)
    }

    /// The name of its objects' table in the controllers' mirror.
    pub(crate) fn table(&self) -> String {
        if self.is_custom { self.qualified_kind() } else { self.kind.clone() }
    }

    pub(crate) fn is(&self, group: &str, kind: &str) -> bool {
        self.group == group && self.kind == kind
    }

    /// Before the keys of all objects of this kind.
    pub(crate) fn prefix(&self) -> String {
        let group = if self.group.is_empty() { "core" } else { &self.group };
        format!("{REGISTRY_PREFIX}{group}/{}/", self.plural)
    }

    /// Before the keys of the objects in a namespace; `None` is all of them.
    pub(crate) fn namespace_prefix(&self, namespace: Option<&str>) -> String {
        match namespace {
            Some(namespace) if self.is_namespaced => format!("{}{namespace}/", self.prefix()),
            _ => self.prefix(),
        }
    }

    pub(crate) fn key(&self, namespace: &str, name: &str) -> String {
        if self.is_namespaced {
            format!("{}{namespace}/{name}", self.prefix())
        } else {
            format!("{}{name}", self.prefix())
        }
    }
}

/// Before the keys of all objects, as kube-apiserver's `--etcd-prefix`.
pub(crate) const REGISTRY_PREFIX: &str = "/registry/";

fn join(name: &str, group: &str) -> String {
    if group.is_empty() { name.to_owned() } else { format!("{name}.{group}") }
}

/// `v1` or `apps/v1`.
pub(crate) fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

const NAMESPACED: u8 = 1;
const STATUS: u8 = 2;
const SCALE: u8 = 4;
const GENERATION: u8 = 8;

/// Group, plural, singular, kind, short names, categories, properties. All are version v1.
type Row =
    (&'static str, &'static str, &'static str, &'static str, &'static [&'static str], &'static [&'static str], u8);

#[rustfmt::skip]
const BUILT_IN: &[Row] = &[
    ("", "configmaps", "configmap", "ConfigMap", &["cm"], &[], NAMESPACED),
    ("", "endpoints", "endpoints", "Endpoints", &["ep"], &[], NAMESPACED),
    ("", "events", "event", "Event", &["ev"], &[], NAMESPACED),
    ("", "namespaces", "namespace", "Namespace", &["ns"], &[], STATUS),
    ("", "nodes", "node", "Node", &["no"], &[], STATUS),
    ("", "pods", "pod", "Pod", &["po"], &["all"], NAMESPACED | STATUS),
    ("", "secrets", "secret", "Secret", &[], &[], NAMESPACED),
    ("", "serviceaccounts", "serviceaccount", "ServiceAccount", &["sa"], &[], NAMESPACED),
    ("", "services", "service", "Service", &["svc"], &["all"], NAMESPACED | STATUS),
    ("apiextensions.k8s.io", "customresourcedefinitions", "customresourcedefinition", "CustomResourceDefinition",
        &["crd", "crds"], &["api-extensions"], STATUS | GENERATION),
    ("apps", "deployments", "deployment", "Deployment", &["deploy"], &["all"], NAMESPACED | STATUS | SCALE | GENERATION),
    ("apps", "replicasets", "replicaset", "ReplicaSet", &["rs"], &["all"], NAMESPACED | STATUS | SCALE | GENERATION),
    ("coordination.k8s.io", "leases", "lease", "Lease", &[], &[], NAMESPACED),
    ("discovery.k8s.io", "endpointslices", "endpointslice", "EndpointSlice", &[], &[], NAMESPACED | GENERATION),
    ("networking.k8s.io", "ingressclasses", "ingressclass", "IngressClass", &[], &[], GENERATION),
    ("networking.k8s.io", "ingresses", "ingress", "Ingress", &["ing"], &[], NAMESPACED | STATUS | GENERATION),
    ("networking.k8s.io", "networkpolicies", "networkpolicy", "NetworkPolicy", &["netpol"], &[], NAMESPACED | GENERATION),
];

/// A kind that is served without a definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltInKind {
    /// `apiVersion`.
    pub api_version: String,
    /// `kind`.
    pub kind: &'static str,
    /// The word in paths.
    pub plural: &'static str,
    /// Whether its objects are in namespaces.
    pub is_namespaced: bool,
}

/// Every kind that is served without a definition.
pub fn built_in_kinds() -> impl Iterator<Item = BuiltInKind> {
    BUILT_IN.iter().map(|(group, plural, _, kind, _, _, properties)| BuiltInKind {
        api_version: api_version(group, "v1"),
        kind,
        plural,
        is_namespaced: properties & NAMESPACED != 0,
    })
}

/// Whether this server itself serves something of a group.
pub(crate) fn is_built_in_group(group: &str) -> bool {
    BUILT_IN.iter().any(|row| row.0 == group)
}

/// The name of an object's table in the controllers' mirror, by what the object says of itself: the
/// kind, and the group where the kind is a custom one. Anybody may define a `Service`.
pub(crate) fn table_name(object: &Value) -> String {
    let kind = text(object, "kind");
    let group = text(object, "apiVersion").split_once('/').map_or("", |(group, _)| group);
    if is_built_in_group(group) { kind.to_owned() } else { join(kind, group) }
}

fn built_in(row: &Row) -> Resource {
    let (group, plural, singular, kind, short_names, categories, properties) = *row;
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    Resource {
        group: group.to_owned(),
        versions: vec!["v1".to_owned()],
        plural: plural.to_owned(),
        singular: singular.to_owned(),
        kind: kind.to_owned(),
        short_names: owned(short_names),
        categories: owned(categories),
        is_namespaced: properties & NAMESPACED != 0,
        has_status: properties & STATUS != 0,
        has_scale: properties & SCALE != 0,
        has_generation: properties & GENERATION != 0,
        is_custom: false,
        printer_columns: BTreeMap::new(),
    }
}

/// What a CustomResourceDefinition defines; `None` when it serves no version.
fn custom(definition: &Value) -> Option<Resource> {
    let versions: Vec<&Value> =
        items(definition, "spec.versions").iter().filter(|version| flag(version, "served")).collect();
    let owned = |path: &str| text(definition, path).to_owned();
    let all = |path: &str| texts(definition, path).map(str::to_owned).collect();
    if versions.is_empty() {
        return None;
    }
    let mut names: Vec<String> = versions.iter().map(|version| text(version, "name").to_owned()).collect();
    names.sort_by_key(|version| std::cmp::Reverse(version_priority(version)));
    Some(Resource {
        group: owned("spec.group"),
        versions: names,
        plural: owned("spec.names.plural"),
        singular: owned("spec.names.singular"),
        kind: owned("spec.names.kind"),
        short_names: all("spec.names.shortNames"),
        categories: all("spec.names.categories"),
        is_namespaced: text(definition, "spec.scope") == "Namespaced",
        has_status: versions.iter().any(|version| !crate::fields::at(version, "subresources.status").is_null()),
        has_scale: false,
        has_generation: true,
        is_custom: true,
        printer_columns: versions
            .iter()
            .map(|version| (text(version, "name").to_owned(), items(version, "additionalPrinterColumns").to_vec()))
            .collect(),
    })
}

/// Kubernetes' order of versions: v2 before v1, and both before v1beta2, v1beta1, v1alpha1.
fn version_priority(version: &str) -> (u8, u32, u32) {
    let parse = || {
        let rest = version.strip_prefix('v')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let major = rest[..digits].parse().ok()?;
        let stage = &rest[digits..];
        match (stage.strip_prefix("beta"), stage.strip_prefix("alpha")) {
            (Some(minor), _) => Some((2, major, minor.parse().ok()?)),
            (_, Some(minor)) => Some((1, major, minor.parse().ok()?)),
            _ if stage.is_empty() => Some((3, major, 0)),
            _ => None,
        }
    };
    parse().unwrap_or((0, 0, 0))
}

/// All kinds that are served at a time.
#[derive(Debug, Clone, Default)]
pub(crate) struct Resources {
    /// By group and plural.
    table: BTreeMap<(String, String), Arc<Resource>>,
}

impl Resources {
    /// The built-in kinds and those of the given definitions. A definition cannot replace a built-in.
    pub(crate) fn new<'definitions>(definitions: impl IntoIterator<Item = &'definitions Value>) -> Self {
        let custom = definitions.into_iter().filter_map(custom);
        let mut resources = Self::default();
        for resource in custom.chain(BUILT_IN.iter().map(built_in)) {
            resources.table.insert((resource.group.clone(), resource.plural.clone()), Arc::new(resource));
        }
        resources
    }

    pub(crate) fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        let resource = self.table.get(&(group.to_owned(), plural.to_owned()))?;
        resource.versions.iter().any(|served| served == version).then_some(resource)
    }

    /// Finds by the name in paths and keys, whatever the version.
    pub(crate) fn of_plural(&self, group: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.table.get(&(group.to_owned(), plural.to_owned()))
    }

    /// Finds by `apiVersion` and `kind`, as objects name them.
    pub(crate) fn of_object(&self, object: &Value) -> Option<&Arc<Resource>> {
        let (group, version) = text(object, "apiVersion").split_once('/').unwrap_or(("", text(object, "apiVersion")));
        self.all().find(|resource| {
            resource.is(group, text(object, "kind")) && resource.versions.iter().any(|served| served == version)
        })
    }

    /// Every kind, by group and plural.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.table.values()
    }

    /// The groups with their versions, the preferred first; the core group is the empty name.
    pub(crate) fn groups(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for resource in self.all() {
            let versions = groups.entry(&resource.group).or_default();
            versions.extend(resource.versions.iter().map(String::as_str));
            versions.sort_by_key(|version| std::cmp::Reverse(version_priority(version)));
            versions.dedup();
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn versions_have_kubernetes_order() {
        let mut versions = ["v1alpha1", "v2", "v1beta2", "v10", "v1", "v1beta10", "other"];
        versions.sort_by_key(|version| std::cmp::Reverse(version_priority(version)));
        assert_eq!(versions, ["v10", "v2", "v1", "v1beta10", "v1beta2", "v1alpha1", "other"]);
    }

    #[test]
    fn a_definition_adds_a_kind_and_cannot_take_a_built_in_one() {
        let definition = |group: &str, plural: &str| {
            json!({"spec": {"group": group, "scope": "Namespaced",
                "names": {"plural": plural, "singular": "x", "kind": "X"},
                "versions": [{"name": "v1", "served": true, "storage": true}]}})
        };
        let definitions = [definition("example.com", "xs"), definition("apps", "deployments")];
        let resources = Resources::new(&definitions);
        assert!(resources.find("example.com", "v1", "xs").is_some());
        assert_eq!(resources.find("apps", "v1", "deployments").unwrap().kind, "Deployment");
        assert!(resources.find("example.com", "v2", "xs").is_none());
    }
}
