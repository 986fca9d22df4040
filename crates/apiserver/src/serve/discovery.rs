//! What is served: the documents from which clients learn kinds, paths and verbs.

use serde_json::{Value, json};

use crate::resources::{Resource, Resources, api_version};

const VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
const PART_VERBS: [&str; 3] = ["get", "patch", "update"];

/// The Kubernetes version whose behaviour is followed.
const MAJOR: &str = "1";
const MINOR: &str = "32";

pub(super) fn version() -> Value {
    json!({
        "major": MAJOR,
        "minor": MINOR,
        "gitVersion": format!("v{MAJOR}.{MINOR}.0+portolan-{}", env!("CARGO_PKG_VERSION")),
        "gitCommit": "",
        "gitTreeState": "",
        "buildDate": "",
        "goVersion": "",
        "compiler": "rustc",
        "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
    })
}

pub(super) fn root(resources: &Resources) -> Value {
    let mut paths: Vec<String> =
        ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v2", "/openapi/v3", "/readyz", "/version"]
            .map(str::to_owned)
            .to_vec();
    for (group, versions) in resources.groups().iter().filter(|(group, _)| !group.is_empty()) {
        paths.push(format!("/apis/{group}"));
        paths.extend(versions.iter().map(|version| format!("/apis/{group}/{version}")));
    }
    paths.sort();
    json!({"paths": paths})
}

pub(super) fn core_versions() -> Value {
    json!({"kind": "APIVersions", "apiVersion": "v1", "versions": ["v1"], "serverAddressByClientCIDRs": []})
}

pub(super) fn groups(resources: &Resources) -> Value {
    let groups = resources.groups();
    let groups: Vec<Value> = groups
        .iter()
        .filter(|(group, _)| !group.is_empty())
        .map(|(group, versions)| describe(group, versions))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

pub(super) fn group(resources: &Resources, group: &str) -> Option<Value> {
    let groups = resources.groups();
    let versions = groups.get(group).filter(|_| !group.is_empty())?;
    let mut described = describe(group, versions);
    described["kind"] = "APIGroup".into();
    described["apiVersion"] = "v1".into();
    Some(described)
}

fn describe(group: &str, versions: &[&str]) -> Value {
    let version = |version: &&str| json!({"groupVersion": api_version(group, version), "version": version});
    json!({
        "name": group,
        "versions": versions.iter().map(version).collect::<Vec<_>>(),
        "preferredVersion": versions.first().map(version),
    })
}

pub(super) fn group_version(resources: &Resources, group: &str, version: &str) -> Option<Value> {
    let served = |resource: &&std::sync::Arc<Resource>| {
        resource.group == group && resource.versions.iter().any(|served| served == version)
    };
    let described: Vec<Value> = resources.all().filter(served).flat_map(|resource| parts(resource)).collect();
    (!described.is_empty()).then(|| {
        json!({
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": api_version(group, version),
            "resources": described,
        })
    })
}

/// A kind and its parts.
fn parts(resource: &Resource) -> Vec<Value> {
    let mut whole = json!({
        "name": resource.plural,
        "singularName": resource.singular,
        "namespaced": resource.is_namespaced,
        "kind": resource.kind,
        "verbs": VERBS,
    });
    if !resource.short_names.is_empty() {
        whole["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        whole["categories"] = json!(resource.categories);
    }
    let part = |name: &str, kind: &str| {
        json!({
            "name": format!("{}/{name}", resource.plural),
            "singularName": "",
            "namespaced": resource.is_namespaced,
            "kind": kind,
            "verbs": PART_VERBS,
        })
    };
    let mut described = vec![whole];
    if resource.has_scale {
        let mut scale = part("scale", "Scale");
        scale["group"] = "autoscaling".into();
        scale["version"] = "v1".into();
        described.push(scale);
    }
    if resource.has_status {
        described.push(part("status", &resource.kind));
    }
    described
}
