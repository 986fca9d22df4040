//! Verbs on objects: from method, path and query to a call.

use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, USER_AGENT};
use http::{Method, Request};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::request::{Form, Query, Target, form};
use super::respond::{Answer, Include, Shape, WatchWishes, value_answer, watch_answer, watch_refusal};
use super::{body, query};
use crate::api::{
    Api, DeleteOptions, Deleted, ListRequest, Part, Place, ScaleRequest, Selection, WatchStart, WriteOptions,
};
use crate::fields::at;
use crate::limits::WATCH_DURATION_MAX;
use crate::status::ApiError;

/// The parts that objects have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subresource {
    Whole,
    Status,
    Scale,
    /// A namespace's `finalize`, which changes `spec.finalizers`.
    Finalize,
}

/// One request about objects.
struct Call {
    place: Place,
    subresource: Subresource,
    query: Query,
    shape: Shape,
    manager: String,
}

pub(super) async fn answer(api: &Arc<Api>, request: Request<Incoming>, target: Target) -> Result<Answer, ApiError> {
    let call = read_call(api, &request, target)?;
    let method = request.method().clone();
    let is_collection = call.place.name.is_empty();
    match (method, is_collection) {
        (Method::GET | Method::HEAD, true) if call.query.flag("watch") => call.watch(api).await,
        (Method::GET | Method::HEAD, true) => call.list(api).await,
        (Method::GET | Method::HEAD, false) => call.get(api).await,
        (Method::POST, true) => call.create(api, request).await,
        (Method::PUT, false) => call.replace(api, request).await,
        (Method::PATCH, false) => call.patch(api, request).await,
        (Method::DELETE, false) => call.delete(api, request).await,
        (Method::DELETE, true) => call.delete_collection(api, request).await,
        _ => Err(ApiError::method_not_allowed()),
    }
}

fn read_call(api: &Arc<Api>, request: &Request<Incoming>, target: Target) -> Result<Call, ApiError> {
    let resources = api.resources();
    let resource = resources.find(&target.group, &target.version, &target.plural).ok_or_else(ApiError::no_such_path)?;
    let subresource = match target.subresource.as_deref() {
        None => Subresource::Whole,
        Some("status") if resource.has_status => Subresource::Status,
        Some("scale") if resource.has_scale => Subresource::Scale,
        Some("finalize") if resource.is("", "Namespace") => Subresource::Finalize,
        Some(_) => return Err(ApiError::no_such_path()),
    };
    let is_one = target.name.is_some();
    let misplaced = match &target.namespace {
        Some(_) => !resource.is_namespaced,
        // All namespaces at once can be listed, and nothing else.
        None => resource.is_namespaced && (is_one || !matches!(*request.method(), Method::GET | Method::HEAD)),
    };
    if misplaced {
        return Err(ApiError::no_such_path());
    }
    let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
    let query = query(request);
    let include = match query.get("includeObject") {
        "None" => Include::None,
        "Object" => Include::Object,
        _ => Include::Metadata,
    };
    // As kube-apiserver: who does not name itself is known by what comes before the slash of its agent.
    let manager = match query.get("fieldManager") {
        "" if *request.method() == Method::PATCH && body::media_type(request).contains("apply-patch") => "",
        "" => header(USER_AGENT).split('/').next().unwrap_or("").trim(),
        named => named,
    };
    let place = Place {
        resource: Arc::clone(resource),
        version: target.version,
        namespace: target.namespace.unwrap_or_default(),
        name: target.name.unwrap_or_default(),
    };
    let shape = Shape { form: form(header(ACCEPT))?, include };
    Ok(Call { place, subresource, shape, manager: manager.to_owned(), query })
}

impl Call {
    fn options(&self) -> Result<WriteOptions, ApiError> {
        Ok(WriteOptions { is_dry_run: self.is_dry_run()?, manager: self.manager.clone() })
    }

    fn is_dry_run(&self) -> Result<bool, ApiError> {
        match self.query.get("dryRun") {
            "" => Ok(false),
            "All" => Ok(true),
            other => Err(ApiError::bad_request(format!("dryRun={other:?} is not supported; use All"))),
        }
    }

    fn part(&self) -> Part {
        if self.subresource == Subresource::Status { Part::Status } else { Part::Wanted }
    }

    fn selection(&self) -> Result<Selection, ApiError> {
        Selection::parse(self.query.get("labelSelector"), self.query.get("fieldSelector"))
    }

    fn list_request(&self) -> Result<ListRequest, ApiError> {
        let limit = usize::try_from(self.query.number("limit")?.unwrap_or(0)).unwrap_or(usize::MAX);
        let continuation = self.query.get("continue").to_owned();
        let version = self.query.number("resourceVersion")?.unwrap_or(0);
        // Kubernetes' table of "semantics for get and list": a page that names a version means exactly
        // that one; otherwise the answer is at least as new.
        let (revision, at_least) = match self.query.get("resourceVersionMatch") {
            _ if !continuation.is_empty() => (0, 0),
            "Exact" => (version, 0),
            "" if limit > 0 => (version, 0),
            _ => (0, version),
        };
        Ok(ListRequest { selection: self.selection()?, limit, continuation, revision, at_least })
    }

