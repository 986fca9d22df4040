//! How the lists and maps of our kinds are merged: Kubernetes' own patch keys and list types.
//!
//! One table serves both merges. Strategic merge uses `patch_key` (the `patchMergeKey` of the Go
//! types); server-side apply uses `apply_keys` (`x-kubernetes-list-map-keys`). They differ where
//! Kubernetes differs: a Node's taints are merged by key in one and atomic in the other. A list that
//! the table does not name is atomic. Custom objects have no row and so only atomic lists.

/// The kinds that have merge keys.
pub(super) const BUILT_IN_KINDS: &[&str] = &[
    "Namespace",
    "Node",
    "Pod",
    "Service",
    "Endpoints",
    "EndpointSlice",
    "ConfigMap",
    "Secret",
    "ServiceAccount",
    "Deployment",
    "ReplicaSet",
    "Ingress",
    "IngressClass",
    "NetworkPolicy",
    "CustomResourceDefinition",
    "Lease",
    "Event",
];

/// How one list is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ListRule {
    /// The last field names of the list's path.
    path_end: &'static [&'static str],
    /// The kinds it holds for; empty for all built-in ones.
    kinds: &'static [&'static str],
    /// The merge key of strategic merge patch; empty where it replaces the list.
    pub(super) patch_key: &'static str,
    /// The keys of server-side apply; empty where it replaces the list.
    pub(super) apply_keys: &'static [&'static str],
    /// Whether it is a set of plain values.
    pub(super) is_set: bool,
}

const fn keyed(
    path_end: &'static [&'static str],
    kinds: &'static [&'static str],
    patch_key: &'static str,
    apply_keys: &'static [&'static str],
) -> ListRule {
    ListRule { path_end, kinds, patch_key, apply_keys, is_set: false }
}

const fn set(path_end: &'static [&'static str], kinds: &'static [&'static str]) -> ListRule {
    ListRule { path_end, kinds, patch_key: "", apply_keys: &[], is_set: true }
}

#[rustfmt::skip]
const LISTS: &[ListRule] = &[
    keyed(&["metadata", "ownerReferences"], &[], "uid", &["uid"]),
    set(&["metadata", "finalizers"], &[]),
    keyed(&["status", "conditions"], &[], "type", &["type"]),
    keyed(&["spec", "containers"], &[], "name", &["name"]),
    keyed(&["spec", "initContainers"], &[], "name", &["name"]),
    keyed(&["spec", "ephemeralContainers"], &[], "name", &["name"]),
    keyed(&["containers", "ports"], &[], "containerPort", &["containerPort", "protocol"]),
    keyed(&["initContainers", "ports"], &[], "containerPort", &["containerPort", "protocol"]),
    keyed(&["containers", "env"], &[], "name", &["name"]),
    keyed(&["initContainers", "env"], &[], "name", &["name"]),
    keyed(&["containers", "volumeMounts"], &[], "mountPath", &["mountPath"]),
    keyed(&["initContainers", "volumeMounts"], &[], "mountPath", &["mountPath"]),
    keyed(&["containers", "volumeDevices"], &[], "devicePath", &["devicePath"]),
    keyed(&["spec", "volumes"], &[], "name", &["name"]),
    keyed(&["spec", "imagePullSecrets"], &[], "name", &["name"]),
    keyed(&["imagePullSecrets"], &["ServiceAccount"], "name", &[]),
    keyed(&["secrets"], &["ServiceAccount"], "name", &["name"]),
    keyed(&["spec", "hostAliases"], &[], "ip", &["ip"]),
    keyed(&["spec", "topologySpreadConstraints"], &[], "topologyKey", &["topologyKey", "whenUnsatisfiable"]),
    keyed(&["spec", "schedulingGates"], &[], "name", &["name"]),
    keyed(&["spec", "readinessGates"], &[], "", &[]),
    keyed(&["spec", "resourceClaims"], &[], "name", &["name"]),
    keyed(&["status", "podIPs"], &["Pod"], "ip", &["ip"]),
    keyed(&["spec", "ports"], &["Service"], "port", &["port", "protocol"]),
    keyed(&["status", "addresses"], &["Node"], "type", &["type"]),
    keyed(&["spec", "taints"], &["Node"], "key", &[]),
    set(&["spec", "podCIDRs"], &["Node"]),
    set(&["spec", "finalizers"], &["Namespace"]),
    set(&["endpoints", "addresses"], &["EndpointSlice"]),
];

/// Maps that server-side apply replaces as a whole: label selectors and references.
const ATOMIC_MAPS: &[&str] = &[
    "selector",
    "labelSelector",
    "podSelector",
    "namespaceSelector",
    "fieldRef",
    "resourceFieldRef",
    "configMapKeyRef",
    "secretKeyRef",
    "targetRef",
    "involvedObject",
    "related",
    "nodeSelectorTerms",
];

/// The rule of the list at a path of field names.
pub(super) fn list_rule(kind: &str, path: &[String]) -> Option<&'static ListRule> {
    if !BUILT_IN_KINDS.contains(&kind) {
        // What every object has: owners and finalizers.
        return LISTS[..2].iter().find(|rule| ends_with(path, rule.path_end));
    }
    LISTS.iter().find(|rule| (rule.kinds.is_empty() || rule.kinds.contains(&kind)) && ends_with(path, rule.path_end))
}

/// Whether server-side apply treats the map at a path as one value.
pub(super) fn is_atomic_map(kind: &str, path: &[String]) -> bool {
    BUILT_IN_KINDS.contains(&kind) && path.last().is_some_and(|field| ATOMIC_MAPS.contains(&field.as_str()))
}

fn ends_with(path: &[String], end: &[&str]) -> bool {
    path.len() >= end.len() && path[path.len() - end.len()..].iter().zip(end).all(|(left, right)| left == right)
}
