//! What clients send: JSON or YAML, within a bound.

use bytes::Bytes;
use http::Request;
use http::header::CONTENT_TYPE;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde_json::Value;

use crate::api::PatchKind;
use crate::limits::REQUEST_BYTES_MAX;
use crate::status::ApiError;

const OBJECT_TYPES: &str = "application/json, application/yaml";
const PATCH_TYPES: &str = "application/json-patch+json, application/merge-patch+json, \
                           application/strategic-merge-patch+json, application/apply-patch+yaml";

/// The media type without its parameters.
pub(super) fn media_type(request: &Request<Incoming>) -> String {
    let header = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    header.split(';').next().unwrap_or("").trim().to_ascii_lowercase()
}

/// The body as an object; null when it is empty.
pub(super) async fn object(request: Request<Incoming>) -> Result<Value, ApiError> {
    let media_type = media_type(&request);
    if !matches!(media_type.as_str(), "" | "application/json" | "application/yaml") {
        return Err(ApiError::unsupported_media_type(&media_type, OBJECT_TYPES));
    }
    parse(&read(request).await?, media_type == "application/yaml")
}

/// How the patch in the body is to be read.
pub(super) fn patch_kind(request: &Request<Incoming>, is_forced: bool) -> Result<PatchKind, ApiError> {
    match media_type(request).as_str() {
        "application/merge-patch+json" => Ok(PatchKind::Merge),
        "application/strategic-merge-patch+json" => Ok(PatchKind::Strategic),
        "application/json-patch+json" => Ok(PatchKind::Json),
        "application/apply-patch+yaml" | "application/apply-patch+json" => Ok(PatchKind::Apply { is_forced }),
        other => Err(ApiError::unsupported_media_type(other, PATCH_TYPES)),
    }
}

/// The patch in the body.
pub(super) async fn patch(request: Request<Incoming>, kind: PatchKind) -> Result<Value, ApiError> {
    let may_be_yaml = matches!(kind, PatchKind::Apply { .. });
    parse(&read(request).await?, may_be_yaml)
}

async fn read(request: Request<Incoming>) -> Result<Bytes, ApiError> {
    match Limited::new(request.into_body(), REQUEST_BYTES_MAX).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::too_large(REQUEST_BYTES_MAX)),
        Err(error) => Err(ApiError::bad_request(format!("the body of the request cannot be read: {error}"))),
    }
}

fn parse(bytes: &[u8], may_be_yaml: bool) -> Result<Value, ApiError> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Value::Null);
    }
    // Every JSON text is a YAML text too, and JSON's parser is the faster and the stricter one.
    match serde_json::from_slice(bytes) {
        Ok(value) => Ok(value),
        Err(_) if may_be_yaml => serde_saphyr::from_slice(bytes)
            .map_err(|error| ApiError::bad_request(format!("the body of the request is not valid YAML: {error}"))),
        Err(error) => Err(ApiError::bad_request(format!("the body of the request is not valid JSON: {error}"))),
    }
}
