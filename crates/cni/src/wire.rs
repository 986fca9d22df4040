//! What plugin and agent say to each other: one line of JSON each, and then the connection closes.

use alloc::vec::Vec;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::limits::LINE_BYTES_MAX;
use crate::{AddResult, CniError, NetworkConfiguration, Parameters};

/// One call, as the plugin hands it on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// What the environment said.
    pub parameters: Parameters,
    /// What standard input said.
    pub configuration: NetworkConfiguration,
}

/// The agent's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Response {
    /// ADD is done; the plugin renders this for the version that the runtime asked for.
    Added(AddResult),
    /// DEL, CHECK, GC and STATUS have nothing to say.
    Done,
    /// The call failed.
    Failed(CniError),
}

impl From<Result<Response, CniError>> for Response {
    fn from(result: Result<Response, CniError>) -> Response {
        result.unwrap_or_else(Response::Failed)
    }
}

impl Request {
    /// The line, with its end. Code 5 where it would be longer than the agent reads.
    pub fn encode(&self) -> Result<Vec<u8>, CniError> {
        encode(self)
    }

    /// Reads a line, with or without its end.
    pub fn decode(line: &[u8]) -> Result<Request, CniError> {
        decode(line, "the plugin's request")
    }
}

impl Response {
    /// The line, with its end.
    pub fn encode(&self) -> Result<Vec<u8>, CniError> {
        encode(self)
    }

    /// Reads a line, with or without its end.
    pub fn decode(line: &[u8]) -> Result<Response, CniError> {
        decode(line, "the agent's answer")
    }
}

fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CniError> {
    // JSON escapes every line break inside a text, so the only one in the line is its end.
    let mut line = serde_json::to_vec(message)
        .map_err(|error| CniError::io(format!("a message between plugin and agent cannot be written: {error}")))?;
    line.push(b'\n');
    if line.len() > LINE_BYTES_MAX {
        let length = line.len();
        return Err(CniError::io(format!(
            "a message between plugin and agent has {length} bytes; at most {LINE_BYTES_MAX} are read"
        )));
    }
    Ok(line)
}

fn decode<T: DeserializeOwned>(line: &[u8], what: &str) -> Result<T, CniError> {
    if line.len() > LINE_BYTES_MAX {
        return Err(CniError::decode(format!("{what} is longer than {LINE_BYTES_MAX} bytes")));
    }
    serde_json::from_slice(line).map_err(|error| {
        CniError::decode(format!("{what} cannot be read: {error}"))
            .with_details("plugin and agent must be of the same release: install both from one binary")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_line_is_read_or_refused(bytes: Vec<u8>, text in "[\\[\\]{}\":,a-zA-Z0-9]{0,60}") {
            let _ = (Request::decode(&bytes), Response::decode(&bytes));
            let _ = (Request::decode(text.as_bytes()), Response::decode(text.as_bytes()));
        }

        #[test]
        fn messages_round_trip_on_one_line(message: String, details: String, code: u32) {
            let response = Response::Failed(CniError { code: code.into(), message, details });
            let line = response.encode().unwrap();
            prop_assert_eq!(line.split(|byte| *byte == b'\n').count(), 2);
            prop_assert_eq!(Response::decode(&line).unwrap(), response);
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_refused_at_the_bound() {
        let fits = Response::Failed(CniError::io("x".repeat(LINE_BYTES_MAX - 60)));
        assert!(fits.encode().is_ok());
        let long = Response::Failed(CniError::io("x".repeat(LINE_BYTES_MAX)));
        assert_eq!(long.encode().unwrap_err().code.number(), 5);
        assert_eq!(Response::decode(&vec![b' '; LINE_BYTES_MAX + 1]).unwrap_err().code.number(), 6);
    }
}
