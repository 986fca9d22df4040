//! Answers: one value, a table of it, or a stream of changes.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::request::Form;
use crate::api::{List, Place, WatchEvent, Watching, now_seconds};
use crate::fields::at;
use crate::resources::api_version;
use crate::status::ApiError;
use crate::table;

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;
pub(crate) type Answer = Response<Body>;

pub(super) fn bytes_body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

pub(super) fn text_answer(text: &'static str) -> Answer {
    let mut answer = Response::new(bytes_body(text));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

pub(super) fn value_answer(code: u16, value: &Value) -> Answer {
    let mut text = value.to_string();
    text.push('\n');
    let mut answer = Response::new(bytes_body(text));
    *answer.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    answer
}

/// How much of each object goes along with its row in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Include {
    None,
    Metadata,
    Object,
}

/// The form of an answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) form: Form,
    pub(super) include: Include,
}

impl Shape {
    /// One object.
    pub(super) fn object(self, place: &Place, object: Value) -> Value {
        match self.form {
            Form::Json => object,
            Form::Metadata => metadata_of(&object, "PartialObjectMetadata"),
            Form::Table => {
                let revision = at(&object, "metadata.resourceVersion").clone();
                self.table(place, &[object], &json!({"resourceVersion": revision}))
            }
        }
    }

    /// A list.
    pub(super) fn list(self, place: &Place, list: List) -> Value {
        let mut metadata = json!({"resourceVersion": list.revision.to_string()});
        if let Some(continuation) = &list.continuation {
            metadata["continue"] = continuation.as_str().into();
        }
        if let Some(remaining) = list.remaining {
            metadata["remainingItemCount"] = remaining.into();
        }
        match self.form {
            Form::Table => self.table(place, &list.items, &metadata),
            Form::Metadata => {
                let items = list.items.iter().map(|object| metadata_of(object, "PartialObjectMetadata"));
                let items: Vec<Value> = items.collect();
                let kind = "PartialObjectMetadataList";
                json!({"kind": kind, "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "items": items})
            }
            Form::Json => {
                let kind = format!("{}List", place.resource.kind);
                let version = api_version(&place.resource.group, &place.version);
                let mut value = json!({"kind": kind, "apiVersion": version, "metadata": metadata});
                // Moved in, since `json!` would copy each of them.
                value["items"] = Value::Array(list.items);
                value
            }
        }
    }

    fn table(self, place: &Place, objects: &[Value], metadata: &Value) -> Value {
        let columns = place.resource.printer_columns.get(&place.version);
        let mut table = match columns {
            Some(columns) => table::render_custom(columns, objects, now_seconds()),
            None => table::render(&place.resource.kind, objects, now_seconds()),
        };
        table["metadata"] = metadata.clone();
        let rows = table.get_mut("rows").and_then(Value::as_array_mut).into_iter().flatten();
        for (row, object) in rows.zip(objects) {
            row["object"] = match self.include {
                Include::None => Value::Null,
                Include::Metadata => metadata_of(object, "PartialObjectMetadata"),
                Include::Object => object.clone(),
            };
        }
        table
    }
}

fn metadata_of(object: &Value, kind: &str) -> Value {
    json!({"kind": kind, "apiVersion": "meta.k8s.io/v1", "metadata": at(object, "metadata")})
}

/// The annotation of the bookmark after the objects that were there.
const PRESENT_END: &str = "k8s.io/initial-events-end";

/// What a client wants of a watch besides changes.
#[derive(Debug, Clone, Copy)]
pub(super) struct WatchWishes {
    pub(super) bookmarks: bool,
    pub(super) present_end: bool,
    pub(super) time: Duration,
}

/// A watch under way.
struct Flow {
    watching: Watching,
    place: Place,
    shape: Shape,
    wants_bookmarks: bool,
    /// Whether a bookmark tells when all objects that were there have been sent: KEP-3157.
    wants_present_end: bool,
    deadline: Instant,
    /// Column names go with the first table only, as clients expect.
    has_sent_columns: bool,
    is_over: bool,
}

/// A stream of watch events, one JSON text a line, until its time is over or the watch ends.
pub(super) fn watch_answer(watching: Watching, place: Place, shape: Shape, wishes: WatchWishes) -> Answer {
    let flow = Flow {
        watching,
        place,
        shape,
        wants_bookmarks: wishes.bookmarks,
        wants_present_end: wishes.present_end,
        deadline: Instant::now() + wishes.time,
        has_sent_columns: false,
        is_over: false,
    };
    let lines = stream::unfold(flow, |mut flow| async move {
        let line = flow.next_line().await?;
        Some((Ok::<_, Infallible>(Frame::data(line)), flow))
    });
    let mut answer = Response::new(StreamBody::new(lines).boxed_unsync());
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    answer
}

impl Flow {
    async fn next_line(&mut self) -> Option<Bytes> {
        while !self.is_over {
            // When the time is over the stream ends without an error, and the client resumes.
            let event = tokio::time::timeout_at(self.deadline, self.watching.next()).await.ok()?;
            let (kind, object) = match event {
                Ok(WatchEvent::Object(kind, object)) => (kind.as_str(), self.object(object)),
                Ok(WatchEvent::Bookmark(revision)) if self.wants_bookmarks => ("BOOKMARK", self.bookmark(revision)),
                Ok(WatchEvent::PresentEnd(revision)) if self.wants_bookmarks && self.wants_present_end => {
                    let mut bookmark = self.bookmark(revision);
                    bookmark["metadata"]["annotations"] = json!({PRESENT_END: "true"});
                    ("BOOKMARK", bookmark)
                }
                Ok(WatchEvent::Bookmark(_) | WatchEvent::PresentEnd(_)) => continue,
                Err(error) => {
                    self.is_over = true;
                    ("ERROR", error.to_value())
                }
            };
            return Some(format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n").into());
        }
        None
    }

    fn object(&mut self, object: Value) -> Value {
        let mut shaped = self.shape.object(&self.place, object);
        if self.shape.form == Form::Table {
            if self.has_sent_columns {
                shaped["columnDefinitions"] = json!([]);
            }
            self.has_sent_columns = true;
        }
        shaped
    }

    fn bookmark(&self, revision: u64) -> Value {
        let metadata = json!({"resourceVersion": revision.to_string()});
        match self.shape.form {
            Form::Json => json!({
                "kind": self.place.resource.kind,
                "apiVersion": api_version(&self.place.resource.group, &self.place.version),
                "metadata": metadata,
            }),
            Form::Metadata => metadata_of(&json!({"metadata": metadata}), "PartialObjectMetadata"),
            Form::Table => json!({
                "kind": "Table",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": metadata,
                "columnDefinitions": [],
                "rows": [],
            }),
        }
    }
}

/// What a client gets when it watches from where history is gone: a stream with one error, since that
/// is where clients look for it.
pub(super) fn watch_refusal(error: &ApiError) -> Answer {
    value_answer(200, &json!({"type": "ERROR", "object": error.to_value()}))
}
