//! The whole demo with Services by IPVS, in a kernel that has it: every way answers right, and three live traces go as
//! they were predicted. `lab demo` ends with 0 only then.

use std::process::{Command, Stdio};

/// Whether the kernel has IPVS, or a module that brings it.
fn has_ipvs() -> bool {
    let module = |name: &str| {
        let mut modprobe = Command::new("modprobe");
        modprobe.args(["--dry-run", "--quiet", name]).stdout(Stdio::null()).stderr(Stdio::null());
        modprobe.status().is_ok_and(|status| status.success())
    };
    std::path::Path::new("/proc/net/ip_vs").exists() || module("ip_vs")
}

#[test]
fn every_way_of_the_demo_answers_through_ipvs() {
    if !has_ipvs() {
        let this = std::env::current_exe().unwrap();
        return println!(
            "skipped: the kernel has no IPVS; run cargo xtask guest --memory 4000 --cpus 2 -- {}",
            this.display()
        );
    }
    // The guest's files are gone with it; so is whatever a demo that fails leaves behind.
    let mut demo = Command::new(env!("CARGO_BIN_EXE_portolan"));
    demo.args(["lab", "demo", "--services", "ipvs", "--ip-family", "dual"]).env("PORTOLAN_LAB_DIRECTORY", "/run/labs");
    let output = demo.output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{errors}");
}
