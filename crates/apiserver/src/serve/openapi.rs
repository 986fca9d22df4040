//! The schema documents, without schemas.
//!
//! `kubectl` fetches them before it applies: it looks up the kind, and when the document does not have
//! it, skips client-side validation and takes merge keys from the types it was built with. The server
//! checks what it is sent anyway. So a valid document without definitions is what makes a plain
//! `kubectl apply` work. kubectl 1.20 asks for version 2 as protobuf, newer ones for version 3 first.

use http::Response;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::respond::{Answer, bytes_body, value_answer};

const TITLE: &str = "Portolan";
/// The media type that newer clients ask for. The older one has an `@`, which kubectl 1.20 asks for
/// and then, built with a Go that reads media types strictly, refuses to read in the answer.
const PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
const PROTOBUF_FOR_OLDER: &str = "application/octet-stream";

/// Protobuf's wire type of length-delimited fields.
const LENGTH_DELIMITED: u8 = 2;

/// OpenAPI version 2, in the encoding that the client accepts.
pub(super) fn version_2(accept: &str) -> Answer {
    if !accept.contains("proto-openapi.spec.v2") {
        let info = json!({"title": TITLE, "version": env!("CARGO_PKG_VERSION")});
        return value_answer(200, &json!({"swagger": "2.0", "info": info, "paths": {}, "definitions": {}}));
    }
    let mut answer = Response::new(bytes_body(document()));
    let media_type = if accept.contains(PROTOBUF) { PROTOBUF } else { PROTOBUF_FOR_OLDER };
    answer.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(media_type));
    answer
}

/// OpenAPI version 3: no group has a document, so clients fall back to version 2.
pub(super) fn version_3() -> Value {
    json!({"paths": {}})
}

/// `openapi.v2.Document` of gnostic: swagger (1), info (2), paths (8), definitions (9).
fn document() -> Vec<u8> {
    let mut info = Vec::new();
    field(&mut info, 1, TITLE.as_bytes());
    field(&mut info, 2, env!("CARGO_PKG_VERSION").as_bytes());
    let mut document = Vec::new();
    field(&mut document, 1, b"2.0");
    field(&mut document, 2, &info);
    field(&mut document, 8, &[]);
    field(&mut document, 9, &[]);
    document
}

/// One length-delimited field. Everything here is shorter than 128 bytes, so its length is one byte.
fn field(message: &mut Vec<u8>, number: u8, content: &[u8]) {
    message.push(number << 3 | LENGTH_DELIMITED);
    message.push(content.len() as u8);
    message.extend_from_slice(content);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_fits_its_length() {
        let document = document();
        let mut rest = document.as_slice();
        let mut numbers = Vec::new();
        while let [tag, length, tail @ ..] = rest {
            assert!(*length < 128);
            numbers.push(tag >> 3);
            rest = &tail[usize::from(*length)..];
        }
        assert_eq!(numbers, [1, 2, 8, 9]);
    }
}
