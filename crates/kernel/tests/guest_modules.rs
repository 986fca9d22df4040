//! Modules that the kernel loads only when it is asked to: a guest starts without them.

use portolan_kernel::sysctl;

const FILTER_BRIDGES: &str = "net/bridge/bridge-nf-call-iptables";

#[test]
fn a_sysctl_that_a_module_brings_can_be_set_before_the_module_is_there() {
    // It loads a module and sets what bridges do: no machine but the guest is there for that.
    if std::env::var_os("PORTOLAN_GUEST").is_none() {
        let this = std::env::current_exe().unwrap();
        return println!("skipped: this is not the guest; run cargo xtask guest -- {}", this.display());
    }
    sysctl::write(FILTER_BRIDGES, "0").unwrap();
    assert_eq!(sysctl::read(FILTER_BRIDGES).unwrap(), "0");
    sysctl::write(FILTER_BRIDGES, "1").unwrap();
    assert_eq!(sysctl::read(FILTER_BRIDGES).unwrap(), "1");
    let error = sysctl::write("net/bridge/no-such-thing", "1").unwrap_err().to_string();
    assert!(error.contains("net/bridge/no-such-thing") && error.contains("br_netfilter"), "{error}");
}
