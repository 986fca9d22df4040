//! The book of attachments: records in memory, on disk, and the addresses that they hold.
//!
//! ```text
//!   ADD   address ─▶ record on disk ─▶ [kernel] ─▶ answer
//!   DEL   [kernel is rid of it] ─▶ record removed ─▶ address free ─▶ answer
//! ```
//!
//! After a crash the records say what the kernel should hold, and the runtime repeats the call that
//! was not answered: an ADD finds its record and its addresses, a DEL removes what is left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use portolan_cni::{CniError, NetworkConfiguration, Parameters, Request};
use portolan_ipam::{AddressesProblem, AllocateError, PodAddresses};
use portolan_net::MacAddress;
use portolan_program::layout::POD_LINK_PREFIX;
use portolan_state::{Attachment, AttachmentKey};

use super::record::{self, BookProblem, Directory, Record, RecordFiles, RecordProblem};

/// How many names are tried for the node's end of an interface before giving up. Two of 65,536 names
/// of 32 bits collide with a chance of a half; sixteen in a row never do.
const NAME_ATTEMPTS: u32 = 16;

/// The book cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("the directory of attachment records {} cannot be used; see that the agent may write its state directory", path.display())]
pub struct BookError {
    /// The directory.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// The attachments of this node.
#[derive(Debug)]
pub struct AttachmentBook {
    files: Box<dyn RecordFiles>,
    boot: Arc<str>,
    records: BTreeMap<AttachmentKey, Record>,
    addresses: PodAddresses<AttachmentKey>,
    next_sequence: u64,
}

impl AttachmentBook {
    /// Opens the book in a state directory, which is made where it is missing. Files that are not
    /// records are reported and have no effect on the others.
    pub fn load(state_directory: &Path) -> Result<(AttachmentBook, Vec<BookProblem>), BookError> {
        AttachmentBook::load_in_boot(state_directory, &record::boot_id())
    }

    pub(super) fn load_in_boot(
        state_directory: &Path,
        boot: &str,
    ) -> Result<(AttachmentBook, Vec<BookProblem>), BookError> {
        let directory = state_directory.join("attachments");
        let failed = |source| BookError { path: directory.clone(), source };
        fs::create_dir_all(&directory).map_err(failed)?;
        let (records, mut problems) = record::read_all(&directory, boot).map_err(failed)?;
        let mut book = AttachmentBook {
            files: Box::new(Directory(directory.clone())),
            boot: boot.into(),
            records: BTreeMap::new(),
            addresses: PodAddresses::default(),
            next_sequence: records.last().map_or(0, |newest| newest.sequence.saturating_add(1)),
        };
        for record in records {
            let path = directory.join(format!("{}.json", record.attachment.host_interface));
            if let Err(reason) = book.adopt(record) {
                problems.push(BookProblem { path, reason });
            }
        }
        problems.sort_by(|left, right| left.path.cmp(&right.path));
        Ok((book, problems))
    }

    #[cfg(test)]
    pub(super) fn set_files(&mut self, files: Box<dyn RecordFiles>) {
        self.files = files;
    }

    fn adopt(&mut self, record: Record) -> Result<(), RecordProblem> {
        let key = record.attachment.key.clone();
        if self.records.contains_key(&key) {
            return Err(RecordProblem::Conflict(format!("another record is of {key}, too")));
        }
        self.addresses.adopt(&key, &record.attachment.addresses).map_err(|problem| {
            RecordProblem::Conflict(match problem {
                AddressesProblem::Taken { address, owner } => format!("{address} is recorded for {owner}, too"),
                AddressesProblem::OwnsOthers { owner } => format!("{owner} has other addresses"),
            })
        })?;
        self.records.insert(key, record);
        Ok(())
    }

    /// Sets the node's pod prefixes. Attachments keep the addresses that they have.
    pub fn set_prefixes(&mut self, prefixes: &[IpNet]) {
        self.addresses.set_prefixes(prefixes);
    }

