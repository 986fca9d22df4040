//! Records on disk: `<state directory>/attachments/<host interface>.json`.
//!
//! A record is written under another name and renamed, so a process that is killed leaves either the
//! whole record or none. Nothing is synced to the disk: a power loss ends every pod with the kernel,
//! so a record that it took has nothing to protect, and one that survived it names a boot that is
//! over and is dropped when it is read.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use portolan_program::layout::POD_LINK_PREFIX;
use portolan_state::Attachment;
use serde::{Deserialize, Serialize};

/// The longest record that is read, in bytes. Ours have about 500.
const RECORD_BYTES_MAX: u64 = 64 << 10;

/// The form of the records. Another number is another release's.
const RECORD_VERSION: u32 = 1;

const EXTENSION: &str = "json";
const TEMPORARY_EXTENSION: &str = "tmp";

/// One attachment as it is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    /// The kernel's `boot_id` when it was made.
    pub(super) boot: Arc<str>,
    /// Counts the records in the order in which they were made.
    pub(super) sequence: u64,
    /// The CNI network's name: GC is confined to it.
    pub(super) network: Arc<str>,
    pub(super) attachment: Attachment,
}

impl Record {
    pub(super) fn new(boot: Arc<str>, sequence: u64, network: &str, attachment: Attachment) -> Record {
        Record { version: RECORD_VERSION, boot, sequence, network: network.into(), attachment }
    }
}

/// A file among the records that is not one, and so has no effect.
#[derive(Debug, thiserror::Error)]
#[error("the attachment record {} is left out: {reason}", path.display())]
pub struct BookProblem {
    /// The file. It is left where it is.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub reason: RecordProblem,
}

/// Why a file is not a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordProblem {
    /// It cannot be read.
    #[error("it cannot be read; see that the agent may read its state directory")]
    Unreadable(#[source] io::Error),
    /// It is not the JSON of a record: torn by a crash of the machine, or edited.
    #[error("it is torn or not a record ({0}); remove it if no pod of that name is left")]
    Torn(serde_json::Error),
    /// It is longer than any record.
    #[error("it is longer than {RECORD_BYTES_MAX} bytes and not a record; remove it")]
    TooLong,
    /// Its name is not that of a record.
    #[error("its name is not that of a record; remove it or move it elsewhere")]
    Alien,
    /// It was written by another release.
    #[error("it has the form {0}, and this release reads form {RECORD_VERSION}; run the release that wrote it")]
    OtherVersion(u32),
    /// It lacks something that every record has.
    #[error("its {0} is not valid; remove it if no pod of that name is left")]
    Invalid(&'static str),
    /// An earlier record has its address, or its key.
    #[error("{0}; remove the one whose pod is gone")]
    Conflict(String),
}

/// The three steps on disk. Tests crash between them.
pub(super) trait RecordFiles: Send + std::fmt::Debug {
    /// Writes a file under its temporary name.
    fn write_temporary(&mut self, name: &str, content: &[u8]) -> io::Result<()>;
    /// Gives it its own name, at once and whole.
    fn publish(&mut self, name: &str) -> io::Result<()>;
    /// Removes it; it may be gone already.
    fn remove(&mut self, name: &str) -> io::Result<()>;
}

/// The records' directory.
#[derive(Debug, Clone)]
pub(super) struct Directory(pub(super) PathBuf);

impl Directory {
    fn path(&self, name: &str, extension: &str) -> PathBuf {
        self.0.join(format!("{name}.{extension}"))
    }
}

impl RecordFiles for Directory {
    fn write_temporary(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        fs::write(self.path(name, TEMPORARY_EXTENSION), content)
    }

    fn publish(&mut self, name: &str) -> io::Result<()> {
        fs::rename(self.path(name, TEMPORARY_EXTENSION), self.path(name, EXTENSION))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path(name, EXTENSION)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Reads every record of this boot, oldest first. What an interrupted write left, and records of
/// earlier boots, are removed: nothing of either is in the kernel.
pub(super) fn read_all(directory: &Path, boot: &str) -> io::Result<(Vec<Record>, Vec<BookProblem>)> {
    let (mut records, mut problems) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if is_temporary(&path) {
            let _ = fs::remove_file(&path);
            continue;
        }
        match read(&path) {
            Ok(record) if *record.boot == *boot => records.push(record),
            Ok(_) => {
                let _ = fs::remove_file(&path);
            }
            Err(reason) => problems.push(BookProblem { path, reason }),
        }
    }
    records.sort_by(|left, right| (left.sequence, &left.attachment.key).cmp(&(right.sequence, &right.attachment.key)));
    Ok((records, problems))
}

/// Whether a file is what an interrupted write of ours left, and not someone else's.
fn is_temporary(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    path.extension().is_some_and(|extension| extension == TEMPORARY_EXTENSION) && stem.starts_with(POD_LINK_PREFIX)
}

fn read(path: &Path) -> Result<Record, RecordProblem> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if path.extension().is_none_or(|extension| extension != EXTENSION) || !path.is_file() {
        return Err(RecordProblem::Alien);
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(RecordProblem::Unreadable)?;
    file.take(RECORD_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(RecordProblem::Unreadable)?;
    if bytes.len() as u64 > RECORD_BYTES_MAX {
        return Err(RecordProblem::TooLong);
    }
    parse(stem, &bytes)
}

/// Reads a record from the content of the file `<stem>.json`.
pub(super) fn parse(stem: &str, bytes: &[u8]) -> Result<Record, RecordProblem> {
    /// Read first, so that another release's record is called that and not torn.
    #[derive(Deserialize)]
    struct Form {
        version: u32,
    }
    let form: Form = serde_json::from_slice(bytes).map_err(RecordProblem::Torn)?;
    if form.version != RECORD_VERSION {
        return Err(RecordProblem::OtherVersion(form.version));
    }
    let record: Record = serde_json::from_slice(bytes).map_err(RecordProblem::Torn)?;
    let attachment = &record.attachment;
    if *attachment.host_interface != *stem {
        return Err(RecordProblem::Invalid("host_interface"));
    }
    if attachment.key.container.is_empty() || attachment.key.interface.is_empty() {
        return Err(RecordProblem::Invalid("key"));
    }
    if !attachment.namespace_path.starts_with('/') {
        return Err(RecordProblem::Invalid("namespace_path"));
    }
    if attachment.addresses.is_empty() {
        return Err(RecordProblem::Invalid("addresses"));
    }
    Ok(record)
}

/// What tells this boot from all others; empty where the kernel does not say.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}
