//! The pod interfaces that this node was asked for: who has which address, durably.
//!
//! - [`AttachmentBook`] answers for the records: one file per attachment, written before anything is
//!   made in the kernel and removed after it is gone.
//! - [`answer`] turns a record into what the CNI specification wants to hear.
//!
//! It promises that no crash, at any point, leaks an address for longer than the runtime takes to
//! repeat its DEL, or gives one address to two pods. It makes nothing in the kernel and starts no
//! thread; the agent's loop does the first and owns the book.

pub mod answer;
mod book;
mod record;

#[cfg(test)]
mod tests;

pub use book::{AttachmentBook, BookError, key_of};
pub use record::{BookProblem, RecordProblem};
