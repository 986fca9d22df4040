//! HTTP: from a request to an answer.
//!
//! ```text
//!   request.rs     paths, queries, accepted forms     discovery.rs   what is served
//!   respond.rs     answers, tables, watch streams     openapi.rs     the schema documents
//!   objects.rs     verbs on objects                   body.rs        what clients send
//! ```

mod body;
mod discovery;
mod objects;
mod openapi;
mod request;
mod respond;

use std::sync::Arc;

use http::header::{ACCEPT, AUTHORIZATION};
use http::{Method, Request};
use hyper::body::Incoming;

use self::request::{Query, Route, route};
use self::respond::{Answer, text_answer, value_answer};
use crate::api::Api;
use crate::status::ApiError;

/// What every connection shares.
pub(crate) struct Service {
    pub(crate) api: Arc<Api>,
    /// The token that TLS clients must show. The Unix socket is guarded by its file mode.
    pub(crate) token: String,
}

/// How a client came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entrance {
    UnixSocket,
    Loopback,
}

impl Service {
    /// Answers one request; a refusal is an answer too.
    pub(crate) async fn answer(&self, entrance: Entrance, request: Request<Incoming>) -> Answer {
        let started = std::time::Instant::now();
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let answer = match self.try_answer(entrance, request).await {
            Ok(answer) => answer,
            Err(error) => value_answer(error.code, &error.to_value()),
        };
        tracing::debug!(%method, path, status = answer.status().as_u16(), took = ?started.elapsed(), "request");
        answer
    }

    async fn try_answer(&self, entrance: Entrance, request: Request<Incoming>) -> Result<Answer, ApiError> {
        let route = route(request.uri().path());
        if entrance == Entrance::Loopback && route != Route::Health && !self.shows_token(&request) {
            return Err(ApiError::unauthorized());
        }
        if let Route::Objects(target) = route {
            return objects::answer(&self.api, request, target).await;
        }
        if route == Route::Unknown {
            return Err(ApiError::no_such_path());
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(ApiError::method_not_allowed());
        }
        let resources = self.api.resources();
        let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("");
        let document = match &route {
            Route::Health => return Ok(text_answer("ok")),
            Route::Version => discovery::version(),
            Route::Root => discovery::root(&resources),
            Route::CoreVersions => discovery::core_versions(),
            Route::Groups => discovery::groups(&resources),
            Route::Group(group) => discovery::group(&resources, group).ok_or_else(ApiError::no_such_path)?,
            Route::GroupVersion(group, version) => {
                discovery::group_version(&resources, group, version).ok_or_else(ApiError::no_such_path)?
            }
            Route::OpenApiV2 => return Ok(openapi::version_2(accept)),
            Route::OpenApiV3 => openapi::version_3(),
            Route::Objects(_) | Route::Unknown => return Err(ApiError::no_such_path()),
        };
        Ok(value_answer(200, &document))
    }

    /// Compares in a time that does not depend on where the tokens differ.
    fn shows_token(&self, request: &Request<Incoming>) -> bool {
        let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = header.and_then(|header| header.strip_prefix("Bearer ")).unwrap_or("").trim();
        let differences = shown.bytes().zip(self.token.bytes()).fold(0, |sum, (left, right)| sum | (left ^ right));
        shown.len() == self.token.len() && differences == 0
    }
}

fn query(request: &Request<Incoming>) -> Query {
    Query::parse(request.uri().query().unwrap_or(""))
}