    /// Records an attachment and gives it addresses. When this returns, the record is on disk; the
    /// caller then makes the interface, and answers when it is there. Where that fails for good, the
    /// caller undoes it and calls [`AttachmentBook::remove`].
    ///
    /// A second ADD for the same network, container, interface and namespace returns the same
    /// record: the first one's answer may have been lost in a crash, and what is made once is not
    /// made again. With another namespace it is an error, since the interface would be in both.
    ///
    /// `mtu` is what the pods' links have on this node; a configuration that wants another is
    /// refused, not ignored.
    pub fn add(&mut self, request: &Request, mtu: u32) -> Result<Attachment, CniError> {
        let Request { parameters, configuration } = request;
        if let Some(wanted) = configuration.mtu.filter(|wanted| *wanted != 0 && *wanted != mtu) {
            return Err(CniError::unsupported_field(format!(
                "mtu={wanted} is not supported: pods on this node have {mtu}"
            ))
            .with_details("remove `mtu` from the network configuration; the agent works it out from the fabric"));
        }
        let key = key_of(parameters);
        if let Some(record) = self.records.get(&key) {
            return same_attachment(record, parameters, configuration);
        }
        let attachment = self.new_attachment(key.clone(), parameters, configuration)?;
        let record = Record::new(self.boot.clone(), self.next_sequence, &configuration.name, attachment.clone());
        if let Err(error) = self.write(&record) {
            self.addresses.release(&key);
            return Err(CniError::io(format!("the record of {key} cannot be written: {error}"))
                .with_details("see that the agent's state directory has room and may be written"));
        }
        self.next_sequence += 1;
        self.records.insert(key, record);
        Ok(attachment)
    }

    fn new_attachment(
        &mut self,
        key: AttachmentKey,
        parameters: &Parameters,
        configuration: &NetworkConfiguration,
    ) -> Result<Attachment, CniError> {
        let runtime_mac = configuration.runtime_config.as_ref().and_then(|runtime| runtime.mac);
        let wanted_mac = runtime_mac.or(parameters.mac);
        // The lowest bit of the first byte marks a group (IEEE 802, "I/G bit").
        if let Some(mac) = wanted_mac.filter(|mac| mac.0[0] & 1 == 1 || mac.0 == [0; 6]) {
            return Err(CniError::unsupported_field(format!("mac={mac} cannot be an interface's address")));
        }
        let (host_interface, mac) = self.names_for(&key, wanted_mac)?;
        let addresses = self.addresses.allocate(&key).map_err(|error| allocate_error(&error))?;
        Ok(Attachment {
            key,
            namespace_path: parameters.namespace_path.as_str().into(),
            pod: parameters.pod.clone(),
            addresses,
            host_interface: host_interface.into(),
            mac,
        })
    }

    /// The name of the node's end and the hardware address of the pod's, both from a hash of the
    /// key, so that they are the same after a restart; hashed again where another has one of them.
    fn names_for(&self, key: &AttachmentKey, wanted: Option<MacAddress>) -> Result<(String, MacAddress), CniError> {
        (0..NAME_ATTEMPTS)
            .map(|attempt| names(key, attempt))
            .map(|(name, mac)| (name, wanted.unwrap_or(mac)))
            .find(|(name, mac)| {
                self.records
                    .values()
                    .map(|record| &record.attachment)
                    .all(|other| *other.host_interface != **name && (wanted.is_some() || other.mac != *mac))
            })
            .ok_or_else(|| CniError::try_again_later(format!("no free name is found for the interface of {key}")))
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        let name = &record.attachment.host_interface;
        self.files.write_temporary(name, &serde_json::to_vec_pretty(record)?)?;
        self.files.publish(name)
    }

    /// Removes the record and frees the addresses, after the interface is gone. `None` if there is
    /// no such record: a DEL may come twice.
    pub fn remove(&mut self, key: &AttachmentKey) -> Result<Option<Attachment>, CniError> {
        let Some(record) = self.records.get(key) else { return Ok(None) };
        self.files.remove(&record.attachment.host_interface).map_err(|error| {
            CniError::io(format!("the record of {key} cannot be removed: {error}"))
                .with_details("see that the agent's state directory may be written")
        })?;
        self.addresses.release(key);
        Ok(self.records.remove(key).map(|record| record.attachment))
    }

