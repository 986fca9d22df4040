//! Links the binary at a fixed address.
//!
//! The same file is the CNI plugin, which a runtime starts for every pod. A position-independent
//! program of this size has some 70,000 pointers that the loader relocates at each start, and every
//! page that it writes is copied: 0.5 to 0.7 ms of the 2 ms that a call takes. What is lost is the
//! randomised place of the program's own code; libraries, stack and heap keep theirs.

fn main() {
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|got| got == value);
    if is("CARGO_CFG_TARGET_OS", "linux") && is("CARGO_CFG_TARGET_ENV", "gnu") {
        println!("cargo::rustc-link-arg-bin=portolan=-no-pie");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
