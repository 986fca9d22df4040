//! Get and list.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use portolan_store::{KeyRange, KeyValue, RangeRequest, StoreError};
use serde_json::Value;
use std::sync::Arc;

use super::{Api, Place, Selection, decode};
use crate::limits::{LIST_CHUNK_KEYS, LIST_ITEMS_MAX};
use crate::status::ApiError;

/// Which objects to list.
#[derive(Debug, Clone, Default)]
pub(crate) struct ListRequest {
    pub(crate) selection: Selection,
    /// 0 is all.
    pub(crate) limit: usize,
    /// From the page before; empty for the first.
    pub(crate) continuation: String,
    /// As of this revision; 0 is now.
    pub(crate) revision: u64,
    /// Not as of an older one than this.
    pub(crate) at_least: u64,
}

/// One page of a list.
#[derive(Debug)]
pub(crate) struct List {
    pub(crate) items: Vec<Value>,
    pub(crate) revision: u64,
    pub(crate) continuation: Option<String>,
    /// How many follow; only known when nothing is filtered.
    pub(crate) remaining: Option<usize>,
}

impl Api {
    pub(crate) async fn get(&self, place: &Place) -> Result<Value, ApiError> {
        let item = self.item(&place.key()).await?.ok_or_else(|| place.not_found())?;
        place.decode(&item)
    }

    /// The stored version at a key.
    pub(super) async fn item(&self, key: &str) -> Result<Option<Arc<KeyValue>>, ApiError> {
        let read = self.store.range(RangeRequest::new(KeyRange::key(key))).await?;
        Ok(read.items.into_iter().next())
    }

    /// Lists the objects at a place that names no object.
    pub(crate) async fn list(&self, place: &Place, request: &ListRequest) -> Result<List, ApiError> {
        let prefix = place.prefix();
        let mut range = KeyRange::prefix(prefix.as_str());
        let mut revision = request.revision;
        if !request.continuation.is_empty() {
            let (token_revision, start) = read_continuation(&request.continuation, &prefix)?;
            revision = token_revision;
            range.start = start.into_bytes();
        } else if let Some(name) = request.selection.fields.required("metadata.name")
            && (!place.namespace.is_empty() || !place.resource.is_namespaced)
        {
            range = KeyRange::key(format!("{prefix}{name}"));
        }
        let limit = if request.limit == 0 { LIST_ITEMS_MAX } else { request.limit };
        let everything = request.selection.is_everything();
        let chunk = if everything { limit } else { limit.max(LIST_CHUNK_KEYS) };
        let mut items = Vec::new();
        let mut last_key = None;
        loop {
            let page = RangeRequest { revision, limit: chunk, ..RangeRequest::new(range.clone()) };
            let page = self.store.range(page).await.map_err(|error| expired_page(error, request))?;
            if page.revision < request.at_least {
                // The client knows another store's future, and must not take this for the present.
                let (requested, current) = (request.at_least, page.revision);
                return Err(StoreError::FutureRevision { requested, current }.into());
            }
            if revision == 0 {
                revision = page.revision;
            }
            let mut left = page.count;
            for item in &page.items {
                if items.len() == limit {
                    let token = last_key.map(|key: &[u8]| continuation(revision, key, &prefix));
                    return Ok(List { items, revision, continuation: token, remaining: everything.then_some(left) });
                }
                left -= 1;
                let object = decode(&place.resource, &place.version, item)?;
                if request.selection.matches(&object) {
                    items.push(object);
                }
                last_key = Some(&item.key);
            }
            match (page.more, page.items.last()) {
                (true, Some(last)) if items.len() < limit => {
                    range.start = after(&last.key);
                    last_key = None;
                }
                (true, Some(last)) => {
                    let token = Some(continuation(revision, &last.key, &prefix));
                    return Ok(List { items, revision, continuation: token, remaining: everything.then_some(left) });
                }
                _ => return Ok(List { items, revision, continuation: None, remaining: None }),
            }
        }
    }
}

/// The first key after `key`.
fn after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

/// Where the next page begins: the list's revision and the key that was last, below the prefix.
fn continuation(revision: u64, last: &[u8], prefix: &str) -> String {
    let last = String::from_utf8_lossy(last.get(prefix.len()..).unwrap_or_default()).into_owned();
    URL_SAFE_NO_PAD.encode(format!("{revision}:{last}"))
}

fn read_continuation(token: &str, prefix: &str) -> Result<(u64, String), ApiError> {
    let parse = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (revision, last) = text.split_once(':')?;
        // Below the prefix and nowhere else, whatever the token says.
        Some((revision.parse().ok()?, format!("{prefix}{last}\0")))
    };
    parse().ok_or_else(|| ApiError::bad_request("continue key is not valid: use the one of the page before, unchanged"))
}

fn expired_page(error: StoreError, request: &ListRequest) -> ApiError {
    match error {
        StoreError::Compacted { .. } if !request.continuation.is_empty() => ApiError::expired(
            "The provided continue parameter is too old to display a consistent list result. You must start a new list \
             without the continue parameter.",
        ),
        other => other.into(),
    }
}
