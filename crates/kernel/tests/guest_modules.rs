//! Modules that the kernel loads only when it is asked to: a guest starts without them.

use std::path::Path;

use portolan_kernel::sysctl;

const FILTER_BRIDGES: &str = "net/bridge/bridge-nf-call-iptables";

#[test]
fn a_sysctl_that_a_module_brings_can_be_set_before_the_module_is_there() {
    let modules = std::fs::read_to_string("/proc/modules").unwrap_or_default();
    let is_there = || Path::new("/proc/sys").join(FILTER_BRIDGES).exists();
    // A machine's module is not unloaded for a test, and a kernel that has it built in is no case.
    if is_there() || modules.is_empty() {
        let this = std::env::current_exe().unwrap();
        return println!("skipped: br_netfilter is loaded; run cargo xtask guest -- {}", this.display());
    }
    sysctl::write(FILTER_BRIDGES, "0").unwrap();
    assert_eq!(sysctl::read(FILTER_BRIDGES).unwrap(), "0");
    sysctl::write(FILTER_BRIDGES, "1").unwrap();
    assert_eq!(sysctl::read(FILTER_BRIDGES).unwrap(), "1");
    let error = sysctl::write("net/bridge/no-such-thing", "1").unwrap_err().to_string();
    assert!(error.contains("net/bridge/no-such-thing") && error.contains("br_netfilter"), "{error}");
}
