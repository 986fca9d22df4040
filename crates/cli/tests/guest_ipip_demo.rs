//! The whole demo with pods by IP in IP, on two segments behind a router, in a kernel that has it: every way answers
//! right, and three live traces go as they were predicted. `lab demo` ends with 0 only then.

use std::process::{Command, Stdio};

/// Whether the kernel has modules that bring IP in IP of both families.
fn has_ipip() -> bool {
    let module = |name: &str| {
        let mut modprobe = Command::new("modprobe");
        modprobe.args(["--dry-run", "--quiet", name]).stdout(Stdio::null()).stderr(Stdio::null());
        modprobe.status().is_ok_and(|status| status.success())
    };
    module("ipip") && module("ip6_tunnel")
}

#[test]
fn every_way_of_the_demo_answers_through_ip_in_ip() {
    if !has_ipip() {
        let this = std::env::current_exe().unwrap();
        return println!(
            "skipped: the kernel has no IP in IP; run cargo xtask guest --memory 4000 --cpus 2 -- {}",
            this.display()
        );
    }
    // The guest's files are gone with it; so is whatever a demo that fails leaves behind.
    let mut demo = Command::new(env!("CARGO_BIN_EXE_portolan"));
    let shop = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/shop.yaml");
    demo.args(["lab", "demo", "-f", shop, "--fabric", "ipip", "--ip-family", "dual", "--segments", "2"]);
    let output = demo.env("PORTOLAN_LAB_DIRECTORY", "/run/labs").output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{errors}");
}