    /// One attachment.
    pub fn get(&self, key: &AttachmentKey) -> Option<&Attachment> {
        self.records.get(key).map(|record| &record.attachment)
    }

    /// All attachments, by key.
    pub fn list(&self) -> impl Iterator<Item = &Attachment> {
        self.records.values().map(|record| &record.attachment)
    }

    /// What a GC call is to remove: every attachment of its network that the runtime does not name.
    /// The caller removes each as for a DEL, and goes on after errors. A call without
    /// `cni.dev/valid-attachments` is refused: a forgotten field must not remove every pod.
    pub fn collect_garbage(&self, configuration: &NetworkConfiguration) -> Result<Vec<AttachmentKey>, CniError> {
        let Some(valid) = &configuration.valid_attachments else {
            return Err(CniError::invalid_configuration(
                "GC needs `cni.dev/valid-attachments`, the list of what must stay",
            ));
        };
        let valid: BTreeSet<(&str, &str)> =
            valid.iter().map(|valid| (valid.container.as_str(), valid.interface.as_str())).collect();
        Ok(self
            .records
            .iter()
            .filter(|(_, record)| *record.network == *configuration.name)
            .map(|(key, _)| key)
            .filter(|key| !valid.contains(&(&*key.container, &*key.interface)))
            .cloned()
            .collect())
    }

    /// Whether ADD would find an address.
    pub fn check_free(&self) -> Result<(), AllocateError> {
        self.addresses.check_free()
    }

    /// The node's pod prefixes, and how many addresses of each are in use.
    pub fn in_use(&self) -> Vec<(IpNet, usize)> {
        self.addresses.in_use()
    }
}

/// The key of the attachment that a call is about.
pub fn key_of(parameters: &Parameters) -> AttachmentKey {
    AttachmentKey { container: parameters.container.as_str().into(), interface: parameters.interface.as_str().into() }
}

fn same_attachment(
    record: &Record,
    parameters: &Parameters,
    configuration: &NetworkConfiguration,
) -> Result<Attachment, CniError> {
    let attachment = &record.attachment;
    let key = &attachment.key;
    if *attachment.namespace_path == *parameters.namespace_path && *record.network == *configuration.name {
        return Ok(attachment.clone());
    }
    let (namespace, network) = (&attachment.namespace_path, &record.network);
    Err(CniError::attachment_exists(format!(
        "{key} exists already, in the network `{network}` and the namespace {namespace}"
    ))
    .with_details("the runtime must call DEL for it before it calls ADD again"))
}

fn allocate_error(error: &AllocateError) -> CniError {
    match error {
        AllocateError::NoPrefix => CniError::try_again_later(error.to_string())
            .with_details("see that the cluster gives its nodes pod CIDRs, and that the agent reaches the API server"),
        AllocateError::Exhausted { .. } => CniError::addresses_exhausted(error.to_string())
            .with_details("remove pods from this node, call GC, or give the node a larger pod CIDR"),
    }
}

/// 72 bits of a hash of the key: 32 for the name, 40 for the hardware address. Which hash it is does
/// not matter beyond that it never changes: FNV-1a, twice with different starts, each finished as in
/// `MurmurHash3` so that the last bytes reach every bit.
pub(super) fn names(key: &AttachmentKey, attempt: u32) -> (String, MacAddress) {
    let hash = |start: u64| {
        let bytes =
            key.container.bytes().chain([0]).chain(key.interface.bytes()).chain([0]).chain(attempt.to_be_bytes());
        let sum = bytes.fold(start, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let sum = (sum ^ (sum >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        sum ^ (sum >> 33)
    };
    let name = format!("{POD_LINK_PREFIX}{:08x}", hash(0xcbf2_9ce4_8422_2325) as u32);
    let [_, _, _, mac @ ..] = hash(0x6c62_272e_07bb_0142).to_be_bytes();
    (name, MacAddress::local(mac))
}
