//! Observe and apply.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::{Command as Process, Stdio};
use std::sync::Arc;

use nix::errno::Errno;
use portolan_net::{Family, IpNet};
use portolan_program::ipvs::{
    Change, DEVICE, Program, RealKey, RealServer, ServerKey, Timeouts, VirtualServer, diff, sysctl_paths,
};

use super::wire::{self, Command, HEADER_LENGTH};
use crate::error::KernelError;
use crate::index;
use crate::netlink::wire as route;
use crate::rawnetlink::{MessageBuilder, OwnedMessage, Protocol, Socket};
use crate::sysctl;

/// `struct ifaddrmsg`.
const ADDRESS_HEADER: usize = 8;

/// `struct ifinfomsg`.
const LINK_HEADER: usize = 16;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const CREATE_EXCLUSIVE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;

/// IPVS and the dummy link of one network namespace: that of the thread which opened it. Sysctls are those of the
/// thread that calls: keep to threads of one namespace.
#[derive(Debug)]
pub struct IpvsRoom {
    generic: Socket,
    route: Socket,
    family: u16,
}

/// What became of changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How many netlink messages were sent.
    pub messages: usize,
    /// The changes that the kernel did not make, by their position, and why. All others were made.
    pub failed: Vec<(usize, KernelError)>,
}

/// Which socket a change goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Generic,
    Route,
    File,
}

impl IpvsRoom {
    /// Opens the room, and loads the module `ip_vs` if it is not there: the kernel does not do so by itself.
    ///
    /// # Errors
    ///
    /// If the kernel has no IPVS, or the process may not use it.
    pub fn open() -> Result<IpvsRoom, KernelError> {
        let mut generic = Socket::open(Protocol::Generic, &[])?;
        let family = match resolve(&mut generic) {
            Err(error) if error.errno() == Some(Errno::ENOENT) => {
                let mut modprobe = Process::new("modprobe");
                modprobe.arg("ip_vs").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                let _ = modprobe.status();
                resolve(&mut generic)
            }
            other => other,
        };
        let family = family.map_err(|error| match error.errno() {
            Some(errno @ Errno::ENOENT) => KernelError::system(
                "use IPVS: the kernel has it not (CONFIG_IP_VS); load it with `modprobe ip_vs`, or choose another \
                 Services mode",
                errno,
            ),
            _ => error,
        })?;
        Ok(IpvsRoom { generic, route: Socket::open(Protocol::Route, &[])?, family })
    }

    /// Reads all virtual servers that are named by an address, the dummy link and its addresses, and the settings.
    /// The virtual servers of others are among them: `diff` knows them.
    pub fn observe(&mut self) -> Result<Program, KernelError> {
        let mut program = Program::default();
        if let Some(index) = self.device()? {
            program.device = true;
            let messages = self.route.dump(route::dump_addresses())?;
            program.addresses = messages.iter().filter_map(|message| address_on(index, message)).collect();
        }
        for message in self.generic.dump(wire::ask(self.family, Command::GetService))? {
            let Some((key, server)) = wire::read_service(&message.attributes(HEADER_LENGTH)) else { continue };
            let real: Vec<RealServer> = self.destinations(&key)?.into_iter().map(|(real, _)| real).collect();
            program.servers.insert(key, Arc::new(VirtualServer { real: real.into(), ..server }));
        }
        program.timeouts = self.timeouts()?;
        for path in sysctl_paths() {
            if let Ok(value) = sysctl::read(path) {
                program.sysctls.insert(path.to_owned(), value);
            }
        }
        Ok(program)
    }

    /// Counts the connections of real servers; `None` for those that are not there. Only their virtual servers are
    /// read.
    pub fn connections(
        &mut self,
        of: impl IntoIterator<Item = (ServerKey, RealKey)>,
    ) -> Result<Vec<(ServerKey, RealKey, Option<u32>)>, KernelError> {
        let mut wanted: BTreeMap<ServerKey, Vec<RealKey>> = BTreeMap::new();
        of.into_iter().for_each(|(server, real)| wanted.entry(server).or_default().push(real));
        let mut counted = Vec::new();
        for (server, list) in wanted {
            let there: BTreeMap<RealKey, u32> =
                self.destinations(&server)?.into_iter().map(|(real, connections)| (real.key, connections)).collect();
            counted.extend(list.into_iter().map(|real| (server, real, there.get(&real).copied())));
        }
        Ok(counted)
    }

