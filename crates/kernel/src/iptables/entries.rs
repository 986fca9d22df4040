//! How many rules a table of the legacy backend has, without reading them.
//!
//! That backend tells nobody of changes. Asking for two numbers takes some microseconds whatever the table's size,
//! where reading 10,000 Services takes half a second.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use portolan_net::Family;

use crate::netns::{Namespace, in_namespace};

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO` (`linux/netfilter_ipv4/ip_tables.h`).
const GET_INFO: libc::c_int = 64;

/// The length of a table's name with its zero (`XT_TABLE_MAXNAMELEN`).
const NAME_LENGTH: usize = 32;

/// `struct ipt_getinfo`, which is the same for IPv6.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    name: [u8; NAME_LENGTH],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    entries: u32,
    size: u32,
}

/// The number of a table's rules and their size in bytes; nothing where there is no such table.
pub(super) type TableSize = Option<(u32, u32)>;

/// Asks for a table's size in a namespace. A table that nobody uses is not asked for: that would make it.
pub(super) fn table_size(family: Family, table: &str, namespace: &Namespace) -> TableSize {
    in_namespace(namespace, || ask(family, table)).ok().flatten()
}

fn ask(family: Family, table: &str) -> TableSize {
    let (domain, level, names) = match family {
        Family::V4 => (AddressFamily::Inet, libc::IPPROTO_IP, "ip_tables_names"),
        Family::V6 => (AddressFamily::Inet6, libc::IPPROTO_IPV6, "ip6_tables_names"),
    };
    let mut used = String::new();
    std::fs::File::open(format!("/proc/thread-self/net/{names}")).ok()?.read_to_string(&mut used).ok()?;
    used.lines().find(|name| *name == table)?;
    let socket: OwnedFd = socket(domain, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).ok()?;
    let mut info =
        Info { name: [0; NAME_LENGTH], valid_hooks: 0, hook_entry: [0; 5], underflow: [0; 5], entries: 0, size: 0 };
    info.name.get_mut(..table.len())?.copy_from_slice(table.as_bytes());
    let mut length = libc::socklen_t::try_from(size_of::<Info>()).ok()?;
    // SAFETY: the pointers are to a value of the structure that the kernel fills in for this option, and to its
    // length; both live until the call returns, and the kernel writes no more than that length.
    let outcome =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, GET_INFO, (&raw mut info).cast(), &raw mut length) };
    (outcome == 0).then_some((info.entries, info.size))
}
