//! The addresses that this namespace has now, straight from the kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;

use crate::error::KernelError;

/// Every address of every link, sorted: what a packet to this node may be sent to.
pub fn local_addresses() -> Result<BTreeSet<IpAddr>, KernelError> {
    let links = getifaddrs().map_err(|errno| KernelError::system("list the addresses of this node", errno))?;
    let address_of = |link: nix::ifaddrs::InterfaceAddress| -> Option<IpAddr> {
        let address = link.address?;
        let v4 = address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|it| IpAddr::V6(it.ip())))
    };
    Ok(links.filter_map(address_of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_address_is_among_them() {
        // A namespace of its own may have its loopback down, and so without an address.
        let addresses = local_addresses().unwrap();
        if addresses.is_empty() {
            return println!("skipped: no link of this namespace has an address");
        }
        assert!(addresses.iter().any(IpAddr::is_loopback), "{addresses:?}");
    }
}