    /// Makes changes, in their order. One that fails does not stop the others.
    pub fn apply(&mut self, changes: &[Change]) -> Report {
        let before = self.generic.sent() + self.route.sent();
        let mut failed = Vec::new();
        let mut start = 0;
        while let Some(first) = changes.get(start) {
            let rest = changes.get(start..).unwrap_or_default();
            let alike = rest.iter().take_while(|change| way(change) == way(first)).count();
            let group = rest.get(..alike).unwrap_or_default();
            let outcomes = match way(first) {
                Way::Generic => self.apply_generic(group),
                Way::Route => self.apply_route(group),
                Way::File => group.iter().map(apply_file).collect(),
            };
            let errors =
                outcomes.into_iter().enumerate().filter_map(|(at, outcome)| Some((start + at, outcome.err()?)));
            failed.extend(errors);
            start += alike;
        }
        Report { messages: self.generic.sent() + self.route.sent() - before, failed }
    }

    /// Deletes the dummy link and all virtual servers that are ours, but for those at excluded addresses. Sysctls
    /// stay as they are.
    pub fn clean(&mut self, excluded: &[IpNet]) -> Result<Report, KernelError> {
        let observed = self.observe()?;
        let nothing = Program { excluded: excluded.to_vec(), ..Program::default() };
        Ok(self.apply(&diff(&observed, &nothing)))
    }

    fn apply_generic(&mut self, changes: &[Change]) -> Vec<Result<(), KernelError>> {
        let family = self.family;
        let outcomes = self.generic.batch(changes.iter().map(|change| encode(family, change, false)).collect());
        let settle = |(change, outcome): (&Change, Result<(), KernelError>)| match (change, &outcome) {
            // It is there already, with other settings perhaps.
            (Change::AddServer(..) | Change::AddReal(..), Err(error)) if error.errno() == Some(Errno::EEXIST) => {
                self.generic.request(encode(family, change, true))
            }
            (Change::RemoveServer(_) | Change::RemoveReal(..), Err(error)) if is_gone(error) => Ok(()),
            _ => outcome,
        };
        changes.iter().zip(outcomes).map(settle).collect()
    }

    fn apply_route(&mut self, changes: &[Change]) -> Vec<Result<(), KernelError>> {
        let mut outcomes = Vec::with_capacity(changes.len());
        let mut rest = changes;
        while let Some((first, after)) = rest.split_first() {
            match first {
                Change::CreateDevice => {
                    outcomes.push(ignore(self.route.request(create_dummy()), Errno::EEXIST));
                    rest = after;
                }
                Change::DeleteDevice => {
                    outcomes.push(ignore(self.route.request(route::delete_link(DEVICE)), Errno::ENODEV));
                    rest = after;
                }
                _ => {
                    let is_address = |it: &&Change| matches!(it, Change::AddAddress(_) | Change::RemoveAddress(_));
                    let count = rest.iter().take_while(is_address).count().max(1);
                    let (addresses, after) = rest.split_at(count);
                    outcomes.extend(self.apply_addresses(addresses));
                    rest = after;
                }
            }
        }
        outcomes
    }

    fn apply_addresses(&mut self, changes: &[Change]) -> Vec<Result<(), KernelError>> {
        let index = match index::of(self.route.fd(), DEVICE) {
            Ok(index) => index,
            Err(error) => return changes.iter().map(|_| Err(error.clone())).collect(),
        };
        let message = |change: &Change| match change {
            Change::RemoveAddress(address) => route::remove_address(index, &IpNet::from(*address)),
            Change::AddAddress(address) => route::add_address(index, &IpNet::from(*address), false),
            _ => Vec::new(),
        };
        let outcomes = self.route.batch(changes.iter().map(message).collect());
        let settle = |(change, outcome): (&Change, Result<(), KernelError>)| match change {
            Change::RemoveAddress(_) => ignore(outcome, Errno::EADDRNOTAVAIL),
            _ => outcome,
        };
        changes.iter().zip(outcomes).map(settle).collect()
    }

