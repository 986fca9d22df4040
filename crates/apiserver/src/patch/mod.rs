//! The four ways in which a client changes an object without sending all of it.
//!
//! - JSON merge patch (RFC 7396) and JSON patch (RFC 6902), for every kind;
//! - strategic merge patch, for the kinds whose lists have merge keys (`schema`);
//! - server-side apply (KEP-555), with ownership of fields in `metadata.managedFields`.
//!
//! All of it is pure. A patch that fails leaves its target as it was.

mod apply;
mod field_set;
mod json;
mod schema;
mod strategic;

pub use apply::{ApplyConflict, Conflict, record_update, server_side_apply};
pub use json::{json_merge, json_patch};
pub use strategic::strategic_merge;

/// Why a patch cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// The patch itself is not of the form that its type asks for.
    #[error("the patch is malformed: {0}")]
    Malformed(String),
    /// A JSON patch names a place that the object does not have.
    #[error("operation {operation} names {pointer:?}, which the object does not have")]
    NoSuchPlace {
        /// The position of the operation in the patch.
        operation: usize,
        /// The JSON pointer that it gave.
        pointer: String,
    },
    /// A `test` operation found another value.
    #[error("operation {operation} expected another value at {pointer:?}")]
    TestFailed {
        /// The position of the operation in the patch.
        operation: usize,
        /// The JSON pointer that it gave.
        pointer: String,
    },
    /// An element of a list that is merged by key lacks that key.
    #[error("an element of {field} has no {key:?}, by which the list is merged; give it one")]
    NoMergeKey {
        /// The path of the list.
        field: String,
        /// The merge key.
        key: String,
    },
    /// Custom objects have no merge keys, so this patch type has no meaning for them.
    #[error("{0} has no strategic merge patch; use application/merge-patch+json")]
    NotSupported(String),
}
