//! What a request asks for: its path, its query, what it accepts.

use std::collections::BTreeMap;

use crate::status::ApiError;

/// What a path stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    Health,
    Version,
    Root,
    /// `/api`.
    CoreVersions,
    /// `/apis`.
    Groups,
    /// `/apis/GROUP`.
    Group(String),
    /// `/api/v1` or `/apis/GROUP/VERSION`.
    GroupVersion(String, String),
    OpenApiV2,
    OpenApiV3,
    Objects(Target),
    Unknown,
}

/// Objects, or one object, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Target {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) namespace: Option<String>,
    pub(crate) plural: String,
    pub(crate) name: Option<String>,
    pub(crate) subresource: Option<String>,
}

/// Reads a path. Its parts are percent-decoded one by one, so that a name cannot add a part.
pub(crate) fn route(path: &str) -> Route {
    let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(decode).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    match parts.as_slice() {
        [] => Route::Root,
        ["healthz" | "livez" | "readyz", ..] => Route::Health,
        ["version"] => Route::Version,
        ["openapi", "v2"] => Route::OpenApiV2,
        ["openapi", "v3"] => Route::OpenApiV3,
        ["api"] => Route::CoreVersions,
        ["apis"] => Route::Groups,
        ["apis", group] => Route::Group((*group).to_owned()),
        ["api", version] => Route::GroupVersion(String::new(), (*version).to_owned()),
        ["apis", group, version] => Route::GroupVersion((*group).to_owned(), (*version).to_owned()),
        ["api", version, rest @ ..] => objects("", version, rest),
        ["apis", group, version, rest @ ..] => objects(group, version, rest),
        _ => Route::Unknown,
    }
}

fn objects(group: &str, version: &str, parts: &[&str]) -> Route {
    let base = Target { group: group.to_owned(), version: version.to_owned(), ..Target::default() };
    let owned = |text: &str| Some(text.to_owned());
    let target = match parts {
        // A namespace's own parts look like kinds within it; these two are the only ones it has.
        ["namespaces", name, subresource @ ("status" | "finalize")] => {
            Target { plural: "namespaces".to_owned(), name: owned(name), subresource: owned(subresource), ..base }
        }
        ["namespaces", namespace, plural, rest @ ..] => {
            let target = Target { namespace: owned(namespace), plural: (*plural).to_owned(), ..base };
            match rest {
                [] => target,
                [name] => Target { name: owned(name), ..target },
                [name, subresource] => Target { name: owned(name), subresource: owned(subresource), ..target },
                _ => return Route::Unknown,
            }
        }
        [plural] => Target { plural: (*plural).to_owned(), ..base },
        [plural, name] => Target { plural: (*plural).to_owned(), name: owned(name), ..base },
        [plural, name, subresource] => {
            Target { plural: (*plural).to_owned(), name: owned(name), subresource: owned(subresource), ..base }
        }
        _ => return Route::Unknown,
    };
    Route::Objects(target)
}

/// The query's parameters; the last of a name counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(BTreeMap<String, String>);

impl Query {
    pub(crate) fn parse(query: &str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        Self(pairs.map(|(name, value)| (decode_form(name), decode_form(value))).collect())
    }

    /// The value, or the empty text.
    pub(crate) fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    pub(crate) fn flag(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !matches!(value.as_str(), "false" | "0"))
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        match self.get(name) {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_| {
                ApiError::bad_request(format!("the query parameter {name}={text:?} is not a whole number"))
            }),
        }
    }
}

fn decode_form(text: &str) -> String {
    decode(&text.replace('+', " "))
}

/// Percent-decodes. What is not a valid escape stays as it is; bytes that are not UTF-8 are replaced.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut position = 0;
    while position < bytes.len() {
        let digit = |offset: usize| bytes.get(position + offset).and_then(|byte| char::from(*byte).to_digit(16));
        match (bytes[position], digit(1), digit(2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high * 16 + low) as u8);
                position += 3;
            }
            (byte, _, _) => {
                decoded.push(byte);
                position += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// In which form objects are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Json,
    /// `as=Table`: rows for people, made by the server.
    Table,
    /// `as=PartialObjectMetadata` or its list.
    Metadata,
}

/// Chooses the first form that the client accepts and the server has.
pub(crate) fn form(accept: &str) -> Result<Form, ApiError> {
    if accept.trim().is_empty() {
        return Ok(Form::Json);
    }
    accept.split(',').find_map(form_of).ok_or_else(ApiError::not_acceptable)
}

fn form_of(range: &str) -> Option<Form> {
    let mut parts = range.split(';').map(str::trim);
    let media_type = parts.next()?.to_ascii_lowercase();
    if !matches!(media_type.as_str(), "application/json" | "application/*" | "*/*") {
        return None;
    }
    match parts.find_map(|part| part.strip_prefix("as=")) {
        None => Some(Form::Json),
        Some("Table") => Some(Form::Table),
        Some("PartialObjectMetadata" | "PartialObjectMetadataList") => Some(Form::Metadata),
        // Another conversion, as aggregated discovery: the client names what else it takes.
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn target(path: &str) -> Target {
        match route(path) {
            Route::Objects(target) => target,
            other => panic!("{path} is {other:?}"),
        }
    }

    #[test]
    fn paths_are_read_as_kubernetes_does() {
        assert_eq!(route("/api/v1"), Route::GroupVersion(String::new(), "v1".into()));
        assert_eq!(route("/apis/apps"), Route::Group("apps".into()));
        assert_eq!(route("/readyz/ping"), Route::Health);
        assert_eq!(route("/elsewhere"), Route::Unknown);
        let pods = target("/api/v1/namespaces/default/pods/a%2Fb/status");
        assert_eq!(pods.namespace.as_deref(), Some("default"));
        assert_eq!(pods.name.as_deref(), Some("a/b"));
        assert_eq!(pods.subresource.as_deref(), Some("status"));
        let namespace = target("/api/v1/namespaces/default/status");
        assert_eq!((namespace.plural.as_str(), namespace.name.as_deref()), ("namespaces", Some("default")));
        assert_eq!(namespace.namespace, None);
        let namespace = target("/api/v1/namespaces/default");
        assert_eq!((namespace.plural.as_str(), namespace.name.as_deref()), ("namespaces", Some("default")));
        assert_eq!(target("/apis/apps/v1/deployments").plural, "deployments");
    }

    #[test]
    fn the_first_form_that_is_known_counts() {
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        assert_eq!(form(table).unwrap(), Form::Table);
        let discovery = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        assert_eq!(form(discovery).unwrap(), Form::Json);
        assert_eq!(form("").unwrap(), Form::Json);
        assert_eq!(form("application/vnd.kubernetes.protobuf").unwrap_err().code, 406);
    }

    proptest! {
        #[test]
        fn any_path_and_query_is_read(path in "\\PC*", query in "\\PC*") {
            let _ = route(&path);
            let _ = Query::parse(&query);
        }

        #[test]
        fn what_is_escaped_comes_back(text in "\\PC*") {
            let escaped: String = text.bytes().flat_map(|byte| format!("%{byte:02x}").into_bytes()).map(char::from).collect();
            prop_assert_eq!(decode(&escaped), text);
        }
    }
}