    fn object_answer(&self, code: u16, object: Value) -> Answer {
        let is_scale = self.subresource == Subresource::Scale;
        let object = if is_scale { object } else { self.shape.object(&self.place, object) };
        value_answer(code, &object)
    }

    async fn list(&self, api: &Api) -> Result<Answer, ApiError> {
        let list = api.list(&self.place, &self.list_request()?).await?;
        Ok(value_answer(200, &self.shape.list(&self.place, list)))
    }

    async fn watch(self, api: &Api) -> Result<Answer, ApiError> {
        let start = match self.query.number("resourceVersion")? {
            None | Some(0) => WatchStart::Present,
            _ if self.query.flag("sendInitialEvents") => WatchStart::Present,
            Some(revision) => WatchStart::After(revision),
        };
        // 0 is how clients write "no limit of mine".
        let seconds = self.query.number("timeoutSeconds")?.filter(|seconds| *seconds > 0);
        let time = seconds.map_or(WATCH_DURATION_MAX, Duration::from_secs);
        let wishes = WatchWishes {
            bookmarks: self.query.flag("allowWatchBookmarks"),
            present_end: self.query.flag("sendInitialEvents"),
            time: time.min(WATCH_DURATION_MAX),
        };
        match api.watch(&self.place, self.selection()?, start).await {
            Ok(watching) => Ok(watch_answer(watching, self.place, self.shape, wishes)),
            Err(error) if error.code == 410 => Ok(watch_refusal(&error)),
            Err(error) => Err(error),
        }
    }

    async fn get(&self, api: &Api) -> Result<Answer, ApiError> {
        let object = match self.subresource {
            Subresource::Scale => api.scale(&self.place, ScaleRequest::Get, &self.options()?).await?,
            _ => api.get(&self.place).await?,
        };
        Ok(self.object_answer(200, object))
    }

    async fn create(&self, api: &Api, request: Request<Incoming>) -> Result<Answer, ApiError> {
        let body = body::object(request).await?;
        let created = api.create(&self.place, body, &self.options()?).await?;
        Ok(self.object_answer(201, created))
    }

    async fn replace(&self, api: &Api, request: Request<Incoming>) -> Result<Answer, ApiError> {
        let body = body::object(request).await?;
        let object = match self.subresource {
            Subresource::Scale => api.scale(&self.place, ScaleRequest::Replace(&body), &self.options()?).await?,
            _ => api.replace(&self.place, self.part(), &body, &self.options()?).await?,
        };
        Ok(self.object_answer(200, object))
    }

    async fn patch(&self, api: &Api, request: Request<Incoming>) -> Result<Answer, ApiError> {
        let kind = body::patch_kind(&request, self.query.flag("force"))?;
        let body = body::patch(request, kind).await?;
        let object = match self.subresource {
            Subresource::Scale => api.scale(&self.place, ScaleRequest::Patch(kind, &body), &self.options()?).await?,
            _ => api.patch(&self.place, self.part(), kind, &body, &self.options()?).await?,
        };
        Ok(self.object_answer(200, object))
    }

    async fn delete_options(&self, request: Request<Incoming>) -> Result<DeleteOptions, ApiError> {
        let mut options = DeleteOptions::from_object(&body::object(request).await?);
        if let Some(seconds) = self.query.number("gracePeriodSeconds")? {
            options.grace_seconds = Some(i64::try_from(seconds).unwrap_or(i64::MAX));
        }
        if !self.query.get("propagationPolicy").is_empty() {
            let policy = json!({"propagationPolicy": self.query.get("propagationPolicy")});
            options.dependents = DeleteOptions::from_object(&policy).dependents;
        }
        options.is_dry_run |= self.is_dry_run()?;
        Ok(options)
    }

    async fn delete(&self, api: &Api, request: Request<Incoming>) -> Result<Answer, ApiError> {
        if self.subresource != Subresource::Whole {
            return Err(ApiError::method_not_allowed());
        }
        let options = self.delete_options(request).await?;
        match api.delete(&self.place, &options).await? {
            Deleted::Marked(object) => Ok(self.object_answer(200, object)),
            Deleted::Gone(object) => {
                let details = json!({
                    "name": self.place.name,
                    "group": self.place.resource.group,
                    "kind": self.place.resource.plural,
                    "uid": at(&object, "metadata.uid"),
                });
                let status = json!({
                    "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
                });
                Ok(value_answer(200, &status))
            }
        }
    }

    async fn delete_collection(&self, api: &Api, request: Request<Incoming>) -> Result<Answer, ApiError> {
        let options = self.delete_options(request).await?;
        let list = api.delete_collection(&self.place, &self.list_request()?, &options).await?;
        let shape = Shape { form: Form::Json, ..self.shape };
        Ok(value_answer(200, &shape.list(&self.place, list)))
    }
}
