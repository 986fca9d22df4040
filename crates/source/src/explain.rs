//! Failures of the API, in words that help: what happened, and what to do.

use std::error::Error;

use kube::runtime::watcher;
use portolan_net::ObjectKind;

/// An error with the causes that it does not print itself.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

/// Reason and hint for a table that cannot be read.
pub(crate) fn failure(table: ObjectKind, error: &watcher::Error) -> (String, String) {
    let (action, code) = match error {
        watcher::Error::InitialListFailed(cause) => ("list", code_of(cause)),
        _ => ("watch", watch_code(error)),
    };
    let hint = match code {
        Some(401) => "the server does not know who asks: renew the token or the certificate".to_owned(),
        Some(403) => format!("allow this account to list and watch {table} objects"),
        Some(404) => format!("the server does not serve {table}: it is too old, or an extension is missing"),
        Some(429 | 500..=599) => "the server is overloaded or starting: look at its log".to_owned(),
        Some(_) => "look at the server's log".to_owned(),
        None => "look whether the server runs and can be reached from here".to_owned(),
    };
    (format!("cannot {action} {table} objects: {}", chain(error)), hint)
}

/// The status with which the server refused or ended a watch: in place of its events, or as one.
pub(crate) fn watch_code(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::WatchStartFailed(cause) | watcher::Error::WatchFailed(cause) => code_of(cause),
        watcher::Error::WatchError(status) => Some(status.code),
        watcher::Error::InitialListFailed(_) | watcher::Error::NoResourceVersion => None,
    }
}

/// The HTTP status that the server answered with, if it answered.
pub(crate) fn code_of(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}