    /// The real servers of a virtual server, sorted, with their connections; none if it is not there.
    fn destinations(&mut self, key: &ServerKey) -> Result<Vec<(RealServer, u32)>, KernelError> {
        match self.generic.dump(wire::about_service(self.family, Command::GetDestination, key)) {
            Ok(messages) => {
                let read = |message: &OwnedMessage| wire::read_destination(&message.attributes(HEADER_LENGTH), key);
                let mut found: Vec<(RealServer, u32)> = messages.iter().filter_map(read).collect();
                found.sort_by_key(|(real, _)| real.key);
                Ok(found)
            }
            Err(error) if is_gone(&error) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn timeouts(&mut self) -> Result<Timeouts, KernelError> {
        let answer = self.generic.query(wire::ask(self.family, Command::GetConfiguration))?;
        Ok(answer.first().map(|message| wire::read_timeouts(&message.attributes(HEADER_LENGTH))).unwrap_or_default())
    }

    fn device(&self) -> Result<Option<u32>, KernelError> {
        match index::of(self.route.fd(), DEVICE) {
            Ok(index) => Ok(Some(index)),
            Err(KernelError::NoSuchLink(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn resolve(socket: &mut Socket) -> Result<u16, KernelError> {
    let answer = socket.query(wire::get_family())?;
    let id = answer.first().and_then(|message| wire::family_id(&message.attributes(HEADER_LENGTH)));
    id.ok_or(KernelError::Malformed("a generic netlink family has no number"))
}

fn way(change: &Change) -> Way {
    match change {
        Change::SetSysctl(..) => Way::File,
        Change::CreateDevice | Change::DeleteDevice | Change::AddAddress(_) | Change::RemoveAddress(_) => Way::Route,
        Change::SetTimeouts(_)
        | Change::AddServer(..)
        | Change::SetServer(..)
        | Change::AddReal(..)
        | Change::SetReal(..)
        | Change::RemoveReal(..)
        | Change::RemoveServer(_) => Way::Generic,
    }
}

/// A change as a message to IPVS; `exists` turns additions into changes.
fn encode(family: u16, change: &Change, exists: bool) -> Vec<u8> {
    match change {
        Change::AddServer(key, server) if !exists => wire::put_service(family, Command::NewService, key, server),
        Change::AddServer(key, server) | Change::SetServer(key, server) => {
            wire::put_service(family, Command::SetService, key, server)
        }
        Change::AddReal(key, real) if !exists => wire::put_destination(family, Command::NewDestination, key, real),
        Change::AddReal(key, real) | Change::SetReal(key, real) => {
            wire::put_destination(family, Command::SetDestination, key, real)
        }
        Change::RemoveReal(key, real) => wire::delete_destination(family, key, real),
        Change::RemoveServer(key) => wire::about_service(family, Command::DeleteService, key),
        Change::SetTimeouts(timeouts) => wire::set_timeouts(family, timeouts),
        // They go other ways.
        Change::SetSysctl(..)
        | Change::CreateDevice
        | Change::DeleteDevice
        | Change::AddAddress(_)
        | Change::RemoveAddress(_) => Vec::new(),
    }
}

fn apply_file(change: &Change) -> Result<(), KernelError> {
    match change {
        Change::SetSysctl(path, value) => sysctl::write(path, value),
        _ => Ok(()),
    }
}

/// A dummy link, which is down: its addresses are the node's all the same, and nothing is sent by it.
fn create_dummy() -> Vec<u8> {
    let mut message = MessageBuilder::new(libc::RTM_NEWLINK, CREATE_EXCLUSIVE);
    message.header(&[0; LINK_HEADER]);
    message.put_str(IFLA_IFNAME, DEVICE);
    message.nested(IFLA_LINKINFO, |info| {
        info.put_str(IFLA_INFO_KIND, "dummy");
    });
    message.finish()
}

/// An address that is on the link with its whole length. Link-local ones are the kernel's own.
fn address_on(index: u32, message: &OwnedMessage) -> Option<IpAddr> {
    let header: &[u8; ADDRESS_HEADER] = message.header()?;
    let [_, length, _, _, a, b, c, d] = *header;
    let attributes = message.attributes(ADDRESS_HEADER);
    let address = attributes.get(libc::IFA_LOCAL).or_else(|| attributes.get(libc::IFA_ADDRESS))?.address()?;
    let is_whole = length == Family::of(address).bits();
    (is_whole && u32::from_ne_bytes([a, b, c, d]) == index).then_some(address)
}

/// IPVS says `ESRCH` where there is no such virtual server, and `ENOENT` where there is no such real server.
fn is_gone(error: &KernelError) -> bool {
    matches!(error.errno(), Some(Errno::ESRCH | Errno::ENOENT))
}

fn ignore(outcome: Result<(), KernelError>, errno: Errno) -> Result<(), KernelError> {
    match outcome {
        Err(error) if error.errno() == Some(errno) => Ok(()),
        other => other,
    }
}
