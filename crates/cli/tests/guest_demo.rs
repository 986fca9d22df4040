//! The whole demo by what this machine's kernel may lack: every way answers right, and three live traces go as they
//! were predicted. `lab demo` ends with 0 only then.

#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "helpers of tests fail by panic, and say what they skip")]
use std::process::Command;

/// Runs the demo in the guest. Its files are gone with it, and so is whatever a demo that fails leaves behind.
fn demo(arguments: &[&str]) {
    if std::env::var_os("PORTOLAN_GUEST").is_none() {
        let this = std::env::current_exe().unwrap();
        return println!("skipped: this is not the guest; run cargo xtask guest --memory 4000 -- {}", this.display());
    }
    let mut demo = Command::new(env!("CARGO_BIN_EXE_portolan"));
    let shop = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/shop.yaml");
    demo.args(["lab", "demo", "-f", shop, "--ip-family", "dual"]).args(arguments);
    let output = demo.env("PORTOLAN_LAB_DIRECTORY", "/run/labs").output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{errors}");
}

#[test]
fn every_way_of_the_demo_answers_through_ipvs() {
    demo(&["--services", "ipvs"]);
}

#[test]
fn every_way_of_the_demo_answers_through_ip_in_ip_on_two_segments() {
    demo(&["--fabric", "ipip", "--segments", "2"]);
}
